"""OneFlow tensors in host memory, and the values that are saved beside them.

A tensor over memory is made of a NumPy array over it, which OneFlow shares, and is described by its
DLPack capsule. OneFlow computes in a thread of its own, which every look at a tensor waits for:
small ones are therefore looked at together.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import oneflow

from ..dtypes import BY_NAME, DTYPES, DType
from ..tree import Codec
from ..views import DENSE, VIEW, TensorBatch
from . import _oneflow_look as look
from ._modules import own_loader
from ._oneflow_storages import OneFlowStorages
from .base import Loader, dtypes_of, refusal
from .numpy import ADAPTER as NUMPY

__all__ = ["ADAPTER", "OneFlowAdapter"]

_MAX_NDIM = 64
_BFLOAT16 = BY_NAME["bfloat16"].code
_UINT16 = BY_NAME["uint16"].code

#: Rows of the dtype table, by the dtypes that this version of OneFlow has.
_ROWS: dict[Any, DType] = {
    getattr(oneflow, row.name): row
    for row in DTYPES
    if isinstance(getattr(oneflow, row.name, None), oneflow.dtype)
}


def _from_numpy(row: DType) -> bool:
    """Whether OneFlow makes tensors of NumPy's arrays of this type."""
    if row.numpy is None or row.ml_dtypes:
        return False
    try:
        oneflow.from_numpy(np.empty(1, row.name))
    except RuntimeError:
        return False
    return True


#: Codes of the types that a tensor can be made of memory of, without a copy.
_SHARED = frozenset(row.code for row in _ROWS.values() if _from_numpy(row))


class OneFlowAdapter:
    """OneFlow, as the rest of the library sees it (:class:`holdfast.adapters.base.Adapter`).

    Kinds are those of the adapter for PyTorch: ``parameter``, ``parameter,frozen`` (of which no
    gradient is required) and ``requires_grad``.
    """

    name = "oneflow"
    plain_types: frozenset[type] = frozenset({oneflow.Tensor, oneflow.nn.Parameter})

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """How sizes, dtypes and devices are held."""
        return _CODECS

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is a tensor, of any type."""
        return isinstance(obj, oneflow.Tensor)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of tensors. See :meth:`Adapter.describe`.

        Copied are tensors of a device, small ones among many others, and those of bool that are
        strided.
        """
        kinds: dict[int, str] = {}
        local = list(tensors)
        for i, tensor in enumerate(tensors):
            _vet(tensor, names[i])
            kind = _kind(tensor)
            if kind is not None:
                kinds[i] = kind
            if tensor.device.type != "cpu":
                local[i] = tensor.detach().cpu()
        codes = [_ROWS[tensor.dtype].code for tensor in tensors]
        views = np.zeros(len(tensors), VIEW)
        views["dtype"] = codes
        places = look.places(local, codes)
        dims: list[int] = []
        steps: list[int] = []
        owners: list[Any] = []
        for i, (tensor, place) in enumerate(zip(local, places, strict=True)):
            shape, size = tuple(tensor.shape), DTYPES[codes[i]].itemsize
            row = views[i]
            row["address"], row["nbytes"] = place.address, DTYPES[codes[i]].nbytes(shape)
            row["dims"], row["ndim"] = len(dims), len(shape)
            row["flags"] = DENSE if place.strides is None else 0
            dims += shape
            steps += [step * size for step in place.strides or (0,) * len(shape)]
            owners.append(place.owner)
        dense = bool((views["flags"] & DENSE).all())
        strides = None if dense else np.array(steps, np.int64)
        return TensorBatch(views, np.array(dims, np.int64), owners, strides), kinds

    def storages(self, *, legacy: bool = False) -> OneFlowStorages:  # noqa: ARG002
        """A new collection of tensors, each a storage. See :meth:`Adapter.storages`."""
        return OneFlowStorages(self, _ROWS)

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Tensors over the memory of a batch. See :meth:`Adapter.wrap`.

        Copied are only those of bfloat16, which NumPy lacks.
        """
        for row in dtypes_of(batch):
            _check(row)
        half = np.flatnonzero(batch.views["dtype"] == _BFLOAT16)
        if len(half):
            views = batch.views.copy()
            views["dtype"][half] = _UINT16
            batch = TensorBatch(views, batch.dims, batch.owners, owner=batch.owner)
        arrays = NUMPY.wrap(batch, {})
        make = oneflow.from_numpy
        tensors = [make(array) for array in arrays] if not len(half) else []
        if len(half):
            wide = set(half.tolist())
            tensors = [
                _bfloat16(array) if i in wide else make(array) for i, array in enumerate(arrays)
            ]
        for i, kind in kinds.items():
            tensors[i] = _with_kind(tensors[i], kind)
        return tensors

    def relocates(self, locations: Sequence[str], location: Any) -> bool:  # noqa: ARG002
        """Whether `location` says anything: by itself all stays in the memory of the host."""
        return location is not None and str(location).partition(":")[0] != "cpu"

    def dataless(self, location: Any) -> bool:  # noqa: ARG002
        """False: tensors have elements."""
        return False

    def wrap_storages(
        self,
        batch: TensorBatch,
        locations: Sequence[str],  # noqa: ARG002
        offsets: Sequence[int],  # noqa: ARG002
        location: Any,
    ) -> list[Any]:
        """Arrays of bytes, and where tensors of them go. See :meth:`Adapter.wrap_storages`."""
        moved = location if self.relocates((), location) else None
        return [(array, moved) for array in NUMPY.wrap(batch, {})]

    def handle_of(self, tensor: Any) -> Any:
        """The bytes of a tensor in C order."""
        return tensor.detach().numpy().reshape(-1).view(np.uint8), None

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
        """A tensor over a part of a storage. See :meth:`Adapter.view`.

        One that goes to a device shares nothing any more.
        """
        _check(dtype)
        held, location = handle
        seen = DTYPES[_UINT16] if dtype.code == _BFLOAT16 else dtype
        array = NUMPY.view(held, seen, offset, shape, strides, flags, "")
        made = _bfloat16(array) if seen is not dtype else oneflow.from_numpy(array)
        return self.place(_with_kind(made, kind), location)

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """A flat tensor; of quantized elements, their bytes. See :meth:`Adapter.storage`."""
        held, location = handle
        row = DTYPES[code] if code >= 0 else BY_NAME["uint8"]
        count = held.nbytes // row.itemsize
        made = self.view((held, location), row, 0, (count,), None, 0, "")
        return made if part is None else made[part[0] : part[0] + part[1]]

    def destination(self, location: Any) -> int:  # noqa: ARG002
        """0: OneFlow makes tensors over memory of the host alone."""
        return 0

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` where ``map_location`` of ``oneflow.load`` would have it.

        Parameters
        ----------
        tensor : oneflow.Tensor
        location : None, str, oneflow.device, oneflow.placement or callable
            A function is given the tensor and None; where it returns None, the tensor stays.
        """
        if location is None:
            return tensor
        if isinstance(location, str | oneflow.device):
            moved = tensor.detach().to(device=location)
        elif isinstance(location, oneflow.placement):
            moved = tensor.detach().to_global(placement=location, sbp=oneflow.sbp.broadcast)
        elif callable(location):
            found = location(tensor, None)
            return tensor if found is None else found
        else:
            raise TypeError(
                "map_location must be a device, its name, a placement or a function, not "
                f"{type(location).__name__}"
            )
        if not moved.is_global and moved.device == tensor.device:
            return tensor
        if isinstance(tensor, oneflow.nn.Parameter):
            return oneflow.nn.Parameter(moved, requires_grad=tensor.requires_grad)
        return moved.requires_grad_(tensor.requires_grad)

    def program(self, obj: object) -> str | None:  # noqa: ARG002
        """None: OneFlow's graphs are saved by OneFlow."""
        return None

    def named_tensors(self, obj: object) -> dict[str, Any] | None:
        """The parameters and persistent buffers of a module, under the names of its state_dict."""
        if not isinstance(obj, oneflow.nn.Module):
            return None
        return {
            name: value
            for name, value in obj.state_dict(keep_vars=True).items()
            if isinstance(value, oneflow.Tensor)
        }

    def own_loader(self, obj: object, stored: Container[str]) -> Loader | None:
        """The ``load_state_dict`` of a module, where hooks or methods of its own matter."""
        norm = oneflow.nn.modules.batchnorm._NormBase
        return own_loader(obj, oneflow.nn.Module, norm, stored)

    def writable(self, tensor: Any) -> bool:  # noqa: ARG002
        """True: OneFlow has no read-only tensors."""
        return True

    def mismatch(self, tensor: Any, name: str) -> str | None:
        """What OneFlow says of a local tensor for a global one: those of files are local."""
        if not tensor.is_global:
            return None
        return (
            f'local / global mismatch for "{name}":  param from checkpoint is local tensor, but '
            "the param in current model is global tensor. Maybe you need to convert the checkpoint "
            "param to global, or set global_src_rank=0 when using flow.load to load model's "
            "state_dict"
        )

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """A shape as OneFlow prints it."""
        return f"oneflow.Size({list(shape)})"

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy with the dtype converted, unseen by autograd."""
        with oneflow.no_grad():
            tensor.copy_(source.to(tensor.dtype))

    def changing(self, tensors: Sequence[Any]) -> None:
        """Nothing: OneFlow does not count changes."""


# -- describing ----------------------------------------------------------------------------------


def _vet(tensor: Any, name: str) -> None:
    """Raise TypeError for a tensor whose memory does not say all of it."""
    if type(tensor) not in OneFlowAdapter.plain_types:
        kind = type(tensor)
        raise refusal(
            name,
            f"a {kind.__module__}.{kind.__qualname__} may carry more than its elements; save "
            "x.clone() if its elements are all",
        )
    if tensor.is_lazy:
        raise refusal(name, "inside of a graph it has no values")
    if tensor.is_global:
        raise refusal(name, "a global tensor; save x.to_local(), a file for each rank")
    if tensor.dtype not in _ROWS:
        raise refusal(name, f"dtype {tensor.dtype} is not one that can be saved")
    if tensor.ndim > _MAX_NDIM:
        raise refusal(name, f"{tensor.ndim} dimensions, more than {_MAX_NDIM}")


def _kind(tensor: Any) -> str | None:
    parameter = type(tensor) is oneflow.nn.Parameter
    if tensor.requires_grad:
        return "parameter" if parameter else "requires_grad"
    return "parameter,frozen" if parameter else None


# -- making --------------------------------------------------------------------------------------


def _check(row: DType) -> None:
    if row.code not in _SHARED and not (row.code == _BFLOAT16 and hasattr(oneflow, "bfloat16")):
        raise TypeError(f"{row.name}: OneFlow {oneflow.__version__} has no such type")


def _bfloat16(bits: Any) -> Any:
    """A tensor of bfloat16 of its bits, which are the upper half of a float32."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return oneflow.from_numpy(wide.reshape(bits.shape).view(np.float32)).to(oneflow.bfloat16)


def _with_kind(tensor: Any, kind: str) -> Any:
    """`tensor` as what its kind says it was."""
    if kind == "parameter,frozen":
        return oneflow.nn.Parameter(tensor, requires_grad=False)
    if kind not in ("parameter", "requires_grad"):
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"kind {kind!r}: a tensor of {tensor.dtype} has no gradient")
    return oneflow.nn.Parameter(tensor) if kind == "parameter" else tensor.requires_grad_()


# -- values that are not tensors -----------------------------------------------------------------


def _decode_size(value: Any) -> Any:
    if not isinstance(value, list) or not all(
        type(extent) is int and -(2**63) <= extent < 2**63 for extent in value
    ):
        raise ValueError("not a list of extents")
    return oneflow.Size(value)


def _decode_device(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,3})?", value):
        raise ValueError("not the name of a device")
    return oneflow.device(value)


def _encode_dtype(obj: Any) -> str:
    return str(obj).removeprefix("oneflow.")


def _decode_dtype(value: Any) -> Any:
    found = None
    if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,31}", value):
        found = getattr(oneflow, value, None)
    if not isinstance(found, oneflow.dtype):
        raise ValueError(f"OneFlow {oneflow.__version__} has no dtype of that name")
    return found


_CODECS: tuple[Codec, ...] = (
    Codec("oneflow.Size", (oneflow.Size,), list, _decode_size),
    Codec("oneflow.device", (oneflow.device,), str, _decode_device),
    Codec("oneflow.dtype", (oneflow.dtype,), _encode_dtype, _decode_dtype),
)

ADAPTER = OneFlowAdapter()
