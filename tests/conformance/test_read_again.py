"""A cold file is read past the page cache the first time, and brought into it the second time."""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import device_arrays
import holdfast
from device_arrays import put
from holdfast import _engine, ahead
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT

MIB = 1 << 20
SIZE = 21 * MIB + 777
NOISE = np.random.default_rng(6).integers(0, 256, SIZE, dtype=np.uint8)
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def unbanned() -> Iterator[None]:
    yield
    _engine.fault_arm(0, 0)
    _engine.fault_ban(None, 0)


def resident(path: Path) -> int:
    """Bytes of the file in the page cache."""
    with path.open("rb") as f:
        nbytes = os.fstat(f.fileno()).st_size
        return _engine.resident(_engine.map_file(f.fileno(), 0, nbytes), 0, nbytes)


def holds(path: Path, nbytes: int) -> bool:
    """Whether so many bytes are in the page cache, or soon will be: the mark comes by itself."""
    end = time.monotonic() + 5
    while resident(path) != nbytes and time.monotonic() < end:
        time.sleep(0.005)
    return resident(path) == nbytes


def drop(path: Path) -> None:
    with path.open("r+b") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, nbytes: int = SIZE, threads: int = 0) -> None:
    """Read the first bytes of the file as a load does, and check them."""
    memory = np.zeros(nbytes, np.uint8)
    segment = np.zeros(1, SEGMENT)
    segment["nbytes"], segment["address"] = nbytes, memory.ctypes.data
    with path.open("rb") as f:
        _engine.read(
            [f.fileno()],
            segment,
            threads=threads,
            fill=_engine.FILL_AGAIN,
            filenames=[str(path)],
        )
    assert np.array_equal(memory, NOISE[:nbytes])
    assert segment["crc"][0] == zlib.crc32(memory)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(NOISE.tobytes())
    drop(path)
    if resident(path):
        pytest.skip("this file system keeps files in the page cache")
    read(path)
    if not holds(path, PAGE):
        pytest.skip("no O_DIRECT here, or no way to ask what is in the page cache")
    drop(path)
    return path


def brought(path: Path, threads: int = 0) -> bool:
    """Whether the second of three loads brings the file into the cache, and the third leaves it.

    Several times if need be: the kernel may take the mark back whenever it looks for memory.
    """
    for _ in range(5):
        drop(path)
        read(path, threads=threads)
        if holds(path, PAGE):
            read(path, threads=threads)
            if holds(path, SIZE):
                read(path, threads=threads)
                return holds(path, SIZE)
    return False


def test_once_again_and_from_then_on(cold: Path) -> None:
    assert brought(cold)


@pytest.mark.parametrize("threads", [1, 3, 12])
def test_any_number_of_threads(cold: Path, threads: int) -> None:
    assert brought(cold, threads)


def test_an_emptied_cache_forgets(cold: Path) -> None:
    for _ in range(3):
        read(cold)
        assert holds(cold, PAGE)
        drop(cold)


def test_a_part_leaves_no_mark(cold: Path) -> None:
    for _ in range(3):
        read(cold, 9 * MIB)
    assert resident(cold) == 0


def test_a_part_of_what_was_loaded_is_no_load(cold: Path) -> None:
    """Whoever takes a little of a marked file has only that read."""
    read(cold)
    assert holds(cold, PAGE)
    read(cold, 9 * MIB)
    assert resident(cold) == PAGE


def test_a_page_in_company_is_no_mark(cold: Path) -> None:
    with cold.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(f.fileno(), 3 * PAGE, SIZE // 8 * 5 // PAGE * PAGE - PAGE)
    read(cold)
    assert holds(cold, 3 * PAGE)


def test_without_cachestat_each_is_the_first(cold: Path) -> None:
    _engine.fault_ban("cachestat", errno.ENOSYS)
    for _ in range(3):
        read(cold)
        assert holds(cold, PAGE)


def test_what_is_only_verified(tmp_path: Path) -> None:
    """It leaves no mark: the load after it is the first."""
    path = tmp_path / "ckpt"
    holdfast.save({"x": NOISE}, path)
    drop(path)
    before = resident(path)
    assert holdfast.verify(path).ok
    assert resident(path) - before < MIB
    assert holdfast.verify(path).ok
    assert resident(path) - before < MIB


@pytest.mark.parametrize("shard", [None, 12 * MIB])
@pytest.mark.parametrize("room", [True, False])
def test_loads(cold: Path, monkeypatch: pytest.MonkeyPatch, room: bool, shard: int | None) -> None:
    """All files of a load are brought into the cache, or none: where it takes too much of it."""
    path = cold.with_name("ckpt")
    saved = {name: np.roll(NOISE[: 10 * MIB], i) for i, name in enumerate("xyz")}
    holdfast.save(saved, path, max_shard_size=shard)
    files = sorted(path.glob("*.safetensors")) if shard else [path]
    assert len(files) == (3 if shard else 1)
    for file in files:
        drop(file)
    monkeypatch.setattr(ahead, "FILL_MOST", 30 * MIB - (not room))
    for _ in range(15 if room else 3):  # each may be the first again, where a mark was taken back
        loaded = holdfast.load(path, mmap=False)
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
        warm = [resident(file) == file.stat().st_size for file in files]
        if all(warm):
            break
        time.sleep(0.05)
    if room:
        assert all(warm)
    else:
        assert all(resident(file) < MIB for file in files)


@pytest.mark.parametrize("shard", [None, 40 * MIB])
@pytest.mark.parametrize("room", [True, False])
def test_loads_to_a_device(
    cold: Path, monkeypatch: pytest.MonkeyPatch, room: bool, shard: int | None
) -> None:
    """Of which each takes several calls of the engine, one for each part that is on its way."""
    path = cold.with_name("ckpt")
    saved = {name: np.roll(np.resize(NOISE, 33 * MIB), i) for i, name in enumerate("xyz")}
    holdfast.save(saved, path, max_shard_size=shard)
    files = sorted(path.glob("*.safetensors")) if shard else [path]
    for file in files:
        drop(file)
    monkeypatch.setattr(ahead, "FILL_MOST", 99 * MIB - (not room))
    with device_arrays.installed(monkeypatch):
        for k in range(15 if room else 3):
            target = {name: put(np.zeros_like(value)) for name, value in saved.items()}
            holdfast.load_into(target, path)
            assert all((target[name].get() == value).all() for name, value in saved.items())
            found = [resident(file) for file in files]
            if k == 0:  # past the cache, but for the last part, and a mark is left
                assert all(nbytes < 8 * MIB for nbytes in found)
            if not any(file.stat().st_size - n for file, n in zip(files, found, strict=True)):
                break
            time.sleep(0.05)
    if room:
        assert found == [file.stat().st_size for file in files]
        assert k > 0
    else:
        assert all(nbytes < 8 * MIB for nbytes in found)


def test_what_is_known_of_a_load(cold: Path) -> None:
    with cold.open("rb") as f:
        assert _engine.loaded_before(f.fileno(), SIZE) is False
        assert _engine.loaded_before(f.fileno(), SIZE // 3) is None  # a part
        _engine.mark_loaded(f.fileno())
        assert holds(cold, PAGE)
        assert _engine.loaded_before(f.fileno(), SIZE) is True
        os.pread(f.fileno(), SIZE, 0)
        assert _engine.loaded_before(f.fileno(), SIZE) is None  # warm
        _engine.fault_ban("cachestat", errno.ENOSYS)
        assert _engine.loaded_before(f.fileno(), SIZE) is None
    small = cold.with_name("small")
    small.write_bytes(b"x" * MIB)
    with small.open("rb") as f:
        assert _engine.loaded_before(f.fileno(), MIB) is None
        with pytest.raises(OSError) as caught:
            _engine.mark_loaded(f.fileno())
        assert caught.value.errno == errno.ENODATA


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOMEM, errno.EINTR, 0])
def test_every_call_failing(cold: Path, error: int) -> None:
    """The second load gives the right bytes, or says what failed."""
    for n in range(1, 1000):
        drop(cold)
        read(cold, threads=1)
        _engine.fault_arm(n, error)
        try:
            read(cold, threads=1)
        except (OSError, MemoryError, FormatError):
            assert error in (errno.EIO, errno.ENOMEM)
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if hit is None:
            assert n > 5
            return
    raise AssertionError("it never ended")


def test_it_ends_early(cold: Path) -> None:
    """A marked file that is shorter by now: an error, no crash."""
    read(cold)
    os.truncate(cold, SIZE - 3 * MIB)
    with pytest.raises((FormatError, OSError)):
        read(cold)
