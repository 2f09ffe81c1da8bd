"""A stand-in for CuPy whose device memory is the host's: what holdfast's adapter uses, no more.

Arrays are told from NumPy's by their type, and refuse what CuPy's refuse: to be looked at by the
host (``numpy.asarray``), and elements that no kernel knows.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["make"]

_KNOWN = "?bhilqBHILQefdFD"


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        if device_id < 0:
            raise ValueError("this stand-in has nothing to ask for the device of an address")
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset
        self.device_id = mem.device_id

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


class Device:
    current = 0

    def __init__(self, device: int | None = None) -> None:
        self.id = Device.current if device is None else int(device)
        self._before: list[int] = []

    def __enter__(self) -> Device:
        if self.id >= 2:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._before.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *_: object) -> None:
        Device.current = self._before.pop()


class CUDARuntimeError(RuntimeError):
    pass


def _memory(nbytes: int) -> UnownedMemory:
    held = np.zeros(nbytes + 1, np.uint8)
    return UnownedMemory(held.ctypes.data, nbytes, held, Device.current)


class ndarray:
    __array_ufunc__ = None

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None
    ) -> None:
        dtype = np.dtype(dtype)
        if dtype.char not in _KNOWN and not (FAKE.bfloat16 and dtype.name == "bfloat16"):
            raise ValueError(f"Unsupported dtype {dtype}")
        nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        self.data = MemoryPointer(_memory(nbytes), 0) if memptr is None else memptr
        self.shape, self.dtype = tuple(shape), dtype
        memory = np.empty(0, np.uint8)
        # An array over an address: what owns the memory is self.data.mem, which outlives it.
        start = {"data": (self.data.ptr, False), "shape": self.shape, "version": 3}
        start.update(typestr=f"|V{dtype.itemsize}", strides=strides)
        holder = types.SimpleNamespace(__array_interface__=start)
        self._host = np.asarray(holder) if nbytes else memory.view(dtype).reshape(self.shape)
        self._host = self._host.view(dtype) if nbytes else self._host
        self.strides = self._host.strides
        self.flags = types.SimpleNamespace(c_contiguous=self._host.flags.c_contiguous)
        self.nbytes, self.ndim, self.size = nbytes, len(self.shape), self._host.size
        self.device = Device(self.data.device_id)

    def __array__(self, *_: object, **__: object) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def _part(self, host: Any) -> ndarray:
        offset = host.ctypes.data - self._host.ctypes.data if host.size else 0
        return type(self)(host.shape, host.dtype, self.data + offset, host.strides)

    def __getitem__(self, key: Any) -> ndarray:
        return self._part(self._host[key if isinstance(key, tuple) else (key,)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[key] = value._host if isinstance(value, ndarray) else value

    @property
    def T(self) -> ndarray:
        return self._part(self._host.T)

    def reshape(self, *shape: Any) -> ndarray:
        host = self._host.reshape(*shape)
        return self._part(host) if np.shares_memory(host, self._host) else array(host)

    def view(self, dtype: Any) -> ndarray:
        return self._part(self._host.view(dtype))

    def copy(self) -> ndarray:
        return array(self._host)

    def conj(self) -> ndarray:
        return array(self._host.conj())

    def __neg__(self) -> ndarray:
        return array(-self._host)

    def get(self) -> Any:
        return self._host.copy()


def array(obj: Any) -> ndarray:
    host = np.asarray(obj._host if isinstance(obj, ndarray) else obj)
    made = ndarray(host.shape, host.dtype)
    made._host[...] = host
    return made


class _Fake(types.ModuleType):
    """The module; `bfloat16` is whether it is CuPy 14."""

    bfloat16 = True


FAKE = _Fake("cupy")


@contextlib.contextmanager
def _no_devices() -> Iterator[None]:
    before = FAKE.cuda.runtime.getDeviceCount

    def refuse(*_: object) -> Any:
        raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    FAKE.cuda.runtime.getDeviceCount = FAKE.array = refuse
    try:
        yield
    finally:
        FAKE.cuda.runtime.getDeviceCount, FAKE.array = before, array


def make() -> Any:
    """The module ``cupy``: two devices, of CUDA."""
    FAKE.ndarray, FAKE.array, FAKE.asnumpy = ndarray, array, ndarray.get
    FAKE.__version__, FAKE.bfloat16 = "14.0.0", True
    FAKE.no_devices = _no_devices
    runtime = types.SimpleNamespace(
        is_hip=False, getDeviceCount=lambda: 2, CUDARuntimeError=CUDARuntimeError
    )
    FAKE.cuda = types.SimpleNamespace(
        UnownedMemory=UnownedMemory, MemoryPointer=MemoryPointer, Device=Device, runtime=runtime
    )
    return FAKE
