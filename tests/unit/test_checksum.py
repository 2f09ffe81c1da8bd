"""Checksums of memory that is not written, and letting go of maps that were."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import _engine, _engine_py
from holdfast._buffer import Buffer
from holdfast.layout import SEGMENT

RELEASE = 1
NOISE = np.frombuffer(os.urandom(9 << 20), np.uint8)
SIZES = {
    "none": [],
    "empty": [0, 0],
    "one": [1],
    "few": [3, 0, 4096, 1],
    "many": [i * 7 % 900 for i in range(5000)],
    "large and many": [5 << 20, *[100] * 3000, 3 << 20],
    "a block and one": [(128 << 10) + 1, 128 << 10],
}


def rows(sizes: list[int], gap: int = 0) -> np.ndarray:
    segments = np.zeros(len(sizes), SEGMENT)
    segments["nbytes"] = sizes
    segments["offset"] = np.cumsum([n + gap for n in sizes]) - np.array(sizes, np.int64)
    segments["address"] = NOISE.ctypes.data + np.arange(len(sizes), dtype=np.uint64)
    return segments


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("case", SIZES)
def test_dense(case: str, gap: int, threads: int) -> None:
    segments = rows(SIZES[case], gap)
    segments["crc"] = 7
    _engine.checksum(segments, threads=threads)
    parts = [NOISE[i : i + n].tobytes() for i, n in enumerate(SIZES[case])]
    assert segments["crc"].tolist() == [zlib.crc32(part) for part in parts]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("swap", [0, 4])
def test_strided(swap: int, threads: int) -> None:
    """Also across the blocks in which strided memory is gathered."""
    matrix = NOISE[: 4 * 700 * 900].view("u4").reshape(700, 900)
    views = [matrix.T, matrix[::-3, ::2], matrix[:3, 5:6], matrix[:0]]
    segments = np.zeros(len(views) + 1, SEGMENT)
    sizes = [view.nbytes for view in views]
    segments["nbytes"] = [*sizes, 1000]
    segments["offset"] = np.cumsum([0, *sizes])
    segments["address"] = [*[view.ctypes.data for view in views], NOISE.ctypes.data]
    layouts = [(i, view.shape, view.strides, 4, swap) for i, view in enumerate(views)]
    oracle = segments.copy()
    _engine.checksum(segments, layouts=layouts, threads=threads)
    expected = [zlib.crc32((view.byteswap() if swap else view).tobytes()) for view in views]
    assert segments["crc"].tolist() == [*expected, zlib.crc32(NOISE[:1000].tobytes())]
    _engine_py.checksum(oracle, layouts=layouts)
    assert oracle["crc"].tolist() == segments["crc"].tolist()


def test_what_is_refused() -> None:
    for change in ({"offset": [9, 0]}, {"offset": [0, 2]}, {"address": [1, 0]}):
        segments = rows([5, 5])
        for column, values in change.items():
            segments[column] = values
        with pytest.raises(ValueError, match=r"thing: segment 1 of 2, 5 bytes at offset"):
            _engine.checksum(segments, filename="thing")


def mapped(path: Path, data: bytes) -> tuple[Buffer, np.ndarray]:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        buffer = _engine.map_file(fd, 0, len(data))
    finally:
        os.close(fd)
    memory: np.ndarray = np.frombuffer(buffer, np.uint8)  # type: ignore[call-overload]
    return buffer, memory


@pytest.mark.parametrize(
    ("offset", "nbytes", "pages"),
    [(0, 20000, {0, 1, 2, 3, 4}), (4096, 1, {1}), (5000, 4000, {1, 2}), (8192, 0, set())],
)
def test_drop(tmp_path: Path, offset: int, nbytes: int, pages: set[int]) -> None:
    """Of the pages that it touches, what this process wrote to them is gone."""
    data = NOISE[:20000].tobytes()
    buffer, memory = mapped(tmp_path / "file", data)
    memory[::4096] = memory[::4096] + 1
    _engine.drop(buffer, offset, nbytes)
    back = {page for page in range(5) if memory[4096 * page] == data[4096 * page]}
    assert back == pages
    for bad in ((0, 20001), (20001, 0), (19999, 2)):
        with pytest.raises(ValueError, match="of a buffer of 20000 bytes"):
            _engine.drop(buffer, *bad)


@pytest.mark.parametrize("way", ["checksum", "buffered", "direct", "faster"])
def test_maps_are_let_go_of(tmp_path: Path, way: str) -> None:
    """What has been written or summed is read anew afterwards; what is not marked stays."""
    data = NOISE.tobytes()
    _, memory = mapped(tmp_path / "file", data)
    memory[5] = data[5] ^ 1
    memory[-5] = data[-5] ^ 1
    expected = memory.tobytes()
    half = len(data) // 2 & -4096
    segments = np.zeros(2, SEGMENT)
    segments["nbytes"] = [half, len(data) - half]
    segments["offset"] = [0, half]
    segments["address"] = memory.ctypes.data + segments["offset"]
    segments["file"] = [RELEASE, 0]
    if way == "checksum":
        _engine.checksum(segments)
    else:
        direct: Any = {"buffered": False, "direct": True, "faster": None}[way]
        fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        _engine.write(fd, segments, direct=direct)
        os.close(fd)
        assert (tmp_path / "out").read_bytes() == expected
    assert segments["crc"].tolist() == [zlib.crc32(expected[:half]), zlib.crc32(expected[half:])]
    assert memory[5] == data[5]
    assert memory[-5] == data[-5] ^ 1
    assert memory.tobytes()[:half] == data[:half]
