"""holdfast.convert: between every pair of formats, with what holds of saves holding of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

FORMATS = {"safetensors": ".safetensors", "torch": ".pt", "torch_legacy": ".old"}
GOLDEN = Path(__file__).parents[1] / "golden"


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    tied = rng.random((7, 3))
    return {
        "model": OrderedDict(w=rng.random((300, 200), "f4"), tied=tied, b=np.zeros((0, 4), "i2")),
        "head": tied,
        "odd": rng.integers(0, 9, 5, np.uint8),
        "after": rng.random(33),
        "epoch": 3,
        "lr": [0.5, (None, True, -(2**70))],
        "note": "é",
        "raw": b"\x00\xff" * 3,
        7: {"step": np.float64(2.5)},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_every_pair(tmp_path: Path, before: str, after: str) -> None:
    src, dst = tmp_path / f"src{FORMATS[before]}", tmp_path / f"dst{FORMATS[after]}"
    metadata = None if before == "torch_legacy" else {"by": "me"}
    holdfast.save(sample(), src, format=before, metadata=metadata)
    content = src.read_bytes()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        holdfast.convert(src, dst, format=after)
    lost = after == "torch_legacy" and metadata is not None
    assert [("metadata ['by']" in str(w.message)) for w in warned] == [True] * lost
    assert src.read_bytes() == content
    found = holdfast.load(dst, framework="numpy")
    assert same(found, sample())
    assert found["head"] is found["model"]["tied"]
    report = holdfast.verify(dst)
    assert report.ok
    assert report.checked == (0 if after == "torch_legacy" else 5)
    with holdfast.open(dst) as f:
        assert f.metadata == ({} if "torch_legacy" in (before, after) else {"by": "me"})


def test_onto_itself_and_by_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    holdfast.save(sample(), path)
    holdfast.convert(path, path, "safetensors")
    assert path.read_bytes()[8:9] == b"{"
    holdfast.convert(path, path)
    assert path.read_bytes()[:2] == b"PK"
    assert same(holdfast.load(path, framework="numpy"), sample())


def test_file_objects(tmp_path: Path) -> None:
    src, dst = io.BytesIO(), io.BytesIO()
    holdfast.save(sample(), src)
    src.seek(0)
    holdfast.convert(src, dst, "torch")
    dst.seek(0)
    assert same(holdfast.load(dst, framework="numpy"), sample())


@pytest.mark.parametrize("before", ["safetensors", "torch"])
@pytest.mark.parametrize("after", ["safetensors", "torch"])
def test_damage_is_not_passed_on(tmp_path: Path, before: str, after: str) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    holdfast.save(sample(), src, format=before)
    holdfast.save({"old": np.ones(3)}, dst)
    data = bytearray(src.read_bytes())
    with holdfast.open(src, framework="numpy") as f:
        at = f.info("model.w").offset + 1000
    data[at] ^= 4
    src.write_bytes(data)
    old = dst.read_bytes()
    with pytest.raises(holdfast.ChecksumError, match=r"src: tensor 'model\.w'"):
        holdfast.convert(src, dst, after)
    assert dst.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("name", ["module-torch1.5.1.pt", "module-torch2.13.0.pt"])
def test_a_whole_module_becomes_its_state_dict(tmp_path: Path, name: str) -> None:
    dst = tmp_path / "m.safetensors"
    with pytest.warns(UserWarning, match="flat dict of its tensors"):
        holdfast.convert(GOLDEN / "torch" / name, dst)
    with holdfast.open(GOLDEN / "torch" / name, framework="numpy") as f:
        found = holdfast.load(dst, framework="numpy")
        assert set(found) == set(f)
        assert all(np.array_equal(found[n], f[n]) for n in f)
        assert len(found) == 9


def test_a_program_becomes_its_state_dict(tmp_path: Path) -> None:
    dst = tmp_path / "m.pt"
    src = GOLDEN / "programs" / "script-torch1.9.1.pt"
    holdfast.convert(src, dst)
    with holdfast.open(src, framework="numpy") as f:
        found = holdfast.load(dst, framework="numpy")
        assert list(found) == list(f)
        assert all(np.array_equal(found[n], f[n]) for n in f)


def test_views_stay_views_and_become_tensors(tmp_path: Path) -> None:
    src = GOLDEN / "torch" / "views-torch2.13.0.pt"
    for name in ("v.pt", "v.safetensors"):
        holdfast.convert(src, tmp_path / name)
        a = holdfast.load(src, framework="numpy")
        b = holdfast.load(tmp_path / name, framework="numpy")
        assert list(a) == list(b)
        assert all(np.array_equal(a[n], b[n]) for n in a)
    size = (tmp_path / "v.pt").stat().st_size
    assert size <= src.stat().st_size + 256  # each storage once


@pytest.mark.skipif(
    "HOLDFAST_SANITIZED" in os.environ, reason="the sanitizer takes memory of its own"
)
@pytest.mark.parametrize("after", ["safetensors", "torch"])
@pytest.mark.parametrize("before", ["safetensors", "torch", "torch_legacy"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, before: str, after: str) -> None:
    """460 MB in tensors of all sizes, in a process of its own: the resident set stays small."""
    code = """
import sys, numpy as np, holdfast
src, dst, before, after = sys.argv[1:]
rng = np.random.default_rng(0)
sizes = [120_000_000, 20_000_001, 999_999, *[2_000_000] * 20, *[100_003] * 500]
row = rng.integers(0, 9, 3000, np.uint8)
parts = {
    f"t{i}": np.broadcast_to(row[i : i + 1000], (n // 1000, 1000))
    for i, n in enumerate(sizes * 2)
}
holdfast.save(parts, src, format=before, durable=False)
del parts
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
def high():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
start = high()
holdfast.convert(src, dst, after, durable=False)
print(high() - start)
with holdfast.open(src, framework="numpy") as a, holdfast.open(dst, framework="numpy") as b:
    assert list(a) == list(b) and len(a) > 1000
    assert all(np.array_equal(a[n], b[n]) for n in list(a)[:40])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b"), before, after],
        capture_output=True,
        text=True,
        timeout=300,
    )
    for path in tmp_path.iterdir():
        path.unlink()
    assert done.returncode == 0, done.stderr
    print(before, after, int(done.stdout) >> 20)
    assert 0 < int(done.stdout) < 256 << 20


def test_what_cannot_be_written(tmp_path: Path) -> None:
    src = tmp_path / "sixths"
    head = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    src.write_bytes(len(head).to_bytes(8, "little") + head + b"\x01\x02\x03")
    with pytest.raises(TypeError, match=r"\$\['w'\].*no such type"):
        holdfast.convert(src, tmp_path / "sixths.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["sixths"]
    with pytest.raises(FileNotFoundError):
        holdfast.convert(tmp_path / "nothing", tmp_path / "x.pt")
    with pytest.raises(ValueError, match="read and not written"):
        holdfast.convert(src, tmp_path / "x.gguf")


def mixed() -> dict[str, Any]:
    """Tensors beside arrays, of which one is of a dtype that torch lacks."""
    torch = pytest.importorskip("torch")
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3)},
        "rng": np.random.RandomState(3).get_state(),
        "dates": np.array(["2020-01-01", "2021-02-03"], "M8[D]"),
        "more": [np.arange(5)[::-2], np.zeros((0, 2))],
    }


@pytest.mark.parametrize("after", ["torch", "torch_legacy", "oneflow", "safetensors"])
def test_arrays_beside_tensors_stay_arrays(tmp_path: Path, after: str) -> None:
    """They became tensors, in files of torch, or could not be written."""
    obj = mixed()
    holdfast.save(obj, tmp_path / "src")
    holdfast.convert(tmp_path / "src", tmp_path / "dst", format=after)
    found = holdfast.load(tmp_path / "dst")
    weights = obj["model"].pop("w"), found["model"].pop("w")
    assert type(weights[0]) is type(weights[1]) and bool((weights[0] == weights[1]).all())
    assert same(found, obj)
    np.random.RandomState().set_state(found["rng"])


def test_damage_of_an_array_that_is_pickled_is_not_passed_on(tmp_path: Path) -> None:
    holdfast.save(mixed(), tmp_path / "src")
    with holdfast.open(tmp_path / "src") as f:
        place = f.info("dates").offset
    data = bytearray((tmp_path / "src").read_bytes())
    data[place] ^= 1
    (tmp_path / "src").write_bytes(data)
    with pytest.raises(holdfast.ChecksumError, match="'dates'"):
        holdfast.convert(tmp_path / "src", tmp_path / "dst.pt")
    assert not (tmp_path / "dst.pt").exists()


@pytest.mark.parametrize("extension", [".npy", ".safetensors", ".pt"])
def test_arrays_alone_go_to_oneflow(tmp_path: Path, extension: str) -> None:
    obj: Any = np.arange(6.0).reshape(2, 3)
    if extension != ".npy":
        obj = {"model": {"w": obj}, "epoch": 3}
    holdfast.save(obj, tmp_path / f"src{extension}")
    holdfast.convert(tmp_path / f"src{extension}", tmp_path / "dst", format="oneflow")
    assert same(holdfast.load(tmp_path / "dst", framework="numpy"), obj)
