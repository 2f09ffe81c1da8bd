"""The tar that ``torch.save`` wrote before torch 0.2: storages, tensors and the object apart."""

from __future__ import annotations

import math
import reprlib
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..dtypes import DTYPES, DType
from ..errors import FormatError
from ..layout import ENTRY, STORAGE, Index
from . import Read
from ._inert import Global
from ._pickle import read_plain
from ._tar import members
from ._torch_names import STORAGE_TYPES
from ._torch_pickle import Given, build_index, read_object
from ._window import Window

#: It is read from its beginning.
NEEDS_SIZE = False

__all__ = ["index", "sniff"]

#: A row of a table is a pickle of about a hundred bytes. In the table of storages long runs of
#: bytes stand between them; in that of tensors they follow one another.
_FIRST = 1 << 10
_AHEAD = {"storages": 4 << 10, "tensors": 256 << 10, "pickle": 0}

#: More storages, views or tensors than this are refused: each takes a pickle of its own to read.
_MOST = 1 << 20
_MAX_NDIM = 64
_INT64 = 1 << 63

_COUNT = struct.Struct("<q")
#: Number of dimensions, which takes the place of eight bytes.
_NDIM = struct.Struct("<i4x")


@dataclass(slots=True)
class _Storages:
    """The storages of a file, and the views of them, which are storages too."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    #: Key -> row of the whole storage, element of it where this one begins, elements, type.
    known: dict[int, tuple[int, int, int, DType]] = field(default_factory=dict)
    #: Key -> what a persistent id stands for.
    bare: dict[int, Given] = field(default_factory=dict)

    def add(self, key: int, offset: int, numel: int, dtype: DType, location: str) -> None:
        """One more run of bytes of the file."""
        self.bare[key] = (len(self.rows), dtype.code)
        self.rows.append((offset, numel * dtype.itemsize, dtype.code))
        self.locations.append(location)

    def columns(self) -> np.ndarray:
        """Rows of STORAGE."""
        found = np.zeros(len(self.rows), STORAGE)
        for i, column in enumerate(("offset", "nbytes", "dtype")):
            found[column] = [row[i] for row in self.rows]
        return found


@dataclass(slots=True)
class _Tensors:
    """The tensors of a file, as columns of an index, and their keys."""

    keys: dict[int, int] = field(default_factory=dict)
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    storage: list[int] = field(default_factory=list)
    dense: bool = True

    def columns(self) -> np.ndarray:
        """Rows of ENTRY."""
        found = np.zeros(len(self.rows), ENTRY)
        for i, column in enumerate(("offset", "nbytes", "dims", "dtype", "ndim")):
            found[column] = [row[i] for row in self.rows]
        return found


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is a tar; what is in it, :func:`index` finds."""
    return prefix[257:262] == b"ustar"


def index(read: Read, size: int, name: str, *, verify: bool) -> Index:  # noqa: ARG001
    """Find the tensors: read the two tables, and run the object's pickle inertly.

    Parameters
    ----------
    verify : bool
        Changes nothing: this format has no checksums of its data.

    Raises
    ------
    FormatError
        Anything that is not as torch wrote it, or too short.
    """
    whole = Window(read, size, name)
    found = members(whole)
    parts = {}
    for member, ahead in _AHEAD.items():
        if member not in found:
            raise FormatError(
                f"{name}: this is a tar, but not one of torch.save: it has no member {member!r}"
            )
        offset, nbytes = found[member]
        parts[member] = (offset, Window(read, offset + nbytes, name, f"member {member!r}", ahead))

    storages = _read_storages(*parts["storages"])
    tensors = _read_tensors(*parts["tensors"], storages)
    at, window = parts["pickle"]
    pickled = window.grow(
        at,
        lambda data: read_object(
            data,
            name=name,
            where="pickle",
            base=at,
            tensors=tensors.keys,
            storages=storages.bare,
        ),
    )
    pickled.entries = tensors.columns()
    pickled.dims = np.array(tensors.dims, np.int64)
    pickled.strides = np.array(tensors.strides, np.int64)
    pickled.storage = np.array(tensors.storage, np.int64)
    pickled.dense = tensors.dense
    pickled.storages = storages.columns()
    pickled.locations = storages.locations
    end = max(offset + nbytes for offset, nbytes in found.values())
    index = build_index(pickled, end=end)
    index.format = "torch_tar"
    return index


def _plain(window: Window, at: int, what: str) -> tuple[Any, int]:
    """The plain values pickled at `at`, and where their pickle ends."""
    value, end = window.grow(
        at, lambda data: read_plain(data, name=window.name, where=what, base=at), _FIRST
    )
    return value, at + end


def _table(window: Window, at: int, what: str) -> tuple[int, int]:
    """The number of rows of a table, and where they begin."""
    count, end = _plain(window, at, what)
    if type(count) is not int or not 0 <= count <= _MOST:
        raise FormatError(
            f"{window.name}: {what} at offset {at}: expected a number from 0 to {_MOST}, "
            f"found {reprlib.repr(count)}"
        )
    return count, end


def _row(window: Window, at: int, what: str, types: tuple[type, ...]) -> tuple[Any, int]:
    """A tuple of these types, pickled at `at`, and where its pickle ends."""
    row, end = _plain(window, at, what)
    _typed(window, at, what, row, types)
    return row, end


def _typed(window: Window, at: int, what: str, row: object, types: tuple[type, ...]) -> None:
    if type(row) not in (tuple, list) or tuple(map(type, row)) != types:  # type: ignore[call-overload]
        names = ", ".join(kind.__name__ for kind in types)
        raise FormatError(
            f"{window.name}: {what} at offset {at}: expected ({names}), found {reprlib.repr(row)}"
        )


def _read_storages(at: int, window: Window) -> _Storages:
    """The first table: every storage behind a pickle of its key, its device and its class."""
    found = _Storages()
    count, at = _table(window, at, "number of storages")
    for _ in range(count):
        start = at
        (key, location, cls), at = _row(window, at, "storage", (int, str, Global))
        dtype = _dtype(cls)
        where = f"storage {key}"
        if dtype is None or key in found.known:
            expected = "one for each key" if dtype else "a class of storages of torch"
            raise FormatError(
                f"{window.name}: {where} at offset {start}: expected {expected}, "
                f"found {cls.path if dtype is None else 'a second one'}"
            )
        (numel,) = _COUNT.unpack(window.take(at, _COUNT.size, where))
        at += _COUNT.size
        if numel < 0:
            raise FormatError(
                f"{window.name}: {where}: the count of its elements at offset {at - _COUNT.size}: "
                f"expected none or more, found {numel}"
            )
        if not window.reaches(at + numel * dtype.itemsize):
            raise window.short(at, numel * dtype.itemsize, where)
        found.known[key] = (len(found.rows), 0, numel, dtype)
        found.add(key, at, numel, dtype, location)
        at += numel * dtype.itemsize
    _read_views(at, window, found)
    return found


def _dtype(cls: Global) -> DType | None:
    """Element type of a class of storages, on whatever device."""
    if cls.module not in ("torch", "torch.cuda"):
        return None
    code = STORAGE_TYPES.get(cls.name, -1)
    return None if code < 0 else DTYPES[code]


def _read_views(at: int, window: Window, found: _Storages) -> None:
    """The list of views behind the storages: (key, key of the whole, offset, count) each."""
    views, _ = _plain(window, at, "views of storages")
    if type(views) is not list or len(views) > _MOST:
        raise FormatError(
            f"{window.name}: views of storages at offset {at}: expected a list, "
            f"found {reprlib.repr(views)}"
        )
    for view in views:
        _typed(window, at, "view of a storage", view, (int, int, int, int))
        key, root, first, numel = view
        row, start, most, dtype = found.known.get(root, (-1, 0, 0, DTYPES[0]))
        if row < 0 or key in found.known or first < 0 or numel < 0 or first + numel > most:
            raise FormatError(
                f"{window.name}: view {key} of storage {root} at offset {at}: expected a new key, "
                f"and elements {first} to {first + numel} in a storage that is there and has them"
            )
        found.known[key] = (row, start + first, numel, dtype)
        found.bare[key] = (row, dtype.code, (start + first, numel))


def _read_tensors(at: int, window: Window, storages: _Storages) -> _Tensors:
    """The second table: every tensor's key, storage and class in a pickle, and then its shape."""
    found = _Tensors()
    count, at = _table(window, at, "number of tensors")
    for _ in range(count):
        start = at
        (key, where, _cls), at = _row(window, at, "tensor", (int, int, Global))
        text = f"{window.name}: tensor {key} at offset {start}"
        if key in found.keys or key in storages.known:
            raise FormatError(f"{text}: expected a new key, found a second one")
        if where not in storages.known:
            raise FormatError(f"{text}: expected the key of a storage, found {where}")
        (ndim,) = _NDIM.unpack(window.take(at, _NDIM.size, f"tensor {key}"))
        at += _NDIM.size
        if not 0 <= ndim <= _MAX_NDIM:
            raise FormatError(f"{text}: expected 0 to {_MAX_NDIM} dimensions, found {ndim}")
        layout = struct.Struct(f"<{2 * ndim + 1}q")
        numbers = layout.unpack(window.take(at, layout.size, f"tensor {key}"))
        at += layout.size
        found.keys[key] = len(found.rows)
        _place(found, storages.known[where], numbers, text)
    return found


def _place(
    found: _Tensors, storage: tuple[int, int, int, DType], numbers: tuple[int, ...], text: str
) -> None:
    """Add a tensor of these sizes, strides and offset over a storage, if it is inside of that."""
    row, start, numel, dtype = storage
    ndim = len(numbers) // 2
    size, stride, offset = numbers[:ndim], numbers[ndim:-1], numbers[-1]
    if min(numbers) < 0:
        raise FormatError(
            f"{text}: expected sizes, strides and an offset of 0 or more, "
            f"found {size}, {stride} and {offset}"
        )
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and last >= numel:
        raise FormatError(
            f"{text}: sizes {size}, strides {stride} and offset {offset} end at element {last}, "
            f"its storage has {numel}"
        )
    if count >= _INT64 // dtype.itemsize or max(stride, default=0) >= _INT64 // dtype.itemsize:
        raise FormatError(f"{text}: sizes {size} and strides {stride} are too large")
    tight = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        found.dense &= count == 0 or n == 1 or step == tight
        tight *= n
    place = (start + offset if count else 0) * dtype.itemsize
    found.rows.append((place, count * dtype.itemsize, len(found.dims), dtype.code, ndim))
    found.dims.extend(size)
    found.strides.extend(step * dtype.itemsize for step in stride)
    found.storage.append(row)
