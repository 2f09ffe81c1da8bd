"""What holds for every format whose checkpoints are folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

#: Types that every one of them holds.
DTYPES = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")


def tensors() -> dict[str, np.ndarray]:
    """Small and large ones, of every type and odd shapes."""
    made = np.random.default_rng(4)
    found = {name: (9 * made.random((3, 5, 2))).astype(name) for name in DTYPES}
    found["scalar"] = np.full((), 7, np.int64)
    found["none"] = np.zeros((0, 3), np.float32)
    found["turned"] = np.asfortranarray(made.random((30, 20)))
    found["strided"] = made.random((64, 64))[::2, 1::3]
    found["large.w"] = made.random((700, 1001)).astype(
        np.float32
    )  # mapped, where small ones are not
    return found


def _shards(obj: Any, path: Path) -> None:
    holdfast.save(obj, path, max_shard_size=100_000)


def _oneflow(obj: Any, path: Path) -> None:
    holdfast.save(obj, path, format="oneflow")


def _nested(obj: Any, path: Path) -> None:
    holdfast.save({"inner": obj, "n": 3}, path, format="oneflow")


#: How a folder is saved, and what stands before the names in it.
FORMATS: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "shards": (_shards, ""),
    "snapshot": (_oneflow, ""),
    "pickle": (_nested, "inner."),
}


@pytest.fixture(params=FORMATS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    save, prefix = FORMATS[request.param]
    save(tensors(), tmp_path / "folder")
    return tmp_path / "folder", prefix


def check(found: Any, prefix: str = "") -> None:
    expected = tensors()
    assert sorted(found) == sorted(prefix + name for name in expected)
    for name, wanted in expected.items():
        tensor = found[prefix + name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        assert np.array_equal(tensor, wanted), name


@pytest.mark.parametrize("mmap", [True, False, None])
def test_loads(saved: tuple[Path, str], mmap: bool | None) -> None:
    path, prefix = saved
    found = holdfast.load(path, mmap=mmap, framework="numpy")
    check(found if not prefix else found["inner"])
    assert all(tensor.flags.writeable for tensor in (found["inner"] if prefix else found).values())


def test_opens(saved: tuple[Path, str]) -> None:
    path, prefix = saved
    with holdfast.open(path, framework="numpy") as f:
        check(f, prefix)
        large = tensors()["large.w"]
        assert np.array_equal(f.slice(prefix + "large.w")[5:9, ::7], large[5:9, ::7])
        assert f.slice(prefix + "int32")[1].tolist() == tensors()["int32"][1].tolist()
        f.prefetch()
        info = f.info(prefix + "large.w")
        assert Path(info.file).is_file() and info.nbytes == large.nbytes
        kept = f[prefix + "large.w"]
    assert np.array_equal(kept, large)


def test_names_and_patterns(saved: tuple[Path, str]) -> None:
    path, prefix = saved
    found = holdfast.load(path, keys=[prefix + "float*", prefix + "scalar"], framework="numpy")
    assert sorted(found) == sorted(prefix + n for n in ("float16", "float32", "float64", "scalar"))
    with pytest.raises(KeyError, match="large"):
        holdfast.load(path, keys=prefix + "largee.w")


def test_fills(saved: tuple[Path, str]) -> None:
    path, prefix = saved
    target = {name: np.zeros_like(tensor) for name, tensor in tensors().items()}
    target["float64"] = np.zeros((3, 5, 2), np.float32)  # converted
    assert holdfast.load_into(target, path, prefix=prefix) == ([], [])
    assert np.array_equal(target["float64"], tensors()["float64"].astype(np.float32))
    target["float64"] = tensors()["float64"]
    check(target)


def test_converts(saved: tuple[Path, str], tmp_path: Path) -> None:
    path, prefix = saved
    for name in ("x.safetensors", "x.pt"):
        holdfast.convert(path, tmp_path / name)
        found = holdfast.load(tmp_path / name, framework="numpy")
        check(found["inner"] if prefix else found)
    holdfast.convert(tmp_path / "x.safetensors", tmp_path / "back", format="oneflow")
    found = holdfast.load(tmp_path / "back", framework="numpy")
    check(found["inner"] if prefix else found)


def test_verifies(saved: tuple[Path, str]) -> None:
    report = holdfast.verify(saved[0])
    assert report.ok and report.checked + report.unchecked == len(tensors())


def test_every_file_that_is_cut_or_gone_is_told(saved: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = saved
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    for file in files[:: max(1, len(files) // 12)]:
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        victim = copy / file.relative_to(path)
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        for mmap in (True, False):
            with pytest.raises(holdfast.FormatError):
                holdfast.load(copy, mmap=mmap, framework="numpy")
        assert not holdfast.verify(copy).ok
        shutil.rmtree(copy)


def test_replacing_while_mapped_changes_nothing(saved: tuple[Path, str], tmp_path: Path) -> None:
    path, prefix = saved
    mapped = holdfast.load(path, mmap=True, framework="numpy")
    save = next(save for save, own in FORMATS.values() if own == prefix)
    if (path / "model.safetensors.index.json").exists():
        save = _shards
    save({"w": np.zeros(100_000)}, path)
    check(mapped["inner"] if prefix else mapped)
