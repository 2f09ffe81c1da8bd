"""Reads of files that are in the page cache not at all, in part or wholly give the same bytes."""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast import _engine
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT

MIB = 1 << 20
SIZE = 21 * MIB + 777
NOISE = np.random.default_rng(5).integers(0, 256, SIZE, dtype=np.uint8)

#: Calls that are refused, so that another way is taken: mincore(2) for cachestat(2), and none.
REFUSED: dict[str, tuple[str | None, int]] = {
    "nothing": (None, 0),
    "cachestat missing": ("cachestat", errno.ENOSYS),
    "cachestat not allowed": ("cachestat", errno.EPERM),
    "alignment not told": ("statx", errno.EIO),
    "second descriptor": ("openat", errno.EINVAL),
    "no descriptors left": ("openat", errno.EMFILE),
}

#: Sizes of the segments, with what lies between two of them.
SHAPES: dict[str, tuple[list[int], int, int]] = {
    "one": ([SIZE], 0, 0),
    "pages": ([8 * MIB, 4096, 9 * MIB, 4096 * 3], 0, 4096),
    "odd": ([3, 7 * MIB + 1, 100, 9 * MIB + 4095, 1, 70_001], 0, 77),
    "gaps": ([MIB + 5, 300_000, 9 * MIB, 17, 40_000], 1_300_001, 512),
    "small": ([1000, 4097] * 1900, 3, 10),
    "to the end": ([SIZE - 10 * MIB - 1], 0, 10 * MIB + 1),
}


def resident(fd: int) -> int:
    nbytes = os.fstat(fd).st_size
    return _engine.resident(_engine.map_file(fd, 0, nbytes), 0, nbytes)


def make(path: Path, cached: str) -> int:
    """A file with NOISE, `cached`: "cold", "warm", "half" or "holes"; skips where it cannot be."""
    path.write_bytes(NOISE.tobytes())
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    if cached != "warm":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(fd):
            os.close(fd)
            pytest.skip("this file system keeps files in the page cache")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: what is read is what is in
    if cached == "half":
        os.pread(fd, 11 * MIB, 2 * MIB)
    if cached == "holes":
        for at in range(0, SIZE, 700_000):
            os.pread(fd, 300_000, at)
    if cached in ("half", "holes"):
        assert 0 < resident(fd) < SIZE
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    return fd


@pytest.fixture(autouse=True)
def unbanned() -> Iterator[None]:
    yield
    _engine.fault_ban(None, 0)


def spread(sizes: list[int], gap: int, start: int) -> np.ndarray:
    segments = np.zeros(len(sizes), SEGMENT)
    segments["nbytes"] = sizes
    segments["offset"] = np.cumsum([start, *[n + gap for n in sizes[:-1]]])
    assert int(segments["offset"][-1]) + sizes[-1] <= SIZE
    return segments


def direct_io(path: Path) -> bool:
    """Whether files there can be read past the page cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(fd, [mmap.mmap(-1, 4096)], 0) == 4096
    except OSError:
        return False
    finally:
        os.close(fd)


@pytest.mark.parametrize("threads", [0, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cached", ["cold", "half", "holes", "warm"])
def test_the_same_bytes(tmp_path: Path, cached: str, shape: str, threads: int) -> None:
    segments = spread(*SHAPES[shape])
    for shift in (0, 1, 512):  # memory that is aligned like the file, or not
        fd = make(tmp_path / "file", cached)
        memory = np.frombuffer(mmap.mmap(-1, SIZE + 4096), np.uint8)
        segments["address"] = memory.ctypes.data + segments["offset"] + np.uint64(shift)
        _engine.read([fd], segments, threads=threads)
        os.close(fd)
        expected = np.zeros_like(memory)
        for row in segments:
            at, n = int(row["offset"]), int(row["nbytes"])
            expected[at + shift : at + shift + n] = NOISE[at : at + n]
            assert row["crc"] == zlib.crc32(NOISE[at : at + n])
        assert np.array_equal(memory, expected)


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("cached", ["cold", "holes"])
def test_whatever_is_refused(tmp_path: Path, cached: str, refused: str) -> None:
    fd = make(tmp_path / "file", cached)
    memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
    segments = spread([SIZE], 0, 0)
    segments["address"] = memory.ctypes.data
    before = resident(fd)
    _engine.fault_ban(*REFUSED[refused])
    _engine.read([fd], segments)
    _engine.fault_ban(None, 0)
    after = resident(fd)
    os.close(fd)
    assert np.array_equal(memory, NOISE)
    if refused in ("nothing", "cachestat missing"):
        if direct_io(tmp_path / "file"):
            assert after <= before + mmap.PAGESIZE, "what is cold stays so, but for the mark"
    else:  # nearly all of it: others may have pages dropped meanwhile
        assert after > SIZE // 2


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_refusal_in_the_middle(tmp_path: Path, threads: int) -> None:
    segments = spread([SIZE], 0, 0)
    hits = []
    for n in range(1, 80):
        fd = make(tmp_path / "file", "cold")
        memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
        segments["address"] = memory.ctypes.data
        _engine.fault_arm(n, errno.EOPNOTSUPP)
        failure = None
        try:
            _engine.read([fd], segments, threads=threads)
        except OSError as caught:
            failure = caught
        hits.append(_engine.fault_hit())
        _engine.fault_arm(0, 0)
        os.close(fd)
        if failure is not None:  # memory for a buffer is not something to do without
            assert hits[-1] == "mmap"
            continue
        assert np.array_equal(memory, NOISE)
        assert segments["crc"][0] == zlib.crc32(NOISE)
        if hits[-1] is None:
            break
    assert hits[-1] is None
    assert "cachestat" in hits
    if threads == 1 and direct_io(tmp_path / "file"):  # of two, the n-th call may be any
        assert {"openat", "statx", "pread", "close"} <= set(hits)


def test_several_files_strides_and_sums_alone(tmp_path: Path) -> None:
    fds = [make(tmp_path / str(i), cached) for i, cached in enumerate(["cold", "warm", "half"])]
    matrix = np.zeros((1500, 1000), np.uint32)
    dense = np.zeros(3 * MIB, np.uint8)
    segments = np.zeros(6, SEGMENT)
    for file in range(3):
        rows = segments[2 * file : 2 * file + 2]
        rows["file"] = file
        rows["offset"] = [4099, 10 * MIB]
        rows["nbytes"] = [matrix.nbytes, 3 * MIB]
    segments["address"][:2] = [matrix.ctypes.data, dense.ctypes.data]
    _engine.read(fds, segments, layouts=[(0, (1000, 1500), matrix.T.strides, 4, 0)])
    for fd in fds:
        os.close(fd)
    first = NOISE[4099 : 4099 + matrix.nbytes]
    second = NOISE[10 * MIB : 13 * MIB]
    assert matrix.T.tobytes() == first.tobytes()
    assert np.array_equal(dense, second)
    assert segments["crc"].tolist() == [zlib.crc32(first), zlib.crc32(second)] * 3


@pytest.mark.parametrize("size", [12 * MIB, 12 * MIB + 5])
@pytest.mark.parametrize("start", [0, 5, 12 * MIB - 3, 17 * MIB])
def test_a_cold_file_too_short(tmp_path: Path, size: int, start: int) -> None:
    fd = make(tmp_path / "file", "cold")
    os.ftruncate(fd, size)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    segments = np.zeros(1, SEGMENT)
    segments["offset"], segments["nbytes"] = start, 20 * MIB
    with pytest.raises(FormatError, match=rf"offset {start}, file ends at {size}$"):
        _engine.read([fd], segments, threads=1, filenames=["f"])
    os.close(fd)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("cached", ["cold", "holes"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, 0])
def test_every_call_failing(tmp_path: Path, error: int, cached: str) -> None:
    segments = spread([5, 9 * MIB, 4095, 11 * MIB], 0, 4096)
    memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
    segments["address"] = memory.ctypes.data + segments["offset"]
    raised, n = set(), 0
    while True:
        n += 1
        fd = make(tmp_path / "file", cached)
        memory[:] = 0
        failure = None
        _engine.fault_arm(n, error)
        try:
            _engine.read([fd], segments, threads=2)
        except OSError as caught:
            failure = caught
        if failure is not None:
            assert failure.errno == error == errno.EIO
            raised.add(_engine.fault_hit())
        else:
            end = int(segments["offset"][-1] + segments["nbytes"][-1])
            assert np.array_equal(memory[4096:end], NOISE[4096:end])
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        os.close(fd)
        if hit is None:
            break
    assert n > 8
    assert raised == ({"pread", "mmap"} if error == errno.EIO else set())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    fd = make(tmp_path / "file", "cold")
    before = len(os.listdir("/proc/self/fd"))
    _engine.read([fd], spread([SIZE], 0, 0))
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_page_tables_are_filled_in_for_cached_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as f:
        for _ in range(4):
            f.write(NOISE)
        os.fsync(f.fileno())
    with path.open("rb") as f:
        nbytes = os.fstat(f.fileno()).st_size
        buffer = _engine.map_file(f.fileno(), 0, nbytes)
        assert _engine.resident(buffer, 0, nbytes) == nbytes
        pages = -(-nbytes // mmap.PAGESIZE)
        assert _engine.populate_cached(buffer, nbytes) == pages * mmap.PAGESIZE
        assert _engine.populate_cached(buffer, nbytes - 1) == 0
        assert _engine.populate_cached(_engine.map_file(f.fileno(), 0, MIB), nbytes) == 0
        del buffer
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = _engine.map_file(f.fileno(), 0, nbytes)
        if _engine.resident(buffer, 0, nbytes) == 0:
            assert _engine.populate_cached(buffer, nbytes) == 0
            assert _engine.resident(buffer, 0, nbytes) == 0


def test_page_tables_are_filled_in_around_what_the_kernel_took_back(tmp_path: Path) -> None:
    piece = 16 * MIB
    path = tmp_path / "file"
    with path.open("wb") as f:
        for _ in range(8 * piece // MIB):
            f.write(NOISE[:MIB])
        os.fsync(f.fileno())
    with path.open("rb") as f:
        fd, nbytes = f.fileno(), 8 * piece
        hole, lost = (2 * piece + 4 * MIB, MIB), (5 * piece, piece)
        for offset, length in (hole, lost):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        buffer = _engine.map_file(fd, 0, nbytes)
        if _engine.resident(buffer, 0, nbytes) != nbytes - hole[1] - lost[1]:
            pytest.skip("the page cache keeps what it is asked to drop")
        assert _engine.populate_cached(buffer, nbytes) == nbytes - piece
        assert _engine.resident(buffer, *hole) == hole[1]
        del buffer
        for i in range(nbytes // (2 * MIB)):  # every second folio
            os.posix_fadvise(fd, (2 * i + 1) * 2 * MIB, 2 * MIB, os.POSIX_FADV_DONTNEED)
        buffer = _engine.map_file(fd, 0, nbytes)
        assert _engine.populate_cached(buffer, nbytes) <= 2 * piece
        del buffer
