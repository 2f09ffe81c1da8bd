"""Checkpoints whose values only a pickle can hold, converted to formats that have none."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import holdfast

torch = pytest.importorskip("torch")

VALUES = {
    "namespace": argparse.Namespace(lr=1),
    "date": datetime.date(2020, 1, 1),
    "path": Path("x"),
    "simple": SimpleNamespace(a=1),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("shard", [None, 10_000])
def test_the_tensors_are_converted(value: Any, shard: int | None, tmp_path: Path) -> None:
    """As they are where a value would have to run code: with a warning that says which."""
    torch.save({"model": {"w": torch.ones(3000)}, "args": [value]}, tmp_path / "a.pth")
    to = tmp_path / ("shards" if shard else "a.safetensors")
    with pytest.warns(UserWarning, match=r"a flat dict of its tensors.*\['args'\]"):
        holdfast.convert(tmp_path / "a.pth", to, max_shard_size=shard)
    found = holdfast.load(to)
    assert list(found) == ["model.w"] and found["model.w"].sum() == 3000
