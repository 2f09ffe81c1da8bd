"""Tensors of an open checkpoint, taken one by one: as a load has them, however many they are."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import holdfast
from holdfast import _engine, fetch

MIB = 1 << 20
DTYPES = ["f4", "f8", "i1", "u2", "i8", "?", "c8", "f2", "M8[s]", "S3", ">i4"]


def tensors(n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    made: dict[str, Any] = {}
    for i in range(n):
        shape = [(), (0,), (3, 5), (7,), (2, 0, 3)][i % 5]
        data = rng.integers(0, 2, shape)
        made[f"t{i}"] = np.asarray(data).astype(DTYPES[i % len(DTYPES)])
    made["large"] = np.arange(9 * MIB, dtype=np.uint8)
    return made


def same(found: Any, expected: Any) -> bool:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [3, 600, 1600])
@pytest.mark.parametrize("shard", [None, 4 * MIB])
def test_as_they_were(n: int, shard: int | None, tmp_path: Path) -> None:
    saved = tensors(n)
    holdfast.save(saved, tmp_path / "ckpt", max_shard_size=shard)
    loaded = holdfast.load(tmp_path / "ckpt")
    names = list(saved)
    random.Random(n).shuffle(names)
    with holdfast.open(tmp_path / "ckpt") as f:
        for name in names + names[:50]:
            assert same(f[name], loaded[name]), name
            assert f[name].flags.writeable
        kept = {name: f[name] for name in names[:20]}
    for name, array in kept.items():
        assert same(array, loaded[name])
    with pytest.raises(ValueError, match="closed"):
        f[names[0]]


def test_nested_ones(tmp_path: Path) -> None:
    saved = {"a": [tensors(700), b"x" * 100_000], "b": np.float32(3)}
    holdfast.save(saved, tmp_path / "ckpt")
    loaded = holdfast.load(tmp_path / "ckpt")
    with holdfast.open(tmp_path / "ckpt") as f:
        assert len(f) == 701
        for name, array in loaded["a"][0].items():
            assert same(f[f"a.0.{name}"], array)


def test_where_another_writer_left_them(tmp_path: Path) -> None:
    """Not aligned to their elements: they are copied, the others are views of the map."""
    saved = {f"{i:04}": np.arange(i % 7, dtype=["u1", "f4"][i % 2]) for i in range(1200)}
    safetensors.numpy.save_file(saved, tmp_path / "ckpt")
    with holdfast.open(tmp_path / "ckpt", framework="numpy") as f:
        for name, array in saved.items():
            assert same(f[name], array)
            assert f[name].flags.aligned


def test_they_share_the_map(tmp_path: Path) -> None:
    holdfast.save(tensors(600), tmp_path / "ckpt")
    with holdfast.open(tmp_path / "ckpt") as f:
        first = [f["t7"] for _ in range(5)]
        first[0][:] = 0
        assert (first[4] == 0).all() and (f["t7"] == 0).all()
    assert same(holdfast.load(tmp_path / "ckpt")["t7"], tensors(600)["t7"])


def test_each_is_looked_at_by_itself_while_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at all of a million for the sake of one would be slow."""
    sizes = []
    real = fetch.lay

    def lay(index: Any, entries: np.ndarray, maps: Any, **options: Any) -> Any:
        sizes.append(len(entries))
        return real(index, entries, maps, **options)

    monkeypatch.setattr(fetch, "lay", lay)
    saved = {f"t{i}": np.full(2, i) for i in range(4999)}
    holdfast.save(saved | {"x": np.ones(3)}, tmp_path / "ckpt")
    with holdfast.open(tmp_path / "ckpt") as f:
        for _ in range(30):
            assert f["x"].tolist() == [1, 1, 1]
    assert sizes == [1] * 9 + [5000]


def test_by_many_threads(tmp_path: Path) -> None:
    saved = tensors(2000)
    holdfast.save(saved, tmp_path / "ckpt")
    loaded = holdfast.load(tmp_path / "ckpt")
    with holdfast.open(tmp_path / "ckpt") as f, ThreadPoolExecutor(8) as pool:
        for name, array in zip(saved, pool.map(f.__getitem__, saved), strict=True):
            assert same(array, loaded[name])


def test_elsewhere_each_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tensors(600)
    holdfast.save(saved, tmp_path / "ckpt")
    loaded = holdfast.load(tmp_path / "ckpt")
    monkeypatch.setattr(_engine, "filesystem", lambda fd: 0x6969)
    with holdfast.open(tmp_path / "ckpt") as f:
        for name in saved:
            assert same(f[name], loaded[name])
