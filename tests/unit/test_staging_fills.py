"""Parts on their way to devices that other threads fill: in order, each once, and waited for."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device_arrays
import holdfast
from device_arrays import put
from holdfast import ChecksumError, staged, staging
from holdfast.folder import FolderSource
from holdfast.source import Source
from holdfast.staging.base import host_bytes
from holdfast.staging.host import HostDevice
from staged import BLOCK, Case, devices

RING = staging.Staging(block_size=1 << 16, blocks=4)


class Filler:
    """Threads that fill parts of a case, each after a while; `n` counts from 1.

    The first ones wait until `meet` of them are filling at a time.
    """

    def __init__(
        self, case: Case, threads: int = 2, fail: int = -1, most: float = 2e-3, meet: int = 1
    ) -> None:
        self.case, self.fail, self.most = case, fail, most
        self.pool = ThreadPoolExecutor(threads)
        self.lock = threading.Lock()
        self.random = random.Random(1)
        self.running = self.together = self.given = 0
        self.gate = threading.Event()
        self.gate.set()
        self.meet, self.met = meet, threading.Event()

    def submit(self, part: staging.Part) -> None:
        self.given += 1
        part.filled = self.pool.submit(self.run, part, self.given)

    def run(self, part: staging.Part, n: int) -> None:
        with self.lock:
            self.running += 1
            self.together = max(self.together, self.running)
            pause = self.random.uniform(0, self.most)
            if self.running >= self.meet:
                self.met.set()
        self.met.wait(10)
        time.sleep(pause)
        self.gate.wait()
        try:
            if n == self.fail:
                raise OSError("made to fail")
            for own, row in zip(part.segments, part.rows.tolist(), strict=True):
                begin = int(own["offset"]) - int(self.case.segments["offset"][row])
                nbytes = int(own["nbytes"])
                content = self.case.content[row][begin : begin + nbytes]
                host_bytes(int(own["address"]), nbytes)[:] = content
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture(params=["lazy", "late"])
def device(request: pytest.FixtureRequest) -> Iterator[HostDevice]:
    with devices(lazy=request.param == "lazy", delay=1e-4) as (made,):
        yield made


def submit_all(filler: Filler, parts: Any, error: type[BaseException] | None = None) -> None:
    """Have all parts filled; raise `error` once there are two."""
    for i, part in enumerate(parts):
        filler.submit(part)
        if i == 1 and error is not None:
            raise error


def large() -> Case:
    rows = [(5 * BLOCK + 77, 1, 3, 0), (300, 0, 0, 0), *[(900, 1, 0, 0)] * 30, (6 * BLOCK, 1, 0, 0)]
    case = Case(rows, 100)
    case.wipe()
    return case


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_the_next_part_is_given_out_while_others_are_filled(blocks: int) -> None:
    case = large()
    filler = Filler(case, meet=min(blocks, 2))
    with filler.pool, contextlib.closing(case.to_device(staging.Staging(BLOCK, blocks))) as parts:
        submit_all(filler, parts)
    case.check_memory()
    assert filler.given > 10
    assert filler.together == min(blocks, 2)


@pytest.mark.usefixtures("device")
def test_parts_filled_at_once_and_by_others_take_turns() -> None:
    case = large()
    filler = Filler(case)
    with filler.pool, contextlib.closing(case.to_device()) as parts:
        for i, part in enumerate(parts):
            if i % 3:
                filler.submit(part)
            else:
                filler.run(part, 0)
    case.check_memory()


@pytest.mark.parametrize("n", [1, 4, 12])
def test_a_fill_that_fails_ends_the_transfer_once_the_others_are_done(
    device: HostDevice, n: int
) -> None:
    case = large()
    filler = Filler(case, fail=n)
    with filler.pool, contextlib.closing(case.to_device()) as parts:
        with pytest.raises(OSError, match="made to fail"):
            submit_all(filler, parts)
        assert filler.running == 0, "a block was given back while it was being filled"
    assert not device.busy(0, 1 << 62)
    with (again := Filler(case)).pool, contextlib.closing(case.to_device()) as parts:
        submit_all(again, parts)
    case.check_memory()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_transfer_that_is_given_up_waits_for_what_is_being_filled(
    device: HostDevice, error: type[BaseException]
) -> None:
    case = large()
    filler = Filler(case)
    filler.gate.clear()
    with filler.pool:
        threading.Timer(0.05, filler.gate.set).start()
        with pytest.raises(error), contextlib.closing(case.to_device()) as parts:
            submit_all(filler, parts, error)
        assert filler.running == 0
    assert not device.busy(0, 1 << 62)


# ---- whole loads ----------------------------------------------------------------------------


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostDevice]:
    """A device; loads of any size are filled by several threads."""
    monkeypatch.setattr(staged, "FILLERS_FROM", 0)
    with device_arrays.installed(monkeypatch, delay=1e-4) as found:
        yield found[0]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each time that a file is read from: whether by the calling thread, how many threads."""
    found: list[tuple[bool, int]] = []
    move = Source.move

    def watched(self: Source, segments: Any, **how: Any) -> None:
        found.append((threading.current_thread() is threading.main_thread(), how["threads"]))
        move(self, segments, **how)

    monkeypatch.setattr(Source, "move", watched)
    return found


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [700_001, 65_536, 1, 0, *rng.integers(1, 3000, 60).tolist(), 400_000]
    found = {f"t{i}": rng.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
    return found | {"bool": rng.integers(0, 2, 200_000).astype(bool)}


def same(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].get().tobytes() == value.tobytes(), name


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("threads", "each"), [(None, 0), (1, 1), (3, 2), (8, 4)])
def test_loads_are_filled_beside_the_caller(
    tmp_path: Path, seen: list[tuple[bool, int]], threads: int | None, each: int
) -> None:
    expected = values()
    holdfast.save(expected, tmp_path / "x")
    to = {"map_location": "device:0", "framework": "device", "staging": RING}
    same(holdfast.load(tmp_path / "x", threads=threads, **to), expected)
    assert len(seen) > 10
    assert {how for _, how in seen} == {each}
    assert {here for here, _ in seen} == {threads == 1}
    done: list[tuple[int, int]] = []
    found = holdfast.load(
        tmp_path / "x", threads=threads, progress=lambda *at: done.append(at), **to
    )
    same(found, expected)
    total = sum(value.nbytes for value in expected.values())
    assert done == sorted(done)
    assert done[-1] == (total, total)
    target = {key: put(np.zeros_like(value)) for key, value in expected.items()}
    holdfast.load_into(target, tmp_path / "x", threads=threads)
    same(target, expected)


def test_a_thread_that_cannot_be_started_leaves_nothing_behind(
    tmp_path: Path, there: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values()
    holdfast.save(expected, tmp_path / "x")
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name.startswith("holdfast-fill"):
            started.append(self)
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
        start(self)

    move = Source.move

    def slow(self: Source, segments: Any, **how: Any) -> None:
        time.sleep(0.01)
        move(self, segments, **how)

    monkeypatch.setattr(Source, "move", slow)
    monkeypatch.setattr(threading.Thread, "start", limited)
    to = {"map_location": "device:0", "framework": "device", "staging": RING}
    with pytest.raises(RuntimeError, match="can't start new thread"):
        holdfast.load(tmp_path / "x", **to)
    assert not started[0].is_alive()
    assert not there.busy(0, 1 << 62)
    same(holdfast.load(tmp_path / "x", **to), expected)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("nth", [1, 2])
def test_an_interrupt_while_a_thread_is_started_waits_for_what_that_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    holdfast.save(values(), tmp_path / "x")
    started: list[threading.Thread] = []
    start, move = threading.Thread.start, Source.move
    begun, lock, running = threading.Event(), threading.Lock(), [0]

    def interrupted(self: threading.Thread) -> None:
        start(self)
        if self.name.startswith("holdfast-fill"):
            started.append(self)
            if len(started) == nth:
                assert begun.wait(10)
                raise KeyboardInterrupt

    def slow(self: Source, segments: Any, **how: Any) -> None:
        with lock:
            running[0] += 1
            if running[0] == nth:
                begun.set()
        begun.wait(10)
        time.sleep(0.1)
        move(self, segments, **how)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(Source, "move", slow)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        holdfast.load(tmp_path / "x", "device:0", framework="device", staging=RING)
    assert begun.is_set()
    assert running == [0], "a block was given back while it was being filled"


@pytest.mark.usefixtures("there")
def test_where_no_thread_can_be_started_the_caller_fills(
    tmp_path: Path, seen: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while the interpreter ends, when functions of atexit may still load."""
    expected = values()
    holdfast.save(expected, tmp_path / "x")
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name.startswith("holdfast-fill"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    done: list[tuple[int, int]] = []
    to = {"map_location": "device:0", "framework": "device", "staging": RING}
    same(holdfast.load(tmp_path / "x", progress=lambda *at: done.append(at), **to), expected)
    assert {here for here, _ in seen} == {True}
    total = sum(value.nbytes for value in expected.values())
    assert done == sorted(done)
    assert done[-1] == (total, total)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("how", [{"max_shard_size": 100_000}, {"format": "oneflow"}])
def test_folders_are_filled_beside_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    expected = values()
    holdfast.save(expected, tmp_path / "x", **how)
    here: list[bool] = []
    move = FolderSource.move

    def watched(self: FolderSource, segments: Any, **how: Any) -> None:
        here.append(threading.current_thread() is threading.main_thread())
        move(self, segments, **how)

    monkeypatch.setattr(FolderSource, "move", watched)
    found = holdfast.load(tmp_path / "x", "device:0", framework="device", staging=RING)
    same({name: found[name] for name in expected}, expected)
    assert len(here) > 10
    assert not any(here)


@pytest.mark.usefixtures("there")
def test_what_stands_at_one_place_is_read_by_the_caller(
    tmp_path: Path, seen: list[tuple[bool, int]]
) -> None:
    expected = values()
    with (tmp_path / "x").open("wb") as f:
        f.write(b"before")
        holdfast.save(expected, f)
    with (tmp_path / "x").open("rb") as f:
        f.seek(6)
        same(holdfast.load(f, "device:0", framework="device", staging=RING), expected)
    assert {here for here, _ in seen} == {True}


@pytest.mark.usefixtures("there")
def test_damage_and_ends_are_seen_whoever_fills(tmp_path: Path) -> None:
    holdfast.save(values(), tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    with holdfast.open(tmp_path / "x") as f:
        at = f.info("t64").offset
    to = {"map_location": "device:0", "framework": "device", "staging": RING}
    data[at + 350_000] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ChecksumError, match="tensor 't64'"):
        holdfast.load(tmp_path / "x", **to)
    cut: list[bool] = []

    def progress(*_: int) -> None:
        if not cut:
            cut.append(True)
            with (tmp_path / "x").open("r+b") as f:
                f.truncate(at + 200_000)

    with pytest.raises(holdfast.FormatError, match="file ends at"):
        holdfast.load(tmp_path / "x", progress=progress, **to)
