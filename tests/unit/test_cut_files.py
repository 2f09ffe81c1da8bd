"""Files that get shorter between the reading of their header and that of their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT
from holdfast.reader import Reader

FORMATS = ("safetensors", "torch", "torch_legacy")

USES: dict[str, Callable[[Path], Any]] = {
    "load, mapped": lambda path: holdfast.load(path, mmap=True),
    "load, mapped and verified": lambda path: holdfast.load(path, mmap=True, verify=True),
    "load, read": lambda path: holdfast.load(path, mmap=False),
    "load a part": lambda path: holdfast.load(path, keys="w"),
    "open": lambda path: holdfast.open(path)["w"],
    "open and prefetch": lambda path: holdfast.open(path).prefetch(),
    "load_into": lambda path: holdfast.load_into({"w": np.empty((1 << 20,))}, path),
    "convert": lambda path: holdfast.convert(path, path.with_name("b.pt")),
    "convert to the container": lambda path: holdfast.convert(path, path.with_name("b")),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("left", [0, 5000, 4 << 20])
@pytest.mark.parametrize("use", USES)
def test_cut_before_the_tensors_are_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, left: int, use: str
) -> None:
    """An error that names the file and both sizes; a map of what is gone would be a SIGBUS."""
    path = tmp_path / "a"
    holdfast.save({"w": np.ones((1 << 20,))}, path, format=form)
    index = Reader.__init__

    def cut(self: Reader, *args: Any, **keywords: Any) -> None:
        index(self, *args, **keywords)
        os.truncate(path, left)

    monkeypatch.setattr(Reader, "__init__", cut)
    with pytest.raises(FormatError, match=r"a: needs \d+ bytes"):
        USES[use](path)
    assert sorted(os.listdir(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("rows", "lacking"),
    [
        ([(0, 10), (50, 10)], 1),
        ([(0, 30), (35, 10), (60, 1)], 1),
        ([(0, 30), (40, 0), (50, 10)], 2),
        ([(0, 40), (50, 0), (60, 10)], 2),
        ([(50, 10), (70, 5)], 0),
    ],
)
def test_what_lacks_its_bytes_is_named(
    tmp_path: Path, rows: list[tuple[int, int]], lacking: int
) -> None:
    """Where the file ends between two that are read in one go, it is the second."""
    (tmp_path / "x").write_bytes(bytes(40))
    buffer = _engine.allocate(100)
    segments = np.zeros(len(rows), SEGMENT)
    segments["offset"], segments["nbytes"] = zip(*rows, strict=True)
    segments["address"] = buffer.address + segments["offset"]
    offset, nbytes = rows[lacking]
    wanted = f"x: needs {nbytes} bytes at offset {offset}, file ends at 40"
    with (tmp_path / "x").open("rb") as f, pytest.raises(FormatError, match=wanted):
        _engine.read([f.fileno()], segments, filenames=["x"])
