"""PyTorch's own values in pickles of a stranger.

Every argument is checked before PyTorch sees it: what PyTorch builds of wild ones may take all
memory, or read outside of it. Dense tensors are no business of this module: formats describe
them as rows, and what stands here gets them made.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import cache
from typing import Any

import torch

from . import _torch_special as special
from ._rules import Making, Table, UnsafeRequestError, attributes, integers

__all__ = ["table"]

_UTILS = "torch._utils"
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,3})?")

#: Attributes that a tensor has by itself.
_OWN = frozenset(dir(torch.nn.Parameter)) | frozenset(dir(torch.Tensor))


@cache
def table() -> Table:
    """What is allowed of PyTorch."""
    made = Table()
    constants = torch.dtype, torch.layout, torch.qscheme
    for name, value in vars(torch).items():
        if isinstance(value, constants):
            made.value("torch", name, value)
    made.kind("torch", "Size", torch.Size, _size, _size)
    made.kind("torch", "device", torch.device, _device)
    made.kind("torch torch._tensor", "Tensor", torch.Tensor)
    made.kind("torch.nn.parameter", "Parameter", torch.nn.Parameter, None, _new_parameter)
    made.names["torch.nn", "Parameter"] = torch.nn.Parameter
    for kind in torch._tensor_classes:
        if isinstance(kind, type):
            made.value(kind.__module__, kind.__name__, kind)
    made.function("torch.serialization", "_get_layout", _layout)
    for version in ("", "_v2", "_v3"):
        made.function(_UTILS, f"_rebuild_tensor{version}", special.dense)
    made.function(_UTILS, "_rebuild_parameter", _parameter)
    made.function(_UTILS, "_rebuild_parameter_with_state", _parameter_with_state)
    made.function(_UTILS, "_rebuild_sparse_tensor", special.sparse)
    made.function(_UTILS, "_rebuild_nested_tensor", special.nested)
    made.function(_UTILS, "_rebuild_qtensor", special.quantized)
    made.function(_UTILS, "_rebuild_meta_tensor_no_storage", special.meta)
    made.function(_UTILS, "_rebuild_wrapper_subclass", special.wrapper)
    made.function(_UTILS, "_rebuild_device_tensor_from_numpy", special.from_numpy)
    made.function(_UTILS, "_rebuild_xla_tensor", special.from_numpy)
    made.function(_UTILS, "_rebuild_device_tensor_from_cpu_tensor", special.from_cpu)
    made.function("torch._tensor torch.tensor", "_rebuild_from_type_v2", _from_type)
    return made


# -- values ----------------------------------------------------------------------------------------


def _size(args: tuple[Any, ...], making: Making) -> torch.Size:
    if len(args) > 1:
        raise TypeError(f"{len(args)} arguments, expected 1")
    if not args:
        return torch.Size(())
    extents = integers(args[0], "a size", -(1 << 63))
    making.copies(args[0], 8 * len(extents))
    return torch.Size(extents)


def _device(args: tuple[Any, ...], _: Making) -> torch.device:
    if not 1 <= len(args) <= 2 or type(args[0]) is not str or not _DEVICE.fullmatch(args[0]):
        raise ValueError("not the name of a device")
    if len(args) == 2 and (type(args[1]) is not int or not 0 <= args[1] < 1000):
        raise ValueError("not the number of a device")
    return torch.device(*args)


def _layout(args: tuple[Any, ...], _: Making) -> torch.layout:
    if len(args) != 1 or type(args[0]) is not str:
        raise TypeError("expected the name of a layout")
    found = vars(torch).get(args[0].removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise ValueError(f"{args[0][:40]!r} is no layout of PyTorch {torch.__version__}")
    return found


# -- parameters and subclasses ---------------------------------------------------------------------


def _hooks(value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and not value):
        raise UnsafeRequestError("a tensor with backward hooks")


def _parameter(args: tuple[Any, ...], making: Making) -> torch.nn.Parameter:
    if len(args) != 3 or type(args[1]) is not bool:
        raise TypeError("expected a tensor, a bool and hooks")
    _hooks(args[2])
    made = _new_parameter(args[:2], making)
    made._backward_hooks = OrderedDict()
    return made


def _new_parameter(args: tuple[Any, ...], _: Making) -> torch.nn.Parameter:
    if not 1 <= len(args) <= 2 or not isinstance(args[0], torch.Tensor):
        raise TypeError("expected a tensor")
    grad = args[1] if len(args) == 2 else True
    if type(grad) is not bool:
        raise TypeError("whether a gradient is wanted is no bool")
    made: torch.nn.Parameter = torch.nn.Parameter(args[0], grad)
    return made


def _parameter_with_state(args: tuple[Any, ...], making: Making) -> torch.nn.Parameter:
    if len(args) != 4:
        raise TypeError(f"{len(args)} arguments, expected 4")
    made = _parameter(args[:3], making)
    _set_state(made, args[3], making)
    return made


def _set_state(tensor: torch.Tensor, state: Any, making: Making) -> None:
    """Set Python attributes of a tensor; of a plain one, none that it has by itself."""
    if type(state) is tuple:
        if len(state) != 2:
            raise ValueError("not the state of a tensor")
        parts: tuple[Any, ...] = state
    else:
        parts = (state,)
    kind = type(tensor)
    known = _OWN if kind in (torch.Tensor, torch.nn.Parameter) else frozenset()
    for part in parts:
        if part is None:
            continue
        making.copies(part, 64 * len(attributes(part, kind, known=known)))
        for key, value in part.items():
            setattr(tensor, key, value)


def _from_type(args: tuple[Any, ...], making: Making) -> torch.Tensor:
    """A tensor of a subclass, or one with attributes."""
    if len(args) != 4:
        raise TypeError(f"{len(args)} arguments, expected 4")
    func, kind, inner, state = args
    if isinstance(func, torch.Tensor):
        made: Any = func  # a row that is made already
    elif type(inner) is tuple and making.call is not None:
        made = making.call(func, inner)
    else:
        raise TypeError("the arguments of a function are no tuple")
    if not isinstance(made, torch.Tensor):
        raise TypeError(f"made a {type(made).__name__}, expected a tensor")
    _known_type(kind, making)
    if type(made) is not kind:
        made = made.as_subclass(kind)
    own = getattr(kind, "__setstate__", torch.Tensor.__setstate__)
    if own is not torch.Tensor.__setstate__:
        made.__setstate__(state)
    else:
        _set_state(made, state, making)
    return made  # type: ignore[no-any-return]


def _known_type(kind: Any, making: Making) -> None:
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return
    if not (isinstance(kind, type) and issubclass(kind, torch.Tensor) and making.trusted(kind)):
        raise UnsafeRequestError("the type of a tensor is no type of tensors that is allowed")
