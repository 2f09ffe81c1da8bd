"""OneFlow tensors as storages of their own, for files that keep tensors as views of storages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import oneflow

from ..dtypes import DType
from ..views import TensorBatch, dense_strides
from .base import PARAMETER, REQUIRES_GRAD, Placed

if TYPE_CHECKING:
    from .oneflow import OneFlowAdapter

__all__ = ["OneFlowStorages"]


class OneFlowStorages:
    """Tensors of a program (:class:`.base.Storages`), each written densely in C order.

    Parameters
    ----------
    adapter : OneFlowAdapter
    rows : mapping
        Of OneFlow's dtypes to rows of the table.
    """

    name = "oneflow"

    def __init__(self, adapter: OneFlowAdapter, rows: Mapping[Any, DType]) -> None:
        self._adapter = adapter
        self._rows = rows
        self.keys: list[str] = []
        self._tensors: list[Any] = []

    def add(self, tensor: Any) -> Placed | None:
        """Where a tensor lies: at the beginning of its storage. None for dtypes torch lacks."""
        row = self._rows.get(tensor.dtype)
        if row is None or row.torch is None or tensor.is_global or tensor.is_lazy:
            return None
        key = str(len(self.keys))
        self.keys.append(key)
        self._tensors.append(tensor)
        shape = tuple(tensor.shape)
        flags = REQUIRES_GRAD if tensor.requires_grad else 0
        if type(tensor) is oneflow.nn.Parameter:
            flags |= PARAMETER
        # Torch counts strides as if no extent were 0.
        strides = dense_strides(tuple(max(extent, 1) for extent in shape), 1)
        return key, row.code, row.nbytes(shape), 0, shape, strides, flags

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:  # noqa: ARG002
        """None: nothing but tensors is kept outside."""
        return None

    def batch(self) -> TensorBatch:
        """The tensors so far, in the order of their keys."""
        return self._adapter.describe(self._tensors, [f"storage {key}" for key in self.keys])[0]
