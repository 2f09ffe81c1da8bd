"""Which bytes go through which block: the plan of a transfer, and its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from .. import _engine
from ..layout import SEGMENT
from ..views import Layout
from .base import PAGE

__all__ = ["Draft", "Part", "Staging", "Work"]


@dataclass(frozen=True, slots=True)
class Staging:
    """How the memory of devices is saved and loaded: through blocks of pinned memory.

    Attributes
    ----------
    block_size : int
        Bytes of a block: a multiple of 4096, at least 65536.
    blocks : int
        How many blocks there are at most. With one, copies and I/O take turns.
    """

    block_size: int = 16 << 20
    blocks: int = 4

    def __post_init__(self) -> None:
        for name in ("block_size", "blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        if self.block_size < 1 << 16 or self.block_size % PAGE:
            raise ValueError(
                f"block_size must be a multiple of {PAGE} and at least {1 << 16}, "
                f"not {self.block_size}"
            )
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")


@dataclass(slots=True)
class Part:
    """What the engine moves in one go, all of it in the memory of the host.

    Attributes
    ----------
    segments : ndarray of SEGMENT
        In the order that the caller's have.
    layouts : list of Layout
        Of those that are the caller's own memory and not dense.
    rows : ndarray of int64
        Which of the caller's segments each is a piece of.
    filled : Future or None
        Of a part that is to go to devices, where other threads are filling it: it goes on its way
        once they have, and the next one can be asked for before.
    """

    segments: np.ndarray
    layouts: list[Layout]
    rows: np.ndarray
    filled: Future[None] | None = None

    def join(self, segments: np.ndarray) -> None:
        """Add the checksums of these pieces to those of the caller's segments.

        Parts have to be joined in the order in which they came.
        """
        own, crcs = self.segments, segments["crc"]
        first = own["offset"] == segments["offset"][self.rows]
        crcs[self.rows[first]] = own["crc"][first]
        for i in np.flatnonzero(~first).tolist():
            row = int(self.rows[i])
            crcs[row] = _engine.crc32_combine(
                int(crcs[row]), int(own["crc"][i]), int(own["nbytes"][i])
            )


@dataclass(slots=True)
class Draft:
    """A part before it has a block.

    Attributes
    ----------
    rows : ndarray of int64
        The caller's segments on devices that it has pieces of.
    into : ndarray of int64
        Where in its segment each piece begins.
    nbytes : ndarray of int64
    place : ndarray of int64
        Where in the block each piece begins.
    begin, end : int
        The caller's segments in the part, those of the host included.
    """

    rows: np.ndarray
    into: np.ndarray
    nbytes: np.ndarray
    place: np.ndarray
    begin: int
    end: int


class Work:
    """The segments of a call, and where their bytes go.

    Bytes on devices stand on a line: end to end, but for as much room as makes each one's
    position congruent to its offset in the file modulo 4096. The line is cut into blocks at
    multiples of 4096.

    Parameters
    ----------
    segments : ndarray of SEGMENT, shape (n,)
    devices : ndarray of int, shape (n,)
        Codes of the devices that they are on; 0 for the host.
    layouts : sequence of Layout
    """

    def __init__(
        self, segments: np.ndarray, devices: np.ndarray, layouts: Sequence[Layout] = ()
    ) -> None:
        if segments.dtype != SEGMENT:
            raise TypeError(f"segments must be rows of SEGMENT, not {segments.dtype}")
        self.devices = np.asarray(devices).astype(np.int64, copy=False)
        if self.devices.shape != segments.shape:
            raise ValueError(f"{len(segments)} segments, {len(self.devices)} devices")
        self.segments = segments
        sizes = segments["nbytes"].astype(np.int64)
        self.rows = np.flatnonzero((self.devices != 0) & (sizes > 0))
        self.sizes = sizes[self.rows]
        self.codes: list[int] = np.unique(self.devices[self.rows]).tolist()
        offsets = segments["offset"][self.rows].astype(np.int64)
        #: Position of each on the line.
        self.line = np.zeros(len(self.rows), np.int64)
        if len(self.rows):
            steps = np.empty(len(self.rows), np.int64)
            steps[0] = offsets[0] % PAGE
            steps[1:] = self.sizes[:-1] + (offsets[1:] - offsets[:-1] - self.sizes[:-1]) % PAGE
            np.cumsum(steps, out=self.line)
        #: Of segments on devices that are not dense: shape, strides and size of an element.
        self.strided: dict[int, tuple[tuple[int, ...], tuple[int, ...], int]] = {}
        self.odd = np.zeros(len(segments), np.bool_)  # which ones those are
        self._layouts: list[Layout] = []
        for layout in sorted(layouts):
            self._sort_out(layout)
        self._at = np.array([layout[0] for layout in self._layouts], np.int64)

    def _sort_out(self, layout: Layout) -> None:
        row, shape, strides, itemsize, swap = layout
        if self.devices[row] == 0:
            self._layouts.append(layout)
            return
        elements = 1
        for extent in shape:
            elements *= extent
        nbytes = int(self.segments["nbytes"][row])
        if swap or elements * itemsize != nbytes:
            what = "elements of swapped bytes" if swap else f"shape {shape} of {itemsize} bytes"
            raise ValueError(f"segment {row}, {nbytes} bytes on a device: {what}")
        if nbytes:
            self.strided[row] = (tuple(shape), tuple(strides), itemsize)
            self.odd[row] = True

    @property
    def nbytes(self) -> int:
        """Bytes on devices."""
        return int(self.sizes.sum())

    @property
    def span(self) -> int:
        """Size of a block that all of them fit in."""
        if not len(self.rows):
            return 0
        end = int(self.line[-1] + self.sizes[-1])
        return -(-end // PAGE) * PAGE

    def drafts(self, block: int) -> Iterator[Draft]:
        """The parts, for blocks of this size. Without segments there is none."""
        total, count = len(self.segments), len(self.rows)
        if count == 0:
            if total:
                none = np.zeros(0, np.int64)
                yield Draft(none, none, none, none, 0, total)
            return
        ends = self.line + self.sizes
        at = done = begin = 0
        while at < count:
            start = int(self.line[at]) + done
            base = start - start % PAGE
            stop = int(np.searchsorted(self.line, base + block))
            here, there = self.line[at:stop].copy(), ends[at:stop].copy()
            here[0] = start
            cut = int(there[-1]) > base + block
            if cut:
                there[-1] = base + block
            rows = self.rows[at:stop]
            end = total if stop == count and not cut else int(rows[-1]) + 1
            yield Draft(
                rows=rows,
                into=here - self.line[at:stop],
                nbytes=there - here,
                place=here - base,
                begin=begin,
                end=end,
            )
            at, done = (stop - 1, base + block - int(self.line[stop - 1])) if cut else (stop, 0)
            begin = end - 1 if cut else end

    def part(self, draft: Draft, address: int) -> Part:
        """The part that has its block at `address`."""
        segments = self.segments[draft.begin : draft.end].copy()
        at = draft.rows - draft.begin
        segments["offset"][at] += draft.into.astype(np.uint64)
        segments["nbytes"][at] = draft.nbytes
        segments["address"][at] = draft.place.astype(np.uint64) + np.uint64(address)
        segments["crc"] = 0
        low, high = np.searchsorted(self._at, (draft.begin, draft.end)).tolist()
        layouts = [(layout[0] - draft.begin, *layout[1:]) for layout in self._layouts[low:high]]
        return Part(segments, layouts, np.arange(draft.begin, draft.end, dtype=np.int64))
