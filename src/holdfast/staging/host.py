# ruff: noqa: D102 (the protocol says what its methods do)
"""A device that is none: its memory is the host's, its copies are late.

The ring is proven over it. Copies are done behind the caller's back by a thread that dawdles, or
not before somebody waits for them; what is not done yet is filled with garbage, memory that is
used while a copy still needs it is an error at once, and any call can be made to fail.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _engine
from .._buffer import Buffer
from .base import COPY, Device, Event, host_bytes, out_of_memory

__all__ = ["HostDevice"]

#: What memory that a copy has not reached yet is filled with.
GARBAGE = 0xA5


class _Strided:
    """Memory that NumPy is told of, with strides."""

    def __init__(
        self, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "strides": tuple(strides),
            "typestr": f"|V{itemsize}",
            "version": 3,
        }


class _Owner:
    """Keeps an allocation of the device, and says when it goes."""

    def __init__(self, device: HostDevice, buffer: Buffer) -> None:
        self.device, self.buffer = device, buffer
        device.used += len(buffer)
        device.peak = max(device.peak, device.used)

    def __del__(self) -> None:
        self.device.used -= len(self.buffer)


class _Operation:
    """What a thread is to do, and the memory of the host that nobody may use until then."""

    def __init__(self, run: Callable[[], None], spans: list[tuple[int, int]]) -> None:
        self.run, self.spans = run, spans


class _Point:
    """The event after so many operations."""

    def __init__(self, device: HostDevice, begin: int, end: int) -> None:
        self.device, self.begin, self.end = device, begin, end

    def wait(self) -> None:
        self.device._wait(self.begin, self.end)


class HostDevice(Device):
    """Simulated memory of a device.

    Parameters
    ----------
    name : str
    capacity : int, optional
        Bytes that can be allocated at a time.
    delay : float
        Each operation takes a random time of at most so many seconds.
    lazy : bool
        Do nothing before an event is waited for, so that a missing wait is found for certain.
    seed : int

    Attributes
    ----------
    calls : Counter of str
        How often each was called: ``allocate``, ``pin``, ``unpin``, ``begin``, ``copy``
        (submitted), ``run`` (done), ``record``, ``wait``; each ``copy`` counts by its own name,
        too: ``to_host``, ``to_device``, ``gather``, ``scatter``, ``strided``.
    used, peak : int
        Bytes allocated now, and at most.
    pinned : dict of int to int
        Addresses and sizes.
    frameworks : list
        Whose pool each allocation was asked from.
    """

    def __init__(
        self,
        name: str = "host:0",
        *,
        capacity: int | None = None,
        delay: float = 0.0,
        lazy: bool = False,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.delay = delay
        self.lazy = lazy
        self.calls: Counter[str] = Counter()
        self.used = self.peak = 0
        self.pinned: dict[int, int] = {}
        self.frameworks: list[str | None] = []
        self._random = random.Random(seed)  # noqa: S311
        self._faults: dict[str, tuple[int, BaseException]] = {}
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[_Operation] = deque()
        self._submitted = self._done = self._recorded = 0
        self._failed: dict[int, BaseException] = {}
        self._worker: threading.Thread | None = None

    # ---- for tests -----------------------------------------------------------------------------

    def fail(self, call: str, n: int = 1, error: BaseException | None = None) -> None:
        """Make the `n`-th `call` from now raise `error`: once. See `calls` for their names.

        A ``copy`` fails half submitted; a ``run`` fails late, and the wait for it says so.
        """
        text = f"{self.name}: {call} was made to fail"
        self._faults[call] = (self.calls[call] + n, error or RuntimeError(text))

    def busy(self, address: int, nbytes: int) -> bool:
        """Whether a copy that is not done needs some of this memory of the host."""
        with self._changed:
            return any(
                begin < address + nbytes and address < end
                for operation in self._queue
                for begin, end in operation.spans
            )

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """Memory of the device, to be filled or looked at."""
        return host_bytes(address, nbytes)

    # ---- the protocol --------------------------------------------------------------------------

    def allocate(self, nbytes: int, framework: str | None) -> tuple[int, object]:
        self._count("allocate")
        self.frameworks.append(framework)
        if self.capacity is not None and self.used + nbytes > self.capacity:
            free = self.capacity - self.used
            raise out_of_memory(self.name, nbytes, free, self.capacity)
        owner = _Owner(self, _engine.allocate(nbytes))
        return owner.buffer.address, owner

    def pin(self, buffer: Buffer) -> None:
        self._count("pin")
        assert buffer.address not in self.pinned, "pinned twice"
        self.pinned[buffer.address] = len(buffer)

    def unpin(self, buffer: Buffer) -> None:
        self._count("unpin")
        assert not self.busy(buffer.address, len(buffer)), "unpinned while a copy needs it"
        del self.pinned[buffer.address]

    def begin(self) -> None:
        self._count("begin")

    def to_host(self, copies: np.ndarray) -> None:
        self._copies("to_host", copies, self._take)

    def to_device(self, copies: np.ndarray) -> None:
        self._copies("to_device", copies, self._put)

    def gather(self, copies: np.ndarray, scratch: int) -> None:
        moves = _image(copies, scratch)
        self._copies("gather", moves, lambda there, here, n: self._submit(here, there, n, []))

    def scatter(self, copies: np.ndarray, scratch: int) -> None:
        moves = _image(copies, scratch)
        self._copies("scatter", moves, lambda there, here, n: self._submit(there, here, n, []))

    def strided(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        itemsize: int,
        scratch: int,
    ) -> None:
        self._count("copy")
        self._count("strided")
        source = np.asarray(_Strided(address, shape, strides, itemsize))
        dense = np.cumprod([itemsize, *reversed(shape)])[:-1][::-1].tolist()
        target = np.asarray(_Strided(scratch, shape, dense, itemsize))
        self._enqueue(_Operation(lambda: np.copyto(target, source), []))

    def record(self) -> Event:
        self._count("record")
        with self._changed:
            begin, self._recorded = self._recorded, self._submitted
            return _Point(self, begin, self._submitted)

    # ---- copies --------------------------------------------------------------------------------

    def _count(self, call: str) -> None:
        self.calls[call] += 1
        n, error = self._faults.get(call, (0, None))
        if error is not None and self.calls[call] == n:
            del self._faults[call]
            raise error

    def _copies(
        self, kind: str, copies: np.ndarray, submit: Callable[[int, int, int], None]
    ) -> None:
        assert copies.dtype == COPY
        assert len(copies)
        rows = copies.tolist()
        try:
            self._count("copy")
            self._count(kind)
        except BaseException:
            for row in rows[: len(rows) // 2]:
                submit(*row)
            raise
        for row in rows:
            submit(*row)

    def _take(self, there: int, here: int, nbytes: int) -> None:
        self._submit(here, there, nbytes, [(here, here + nbytes)])

    def _put(self, there: int, here: int, nbytes: int) -> None:
        self._submit(there, here, nbytes, [(here, here + nbytes)])

    def _submit(self, to: int, source: int, nbytes: int, spans: list[tuple[int, int]]) -> None:
        for begin, end in spans:
            assert not self.busy(begin, end - begin), "memory that a copy needs is used again"
            if begin == to:
                host_bytes(to, nbytes)[:] = GARBAGE

        def run() -> None:
            host_bytes(to, nbytes)[:] = host_bytes(source, nbytes)

        self._enqueue(_Operation(run, spans))

    def _enqueue(self, operation: _Operation) -> None:
        if self._pid != os.getpid():
            self._reset()  # a thread does not outlive a fork
        with self._changed:
            self._queue.append(operation)
            self._submitted += 1
            if self._worker is None and not self.lazy:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while True:
            if self.delay:
                time.sleep(self._random.uniform(0, self.delay))
            with self._changed:
                if self._queue:
                    self._step()
                if not self._queue:
                    self._worker = None
                    return

    def _step(self) -> None:
        """Do the next operation."""
        try:
            self._count("run")
            self._queue[0].run()
        except BaseException as error:
            self._failed[self._done] = error
        self._queue.popleft()
        self._done += 1
        self._changed.notify_all()

    def _wait(self, begin: int, end: int) -> None:
        self._count("wait")
        with self._changed:
            while self._done < end:
                if self.lazy:
                    self._step()
                else:
                    self._changed.wait()
            for number in range(begin, end):
                if number in self._failed:
                    raise self._failed.pop(number)


def _image(copies: np.ndarray, scratch: int) -> np.ndarray:
    """The same pieces, between the device and the image of the host's memory in `scratch`."""
    moves: np.ndarray[Any, Any] = copies.copy()
    moves["host"] = copies["host"] - copies["host"][0] + np.uint64(scratch)
    return moves
