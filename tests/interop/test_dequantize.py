"""GGUF blocks made floats where a model is filled, and where a file is converted."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from gguf_files import STRING, Tensor, build, pair
from holdfast import _engine, fill, scratch
from shard_files import listing, same

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SHAPES = {"Q4_0": (5, 3, 64), "Q4_1": (4, 32), "Q5_0": (96,), "Q5_1": (0, 32), "Q8_0": (7, 160)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    made = [Tensor.random(kind, SHAPES[kind], kind, i) for i, kind in enumerate(KINDS)]
    made.append(Tensor.random("raw", (2, 512), "Q4_K", 9))
    plain = rng.standard_normal((3, 5)).astype(np.float32)
    made.append(Tensor("plain", plain.shape, "F32", plain.tobytes()))
    found = tmp_path / "x.gguf"
    found.write_bytes(build(made, [pair("general.name", STRING, "é")]))
    return found


def numbers(path: Path) -> dict[str, np.ndarray]:
    return dict(holdfast.load(path, framework="numpy", dequantize=True))


def equal(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- load_into ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [fill.PART, 256])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_tensors_of_any_dtype_are_filled(
    path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, part: int
) -> None:
    monkeypatch.setattr(fill, "PART", part)
    expected = numbers(path)
    target = {name: np.empty(array.shape, dtype) for name, array in expected.items()}
    target["raw"] = np.empty_like(expected["raw"])
    with np.errstate(over="ignore", invalid="ignore"):
        keys = holdfast.load_into(target, path, dequantize=True)
        for name, array in expected.items():
            assert equal(target[name], array.astype(target[name].dtype)), name
    assert keys == ([], [])


def test_strided_targets_streams_and_other_names(path: Path) -> None:
    expected = numbers(path)
    target = {"w": np.zeros((160, 7), "f4").T, "v": np.zeros((5, 6, 64), "f4")[:, ::2]}
    rename = {"^Q8_0$": "w", "^Q4_0$": "v"}
    f = io.BytesIO(path.read_bytes())
    holdfast.load_into(target, f, strict=False, rename=rename, dequantize=True, threads=2)
    assert equal(np.ascontiguousarray(target["w"]), expected["Q8_0"])
    assert equal(np.ascontiguousarray(target["v"]), expected["Q4_0"])


def test_parameters_of_a_model(path: Path) -> None:
    torch = pytest.importorskip("torch")
    expected = numbers(path)
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(160, 7, bias=False, dtype=dtype)
        holdfast.load_into(layer, path, strict=False, rename={"^Q8_0$": "weight"}, dequantize=True)
        wanted = torch.from_numpy(expected["Q8_0"].copy()).to(dtype)
        assert layer.weight.requires_grad
        assert torch.equal(layer.weight.view(torch.uint8), wanted.view(torch.uint8))


def test_blocks_are_not_filled_unasked(path: Path) -> None:
    target = {"Q8_0": np.zeros((7, 160), "f4"), "raw": np.zeros((2, 512), "f4")}
    with pytest.raises(RuntimeError, match=r"size mismatch for Q8_0.*blocks of Q8_0: dequantize="):
        holdfast.load_into(target, path, strict=False)
    with pytest.raises(RuntimeError, match="blocks of Q4_K, which cannot be dequantized") as error:
        holdfast.load_into(target, path, strict=False, dequantize=True)
    assert "Q8_0" not in str(error.value)
    assert not target["Q8_0"].any()
    blocks = {"Q8_0": np.zeros((7, 5, 34), "u1")}
    holdfast.load_into(blocks, path, strict=False)
    assert same(blocks, {"Q8_0": holdfast.load(path, framework="numpy")["Q8_0"]})


# ---- convert --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "torch", "torch_legacy", "npz", "oneflow"])
@pytest.mark.parametrize("part", [scratch.PART, 64])
def test_convert_to_every_format(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, part: int
) -> None:
    monkeypatch.setattr(scratch, "PART", part)
    expected = numbers(path)
    dst = tmp_path / ("y.npz" if form == "npz" else "y")
    lost = form not in ("safetensors", "torch")
    with pytest.warns(UserWarning, match="metadata") if lost else contextlib.nullcontext():
        holdfast.convert(path, dst, form, dequantize=True)
    found = holdfast.load(dst, framework="numpy")
    assert set(found) == set(expected)
    assert all(equal(np.asarray(found[name]), array) for name, array in expected.items())
    assert holdfast.verify(dst).ok
    assert listing(tmp_path) == sorted([path.name, dst.name])


def test_convert_keeps_metadata_and_says_what_is_left_as_blocks(path: Path, tmp_path: Path) -> None:
    holdfast.convert(path, tmp_path / "y", dequantize=True)
    with holdfast.open(tmp_path / "y") as f:
        assert f.metadata["general.name"] == "é"
        assert json.loads(f.metadata["gguf.encodings"]) == {"raw": "Q4_K"}
    assert holdfast.verify(tmp_path / "y").checked == len(KINDS) + 2


def test_convert_streams_and_shards(path: Path, tmp_path: Path) -> None:
    expected = numbers(path)
    out = io.BytesIO()
    holdfast.convert(io.BytesIO(path.read_bytes()), out, dequantize=True)
    out.seek(0)
    found = holdfast.load(out, framework="numpy")
    assert all(equal(found[name], array) for name, array in expected.items())

    holdfast.convert(path, tmp_path / "m", max_shard_size=4000, dequantize=True)
    found = holdfast.load(tmp_path / "m", framework="numpy")
    assert all(equal(found[name], array) for name, array in expected.items())
    assert len(listing(tmp_path / "m")) == 5


def test_blocks_beside_what_has_checksums(path: Path, tmp_path: Path) -> None:
    """A folder in which shards of several formats are one checkpoint."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(path.read_bytes())
    own = {"z": np.arange(60.0).reshape(5, 12), "e": np.zeros((0, 2))}
    for name in ("b.npz", "b.pt", "b.safetensors"):
        holdfast.save(own, folder / name)
        weight_map = dict.fromkeys(numbers(path), "a.gguf") | dict.fromkeys(own, name)
        (folder / "x.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for end in ("safetensors", "pt"):
            holdfast.convert(folder, tmp_path / f"y.{end}", dequantize=True)
            found = holdfast.load(tmp_path / f"y.{end}", framework="numpy")
            for key, array in (numbers(path) | own).items():
                assert equal(found[key], array), (name, key)
        with holdfast.open(folder) as f:
            info = f.info("z")
        data = bytearray((folder / name).read_bytes())
        data[info.offset + 3] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(holdfast.ChecksumError, match="damaged"):
            holdfast.convert(folder, tmp_path / "bad", dequantize=True)
        (folder / name).unlink()
    assert not (tmp_path / "bad").exists()


def test_no_room_is_an_error_and_nothing_is_left(path: Path, tmp_path: Path) -> None:
    _engine.fault_ban("pwrite", errno.ENOSPC)
    try:
        with pytest.raises(OSError, match="No space"):
            holdfast.convert(path, tmp_path / "y", dequantize=True)
    finally:
        _engine.fault_ban(None, 0)
    assert listing(tmp_path) == [path.name]


def test_other_formats_have_nothing_to_dequantize(tmp_path: Path) -> None:
    holdfast.save({"w": np.arange(3.0)}, tmp_path / "x")
    holdfast.convert(tmp_path / "x", tmp_path / "y", dequantize=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_command(path: Path, tmp_path: Path) -> None:
    from holdfast.cli import main

    assert main(["convert", str(path), str(tmp_path / "y"), "--dequantize"]) == 0
    assert equal(holdfast.load(tmp_path / "y", framework="numpy")["Q5_0"], numbers(path)["Q5_0"])


@pytest.mark.skipif(
    "HOLDFAST_SANITIZED" in os.environ, reason="the sanitizer takes memory of its own"
)
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """80 MB of blocks are 300 MB of floats; a process of its own that has never so much at once."""
    large = Tensor.random("large", (2000, 32 * 600), "Q8_0")
    (tmp_path / "x.gguf").write_bytes(
        build([large, *(Tensor.random(f"t{i}", (100, 3200), "Q8_0", i) for i in range(100))], [])
    )
    code = """
import sys, numpy as np, holdfast
src, dst = sys.argv[1:]
target = {"large": np.zeros((2000, 19200), np.float16)}
target["large"] += 1
def high():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
start = high()
with np.errstate(all="ignore"):
    holdfast.load_into(target, src, strict=False, dequantize=True)
print(high() - start)
start = high()
holdfast.convert(src, dst, dequantize=True, durable=False)
print(high() - start)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "x.gguf", tmp_path / "y"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    filled, converted = map(int, done.stdout.split())
    assert filled < 60_000_000 and converted < 120_000_000, done.stdout
    with holdfast.open(tmp_path / "y", framework="numpy") as f:
        assert len(f) == 101 and f.info("large").nbytes == 2000 * 19200 * 4
