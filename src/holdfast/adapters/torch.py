"""PyTorch tensors, and the values that are saved beside them.

PyTorch 2.10 and newer describe and make tensors through the DLPack C exchange API
(:mod:`holdfast.adapters._dlpack`); older ones through Python calls, more slowly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..dtypes import BY_TORCH, DTYPES, DType
from ..tree import Codec
from ..views import CUDA, DENSE, VIEW, TensorBatch, device_code
from . import _torch_load
from ._dlpack import Exchange
from ._modules import own_loader
from ._torch_storages import AskedStorages, TorchStorages
from .base import Loader, dtypes_of, refusal

__all__ = ["ADAPTER", "TorchAdapter"]

_MAX_NDIM = 64

#: Rows of the dtype table, by the dtypes that this version of PyTorch has.
_ROWS: dict[torch.dtype, DType] = {
    getattr(torch, name): row for name, row in BY_TORCH.items() if hasattr(torch, name)
}
_DTYPES: dict[int, torch.dtype] = {row.code: dtype for dtype, row in _ROWS.items()}


class TorchAdapter:
    """PyTorch, as the rest of the library sees it (:class:`holdfast.adapters.base.Adapter`).

    Kinds are ``parameter``, ``parameter,frozen`` (of which no gradient is required) and
    ``requires_grad``.

    Parameters
    ----------
    exchange : bool
        Whether to use the DLPack C exchange API, where PyTorch has it.
    """

    name = "torch"
    plain_types: frozenset[type] = frozenset({torch.Tensor, torch.nn.Parameter})

    def __init__(self, *, exchange: bool = True) -> None:
        self._exchange = _exchange() if exchange else None

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """How sizes, dtypes, devices, layouts and memory formats are held."""
        return _CODECS

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is a tensor, of any type."""
        return isinstance(obj, torch.Tensor)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of tensors. See :meth:`Adapter.describe`.

        Copied are only tensors whose negation or conjugation is still to be done, and those of
        devices whose memory only PyTorch can copy.
        """
        if self._exchange is None:
            return _describe(tensors, names)
        views, dims, strides, devices, owners, kinds = self._exchange.describe(
            tensors, lambda tensor, i: _plain(tensor, names[i])
        )
        return TensorBatch(views, dims, owners, strides, devices=devices), kinds

    def storages(self, *, legacy: bool = False) -> TorchStorages:
        """A new collection of storages. See :meth:`Adapter.storages`."""
        kind = TorchStorages if _torch_load.plain_cpu() else AskedStorages
        return kind(self._exchange, legacy=legacy)

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Tensors over the memory of a batch. See :meth:`Adapter.wrap`."""
        for row in dtypes_of(batch):
            if row.code not in _DTYPES:
                raise TypeError(f"{row.name}: PyTorch {torch.__version__} has no such type")
        if self._exchange is None:
            tensors = _wrap(batch)
        else:
            tensors = self._exchange.wrap(batch.views, batch.dims, list(batch.owners), batch.owner)
        _make_own(batch, tensors)
        for i, kind in kinds.items():
            tensors[i] = _with_kind(tensors[i], kind)
        return tensors

    def relocates(self, locations: Sequence[str], location: Any) -> bool:
        """Whether storages have to be moved. See :meth:`Adapter.relocates`."""
        return _torch_load.relocates(locations, location)

    def dataless(self, location: Any) -> bool:
        """Whether tensors go to the device ``"meta"``, or a mode is on that makes all fakes."""
        return _torch_load.dataless(location)

    def wrap_storages(
        self,
        batch: TensorBatch,
        locations: Sequence[str],
        offsets: Sequence[int],
        location: Any,
    ) -> list[Any]:
        """Untyped storages, where `location` wants them. See :meth:`Adapter.wrap_storages`."""
        if _torch_load.dataless(location):
            sizes = batch.views["nbytes"].tolist()
            return [_torch_load.bare(*row) for row in zip(sizes, locations, offsets, strict=True)]
        storages = [tensor.untyped_storage() for tensor in self.wrap(batch, {})]
        if not _torch_load.relocates(locations, location):
            return storages
        return [  # those of devices were read to where they are wanted
            _torch_load.restore(storage, tag, location) if storage.device.type == "cpu" else storage
            for storage, tag in zip(storages, locations, strict=True)
        ]

    def handle_of(self, tensor: Any) -> Any:
        """The untyped storage of a tensor."""
        return tensor.untyped_storage()

    def view(
        self,
        handle: Any,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        flags: int,
        kind: str,
    ) -> torch.Tensor:
        """A tensor that shares a storage. See :meth:`Adapter.view`."""
        if dtype.code not in _DTYPES:
            raise TypeError(f"{dtype.name}: PyTorch {torch.__version__} has no such type")
        made = _torch_load.view(handle, _DTYPES[dtype.code], dtype, offset, shape, strides, flags)
        return _with_kind(made, kind)

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """A typed storage. See :meth:`Adapter.storage`."""
        return _torch_load.typed(handle, _DTYPES.get(code), code, part)

    def destination(self, location: Any) -> int:
        """The code of a CUDA device, where the exchange API makes tensors over its memory.

        A device that PyTorch has not got is 0: `place` raises PyTorch's own error for it.
        """
        return 0 if self._exchange is None else _torch_load.destination(location)

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` where ``map_location`` of ``torch.load`` would have it.

        Parameters
        ----------
        tensor : torch.Tensor
        location : None, str, torch.device, dict or callable
            A device; or what maps ``"cpu"`` to one; or a function of the tensor and ``"cpu"``,
            whose result is returned (None: the tensor as it is).
        """
        if isinstance(location, Mapping):
            location = location.get("cpu")
        if location is None:
            return tensor
        if not isinstance(location, str | torch.device) and callable(location):
            found = location(tensor, "cpu")
            return tensor if found is None else found
        # The type and the gradient's flag survive, unlike in tensor.to().
        try:
            moved = tensor.detach().to(location)
        except AssertionError as error:  # "Torch not compiled with CUDA enabled"
            raise RuntimeError(
                f"map_location={str(location)!r}: {error}; map_location='cpu' loads to the host"
            ) from error
        if moved.device == tensor.device:
            return tensor
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
        return moved.requires_grad_(tensor.requires_grad)

    def program(self, obj: object) -> str | None:
        """What kind of program `obj` is, if any; ``torch.export`` is not imported for it."""
        if isinstance(obj, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            return "torchscript"
        exported = sys.modules.get("torch.export.exported_program")
        if exported is not None and isinstance(obj, exported.ExportedProgram):
            return "pt2"
        return None

    def named_tensors(self, obj: object) -> dict[str, Any] | None:
        """The parameters and persistent buffers of a module, under the names of its state_dict."""
        if not isinstance(obj, torch.nn.Module):
            return None
        return {
            name: value
            for name, value in obj.state_dict(keep_vars=True).items()
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
        }

    def own_loader(self, obj: object, stored: Container[str]) -> Loader | None:
        """The ``load_state_dict`` of a module, where hooks or methods of its own matter."""
        norm = torch.nn.modules.batchnorm._NormBase
        return own_loader(obj, torch.nn.Module, norm, stored)

    def writable(self, tensor: Any) -> bool:  # noqa: ARG002
        """True: PyTorch has no read-only tensors."""
        return True

    def mismatch(self, tensor: Any, name: str) -> str | None:  # noqa: ARG002
        """None: the tensors of a file are such as these."""
        return None

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """A shape as PyTorch prints it."""
        return f"torch.Size({list(shape)})"

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy with the dtype converted, unseen by autograd."""
        with torch.no_grad():
            tensor.detach().copy_(source)

    def changing(self, tensors: Sequence[Any]) -> None:
        """Count the change, so that autograd notices where it had kept a tensor for a gradient."""
        increment = getattr(torch.autograd.graph, "increment_version", None)
        for tensor in tensors:
            if tensor.is_inference():
                continue  # which has no count
            if increment is not None:
                increment(tensor)
            else:  # PyTorch before 2.1: a change of none of its elements
                tensor.detach().as_strided((0,), (1,)).zero_()


def _exchange() -> Exchange | None:
    """The exchange API of this PyTorch; None where it has none that serves every dtype."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    try:
        exchange = Exchange(torch.Tensor, torch.nn.Parameter, (torch.uint8, torch.int8))
        samples = [_empty(dtype) for dtype in _ROWS]
        views = exchange.describe(samples, lambda tensor, _: tensor)[0]
    except (ValueError, TypeError):  # another major version, or a dtype that it cannot describe
        return None
    return exchange if views["dtype"].tolist() == [row.code for row in _ROWS.values()] else None


# -- describing ----------------------------------------------------------------------------------


def _plain(tensor: Any, name: str) -> Any:
    """`tensor`, or a copy of it, with memory that says all of its values; or TypeError."""
    if type(tensor) not in TorchAdapter.plain_types:
        raise refusal(name, _why_no_subclass(tensor))
    why = _why_not(tensor)
    if why:
        raise refusal(name, why)
    if not _in_reach(tensor):
        tensor = tensor.detach().cpu()
    if tensor.is_neg() or tensor.is_conj():
        return tensor.detach().resolve_conj().resolve_neg()
    return tensor


def _in_reach(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor can be copied from by others than PyTorch."""
    return tensor.is_cpu or (tensor.is_cuda and torch.version.hip is None)


def _why_no_subclass(tensor: Any) -> str:
    kind = type(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        return f"an {kind.__name__} has no shape yet; run the module once"
    return (
        f"a {kind.__module__}.{kind.__qualname__} may carry more than its elements; save "
        "x.as_subclass(torch.Tensor) if its elements are all"
    )


def _why_not(tensor: torch.Tensor) -> str | None:
    """Why a tensor of a plain type cannot be held, or None."""
    if tensor.is_nested:
        return "a nested tensor; save x.unbind()"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; save x.to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor; save x.int_repr(), its scale and its zero point"
    if tensor.device.type == "meta":
        return "a tensor on the meta device has no values"
    if tensor.dtype not in _ROWS:
        return f"dtype {tensor.dtype} is not one that can be saved; save x.view(torch.uint8)"
    if tensor.dim() > _MAX_NDIM:
        return f"{tensor.dim()} dimensions, more than {_MAX_NDIM}"
    if _in_reach(tensor) and not _has_memory(tensor):
        return "it has no memory of its own (freed storage, or inside a function transform)"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return bool(tensor.data_ptr() != 0 or tensor.numel() == 0)
    except RuntimeError:
        return False


def _ready(tensor: Any) -> bool:
    """Whether `_plain` would return `tensor` itself, as nearly always: asked cheaply."""
    return (
        type(tensor) in TorchAdapter.plain_types
        and tensor.dtype in _ROWS
        and _in_reach(tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor.is_conj() or tensor.is_nested)
        and tensor.dim() <= _MAX_NDIM
        and _has_memory(tensor)
    )


def _kind(tensor: torch.Tensor) -> str | None:
    parameter = type(tensor) is torch.nn.Parameter
    if tensor.requires_grad:
        return "parameter" if parameter else "requires_grad"
    return "parameter,frozen" if parameter else None


def _describe(tensors: list[Any], names: Sequence[str]) -> tuple[TensorBatch, dict[int, str]]:
    """What the exchange API does, for versions without it."""
    rows: list[tuple[int, int, int, int, int, int]] = []
    dims: list[int] = []
    strides: list[int] = []
    owners = list(tensors)
    devices: list[int] = []
    kinds: dict[int, str] = {}
    for i, tensor in enumerate(tensors):
        kind = _kind(tensor) if type(tensor) in TorchAdapter.plain_types else None
        if kind is not None:
            kinds[i] = kind
        if not _ready(tensor):
            owners[i] = tensor = _plain(tensor, names[i])
        row = _ROWS[tensor.dtype]
        size = tensor.element_size()
        shape = tensor.shape
        dense = DENSE if tensor.is_contiguous() else 0
        rows.append(
            (tensor.data_ptr(), tensor.numel() * size, len(dims), row.code, len(shape), dense)
        )
        dims.extend(shape)
        strides.extend([step * size for step in tensor.stride()])
        devices.append(device_code(CUDA, tensor.get_device()) if tensor.is_cuda else 0)
    views = np.array(rows, VIEW)
    every_dense = bool((views["flags"] & DENSE).all())
    batch = TensorBatch(
        views,
        np.array(dims, np.int64),
        owners,
        None if every_dense else np.array(strides, np.int64),
        devices=np.array(devices, np.int32) if any(devices) else None,
    )
    return batch, kinds


# -- making --------------------------------------------------------------------------------------


def _empty(dtype: torch.dtype) -> torch.Tensor:
    """No elements. torch.empty would warn of some dtypes that they are experimental."""
    return torch.empty(0, dtype=torch.uint8).view(dtype)


def _wrap(batch: TensorBatch) -> list[torch.Tensor]:
    """Tensors over the memory of their buffers, without the exchange API."""
    dims = batch.dims.tolist()
    owner = [0] * len(batch) if batch.owner is None else batch.owner.tolist()
    starts = [buffer.address for buffer in batch.owners]  # type: ignore[attr-defined]
    made = []
    for (address, nbytes, first, code, ndim, _), which in zip(
        batch.views.tolist(), owner, strict=True
    ):
        dtype, shape = _DTYPES[code], dims[first : first + ndim]
        if nbytes == 0:
            made.append(_empty(dtype).view(shape))
            continue
        buffer: Any = batch.owners[which]
        offset = address - starts[which]
        if offset < 0 or nbytes > len(buffer) - offset:
            raise ValueError(f"{nbytes} bytes at {address:#x} lie outside of their buffer")
        count = nbytes // DTYPES[code].itemsize
        made.append(torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape))
    return made


def _make_own(batch: TensorBatch, tensors: list[Any]) -> None:
    """Have tensors that are all of what PyTorch's allocator gave be tensors of that allocator.

    ``Tensor.record_stream`` does nothing for others, and processes cannot share them.
    """
    buffers: list[Any] = list(batch.owners)
    lenders = [buffer.lender for buffer in buffers]
    if not any(isinstance(lender, torch.Tensor) for lender in lenders):
        return
    views = batch.views
    owner = np.zeros(len(batch), np.int64) if batch.owner is None else batch.owner
    start = np.array([buffer.address for buffer in buffers], np.uint64)[owner]
    nbytes = np.array([len(buffer) for buffer in buffers], np.uint64)[owner]
    whole = (views["address"] == start) & (views["nbytes"] == nbytes) & (nbytes > 0)
    for i in np.flatnonzero(whole).tolist():
        lender = lenders[int(owner[i])]
        if isinstance(lender, torch.Tensor) and lender.untyped_storage().nbytes() == nbytes[i]:
            row, shape = DTYPES[int(views["dtype"][i])], tuple(tensors[i].shape)
            handle = lender.untyped_storage()
            tensors[i] = _torch_load.view(handle, _DTYPES[row.code], row, 0, shape, None, 0)


def _with_kind(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """`tensor` as what its kind says it was."""
    if kind == "parameter,frozen":
        return torch.nn.Parameter(tensor, requires_grad=False)
    if kind not in ("parameter", "requires_grad"):
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"kind {kind!r}: a tensor of {tensor.dtype} has no gradient")
    return torch.nn.Parameter(tensor) if kind == "parameter" else tensor.requires_grad_()


# -- values that are not tensors -----------------------------------------------------------------


def _decode_size(value: Any) -> torch.Size:
    if not isinstance(value, list) or not all(
        type(extent) is int and -(2**63) <= extent < 2**63 for extent in value
    ):
        raise ValueError("not a list of extents")
    return torch.Size(value)


def _decode_device(value: Any) -> torch.device:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,3})?", value):
        raise ValueError("not the name of a device")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(str(error).partition("\n")[0]) from None


def _constants(kind: type, tag: str) -> Codec:
    """How the named constants of one type (``torch.float32``) are held: by their names."""

    def encode(obj: Any) -> str:
        return str(obj).removeprefix("torch.")

    def decode(value: Any) -> Any:
        found = None
        if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,31}", value):
            found = getattr(torch, value, None)
        if not isinstance(found, kind):
            raise ValueError(f"PyTorch {torch.__version__} has no {tag} of that name")
        return found

    return Codec(tag, (kind,), encode, decode)


_CODECS: tuple[Codec, ...] = (
    Codec("torch.Size", (torch.Size,), list, _decode_size),
    Codec("torch.device", (torch.device,), str, _decode_device),
    _constants(torch.dtype, "torch.dtype"),
    _constants(torch.layout, "torch.layout"),
    _constants(torch.memory_format, "torch.memory_format"),
)

ADAPTER = TorchAdapter()
