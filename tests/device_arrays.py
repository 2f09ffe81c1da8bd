"""Arrays in the memory of a device that is none (``staging.HostDevice``), and their adapter.

What they go through on their way to a file and back is what those of CUDA devices go through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from holdfast import adapters, staging
from holdfast._buffer import Buffer
from holdfast.dtypes import BY_NUMPY, DType
from holdfast.staging.host import HostDevice
from holdfast.views import TensorBatch, TensorView, dense_strides, device_code

__all__ = ["CODE", "Adapter", "DeviceArray", "installed", "put"]

#: DLPack's device type for extensions, which nobody else has.
KIND = 12
CODE = device_code(KIND, 0)


class DeviceArray:
    """An array of which only its device knows the elements."""

    def __init__(
        self,
        buffer: Buffer,
        address: int,
        dtype: DType,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.buffer, self.address, self.element = buffer, address, dtype
        self.shape = shape
        self.strides = strides

    @property
    def device(self) -> int:
        return self.buffer.device

    @property
    def T(self) -> DeviceArray:
        """Transposed, over the same memory."""
        strides = self.strides or dense_strides(self.shape, self.element.itemsize)
        return DeviceArray(self.buffer, self.address, self.element, self.shape[::-1], strides[::-1])

    def __getitem__(self, key: Any) -> DeviceArray:
        assert key == (...,), "all of it is all that a test has asked for"
        return self

    def get(self) -> np.ndarray:
        """The elements, on the host."""
        view = _Seen(self)
        return np.array(view) if min(self.shape, default=1) else np.empty(self.shape, _of(self))

    def set(self, values: np.ndarray) -> None:
        """Give it elements."""
        np.asarray(_Seen(self))[...] = values


class _Seen:
    """The memory of an array, as NumPy asks for it."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.__array_interface__ = {
            "data": (array.address, False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": _of(array).str,
            "version": 3,
        }


def _of(array: DeviceArray) -> np.dtype:
    assert array.element.numpy is not None
    return np.dtype(array.element.numpy)


def put(values: np.ndarray, code: int = CODE) -> DeviceArray:
    """An array of a device with these values."""
    values = np.array(values, order="C")
    buffer = staging.allocate(code, values.nbytes, "device")
    made = DeviceArray(buffer, buffer.address, BY_NUMPY[values.dtype.name], values.shape)
    if values.size:
        made.set(values)
    return made


class Adapter:
    """What such arrays are to the library (:class:`holdfast.adapters.base.Adapter`)."""

    name = "device"
    plain_types = frozenset({DeviceArray})
    codecs = ()

    def is_tensor(self, obj: object) -> bool:
        return isinstance(obj, DeviceArray)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        del names
        views = [
            TensorView(t.element, t.shape, t.address, t, t.strides, device=t.device)
            for t in tensors
        ]
        batch = TensorBatch.of(views)
        batch.owner = None
        return batch, {}

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        del kinds
        views = [batch[i] for i in range(len(batch))]
        return [DeviceArray(v.owner, v.address, v.dtype, v.shape) for v in views]  # type: ignore[arg-type]

    def relocates(self, locations: Sequence[str], location: Any) -> bool:
        return any(tag != "cpu" for tag in locations) or location is not None

    def destination(self, location: Any) -> int:
        kind, _, number = str(location).partition(":")
        return device_code(KIND, int(number or 0)) if kind == "device" else 0

    def dataless(self, location: Any) -> bool:
        return False

    def wrap_storages(
        self, batch: TensorBatch, locations: Sequence[str], offsets: Sequence[int], location: Any
    ) -> list[Any]:
        assert not self.relocates(locations, None) or location is not None
        return self.wrap(batch, {})

    def handle_of(self, tensor: Any) -> Any:
        return tensor

    def view(
        self,
        handle: Any,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        flags: int,
        kind: str,
    ) -> Any:
        assert not flags and not kind
        return DeviceArray(handle.buffer, handle.address + offset, dtype, shape, strides)

    def place(self, tensor: Any, location: Any) -> Any:
        code = self.destination(location)
        return tensor if tensor.device == code else put(tensor.get(), code)

    def program(self, obj: object) -> None:
        return None

    def named_tensors(self, obj: object) -> None:
        return None

    def own_loader(self, obj: object, stored: Any) -> None:
        return None

    def writable(self, tensor: Any) -> bool:
        return True

    def mismatch(self, tensor: Any, name: str) -> None:
        return None

    def shape_text(self, shape: tuple[int, ...]) -> str:
        return str(shape)

    def fill(self, tensor: Any, source: Any) -> None:
        tensor.set(source.get())

    def changing(self, tensors: Any) -> None:
        pass


@contextmanager
def installed(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[tuple[HostDevice, HostDevice]]:
    """Two such devices, and the adapter beside those of the library, until the block ends."""
    own = Adapter()
    devices = HostDevice("device:0", **options), HostDevice("device:1", **options)
    real, by_name, available = adapters.loaded, adapters.by_name, adapters.available
    monkeypatch.setattr(adapters, "loaded", lambda: [own, *real()])
    monkeypatch.setattr(adapters, "by_name", lambda n: own if n == "device" else by_name(n))
    monkeypatch.setattr(adapters, "available", lambda n: n == "device" or available(n))
    for number, device in enumerate(devices):
        staging.register(device_code(KIND, number), device)
    try:
        yield devices
    finally:
        for number in range(2):
            staging.unregister(device_code(KIND, number))
        staging.release_pinned()
