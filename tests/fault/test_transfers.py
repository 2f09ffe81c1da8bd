"""Reading, mapping and prefetching with every system call failing in turn."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
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


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program that may end as no test should."""
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


INTERRUPTED = """
import errno, os, sys
import numpy as np
from holdfast import _engine
from holdfast.layout import SEGMENT
buffer = _engine.allocate(8 << 20)
segment = np.zeros(1, SEGMENT)
segment["nbytes"], segment["address"] = 8 << 20, buffer.address
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
_engine.fault_ban("fallocate", errno.EINTR)
_engine.write(fd, segment)
"""


def test_room_is_not_asked_for_forever(tmp_path: Path) -> None:
    """tmpfs gives up its pages again at every signal, and a timer may be faster than it is."""
    done = run(INTERRUPTED, str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new").stat().st_size == 8 << 20


CUT = """
import faulthandler, os, resource, sys
import numpy as np
from holdfast import _engine
from holdfast.layout import SEGMENT
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
faulthandler.enable()
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(fd, 65 << 20)
buffer = _engine.map_file(fd, 0, 65 << 20)
os.truncate(fd, 64 << 20)
segments = np.zeros(2, SEGMENT)
segments["offset"] = [0, 64 << 20]
segments["nbytes"] = [64 << 20, 1 << 20]
segments["address"] = buffer.address + segments["offset"]
_engine.checksum(segments, threads=2)
"""


@pytest.mark.skipif("HOLDFAST_SANITIZED" in os.environ, reason="AddressSanitizer reports it")
def test_a_fault_in_a_worker_is_reported(tmp_path: Path) -> None:
    """The calling thread takes what is long, nearly always, and the other what the file lost."""
    done = run(CUT, str(tmp_path / "cut"))
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
