"""What PyTorch's values in a pickle come back as where PyTorch is absent, or not wanted.

Values become plain ones, parameters and tensors with attributes the arrays themselves. What no
array can say (sparse, quantized, nested tensors and their like) is refused, never guessed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

from ..dtypes import BY_TORCH
from ._rules import LackingError, Making, Rule, Table, UnsafeRequestError, integers, span
from .numpy import decode_dtype

__all__ = ["table"]

_UTILS = "torch._utils"
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,3})?")

#: Names of dtypes that the table lacks, and of their older aliases.
_DTYPES = (
    *("float", "double", "half", "short", "int", "long", "cfloat", "cdouble", "chalf"),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)
_LAYOUTS = (
    *("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"),
    *("_mkldnn", "jagged"),
)
_SCHEMES = (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"),
    *("per_channel_symmetric", "per_channel_affine_float_qparams"),
)
_CLASSES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")


@cache
def table() -> Table:
    """What is allowed of PyTorch, made of plain values."""
    made = Table()
    for name in (*BY_TORCH, *_DTYPES, *_LAYOUTS, *_SCHEMES):
        made.value("torch", name, f"torch.{name}")
    # Some releases pickled it as an instance rather than as a call.
    size = Rule("torch.Size", _size, _size)
    made.kind("torch", "Size", size, _size, _size)
    made.function("torch", "device", _device)
    made.function("torch.serialization", "_get_layout", _layout)
    for module, name in (
        ("torch", "Tensor"),
        ("torch._tensor", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.nn", "Parameter"),
        *(("torch", f"{kind}Tensor") for kind in _CLASSES),
    ):
        made.value(module, name, Rule(f"{module}.{name}"))
    parameter = made.names["torch.nn.parameter", "Parameter"]
    made.rules[id(parameter)] = Rule(parameter.name, None, _parameter)
    for version in ("", "_v2", "_v3"):
        made.function(_UTILS, f"_rebuild_tensor{version}", _dense)
    made.function(_UTILS, "_rebuild_parameter", _parameter)
    made.function(_UTILS, "_rebuild_parameter_with_state", _parameter)
    made.function("torch._tensor torch.tensor", "_rebuild_from_type_v2", _from_type)
    made.function(_UTILS, "_rebuild_device_tensor_from_numpy", _from_device)
    made.function(_UTILS, "_rebuild_xla_tensor", _from_device)
    made.function(_UTILS, "_rebuild_device_tensor_from_cpu_tensor", _from_device)
    for name, what in (
        ("_rebuild_sparse_tensor", "a sparse tensor"),
        ("_rebuild_nested_tensor", "a nested tensor"),
        ("_rebuild_qtensor", "a quantized tensor"),
        ("_rebuild_meta_tensor_no_storage", "a tensor on the meta device, without values"),
        ("_rebuild_wrapper_subclass", "a tensor of a subclass without memory of its own"),
    ):
        made.function(_UTILS, name, _lacking(what))
    return made


def _lacking(what: str) -> Any:
    def refuse(_args: tuple[Any, ...], _making: Making) -> object:
        raise LackingError(
            f"{what}: only PyTorch can hold it: pip install torch and load with "
            "framework='torch'; holdfast.open reads the other tensors of the file without it"
        )

    return refuse


def _size(args: tuple[Any, ...], _: Making) -> tuple[int, ...]:
    if len(args) > 1:
        raise TypeError(f"{len(args)} arguments, expected 1")
    return integers(args[0], "a size", -(1 << 63)) if args else ()


def _device(args: tuple[Any, ...], _: Making) -> str:
    if not 1 <= len(args) <= 2 or type(args[0]) is not str or not _DEVICE.fullmatch(args[0]):
        raise ValueError("not the name of a device")
    if len(args) == 1:
        return str(args[0])
    if type(args[1]) is not int or not 0 <= args[1] < 1000:
        raise ValueError("not the number of a device")
    return f"{args[0]}:{args[1]}"


def _layout(args: tuple[Any, ...], _: Making) -> str:
    if len(args) != 1 or type(args[0]) is not str:
        raise TypeError("expected the name of a layout")
    if args[0].removeprefix("torch.") not in _LAYOUTS:
        raise ValueError(f"{args[0][:40]!r} is no layout")
    return str(args[0])


def _dense(args: tuple[Any, ...], making: Making) -> Any:
    """A dense tensor, where it is the start of one with attributes."""
    if len(args) not in (4, 6, 7, 8):
        raise TypeError(f"{len(args)} arguments, expected 4 to 8")
    held, extra = _array(args[0], making), args[6:]
    if extra and type(extra[0]) is str:
        row = BY_TORCH.get(extra[0].removeprefix("torch."))
        if row is None or row.numpy is None:
            return _lacking(f"a tensor of {extra[0][:40]}")(args, making)
        kind = decode_dtype(f"ml_dtypes.{row.numpy}") if row.ml_dtypes else np.dtype(row.numpy)
        held, extra = held.view(kind), extra[1:]
    if len(args) > 4 and args[5] is not None and not (isinstance(args[5], dict) and not args[5]):
        raise UnsafeRequestError("a tensor with backward hooks")
    (offset,) = integers((args[1],), "an offset")
    size, stride = integers(args[2], "a shape"), integers(args[3], "strides")
    if held.ndim != 1 or span(size, stride, offset) > held.size or len(size) > 64:
        raise ValueError(f"shape {size} at {offset} ends outside of its storage")
    marks = extra[0] if extra and extra[0] is not None else {}
    if type(marks) is not dict or not all(type(mark) is bool for mark in marks.values()):
        raise TypeError("what is marked of a tensor is no dict of bool")
    if 0 in size:
        return np.empty(size, held.dtype)
    writeable = not any(n > 1 and not step for n, step in zip(size, stride, strict=True))
    step = held.itemsize
    # Through its bytes: types of ml_dtypes cannot be seen as the buffers that they are.
    data = held.view(np.uint8).data
    array: Any = np.ndarray(size, held.dtype, data, offset * step, [n * step for n in stride])
    array.flags.writeable = array.flags.writeable and writeable
    if marks.get("conj") or marks.get("neg"):
        if array.size > held.size:
            raise ValueError("more elements than are stored")
        making.copies(held, array.nbytes)
        array = np.conj(array) if marks.get("conj") else array
        array = np.negative(array) if marks.get("neg") else array
    return array


def _array(value: Any, making: Making) -> Any:
    if not isinstance(value, np.ndarray) or making.pending(value):
        raise TypeError(f"a {type(value).__name__}, expected a tensor")
    return value


def _parameter(args: tuple[Any, ...], making: Making) -> Any:
    if not 1 <= len(args) <= 4:
        raise TypeError(f"{len(args)} arguments")
    return _array(args[0], making)


def _from_type(args: tuple[Any, ...], making: Making) -> Any:
    if len(args) != 4:
        raise TypeError(f"{len(args)} arguments, expected 4")
    func, kind, inner, _ = args
    if isinstance(func, np.ndarray):
        made: Any = func  # a row that is made already
    elif type(inner) is tuple and making.call is not None:
        made = making.call(func, inner)
    else:
        raise TypeError("the arguments of a function are no tuple")
    if not isinstance(kind, Rule) or kind.name.rpartition(".")[2] not in ("Tensor", "Parameter"):
        _lacking("a tensor of a subclass")(args, making)
    return _array(made, making)


def _from_device(args: tuple[Any, ...], making: Making) -> Any:
    """The values that a tensor of another device was saved as, of its own dtype."""
    if len(args) != 4 or type(args[1]) is not str:
        raise TypeError("expected an array, a dtype, a device and a bool")
    data = _array(args[0], making)
    if data.dtype.hasobject:
        raise TypeError("expected an array of numbers")
    row = BY_TORCH.get(args[1].removeprefix("torch."))
    if row is None or row.numpy is None or row.ml_dtypes:
        if row is not None and row.numpy == data.dtype.name:
            return data
        return _lacking(f"a tensor of {args[1][:40]}")(args, making)
    if data.dtype.kind not in "?biufc":
        raise TypeError("expected an array of numbers")
    dtype = np.dtype(getattr(np, row.numpy))
    if data.dtype == dtype:
        return data
    if data.size * dtype.itemsize > 64 * max(_held(data), 1):
        raise ValueError("more elements than are stored")
    # PyTorch saves them as the type that they are, if NumPy has it: each that is not, counts.
    making.grows(data.size * dtype.itemsize)
    return data.astype(dtype)


def _held(data: Any) -> int:
    """Bytes that an array has at most, where others may be seen twice."""
    count = data.itemsize
    for extent, stride in zip(data.shape, data.strides, strict=True):
        count *= extent if stride else 1
    return int(count)
