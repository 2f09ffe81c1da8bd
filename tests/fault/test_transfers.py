"""Reading, mapping and prefetching with every system call failing in turn."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from holdfast import _engine
from holdfast.layout import SEGMENT

SHORT = 0
CONTENT = os.urandom((17 << 20) + 333)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def fail_each(action: Callable[[], None], error: int) -> tuple[int, list[str]]:
    """Run `action` with its 1st, 2nd... call failing; how many there are, and which raised."""
    raised: list[str] = []
    n = 0
    while True:
        n += 1
        _engine.fault_arm(n, error)
        failure = None
        try:
            action()
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if hit is None:
            assert failure is None
            return n - 1, raised
        if failure is not None:
            assert failure.errno == error, hit
            raised.append(hit)


def segments_over(target: np.ndarray) -> np.ndarray:
    """A large piece that is read straight, tiny ones that are not, one that is only summed."""
    segments = np.zeros(103, SEGMENT)
    segments["nbytes"] = [*[9 << 20], *[10] * 100, *[1 << 20] * 2]
    segments["offset"] = np.cumsum(segments["nbytes"]) - segments["nbytes"]
    segments["address"] = target.ctypes.data + segments["offset"]
    segments["address"][1:101] += np.arange(100, dtype=np.uint64)
    segments["address"][101:] = [target.ctypes.data + (10 << 20), 0]
    return segments


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, SHORT])
def test_read(path: Path, error: int, threads: int) -> None:
    target = np.zeros(12 << 20, np.uint8)
    segments = segments_over(target)
    fd = os.open(path, os.O_RDONLY)
    _engine.read([fd], segments)
    expected, sums = target.tobytes(), segments["crc"].tolist()

    def read() -> None:
        target[:] = 0
        segments["crc"] = 0
        _engine.read([fd], segments, threads=threads)
        assert target.tobytes() == expected
        assert segments["crc"].tolist() == sums

    count, raised = fail_each(read, error)
    os.close(fd)
    assert count > 20
    if error != errno.EIO:
        assert not raised
    elif threads == 1:
        assert set(raised) == {"pread", "mmap"}
    else:  # which call is the n-th differs from run to run
        assert "pread" in raised


@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, SHORT])
def test_map_and_prefetch(path: Path, error: int) -> None:
    fd = os.open(path, os.O_RDONLY)

    def look() -> None:
        buffer = _engine.map_file(fd, 100, len(CONTENT) - 100)
        _engine.expect(buffer, 0, len(buffer))
        _engine.prefetch(buffer, 0, len(buffer), 2)
        assert _engine.resident(buffer, 0, len(buffer)) == len(buffer)
        assert bytes(memoryview(buffer)[:1000]) == CONTENT[100:1100]
        assert _engine.filesystem(fd)

    before = _engine.live_buffers()
    count, raised = fail_each(look, error)
    os.close(fd)
    assert count >= 5
    expected = {"mmap", "madvise", "mincore", "fstatfs"} if error == errno.EIO else set()
    assert set(raised) == expected
    assert _engine.live_buffers() == before


def test_write_where_direct_io_is_refused(tmp_path: Path) -> None:
    content = np.frombuffer(CONTENT, np.uint8)
    segments = np.zeros(1, SEGMENT)
    segments["nbytes"] = len(CONTENT)
    segments["address"] = content.ctypes.data
    used = []
    for n in range(1, 100):
        target = tmp_path / str(n)
        fd = os.open(target, os.O_RDWR | os.O_CREAT)
        _engine.fault_arm(n, errno.EINVAL)
        failure = None
        try:
            used.append(_engine.write(fd, segments, direct=True))
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        os.close(fd)
        if hit is None:
            break
        if hit in ("pwrite", "fallocate", "statx"):
            assert failure is None, hit
        if failure is None:
            assert target.read_bytes() == CONTENT, hit
        else:
            assert failure.errno == errno.EINVAL, hit
        target.unlink()
    assert hit is None
    if used[-1]:  # the disk takes O_DIRECT: each refused write went on without it
        assert used.count(False) >= 3
