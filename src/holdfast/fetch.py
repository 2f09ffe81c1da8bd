"""From an index to tensors in memory: mapped in place, or read into memory of their own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from . import _engine, _engine_py, storages
from ._buffer import Buffer
from .dtypes import DTYPES
from .errors import ChecksumError
from .layout import CHECKED, SEGMENT, Index
from .source import Source
from .views import DENSE, VIEW, TensorBatch

__all__ = [
    "blank_tensors",
    "check",
    "checkable",
    "expected_crcs",
    "map_tensors",
    "mismatch",
    "move",
    "partial",
    "read_part",
    "read_tensors",
    "segments_of",
    "stretches",
    "total",
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
    source: Source,
    index: Index,
    rows: np.ndarray,
    buffer: Buffer | None = None,
    *,
    aligned: bool = True,
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
    aligned : bool
        Whether the tensors are to be used; False where their bytes alone count.
    """
    if buffer is None:
        buffer = source.map(index.end)
        if len(rows) == len(index):
            with contextlib.suppress(OSError):  # a wish: pages come one by one without it
                _engine.populate_cached(buffer, POPULATE_MOST, 2)
    if index.storages is not None:
        which = storages.used(index, rows)
        found = storages.map_storages(source, index, which, buffer, _place, move, aligned=aligned)
        return storages.view_entries(index, found, rows)
    batch = _batch(index, rows)
    batch.views["address"] = index.entries["offset"][rows] + np.uint64(buffer.address)
    batch.owners = [buffer]
    stray = index.entries["offset"][rows] % _UNITS[batch.views["dtype"]] != 0
    if aligned and stray.any():
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
    if index.storages is not None:
        found = storages.read_storages(
            source,
            index,
            storages.used(index, rows),
            verify=verify,
            place=_place,
            move=move,
            threads=threads,
            progress=progress,
        )
        return storages.view_entries(index, found, rows)
    batch = blank_tensors(index, rows)
    segments = segments_of(index, rows)
    segments["address"] = batch.views["address"]
    move(source, segments, verify=verify, threads=threads, progress=progress)
    if verify:
        check(source.name, index, rows, segments)
    return batch


def blank_tensors(index: Index, rows: np.ndarray) -> TensorBatch:
    """Tensors in fresh memory, for where nobody wants to know what is in the file: zeros."""
    if index.storages is not None:
        found = storages.blank(index, storages.used(index, rows), _place)
        return storages.view_entries(index, found, rows)
    batch = _batch(index, rows)
    nbytes = batch.views["nbytes"].astype(np.int64)
    batch.views["address"], batch.owner, batch.owners = _place(nbytes)
    return batch


def checkable(index: Index) -> bool:
    """Whether the file has a checksum for any tensor."""
    if index.storages is not None:
        return bool((index.storages["flags"] & CHECKED).any())
    return index.crcs is not None


def stretches(index: Index, rows: np.ndarray) -> np.ndarray:
    """Segments of the bytes of the file that these entries take, in no order, without memory."""
    if index.storages is not None:
        return storages.segments_of(index, storages.used(index, rows))
    return segments_of(index, rows)


def total(index: Index, rows: np.ndarray) -> int:
    """Bytes of the file that reading these entries takes."""
    return int(stretches(index, rows)["nbytes"].sum())


def partial(index: Index, row: int) -> bool:
    """Whether parts of an entry can be read by themselves: it stands densely, as it is."""
    if index.storages is None or index.storage is None:
        return True
    own = index.storage[[row]]
    flags = index.flags is not None and int(index.flags[row])
    return (
        bool(storages.plain(index, own)[0] and storages.dense(index, np.array([row]))[0])
        and not flags
    )


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
    if index.storages is not None:
        which = storages.used(index, rows)
        found = storages.checksums(source, index, which, move, threads=threads, progress=progress)
        storages.damage(source.name, index, which, found)
        return
    segments = segments_of(index, rows)
    move(source, segments, verify=True, threads=threads, progress=progress)
    check(source.name, index, rows, segments)


def check(name: str, index: Index, rows: np.ndarray, segments: np.ndarray) -> None:
    """Raise ChecksumError for the first of `rows` whose bytes are not those that were written."""
    has, expected = expected_crcs(index, rows)
    bad = np.flatnonzero(has & (segments["crc"] != expected))
    if len(bad):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        first = mismatch(name, index, int(rows[bad[0]]), int(segments["crc"][bad[0]]))
        raise ChecksumError(first + more)


def expected_crcs(index: Index, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For which of these entries the file has a CRC-32 of just their bytes, and what it is."""
    if index.storages is not None:
        own = index.storages[index.storage[rows]]  # type: ignore[index]
        return storages.alone(index, rows) & ((own["flags"] & CHECKED) != 0), own["crc"]
    if index.crcs is None:
        return np.zeros(len(rows), bool), np.zeros(len(rows), np.uint32)
    return np.ones(len(rows), bool), index.crcs[rows]


def mismatch(name: str, index: Index, row: int, found: int) -> str:
    """The message for one tensor whose checksum is wrong."""
    entry = index.entries[row]
    expected = int(expected_crcs(index, np.array([row]))[1][0])
    return (
        f"{name}: tensor {index.names.tolist()[row]!r}: the {int(entry['nbytes'])} bytes at offset "
        f"{int(entry['offset'])} are damaged: expected CRC-32 {expected:08x}, "
        f"found {found:08x}"
    )


def _batch(index: Index, rows: np.ndarray) -> TensorBatch:
    """Columns of these entries, their addresses still to be filled in."""
    views = np.zeros(len(rows), VIEW)
    for column in ("nbytes", "dims", "dtype", "ndim"):
        views[column] = index.entries[column][rows]
    views["flags"] = DENSE
    return TensorBatch(views=views, dims=index.dims, owners=[])


def _place(nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Buffer]]:
    """Memory for runs of so many bytes: of its own for a large one, else a place in an arena.

    Returns
    -------
    address : ndarray of uint64
    owner : ndarray of int64
        Index in `owners` for each run.
    owners : list of Buffer
    """
    address = np.zeros(len(nbytes), np.uint64)
    owner = np.zeros(len(nbytes), np.int64)
    owners: list[Buffer] = []
    if len(nbytes) == 1:  # without the dozen array operations that many are worth
        owners = [_engine.allocate(int(nbytes[0]))]
        address[0] = owners[0].address
        return address, owner, owners
    for row in np.flatnonzero(nbytes >= LARGE).tolist():
        buffer = _engine.allocate(int(nbytes[row]))
        address[row] = buffer.address
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
        address[rows] = (starts[begin:stop] - first).astype(np.uint64) + base
        owner[rows] = len(owners)
        owners.append(buffer)
    return address, owner, owners
