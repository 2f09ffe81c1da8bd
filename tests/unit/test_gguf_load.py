"""GGUF files through load, open, save and convert."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_gguf_blocks import EXPECTED, TENSORS, same

import gguf_files as files
from gguf_files import build, pair

PAIRS = [
    pair("general.architecture", files.STRING, "llama"),
    pair("llama.block_count", files.U32, 32),
    files.array("tokenizer.ggml.tokens", files.STRING, ["<s>", "a"]),
]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "tokenizer.ggml.tokens": ["<s>", "a"],
}
RAW = {tensor.name: tensor.kind for tensor in TENSORS if tensor.kind.startswith("Q")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "x.gguf"
    found.write_bytes(build(TENSORS, PAIRS))
    return found


def check(name: str, found: Any) -> None:
    array = np.asarray(found) if not hasattr(found, "numpy") else found
    (tensor,) = (tensor for tensor in TENSORS if tensor.name == name)
    if name in EXPECTED:
        array = array.numpy() if hasattr(array, "numpy") else array
        assert array.dtype == np.float32 and array.shape == tensor.shape
        assert same(array, EXPECTED[name])
    else:
        raw = array.view(torch_uint8()).numpy() if hasattr(array, "numpy") else array
        assert raw.tobytes() == tensor.data


def torch_uint8() -> Any:
    import torch

    return torch.uint8


@pytest.mark.parametrize("mmap", [True, False, None])
def test_load(path: Path, mmap: bool | None) -> None:
    raw = holdfast.load(path, framework="numpy", mmap=mmap)
    assert raw.metadata == METADATA and raw.encodings == RAW
    assert [raw[tensor.name].tobytes() for tensor in TENSORS] == [x.data for x in TENSORS]
    found = holdfast.load(path, framework="numpy", mmap=mmap, dequantize=True, threads=2)
    assert list(found) == [tensor.name for tensor in TENSORS]
    assert found.metadata == METADATA and found.encodings == {"raw": "Q4_K"}
    for name, array in found.items():
        check(name, array)
    part = holdfast.load(path, framework="numpy", keys=["Q8_0", "raw"], dequantize=True, mmap=mmap)
    assert list(part) == ["Q8_0", "raw"] and part.encodings == {"raw": "Q4_K"}
    check("Q8_0", part["Q8_0"])


def test_load_of_a_stream(path: Path) -> None:
    found = holdfast.load(io.BytesIO(path.read_bytes()), framework="numpy", dequantize=True)
    assert len(found) == len(TENSORS)
    for name, array in found.items():
        check(name, array)


@pytest.mark.parametrize("stream", [False, True])
def test_open(path: Path, stream: bool) -> None:
    f: Any = io.BytesIO(path.read_bytes()) if stream else path
    with holdfast.open(f, framework="numpy", dequantize=True) as opened:
        assert opened.metadata == METADATA
        for tensor in TENSORS:
            info = opened.info(tensor.name)
            assert info.encoding == ("Q4_K" if tensor.name == "raw" else None)
            check(tensor.name, opened[tensor.name])
            if tensor.name in EXPECTED:
                assert (info.dtype, info.shape) == ("float32", tensor.shape)
                part = opened.slice(tensor.name)
                assert part.shape == tensor.shape
                assert same(part[1:3], EXPECTED[tensor.name][1:3])
        opened.prefetch()
        check("Q4_1", opened["Q4_1"])
    f = io.BytesIO(path.read_bytes()) if stream else path
    with holdfast.open(f, framework="numpy") as opened:
        assert {name: opened.info(name).encoding for name in opened if name in RAW} == RAW
        assert opened.info("Q8_0").shape == (4, 3, 2, 34)
        assert opened.slice("Q8_0")[1].shape == (3, 2, 34)


def test_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = holdfast.load(path, framework="torch", dequantize=True)
    assert found["last"].dtype == torch.bfloat16
    for name, tensor in found.items():
        check(name, tensor)
    meta = holdfast.load(path, "meta", framework="torch", dequantize=True)
    assert meta["Q8_0"].shape == (4, 3, 64) and meta["Q8_0"].dtype == torch.float32
    layer = torch.nn.Linear(64, 12)
    layer.load_state_dict({"weight": found["Q4_0"].reshape(12, 64), "bias": torch.zeros(12)})
    assert same(layer.weight.detach().numpy(), EXPECTED["Q4_0"].reshape(12, 64))


@pytest.mark.parametrize("end", ["safetensors", "pt", "npz"])
def test_what_was_loaded_is_saved(path: Path, tmp_path: Path, end: str) -> None:
    found = holdfast.load(path, framework="numpy", dequantize=True, keys=["plain", "Q*"])
    holdfast.save(found, tmp_path / f"y.{end}")
    again = holdfast.load(tmp_path / f"y.{end}", framework="numpy")
    assert type(again) is dict and list(again) == list(found)
    for name, array in again.items():
        check(name, array)


def test_convert(path: Path, tmp_path: Path) -> None:
    holdfast.convert(path, tmp_path / "y.safetensors")
    with holdfast.open(tmp_path / "y.safetensors", framework="numpy") as f:
        assert [f[tensor.name].tobytes() for tensor in TENSORS] == [x.data for x in TENSORS]
        assert f.metadata["general.architecture"] == "llama"
        assert f.metadata["llama.block_count"] == "32"
        assert json.loads(f.metadata["tokenizer.ggml.tokens"]) == ["<s>", "a"]
        assert json.loads(f.metadata["gguf.encodings"]) == RAW


def test_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from holdfast.cli import main

    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "# llama.block_count: 32\n" in text and "raw  Q4_K  2x2x144" in text
    assert main(["info", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["encoding"] for row in rows if row["name"] == "raw"] == ["Q4_K"]


def test_other_formats_have_nothing_to_dequantize(tmp_path: Path) -> None:
    holdfast.save({"w": np.arange(3.0)}, tmp_path / "y")
    found = holdfast.load(tmp_path / "y", dequantize=True, framework="numpy")
    assert type(found) is dict and found["w"].tolist() == [0, 1, 2]
    with holdfast.open(tmp_path / "y", dequantize=True, framework="numpy") as f:
        assert f["w"].tolist() == [0, 1, 2] and f.info("w").encoding is None
        assert type(f.metadata) is dict
