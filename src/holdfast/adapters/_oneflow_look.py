"""Where OneFlow's tensors lie: each asked for its DLPack capsule, small ones gathered first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oneflow

from ..dtypes import DTYPES
from ._capsules import look

__all__ = ["Place", "places"]

#: Tensors of at most so many bytes are gathered where there are at least so many of one dtype.
_SMALL, _MANY = 16 << 10, 32
#: Bytes that may be gathered in all.
_ROOM = 32 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a tensor lie.

    Attributes
    ----------
    address : int
    strides : tuple of int or None
        In elements; None where they lie in C order.
    owner : object
        What keeps them there: the tensor, or the copy that was made of it.
    """

    address: int
    strides: tuple[int, ...] | None
    owner: object


def places(tensors: Sequence[Any], codes: Sequence[int]) -> list[Place]:
    """Where tensors in host memory lie.

    Parameters
    ----------
    tensors : sequence of oneflow.Tensor
    codes : sequence of int
        Of their dtypes in the table.
    """
    oneflow._oneflow_internal.eager.Sync()
    found: list[Place | None] = [None] * len(tensors)
    groups: dict[int, list[int]] = {}
    room = _ROOM
    for i, (tensor, code) in enumerate(zip(tensors, codes, strict=True)):
        nbytes = tensor.nelement() * DTYPES[code].itemsize
        if nbytes == 0:
            found[i] = Place(0, None, tensor)
        elif nbytes <= _SMALL and nbytes <= room:
            groups.setdefault(code, []).append(i)
            room -= nbytes
    for code, members in groups.items():
        if len(members) >= _MANY:
            gathered = _gather([tensors[i] for i in members], DTYPES[code].itemsize)
            for i, place in zip(members, gathered, strict=True):
                found[i] = place
    return [_look(tensors[i]) if place is None else place for i, place in enumerate(found)]


def _gather(tensors: list[Any], size: int) -> list[Place]:
    """One copy of small tensors of one dtype, end to end."""
    with oneflow.no_grad():
        whole = oneflow.cat([tensor.detach().reshape(-1) for tensor in tensors], dim=0)
    place = _look(whole)
    found = []
    start = place.address
    for tensor in tensors:
        found.append(Place(start, None, place.owner))
        start += tensor.nelement() * size
    return found


def _look(tensor: Any) -> Place:
    """Where one tensor lies."""
    dense = tensor.is_contiguous()
    plain = tensor.detach()
    if tensor.dtype == oneflow.bool:
        # DLPack has bool, OneFlow's capsules have not; its arrays share memory if it is dense.
        array: Any = plain.numpy()
        if dense:
            return Place(array.ctypes.data, None, tensor)
        array = np.ascontiguousarray(array)
        return Place(array.ctypes.data, None, array)
    capsule = oneflow.to_dlpack(plain)
    found = look(capsule)
    strides = None if dense else tuple(found.strides[: found.ndim])
    return Place((found.data or 0) + found.byte_offset, strides, tensor)
