"""Storages, the runs of bytes of a file that several tensors may be views of, into memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _engine
from ._buffer import Buffer
from .booleans import BOOL
from .dtypes import BY_NAME, DTYPES
from .errors import ChecksumError, FormatError
from .folder import Origin
from .layout import CHECKED, FOREIGN, SEGMENT, Index
from .maps import Maps
from .views import DENSE, VIEW, Storages, TensorBatch

__all__ = [
    "alone",
    "blank",
    "booleans",
    "checksums",
    "damage",
    "dense",
    "differing",
    "map_storages",
    "plain",
    "read_storages",
    "segments_of",
    "used",
    "view_entries",
]

_UNITS = np.array([row.unit for row in DTYPES], np.uint64)
_UNTYPED = BY_NAME["uint8"].code
_SIZES = np.array([row.itemsize for row in DTYPES], np.int64)

Progress = Callable[[int], object]
#: Memory for runs of so many bytes: address of each, owner of each, and the owners.
Place = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, list[Buffer]]]
Move = Callable[..., None]


def used(index: Index, rows: np.ndarray) -> np.ndarray:
    """The storages that these entries are views of, once each, ascending.

    Of all entries of a pickled object, all storages: it may hold some that are no tensor's.
    """
    assert index.storage is not None
    if index.structure is not None and index.storages is not None and len(rows) == len(index):
        return np.arange(len(index.storages))
    found: np.ndarray = np.unique(index.storage[rows])
    return found


def plain(index: Index, which: np.ndarray, aligned: bool = True) -> np.ndarray:
    """Which of these storages can be used as they stand in the file, or (not `aligned`) copied."""
    assert index.storages is not None
    rows = index.storages[which]
    fits = (rows["offset"] % _units(index, which) == 0) | (not aligned)
    found: np.ndarray = fits & (rows["packed"] == 0) & ((rows["flags"] & FOREIGN) == 0)
    return found


def _units(index: Index, which: np.ndarray) -> np.ndarray:
    """How many bytes of each of these storages are one number: of untyped ones, as tensors say."""
    assert index.storages is not None
    assert index.storage is not None
    dtypes = index.storages["dtype"][which]
    units: np.ndarray = _UNITS[dtypes]
    untyped = np.flatnonzero(dtypes == _UNTYPED)
    if len(untyped) == 1:
        found = _UNITS[index.entries["dtype"][index.storage == which[untyped[0]]]]
        units[untyped] = found.max(initial=1)
    elif len(untyped):
        most = np.ones(len(index.storages), np.uint64)
        np.maximum.at(most, index.storage, _UNITS[index.entries["dtype"]])
        units[untyped] = most[which[untyped]]
    return units


def alone(index: Index, rows: np.ndarray) -> np.ndarray:
    """Which of these entries are all of a storage that no other is a view of, in C order."""
    assert index.storages is not None
    assert index.storage is not None
    if index.users is None:
        index.users = np.bincount(index.storage, minlength=len(index.storages))
    which = index.storage[rows]
    own, entries = index.storages[which], index.entries[rows]
    found: np.ndarray = (
        (index.users[which] == 1)
        & (entries["offset"] == own["offset"])
        & (entries["nbytes"] == own["nbytes"])
        & dense(index, rows)
    )
    return found


def dense(index: Index, rows: np.ndarray) -> np.ndarray:
    """Which of these entries lie in C order without gaps."""
    found = np.ones(len(rows), bool)
    if index.strides is None:
        return found
    entries, dims, strides = index.entries[rows], index.dims, index.strides
    expected = _SIZES[entries["dtype"]].copy()
    ndim = entries["ndim"].astype(np.int64)
    empty = entries["nbytes"] == 0
    # From the last axis to the first, over all entries that have that many axes.
    for axis in range(1, int(ndim.max(initial=0)) + 1):
        some = np.flatnonzero(ndim >= axis)
        at = entries["dims"][some] + ndim[some] - axis
        extent = dims[at]
        found[some] &= (strides[at] == expected[some]) | (extent == 1)
        expected[some] *= np.maximum(extent, 1)
    found |= empty
    return found


def segments_of(index: Index, which: np.ndarray) -> np.ndarray:
    """Segments for these storages as they stand in the file, in its order, without memory yet."""
    assert index.storages is not None
    rows = index.storages[which]
    segments = np.zeros(len(which), SEGMENT)
    segments["offset"] = rows["offset"]
    segments["nbytes"] = np.where(rows["packed"] > 0, rows["packed"], rows["nbytes"])
    segments["file"] = rows["file"]
    return segments


def booleans(index: Index, rows: np.ndarray) -> np.ndarray:
    """Which of the storages that these entries are views of are elements of type bool."""
    assert index.storages is not None
    found: np.ndarray = index.storages["dtype"][used(index, rows)] == BOOL
    return found


def map_storages(
    source: Origin,
    index: Index,
    which: np.ndarray,
    maps: Maps,
    place: Place,
    move: Move,
    *,
    aligned: bool = True,
) -> Storages:
    """Storages over a private, writable map of the file; those unfit for that are read."""
    assert index.storages is not None
    fit = plain(index, which, aligned)
    mapped = maps.has(index.storages["file"][which])
    if mapped is not None:
        fit &= mapped
    storages = _empty(index)
    storages.owners = list(maps.buffers)
    chosen = which[fit]
    rows = index.storages[chosen]
    storages.address[chosen], owner = maps.place(rows["offset"], rows["file"])
    if owner is not None:
        storages.owner[chosen] = owner
    if not fit.all():
        rest = read_storages(source, index, which[~fit], verify=False, place=place, move=move)
        storages.address[which[~fit]] = rest.address[which[~fit]]
        storages.owner[which[~fit]] = rest.owner[which[~fit]] + len(maps.buffers)
        storages.owners = [*maps.buffers, *rest.owners]
    return storages


def read_storages(
    source: Origin,
    index: Index,
    which: np.ndarray,
    *,
    verify: bool,
    place: Place,
    move: Move,
    threads: int = 0,
    progress: Progress | None = None,
) -> Storages:
    """Storages in memory of their own: read in one pass, inflated, their byte order made ours.

    Raises
    ------
    ChecksumError
        With `verify`, where the bytes of one do not have the CRC-32 that the file says.
    FormatError
        The file ends too soon, or what is deflated is damaged.
    """
    assert index.storages is not None
    rows = index.storages[which]
    storages = blank(index, which, place)
    segments = segments_of(index, which)
    packed = rows["packed"] > 0
    segments["address"][~packed] = storages.address[which[~packed]]
    if not packed.all():
        part = segments[~packed]
        move(source, part, verify=verify, threads=threads, progress=progress)
        segments["crc"][~packed] = part["crc"]
    for i in np.flatnonzero(packed).tolist():
        target = _bytes_of(storages, int(which[i]))
        _inflate(source, index, int(which[i]), target)
        segments["crc"][i] = _engine.crc32(target) if verify else 0
    if verify:
        damage(source.name, index, which, segments["crc"])
    units = _units(index, which)
    for i in np.flatnonzero(((rows["flags"] & FOREIGN) != 0) & (units > 1)).tolist():
        if rows["dtype"][i] == _UNTYPED:
            _check_units(source.name, index, int(which[i]))
        target = _bytes_of(storages, int(which[i]))
        target.view(f"u{units[i]}").byteswap(inplace=True)
    return storages


def _check_units(name: str, index: Index, row: int) -> None:
    """Raise FormatError where no one byte order is right for all tensors of a storage."""
    entries = np.flatnonzero(index.storage == row)
    units = _UNITS[index.entries["dtype"][entries]]
    odd = np.flatnonzero(units != units[:1])
    if len(odd):
        names = index.names.tolist()
        first, other = names[entries[0]], names[entries[odd[0]]]
        raise FormatError(
            f"{name}: tensors {first!r} and {other!r}: expected numbers of one size, since they "
            f"are views of the same bytes, in the other byte order; found {int(units[0])} and "
            f"{int(units[odd[0]])} bytes"
        )


def blank(index: Index, which: np.ndarray, place: Place) -> Storages:
    """Storages in fresh memory, with nothing read: zeros."""
    storages = _empty(index)
    nbytes = storages.nbytes[which].astype(np.int64)
    address, owner, owners = place(nbytes)
    storages.address[which], storages.owner[which], storages.owners = address, owner, owners
    return storages


def checksums(
    source: Origin,
    index: Index,
    which: np.ndarray,
    move: Move,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """The CRC-32 of the bytes of these storages, which are read and not kept."""
    assert index.storages is not None
    segments = segments_of(index, which)
    packed = index.storages["packed"][which] > 0
    part = segments[~packed]
    move(source, part, verify=True, threads=threads, progress=progress)
    segments["crc"][~packed] = part["crc"]
    for i in np.flatnonzero(packed).tolist():
        target = np.empty(int(index.storages["nbytes"][which[i]]), np.uint8)
        _inflate(source, index, int(which[i]), target)
        segments["crc"][i] = _engine.crc32(target)
    found: np.ndarray = segments["crc"]
    return found


def damage(name: str, index: Index, which: np.ndarray, found: np.ndarray) -> None:
    """Raise ChecksumError for the first of these storages whose CRC-32 is not what was found."""
    problems = differing(name, index, which, found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ChecksumError(problems[0] + more)


def differing(name: str, index: Index, which: np.ndarray, found: np.ndarray) -> list[str]:
    """Messages for the storages whose CRC-32 is not what was found."""
    assert index.storages is not None
    assert index.storage is not None
    rows = index.storages[which]
    bad = np.flatnonzero(((rows["flags"] & CHECKED) != 0) & (rows["crc"] != found)).tolist()
    names = index.names.tolist() if bad else []
    problems = []
    for i in bad:
        users = np.flatnonzero(index.storage == which[i]).tolist()
        who = f"tensor {names[users[0]]!r}" if users else f"storage {int(which[i])}"
        file = index.file(name, int(rows["file"][i]))
        problems.append(
            f"{file}: {who}: the {int(rows['nbytes'][i])} bytes at offset "
            f"{int(rows['offset'][i])} are damaged: expected CRC-32 {int(rows['crc'][i]):08x}, "
            f"found {int(found[i]):08x}"
        )
    return problems


def view_entries(index: Index, storages: Storages, rows: np.ndarray) -> TensorBatch:
    """Entries as views of the storages, which are in memory."""
    assert index.storages is not None
    assert index.storage is not None
    views, entries = np.zeros(len(rows), VIEW), index.some(rows)
    for column in ("nbytes", "dims", "dtype", "ndim"):
        views[column] = entries[column]
    views["flags"] = np.where(dense(index, rows), DENSE, 0)
    if index.flags is not None:
        views["flags"] |= index.flags[rows]
    own = index.storage[rows]
    inside = entries["offset"] - index.storages["offset"][own]
    views["address"] = storages.address[own] + inside
    return TensorBatch(
        views,
        index.dims,
        storages.owners,
        strides=index.strides,
        owner=storages.owner[own],
        storages=storages,
    )


def _empty(index: Index) -> Storages:
    assert index.storages is not None
    n = len(index.storages)
    return Storages(
        np.zeros(n, np.uint64),
        np.ascontiguousarray(index.storages["nbytes"]),
        [],
        np.zeros(n, np.int64),
    )


def _bytes_of(storages: Storages, row: int) -> np.ndarray:
    """The memory of one storage as an array of bytes."""
    buffer: Any = storages.owners[int(storages.owner[row])]
    start = int(storages.address[row]) - buffer.address
    found: np.ndarray = np.frombuffer(buffer, np.uint8)
    return found[start : start + int(storages.nbytes[row])]


def _inflate(source: Origin, index: Index, row: int, target: np.ndarray) -> None:
    """Inflate one storage to exactly its size; it has no way to take more memory than that."""
    assert index.storages is not None
    at = index.storages[row]
    part = source.at(int(at["file"]))
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    done, offset, left = 0, int(at["offset"]), int(at["packed"])
    skip = int(at["skip"])
    problem = ""
    try:
        while left and not machine.eof:
            data = part.read(offset, min(left, 1 << 20))
            offset, left = offset + len(data), left - len(data)
            while not machine.eof:
                room = max(1, min(skip + len(target) - done, 1 << 20))
                some = machine.decompress(data, room)
                data = machine.unconsumed_tail
                full = len(some) == room  # then more may come of what it has taken in
                skip, some = skip - min(skip, len(some)), some[skip:]
                if len(some) > len(target) - done:
                    problem = "inflates to more"
                    break
                target[done : done + len(some)] = np.frombuffer(some, np.uint8)
                done += len(some)
                if not data and not full:
                    break
            if problem:
                break
    except zlib.error as error:
        problem = str(error)
    if not problem and (skip or done < len(target) or not machine.eof):
        problem = f"inflates to {done} bytes"
    if problem:
        raise FormatError(
            f"{part.name}: deflated storage at offset {int(at['offset'])}: expected "
            f"{len(target)} bytes, {problem}"
        )
