"""Tensors that have several names, and names that are no tensors'."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast


def test_many_ties_before_another_tensor(tmp_path: Path) -> None:
    """With kinds: a mix of frameworks, or here an opaque dtype."""
    tied, other = np.zeros(3, "M8[s]"), np.ones(2, "M8[D]")
    holdfast.save({"tied": [tied] * 100, "other": other}, tmp_path / "x")
    for mmap in (True, False):
        found = holdfast.load(tmp_path / "x", mmap=mmap)
        assert found["other"].dtype == other.dtype and (found["other"] == other).all()
        assert len({id(tensor) for tensor in found["tied"]}) == 1 and len(found["tied"]) == 100


@pytest.fixture
def aliased(tmp_path: Path) -> tuple[Path, Any, Any]:
    rng = np.random.default_rng(0)
    weight, time = rng.random((5, 4)), np.arange(3).astype("M8[s]")
    obj = {"head": weight, "body": [weight, {"w": weight}], "t": time, "u": time, "b": np.ones(2)}
    holdfast.save(obj, tmp_path / "x")
    return tmp_path / "x", weight, time


def test_every_alias_opens(aliased: tuple[Path, Any, Any]) -> None:
    path, weight, time = aliased
    with holdfast.open(path) as f:
        names = list(f)
        assert sorted(names) == ["b", "body.0", "body.1.w", "head", "t", "u"] and len(f) == 6
        assert all(name in f and f.info(name).name == name for name in names)
        assert (f["body.1.w"] == weight).all() and (f.slice("body.0")[2:4] == weight[2:4]).all()
        assert (f["u"] == time).all() and f.get("u").dtype == time.dtype
    keys = holdfast.load(path, keys=["body.*", "head"])
    assert keys["body.0"] is keys["body.1.w"] is keys["head"]


def test_load_into_fills_each_alias(aliased: tuple[Path, Any, Any]) -> None:
    """One entry of the file fills tensors that share no memory, of any dtype and stride."""
    path, weight, time = aliased
    for source in (path, io.BytesIO(path.read_bytes())):
        target = {
            "head": np.zeros((5, 4)),
            "body": [np.zeros((4, 5)).T, {"w": np.zeros((5, 4), "f4")}],
            "t": np.zeros(3, "M8[s]"),
            "u": np.zeros(3, "M8[s]"),
            "b": np.zeros(2),
        }
        assert holdfast.load_into(target, source) == ([], [])
        assert (target["head"] == weight).all() and (target["body"][0] == weight).all()
        assert (target["body"][1]["w"] == weight.astype("f4")).all()
        assert (target["t"] == time).all() and (target["u"] == time).all() and target["b"].all()


def test_long_text_is_no_tensor(tmp_path: Path) -> None:
    """A long bytes or str is stored as a tensor, but that is nobody's business."""
    obj = {"w": np.ones(2), "log": "x" * 100_000, "blob": b"y" * 5000}
    holdfast.save(obj, tmp_path / "x")
    assert list(holdfast.load(tmp_path / "x", keys="*")) == ["w"]
    with pytest.raises(KeyError):
        holdfast.load(tmp_path / "x", keys="log")
    with holdfast.open(tmp_path / "x") as f:
        assert list(f) == ["w"] and len(f) == 1 and "log" not in f and f.get("blob") is None
        assert f.tree()["log"] == obj["log"] and f.tree()["blob"] == obj["blob"]
    target = {**obj, "w": np.zeros(2)}
    assert holdfast.load_into(target, tmp_path / "x") == ([], [])
    assert target["w"].all()
    assert holdfast.verify(tmp_path / "x").checked == 3
    f = holdfast.open(tmp_path / "x")
    f.close()
    with pytest.raises(ValueError, match="closed"):
        f.tree()
