"""Memory of a device, handed out as DLPack capsules for what imports nothing else.

The structures are those of DLPack before version 1, which every importer takes.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..dtypes import DType

__all__ = ["DLTensor", "Exported", "look"]

_NAME = b"dltensor"


class DLTensor(ctypes.Structure):
    """``DLTensor``, with the parts of the structures in it side by side."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = (
        ("tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


#: What keeps the memory of each capsule that is still in use, by the address of its structure.
_alive: dict[int, tuple[Any, ...]] = {}

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
# Of a capsule that is being destroyed: as an address, since no reference to it may be taken.
_dying_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _delete(managed: int) -> None:
    """The deleter of the structures: whoever took the memory has let go of it."""
    _alive.pop(managed, None)


def _destroy(capsule: int) -> None:
    """The destructor of the capsules. One that was taken has another name by then."""
    if _dying_is(capsule, _NAME):
        _alive.pop(_dying_pointer(capsule, _NAME), None)


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)


class Exported:
    """Dense elements in somebody's memory, for ``from_dlpack``.

    Parameters
    ----------
    address : int
        Of the first byte, where the device has it.
    row : DType
        With a DLPack type.
    shape : tuple of int
    owner : object
        What keeps the memory; it is kept until the importer lets go.
    device : tuple of int
        DLPack's device type and the number.
    """

    def __init__(
        self, address: int, row: DType, shape: tuple[int, ...], owner: Any, device: tuple[int, int]
    ) -> None:
        self._address, self._row, self._shape = address, row, shape
        self._owner, self._device = owner, device

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where the memory is."""
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        """A new capsule. Its elements are there already, whatever stream will read them."""
        assert self._row.dlpack is not None
        ndim = len(self._shape)
        # Strides too: not every importer takes NULL for them, as the standard before 1.2 lets it.
        steps, step = [0] * ndim, 1
        for axis in reversed(range(ndim)):
            steps[axis] = step
            step *= self._shape[axis]
        shape = (ctypes.c_int64 * ndim)(*self._shape)
        strides = (ctypes.c_int64 * ndim)(*steps)
        managed = _Managed()
        tensor = managed.tensor
        tensor.data = self._address
        tensor.device_type, tensor.device_id = self._device
        tensor.ndim = ndim
        tensor.code, tensor.bits, tensor.lanes = self._row.dlpack
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p).value
        at = ctypes.addressof(managed)
        _alive[at] = (managed, shape, strides, self._owner)
        return _new(at, _NAME, ctypes.cast(_destructor, ctypes.c_void_p).value)


def look(capsule: Any) -> DLTensor:
    """What a capsule says that nobody has taken; valid as long as the capsule is."""
    found: DLTensor = DLTensor.from_address(_pointer(capsule, _NAME))
    return found
