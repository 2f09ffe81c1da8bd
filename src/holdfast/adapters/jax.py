"""JAX arrays, on the CPU or on CUDA devices.

They are immutable, and share the memory of a load where it is aligned as XLA asks (64 bytes).
Elements of 64 bits are made only where JAX has them (``jax_enable_x64``): it would cut them to 32,
and say nothing. Whether the type of an array is weak is not held.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..dtypes import BY_NAME, BY_NUMPY, DTYPES, DType
from ..tree import Codec
from ..views import (
    CONJUGATE,
    DENSE,
    NEGATIVE,
    VIEW,
    TensorBatch,
    TensorView,
    dense_strides,
    device_code,
    device_of,
)
from ._capsules import Exported, look
from ._dense_storages import DenseStorages
from .base import dtypes_of, refusal, vet_row
from .numpy import ADAPTER as NUMPY

__all__ = ["ADAPTER", "JaxAdapter"]

_CUDA, _ROCM = 2, 10  # DLPack's device types
_DEVICE = re.compile(r"(cpu|gpu|cuda|rocm|tpu)(?::([0-9]{1,4}))?")
#: Bytes that a view which repeats its storage may have beyond those of the storage.
_MOST_REPEATED = 1 << 30


def _plain_types() -> frozenset[type]:
    """The type of arrays that have values. To make one to ask would start JAX's devices."""
    try:
        from jax._src.array import ArrayImpl
    except ImportError:
        return frozenset()  # they are found by isinstance, more slowly
    return frozenset({ArrayImpl})


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A storage: in the memory of the host (`array`), or on a device (`memory`).

    `location` is where arrays of it go, None: where they are.
    """

    array: Any
    memory: TensorView | None
    location: Any

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes) if self.memory is None else self.memory.nbytes


class JaxAdapter:
    """JAX, as the rest of the library sees it (:class:`holdfast.adapters.base.Adapter`).

    Kinds are those of the adapter for NumPy, of the types of ``ml_dtypes`` that the table lacks
    (``dtype:ml_dtypes.int4``).
    """

    name = "jax"
    plain_types: frozenset[type] = _plain_types()
    codecs: tuple[Codec, ...] = ()

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is an array, a tracer or a PRNG key."""
        return isinstance(obj, jax.Array)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of arrays, after waiting for them. See :meth:`Adapter.describe`.

        Copied, to the host, are those that DLPack has no word for: of types that the table lacks,
        or on devices that are neither CPUs nor GPUs.
        """
        local = [_vetted(array, names[i]) for i, array in enumerate(tensors)]
        jax.block_until_ready(local)
        found: list[TensorView] = []
        kinds: dict[int, str] = {}
        for i, array in enumerate(local):
            row = _row(array)
            view = None if row is None else _look(array, row, tensors[i])
            if view is None:
                host, kind = NUMPY.describe([np.asarray(array)], [names[i]])
                view = host[0]
                kinds.update(dict.fromkeys([i] if kind else [], kind.get(0, "")))
            found.append(view)
        return _columns(found), kinds

    def storages(self, *, legacy: bool = False) -> DenseStorages:  # noqa: ARG002
        """A new collection of arrays, each a storage. See :meth:`Adapter.storages`."""
        return DenseStorages(self, lambda array: _row(_vetted(array, "x")))

    # -- making ----------------------------------------------------------------------------------

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Arrays over the memory of a batch. See :meth:`Adapter.wrap`.

        Of the host's memory, arrays on the CPU, even where JAX computes on a CUDA device by itself:
        :meth:`destination` says that their bytes should be brought there. Copied is what is not
        aligned.
        """
        for row in dtypes_of(batch):
            _check_row(row)
        arrays: list[Any] = [None] * len(batch)
        host = []
        for i, nbytes in enumerate(batch.views["nbytes"].tolist()):
            view = batch[i]
            if view.owner.device:  # type: ignore[attr-defined]
                vet_row(view, nbytes)
                arrays[i] = _over(view)
            else:
                host.append(i)
        if host:
            own = {}
            for place, i in enumerate(host):
                text = kinds.get(i, "").removeprefix("numpy:")
                if text.startswith("dtype:"):
                    if not text.startswith("dtype:ml_dtypes."):
                        raise ValueError(f"kind {text!r}: JAX has no such elements")
                    own[place] = text
            made = _put(NUMPY.wrap(batch.take(host), own))
            for i, array in zip(host, made, strict=True):
                arrays[i] = array
        return arrays

    def relocates(self, locations: Sequence[str], location: Any) -> bool:  # noqa: ARG002
        """Whether `location` says anything: by themselves storages stay where they were read."""
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
        """Runs of bytes, and where arrays of them go. See :meth:`Adapter.wrap_storages`."""
        handles = []
        for i, nbytes in enumerate(batch.views["nbytes"].tolist()):
            view = batch[i]
            if view.owner.device:  # type: ignore[attr-defined]
                vet_row(view, nbytes)
                handles.append(_Bytes(None, view, location))
            else:
                handles.append(_Bytes(NUMPY.wrap(batch.take([i]), {})[0], None, location))
        return handles

    def handle_of(self, tensor: Any) -> Any:
        """The bytes of an array in C order, in the memory of the host."""
        held = np.ascontiguousarray(np.asarray(tensor)).reshape(-1).view(np.uint8)
        return _Bytes(held, None, None if _on_cpu(tensor) else tensor.sharding)

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
        """An array of a part of a storage. See :meth:`Adapter.view`.

        Strided ones are copied, and of those that repeat their storage every element is.
        """
        _check_row(dtype)
        most = handle.nbytes + _MOST_REPEATED
        if dtype.nbytes(shape) > most:
            raise ValueError(
                f"a view of {dtype.nbytes(shape)} bytes of a storage of {handle.nbytes}: JAX has "
                f"none that repeat it, and holdfast makes no more than {most} bytes of it"
            )
        if handle.memory is None:
            array = NUMPY.view(handle.array, dtype, offset, shape, strides, flags, "")
            return self.place(_put([array])[0], handle.location)
        made = _part(handle.memory, dtype, offset, shape, strides)
        if flags & CONJUGATE:
            made = made.conj()
        return self.place(-made if flags & NEGATIVE else made, handle.location)

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """A flat array; of quantized elements, their bytes. See :meth:`Adapter.storage`."""
        row = DTYPES[code] if code >= 0 else BY_NAME["uint8"]
        made = self.view(handle, row, 0, (handle.nbytes // row.itemsize,), None, 0, "")
        return made if part is None else made[part[0] : part[0] + part[1]]

    def destination(self, location: Any) -> int:
        """The code of a CUDA device; of JAX's default one where `location` is None."""
        try:
            if location is None:
                return _code(_default())
            if isinstance(location, str):
                return _code(_device(location))
        except (RuntimeError, ValueError):
            return 0  # as `place` will say
        return _code(location) if isinstance(location, jax.Device) else 0

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` on a device, or on several.

        Parameters
        ----------
        tensor : jax.Array
        location : None, str, jax.Device or jax.sharding.Sharding
            None: where it is. ``"cpu"``, ``"gpu"`` (or ``"cuda"``), ``"tpu"``, with the number of
            the device among those of this process behind a colon, or the first.
        """
        if location is None:
            return tensor
        if isinstance(location, str):
            location = _device(location)
        if isinstance(location, jax.Device):
            return tensor if tensor.devices() == {location} else jax.device_put(tensor, location)
        if not isinstance(location, jax.sharding.Sharding):
            raise TypeError(
                "map_location must be the name of a device, a jax.Device or a "
                f"jax.sharding.Sharding, not {type(location).__name__}"
            )
        return tensor if tensor.sharding == location else jax.device_put(tensor, location)

    # -- what else is asked ----------------------------------------------------------------------

    def program(self, obj: object) -> str | None:  # noqa: ARG002
        """None: JAX's functions are exported by ``jax.export``."""
        return None

    def named_tensors(self, obj: object) -> dict[str, Any] | None:  # noqa: ARG002
        """None: JAX has no modules."""
        return None

    def own_loader(self, obj: object, stored: Container[str]) -> None:
        """None: there are no modules."""

    def writable(self, tensor: Any) -> bool:  # noqa: ARG002
        """False: JAX's arrays are immutable."""
        return False

    def mismatch(self, tensor: Any, name: str) -> str | None:  # noqa: ARG002
        """None: the tensors of a file are such as these."""
        return None

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """A shape as JAX prints it."""
        return str(shape)

    def fill(self, tensor: Any, source: Any) -> None:  # noqa: ARG002
        """Raise TypeError: nothing can be copied into an immutable array."""
        raise TypeError("JAX's arrays are immutable; load new ones")

    def changing(self, tensors: Sequence[Any]) -> None:
        """Nothing: no array of JAX's is ever written to."""


# -- describing ----------------------------------------------------------------------------------


def _vetted(array: Any, name: str) -> Any:
    """`array`, or the part of it that one device has, if that is all of it; else TypeError."""
    if isinstance(array, jax.core.Tracer):
        raise refusal(
            name,
            "a tracer has no values; save outside of jax.jit, jax.grad and the like",
        )
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise refusal(
            name, "a PRNG key; save jax.random.key_data(x), and jax.random.wrap_key_data it again"
        )
    if type(array) not in JaxAdapter.plain_types and JaxAdapter.plain_types:
        kind = type(array)
        raise refusal(
            name,
            f"a {kind.__module__}.{kind.__qualname__} may carry more than its elements; save "
            "jax.device_get(x)",
        )
    if array.is_deleted():
        raise refusal(name, "it was deleted, or donated to a function")
    devices = len(array.sharding.device_set)
    if devices == 1 and array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    if not array.is_fully_addressable:
        raise refusal(
            name,
            "other processes have parts of it; save "
            "jax.experimental.multihost_utils.process_allgather(x), or a file for each process",
        )
    raise refusal(name, f"sharded over {devices} devices; save jax.device_get(x)")


def _row(array: Any) -> DType | None:
    """The row of the table for the elements of an array, if it has one."""
    return BY_NUMPY.get(array.dtype.name)


def _look(array: Any, row: DType, owner: Any) -> TensorView | None:
    """Where an array lies, owned by `owner`; None where DLPack cannot say it."""
    try:
        capsule = array.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError):
        return None
    found = look(capsule)
    shape = tuple(array.shape)
    dense = dense_strides(shape, row.itemsize)
    strides = None
    if found.strides and 0 not in shape:
        strides = tuple(step * row.itemsize for step in found.strides[: len(shape)])
        if all(a == b for a, b, n in zip(strides, dense, shape, strict=True) if n > 1):
            strides = None
    kind = found.device_type if found.device_type in (_CUDA, _ROCM) else 1
    return TensorView(
        dtype=row,
        shape=shape,
        address=(found.data or 0) + found.byte_offset,
        owner=owner,
        strides=strides,
        device=device_code(kind, found.device_id),
    )


def _columns(found: list[TensorView]) -> TensorBatch:
    """A batch as `describe` returns it: without strides where all are dense."""
    if not found:
        return TensorBatch(np.zeros(0, VIEW), np.zeros(0, np.int64), [])
    batch = TensorBatch.of(found)
    dense = bool((batch.views["flags"] & DENSE).all())
    strides = None if dense else batch.strides
    return TensorBatch(batch.views, batch.dims, batch.owners, strides, devices=batch.devices)


# -- making --------------------------------------------------------------------------------------


def _check_row(row: DType) -> None:
    """Raise TypeError unless JAX, as it is installed and set up, has a type."""
    if row.numpy is None or not hasattr(jax.numpy, row.numpy):
        raise TypeError(f"{row.name}: JAX {jax.__version__} has no such type")
    _check_width(NUMPY.dtype_of(row))


def _check_width(dtype: Any) -> None:
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if narrow != dtype:
        raise TypeError(
            f"{dtype.name}: JAX would cut it to {narrow.name}; "
            "jax.config.update('jax_enable_x64', True) lets it have 64 bits, framework='numpy' "
            "loads arrays of NumPy"
        )


def _put(arrays: list[Any]) -> list[Any]:
    """NumPy's arrays as those of JAX, which nothing writes to any more."""
    for dtype in {array.dtype for array in arrays}:
        _check_width(dtype)
    if not _code(_default()):
        return list(jax.device_put(arrays))
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to have none
        return list(jax.device_put(arrays))
    return list(jax.device_put(arrays, cpu))


def _over(view: TensorView) -> Any:
    """An array over a part of a buffer."""
    buffer: Any = view.owner
    device = device_of(buffer.device)
    row, shape = view.dtype, view.shape
    try:
        return jax.dlpack.from_dlpack(Exported(view.address, row, shape, buffer, device))
    except (BufferError, RuntimeError, TypeError, ValueError):
        # Releases of JAX differ in the types of 8 bits that they know of DLPack.
        if row.bits != 8 or row.name in ("uint8", "int8"):
            raise
    held = Exported(view.address, BY_NAME["uint8"], shape, buffer, device)
    dtype = NUMPY.dtype_of(row)
    found = jax.dlpack.from_dlpack(held)
    if row.name == "bool":
        return found.astype(bool)
    return jax.lax.bitcast_convert_type(found, dtype)


def _part(
    memory: TensorView,
    row: DType,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
) -> Any:
    """An array of a part of a storage on a device; a copy where it is strided."""
    dense = dense_strides(shape, row.itemsize)
    if 0 in shape or strides is None:
        strides = dense
    reach = row.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    reach = 0 if 0 in shape else reach
    if offset < 0 or min(strides, default=0) < 0 or reach > memory.nbytes - offset:
        raise ValueError(
            f"{reach} bytes at offset {offset} lie outside of a storage of {memory.nbytes}"
        )
    start = memory.address + offset
    if strides == dense:
        return _over(TensorView(row, shape, start, memory.owner))
    count = reach // row.itemsize
    if count > np.iinfo(np.int32).max:
        raise ValueError(f"a strided view of {count} elements: JAX indexes with 32 bits")
    flat = _over(TensorView(row, (count,), start, memory.owner))
    index = np.zeros(shape, np.int32)
    for axis, (n, step) in enumerate(zip(shape, strides, strict=True)):
        where = [1] * len(shape)
        where[axis] = n
        index += (np.arange(n) * (step // row.itemsize)).astype(np.int32).reshape(where)
    return flat[index]


# -- devices -------------------------------------------------------------------------------------


def _default() -> Any:
    """The device that JAX puts arrays on where nothing is said."""
    found = jax.config.jax_default_device
    if found is None:
        return jax.local_devices()[0]
    return _device(found) if isinstance(found, str) else found


def _device(text: str) -> Any:
    """The device of this process that a text names; RuntimeError where JAX has no such kind."""
    match = _DEVICE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"map_location={text!r}: expected 'cpu', 'gpu', 'cuda', 'rocm' or 'tpu', with a number "
            "or without"
        )
    found = jax.local_devices(backend=match[1])
    number = int(match[2] or 0)
    if number >= len(found):
        raise ValueError(f"map_location={text!r}: this process has {len(found)} such devices")
    return found[number]


def _code(device: Any) -> int:
    """The code of a CUDA device of this process; 0 for all others."""
    if device.platform not in ("gpu", "cuda") or device.process_index != jax.process_index():
        return 0
    if "rocm" in getattr(device.client, "platform_version", "").lower():
        return 0
    return device_code(_CUDA, device.local_hardware_id)


def _on_cpu(array: Any) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


ADAPTER = JaxAdapter()
