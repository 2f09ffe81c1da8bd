"""Segments to and from file objects of every kind, by the plain engine."""

from __future__ import annotations

import io
import os
import tempfile
import threading
import zlib
from typing import Any

import numpy as np
import pytest

from holdfast import _engine_py
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT

NOISE = np.frombuffer(os.urandom(18 << 20), np.uint8)
SIZES = [0, 1, 1000, 17 << 20, 0, 77]


def rows(sizes: list[int] = SIZES, base: np.ndarray = NOISE) -> np.ndarray:
    segments = np.zeros(len(sizes), SEGMENT)
    segments["nbytes"] = sizes
    segments["offset"] = np.cumsum(sizes) - np.array(sizes)
    segments["address"] = np.uint64(base.ctypes.data) + np.arange(len(sizes), dtype=np.uint64)
    return segments


EXPECTED = [NOISE[i : i + n].tobytes() for i, n in enumerate(SIZES)]


class Small(io.RawIOBase):
    """Takes and gives less than it is asked for."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.at = 0

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = memoryview(data)[:100_001]
        self.data += part
        return len(part)

    def readinto(self, target: Any) -> int:
        part = self.data[self.at : self.at + min(len(target), 70_001)]
        target[: len(part)] = part
        self.at += len(part)
        return len(part)


class Bare:
    """What only reads and writes, and counts nothing."""

    def __init__(self, data: bytes = b"") -> None:
        self.stream = io.BytesIO(data)
        self.most = 0

    def write(self, data: Any) -> None:
        self.most = max(self.most, len(data))
        self.stream.write(data)

    def read(self, nbytes: int) -> bytes:
        return self.stream.read(min(nbytes, 1_000_003))


def test_write_to_memory() -> None:
    file, segments, seen = io.BytesIO(b"before"), rows(), []
    file.seek(6)
    _engine_py.write_stream(file, segments, progress=seen.append)
    assert file.getvalue() == b"before" + b"".join(EXPECTED)
    assert segments["crc"].tolist() == [zlib.crc32(part) for part in EXPECTED]
    assert seen == sorted(seen)
    assert seen[-1] == sum(SIZES)


def test_write_in_parts() -> None:
    small, bare = Small(), Bare()
    _engine_py.write_stream(small, rows())
    _engine_py.write_stream(bare, rows())
    assert small.data == b"".join(EXPECTED)
    assert bare.stream.getvalue() == b"".join(EXPECTED)
    assert bare.most == 8 << 20


def test_write_that_goes_nowhere() -> None:
    class Stuck(Small):
        result: int | None = 0

        def write(self, data: Any) -> int | None:
            return self.result

    with pytest.raises(OSError, match="no progress"):
        _engine_py.write_stream(Stuck(), rows())
    stuck = Stuck()
    stuck.result = None
    with pytest.raises(BlockingIOError):
        _engine_py.write_stream(stuck, rows())


def read_and_check(file: Any) -> None:
    target = np.zeros(sum(SIZES), np.uint8)
    segments = rows(base=target)
    segments["address"] = target.ctypes.data + segments["offset"]
    _engine_py.read_stream(file, segments)
    assert target.tobytes() == b"".join(EXPECTED)
    assert segments["crc"].tolist() == [zlib.crc32(part) for part in EXPECTED]


@pytest.mark.parametrize("kind", [io.BytesIO, Small, Bare])
def test_read_from_an_object(kind: Any) -> None:
    read_and_check(kind(b"".join(EXPECTED)))


def test_read_from_where_a_file_stands() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"before" + b"".join(EXPECTED))
        file.seek(6)
        read_and_check(file)


def test_read_from_a_pipe() -> None:
    end, other = os.pipe()

    def feed() -> None:
        with open(other, "wb") as out:
            out.write(b"".join(EXPECTED))

    thread = threading.Thread(target=feed)
    thread.start()
    with open(end, "rb") as file:
        read_and_check(file)
    thread.join()


@pytest.mark.parametrize("kind", [io.BytesIO, Small, Bare])
def test_read_some(kind: Any) -> None:
    data = NOISE.tobytes()
    target = np.zeros(100, np.uint8)
    segments = rows([10, 20, 9 << 20])
    segments["offset"] = [5, 100_000, 9 << 20]
    segments["address"] = [target.ctypes.data, target.ctypes.data + 50, 0]
    _engine_py.read_stream(kind(data), segments)
    assert target[:10].tobytes() == data[5:15]
    assert target[50:70].tobytes() == data[100_000:100_020]
    expected = [data[5:15], data[100_000:100_020], data[9 << 20 : 18 << 20]]
    assert segments["crc"].tolist() == [zlib.crc32(part) for part in expected]


@pytest.mark.parametrize("kind", [io.BytesIO, Small, Bare])
@pytest.mark.parametrize("offset", [0, 90, 100, 5000])
def test_read_past_the_end(kind: Any, offset: int) -> None:
    target = np.zeros(200, np.uint8)
    segments = rows([150], base=target)
    segments["offset"] = offset
    with pytest.raises(FormatError, match=rf"thing: needs 150 bytes at offset {offset}, file ends"):
        _engine_py.read_stream(kind(bytes(100)), segments, name="thing")


def test_strided_and_swapped_in_pieces() -> None:
    # 12 MB of a transposed matrix, more than is copied at a time.
    matrix = NOISE[:12_000_000].view(np.uint32).reshape(3000, 1000)
    expected = matrix.T.byteswap().tobytes()
    segments = rows([matrix.nbytes])
    segments["address"] = matrix.ctypes.data
    layouts = [(0, matrix.T.shape, matrix.T.strides, 4, 4)]
    bare = Bare()
    _engine_py.write_stream(bare, segments, layouts=layouts)  # type: ignore[arg-type]
    assert bare.stream.getvalue() == expected
    assert bare.most <= 8 << 20
    assert segments["crc"][0] == zlib.crc32(expected)
    segments["crc"] = 0
    _engine_py.checksum(segments, layouts=layouts)
    assert segments["crc"][0] == zlib.crc32(expected)

    back = np.zeros_like(matrix)
    segments["address"] = back.ctypes.data
    _engine_py.read_stream(io.BytesIO(expected), segments, layouts=layouts)
    assert (back == matrix).all()
