"""What the three axes hand each other about tensors in memory.

Checkpoints hold from one to a million tensors, so the pipeline carries them as columns: NumPy
structured arrays of one row for each tensor, which Cython and C read in place. A
:class:`TensorView` is the same thing for one tensor, for code where clarity counts and cost
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dtypes import BY_NAME, DTYPES, DType

__all__ = [
    "CONJUGATE",
    "CUDA",
    "DENSE",
    "NEGATIVE",
    "SWAPPED",
    "VIEW",
    "Layout",
    "Storages",
    "TensorBatch",
    "TensorView",
    "dense_strides",
    "device_code",
    "device_of",
    "elements",
    "pick_layouts",
]

#: One tensor in memory. ``dims`` is the index of its first extent in ``TensorBatch.dims``
#: (and of its first stride in ``TensorBatch.strides``); ``nbytes`` is what it occupies when dense.
VIEW = np.dtype(
    [
        ("address", np.uint64),
        ("nbytes", np.uint64),
        ("dims", np.int64),
        ("dtype", np.int32),
        ("ndim", np.int16),
        ("flags", np.uint16),
    ],
    align=True,
)

#: Position of a segment whose memory is not simply dense, and what ``TensorView.layout`` returns.
Layout = tuple[int, tuple[int, ...], tuple[int, ...], int, int]

#: Flag of :data:`VIEW`: the elements lie in C order without gaps, so strides say nothing more.
DENSE = 1
#: Flag of :data:`VIEW`: the elements have the byte order that the machine does not have.
SWAPPED = 2
#: Flag of :data:`VIEW`: the tensor is the complex conjugate of what is in memory.
CONJUGATE = 4
#: Flag of :data:`VIEW`: the tensor is the negation of what is in memory.
NEGATIVE = 8

#: DLPack's device type of what runs CUDA.
CUDA = 2


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor in memory, described without its framework.

    Attributes
    ----------
    dtype : DType
    shape : tuple of int
        In elements.
    address : int
        Of the element with index zero everywhere. Meaningless where `nbytes` is 0.
    strides : tuple of int or None
        In bytes, negative or zero ones included; None for dense C order.
    owner : object
        What has to stay alive for `address` to stay valid.
    swapped : bool
        Whether the elements have the byte order that the machine does not have.
    device : int
        Where the memory is (:func:`device_code`); 0 for that of the host.
    """

    dtype: DType
    shape: tuple[int, ...]
    address: int
    owner: object = field(compare=False)  # arrays are not compared to a truth value
    strides: tuple[int, ...] | None = None
    swapped: bool = False
    device: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the elements laid out densely."""
        return self.dtype.nbytes(self.shape)

    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int] | None:
        """What the engine has to know of memory that is not simply dense, or None.

        Returns
        -------
        shape, strides, itemsize, swap
            Strides in bytes; `swap` is the unit whose bytes are reversed on the way, or 0.
        """
        if self.strides is None and not self.swapped:
            return None
        itemsize = self.dtype.itemsize
        strides = self.strides or dense_strides(self.shape, itemsize)
        return self.shape, strides, itemsize, self.dtype.unit if self.swapped else 0


@dataclass(slots=True)
class Storages:
    """Runs of memory that tensors are views of, as columns; each owned by a Buffer.

    Attributes
    ----------
    address : ndarray of uint64, shape (n,)
        0 for one that was not wanted.
    nbytes : ndarray of uint64, shape (n,)
    owners : sequence of Buffer
    owner : ndarray of int64, shape (n,)
        Index in `owners`.
    """

    address: np.ndarray
    nbytes: np.ndarray
    owners: Sequence[object]
    owner: np.ndarray

    def rows(self, which: Sequence[int]) -> TensorBatch:
        """Some of them, as dense tensors of bytes."""
        views = np.zeros(len(which), VIEW)
        views["address"] = self.address[which]
        views["nbytes"] = self.nbytes[which]
        views["dims"] = np.arange(len(which))
        views["dtype"] = BY_NAME["uint8"].code
        views["ndim"] = 1
        views["flags"] = DENSE
        dims = self.nbytes[which].astype(np.int64)
        return TensorBatch(views, dims, self.owners, owner=self.owner[which])


@dataclass(slots=True)
class TensorBatch:
    """Many tensors in memory, as columns.

    Attributes
    ----------
    views : ndarray of VIEW, shape (n,)
    dims : ndarray of int64
        The extents of all tensors, end to end.
    strides : ndarray of int64 or None
        Strides in bytes, laid out as `dims`; only rows without the flag ``DENSE`` need theirs.
        None where every row is dense.
    owners : sequence of object
        What keeps the memory alive: for a batch that is *described*, the tensors themselves (or
        the copies made of them); for a batch to be *wrapped*, the :class:`holdfast._buffer.Buffer`
        objects, of which `owner` picks one for each row.
    owner : ndarray of int64 or None
        Index in `owners` for each row; None where all rows share ``owners[0]``.
    storages : Storages or None
        What the rows are views of, where several may be views of one.
    devices : ndarray of int32 or None
        Of a batch that is described, where the memory of each row is (:func:`device_code`); None
        where all of it is the host's. Of one to be wrapped, each Buffer says it.
    """

    views: np.ndarray
    dims: np.ndarray
    owners: Sequence[object]
    strides: np.ndarray | None = None
    owner: np.ndarray | None = field(default=None)
    storages: Storages | None = None
    devices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, i: int) -> TensorView:
        row = self.views[i]
        span = slice(int(row["dims"]), int(row["dims"]) + int(row["ndim"]))
        dense = bool(int(row["flags"]) & DENSE) or self.strides is None
        if self.owner is not None:
            owner = self.owners[int(self.owner[i])]
        else:
            owner = self.owners[i] if len(self.owners) == len(self.views) else self.owners[0]
        return TensorView(
            dtype=DTYPES[int(row["dtype"])],
            shape=tuple(self.dims[span].tolist()),
            address=int(row["address"]),
            owner=owner,
            strides=None if dense else tuple(self.strides[span].tolist()),  # type: ignore[index]
            swapped=bool(int(row["flags"]) & SWAPPED),
            device=0 if self.devices is None else int(self.devices[i]),
        )

    def take(self, rows: Any) -> TensorBatch:
        """Some of the rows, over the same memory.

        Parameters
        ----------
        rows : slice, list or ndarray
        """
        return TensorBatch(
            np.ascontiguousarray(self.views[rows]),
            self.dims,
            self.owners,
            self.strides,
            None if self.owner is None else np.ascontiguousarray(self.owner[rows]),
            self.storages,
            None if self.devices is None else np.ascontiguousarray(self.devices[rows]),
        )

    @classmethod
    def of(cls, views: Sequence[TensorView]) -> TensorBatch:
        """Columns of single views, each with an owner of its own."""
        rows = np.zeros(len(views), VIEW)
        dims: list[int] = []
        strides: list[int] = []
        for i, view in enumerate(views):
            dense = view.strides is None
            rows[i] = (
                view.address,
                view.nbytes,
                len(dims),
                view.dtype.code,
                len(view.shape),
                (DENSE if dense else 0) | (SWAPPED if view.swapped else 0),
            )
            dims.extend(view.shape)
            strides.extend((0,) * len(view.shape) if view.strides is None else view.strides)
        return cls(
            views=rows,
            dims=np.array(dims, np.int64),
            owners=[view.owner for view in views],
            strides=np.array(strides, np.int64),
            owner=np.arange(len(views), dtype=np.int64),
            devices=(
                np.array([view.device for view in views], np.int32)
                if any(view.device for view in views)
                else None
            ),
        )


def pick_layouts(layouts: Sequence[Layout] | None, chosen: np.ndarray) -> list[Layout]:
    """The layouts of some segments, counted among those.

    Parameters
    ----------
    layouts : sequence of tuple or None
        Each the position of a segment, and what ``TensorView.layout`` says of its memory.
    chosen : ndarray of int64
        Positions of the segments, in their new order.
    """
    if not layouts:
        return []
    place = dict(zip(chosen.tolist(), range(len(chosen)), strict=True))
    return sorted((place[layout[0]], *layout[1:]) for layout in layouts if layout[0] in place)


def device_code(kind: int, number: int) -> int:
    """How a device is said in a column: 0 for the memory of the host.

    Parameters
    ----------
    kind : int
        DLPack's device type: 1 for the host, 2 for CUDA.
    number : int
        Which one of its kind.

    Examples
    --------
    >>> device_code(2, 1) == (2 << 16) + 1, device_code(1, 0)
    (True, 0)
    """
    return 0 if kind == 1 else kind << 16 | number


def device_of(code: int) -> tuple[int, int]:
    """DLPack's device type and the number that a code stands for.

    Examples
    --------
    >>> device_of(device_code(2, 1)), device_of(0)
    ((2, 1), (1, 0))
    """
    return (code >> 16, code & 0xFFFF) if code else (1, 0)


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a dense array in C order.

    Examples
    --------
    >>> dense_strides((2, 3, 4), 8)
    (96, 32, 8)
    """
    strides = []
    step = itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class _Memory:
    """Memory of the host as NumPy looks at it."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, view: TensorView, kind: str) -> None:
        self.owner = view.owner
        self.__array_interface__ = {
            "data": (view.address, False),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": kind,
            "version": 3,
        }


def elements(view: TensorView, kind: str) -> np.ndarray:
    """The memory of a tensor, which is the host's and not empty, as an array; nothing is copied.

    Parameters
    ----------
    view : TensorView
        Its owner is kept alive by the array.
    kind : str
        What NumPy is to take its elements for, of the same size: ``"|u1"``, ``"<u2"``, …
    """
    return np.asarray(_Memory(view, kind))
