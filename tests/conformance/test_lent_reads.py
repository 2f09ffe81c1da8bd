"""Reads that copy out of a map of the file, under a lease that keeps it from being cut."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine, _engine_py
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT
from pages import need_huge

MIB = 1 << 20
SIZE = 24 * MIB + 4321
NOISE = np.random.default_rng(6).integers(0, 256, SIZE, dtype=np.uint8)
#: What the last, incomplete unit of 2 MiB holds is read.
WHOLE = 24 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that the page cache has in large folios: one write of all of it makes them."""
    path = tmp_path / "file"
    path.write_bytes(NOISE.data)
    need_huge(path, WHOLE)
    return path


@pytest.fixture(autouse=True)
def unbanned() -> Iterator[None]:
    yield
    _engine.fault_ban(None, 0)


def over(memory: np.ndarray, offsets: list[int], sizes: list[int]) -> np.ndarray:
    """Segments at `offsets`, each to the same place of `memory`."""
    segments = np.zeros(len(sizes), SEGMENT)
    segments["offset"], segments["nbytes"] = offsets, sizes
    segments["address"] = memory.ctypes.data + segments["offset"]
    return segments


def lease_of(path: Path) -> list[str]:
    """Leases on the file, as the kernel lists them."""
    number = path.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if "LEASE" in line and f":{number} " in line]


SHAPES: dict[str, tuple[list[int], list[int]]] = {
    "one": ([0], [WHOLE]),
    "unaligned": ([3, 5 * MIB + 9], [5 * MIB + 1, 19 * MIB - 20]),
    "gaps": ([0, 9 * MIB, 20 * MIB + 5], [3 * MIB, 6 * MIB + 1, 3 * MIB]),
    "small": (list(range(0, WHOLE, 5000)), [4999] * -(-WHOLE // 5000)),
}


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_read_is_made(path: Path, shape: str, threads: int, checksum: bool) -> None:
    offsets, sizes = SHAPES[shape]
    sizes = [min(n, WHOLE - at) for at, n in zip(offsets, sizes, strict=True)]
    memory = np.zeros(SIZE, np.uint8)
    segments = over(memory, offsets, sizes)
    fd = os.open(path, os.O_RDONLY)
    _engine.fault_ban("pread", errno.EIO)
    _engine.read([fd], segments, threads=threads, checksum=checksum)
    os.close(fd)
    expected = np.zeros_like(memory)
    for at, n in zip(offsets, sizes, strict=True):
        expected[at : at + n] = NOISE[at : at + n]
    assert np.array_equal(memory, expected)
    if checksum:
        sums = [zlib.crc32(NOISE[at : at + n]) for at, n in zip(offsets, sizes, strict=True)]
        assert segments["crc"].tolist() == sums
    assert not lease_of(path)


def test_the_end_of_the_file(path: Path) -> None:
    memory = np.zeros(SIZE, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    _engine.read([fd], over(memory, [0], [SIZE]))
    beyond = over(np.zeros(SIZE + 1, np.uint8), [0], [SIZE + 1])
    with pytest.raises(FormatError):
        _engine.read([fd], beyond)
    os.close(fd)
    assert np.array_equal(memory, NOISE)


def test_checksums_alone_and_strided_tensors(path: Path) -> None:
    """What has no memory is only summed; a transposed one, and one of swapped bytes, is placed."""
    segments = np.zeros(3, SEGMENT)
    segments["offset"] = [0, 9 * MIB, 17 * MIB]
    segments["nbytes"] = [9 * MIB, 8 * MIB, 7 * MIB]
    results = []
    for engine in (_engine, _engine_py):
        column = np.zeros((1024, 4096), np.uint16)
        dense = np.zeros(7 * MIB, np.uint8)
        segments["address"] = [0, column.ctypes.data, dense.ctypes.data]
        layouts = [(1, (4096, 1024), (2, 8192), 2, 2)]
        fd = os.open(path, os.O_RDONLY)
        engine.read([fd], segments.copy(), layouts=layouts)
        os.close(fd)
        results.append((column.tobytes(), dense.tobytes()))
    assert results[0] == results[1]
    assert np.array_equal(np.frombuffer(path.read_bytes(), np.uint8), NOISE), "the map is private"


def test_where_it_is_open_for_writing(path: Path) -> None:
    writer = os.open(path, os.O_RDWR)
    memory = np.zeros(SIZE, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    _engine.read([fd], over(memory, [0], [SIZE]))
    assert np.array_equal(memory, NOISE)
    _engine.fault_ban("pread", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        _engine.read([fd], over(memory, [0], [SIZE]))
    os.close(writer)
    os.close(fd)


@pytest.mark.parametrize("call", ["openat", "fcntl", "fstat", "madvise", "pagemap", "fstatfs"])
def test_whatever_is_refused(path: Path, call: str) -> None:
    memory = np.zeros(SIZE, np.uint8)
    segments = over(memory, [0], [SIZE])
    fd = os.open(path, os.O_RDONLY)
    _engine.fault_ban(call, errno.EACCES)
    _engine.read([fd], segments)
    _engine.fault_ban(None, 0)
    os.close(fd)
    assert np.array_equal(memory, NOISE)
    assert segments["crc"][0] == zlib.crc32(NOISE)
    assert not lease_of(path)


def test_a_lease_of_somebody_else(path: Path) -> None:
    """Of another reader: both have one."""
    other = os.open(path, os.O_RDONLY)
    fcntl.fcntl(other, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(other, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    memory = np.zeros(SIZE, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    _engine.fault_ban("pread", errno.EIO)
    _engine.read([fd], over(memory, [0], [WHOLE]))
    assert fcntl.fcntl(other, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    os.close(other)
    os.close(fd)
    assert np.array_equal(memory[:WHOLE], NOISE[:WHOLE])


def test_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {"first": NOISE[: 11 * MIB], "second": NOISE[: 13 * MIB]}
    holdfast.save(tensors, path)
    content = bytearray(path.read_bytes())
    content[-5 * MIB] ^= 1
    path.write_bytes(content)
    need_huge(path, 20 * MIB)
    with pytest.raises(FormatError, match="second"):
        holdfast.load(path, mmap=False)
    again = holdfast.load(path, mmap=False, verify=False)
    assert np.array_equal(again["first"], tensors["first"])


CUTTER = """
import os, sys, threading, time
import holdfast
from holdfast.errors import FormatError
path, cuts = sys.argv[1], int(sys.argv[2])
with open(path, "rb") as f:
    whole = f.read()
lengths = [16384, len(whole) // 3, len(whole) // 2 + 12345, len(whole) - 5_000_000]
done = threading.Event()

def cut():
    try:
        for i in range(cuts):
            time.sleep(0.0013 * (i % 17))
            os.truncate(path, lengths[i % 4])
            with open(path, "r+b") as f:
                f.write(whole)
    finally:
        done.set()

cutter = threading.Thread(target=cut)
cutter.start()
loaded = short = 0
while not done.is_set():
    try:
        holdfast.load(path, mmap=False, framework="numpy")
        loaded += 1
    except FormatError:
        short += 1
cutter.join()
print(loaded, short)
"""


def test_a_file_that_is_cut_again_and_again(tmp_path: Path) -> None:
    """The reader sees it whole or says that it is not: a SIGBUS would end the process."""
    path = tmp_path / "weights.safetensors"
    holdfast.save({f"t{i}": NOISE + np.uint8(i) for i in range(6)}, path)
    path.write_bytes(path.read_bytes())
    need_huge(path, 6 * 22 * MIB)
    done = subprocess.run(
        [sys.executable, "-c", CUTTER, str(path), "60"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    loaded, short = map(int, done.stdout.split())
    assert loaded > 5
    assert short > 5


def test_no_lease_is_held_while_python_runs(tmp_path: Path) -> None:
    """Who waits for it may have what the callback waits for: an interpreter's lock, say."""
    path = tmp_path / "large"
    block = NOISE[: 8 * MIB].tobytes()
    with path.open("wb") as f:
        for _ in range(32):
            f.write(block)
    need_huge(path, 240 * MIB)
    fds = [os.open(path, os.O_RDONLY) for _ in range(8)]
    segments = np.zeros(len(fds), SEGMENT)
    segments["nbytes"] = 256 * MIB
    segments["file"] = np.arange(len(fds))
    waited: list[float] = []

    def progress(done: int) -> None:
        if done < 256 * MIB * len(fds):
            assert not lease_of(path)
            began = time.monotonic()
            os.close(os.open(path, os.O_WRONLY))
            waited.append(time.monotonic() - began)

    _engine.read(fds, segments, threads=1, progress=progress)
    for fd in fds:
        os.close(fd)
    assert waited
    assert max(waited) < 10, "it would be 45 s if nobody gave the lease back"
    assert set(segments["crc"].tolist()) == {zlib.crc32(block * 32)}


def test_what_tells_of_a_writer_ends_nobody(path: Path) -> None:
    """SIGURG, which a program may have a handler for."""
    heard: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, frame: heard.append(number))
    memory = np.zeros(SIZE, np.uint8)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            os.close(os.open(path, os.O_WRONLY))

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 20
    try:
        while len(heard) < 3 and time.monotonic() < deadline:
            fd = os.open(path, os.O_RDONLY)
            memory[:] = 0
            _engine.read([fd], over(memory, [0], [SIZE]))
            os.close(fd)
            assert np.array_equal(memory, NOISE)
    finally:
        stop.set()
        writer.join()
        signal.signal(signal.SIGURG, before)
    assert set(heard) == {signal.SIGURG}


def test_many_loads_at_once(path: Path) -> None:
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(10):
                memory = np.zeros(SIZE, np.uint8)
                fd = os.open(path, os.O_RDONLY)
                _engine.read([fd], over(memory, [0], [SIZE]))
                os.close(fd)
                assert np.array_equal(memory, NOISE)
        except BaseException as error:
            failures.append(error)

    team = [threading.Thread(target=load) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not failures
    assert not lease_of(path)
