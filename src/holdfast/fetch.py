"""From an index to tensors in memory: mapped in place, or read into memory of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as bind
from typing import TYPE_CHECKING

import numpy as np

from . import _engine, ahead, storages
from ._buffer import Buffer
from .booleans import BOOL
from .dtypes import DTYPES
from .errors import ChecksumError
from .folder import Origin
from .layout import CHECKED, SEGMENT, Index
from .maps import Maps
from .views import DENSE, VIEW, TensorBatch, pick_layouts

if TYPE_CHECKING:
    from .staging import Staging

__all__ = [
    "Destination",
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
#: pages serve it; smaller ones share arenas of about ARENA bytes. Of devices, whose allocators
#: keep account of every tensor that is their own, it is DEVICE_LARGE.
LARGE = 2 << 20
DEVICE_LARGE = 1 << 20
ARENA = 4 << 20
#: In memory of our own every tensor starts at a multiple of this, and in that of a device.
ALIGN = 64
DEVICE_ALIGN = 256

_MASKS = np.array([row.unit - 1 for row in DTYPES], np.uint64)

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Destination:
    """Devices that tensors are read to.

    Attributes
    ----------
    devices : ndarray of int32
        Of each row, or of an index with storages each storage that rows are views of, ascending:
        where it goes (:func:`holdfast.views.device_code`).
    framework : str
        Whose memory it is to be.
    staging : Staging, optional
        How it passes through the memory of the host.
    """

    devices: np.ndarray
    framework: str
    staging: Staging | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing stays in the memory of the host."""
        return bool(self.devices.all())

    def place(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Buffer]]:
        """Memory for runs of so many bytes, one for each of `devices`: see :func:`_place`."""
        from . import staging

        address = np.zeros(len(nbytes), np.uint64)
        owner = np.zeros(len(nbytes), np.int64)
        owners: list[Buffer] = []
        for code in np.unique(self.devices).tolist():
            some = np.flatnonzero(self.devices == code)
            allocate = bind(staging.allocate, code, framework=self.framework) if code else None
            align, large = (DEVICE_ALIGN, DEVICE_LARGE) if code else (ALIGN, LARGE)
            address[some], found, made = _place(nbytes[some], allocate, align, large)
            owner[some] = found + len(owners)
            owners += made
        return address, owner, owners


def segments_of(index: Index, rows: np.ndarray) -> np.ndarray:
    """Segments for these rows of an index, in the order of the file, without memory yet.

    Returns
    -------
    ndarray of SEGMENT, shape (len(rows),)
        Address 0, which in a read means: compute the checksum only.
    """
    segments, entries = np.zeros(len(rows), SEGMENT), index.some(rows)
    for column in ("offset", "nbytes", "file"):
        segments[column] = entries[column]
    return segments


def map_tensors(
    source: Origin,
    index: Index,
    rows: np.ndarray,
    maps: Maps | None = None,
    *,
    aligned: bool = True,
) -> TensorBatch:
    """Tensors over a private, writable map of their file.

    Those that a foreign writer left misaligned for their element cannot be used in place, and of a
    folder small files are not worth a map: they are read into memory.

    Parameters
    ----------
    rows : ndarray of int64
        Which entries of `index`.
    maps : Maps, optional
        Where there is one already, and where all that is mapped is not known to be used.
    aligned : bool
        Whether the tensors are to be used; False where their bytes alone count.
    """
    if maps is None:
        maps = source.maps(index, rows)
        if len(rows) == len(index):
            ahead.expect_all(maps)
        else:
            ahead.expect(maps, stretches(index, rows))
    if index.storages is not None:
        which = storages.used(index, rows)
        found = storages.map_storages(source, index, which, maps, _place, move, aligned=aligned)
        return storages.view_entries(index, found, rows)
    batch, stray = lay(index, index.some(rows), maps, aligned=aligned)
    if stray.any():
        apart = read_tensors(source, index, rows[stray], verify=False)
        batch.views["address"][stray] = apart.views["address"]
        assert apart.owner is not None
        if batch.owner is None:
            batch.owner = np.zeros(len(rows), np.int64)
        batch.owner[stray] = apart.owner + len(maps.buffers)
        batch.owners = [*maps.buffers, *apart.owners]
    return batch


def lay(
    index: Index, entries: np.ndarray, maps: Maps, *, aligned: bool = True
) -> tuple[TensorBatch, np.ndarray]:
    """Where tensors are in maps of their files; nothing is read.

    Parameters
    ----------
    index : Index
        In which each tensor is its own storage.
    entries : ndarray of ENTRY
        Some of `index`.
    aligned : bool
        As for :func:`map_tensors`.

    Returns
    -------
    batch : TensorBatch
    stray : ndarray of bool
        Which tensors cannot be used where they are: see :func:`map_tensors`.
    """
    batch = _batch(index, entries)
    offset, file = entries["offset"], entries["file"]
    batch.views["address"], batch.owner = maps.place(offset, file)
    batch.owners = list(maps.buffers)
    stray = np.zeros(len(entries), bool)
    if aligned:
        stray = offset & _MASKS[batch.views["dtype"]] != 0
    mapped = maps.has(file)
    if mapped is not None:
        stray |= ~mapped
    return batch, stray


def read_tensors(
    source: Origin,
    index: Index,
    rows: np.ndarray,
    *,
    verify: bool,
    threads: int = 0,
    progress: Progress | None = None,
    to: Destination | None = None,
) -> TensorBatch:
    """Tensors in memory of their own, filled from the file by several threads in one pass.

    Parameters
    ----------
    to : Destination, optional
        The memory of devices; by default that of the host.

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
            place=_place if to is None else to.place,
            move=move if to is None else _move_to(to, storages.booleans(index, rows)),
            threads=threads,
            progress=progress,
        )
        return storages.view_entries(index, found, rows)
    batch = _batch(index, index.some(rows))
    nbytes = batch.views["nbytes"].astype(np.int64)
    place = _place if to is None else to.place
    batch.views["address"], batch.owner, batch.owners = place(nbytes)
    segments = segments_of(index, rows)
    segments["address"] = batch.views["address"]
    bring = move if to is None else _move_to(to, batch.views["dtype"] == BOOL)
    bring(source, segments, verify=verify, threads=threads, progress=progress)
    if verify:
        check(source.name, index, rows, segments)
    return batch


def _zeros(nbytes: int) -> Buffer:
    """Memory in which there is nothing: what an earlier buffer left there is let go of."""
    buffer = _engine.allocate(nbytes)
    _engine.drop(buffer, 0, nbytes)
    return buffer


def blank_tensors(index: Index, rows: np.ndarray) -> TensorBatch:
    """Tensors in fresh memory, for where nobody wants to know what is in the file: zeros."""
    if index.storages is not None:
        place = bind(_place, allocate=_zeros)
        found = storages.blank(index, storages.used(index, rows), place)
        return storages.view_entries(index, found, rows)
    batch = _batch(index, index.some(rows))
    nbytes = batch.views["nbytes"].astype(np.int64)
    batch.views["address"], batch.owner, batch.owners = _place(nbytes, _zeros)
    return batch


def checkable(index: Index) -> bool:
    """Whether the file has a checksum for any tensor."""
    if index.storages is not None:
        return bool((index.storages["flags"] & CHECKED).any())
    return index.crcs is not None and (index.checked is None or bool(index.checked.any()))


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
    source: Origin, index: Index, row: int, first: int, shape: tuple[int, ...]
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
    part = Index(index.names, entries, np.array(shape, np.int64), {}, files=index.files)
    return read_tensors(source, part, np.zeros(1, np.int64), verify=False)


def move(
    source: Origin,
    segments: np.ndarray,
    *,
    layouts: Sequence[_engine.Layout] | None = None,
    verify: bool,
    threads: int = 0,
    progress: Progress | None = None,
    devices: np.ndarray | None = None,
    booleans: np.ndarray | None = None,
    staging: Staging | None = None,
) -> None:
    """Read `segments`, which may come in any order; their checksums are filled in with `verify`.

    Parameters
    ----------
    layouts : sequence of tuple, optional
        Of memory of the host that is not simply dense; together with `devices` there is none.
    devices : ndarray of int32, optional
        Where the memory of each segment is; by default all of it is the host's. Others than the
        host's pass through it as `staging` says. The source is repeatable then.
    booleans : ndarray of bool, optional
        With `devices`, which segments are elements of type bool: they are made 0 or 1 on the way
        (:mod:`holdfast.booleans`).
    """
    order = _order(segments)
    work = segments if order is None else np.ascontiguousarray(segments[order])
    if order is not None and layouts:
        layouts = pick_layouts(layouts, order)
    if devices is None:
        source.move(
            work,
            layouts=layouts,
            checksum=verify,
            fill=_engine.FILL_AGAIN if ahead.has_room(work) else _engine.FILL_NEVER,
            threads=threads,
            progress=progress,
        )
    else:
        assert not layouts
        from .marks import Load
        from .staged import move_staged

        load = Load(source, work)
        move_staged(
            source,
            work,
            devices if order is None else devices[order],
            booleans if booleans is None or order is None else booleans[order],
            staging,
            verify=verify,
            fill=load.fill,
            threads=threads,
            progress=progress,
        )
        load.done()
    if order is not None:
        segments["crc"][order] = work["crc"]


def _move_to(to: Destination, booleans: np.ndarray) -> Callable[..., None]:
    """:func:`move`, to these devices."""
    return bind(move, devices=to.devices, booleans=booleans, staging=to.staging)


def _order(segments: np.ndarray) -> np.ndarray | None:
    """Positions of segments in the order of their files; None where they are in it."""
    offset, file = segments["offset"], segments["file"]
    if bool((file[1:] == file[:-1]).all()):
        if bool((offset[1:] >= offset[:-1]).all()):
            return None
        return np.argsort(offset, kind="stable")
    ahead = (file[1:] > file[:-1]) | ((file[1:] == file[:-1]) & (offset[1:] >= offset[:-1]))
    return None if bool(ahead.all()) else np.lexsort((offset, file))


def verify_rows(
    source: Origin,
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
    has = np.ones(len(rows), bool) if index.checked is None else index.checked[rows]
    return has, index.crcs[rows]


def mismatch(name: str, index: Index, row: int, found: int) -> str:
    """The message for one tensor whose checksum is wrong."""
    entry = index.entries[row]
    expected = int(expected_crcs(index, np.array([row]))[1][0])
    file = index.file(name, int(entry["file"]))
    return (
        f"{file}: tensor {index.names.tolist()[row]!r}: the {int(entry['nbytes'])} bytes at offset "
        f"{int(entry['offset'])} are damaged: expected CRC-32 {expected:08x}, "
        f"found {found:08x}"
    )


def _batch(index: Index, entries: np.ndarray) -> TensorBatch:
    """Columns of these entries, their addresses still to be filled in."""
    views = np.zeros(len(entries), VIEW)
    for column in ("nbytes", "dims", "dtype", "ndim"):
        views[column] = entries[column]
    views["flags"] = DENSE
    return TensorBatch(views=views, dims=index.dims, owners=[])


def _place(
    nbytes: np.ndarray,
    allocate: Callable[[int], Buffer] | None = None,
    align: int = ALIGN,
    large: int = LARGE,
) -> tuple[np.ndarray, np.ndarray, list[Buffer]]:
    """Memory for runs of so many bytes: of its own for a large one, else a place in an arena.

    Returns
    -------
    address : ndarray of uint64
    owner : ndarray of int64
        Index in `owners` for each run.
    owners : list of Buffer
    """
    allocate = allocate or _engine.allocate
    address = np.zeros(len(nbytes), np.uint64)
    owner = np.zeros(len(nbytes), np.int64)
    owners: list[Buffer] = []
    if len(nbytes) == 1:  # without the dozen array operations that many are worth
        owners = [allocate(int(nbytes[0]))]
        address[0] = owners[0].address
        return address, owner, owners
    for row in np.flatnonzero(nbytes >= large).tolist():
        buffer = allocate(int(nbytes[row]))
        address[row] = buffer.address
        owner[row] = len(owners)
        owners.append(buffer)

    small = np.flatnonzero(nbytes < large)
    spans = (nbytes[small] + (align - 1)) & -align
    starts = np.cumsum(spans) - spans
    # A tensor goes to the arena in which it starts; the last of one may pass its end by < large.
    edges = [*np.flatnonzero(np.diff(starts // ARENA, prepend=-1)).tolist(), len(small)]
    for begin, stop in itertools.pairwise(edges):
        first = int(starts[begin])
        buffer = allocate(int(starts[stop - 1] + spans[stop - 1]) - first)
        rows = small[begin:stop]
        base = np.uint64(buffer.address)
        address[rows] = (starts[begin:stop] - first).astype(np.uint64) + base
        owner[rows] = len(owners)
        owners.append(buffer)
    return address, owner, owners
