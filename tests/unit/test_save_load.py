"""save and load, end to end, on NumPy arrays."""

from __future__ import annotations

import io
import os
import random
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast


def same(a: Any, b: Any) -> bool:
    """Equality that looks at types and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    state = OrderedDict((f"layer.{i}.weight", rng.random((i + 1, 7), "f4")) for i in range(9))
    return {
        "model": state,
        "optimizer": {
            "state": {
                i: {"step": np.array(i, "f4"), "exp_avg": rng.random((i + 1, 7))} for i in range(9)
            },
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(9))}],
        },
        "rng": {"python": random.getstate(), "numpy": np.random.get_state()},
        "epoch": 3,
        "best": -0.0,
        "note": "día \ud800",
        "blob": bytes(range(256)) * 64,
    }


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_round_trip(tmp_path: Path, checkpoint: dict[str, Any], mmap: bool, kind: Any) -> None:
    path = kind(str(tmp_path / "ckpt"))
    holdfast.save(checkpoint, path)
    assert same(holdfast.load(path, mmap=mmap), checkpoint)


def test_file_objects(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    stream = io.BytesIO()
    stream.write(b"before")
    holdfast.save(checkpoint, stream)
    stream.seek(6)
    assert same(holdfast.load(stream), checkpoint)
    holdfast.save(checkpoint, tmp_path / "x")
    assert stream.getvalue()[6:] == (tmp_path / "x").read_bytes()
    with open(tmp_path / "x", "rb") as file:
        assert same(holdfast.load(file), checkpoint)
    with open(tmp_path / "x", "rb", buffering=0) as file:
        assert same(holdfast.load(file), checkpoint)


def test_pipe(checkpoint: dict[str, Any]) -> None:
    r, w = os.pipe()

    def write() -> None:
        with open(w, "wb") as sink:
            holdfast.save(checkpoint, sink)

    thread = threading.Thread(target=write)
    thread.start()
    with open(r, "rb") as stream:
        got = holdfast.load(stream)
    thread.join()
    assert same(got, checkpoint)


def test_named_pipe_as_path(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    thread = threading.Thread(target=holdfast.save, args=(checkpoint, path))
    thread.start()
    got = holdfast.load(path)
    thread.join()
    assert same(got, checkpoint)


def test_deterministic(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    holdfast.save(checkpoint, tmp_path / "a")
    holdfast.save(checkpoint, tmp_path / "b", durable=False, threads=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


ODD = {
    "transposed": np.arange(12, dtype="i4").reshape(3, 4).T,
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "negative": np.arange(10, dtype="i2")[::-1],
    "strided": np.arange(100, dtype="u1").reshape(10, 10)[1::3, ::-2],
    "big-endian": np.arange(5, dtype=">f8"),
    "big-endian strided": np.arange(12, dtype=">u4").reshape(3, 4)[:, ::2],
    "expanded": np.broadcast_to(np.float32(2.5), (3, 4)),
    "scalar": np.array(3, "i8"),
    "empty": np.zeros((0, 5), "f2"),
    "view of a big one": np.zeros((1000, 1000))[5:7, 3:9],
    "complex128": np.array([1 + 2j, complex("nan")]),
    "complex64": np.array([[1 + 2j]], "c8"),
    "datetime": np.array(["2026-01-01", "NaT"], "M8[ns]"),
    "text": np.array(["a", "ßü"]),
    "bytes": np.array([b"x", b"yz"]),
    "record": np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")]),
}
ODD["read-only"] = np.arange(4)
ODD["read-only"].flags.writeable = False


@pytest.mark.parametrize("mmap", [True, False])
def test_odd_arrays(tmp_path: Path, mmap: bool) -> None:
    holdfast.save(ODD, tmp_path / "odd")
    got = holdfast.load(tmp_path / "odd", mmap=mmap)
    assert list(got) == list(ODD)
    for name, array in ODD.items():
        assert got[name].shape == array.shape, name
        assert got[name].dtype == array.dtype.newbyteorder("="), name
        assert got[name].tolist() == array.tolist() or name == "complex128", name
        assert got[name].flags.writeable and got[name].flags.c_contiguous, name
    assert (tmp_path / "odd").stat().st_size < 20_000


@pytest.mark.parametrize("mmap", [True, False])
def test_ties(tmp_path: Path, mmap: bool) -> None:
    shared = np.arange(1000.0)
    obj = {"embed": shared, "other": np.ones(3), "head": shared[:], "part": shared[:10]}
    holdfast.save(obj, tmp_path / "tied")
    assert (tmp_path / "tied").stat().st_size < 4096 + 2 * 8000
    got = holdfast.load(tmp_path / "tied", mmap=mmap)
    assert list(got) == list(obj)
    got["head"][0] = 42
    assert got["embed"][0] == 42 and got["part"][0] == 0
    with holdfast.open(tmp_path / "tied") as f:
        assert set(f) == set(obj) and len(f) == 4 and "head" in f
        assert f["head"].shape == (1000,)


def test_maps_are_private_and_writable(tmp_path: Path) -> None:
    holdfast.save({"x": np.zeros(5000)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    array = holdfast.load(tmp_path / "x", mmap=True)["x"]
    array[:] = 1
    del array
    assert (tmp_path / "x").read_bytes() == before


def test_overwriting_what_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x"
    holdfast.save({"x": np.zeros(5000)}, path)
    old = holdfast.load(path, mmap=True)["x"]
    holdfast.save({"x": old + 1}, path)
    assert not old.any()
    holdfast.save({"x": holdfast.load(path)["x"]}, path)  # onto the file it is mapped from
    assert (holdfast.load(path)["x"] == 1).all()


def test_keys(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    path = tmp_path / "ckpt"
    holdfast.save(checkpoint, path)
    got = holdfast.load(path, keys="model.layer.*")
    assert list(got) == [f"model.layer.{i}.weight" for i in range(9)]
    assert same(got["model.layer.4.weight"], checkpoint["model"]["layer.4.weight"])
    got = holdfast.load(path, keys=["optimizer.state.2.*", "model.layer.0.weight"], mmap=False)
    assert set(got) == {
        "model.layer.0.weight",
        "optimizer.state.2.step",
        "optimizer.state.2.exp_avg",
    }
    with pytest.raises(KeyError, match="model.layer.1.weight"):
        holdfast.load(path, keys="model.layer1.weight")


def test_metadata(tmp_path: Path) -> None:
    holdfast.save({"x": np.ones(2)}, tmp_path / "x", metadata={"licence": "MIT", "é": "\n"})
    with holdfast.open(tmp_path / "x") as f:
        assert f.metadata == {"licence": "MIT", "é": "\n"}
    with pytest.raises(TypeError):
        holdfast.save({"x": np.ones(2)}, tmp_path / "y", metadata={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="holdfast"):
        holdfast.save({"x": np.ones(2)}, tmp_path / "y", metadata={"holdfast": ""})
    assert not (tmp_path / "y").exists()


class Thing:
    pass


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ({"a": 1, "scheduler": lambda step: step}, r"\$\['scheduler'\]"),
        ({"m": [1, {"deep": Thing()}]}, r"\$\['m'\]\[1\]\['deep'\]"),
        ({"x": np.array([None, 1], object)}, "x"),
        ({("a", Thing()): 1}, r"\$"),
    ],
)
def test_what_cannot_be_held(tmp_path: Path, obj: Any, path: str) -> None:
    with pytest.raises(TypeError, match=path):
        holdfast.save(obj, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_cycle(tmp_path: Path) -> None:
    obj: dict[str, Any] = {"a": []}
    obj["a"].append(obj)
    with pytest.raises(ValueError, match="itself"):
        holdfast.save(obj, tmp_path / "x")


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    holdfast.save({"x": np.zeros(1 << 20)}, tmp_path / "x", progress=lambda *p: seen.append(p))
    assert seen[-1][0] == seen[-1][1] > 8 << 20
    assert seen == sorted(seen)
    seen.clear()
    holdfast.load(tmp_path / "x", mmap=False, progress=lambda *p: seen.append(p))
    assert seen[-1] == (8 << 20, 8 << 20)

    def stop(done: int, total: int) -> None:
        raise KeyError("stop")

    before = (tmp_path / "x").read_bytes()
    with pytest.raises(KeyError, match="stop"):
        holdfast.save({"x": np.ones(1 << 22)}, tmp_path / "x", progress=stop)
    assert (tmp_path / "x").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    holdfast.save({"x": np.zeros(1000)}, tmp_path / "x", progress=True)
    assert "100%" in capfd.readouterr().err


def test_bad_arguments(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for bad in (0, -1):
        with pytest.raises(ValueError, match="threads"):
            holdfast.save({}, path, threads=bad)
    for call in (holdfast.save, holdfast.load_into):
        with pytest.raises(TypeError, match="staging must be a Staging or None, not int"):
            call({}, path, staging=5)  # type: ignore[operator]
    for call in (holdfast.load, holdfast.open):
        with pytest.raises(TypeError, match="staging must be a Staging or None, not int"):
            call(path, staging=5)  # type: ignore[operator]
    with pytest.raises(TypeError, match="path or a binary file object"):
        holdfast.save({}, 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text file object"):
        holdfast.save({}, io.StringIO())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text file object"):
        holdfast.load(io.StringIO("x"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format"):
        holdfast.save({}, path, format="zip")
    with pytest.raises(ValueError, match=r"\.gguf"):
        holdfast.save({}, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="exported programs"):
        holdfast.save({}, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="framework"):
        holdfast.load(io.BytesIO(b""), framework="caffe")
    assert not list(tmp_path.iterdir())


def test_bad_paths(tmp_path: Path) -> None:
    for call in (holdfast.load, holdfast.open, holdfast.verify):
        with pytest.raises(FileNotFoundError) as error:
            call(tmp_path / "absent")  # type: ignore[operator]
        assert error.value.filename == str(tmp_path / "absent")
        with pytest.raises(IsADirectoryError):
            call(tmp_path)  # type: ignore[operator]
    with pytest.raises(IsADirectoryError):
        holdfast.save({}, tmp_path)
    with pytest.raises(FileNotFoundError):
        holdfast.save({}, tmp_path / "no" / "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 60, "zip"),
        (b"\x80\x04\x95", "pickle"),
        (b"\x93NUMPY\x01\x00", "npy"),
        (b"not a checkpoint at all", "not a checkpoint"),
        (struct.pack("<Q", 1 << 40) + b"{" + b" " * 100, "header"),
        (struct.pack("<Q", 500) + b'{"a":', "header"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    for source in (path, io.BytesIO(content)):
        with pytest.raises(holdfast.FormatError, match=words) as error:
            holdfast.load(source)
        assert str(path) in str(error.value) or source is not path


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x"
    holdfast.save({"x": np.random.default_rng(0).random(3000)}, path)
    whole = path.read_bytes()
    for size in (4, 8, 500, 4096, 5000, len(whole) - 1):
        path.write_bytes(whole[:size])
        for mmap in (True, False):
            with pytest.raises(holdfast.FormatError, match=str(path)):
                holdfast.load(path, mmap=mmap)
        with pytest.raises(holdfast.FormatError):
            holdfast.load(io.BytesIO(whole[:size]))
        assert not holdfast.verify(path).ok
    path.write_bytes(whole + b"\0")
    with pytest.raises(holdfast.FormatError):
        holdfast.load(path)


@pytest.mark.parametrize("format", ["safetensors", "torch", "npz", "oneflow", "torch_legacy"])
@pytest.mark.parametrize("metadata", ["text", [("a", "b")], 7, ()])
def test_metadata_that_are_no_dict(tmp_path: Path, format: str, metadata: Any) -> None:
    with pytest.raises(TypeError, match="metadata must be a dict of str to str"):
        holdfast.save({"w": np.ones(2)}, tmp_path / "x", format=format, metadata=metadata)
    assert not any(tmp_path.iterdir())
