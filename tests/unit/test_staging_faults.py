"""The ring when something goes wrong: memory is given back, and never while a copy needs it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import warnings
from collections.abc import Generator, Iterator

import numpy as np
import pytest

from holdfast import _engine, staging
from holdfast.staging.host import HostDevice
from holdfast.staging.pool import POOL
from staged import BLOCK, SMALL, Case, devices, drain, fill


def mixed() -> tuple[Case, list]:
    """Segments of all kinds: large, small and many, strided, of the host."""
    array = np.random.default_rng(1).integers(0, 99, (60, 50, 9)).astype("<i4")
    rows = [(2 * BLOCK + 9, 1, 0, 0), (700, 0, 0, 0), *[(500, 1, 0, 0)] * 20]
    case = Case([*rows, (array.nbytes, 1, 0, 0), (3 * BLOCK, 1, 0, 0)])
    odd = len(rows)
    case.now(odd)[:] = array.reshape(-1).view(np.uint8)
    case.content[odd] = np.frombuffer(array.T.tobytes(), np.uint8)
    return case, [(odd, array.T.shape, array.T.strides, 4, 0)]


@pytest.fixture(params=["lazy", "late"])
def device(request: pytest.FixtureRequest) -> Iterator[HostDevice]:
    with devices(lazy=request.param == "lazy", delay=1e-5) as (made,):
        yield made


def check_sound(device: HostDevice, case: Case, layouts: list) -> None:
    """After an error nothing is taken, and the next transfer is a good one."""
    used = sum(len(owner) for owner in case.owners if not isinstance(owner, np.ndarray))
    assert device.used == used, "scratch memory was not given back"
    assert not device.busy(0, 1 << 62), "a copy is under way"
    assert len(device.pinned) <= SMALL.blocks
    device._faults.clear()
    case.segments["crc"] = 0
    assert drain(case, case.to_host(layouts=layouts), device)[0] == case.content[0].tobytes()
    case.check_crcs()


@pytest.mark.parametrize("call", ["begin", "copy", "record", "wait", "run"])
def test_any_call_that_fails_on_the_way_to_the_host(device: HostDevice, call: str) -> None:
    case, layouts = mixed()
    drain(case, case.to_host(layouts=layouts))
    total = device.calls[call]
    assert total
    for n in range(1, total + 1):
        before = len(POOL.leaked)
        device.fail(call, n)
        with pytest.raises(RuntimeError, match=f"host:0: {call} was made to fail"):
            drain(case, case.to_host(layouts=layouts))
        assert len(POOL.leaked) == before
        check_sound(device, case, layouts)


@pytest.mark.parametrize("call", ["begin", "copy", "record", "wait", "run"])
def test_any_call_that_fails_on_the_way_to_the_device(device: HostDevice, call: str) -> None:
    case = Case([(2 * BLOCK + 9, 1, 0, 0), (700, 0, 0, 0), *[(500, 1, 0, 0)] * 20])
    fill(case, case.to_device())
    total = device.calls[call]
    assert total
    for n in range(1, total + 1):
        case.wipe()
        device.fail(call, n)
        with pytest.raises(RuntimeError, match=f"host:0: {call} was made to fail"):
            fill(case, case.to_device())
        fill(case, case.to_device())
        check_sound(device, case, [])
        case.check_memory()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_memory_that_cannot_be_pinned_is_used_as_it_is(device: HostDevice, n: int) -> None:
    case, layouts = mixed()
    device.fail("pin", n)
    with pytest.warns(UserWarning, match="65536 bytes cannot be pinned, so copies"):
        drain(case, case.to_host(layouts=layouts), device)
    case.check_crcs()
    assert len(device.pinned) == n - 1
    check_sound(device, case, layouts)


def test_scratch_memory_that_cannot_be_had(device: HostDevice) -> None:
    case, layouts = mixed()
    device.fail("allocate", 1, MemoryError("none"))
    drain(case, case.to_host(layouts=layouts), device)
    case.check_crcs()
    device.fail("allocate", 1, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        drain(case, case.to_host(layouts=layouts), device)
    check_sound(device, case, layouts)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_host_without_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    with devices() as (device,):
        case = Case([(9 * BLOCK, 1, 0, 0)])
        allocate, made = _engine.allocate, []

        def scarce(nbytes: int) -> object:
            if nbytes == BLOCK and len(made) >= most:
                raise MemoryError(f"cannot allocate {nbytes} bytes")
            made.append(nbytes)
            return allocate(nbytes)

        monkeypatch.setattr(_engine, "allocate", scarce)
        if most:
            drain(case, case.to_host(), device)
            case.check_crcs()
            assert len(device.pinned) == most
        else:
            with pytest.raises(MemoryError, match="cannot allocate 65536 bytes"):
                drain(case, case.to_host(), device)
        monkeypatch.undo()
        check_sound(device, case, [])


def give_up(parts: Generator[staging.Part, None, None], n: int, error: type[BaseException]) -> None:
    """Raise `error` while busy with the n-th part."""
    with contextlib.closing(parts):
        for k, _ in enumerate(parts):
            if k == n:
                raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("out", [True, False])
def test_a_caller_that_raises(device: HostDevice, error: type[BaseException], out: bool) -> None:
    case, layouts = mixed() if out else (Case([(9 * BLOCK, 1, 0, 0)]), [])
    odd = layouts
    total = len(list(case.to_host(layouts=odd)))
    assert total > SMALL.blocks
    for n in range(total):
        with pytest.raises(error):
            give_up(case.to_host(layouts=odd) if out else case.to_device(), n, error)
        assert not device.busy(0, 1 << 62), "a copy is under way"
        if not out:
            fill(case, case.to_device())
        check_sound(device, case, odd)


@pytest.mark.parametrize("out", [True, False])
def test_a_transfer_that_is_closed_or_never_started(device: HostDevice, out: bool) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    start = case.to_host if out else case.to_device
    before = _engine.live_buffers()
    start().close()
    start()
    assert not device.calls["begin"]
    assert _engine.live_buffers() == before
    for n in range(1, 9):
        parts = start()
        for _ in range(n):
            next(parts)
        parts.close()
        assert not device.busy(0, 1 << 62)
    parts = start()
    next(parts)
    del parts  # whoever forgets it gives it back, too
    gc.collect()
    drain(case, case.to_host())


def test_an_interrupt_while_waiting(device: HostDevice) -> None:
    case, layouts = mixed()
    device.fail("wait", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        drain(case, case.to_host(layouts=layouts))
    check_sound(device, case, layouts)
    # And while all is given back: the interrupt comes out, the memory all the same.
    parts = case.to_host(layouts=layouts)
    next(parts)
    device.fail("wait", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        parts.close()
    assert len(device.pinned) == SMALL.blocks
    check_sound(device, case, layouts)


def test_a_copy_whose_fate_is_unknown_keeps_its_memory(device: HostDevice) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)] + [(10, 1, 0, 0)] * 20)
    parts = case.to_host()
    seen = [int(next(parts).segments["address"][0])]
    # The event of the second block is lost: at first, and when it is asked again.
    wait, lost = HostDevice._wait, []

    def losing(self: HostDevice, begin: int, end: int) -> None:
        wait(self, begin, end)
        if not lost or begin in lost:
            lost.append(begin)
            raise staging.CopyLostError("who knows")

    HostDevice._wait = losing  # type: ignore[method-assign]
    try:
        with pytest.raises(staging.CopyLostError, match="who knows"):
            next(parts)
    finally:
        HostDevice._wait = wait  # type: ignore[method-assign]
    (scratch, owner) = POOL.leaked
    assert len(owner) == BLOCK  # type: ignore[arg-type]
    assert scratch == [], "none was taken yet"
    assert owner.address in device.pinned  # type: ignore[attr-defined]
    staging.release_pinned()
    assert list(device.pinned) == [owner.address], "only that one stays"  # type: ignore[attr-defined]
    drain(case, case.to_host())
    case.check_crcs()
    assert seen
    device.unpin(owner)  # type: ignore[arg-type]
    for each in (owner, scratch):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(each))
    POOL.leaked.clear()


def test_memory_that_cannot_be_unpinned_is_never_freed(device: HostDevice) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    drain(case, case.to_host())
    device.fail("unpin")
    with pytest.raises(RuntimeError, match="unpin was made to fail"):
        staging.release_pinned()
    assert len(device.pinned) == 1
    (owner,) = POOL.leaked
    device.unpin(owner)  # type: ignore[arg-type]
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(owner))
    POOL.leaked.clear()


def test_release_while_a_transfer_runs(device: HostDevice) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    drain(case, case.to_host())
    assert len(device.pinned) == SMALL.blocks
    parts = case.to_host(staging.Staging(BLOCK, 2))
    next(parts)
    staging.release_pinned()
    assert len(device.pinned) == 2, "what is in use stays"
    found = b"".join(bytes(device.view(int(p.segments["address"][0]), 1)) for p in parts)
    assert len(found) == 8
    staging.release_pinned()
    assert not device.pinned


def test_one_thread_waits_for_the_other(device: HostDevice) -> None:
    cases = [Case([(9 * BLOCK, 1, 0, 0)], seed=i) for i in range(3)]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(4):
                drain(case, case.to_host(), device)
                case.check_crcs()
                case.segments["crc"] = 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(device.pinned) == SMALL.blocks, "they share the blocks"


def test_a_transfer_inside_another_is_refused(device: HostDevice) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    host = Case([(10, 0, 0, 0)])
    with contextlib.closing(case.to_host()) as parts:
        next(parts)
        with pytest.raises(RuntimeError, match="by this thread already"):
            drain(case, case.to_host())
        with pytest.raises(RuntimeError, match="by this thread already"):
            fill(case, case.to_device())
        drain(host, host.to_host())  # which has nothing to do with devices
        assert len(list(parts)) == 8, "the first goes on"
    drain(case, case.to_host())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_has_blocks_of_its_own(device: HostDevice) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    drain(case, case.to_host())
    parts = case.to_host()
    next(parts)
    pinned = dict(device.pinned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            calls = device.calls["unpin"]
            parts.close()  # which is the parent's
            staging.release_pinned()
            assert device.calls["unpin"] == calls
            device.pinned.clear()
            drain(case, case.to_host())
            case.check_crcs()
            assert not set(device.pinned) & set(pinned)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert device.pinned == pinned
    assert len(list(parts)) == 8
