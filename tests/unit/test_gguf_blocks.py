"""Blocks of quantized numbers: what they are dequantized to, on every variant of the code."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import Tensor, build
from holdfast import fetch
from holdfast.adapters import by_name
from holdfast.dequantize import dequantize, dequantized
from holdfast.formats import _gguf, gguf
from holdfast.formats._gguf_types import BY_TYPE_NAME, DEQUANTIZED
from holdfast.source import open_source
from holdfast.views import TensorBatch

NAMES = sorted(DEQUANTIZED)
CHUNK = 16384  # blocks that a worker takes at once


def halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.int32)


def fifths(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=1, bitorder="little").astype(np.int32) << 4


def expected(name: str, raw: np.ndarray) -> np.ndarray:
    """What blocks, one in each row, stand for, said as plainly as NumPy can."""
    with np.errstate(invalid="ignore", over="ignore"):
        scale, offset = halves(raw[:, :2]), halves(raw[:, 2:4])
        if name == "Q8_0":
            return raw[:, 2:].view(np.int8).astype(np.float32) * scale
        if name == "Q4_0":
            return (nibbles(raw[:, 2:]) - 8).astype(np.float32) * scale
        if name == "Q4_1":
            return nibbles(raw[:, 4:]).astype(np.float32) * scale + offset
        if name == "Q5_0":
            numbers = (nibbles(raw[:, 6:]) | fifths(raw[:, 2:6])) - 16
            return numbers.astype(np.float32) * scale
        assert name == "Q5_1"
        numbers = nibbles(raw[:, 8:]) | fifths(raw[:, 4:8])
        return numbers.astype(np.float32) * scale + offset


def blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    shape = (n, BY_TYPE_NAME[name].nbytes)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Bit for bit, but for which of the many a number that is none is."""
    nothing = np.isnan(wanted)
    return bool(
        (np.isnan(found) == nothing).all()
        and (
            np.where(nothing, 0, found).view("u4") == np.where(nothing, 0, wanted).view("u4")
        ).all()
    )


def run(name: str, raw: np.ndarray, threads: int) -> np.ndarray:
    out = np.full((len(raw), 32), np.nan, np.float32)
    columns: list[Any] = [np.array([x], "u8") for x in (raw.ctypes.data, out.ctypes.data, len(raw))]
    _gguf.dequantize(*columns, np.array([BY_TYPE_NAME[name].id], "i4"), threads)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_variant(name: str) -> None:
    raw = blocks(name, 3000)  # any scale, those that are infinite or no number too
    wanted = expected(name, raw)
    assert np.isnan(wanted).any() and np.isfinite(wanted).any()
    tried = 0
    for which in range(8):
        out = np.zeros((len(raw), 32), np.float32)
        if _gguf.variant(which, raw.ctypes.data, out.ctypes.data, len(raw), BY_TYPE_NAME[name].id):
            assert same(out, wanted), which
            tried += 1
        else:
            assert not out.any()
    assert tried >= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_scale(name: str) -> None:
    """All 65,536 float16, subnormal ones and both zeros among them."""
    raw = blocks(name, 1 << 16)
    raw[:, :2] = np.arange(1 << 16, dtype="<u2").view("u1").reshape(-1, 2)
    assert same(run(name, raw, 2), expected(name, raw))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_runs_longer_than_a_chunk(name: str, threads: int) -> None:
    for n in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3):
        raw = blocks(name, n)
        assert same(run(name, raw, threads), expected(name, raw))


def test_any_address() -> None:
    raw = blocks("Q5_0", 100)
    for shift in (1, 3, 7):
        place, out = np.zeros(raw.nbytes + 8, "u1"), np.zeros(3200 * 4 + 8, "u1")
        place[shift : shift + raw.nbytes] = raw.reshape(-1)
        for which in range(3):
            if _gguf.variant(which, place.ctypes.data + shift, out.ctypes.data + 4, 100, 6):
                found = out[4:-4].view("f4").reshape(100, 32)
                assert same(found, expected("Q5_0", raw))
        assert not out[:4].any() and not out[-4:].any()


def test_many_runs_and_none() -> None:
    lengths = [0, 1, CHUNK, 0, 5, CHUNK * 2 + 1, 0]
    raws = [blocks(NAMES[i % 5], n, i) for i, n in enumerate(lengths)]
    outs = [np.zeros((n, 32), np.float32) for n in lengths]
    _gguf.dequantize(
        np.array([raw.ctypes.data for raw in raws], "u8"),
        np.array([out.ctypes.data for out in outs], "u8"),
        np.array(lengths, "u8"),
        np.array([BY_TYPE_NAME[NAMES[i % 5]].id for i in range(len(raws))], "i4"),
    )
    for i, (raw, out) in enumerate(zip(raws, outs, strict=True)):
        assert same(out, expected(NAMES[i % 5], raw))
    none = np.zeros(0, "u8")
    _gguf.dequantize(none, none, none, np.zeros(0, "i4"))


@pytest.mark.parametrize("kind", [0, 1, 4, 9, 12, 30, 43, -1])
def test_other_types(kind: int) -> None:
    zero = np.zeros(1, "u8")
    with pytest.raises(ValueError, match=f"blocks of type {kind} "):
        _gguf.dequantize(zero, zero, zero, np.array([kind], "i4"))
    with pytest.raises(ValueError, match=f"blocks of type {kind} "):
        _gguf.variant(0, 0, 0, 0, kind)


def test_columns_have_one_length() -> None:
    one, two = np.zeros(1, "u8"), np.zeros(2, "u8")
    with pytest.raises(AssertionError):
        _gguf.dequantize(one, two, one, np.array([2], "i4"))


# -- tensors of a file ---------------------------------------------------------------------------

TENSORS = [
    Tensor.random("plain", (3, 5), "F32", 1),
    *(Tensor.random(name, (4, 3, 64), name, i) for i, name in enumerate(NAMES)),
    Tensor.random("raw", (2, 512), "Q4_K", 2),
    Tensor.random("none", (0, 32), "Q8_0", 3),
    Tensor.random("row", (1 << 20,), "Q4_0", 4),
    Tensor.random("last", (7,), "BF16", 5),
]
EXPECTED = {
    tensor.name: expected(
        tensor.kind,
        np.frombuffer(tensor.data, "u1").reshape(-1, BY_TYPE_NAME[tensor.kind].nbytes),
    ).reshape(tensor.shape)
    for tensor in TENSORS
    if tensor.kind in DEQUANTIZED
}


def check(batch: TensorBatch, rows: np.ndarray) -> None:
    arrays = by_name("numpy").wrap(batch, {})
    assert len(arrays) == len(rows) > 0
    for row, array in zip(rows.tolist(), arrays, strict=True):
        tensor = TENSORS[row]
        if tensor.name in EXPECTED:
            assert array.dtype == np.float32 and array.shape == tensor.shape
            assert same(array, EXPECTED[tensor.name])
        else:
            assert array.tobytes() == tensor.data
    del batch
    for row, array in zip(rows.tolist(), arrays, strict=True):  # they keep what they need
        assert array.tobytes() == (EXPECTED.get(TENSORS[row].name, array)).tobytes()


@pytest.mark.parametrize("rows", [None, [1], [0], [0, 6], [8, 2, 6], [7]])
@pytest.mark.parametrize("mapped", [True, False])
def test_tensors(mapped: bool, rows: list[int] | None, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build(TENSORS))
    source = open_source(path)
    try:
        index = gguf.index(source.read, source.size, source.name)
        which = np.arange(len(index)) if rows is None else np.array(rows)
        if mapped:
            batch = fetch.map_tensors(source, index, which)
        else:
            batch = fetch.read_tensors(source, index, which, verify=False)
        check(dequantize(index, batch, which, threads=2), which)
    finally:
        source.close()


def test_one_tensor_of_many_costs_nothing_of_the_others() -> None:
    import gguf_files

    data = build([Tensor.random(f"w{i}", (i + 1, 32), "Q8_0") for i in range(300)])
    index = gguf.index(gguf_files.reader(data), len(data), "x")
    rows = np.array([200, 7])
    found = dequantize(index, fetch.blank_tensors(index, rows), rows)
    assert [array.shape for array in by_name("numpy").wrap(found, {})] == [(201, 32), (8, 32)]
    assert len(found.dims) <= 10  # and not those of all 300


def test_the_index_of_what_is_dequantized() -> None:
    import gguf_files

    data = build(TENSORS)
    index = gguf.index(gguf_files.reader(data), len(data), "x")
    before = index.entries.copy(), index.dims.copy(), dict(index.encodings)
    found = dequantized(index)
    assert (index.entries == before[0]).all() and (index.dims == before[1]).all()
    assert index.encodings == before[2] and found.encodings == {6: "Q4_K"}
    for row, tensor in enumerate(TENSORS):
        if tensor.name in EXPECTED:
            assert (found.dtype(row).name, found.shape(row)) == ("float32", tensor.shape)
        else:
            assert found.shape(row) == index.shape(row)
        assert found.dtype(row).nbytes(found.shape(row)) == found.entries[row]["nbytes"]
        assert found.entries[row]["offset"] == index.entries[row]["offset"]
    assert dequantized(found) is found


def test_the_compiler_is_told_to_round_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing else keeps one from contracting a * b + c where the machine has fma for everyone.
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    script = Path(__file__).parents[2] / "setup.py"
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    runpy.run_path(str(script))
    args = {one.name: one.extra_compile_args for one in asked["ext_modules"]}
    assert "-ffp-contract=off" in args["holdfast.formats._gguf"]
