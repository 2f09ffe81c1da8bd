"""Writing in whichever way is faster: both ways are tried, and either may fail."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast import _engine
from holdfast.layout import SEGMENT

#: 16 MiB through the cache, 64 past it, then as much again in the faster of the two.
SIZE = (131 << 20) + 4321
MIB = 1 << 20
FAULTS = [errno.ENOSPC, errno.EIO, errno.EINTR, 0]


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    block = np.frombuffer(os.urandom(1 << 20), np.uint8)
    data = np.tile(block, SIZE // len(block) + 1)[:SIZE]
    data[:: 1 << 16] = np.arange(len(data[:: 1 << 16])).astype(np.uint8)
    return data


@pytest.fixture
def write(content: np.ndarray, tmp_path: Path) -> Callable[..., bool]:
    """Write all of it to a file of its own, the first byte at `start`."""

    def write(start: int = 0, threads: int = 0, check: bool = True) -> bool:
        cuts = [0, 4096, 10_000_001, 70 << 20, SIZE]
        segments = np.zeros(4, SEGMENT)
        segments["offset"] = np.array(cuts[:-1]) + start
        segments["nbytes"] = np.diff(cuts)
        segments["address"] = content.ctypes.data + np.array(cuts[:-1], np.uint64)
        path = tmp_path / "file"
        path.write_bytes(b"x" * start)
        fd = os.open(path, os.O_RDWR)
        try:
            used = _engine.write(
                fd, segments, threads=threads, checksum=check, direct=None, filename=str(path)
            )
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT == 0, "the flag is put back"
        finally:
            os.close(fd)
        hit = _engine.fault_hit()
        written = np.fromfile(path, np.uint8)
        assert len(written) == start + SIZE, hit
        assert np.array_equal(written[start:], content), hit
        assert (written[:start] == ord("x")).all()
        if check:
            sums = [zlib.crc32(content[a:b].data) for a, b in itertools.pairwise(cuts)]
            assert segments["crc"].tolist() == sums
        return used

    return write


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 4096, 777])
def test_whole(write: Callable[..., bool], start: int, threads: int) -> None:
    write(start, threads)


def fail_each(
    write: Callable[..., bool], fault: int, numbers: range
) -> Iterator[tuple[str, OSError | None, bool]]:
    """Names of the calls that failed, what was raised, and whether O_DIRECT was used."""
    for n in numbers:
        _engine.fault_arm(n, fault)
        error, used = None, False
        try:
            used = write(threads=1, check=n % 2 == 0)
        except OSError as caught:
            error = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if hit is None:
            assert error is None
            return
        yield hit, error, used


def test_the_way_is_changed(write: Callable[..., bool]) -> None:
    """After the first 16 MiB, which the cache is never fast enough for if both are to be tried."""
    hits = [hit for hit, _, _ in fail_each(write, errno.EINTR, range(13, 19))]
    assert "fcntl" in hits


@pytest.mark.parametrize("numbers", [range(1, 19), range(19, 36, 5), range(36, 1000)], ids=repr)
@pytest.mark.parametrize("fault", FAULTS, ids=["ENOSPC", "EIO", "EINTR", "short"])
def test_calls_that_fail(write: Callable[..., bool], fault: int, numbers: range) -> None:
    """With one thread the calls come in the same order: both ways, and the changes of way."""
    seen = set()
    for hit, error, _ in fail_each(write, fault, numbers):
        seen.add(hit)
        if fault in (errno.EINTR, 0):
            assert error is None, f"{hit} was not resumed"
        elif error is None:
            assert hit in ("statx", "madvise"), hit
        else:
            assert error.errno == fault, hit
    assert "pwrite" in seen
    if numbers.start == 1:
        assert {"fstat", "fallocate", "fcntl"} <= seen


def test_direct_is_refused(write: Callable[..., bool]) -> None:
    """With EINVAL, where O_DIRECT is set or at its first write: the page cache takes the rest."""
    before = write(threads=1)
    overcome = []
    for hit, error, used in fail_each(write, errno.EINVAL, range(15, 1000)):
        if error is None:
            overcome.append((hit, used))
        else:
            assert error.errno == errno.EINVAL
    if not before:
        pytest.skip("this file system has no O_DIRECT")
    assert ("fcntl", False) in overcome, "setting the flag was refused, and all was written"
    assert [hit for hit, _ in overcome].count("pwrite") >= 4


def test_a_slow_cache_gets_another_chance(content: np.ndarray, tmp_path: Path) -> None:
    """Left for a bad moment, it is tried again for 16 MiB, 192 or more past it."""
    whole = np.tile(content, 3)[: 336 * MIB]
    segments = np.zeros(1, SEGMENT)
    segments["nbytes"], segments["address"] = whole.nbytes, whole.ctypes.data
    path = tmp_path / "file"
    for late in range(10, 14):  # one of the first 16 MiB, whichever calls come before them
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            _engine.fault_arm(late, -1000)
            used = _engine.write(fd, segments, threads=1, checksum=False, direct=None)
            hit = _engine.fault_hit()
            _engine.fault_arm(0, 0)
            file = _engine.map_file(fd, 0, whole.nbytes)
            steps = range(0, whole.nbytes, 16 * MIB)
            cached = [_engine.resident(file, at, 16 * MIB) for at in steps]
        finally:
            os.close(fd)
        if not used:
            pytest.skip("this file system has no O_DIRECT")
        if hit == "pwrite":
            break
    assert hit == "pwrite"
    assert cached[0] == 16 * MIB and not any(cached[1:17]) and cached[17] == 16 * MIB
    assert np.array_equal(np.fromfile(path, np.uint8), whole)


def test_a_fast_cache_is_not_left(content: np.ndarray, tmp_path: Path) -> None:
    """Where the page cache takes `enough` bytes a second, nothing is written past it."""
    segments = np.zeros(1, SEGMENT)
    segments["nbytes"], segments["address"] = SIZE, content.ctypes.data
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert not _engine.write(fd, segments, direct=None, enough=1.0)
        written = np.fromfile(tmp_path / "file", np.uint8)
        assert np.array_equal(written, content)
    finally:
        os.close(fd)
