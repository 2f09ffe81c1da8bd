"""The engine in plain Python: the oracle of the C one in tests, and the way to file objects.

Everything here is the simplest thing that is right. Rows and layouts are those of
:mod:`holdfast._engine`; the caller keeps their memory alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ._engine import allocate
from .errors import FormatError

if TYPE_CHECKING:
    from ._engine import Layout

__all__ = ["allocate", "checksum", "crc32", "read", "read_stream", "write", "write_stream"]

#: The most that is moved, or copied, at a time.
PIECE = 8 << 20

Array = np.ndarray[Any, Any]
Progress = Callable[[int], object] | None
#: Put all of the given bytes at an offset of the file.
_Put = Callable[[memoryview, int], None]
#: Fill the given memory from an offset of the file; returns how much there was.
_Get = Callable[[memoryview, int], int]


def crc32(data: bytes | memoryview, value: int = 0) -> int:
    """The CRC-32 of `data`, continuing that of the bytes before it."""
    return zlib.crc32(data, value)


# ---- memory ------------------------------------------------------------------------------------


def _bytes_at(address: int, nbytes: int) -> Array:
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)


def _elements(row: np.void, layout: Layout | None) -> Array:
    """The memory of a segment: dense bytes, or elements as they lie."""
    address, nbytes = int(row["address"]), int(row["nbytes"])
    if layout is None or nbytes == 0:
        return _bytes_at(address, nbytes)
    _, shape, strides, itemsize, _ = layout
    first = _bytes_at(address, itemsize).view(f"V{itemsize}")
    return np.lib.stride_tricks.as_strided(first, shape, strides)


def _blocks(elements: Array) -> Iterator[Array]:
    """Parts of at most PIECE bytes, in C order."""
    if elements.nbytes <= PIECE:
        yield elements
        return
    step = max(1, PIECE // (elements.nbytes // len(elements)))
    for start in range(0, len(elements), step):
        yield from _blocks(elements[start] if step == 1 else elements[start : start + step])


def _swapped(data: Array, unit: int) -> Array:
    return data.reshape(-1, unit)[:, ::-1].reshape(-1) if unit else data


def _out(block: Array, unit: int) -> memoryview:
    """What a file holds of a block; the memory itself where that is the same."""
    if block.dtype == np.uint8:
        return block.data
    # Of one element it would be a view from its last byte to its first.
    return np.ascontiguousarray(_swapped(np.frombuffer(block.tobytes(), np.uint8), unit)).data


def _by_row(layouts: Sequence[Layout] | None) -> dict[int, Layout]:
    return {layout[0]: layout for layout in layouts or ()}


# ---- the two ways, whatever the file is --------------------------------------------------------


def _write(
    put: _Put,
    segments: Array,
    layouts: Sequence[Layout] | None,
    checksum: bool,
    progress: Progress,
) -> None:
    found = _by_row(layouts)
    done = 0
    for i, row in enumerate(segments):
        layout = found.get(i)
        at, crc = int(row["offset"]), 0
        for block in _blocks(_elements(row, layout)) if row["nbytes"] else ():
            data = _out(block, layout[4] if layout else 0)
            if checksum:
                crc = crc32(data, crc)
            put(data, at)
            at += len(data)
            done += len(data)
            if progress is not None:
                progress(done)
        if checksum:
            segments["crc"][i] = crc
    if progress is not None and done == 0:
        progress(done)


def _read(
    get: _Get,
    segments: Array,
    layouts: Sequence[Layout] | None,
    checksum: bool,
    progress: Progress,
    name: object,
) -> None:
    found = _by_row(layouts)
    done = 0
    for i, row in enumerate(segments):
        layout = found.get(i)
        at, crc = int(row["offset"]), 0
        for block in _targets(row, layout):
            dense = block.dtype == np.uint8
            data: Array = block if dense else np.empty(block.nbytes, np.uint8)
            got = get(data.data, at)
            if got < data.nbytes:
                raise FormatError(
                    f"{name}: needs {row['nbytes']} bytes at offset {row['offset']}, "
                    f"file ends at {at + got}"
                )
            if checksum:
                crc = crc32(data.data, crc)
            if not dense:
                assert layout is not None
                swapped = np.ascontiguousarray(_swapped(data, layout[4]))
                block[...] = swapped.view(block.dtype).reshape(block.shape)
            at += data.nbytes
            done += data.nbytes
            if progress is not None:
                progress(done)
        if checksum:
            segments["crc"][i] = crc
    if progress is not None and done == 0:
        progress(done)


def _targets(row: np.void, layout: Layout | None) -> Iterator[Array]:
    """Where the bytes of a segment go, block by block; scratch where it has no memory."""
    if row["address"]:
        if row["nbytes"]:
            yield from _blocks(_elements(row, layout))
        return
    left = int(row["nbytes"])
    scratch = np.empty(min(left, PIECE), np.uint8)
    while left:
        yield scratch[:left]
        left -= min(left, PIECE)


def checksum(segments: Array, *, layouts: Sequence[Layout] | None = None) -> None:
    """Fill in the checksums that writing `segments` would."""
    _write(lambda _data, _at: None, segments, layouts, True, None)


# ---- descriptors -------------------------------------------------------------------------------


def write(
    fd: int,
    segments: Array,
    *,
    layouts: Sequence[Layout] | None = None,
    threads: int = 0,  # noqa: ARG001 - the signature of the C engine
    checksum: bool = True,
    direct: bool | None = False,  # noqa: ARG001
    enough: float = 0,  # noqa: ARG001
    size: int = 0,  # noqa: ARG001
    progress: Progress = None,
    filename: object = None,
) -> bool:
    """Write segments to a file, through the page cache; returns False."""

    def put(data: memoryview, at: int) -> None:
        while data:
            n = os.pwrite(fd, data, at)
            if n == 0:
                raise OSError(errno.EIO, "a transfer makes no progress", filename)
            data, at = data[n:], at + n

    _write(put, segments, layouts, checksum, progress)
    return False


def read(
    fds: Sequence[int],
    segments: Array,
    *,
    layouts: Sequence[Layout] | None = None,
    threads: int = 0,  # noqa: ARG001 - the signature of the C engine
    checksum: bool = True,
    fill: int = 0,  # noqa: ARG001
    progress: Progress = None,
    filenames: Sequence[object] | None = None,
) -> None:
    """Read segments of several files, one file after the other."""
    found = _by_row(layouts)
    before = 0

    def report(done: int) -> None:
        assert progress is not None
        progress(before + done)

    for file, fd in enumerate(fds):
        rows = np.flatnonzero(segments["file"] == file)
        part = segments[rows]
        inner = [(k, *found[i][1:]) for k, i in enumerate(rows.tolist()) if i in found]
        _read(
            _getter(fd),
            part,
            inner,
            checksum,
            report if progress is not None else None,
            filenames[file] if filenames is not None else None,
        )
        segments["crc"][rows] = part["crc"]
        before += int(part["nbytes"].sum())


def _getter(fd: int) -> _Get:
    """What reads a file. What it says there was is negative where the file ends further ahead."""

    def get(data: memoryview, at: int) -> int:
        n = _fill(lambda rest, offset: os.preadv(fd, [rest], offset), data, at)
        return n if n == len(data) else min(n, os.fstat(fd).st_size - at)

    return get


def _fill(get: _Get, data: memoryview, at: int) -> int:
    """Call `get` until `data` is full or there is no more; returns how much there was."""
    done = 0
    while done < len(data):
        n = get(data[done:], at + done)
        if n == 0:
            break
        done += n
    return done


# ---- file objects ------------------------------------------------------------------------------


def write_stream(
    file: BinaryIO,
    segments: Array,
    *,
    layouts: Sequence[Layout] | None = None,
    checksum: bool = True,
    progress: Progress = None,
) -> None:
    """Write segments, one after the other, to where `file` stands.

    Parameters
    ----------
    file : binary file object
        Needs ``write`` alone, which may be that of a raw file and take less than it is given.
    """

    def put(data: memoryview, _at: int) -> None:
        while data:
            n: int | None = file.write(data)
            if n is None:
                if isinstance(file, io.RawIOBase):
                    raise BlockingIOError(errno.EAGAIN, "the file object would block")
                return  # a write() of somebody's own that does not count: it took everything
            if n == 0:
                raise OSError(errno.EIO, "a transfer makes no progress")
            data = data[n:]

    _write(put, segments, layouts, checksum, progress)


def read_stream(
    file: BinaryIO,
    segments: Array,
    *,
    layouts: Sequence[Layout] | None = None,
    checksum: bool = True,
    progress: Progress = None,
    name: object = "<stream>",
) -> None:
    """Read segments, in order of their offsets, from a file object.

    Parameters
    ----------
    file : binary file object
        Offsets count from where it stands. Needs ``read`` or ``readinto``; where it cannot seek,
        gaps are read and dropped.
    """
    position = 0
    seekable = hasattr(file, "seekable") and file.seekable()
    origin = file.tell() if seekable else 0
    readinto = getattr(file, "readinto", None)

    def take(data: memoryview, _at: int) -> int:
        if readinto is not None:
            n = readinto(data)
        else:
            part = file.read(len(data))
            n = None if part is None else len(part)
            data[:n] = part if n else b""
        if n is None:
            raise BlockingIOError(errno.EAGAIN, "the file object would block")
        return int(n)

    def get(data: memoryview, at: int) -> int:
        nonlocal position
        if seekable and at != position:
            file.seek(at - position, os.SEEK_CUR)
            position = at
        while position < at:
            scrap = memoryview(bytearray(min(at - position, PIECE)))
            n = take(scrap, position)
            if n == 0:
                return position - at
            position += n
        n = _fill(take, data, at)
        position += n
        if n < len(data) and seekable:  # it may have ended before the place that was sought
            with contextlib.suppress(OSError, ValueError):
                file.seek(0, os.SEEK_END)
                position = file.tell() - origin
                return min(n, position - at)
        return n

    _read(get, segments, layouts, checksum, progress, name)
