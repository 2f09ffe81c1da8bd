"""Memory of the engine: allocated, mapped, counted."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_000, 2 * MIB, 5 * MIB + 1])
def test_allocate(nbytes: int) -> None:
    before = _engine.live_buffers()
    buffer = _engine.allocate(nbytes)
    assert _engine.live_buffers() == before + 1
    assert len(buffer) == nbytes
    view = memoryview(buffer)
    assert view.nbytes == nbytes
    assert not view.readonly
    if nbytes:
        assert buffer.address % (2 * MIB if nbytes >= 2 * MIB else mmap.PAGESIZE) == 0
        view[-1] = 7
    del buffer
    assert view.nbytes == nbytes, "a view keeps the memory"
    view.release()
    assert _engine.live_buffers() == before


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError):
        _engine.allocate(1 << 62)
    with pytest.raises(MemoryError):
        _engine.allocate((1 << 64) - 1)


@pytest.mark.parametrize("offset", [0, 1, 4096, 12_345, 2 * MIB + 5])
@pytest.mark.parametrize("nbytes", [0, 1, 5000, 3 * MIB])
def test_map_file(tmp_path: Path, offset: int, nbytes: int) -> None:
    content = os.urandom(offset + nbytes + 10)
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    buffer = _engine.map_file(fd, offset, nbytes)
    os.close(fd)
    view = memoryview(buffer)
    assert bytes(view) == content[offset : offset + nbytes]
    if nbytes >= 2 * MIB:
        assert (buffer.address - offset) % (2 * MIB) == 0
    if nbytes:
        view[0] ^= 255
    assert path.read_bytes() == content, "what is written to a map stays in the process"


def test_map_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        _engine.map_file(-1, 0, 10, "some.bin")
    assert caught.value.filename == "some.bin"
    with pytest.raises(OSError):
        _engine.map_file(0, (1 << 64) - 1, 10)


def test_prefetch_and_resident(tmp_path: Path) -> None:
    nbytes = 40 * MIB + 100
    path = tmp_path / "file"
    path.write_bytes(os.urandom(nbytes))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = _engine.map_file(fd, 0, nbytes)
    os.close(fd)
    if _engine.resident(buffer, 0, nbytes) == nbytes:
        pytest.skip("this file system keeps its files in memory")
    _engine.prefetch(buffer, 5, nbytes - 5, threads=3)
    assert _engine.resident(buffer, 0, nbytes) == nbytes
    assert _engine.resident(buffer, 4095, 2) == 2
    assert _engine.resident(buffer, 10, 0) == 0
    _engine.prefetch(buffer, nbytes, 0)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (11, 0), (5, 6), (2**63, 2**63)])
def test_parts_lie_within(offset: int, nbytes: int) -> None:
    buffer = _engine.allocate(10)
    for function in (_engine.expect, _engine.prefetch, _engine.resident):
        with pytest.raises(ValueError, match="of a buffer of 10 bytes"):
            function(buffer, offset, nbytes)


def test_filesystem(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    assert _engine.filesystem(fd) > 0
    os.close(fd)
    with pytest.raises(OSError):
        _engine.filesystem(-1)
    if os.path.isdir("/proc/self"):
        fd = os.open("/proc/self", os.O_RDONLY)
        assert _engine.filesystem(fd) == 0x9FA0
        os.close(fd)


@pytest.mark.parametrize(("nbytes", "most"), [(MIB, 6), (2 * MIB, 16), (1000, 1)])
def test_small_tensors_share_memory(tmp_path: Path, nbytes: int, most: int) -> None:
    """Pieces of about 4 MiB for those that are too small for a huge page of their own."""
    saved = {f"t{i}": np.full(nbytes, i, "u1") for i in range(16)}
    holdfast.save(saved, tmp_path / "ckpt")
    before = _engine.live_buffers()
    loaded = holdfast.load(tmp_path / "ckpt", mmap=False, framework="numpy")
    assert 1 <= _engine.live_buffers() - before <= most
    kept = loaded["t3"]
    del loaded
    assert _engine.live_buffers() - before == 1
    assert (kept == 3).all() and kept.ctypes.data % 64 == 0
