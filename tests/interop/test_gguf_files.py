"""GGUF with ggml's own package: what it writes is read, and dequantized to the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import fetch
from holdfast.adapters import by_name
from holdfast.dequantize import dequantize
from holdfast.formats import gguf
from holdfast.formats._gguf_types import DEQUANTIZED, TYPES
from holdfast.source import open_source

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, dequantized where that is possible."""
    source = open_source(path)
    try:
        index = gguf.index(source.read, source.size, source.name)
        rows = np.arange(len(index))
        batch = dequantize(index, fetch.map_tensors(source, index, rows), rows)
    finally:
        source.close()
    return dict(zip(index.names.tolist(), by_name("numpy").wrap(batch, {}), strict=True))


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_numbers_are_those_that_ggml_makes(name: str) -> None:
    found = numbers(GOLDEN / name)
    expected = MANIFEST[name]["tensors"]
    assert list(expected) == sorted(found) and len(found) == 14
    for tensor, (_, shape, digest) in expected.items():
        assert hashlib.sha256(found[tensor].tobytes()).hexdigest() == digest, tensor
        assert list(found[tensor].shape) == shape or tensor == "bfloat16"
    assert sum(kind in DEQUANTIZED for kind, _, _ in expected.values()) == 5


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("gguf", reason="needs gguf, ggml's own package")


def test_the_table_of_types(theirs: Any) -> None:
    known = {int(kind): sizes for kind, sizes in theirs.GGML_QUANT_SIZES.items()}
    assert len(set(known) & set(TYPES)) >= 30
    for number in set(known) & set(TYPES):
        row = TYPES[number]
        if row.name != "Q8_1":  # of which the package has the size that it once had
            assert (row.elements, row.nbytes) == known[number], row
        assert theirs.GGMLQuantizationType(number).name == row.name


def test_what_ggml_writes(theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = theirs.GGUFWriter(path, "llama")
    tokens = [f"token {i}" for i in range(1000)]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [i / 2 for i in range(1000)])
    source = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    expected = {"plain": source}
    writer.add_tensor("plain", source)
    for name in sorted(DEQUANTIZED):
        kind = theirs.GGMLQuantizationType[name]
        blocks = theirs.quants.quantize(source, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        expected[name] = theirs.quants.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = numbers(path)
    assert list(found) == list(expected) and len(found) == 6
    for name, array in expected.items():
        assert found[name].shape == (96, 256)
        assert found[name].tobytes() == array.astype(np.float32).tobytes()
    with holdfast.open(path, framework="numpy") as f:
        assert f.metadata["tokenizer.ggml.tokens"] == tokens
        assert f.metadata["tokenizer.ggml.scores"] == [i / 2 for i in range(1000)]
        assert f.metadata["general.architecture"] == "llama"
