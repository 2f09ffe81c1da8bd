"""PyTorch storages over memory that was read or mapped, and tensors as views of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import serialization

from ..dtypes import DType
from ..layout import QUANTIZED
from ..views import CONJUGATE, CUDA, NEGATIVE, dense_strides, device_code

__all__ = [
    "bare",
    "dataless",
    "destination",
    "plain_cpu",
    "plain_cuda",
    "relocates",
    "restore",
    "typed",
    "view",
]

Restore = Callable[[Any, str], Any]


def plain_cpu() -> bool:
    """Whether nothing was registered that takes storages of the CPU before PyTorch itself does."""
    registry: Any = getattr(serialization, "_package_registry", None)
    own: Any = getattr(serialization, "_cpu_deserialize", None)
    return bool(registry) and registry[0][2] is own


def plain_cuda() -> bool:
    """Whether nobody but PyTorch itself says where storages of CUDA devices are."""
    registry: Any = getattr(serialization, "_package_registry", None)
    if not plain_cpu() or len(registry) < 2:
        return False
    tagger = registry[1][1]
    if isinstance(tagger, partial):  # from 2.5 on
        own = getattr(serialization, "_backend_tag", None)
        return tagger.func is own and tagger.args == ("cuda",)
    return tagger is getattr(serialization, "_cuda_tag", partial)


def relocates(locations: Sequence[str], location: Any) -> bool:
    """Whether any storage is to be elsewhere than in the memory of the host."""
    if not plain_cpu() or callable(location) or _fake():
        return True
    if isinstance(location, Mapping):
        return any(location.get(tag, tag) != "cpu" for tag in {*locations, "cpu"})
    if location is not None:
        text = location.decode("ascii") if isinstance(location, bytes) else str(location)
        return text != "cpu"
    return any(tag != "cpu" for tag in set(locations))


def restore(storage: Any, tag: str, location: Any) -> Any:
    """`storage` where ``map_location`` of ``torch.load`` wants it.

    Parameters
    ----------
    storage : torch.UntypedStorage
        In the memory of the host.
    tag : str
        Where it was when it was saved.
    location : None, str, bytes, torch.device, mapping or callable
        A callable is given `storage` and `tag`; where it returns None, `tag` decides.
    """
    default: Any = serialization.default_restore_location
    if location is None:
        return default(storage, tag)
    if isinstance(location, Mapping):
        return default(storage, location.get(tag, tag))
    if isinstance(location, bytes):
        return default(storage, location.decode("ascii"))
    if isinstance(location, str | torch.device):
        return default(storage, str(location))
    found = location(storage, tag)
    if found is None:
        return default(storage, tag)
    if not torch.is_storage(found):
        raise TypeError(
            f"map_location returned a {type(found).__name__} for a storage on {tag!r}; expected a "
            "storage, or None"
        )
    return found


def view(
    handle: Any,
    dtype: torch.dtype,
    row: DType,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    flags: int,
) -> torch.Tensor:
    """A tensor over a part of a storage; see :meth:`holdfast.adapters.base.Adapter.view`."""
    fake = _fake()
    if fake:
        tensor = torch.empty(0, dtype=dtype, device=handle.device)
    else:  # of some dtypes torch.empty warns that they are experimental
        tensor = torch.empty(0, dtype=torch.uint8, device=handle.device).view(dtype)
    size = row.itemsize
    steps = [step // size for step in strides or dense_strides(shape, size)]
    tensor.set_(handle, offset // size, shape, steps)
    on_device: Any = getattr(torch._utils, "_restore_device_fake_mode", None)
    if fake and on_device is not None:
        tensor = on_device(tensor)  # where the storage says it would be: from 2.5 on
    if flags & CONJUGATE:
        tensor = tensor.conj()
    if flags & NEGATIVE:
        tensor = torch._neg_view(tensor)
    return tensor


def typed(handle: Any, dtype: torch.dtype | None, code: int, part: tuple[int, int] | None) -> Any:
    """A storage as ``torch.load`` gives it: of a dtype, which for untyped bytes is uint8."""
    if code == -1:
        dtype = torch.uint8
    if dtype is None:
        dtype = getattr(torch, QUANTIZED[-2 - code])
    if part is not None:
        size = torch.empty(0, dtype=torch.uint8).view(dtype).element_size()
        handle = handle[part[0] * size : (part[0] + part[1]) * size]
    make: Any = torch.storage.TypedStorage
    return make(wrap_storage=handle, dtype=dtype, _internal=True)


def destination(location: Any) -> int:
    """The code of the CUDA device that ``map_location`` names; 0 for all else.

    What PyTorch cannot have, a device without a driver say, is left to it to refuse.
    """
    if isinstance(location, bytes):
        location = location.decode("ascii", "replace")
    if isinstance(location, int) and not isinstance(location, bool):
        location = f"cuda:{location}"
    if not isinstance(location, str | torch.device) or not str(location).startswith("cuda"):
        return 0
    if torch.version.hip is not None or not torch.cuda.is_available() or not plain_cpu():
        return 0
    try:
        device = torch.device(location)
    except RuntimeError:
        return 0
    number = torch.cuda.current_device() if device.index is None else device.index
    if device.type != "cuda" or not 0 <= number < torch.cuda.device_count():
        return 0
    return device_code(CUDA, number)


def dataless(location: Any) -> bool:
    """Whether storages have no elements: on the device ``"meta"``, or all tensors are fakes."""
    if isinstance(location, bytes):
        location = location.decode("ascii", "replace")
    if isinstance(location, str | torch.device) and str(location).partition(":")[0] == "meta":
        return True
    return _fake()


def _fake() -> bool:
    """Whether a mode is active in which tensors are made without elements."""
    guards = sys.modules.get("torch._guards")
    detect = getattr(guards, "detect_fake_mode", None)
    if detect is None:
        return False
    # Nearly always there is neither a mode nor a trace, which is told in a tenth of the time.
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    context = getattr(guards, "TracingContext", None)
    if modes is not None and context is not None and modes() == 0 and context.try_get() is None:
        return False
    return detect(None) is not None


def bare(nbytes: int, location: str, offset: int) -> Any:
    """A storage without elements, which knows where in its file they are."""
    make: Any = torch.UntypedStorage
    storage = make(nbytes, device="meta")
    if _fake():
        storage._fake_device = location
    storage._checkpoint_offset = offset
    return storage
