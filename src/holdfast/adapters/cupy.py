"""CuPy arrays, which are in the memory of a CUDA device.

What a file holds of them is their elements; they are read by whatever else reads the file, and come
back on the current device, or on the one that ``map_location`` names. Nothing here waits for a
stream: whoever copies the memory of a described array waits for that which CuPy computes on.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import cupy
import numpy as np

from ..dtypes import BY_NUMPY, DTYPES, DType
from ..tree import Codec
from ..views import (
    CONJUGATE,
    DENSE,
    NEGATIVE,
    SWAPPED,
    VIEW,
    TensorBatch,
    TensorView,
    device_code,
    device_of,
)
from ._dense_storages import DenseStorages
from .base import dtypes_of, refusal, vet_row
from .numpy import ADAPTER as NUMPY

__all__ = ["ADAPTER", "CupyAdapter"]

_CUDA, _ROCM = 2, 10  # DLPack's device types
_DEVICE = re.compile(r"(?:cuda|gpu)(?::([0-9]{1,4}))?")


class CupyAdapter:
    """CuPy, as the rest of the library sees it (:class:`holdfast.adapters.base.Adapter`).

    There are no kinds: arrays of CuPy are their elements.
    """

    name = "cupy"
    plain_types: frozenset[type] = frozenset({cupy.ndarray})
    codecs: tuple[Codec, ...] = ()

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # dtypes that arrays can have, by code of the table

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is an array, of any type."""
        return isinstance(obj, cupy.ndarray)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of arrays where they lie. See :meth:`Adapter.describe`.

        Nothing is copied but from devices of ROCm, whose memory only CuPy can copy.
        """
        if cupy.cuda.runtime.is_hip:
            for array, name in zip(tensors, names, strict=True):
                _row(array, name)
            return NUMPY.describe([array.get() for array in tensors], names)[0], {}
        views = np.zeros(len(tensors), VIEW)
        devices = np.zeros(len(tensors), np.int32)
        dims: list[int] = []
        strides: list[int] = []
        for i, array in enumerate(tensors):
            row = _row(array, names[i])
            shape = array.shape
            flags = DENSE if array.flags.c_contiguous or 0 in shape else 0
            if not array.dtype.isnative:
                flags |= SWAPPED
            memory = array.data
            views[i] = (memory.ptr, row.nbytes(shape), len(dims), row.code, len(shape), flags)
            devices[i] = device_code(_CUDA, memory.device_id)
            dims.extend(shape)
            strides.extend(array.strides)
        dense = bool((views["flags"] & DENSE).all())
        steps = None if dense else np.array(strides, np.int64)
        batch = TensorBatch(views, np.array(dims, np.int64), list(tensors), steps, devices=devices)
        return batch, {}

    def storages(self, *, legacy: bool = False) -> DenseStorages:  # noqa: ARG002
        """A new collection of arrays, each a storage. See :meth:`Adapter.storages`."""
        return DenseStorages(self, lambda array: _row(array, "x"))

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:  # noqa: ARG002
        """Arrays over the memory of a batch. See :meth:`Adapter.wrap`.

        Memory of a device is not copied. That of the host is, to the current device: there are no
        arrays of CuPy in it.
        """
        for row in dtypes_of(batch):
            self._dtype(row)
        arrays: list[Any] = [None] * len(batch)
        host = []
        for i, nbytes in enumerate(batch.views["nbytes"].tolist()):
            view = batch[i]
            if view.owner.device:  # type: ignore[attr-defined]
                vet_row(view, nbytes)
                arrays[i] = self._over(view)
            else:
                host.append(i)
        if host:
            try:
                for i, array in zip(host, NUMPY.wrap(batch.take(host), {}), strict=True):
                    arrays[i] = cupy.array(array)
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise _unusable(error) from error
        return arrays

    def _over(self, view: TensorView) -> Any:
        """An array over a part of a buffer of a device."""
        buffer: Any = view.owner
        kind, number = device_of(buffer.device)
        if kind != (_ROCM if cupy.cuda.runtime.is_hip else _CUDA):
            raise ValueError(f"device {kind}:{number} is none that CuPy has")
        dtype, nbytes = self._dtype(view.dtype), view.nbytes
        if nbytes == 0:
            with cupy.cuda.Device(number):
                return cupy.ndarray(view.shape, dtype=dtype)
        memory = cupy.cuda.UnownedMemory(view.address, nbytes, buffer, number)
        return cupy.ndarray(view.shape, dtype=dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    def _dtype(self, row: DType) -> Any:
        """The dtype of a row of the table, if arrays of this CuPy can have it."""
        if row.code not in self._made:
            if row.numpy is None:
                raise TypeError(f"{row.name}: CuPy has no such type")
            dtype = NUMPY.dtype_of(row)
            try:
                cupy.ndarray((0,), dtype=dtype)
            except (TypeError, ValueError):
                raise TypeError(
                    f"{row.name}: CuPy {cupy.__version__} has no such type; framework='torch' or "
                    "'jax' has"
                ) from None
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise _unusable(error) from error
            self._made[row.code] = dtype
        return self._made[row.code]

    def relocates(self, locations: Sequence[str], location: Any) -> bool:  # noqa: ARG002
        """Whether `location` says anything; storages of any device go to the current one."""
        if location is not None:
            _number(location)
        return location is not None

    def dataless(self, location: Any) -> bool:  # noqa: ARG002
        """False: arrays have elements."""
        return False

    def wrap_storages(
        self,
        batch: TensorBatch,
        locations: Sequence[str],  # noqa: ARG002
        offsets: Sequence[int],  # noqa: ARG002
        location: Any,
    ) -> list[Any]:
        """Arrays of bytes, on the device. See :meth:`Adapter.wrap_storages`."""
        return [self.place(array, location) for array in self.wrap(batch, {})]

    def handle_of(self, tensor: Any) -> Any:
        """The bytes of an array in C order."""
        return tensor.reshape(-1).view(np.uint8)

    def view(
        self,
        handle: Any,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        flags: int,
        kind: str,  # noqa: ARG002
    ) -> Any:
        """An array over a part of the bytes. See :meth:`Adapter.view`."""
        descr = self._dtype(dtype)
        with handle.device:
            if 0 in shape:
                return cupy.ndarray(shape, dtype=descr)
            reach = dtype.nbytes(shape)
            if strides is not None:
                steps = zip(strides, shape, strict=True)
                reach = sum((n - 1) * step for step, n in steps) + dtype.itemsize
            if offset < 0 or min(strides or (0,)) < 0 or reach > handle.nbytes - offset:
                raise ValueError(
                    f"{reach} bytes at offset {offset} lie outside of a storage of {handle.nbytes}"
                )
            held = handle
            if (handle.data.ptr + offset) % dtype.unit:  # no kernel reads such elements
                held, offset = handle[offset : offset + reach].copy(), 0
            if flags:
                # Of elements that a shape shows many times there is one copy.
                count = reach // dtype.itemsize
                held = cupy.ndarray((count,), dtype=descr, memptr=held.data + offset)
                held, offset = _resolved(held, flags), 0
            return cupy.ndarray(shape, dtype=descr, memptr=held.data + offset, strides=strides)

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """A flat array; of quantized elements, their bytes. See :meth:`Adapter.storage`."""
        found = handle if code < 0 else handle.view(self._dtype(DTYPES[code]))
        return found if part is None else found[part[0] : part[0] + part[1]]

    def destination(self, location: Any) -> int:
        """The code of a CUDA device; of the current one where `location` is None.

        Raises
        ------
        RuntimeError
            There is no such device: said before anything is read.
        """
        if cupy.cuda.runtime.is_hip or not (location is None or _is_device(location)):
            return 0
        try:
            number, count = _number(location), cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise _unusable(error) from error
        if number >= count:
            raise RuntimeError(
                f"map_location={location!r}: CuPy has {count} CUDA devices, no number {number}"
            )
        return device_code(_CUDA, number)

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` on a device, of which nothing but its number counts.

        Parameters
        ----------
        tensor : cupy.ndarray
        location : None, int, str or cupy.cuda.Device
            None: where it is. ``"cuda"`` is the current device, ``"cuda:1"`` the second.
        """
        if location is None:
            return tensor
        number = _number(location)
        if tensor.device.id == number:
            return tensor
        with cupy.cuda.Device(number):
            return cupy.array(tensor)

    def program(self, obj: object) -> str | None:  # noqa: ARG002
        """None: CuPy has no programs."""
        return None

    def named_tensors(self, obj: object) -> dict[str, Any] | None:  # noqa: ARG002
        """None: CuPy has no modules."""
        return None

    def own_loader(self, obj: object, stored: Container[str]) -> None:
        """None: there are no modules."""

    def writable(self, tensor: Any) -> bool:  # noqa: ARG002
        """True: CuPy has no read-only arrays."""
        return True

    def mismatch(self, tensor: Any, name: str) -> str | None:  # noqa: ARG002
        """None: the tensors of a file are such as these."""
        return None

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """A shape as CuPy prints it."""
        return str(shape)

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy with the dtype converted, from whichever device `source` is on."""
        with tensor.device:
            tensor[...] = self.place(source, tensor.device)

    def changing(self, tensors: Sequence[Any]) -> None:
        """Nothing: arrays do not count their changes."""


def _unusable(error: Exception) -> RuntimeError:
    """The error for a device that is not there, or is not to be used."""
    return RuntimeError(
        f"CuPy {cupy.__version__} cannot load to a CUDA device: {error}; framework='numpy' loads "
        "arrays of the host"
    )


def _row(array: Any, name: str) -> DType:
    """The row of the table for the elements of an array; TypeError where it cannot be held."""
    if type(array) is not cupy.ndarray:
        kind = type(array)
        raise refusal(
            name,
            f"a {kind.__module__}.{kind.__qualname__} may carry more than its elements; save "
            "cupy.array(x, subok=False)",
        )
    dtype = array.dtype
    row = BY_NUMPY.get(dtype.name)
    if (
        row is None
        or dtype.itemsize != row.itemsize
        or row.ml_dtypes != (dtype.type.__module__ == "ml_dtypes")
    ):
        raise refusal(name, f"dtype {dtype} is not one that can be saved; save cupy.asnumpy(x)")
    return row


def _resolved(array: Any, flags: int) -> Any:
    """A copy whose elements are conjugated or negated, as the flags say."""
    found = array.conj() if flags & CONJUGATE else array
    return -found if flags & NEGATIVE else found.copy()


def _is_device(location: Any) -> bool:
    if isinstance(location, str):
        return _DEVICE.fullmatch(location) is not None
    return type(location) is int or isinstance(location, cupy.cuda.Device)


def _number(location: Any) -> int:
    """Number of the device that ``map_location`` names; of the current one for None."""
    if isinstance(location, cupy.cuda.Device):
        return int(location.id)
    if type(location) is int and location >= 0:
        return location
    if location is not None and not isinstance(location, str):
        raise TypeError(
            "map_location must be the name of a device, its number or a cupy.cuda.Device, not "
            f"{location!r}"
        )
    found = _DEVICE.fullmatch(location) if location is not None else None
    if location is not None and found is None:
        raise ValueError(
            f"map_location={location!r}: CuPy has arrays on CUDA devices only ('cuda', 'cuda:1'); "
            "framework='numpy' loads arrays of the host"
        )
    return int(found[1]) if found is not None and found[1] else int(cupy.cuda.Device().id)


ADAPTER = CupyAdapter()
