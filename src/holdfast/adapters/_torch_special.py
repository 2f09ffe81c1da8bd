"""Tensors of PyTorch that are more than strided memory: sparse, quantized, nested, meta, wrapped.

The arguments are those that a file has; the tensors among them are made and filled already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ._rules import Making, UnsafeRequestError, integers, span

__all__ = ["dense", "from_cpu", "from_numpy", "meta", "nested", "quantized", "sparse", "wrapper"]

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})

#: Elements of the greatest size, from which on PyTorch could not count the bytes.
_FAR = 1 << 59

#: Storage classes of quantized elements -> dtype and bits of an element.
_QUANTIZED = {
    "QInt8Storage": (torch.qint8, 8),
    "QUInt8Storage": (torch.quint8, 8),
    "QInt32Storage": (torch.qint32, 32),
    "QUInt4x2Storage": (torch.quint4x2, 4),
    "QUInt2x4Storage": (torch.quint2x4, 2),
}


def _count(args: tuple[Any, ...], number: int) -> None:
    if len(args) != number:
        raise TypeError(f"{len(args)} arguments, expected {number}")


def _extents(value: Any, what: str = "a shape") -> tuple[int, ...]:
    """A shape whose product is a number of elements that PyTorch can count."""
    size = integers(value, what)
    count = 1
    for extent in size:
        count *= max(extent, 1)
    if count >= _FAR:
        raise ValueError(f"{what} of more than 2**59 elements")
    return size


def _flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{what} is a {type(value).__name__}, expected a bool")
    return value


def _dtype(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"a {type(value).__name__} for a dtype")
    return value


def _dense(value: Any, what: str, *, ndim: int | None = None, integer: bool = False) -> Any:
    """A strided tensor that has memory for each of its elements."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise TypeError(f"{what}: expected a dense tensor, found a {type(value).__name__}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{what}: {value.dim()} dimensions, expected {ndim}")
    if integer and value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{what}: {value.dtype}, expected integers")
    if value.is_nested or value.is_quantized:
        raise TypeError(f"{what}: expected a plain tensor")
    if value.device.type != "meta" and value.numel() * value.element_size() > _stored(value):
        raise ValueError(f"{what}: more elements than its storage has")
    return value


def _stored(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def dense(args: tuple[Any, ...], _: Making) -> torch.Tensor:
    """``torch._utils._rebuild_tensor`` and its later versions, by the number of arguments.

    Formats make dense tensors; one that is the start of a tensor of a subclass, or of one with
    attributes, is asked for.
    """
    if len(args) not in (4, 6, 7, 8):
        raise TypeError(f"{len(args)} arguments, expected 4 to 8")
    storage = args[0]
    dtype = storage.dtype if isinstance(storage, torch.storage.TypedStorage) else None
    extra = args[6:]
    if extra and isinstance(extra[0], torch.dtype):
        dtype, extra = extra[0], extra[1:]
    if dtype is None:
        raise TypeError(f"a {type(storage).__name__} for a storage")
    held = getattr(storage, "_untyped_storage", storage)
    (offset,) = integers((args[1],), "an offset")
    size, stride = _extents(args[2]), integers(args[3], "strides")
    made = torch.empty(0, dtype=torch.uint8, device=held.device).view(dtype)
    if span(size, stride, offset) * made.element_size() > held.nbytes():
        raise ValueError(f"shape {size} at {offset} ends outside of its storage")
    made.set_(held, offset, size, stride)
    if len(args) > 4:
        _no_hooks(args[5])
        made.requires_grad = _flag(args[4], "requires_grad")
        made._backward_hooks = OrderedDict()
    marks = extra[0] if extra and extra[0] is not None else {}
    if type(marks) is not dict or not all(type(mark) is bool for mark in marks.values()):
        raise TypeError("what is marked of a tensor is no dict of bool")
    if marks.get("conj"):
        made = made.conj()
    return torch._neg_view(made) if marks.get("neg") else made


def _no_hooks(value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and not value):
        raise UnsafeRequestError("a tensor with backward hooks")


# -- sparse ----------------------------------------------------------------------------------------


def sparse(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_sparse_tensor(layout, data)``; the indices are always checked."""
    _count(args, 2)
    layout, data = args
    if type(data) is not tuple:
        raise TypeError("the parts of a sparse tensor are no tuple")
    for part in data[:2]:  # the indices: to check them takes as long as to copy them
        if isinstance(part, torch.Tensor):
            making.copies(part, 8 * part.numel())
    if layout is torch.sparse_coo:
        return _coo(data)
    if isinstance(layout, torch.layout) and layout in _COMPRESSED:
        return _compressed(layout, data)
    raise ValueError("rebuilding a sparse tensor of no sparse layout")


def _unchecked(make: Any, *args: Any, **keywords: Any) -> Any:
    """What `make` makes without checking its arguments again, where it can be told not to."""
    try:
        return make(*args, check_invariants=False, **keywords)
    except TypeError:  # before PyTorch 2.0
        return make(*args, **keywords)


def _coo(data: tuple[Any, ...]) -> torch.Tensor:
    if not 3 <= len(data) <= 4:
        raise ValueError(f"{len(data)} parts, expected 3 or 4")
    indices = _dense(data[0], "indices", ndim=2)
    values = _dense(data[1], "values")
    size = _extents(data[2])
    coalesced = data[3] if len(data) == 4 else None
    if coalesced is not None:
        _flag(coalesced, "whether it is coalesced")
    if indices.dtype is not torch.int64:
        raise TypeError(f"indices: {indices.dtype}, expected int64")
    if values.dim() < 1 or indices.shape[1] != values.shape[0]:
        raise ValueError("as many values as indices are expected")
    if indices.shape[0] + values.dim() - 1 != len(size):
        raise ValueError(f"{len(size)} extents for {indices.shape[0]} + {values.dim() - 1}")
    if tuple(values.shape[1:]) != size[indices.shape[0] :]:
        raise ValueError("values of another shape than the dense extents")
    if not _without_values(indices, values):
        _check_indices(indices, size, bool(coalesced))
    made: torch.Tensor = _unchecked(torch.sparse_coo_tensor, indices, values, size)
    return made._coalesced_(coalesced) if coalesced is not None else made


def _without_values(*parts: torch.Tensor) -> bool:
    """Whether the parts of a sparse tensor are on the device ``"meta"``: all of them or none."""
    bare = [part.is_meta for part in parts]
    if any(bare) and not all(bare):
        raise ValueError("a sparse tensor of which only some parts have values")
    return all(bare)


def _check_indices(indices: torch.Tensor, size: tuple[int, ...], coalesced: bool) -> None:
    """Raise ValueError for indices of a sparse tensor that are outside of it, or out of order."""
    if indices.numel():
        least, most = indices.amin(1).tolist(), indices.amax(1).tolist()
        for low, high, extent in zip(least, most, size, strict=False):
            if low < 0 or high >= extent:
                raise ValueError(f"index {low if low < 0 else high} of an extent of {extent}")
    if coalesced:
        _ascending(indices)


def _ascending(indices: torch.Tensor) -> None:
    """Raise ValueError unless the columns of `indices` ascend, each one once."""
    count = max(indices.shape[1] - 1, 0)
    before = torch.zeros(count, dtype=torch.bool, device=indices.device)
    equal = ~before
    for row in indices:
        before |= equal & (row[:-1] < row[1:])
        equal &= row[:-1] == row[1:]
    if not bool(before.all()):
        raise ValueError("indices that are said to be coalesced and do not ascend")


def _compressed(layout: torch.layout, data: tuple[Any, ...]) -> torch.Tensor:
    _count(data, 4)
    compressed = _dense(data[0], "compressed indices", integer=True)
    plain = _dense(data[1], "plain indices", integer=True)
    values = _dense(data[2], "values")
    size = _extents(data[3])
    if not _without_values(compressed, plain, values):
        check = torch._validate_sparse_compressed_tensor_args
        try:  # asking whether memory is pinned would wake up a GPU
            check(compressed, plain, values, size, layout, check_pinning=False)
        except TypeError:
            check(compressed, plain, values, size, layout)
    made: torch.Tensor = _unchecked(
        torch.sparse_compressed_tensor, compressed, plain, values, size, layout=layout
    )
    return made


# -- nested and quantized --------------------------------------------------------------------------


def nested(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_nested_tensor(buffer, sizes, strides, storage_offsets)``."""
    _count(args, 4)
    buffer = _dense(args[0], "buffer", ndim=1)
    sizes = _dense(args[1], "sizes", ndim=2)
    strides = _dense(args[2], "strides", ndim=2)
    offsets = _dense(args[3], "offsets", ndim=1)
    for part in (sizes, strides, offsets):
        if part.dtype is not torch.int64 or part.is_meta:
            raise TypeError("sizes, strides or offsets that are not int64")
    if not buffer.is_contiguous():
        raise ValueError("a buffer with gaps")
    if sizes.shape != strides.shape or offsets.shape[0] != sizes.shape[0]:
        raise ValueError("as many sizes, strides and offsets are expected")
    making.copies(args[1], 256 * len(sizes))  # each part is looked at
    length = buffer.numel()
    for size, stride, offset in zip(
        sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True
    ):
        extents = _extents(size)
        integers((*stride, offset), "strides and an offset")
        if span(extents, tuple(stride), offset) > length:
            raise ValueError(f"a part of shape {extents} at {offset} ends outside of its buffer")
    made: torch.Tensor = torch._nested_view_from_buffer(
        buffer, sizes.contiguous(), strides.contiguous(), offsets.contiguous()
    )
    return made


def quantized(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_qtensor(storage, offset, size, stride, params, grad, hooks)``."""
    _count(args, 7)
    storage, dtype, bits = _storage(args[0])
    (offset,) = integers((args[1],), "an offset")
    size, stride = _extents(args[2]), integers(args[3], "strides")
    _flag(args[5], "requires_grad")
    _no_hooks(args[6])
    count = 1
    for extent in size:
        count *= extent
    stored = storage.nbytes() * 8 // bits
    if max(count, span(size, stride, offset)) > stored:
        raise ValueError(f"needs {max(count, span(size, stride, offset))} elements of {stored}")
    empty = _quantizer(args[4], size, dtype, making)
    kind: Any = torch.storage.TypedStorage
    typed = kind(wrap_storage=storage, dtype=dtype, _internal=True)
    made: torch.Tensor = empty.set_(typed, offset, size, stride)
    made.requires_grad = args[5]
    made._backward_hooks = OrderedDict()
    return made


def _storage(value: Any) -> tuple[Any, torch.dtype, int]:
    """The bytes of a quantized tensor, and what they are."""
    if isinstance(value, torch.storage.TypedStorage):
        for dtype, bits in _QUANTIZED.values():
            if value.dtype is dtype:
                return value._untyped_storage, dtype, bits
        raise TypeError(f"a storage of {value.dtype} for a quantized tensor")
    if type(value) is tuple and len(value) == 2 and value[1] in _QUANTIZED:
        held = value[0]
        if isinstance(held, torch.storage.TypedStorage):
            held = held._untyped_storage
        elif isinstance(held, torch.Tensor):
            held = held.untyped_storage()
        if isinstance(held, torch.UntypedStorage):
            return held, *_QUANTIZED[value[1]]
    raise TypeError(f"a {type(value).__name__} for a storage")


def _quantizer(
    params: Any, size: tuple[int, ...], dtype: torch.dtype, making: Making
) -> torch.Tensor:
    """A quantized tensor of `size` with the parameters of a file."""
    if type(params) is not tuple or not params:
        raise TypeError("the parameters of a quantizer are no tuple")
    scheme = params[0]
    if scheme is torch.per_tensor_affine and len(params) == 3:
        _, scale, zero = params
        if type(scale) is not float or type(zero) is not int or not -(1 << 31) <= zero < 1 << 31:
            raise TypeError("a scale or a zero point that is no number")
        return torch._empty_affine_quantized(size, scale=scale, zero_point=zero, dtype=dtype)
    floats = scheme is torch.per_channel_affine_float_qparams
    if not (floats or scheme is torch.per_channel_affine) or len(params) != 4:
        raise ValueError("no scheme of quantization that can be read")
    _, scales, zeros, axis = params
    (axis,) = integers((axis,), "an axis")
    if axis >= len(size):
        raise ValueError(f"per_channel axis {axis} out of range for size {size}")
    kinds = (torch.float32, torch.float32) if floats else (torch.float64, torch.int64)
    for numbers in (scales, zeros):
        making.copies(numbers, 16 * size[axis])
    scales = _per_channel(scales, "scales", size[axis], kinds[0])
    zeros = _per_channel(zeros, "zero points", size[axis], kinds[1])
    return torch._empty_per_channel_affine_quantized(
        size, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
    )


def _per_channel(value: Any, what: str, length: int, dtype: torch.dtype) -> torch.Tensor:
    if type(value) is list:
        if not all(type(number) in (int, float) for number in value):
            raise TypeError(f"{what} that are no numbers")
        value = torch.tensor(value, dtype=dtype)
    value = _dense(value, what, ndim=1)
    if value.is_meta or value.shape[0] != length:
        raise ValueError(f"{value.shape[0]} {what} for {length} channels")
    return value  # type: ignore[no-any-return]


# -- without memory, or elsewhere ------------------------------------------------------------------


def meta(args: tuple[Any, ...], _: Making) -> torch.Tensor:
    """``torch._utils._rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)``."""
    _count(args, 4)
    dtype, size, stride = _dtype(args[0]), _extents(args[1]), integers(args[2], "strides")
    if span(size, stride) >= _FAR:
        raise ValueError("strides that reach beyond 2**59 elements")
    return torch.empty_strided(
        size, stride, dtype=dtype, device="meta", requires_grad=_flag(args[3], "requires_grad")
    )


def _location(device: Any, making: Making) -> Any:
    """Where a tensor goes whose device is no business of a storage's."""
    if isinstance(device, str | torch.device):
        text = str(device)
    else:
        raise TypeError(f"a {type(device).__name__} for a device")
    location = making.map_location
    if location is None:
        return torch.device(text)
    if isinstance(location, Mapping):
        return torch.device(location.get(text, text))
    if isinstance(location, str | torch.device):
        return torch.device(location)
    raise ValueError("a callable map_location says nothing of a tensor without a storage")


def from_cpu(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_device_tensor_from_cpu_tensor(data, dtype, device, grad)``."""
    _count(args, 4)
    data = _dense(args[0], "data")
    dtype, grad = _dtype(args[1]), _flag(args[3], "requires_grad")
    if dtype != data.dtype:  # several of them may be one storage: each is counted
        making.grows(data.numel() * dtype.itemsize)
    made: torch.Tensor = data.detach().to(dtype=dtype, device=_location(args[2], making))
    made.requires_grad = grad
    return made


def from_numpy(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_device_tensor_from_numpy(data, dtype, device, grad)``."""
    _count(args, 4)
    data = args[0]
    if type(data) is not np.ndarray or making.pending(data) or data.dtype.hasobject:
        raise TypeError("expected an array of numbers")
    dtype, grad = _dtype(args[1]), _flag(args[3], "requires_grad")
    making.copies(data, data.nbytes)
    making.grows(max(data.size * dtype.itemsize - data.nbytes, 0))
    made = torch.from_numpy(data.copy()).to(dtype=dtype, device=_location(args[2], making))
    made.requires_grad = grad
    return made


def wrapper(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """``torch._utils._rebuild_wrapper_subclass(cls, dtype, size, stride, offset, layout, …)``."""
    _count(args, 8)
    kind, dtype, size, stride, offset, layout, device, grad = args
    if not (isinstance(kind, type) and issubclass(kind, torch.Tensor) and making.trusted(kind)):
        raise UnsafeRequestError("the type of a tensor is no type of tensors that is allowed")
    size, stride = _extents(size), integers(stride, "strides")
    (offset,) = integers((offset,), "an offset")
    if span(size, stride, offset) >= _FAR:
        raise ValueError("strides that reach beyond 2**59 elements")
    if not isinstance(layout, torch.layout):
        raise TypeError(f"a {type(layout).__name__} for a layout")
    made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        kind,
        size,
        strides=stride,
        storage_offset=offset,
        dtype=_dtype(dtype),
        layout=layout,
        device=_location(device, making),
        requires_grad=_flag(grad, "requires_grad"),
    )
    return made
