"""Torch tensors as views of their storages, for files that keep these whole."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch

from ..dtypes import BY_NAME, BY_TORCH, DTYPES
from ..views import CUDA, TensorBatch, device_code
from . import _torch_load
from ._dlpack import Exchange
from ._torch_place import Places

__all__ = ["TorchStorages"]

_Untyped = torch.UntypedStorage
_Typed: Any = torch.storage.TypedStorage
_element_size: Any = torch._utils._element_size
_serialization: Any = torch.serialization

#: Dtypes whose tensors are pickled over untyped bytes; in older versions there are none.
_NEW: frozenset[torch.dtype] = frozenset(getattr(torch.storage, "_new_dtypes", frozenset)())

#: Codes of the dtypes that this version of torch pickles and the table has.
_CODES: dict[torch.dtype, int] = {
    getattr(torch, name): row.code
    for name, row in BY_TORCH.items()
    if hasattr(torch, name)
    and getattr(torch, name) in _NEW.union(torch.storage._dtype_to_storage_type_map())
}
_UINT8 = BY_NAME["uint8"].code
#: By code: what a persistent id says of such elements; uint8 for untyped bytes, -1 for those that
#: this version does not pickle.
_SAID = [-1] * len(DTYPES)
for _dtype, _code in _CODES.items():
    _SAID[_code] = _UINT8 if _dtype in _NEW else _code
#: What elements of these sizes are counted as where the table lacks their dtype: quantized ones.
_BY_SIZE = {row.itemsize: row.code for row in map(BY_NAME.__getitem__, ("uint8", "int32"))}

#: What is said of elements that are none of these, quantized ones: numbers that no code has.
_OTHERS: dict[torch.dtype, int] = {}

_is_neg = torch.Tensor.is_neg
_is_conj = torch.Tensor.is_conj
_stride = torch.Tensor.stride


class TorchStorages(Places):
    """The storages that tensors of a program are views of (:class:`.base.Storages`).

    Parameters
    ----------
    legacy : bool
        Whether persistent ids are those of the stream that torch wrote up to 1.5.
    """

    name = "torch"

    def __init__(self, exchange: Exchange | None, *, legacy: bool = False) -> None:
        super().__init__(exchange, _place, _SAID, _torch_load.plain_cuda())
        self._legacy = legacy
        self._classes: set[type] = set()

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:
        """The persistent id of a storage, or of a class of modules; see :class:`.base.Storages`."""
        if self._legacy and isinstance(obj, type) and issubclass(obj, torch.nn.Module):
            return self._module_class(obj)
        if isinstance(obj, _Typed):
            storage, dtype = _bytes_of(obj), obj.dtype
            try:
                count = obj._size()
            except TypeError:
                raise TypeError(
                    f"dtype {dtype} is one that torch.save cannot hold; save x.view(torch.uint8)"
                ) from None
            kind = getattr(torch, obj._pickle_storage_type())
        elif isinstance(obj, _Untyped):
            storage, dtype, count = obj, torch.uint8, obj.nbytes()
            kind = getattr(importlib.import_module(type(obj).__module__), type(obj).__name__)
        else:
            return None
        code = _CODES.get(dtype)
        if code is None:
            code = _BY_SIZE.get(_element_size(dtype), _UINT8)
        # Quantized elements are said to be themselves, whatever they are counted as.
        said = _SAID[code]
        if dtype not in _CODES:
            said = _OTHERS.setdefault(dtype, len(DTYPES) + len(_OTHERS))
        seen = len(self.keys)
        device = storage.device.type
        row = self.see(storage, said, code, device != "meta")
        if row == seen and device not in ("cpu", "meta"):
            self.elsewhere.append(row)
        fake = getattr(obj, "_fake_device", None)
        location = _serialization.location_tag(storage) if fake is None else str(fake)
        pid = ("storage", kind, self.keys[row], location, count)
        return (*pid, None) if self._legacy else pid

    def batch(self) -> TensorBatch:
        """The storages so far, in the order of their keys.

        Those of devices whose memory only PyTorch can copy are copied to the host.
        """
        views, dims = self.columns()
        owners = list(self.storages)
        devices = np.zeros(len(owners), np.int32)
        for row in self.elsewhere:
            device = owners[row].device
            if device.type == "cuda" and torch.version.hip is None:
                devices[row] = device_code(CUDA, device.index)
                continue
            owners[row] = owners[row].cpu()
            views["address"][row] = owners[row].data_ptr()
        return TensorBatch(views, dims, owners, devices=devices if devices.any() else None)

    def _module_class(self, cls: type) -> tuple[Any, ...] | None:
        """A class with its source, the first time: a reader may compare it with what it has."""
        if cls in self._classes:
            return None
        self._classes.add(cls)
        source_file = source = None
        try:
            lines, _, source_file = _serialization.get_source_lines_and_file(cls)
            source = "".join(lines)
        except Exception:  # whatever inspecting a class may raise: the source is no duty
            warnings.warn(
                f"Couldn't retrieve source code for container of type {cls.__name__}. It won't be "
                "checked for correctness upon loading.",
                stacklevel=2,
            )
        return ("module", cls, source_file, source)


class AskedStorages(TorchStorages):
    """The same where somebody registered with PyTorch to say where storages are, of all of them."""

    placer = None

    def add(self, tensor: Any) -> None:  # noqa: ARG002
        """None: each tensor is pickled in its own way, which asks for its storage."""
        return


def _place(tensor: Any) -> tuple[int, int, tuple[int, ...], tuple[int, ...], bool, int] | None:
    """Where a tensor lies, for versions without the DLPack exchange interface."""
    dtype = tensor.dtype
    code = _CODES.get(dtype)
    if (
        code is None
        or not (tensor.is_cpu or (tensor.is_cuda and torch.version.hip is None))
        or tensor.layout is not torch.strided
        or _is_neg(tensor)
        or (dtype.is_complex and _is_conj(tensor))
        or tensor.is_nested
    ):
        return None
    try:
        address = tensor.data_ptr() if tensor.numel() else 0
        if not address and tensor.numel():
            return None
        shape, number = tuple(tensor.shape), -1 if tensor.is_cpu else tensor.get_device()
        return code, address, shape, _stride(tensor), tensor.requires_grad, number
    except (RuntimeError, NotImplementedError):
        return None  # inside of a function transform: torch says what is wrong with it


def _bytes_of(storage: Any) -> Any:
    """The untyped storage of a typed one."""
    found = getattr(storage, "_untyped_storage", None)
    return storage.untyped() if found is None else found
