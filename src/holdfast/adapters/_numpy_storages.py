"""NumPy arrays as storages of their own, for files that keep tensors as views of storages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..dtypes import BY_NUMPY, DTYPES
from ..views import TensorBatch
from ._numpy import address
from .base import Placed

if TYPE_CHECKING:
    from .numpy import NumpyAdapter

__all__ = ["NumpyStorages"]


class NumpyStorages:
    """Arrays of a program (:class:`.base.Storages`), each written densely in C order.

    Two arrays that are one memory, with equal shapes and strides, are views of one storage; of
    those that merely overlap, each has its own.
    """

    name = "numpy"

    def __init__(self, adapter: NumpyAdapter) -> None:
        self._adapter = adapter
        self.keys: list[str] = []
        self._arrays: list[Any] = []
        self._known: dict[tuple[object, ...], str] = {}
        self._codes: dict[int, int | None] = {}  # by NumPy's number of the type

    def add(self, array: Any) -> Placed | None:
        """Where an array lies: at the beginning of its storage. None for dtypes torch lacks."""
        dtype = array.dtype
        number = dtype.num
        code = self._codes.get(number, -1)
        if code == -1:
            code = self._codes[number] = _code(dtype)
        if code is None:
            return None
        shape = array.shape
        nbytes = array.nbytes
        # Arrays without elements have no address that would mean them.
        start = address(array) if nbytes else -1 - len(self.keys)
        place = (start, number, dtype.isnative, shape, array.strides)
        key = self._known.get(place)
        if key is None:
            key = self._known[place] = str(len(self.keys))
            self.keys.append(key)
            self._arrays.append(array)
        return key, code, nbytes, 0, shape, _strides(shape), 0

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:  # noqa: ARG002
        """None: nothing but arrays is kept outside."""
        return None

    def batch(self) -> TensorBatch:
        """The arrays so far, in the order of their keys. Nothing is copied."""
        return self._adapter.describe(self._arrays, [f"storage {key}" for key in self.keys])[0]


def _code(dtype: Any) -> int | None:
    """Code of a dtype, of either byte order, that torch has too."""
    row = BY_NUMPY.get(dtype.name)
    if row is None or row.torch is None or dtype.names is not None or dtype.subdtype is not None:
        return None
    if dtype.itemsize != DTYPES[row.code].itemsize:
        return None
    return row.code if row.ml_dtypes == (dtype.type.__module__ == "ml_dtypes") else None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of C order, as torch counts them: as if no extent were 0."""
    if len(shape) == 1:
        return (1,)
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
