"""Memory that is kept of tensors that are gone, for those that come next."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from holdfast import _engine, kept
from holdfast.loading import LoadOptions, load_file

MIB = 1 << 20
HUGE = 2 * MIB

pytestmark = [
    pytest.mark.skipif(kept.most() == 0, reason="this kernel is too old to keep memory"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    _engine.keep(0)
    _engine.keep(256 * MIB)
    yield
    _engine.keep(0)
    _engine.keep(kept.most())


def status(name: str) -> int:
    """Bytes of the process that the kernel counts under this name."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


def fill(buffer: _engine.Buffer, value: int) -> None:
    np.frombuffer(buffer, np.uint8)[:] = value


def test_the_next_one_takes_it() -> None:
    buffer = _engine.allocate(5 * MIB + 1)
    address = buffer.address
    fill(buffer, 7)
    del buffer
    assert _engine.kept() == 5 * MIB + mmap.PAGESIZE
    again = _engine.allocate(5 * MIB + 1)
    assert again.address == address
    assert _engine.kept() == 0
    fill(again, 8)  # memory like any other
    assert bytes(memoryview(again)[:3]) == b"\x08\x08\x08"


def test_the_smallest_that_fits_is_taken_and_cut() -> None:
    large, between, small = (_engine.allocate(n * MIB) for n in (40, 2, 12))
    _engine.keep(0)
    _engine.keep(256 * MIB)
    starts = large.address, small.address
    del large, small
    taken = _engine.allocate(5 * MIB)  # 6 MiB of it: what is left is aligned
    assert taken.address == starts[1]
    assert _engine.kept() == (40 + 12 - 6) * MIB
    rest = _engine.allocate(6 * MIB)
    assert rest.address == starts[1] + 6 * MIB
    assert _engine.kept() == 40 * MIB
    del taken, rest
    whole = _engine.allocate(12 * MIB)
    assert whole.address == starts[1], "neighbours are joined again"
    del between


def test_small_ones_are_not_kept() -> None:
    del_me = _engine.allocate(HUGE - 1)
    del del_me
    assert _engine.kept() == 0


def test_no_more_than_allowed() -> None:
    _engine.keep(10 * MIB)
    first, second, third = (_engine.allocate(6 * MIB) for _ in range(3))
    del first
    assert _engine.kept() == 6 * MIB
    del second
    assert _engine.kept() == 6 * MIB, "12 MiB would be too much"
    _engine.keep(4 * MIB)
    assert _engine.kept() == 4 * MIB
    del third
    _engine.keep(0)
    assert _engine.kept() == 0


def test_what_does_not_fit_is_given_back_first() -> None:
    """No program holds more than it once needed, only because its tensors change their sizes."""
    buffers = [_engine.allocate(4 * MIB) for _ in range(10)]
    apart = buffers[::2]
    del buffers
    assert _engine.kept() == 20 * MIB
    larger = _engine.allocate(9 * MIB)
    assert 9 * MIB <= 20 * MIB - _engine.kept() < 9 * MIB + HUGE
    del larger, apart


def test_the_kernel_may_take_it() -> None:
    buffer = _engine.allocate(64 * MIB)
    fill(buffer, 1)
    before = status("LazyFree")
    del buffer
    assert status("LazyFree") - before >= 64 * MIB
    # As it does when memory runs short: the next one finds zeros, or what was there.
    again = _engine.allocate(64 * MIB)
    content = np.frombuffer(again, np.uint8)
    assert set(np.unique(content[:: mmap.PAGESIZE]).tolist()) <= {0, 1}
    content[:] = 2
    assert (content == 2).all()
    del content, again


def test_release() -> None:
    buffer = _engine.allocate(64 * MIB)
    fill(buffer, 1)
    before = status("Rss")
    del buffer
    assert status("Rss") >= before - MIB
    assert holdfast.release_kept() == 64 * MIB
    assert status("Rss") < before - 60 * MIB
    assert holdfast.release_kept() == 0


def test_loads_and_saves(tmp_path: Path) -> None:
    """Load after load of other bytes, into memory that other tensors left, and saves between."""
    path, rng = tmp_path / "ckpt", np.random.default_rng(3)
    for _ in range(6):
        sizes = rng.integers(1, 9 * MIB, 5)
        saved = {str(i): rng.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
        holdfast.save(saved, path)
        loaded = holdfast.load(path, mmap=False)
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
        del loaded
    assert _engine.kept() > 0


@pytest.mark.parametrize("format", ["safetensors", "torch", "torch_legacy"])
def test_nothing_is_in_what_is_not_read(tmp_path: Path, format: str) -> None:
    """Tensors without their data are zeros, not what others have left."""
    path = tmp_path / "ckpt"
    holdfast.save({"x": np.ones(5 * MIB, np.uint8), "y": np.ones(3, np.uint8)}, path, format=format)
    buffer = _engine.allocate(40 * MIB)
    fill(buffer, 7)
    del buffer
    found = load_file(path, LoadOptions(framework="numpy", data=False))
    assert not found["x"].any()
    assert not found["y"].any()


def test_a_child_copies_nothing() -> None:
    buffer = _engine.allocate(8 * MIB)
    fill(buffer, 5)
    del buffer
    child = os.fork()
    if not child:
        good = _engine.kept() == 8 * MIB
        mine = _engine.allocate(8 * MIB)
        content = np.frombuffer(mine, np.uint8)
        good &= not content.any()  # its copy was never made
        content[:] = 6
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    again = np.frombuffer(_engine.allocate(8 * MIB), np.uint8)
    assert not (again == 6).any(), "what a child writes stays the child's"


def test_what_is_taken_is_forked_like_any_memory() -> None:
    buffer = _engine.allocate(8 * MIB)
    del buffer
    again = _engine.allocate(8 * MIB)
    fill(again, 9)
    child = os.fork()
    if not child:
        os._exit(0 if (np.frombuffer(again, np.uint8) == 9).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_two_processes_had_is_not_kept() -> None:
    """The kernel takes no page back that a child has, too: it would stay for good."""
    buffer = _engine.allocate(8 * MIB)
    fill(buffer, 1)
    child = os.fork()
    if not child:
        del buffer
        os._exit(0 if _engine.kept() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    del buffer
    assert _engine.kept() == 0
    buffer = _engine.allocate(8 * MIB)
    del buffer
    assert _engine.kept() == 8 * MIB


@pytest.mark.skipif("HOLDFAST_SANITIZED" in os.environ, reason="its locks stay held in a child")
def test_a_child_of_a_busy_process_has_a_table() -> None:
    """Where a thread is at it while another forks, the child begins with an empty one."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            _engine.allocate(2 * MIB)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(60):
            child = os.fork()
            if not child:
                _engine.release_kept()
                good = _engine.kept() == 0
                buffer = _engine.allocate(4 * MIB)
                del buffer
                os._exit(0 if good and _engine.kept() == 4 * MIB else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_it_is_as_new() -> None:
    """What its last owner had the kernel do with it is undone."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = _engine.allocate(4 * MIB)
    address, nbytes = ctypes.c_void_p(buffer.address), ctypes.c_size_t(len(buffer))
    assert libc.madvise(address, nbytes, 10) == 0  # MADV_DONTFORK
    assert libc.mprotect(address, nbytes, 1) == 0  # PROT_READ
    del buffer
    again = _engine.allocate(4 * MIB)
    assert again.address == address.value
    fill(again, 3)
    child = os.fork()
    if not child:
        os._exit(0 if (np.frombuffer(again, np.uint8) == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


@given(st.lists(st.integers(-5, 12 * MIB), max_size=40), st.integers(0, 64))
def test_no_two_share_memory(steps: list[int], most: int) -> None:
    """Allocations, and releases (of the n-th from the end) where a number is negative."""
    _engine.keep(0)
    _engine.keep(most * MIB)
    alive: list[tuple[np.ndarray, int]] = []
    for number, step in enumerate(steps):
        if step >= 0:
            ends = np.frombuffer(_engine.allocate(step), np.uint8)[:: max(step // 64, 1)]
            ends[...] = number
            alive.append((ends, number))
        elif len(alive) >= -step:
            ends, value = alive.pop(step)
            assert (ends == value).all()
            del ends
        assert _engine.kept() <= most * MIB
    assert all((ends == value).all() for ends, value in alive)


def test_threads() -> None:
    """Allocating and letting go in several threads at once: each finds its own bytes."""
    wrong: list[int] = []

    def work(value: int) -> None:
        rng = np.random.default_rng(value)
        for _ in range(200):
            content = np.frombuffer(_engine.allocate(int(rng.integers(1, 9) * MIB)), np.uint8)
            sample = content[:: MIB // 4]
            sample[...] = value
            if not (sample == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("asked", "found"), [("0", "0"), ("4194304", "4194304"), ("", None)])
def test_the_variable(asked: str, found: str | None) -> None:
    code = """
import holdfast
from holdfast import _engine
buffers = [_engine.allocate(2 << 20) for _ in range(4)]
del buffers
print(_engine.kept())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, kept.VARIABLE: asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (str(8 * MIB) if found is None else found)


@pytest.mark.parametrize("asked", ["1 GB", "-1", "1e9", "9" * 30])
def test_the_variable_is_wrong(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(kept.VARIABLE, asked)
    with pytest.raises(ValueError, match=r"HOLDFAST_KEEP_BYTES: expected a number of bytes"):
        kept.most()


def test_an_old_kernel_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LINUX", (10_000, 0))
    assert kept.most() == 0
    monkeypatch.setenv(kept.VARIABLE, "100")
    assert kept.most() == 0
