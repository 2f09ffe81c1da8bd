"""What of a file is brought into memory before it is touched, and by how much at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator

import numpy as np

from . import _engine
from ._buffer import Buffer
from .maps import Maps

__all__ = ["bring", "expect", "expect_all", "expect_one", "has_room", "pass_through"]

#: A map no larger than this gets its page tables filled at once by two threads, where it is of what
#: is in the page cache: that takes a quarter less than a fault for every 64 KiB does, and half
#: where the kernel took back a few of the pages, since it asks for those sooner.
POPULATE_MOST = 4 << 30
#: What is missing of a map is read by 2 MiB, and ahead, where so much of it in a row is wanted:
#: each stretch may become a map of its own to the kernel, which has 65,530 for a process ...
EXPECT_LEAST = 8 << 20
#: ... and up to where the folios end that it is read by: neighbours that are taken one by one, with
#: something small between them, are then one to the kernel again.
FOLIO = 2 << 20
#: Where a control group says how much memory its processes may have: of version 2, and of 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory() -> int:
    """How many bytes of memory this process may have: the machine's, or its control group's."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # "max" is no number
            most = min(most, int(file.read()))
    return most


#: ... and where it is no more than this. Of a larger file not all stays in memory, and who looks at
#: rows of it here and there would have 4 MiB read for each, again and again. Nothing is marked
#: where pages are not of 4 KiB: of 64 KiB (arm64), what is read at a time would be 512 MiB.
EXPECT_MOST = memory() // 2 if os.sysconf("SC_PAGE_SIZE") == 4096 else 0
#: A load brings files into the page cache that were loaded before where it reads no more than this.
FILL_MOST = memory() // 4


def has_room(segments: np.ndarray) -> bool:
    """Whether the files of these segments may take room in the page cache: all, or none."""
    return int(segments["nbytes"].sum()) <= FILL_MOST


def expect_all(maps: Maps) -> None:
    """All of these maps is going to be used: cheaply, from the page cache and from the disk."""
    pass_through(maps)
    with contextlib.suppress(OSError):
        for buffer in maps.buffers:
            _engine.populate_cached(buffer, POPULATE_MOST, 2)


def pass_through(maps: Maps) -> None:
    """All of these maps is going to be used, and let go of piece by piece."""
    if sum(map(len, maps.buffers)) > EXPECT_MOST:
        return
    with contextlib.suppress(OSError):  # a wish: pages come one by one without it
        for buffer in maps.buffers:
            if len(buffer) >= EXPECT_LEAST:
                _engine.expect(buffer, 0, len(buffer))


def expect(maps: Maps, segments: np.ndarray) -> None:
    """These segments of the files are going to be used, and all of each."""
    if segments["nbytes"].sum() < EXPECT_LEAST:
        return
    with contextlib.suppress(OSError):
        for buffer, start, stop in _runs(maps, segments):
            _expect(maps, buffer, start, stop)


def expect_one(maps: Maps, file: int, offset: int, nbytes: int) -> None:
    """These bytes of a file are going to be used."""
    buffer = maps.of(file)
    if buffer is not None:
        with contextlib.suppress(OSError):
            _expect(maps, buffer, offset, offset + nbytes)


def _expect(maps: Maps, buffer: Buffer, start: int, stop: int) -> None:
    if EXPECT_LEAST <= stop - start <= EXPECT_MOST and next(maps.marks, None) is not None:
        start -= start % FOLIO
        stop = min(stop + -stop % FOLIO, len(buffer))
        _engine.expect(buffer, start, stop - start)


def bring(maps: Maps, segments: np.ndarray, threads: int) -> None:
    """Bring these segments of the files into memory and into the page tables, now.

    Raises
    ------
    OSError
        A file cannot be read, or has become shorter.
    """
    expect(maps, segments)
    for buffer, start, stop in _runs(maps, segments):
        _engine.prefetch(buffer, start, stop - start, threads)


def _runs(maps: Maps, segments: np.ndarray) -> Iterator[tuple[Buffer, int, int]]:
    """Byte ranges of the mapped files that segments cover, neighbours joined."""
    order = np.lexsort((segments["offset"], segments["file"]))
    files = segments["file"][order]
    starts = segments["offset"][order].astype(np.int64)
    stops = starts + segments["nbytes"][order].astype(np.int64)
    gaps = np.flatnonzero((starts[1:] > stops[:-1]) | (files[1:] != files[:-1])) + 1
    for begin, end in itertools.pairwise([0, *gaps.tolist(), len(starts)]):
        if end > begin and stops[end - 1] > starts[begin]:
            buffer = maps.of(int(files[begin]))
            if buffer is not None:
                yield buffer, int(starts[begin]), int(stops[end - 1])
