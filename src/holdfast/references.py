"""Entries of a file in the place of their tensors: what is saved where a file is converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import adapters
from .adapters.base import PARAMETER, REQUIRES_GRAD, Placed, refusal
from .dtypes import DTYPES
from .layout import Index
from .views import TensorBatch

__all__ = ["Ref", "RefAdapter", "RefStorages", "view_of"]

#: What the kinds of torch's tensors are in the pickle of one.
_FLAGS = {
    "": 0,
    "requires_grad": REQUIRES_GRAD,
    "parameter": PARAMETER | REQUIRES_GRAD,
    "parameter,frozen": PARAMETER,
}


class Ref:
    """An entry of the file that is converted, in the place of its tensor."""

    __slots__ = ("kind", "row")

    def __init__(self, row: int, kind: str) -> None:
        self.row = row
        self.kind = kind


class RefAdapter:
    """The entries of a file as tensors of the framework that saved them.

    Of :class:`holdfast.adapters.base.Adapter` it has what saving asks for.

    Attributes
    ----------
    ref : type
        Of the stand-ins.
    copied : list of int
        The entries of which a pickle has a copy.
    """

    codecs: tuple[Any, ...] = ()

    def __init__(self, name: str | None, index: Index, batch: TensorBatch) -> None:
        self.name = name
        members: dict[str, Any] = {"__slots__": ()}
        if name == "numpy":  # where arrays are no tensors, they are pickled as the arrays they are
            members["__reduce_ex__"] = lambda ref, way: self._array(ref).__reduce_ex__(way)
        self.ref = type("tensor", (Ref,), members)  # as messages call it
        self.plain_types: frozenset[type] = frozenset({self.ref})
        self.copied: list[int] = []
        self._index = index
        self._batch = batch

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` stands for an entry of this file."""
        return type(obj) is self.ref

    def _array(self, ref: Ref) -> Any:
        """The array that an entry of NumPy's stands for."""
        self.copied.append(ref.row)
        kinds = {0: ref.kind} if ref.kind else {}
        return adapters.by_name("numpy").wrap(self._batch.take([ref.row]), kinds)[0]

    def describe(
        self, tensors: Sequence[Ref], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Rows of the batch in which all entries are in memory."""
        rows = np.array([ref.row for ref in tensors], np.int64)
        flags = self._index.flags
        for i in np.flatnonzero(flags[rows]).tolist() if flags is not None else ():
            raise refusal(names[i], "conjugated or negated lazily, which this format cannot say")
        batch = self._batch
        views = np.ascontiguousarray(batch.views[rows])
        kinds = {i: ref.kind for i, ref in enumerate(tensors) if ref.kind}
        return TensorBatch(views, batch.dims, [batch] * len(rows), batch.strides), kinds


class RefStorages:
    """Storages of the file that is converted, as they stand in it.

    Parameters
    ----------
    arrays : bool
        Whether its entries are arrays of NumPy's, which can be pickled by themselves.
    """

    def __init__(self, index: Index, batch: TensorBatch, *, arrays: bool = False) -> None:
        self._as_arrays = arrays
        self.name = index.framework or "torch"
        self._index = index
        self._batch = batch
        self._first: dict[int, int] = {}  # storage -> the first entry that is a view of it
        self._keys: dict[int, str] = {}

    @property
    def keys(self) -> list[str]:
        """In the order in which they were first seen."""
        return list(self._keys.values())

    @property
    def rows(self) -> list[int]:
        """The storage, or where there are none the entry, that each key stands for."""
        return list(self._keys)

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:  # noqa: ARG002
        """None: an entry is a tensor, never a storage by itself."""
        return None

    def add(self, tensor: Ref) -> Placed | None:
        """Where an entry lies in its storage; an entry without one is a storage of its own.

        None for an array whose dtype torch lacks.
        """
        index, row = self._index, tensor.row
        entry = index.entries[row]
        dtype = DTYPES[int(entry["dtype"])]
        if dtype.torch is None or tensor.kind not in _FLAGS:
            if self._as_arrays:
                return None
            raise TypeError(f"{dtype.name} {tensor.kind}".strip() + ": PyTorch has no such type")
        if index.flags is not None and index.flags[row]:
            raise TypeError("a tensor that is conjugated or negated lazily")
        if index.storage is None or index.storages is None:
            own, nbytes = row, int(entry["nbytes"])
        else:
            own = int(index.storage[row])
            nbytes = int(index.storages["nbytes"][own])
        key = self._keys.setdefault(own, str(len(self._keys)))
        if int(index.entries["dtype"][self._first.setdefault(own, row)]) != dtype.code:
            raise RuntimeError(
                f"a storage that is {dtype.name} for one tensor and something else for another"
            )
        return key, dtype.code, nbytes, *view_of(index, row), _FLAGS[tensor.kind]

    def batch(self) -> TensorBatch:
        """The storages in memory, one row each."""
        index, batch = self._index, self._batch
        if index.storages is None or batch.storages is None:
            rows = np.array(list(self._first), np.int64)
            views = np.ascontiguousarray(batch.views[rows])
            return TensorBatch(views, batch.dims, [batch] * len(rows), batch.strides)
        which = list(self._first)
        found = batch.storages.rows(which)
        for i, row in enumerate(self._first.values()):
            code = int(index.entries["dtype"][row])
            found.views["dtype"][i] = code
            found.dims[i] //= DTYPES[code].itemsize
        found.owners = [batch] * len(which)
        found.owner = None
        return found


def view_of(index: Index, row: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where an entry lies in its storage: offset, shape and strides, in elements."""
    entry, size, shape = index.entries[row], index.dtype(row).itemsize, index.shape(row)
    offset, strides = 0, _dense(shape)
    if index.storage is not None and index.storages is not None:
        offset = int(entry["offset"]) - int(index.storages["offset"][int(index.storage[row])])
    if index.strides is not None:
        first = int(entry["dims"])
        strides = tuple((index.strides[first : first + len(shape)] // size).tolist())
    return offset // size, shape, strides


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of C order."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
