"""From an index to tensors in memory: mapped in place, or read into memory of their own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from . import _engine, _engine_py
from ._buffer import Buffer
from .dtypes import DTYPES
from .errors import ChecksumError
from .layout import SEGMENT, Index
from .source import Source
from .views import DENSE, VIEW, TensorBatch

__all__ = [
    "check",
    "map_tensors",
    "mismatch",
    "move",
    "read_part",
    "read_tensors",
    "segments_of",
    "verify_rows",
]

#: A tensor at least this large gets memory of its own, so that dropping it frees it and huge
#: pages serve it; smaller ones share arenas of at most ARENA bytes.
LARGE = 1 << 20
ARENA = 4 << 20
#: A map of what is in the page cache already, and no larger than this, gets its page tables filled
#: at once by two threads, which takes a quarter less than a fault for every 64 KiB does.
POPULATE_MOST = 4 << 30
#: In memory of our own every tensor starts at a multiple of this.
ALIGN = 64

_UNITS = np.array([row.unit for row in DTYPES], np.uint64)

Progress = Callable[[int], object]


def segments_of(index: Index, rows: np.ndarray) -> np.ndarray:
    """Segments for these rows of an index, in the order of the file, without memory yet.

    Returns
    -------
    ndarray of SEGMENT, shape (len(rows),)
        Address 0, which in a read means: compute the checksum only.
    """
    segments = np.zeros(len(rows), SEGMENT)
    for column in ("offset", "nbytes", "file"):
        segments[column] = index.entries[column][rows]
    return segments


def map_tensors(
    source: Source, index: Index, rows: np.ndarray, buffer: Buffer | None = None
) -> TensorBatch:
    """Tensors over a private, writable map of the file.

    Those that a foreign writer left misaligned for their element cannot be used in place; they
    are read into memory.

    Parameters
    ----------
    rows : ndarray of int64
        Which entries of `index`.
    buffer : Buffer, optional
        The map, where there is one already.
    """
    if buffer is None:
        buffer = _engine.map_file(source.fd, 0, index.end, source.name)
        if len(rows) == len(index):
            with contextlib.suppress(OSError):  # a wish: pages come one by one without it
                _engine.populate_cached(buffer, POPULATE_MOST, 2)
    batch = _batch(index, rows)
    batch.views["address"] = index.entries["offset"][rows] + np.uint64(buffer.address)
    batch.owners = [buffer]
    stray = index.entries["offset"][rows] % _UNITS[batch.views["dtype"]] != 0
    if stray.any():
        repaired = read_tensors(source, index, rows[stray], verify=False)
        batch.views["address"][stray] = repaired.views["address"]
        assert repaired.owner is not None
        batch.owner = np.zeros(len(rows), np.int64)
        batch.owner[stray] = repaired.owner + 1
        batch.owners = [buffer, *repaired.owners]
    return batch


def read_tensors(
    source: Source,
    index: Index,
    rows: np.ndarray,
    *,
    verify: bool,
    threads: int = 0,
    progress: Progress | None = None,
) -> TensorBatch:
    """Tensors in memory of their own, filled from the file by several threads in one pass.

    Raises
    ------
    ChecksumError
        With `verify`, where the bytes of a tensor do not have the checksum in the index.
    FormatError
        The file ends too soon.
    """
    batch = _batch(index, rows)
    _place(batch)
    segments = segments_of(index, rows)
    segments["address"] = batch.views["address"]
    move(source, segments, verify=verify, threads=threads, progress=progress)
    if verify:
        check(source.name, index, rows, segments)
    return batch


def read_part(
    source: Source, index: Index, row: int, first: int, shape: tuple[int, ...]
) -> TensorBatch:
    """Elements of one tensor, read into memory; checksums cannot be checked.

    Parameters
    ----------
    first : int
        In elements, in C order.
    shape : tuple of int
        Of the part, whose elements follow one another in the file.
    """
    dtype = index.dtype(row)
    entries = index.entries[[row]]
    entries["offset"] += dtype.nbytes((first,))
    entries["nbytes"] = dtype.nbytes(shape)
    entries["dims"] = 0
    entries["ndim"] = len(shape)
    part = Index(index.names, entries, np.array(shape, np.int64), {})
    return read_tensors(source, part, np.zeros(1, np.int64), verify=False)


def move(
    source: Source,
    segments: np.ndarray,
    *,
    layouts: Sequence[_engine.Layout] | None = None,
    verify: bool,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Read `segments`, which may come in any order; their checksums are filled in with `verify`."""
    offsets = segments["offset"]
    ordered = len(segments) < 2 or bool((offsets[1:] >= offsets[:-1]).all())
    order = None if ordered else np.argsort(offsets, kind="stable")
    work = segments if order is None else np.ascontiguousarray(segments[order])
    if order is not None and layouts:
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        layouts = [(int(position[layout[0]]), *layout[1:]) for layout in layouts]
    if source.fd >= 0:
        _engine.read(
            [source.fd],
            work,
            layouts=layouts,
            threads=threads,
            checksum=verify,
            progress=progress,
            filenames=[source.name],
        )
    else:
        with source.replay() as stream:
            _engine_py.read_stream(
                stream,
                work,
                layouts=layouts,
                checksum=verify,
                progress=progress,
                name=source.name,
            )
    if order is not None:
        segments["crc"][order] = work["crc"]


def verify_rows(
    source: Source,
    index: Index,
    rows: np.ndarray,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Read these entries for their checksums alone, and raise ChecksumError where one is wrong."""
    segments = segments_of(index, rows)
    move(source, segments, verify=True, threads=threads, progress=progress)
    check(source.name, index, rows, segments)


def check(name: str, index: Index, rows: np.ndarray, segments: np.ndarray) -> None:
    """Raise ChecksumError for the first of `rows` whose bytes are not those that were written."""
    if index.crcs is None:
        return
    bad = np.flatnonzero(segments["crc"] != index.crcs[rows])
    if len(bad):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        first = mismatch(name, index, int(rows[bad[0]]), int(segments["crc"][bad[0]]))
        raise ChecksumError(first + more)


def mismatch(name: str, index: Index, row: int, found: int) -> str:
    """The message for one tensor whose checksum is wrong."""
    assert index.crcs is not None
    entry = index.entries[row]
    return (
        f"{name}: tensor {index.names.tolist()[row]!r}: the {int(entry['nbytes'])} bytes at offset "
        f"{int(entry['offset'])} are damaged: expected CRC-32 {int(index.crcs[row]):08x}, "
        f"found {found:08x}"
    )


def _batch(index: Index, rows: np.ndarray) -> TensorBatch:
    """Columns of these entries, their addresses still to be filled in."""
    views = np.zeros(len(rows), VIEW)
    for column in ("nbytes", "dims", "dtype", "ndim"):
        views[column] = index.entries[column][rows]
    views["flags"] = DENSE
    return TensorBatch(views=views, dims=index.dims, owners=[])


def _place(batch: TensorBatch) -> None:
    """Give every row of `batch` memory: its own if it is large, else a place in an arena."""
    nbytes = batch.views["nbytes"].astype(np.int64)
    owner = np.zeros(len(nbytes), np.int64)
    owners: list[Buffer] = []
    for row in np.flatnonzero(nbytes >= LARGE).tolist():
        buffer = _engine.allocate(int(nbytes[row]))
        batch.views["address"][row] = buffer.address
        owner[row] = len(owners)
        owners.append(buffer)

    small = np.flatnonzero(nbytes < LARGE)
    spans = (nbytes[small] + (ALIGN - 1)) & -ALIGN
    starts = np.cumsum(spans) - spans
    # A tensor goes to the arena in which it starts; the last of one may pass its end by < LARGE.
    edges = [*np.flatnonzero(np.diff(starts // ARENA, prepend=-1)).tolist(), len(small)]
    for begin, stop in itertools.pairwise(edges):
        first = int(starts[begin])
        buffer = _engine.allocate(int(starts[stop - 1] + spans[stop - 1]) - first)
        rows = small[begin:stop]
        base = np.uint64(buffer.address)
        batch.views["address"][rows] = (starts[begin:stop] - first).astype(np.uint64) + base
        owner[rows] = len(owners)
        owners.append(buffer)
    batch.owners = owners
    batch.owner = owner
