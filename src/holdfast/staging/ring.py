"""The ring: blocks that copies from and to devices pass through while the engine moves others."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from .. import _engine
from ..errors import warn
from ..views import Layout
from .base import COPY, PAGE, CopyLostError, Device, Event
from .boxes import boxes
from .parts import Draft, Part, Staging, Work
from .pool import POOL, Block
from .registry import device as device_for

__all__ = ["to_device", "to_host"]

#: Of fewer bytes than that no memory is pinned: it would take longer than the copies.
PIN_FROM = 64 << 20
#: Memory of a device that a call takes, at most.
SCRATCH_MOST = 64 << 20
#: And where there is hardly any left: what strided tensors are made dense in.
SCRATCH_LEAST = 64 << 10
#: More pieces than that, side by side and each smaller than that, are gathered on the device.
GATHER_FROM = 9
GATHER_BELOW = 256 << 10


@dataclass(slots=True, eq=False)
class _Flight:
    """A block that copies have been submitted for."""

    block: Block
    devices: list[Device]
    events: dict[int, Event] = field(default_factory=dict)  # by position in `devices`
    sound: bool = True


class _Ring:
    """The blocks and the scratch memory of one call, which has them inside a ``with`` block."""

    def __init__(self, work: Work, staging: Staging, devices: dict[int, Device]) -> None:
        self.work, self.staging, self.devices = work, staging, devices
        self.block_size, self.most = staging.block_size, staging.blocks
        self.pinning = work.nbytes >= PIN_FROM
        self.held: list[Block] = []
        self.free: list[Block] = []
        self.flights: list[_Flight] = []
        self.coming: deque[tuple[Part, Draft, Block]] = deque()  # parts that are being filled
        self.scratches: dict[int, tuple[int, int]] = {}
        self.owners: list[object] = []
        self.no_scratch: set[int] = set()
        self.pid = os.getpid()

    def __enter__(self) -> _Ring:
        POOL.enter()
        try:
            if not self.pinning:
                waiting = POOL.waiting(self.block_size)
                if waiting:
                    self.most = min(self.most, waiting)
                else:
                    self.block_size = min(self.block_size, self.work.span)
            # Copies wait for whatever may still write to their memory.
            for each in self.devices.values():
                each.begin()
        except BaseException:
            POOL.leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pid != os.getpid():
            for block in self.held:  # the child of a fork: all of it is the parent's
                POOL.leak(block.buffer)
            return
        try:
            self._close()
        finally:
            POOL.leave()

    # ---- blocks --------------------------------------------------------------------------------

    def take(self) -> Block | None:
        """A block; None where one has to come back first."""
        if self.free:
            return self.free.pop()
        if len(self.held) >= self.most:
            return None
        block = POOL.take(self.block_size)
        if block is None:
            try:
                block = Block(_engine.allocate(self.block_size))
            except MemoryError:
                if not self.held:
                    raise
                self.most = len(self.held)
                return None
        self.held.append(block)
        if self.pinning and block.pinned is None:
            self._pin(block)
        return block

    def _pin(self, block: Block) -> None:
        POOL.only(self.block_size)
        device = next(iter(self.devices.values()))
        try:
            device.pin(block.buffer)
        except Exception as error:
            # Not worth a checkpoint: what is not pinned works, but copies and I/O take turns.
            self.pinning = False
            warn(
                f"{device.name}: {self.block_size} bytes cannot be pinned, so copies from and "
                f"to the device are slower: {error}"
            )
        else:
            block.pinned = device

    def wait(self, flight: _Flight) -> None:
        """Wait until all copies of a block are done."""
        try:
            for event in flight.events.values():
                event.wait()
        except Exception:
            flight.sound = False
            raise

    def land(self, flight: _Flight) -> None:
        """Let others have the block of a flight that has been waited for."""
        self.flights.remove(flight)
        self.free.append(flight.block)

    def _close(self) -> None:
        """Wait for all copies, whatever became of them, and give all memory back."""
        interrupt: BaseException | None = None
        fates: dict[int, str] = {}
        for part, _, _ in self.coming:
            interrupt = _unfilled(part) or interrupt
        for flight in self.flights:
            fate, stop = _settle(flight)
            interrupt = interrupt or stop
            fates[id(flight.block)] = fate if flight.sound or fate == "lost" else "failed"
        if "lost" in fates.values():
            POOL.leak(self.owners)
        for block in self.held:
            fate = fates.get(id(block), "done")
            if fate == "lost":
                POOL.leak(block.buffer)
            elif block.pinned is not None:
                if fate == "done":
                    POOL.give(block, self.staging.blocks)
                else:
                    POOL.discard(block)
        POOL.trim(self.staging.block_size, self.staging.blocks)
        self.held, self.free, self.flights, self.owners = [], [], [], []
        self.coming.clear()
        if interrupt is not None:
            raise interrupt

    # ---- copies --------------------------------------------------------------------------------

    def fetch(self, draft: Draft, block: Block) -> tuple[Part, _Flight]:
        """Submit the copies to the host of a part."""
        return self.work.part(draft, block.buffer.address), self._move(draft, block, True)

    @property
    def due(self) -> bool:
        """Whether the first of the parts that are being filled can go on its way at once."""
        filled = self.coming[0][0].filled if self.coming else None
        return bool(self.coming) and (filled is None or filled.done())

    def send(self) -> _Flight:
        """Submit the copies to the devices of the first part that is being filled."""
        part, draft, block = self.coming[0]
        if part.filled is not None:
            part.filled.result()
        self.coming.popleft()
        return self._move(draft, block, False)

    def _move(self, draft: Draft, block: Block, to_host: bool) -> _Flight:
        """Submit the copies of a part: pieces of one device and kind in one call."""
        rows, work = draft.rows, self.work
        codes = work.devices[rows]
        copies = np.empty(len(rows), COPY)
        copies["device"] = work.segments["address"][rows] + draft.into.astype(np.uint64)
        copies["host"] = draft.place.astype(np.uint64) + np.uint64(block.buffer.address)
        copies["nbytes"] = draft.nbytes
        kinds = np.where(draft.nbytes < GATHER_BELOW, _SMALL, _LARGE)
        kinds[work.odd[rows]] = _STRIDED
        keys = codes * 4 + kinds
        cuts = (np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist()
        used = np.unique(codes).tolist()
        flight = _Flight(block, [self.devices[code] for code in used])
        self.flights.append(flight)
        for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            code, kind = int(codes[low]), int(kinds[low])
            if kind == _STRIDED:
                for i in range(low, high):
                    self._strided(code, int(rows[i]), int(draft.into[i]), copies[i : i + 1])
            elif kind == _SMALL and high - low >= GATHER_FROM:
                self._together(code, copies[low:high], to_host)
            else:
                _apart(self.devices[code], copies[low:high], to_host)
        for k, each in enumerate(flight.devices):
            flight.events[k] = each.record()
        return flight

    def _together(self, code: int, copies: np.ndarray, to_host: bool) -> None:
        """Submit many small pieces as few transfers, by way of scratch memory of the device."""
        device = self.devices[code]
        scratch, size = self._scratch(code, 0)
        ends = (copies["host"] + copies["nbytes"]).astype(np.int64)
        at = 0
        while at < len(copies):
            begin = int(copies["host"][at])
            stop = max(at + 1, int(np.searchsorted(ends, begin + size, "right")))
            some = copies[at:stop]
            at = stop
            if len(some) < GATHER_FROM:
                _apart(device, some, to_host)
                continue
            whole = np.array([(scratch, begin, int(ends[stop - 1]) - begin)], COPY)
            if to_host:
                device.gather(some, scratch)
                device.to_host(whole)
            else:
                device.to_device(whole)
                device.scatter(some, scratch)

    def _strided(self, code: int, row: int, into: int, copy: np.ndarray) -> None:
        """Submit a piece of the dense bytes of a tensor whose memory is not dense."""
        device = self.devices[code]
        shape, strides, itemsize = self.work.strided[row]
        scratch, size = self._scratch(code, itemsize)
        base = int(self.work.segments["address"][row])
        host, at = int(copy["host"][0]), into
        end = into + int(copy["nbytes"][0])
        while at < end:
            first = at // itemsize
            last = min(-(-end // itemsize), first + size // itemsize)
            target = scratch
            for start, extents, steps in boxes(shape, strides, first, last):
                device.strided(base + start, extents, steps, itemsize, target)
                elements = 1
                for extent in extents:
                    elements *= extent
                target += elements * itemsize
            upto = min(end, last * itemsize)
            ready = scratch + at - first * itemsize
            device.to_host(np.array([(ready, host, upto - at)], COPY))
            host, at = host + upto - at, upto

    def _scratch(self, code: int, element: int) -> tuple[int, int]:
        """Address and size of the scratch memory of a device, which its copies use in turn.

        For pieces that could as well be copied one by one (`element` is 0) it may be of size 0;
        for strided tensors it has room for one element at least, or MemoryError is raised.
        """
        found = self.scratches.get(code)
        if found is not None and found[1] >= element:
            return found
        size = max(min(self.block_size, SCRATCH_MOST), element)
        if not element and code in self.no_scratch:
            return 0, 0
        while True:
            try:
                address, owner = self.devices[code].allocate(size, None)
            except MemoryError:
                self.no_scratch.add(code)
                if not element:
                    return 0, 0
                if size // 2 < max(SCRATCH_LEAST, element):
                    raise
                size //= 2
            else:
                self.owners.append(owner)
                self.scratches[code] = address, size
                return address, size


_LARGE, _SMALL, _STRIDED = range(3)


def _apart(device: Device, copies: np.ndarray, to_host: bool) -> None:
    if to_host:
        device.to_host(copies)
    else:
        device.to_device(copies)


def _unfilled(part: Part) -> BaseException | None:
    """Wait, after an error, until nobody fills a part any more; what came from elsewhere then."""
    interrupt: BaseException | None = None
    while part.filled is not None and not part.filled.done():
        try:
            wait_for([part.filled])
        except BaseException as error:
            interrupt = error
    return interrupt


def _settle(flight: _Flight) -> tuple[str, BaseException | None]:
    """Wait for the copies of a block after an error.

    Returns
    -------
    fate : str
        ``"done"``; ``"failed"``: no copy is running; ``"lost"``: one may be.
    interrupt : BaseException or None
        What came from elsewhere meanwhile.
    """
    fate, interrupt = "done", None
    for k, each in enumerate(flight.devices):
        for _ in range(3):
            try:
                if k not in flight.events:  # the error came before it
                    flight.events[k] = each.record()
                flight.events[k].wait()
            except CopyLostError:
                fate = "lost"
            except Exception:
                if k not in flight.events:
                    continue
                fate = "lost" if fate == "lost" else "failed"
            except BaseException as error:
                interrupt = error
                continue
            break
        else:
            fate = "lost"
    return fate, interrupt


def to_host(
    segments: np.ndarray,
    devices: np.ndarray,
    *,
    layouts: Sequence[Layout] = (),
    staging: Staging | None = None,
) -> Generator[Part, None, None]:
    """Segments on devices as parts that are all in the memory of the host.

    Copies of later parts run while the caller is busy with one. To give up before the end, close
    the generator (``contextlib.closing``): until then its memory is in use.

    Parameters
    ----------
    segments : ndarray of SEGMENT, shape (n,)
        In the order of the file; addresses are the devices'. They have to stay alive, and
        unchanged, until the end.
    devices : ndarray of int, shape (n,)
        Code of the device of each (:func:`holdfast.views.device_code`); 0 for the host.
    layouts : sequence of Layout
        Of segments that are not dense, on the host or not.
    staging : Staging, optional

    Yields
    ------
    Part
        Valid until the next is asked for. Segments of the host are never split.

    Raises
    ------
    RuntimeError
        A device cannot be used, a copy failed, or this thread is in such a transfer already.
    MemoryError
        A device has no room for what a strided tensor is made dense in.
    """
    work = Work(segments, devices, layouts)
    found = {code: device_for(code) for code in work.codes}
    return _to_host(work, staging or Staging(), found)


def _to_host(
    work: Work, staging: Staging, devices: dict[int, Device]
) -> Generator[Part, None, None]:
    if not devices:
        yield from _of_host(work)
        return
    with _Ring(work, staging, devices) as ring:
        coming: deque[tuple[Part, _Flight]] = deque()
        drafts = work.drafts(ring.block_size)
        draft = next(drafts, None)
        while coming or draft is not None:
            while draft is not None and (block := ring.take()) is not None:
                coming.append(ring.fetch(draft, block))
                draft = next(drafts, None)
            part, flight = coming.popleft()
            ring.wait(flight)
            yield part
            ring.land(flight)


def to_device(
    segments: np.ndarray, devices: np.ndarray, *, staging: Staging | None = None
) -> Generator[Part, None, None]:
    """Parts in the memory of the host, to be filled, which then go to segments on devices.

    What was filled is on its way once the next part is asked for; when the generator ends, all
    of it has arrived. Where other threads fill a part (:attr:`Part.filled`), the next one may be
    asked for before they are done. To give up before the end, close the generator
    (``contextlib.closing``): what is being filled, or on its way, is waited for first.

    Parameters
    ----------
    segments : ndarray of SEGMENT, shape (n,)
        Dense memory, in the order in which it is to be filled; addresses are the devices'. They
        have to stay alive until the end.
    devices : ndarray of int, shape (n,)
        Code of the device of each; 0 for the host, whose segments pass through as they are.
    staging : Staging, optional

    Yields
    ------
    Part
        Valid until the next is asked for, and as long as others are filling it.

    Raises
    ------
    RuntimeError
        A device cannot be used, a copy failed, or this thread is in such a transfer already.
    Exception
        What those raised who were filling a part.
    """
    work = Work(segments, devices)
    found = {code: device_for(code) for code in work.codes}
    return _to_device(work, staging or Staging(), found)


def _to_device(
    work: Work, staging: Staging, devices: dict[int, Device]
) -> Generator[Part, None, None]:
    if not devices:
        yield from _of_host(work)
        return
    with _Ring(work, staging, devices) as ring:
        going: deque[_Flight] = deque()
        for draft in work.drafts(ring.block_size):
            while ring.due:
                going.append(ring.send())
            while (block := ring.take()) is None:
                if going:
                    ring.wait(going[0])
                    ring.land(going.popleft())
                else:
                    going.append(ring.send())
            part = work.part(draft, block.buffer.address)
            ring.coming.append((part, draft, block))
            yield part
        while ring.coming:
            going.append(ring.send())
        while going:
            ring.wait(going[0])
            ring.land(going.popleft())


def _of_host(work: Work) -> Iterator[Part]:
    """Parts of segments that no device has to do with."""
    for draft in work.drafts(PAGE):
        yield work.part(draft, 0)
