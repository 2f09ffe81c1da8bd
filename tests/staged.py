"""Segments of a simulated device and of the host, and what their bytes should be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from holdfast import _engine, staging
from holdfast.layout import SEGMENT
from holdfast.staging import ring
from holdfast.staging.base import PAGE, host_bytes
from holdfast.staging.host import HostDevice
from holdfast.views import Layout, device_code

__all__ = ["BLOCK", "CODES", "SMALL", "Case", "devices", "drain", "fill"]

CODES = (device_code(2, 0), device_code(2, 1))
T = TypeVar("T")
#: The smallest blocks that there are, and the size of one.
BLOCK = 1 << 16
SMALL = staging.Staging(BLOCK, 3)


@contextlib.contextmanager
def devices(n: int = 1, *, pin: bool = True, **arguments: Any) -> Iterator[list[HostDevice]]:
    """Simulated devices behind the codes; all memory that they pinned is given back."""
    made = [HostDevice(f"host:{i}", seed=i, **arguments) for i in range(n)]
    before, ring.PIN_FROM = ring.PIN_FROM, 0 if pin else ring.PIN_FROM
    for code, device in zip(CODES, made, strict=False):
        staging.register(code, device)
    try:
        yield made
    finally:
        staging.release_pinned()
        ring.PIN_FROM = before
        for code in CODES[:n]:
            staging.unregister(code)
    for device in made:
        assert not device.pinned, "memory stayed pinned"


class Case:
    """Segments, end to end but for gaps, with random bytes.

    Parameters
    ----------
    rows : sequence of tuple
        For each segment its size, its device (0 for the host, k for the k-th), how many bytes of
        the file are skipped before it, and the number of its file.
    start : int
        Offset of the first.
    """

    def __init__(
        self, rows: Sequence[tuple[int, int, int, int]], start: int = 0, seed: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        self.segments = np.zeros(len(rows), SEGMENT)
        self.devices = np.zeros(len(rows), np.int32)
        self.owners: list[Any] = []
        self.content: list[np.ndarray] = []
        offset, before = start, 0
        for i, (nbytes, device, gap, file) in enumerate(rows):
            if file != before:
                offset, before = 0, file
            offset += gap
            content = random.integers(0, 256, nbytes, np.uint8)
            if device:
                owner: Any = staging.allocate(CODES[device - 1], nbytes, "torch")
                address = owner.address
                self.devices[i] = CODES[device - 1]
                _look(address, nbytes)[:] = content
            else:
                owner = content.copy()
                address = owner.ctypes.data
            self.owners.append(owner)
            self.content.append(content)
            self.segments[i] = (offset, nbytes, address, 0, file, 0)
            offset += nbytes

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def nbytes(self) -> int:
        return sum(len(content) for content in self.content)

    def now(self, i: int) -> np.ndarray:
        """The bytes in the memory of a segment."""
        return _look(int(self.segments["address"][i]), int(self.segments["nbytes"][i]))

    def wipe(self) -> None:
        """Zeros everywhere."""
        for i in range(len(self)):
            self.now(i)[:] = 0

    def check_memory(self) -> None:
        """All memory is as it was at first."""
        for i, content in enumerate(self.content):
            assert self.now(i).tobytes() == content.tobytes(), f"segment {i}"

    def to_host(self, setting: staging.Staging = SMALL, layouts: Sequence[Layout] = ()) -> Any:
        """The transfer out of the devices."""
        return staging.to_host(self.segments, self.devices, layouts=layouts, staging=setting)

    def to_device(self, setting: staging.Staging = SMALL) -> Any:
        """The transfer to the devices."""
        return staging.to_device(self.segments, self.devices, staging=setting)

    def check_crcs(self) -> None:
        """The checksums are those of all bytes."""
        expected = [_engine.crc32(content) for content in self.content]
        assert self.segments["crc"].tolist() == expected


def _look(address: int, nbytes: int) -> np.ndarray:
    return host_bytes(address, nbytes)


def _check(case: Case, part: staging.Part, device: HostDevice | None) -> None:
    """What holds of every part."""
    assert len(part.segments) == len(part.rows) > 0
    assert (np.diff(part.rows) == 1).all(), "the order is the caller's"
    for own, row in zip(part.segments, part.rows.tolist(), strict=True):
        theirs = case.segments[row]
        assert own["file"] == theirs["file"]
        if case.devices[row] == 0:
            assert own["address"] == theirs["address"], "memory of the host passes through"
            assert own["nbytes"] == theirs["nbytes"], "memory of the host is not split"
        elif own["nbytes"]:
            assert own["address"] % PAGE == own["offset"] % PAGE
            where = int(own["address"]) - int(theirs["address"])
            assert not 0 <= where < int(theirs["nbytes"]), "the memory is the device's"
            assert int(own["offset"]) >= int(theirs["offset"])
            end = int(own["offset"]) + int(own["nbytes"])
            cut = end < int(theirs["offset"]) + int(theirs["nbytes"])
            assert not cut or end % PAGE == 0
            if device is not None:
                assert not device.busy(int(own["address"]), int(own["nbytes"]))


def _sum(part: staging.Part) -> None:
    """Checksums as the engine computes them; one by one, for there may be gaps between them."""
    odd = {layout[0]: layout[1:] for layout in part.layouts}
    for i in range(len(part.segments)):
        layouts = [(0, *odd[i])] if i in odd else []
        alone = part.segments[i : i + 1].copy()
        alone["file"] = 0
        _engine.checksum(alone, layouts=layouts)
        part.segments["crc"][i] = alone["crc"][0]


def _closed(move: Callable[..., T]) -> Callable[..., T]:
    """Close the transfer whatever happens meanwhile."""

    @functools.wraps(move)
    def closing(case: Case, parts: Any, device: HostDevice | None = None) -> T:
        with contextlib.closing(parts):
            return move(case, parts, device)

    return closing


@_closed
def drain(case: Case, parts: Any, device: HostDevice | None = None) -> list[bytes]:
    """What the engine would write, segment by segment; the checksums are joined."""
    found = [b""] * len(case)
    for part in parts:
        _check(case, part, device)
        _sum(part)
        odd = {layout[0]: layout for layout in part.layouts}
        for i, row in enumerate(part.rows.tolist()):
            if i not in odd:
                own = part.segments[i]
                found[row] += _look(int(own["address"]), int(own["nbytes"])).tobytes()
        part.join(case.segments)
    return found


@_closed
def fill(case: Case, parts: Any, device: HostDevice | None = None) -> None:
    """What the engine would read into parts."""
    at = [0] * len(case)
    for part in parts:
        _check(case, part, device)
        for own, row in zip(part.segments, part.rows.tolist(), strict=True):
            nbytes = int(own["nbytes"])
            _look(int(own["address"]), nbytes)[:] = case.content[row][at[row] : at[row] + nbytes]
            at[row] += nbytes
        _sum(part)
        part.join(case.segments)
    assert at == [len(content) for content in case.content]
