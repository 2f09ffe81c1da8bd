"""Arrays of a device as storages of their own, for files that keep tensors as views of storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dtypes import DType
from ..views import TensorBatch, dense_strides
from .base import Adapter, Placed

__all__ = ["DenseStorages"]


class DenseStorages:
    """Arrays of a program (:class:`.base.Storages`), each written densely in C order.

    Parameters
    ----------
    adapter : Adapter
    row_of : callable
        The row of the dtype table for an array; None for what has to be refused.
    """

    def __init__(self, adapter: Adapter, row_of: Callable[[Any], DType | None]) -> None:
        self.name = adapter.name
        self._adapter = adapter
        self._row_of = row_of
        self.keys: list[str] = []
        self._arrays: list[Any] = []

    def add(self, array: Any) -> Placed:
        """Where an array lies: at the beginning of its storage.

        Raises
        ------
        TypeError
            The array cannot be held, or torch has no such elements. (The pickle of the framework's
            own would say it in names that no safe reader allows.)
        """
        row = self._row_of(array)
        if row is None or row.torch is None:
            raise TypeError(
                f"{self.name} array of {array.dtype}: torch's files cannot hold it; save it to a "
                ".safetensors file"
            )
        key = str(len(self.keys))
        self.keys.append(key)
        self._arrays.append(array)
        shape = tuple(array.shape)
        # Torch counts strides as if no extent were 0.
        strides = dense_strides(tuple(max(extent, 1) for extent in shape), 1)
        return key, row.code, row.nbytes(shape), 0, shape, strides, 0

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:  # noqa: ARG002
        """None: nothing but arrays is kept outside."""
        return None

    def batch(self) -> TensorBatch:
        """The arrays so far, in the order of their keys."""
        return self._adapter.describe(self._arrays, [f"storage {key}" for key in self.keys])[0]
