"""Walking the objects that the benchmarks save: their tensors, their bytes, their pages.

Works on NumPy arrays and torch tensors inside any nesting of dict, list and tuple, without
importing torch: a tensor is what has ``data_ptr``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 4096

Bytes = NDArray[np.uint8]


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or hasattr(leaf, "data_ptr")


def raw_bytes(tensor: Any) -> Bytes:
    """The bytes of a dense tensor of either framework, without a copy."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return np.empty(0, np.uint8)
    view: Bytes = flat.view(torch.uint8).numpy()
    return view


def leaves(obj: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, in order."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(obj, (list, tuple)):
        for i, value in enumerate(obj):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, obj


def tensors(obj: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(obj) if is_tensor(leaf)]


def map_tensors(obj: Any, change: Callable[[Any], Any]) -> Any:
    """The same object with every tensor replaced by ``change(tensor)``."""
    if isinstance(obj, dict):
        return {key: map_tensors(value, change) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(map_tensors(value, change) for value in obj)
    return change(obj) if is_tensor(obj) else obj


def differences(expected: Any, found: Any, limit: int = 5) -> list[str]:
    """Where `found` is not `expected`: tensors by dtype, shape and bytes, the rest by ``==``.

    Bytes are compared and not values, so that NaNs made of random bits are equal to themselves.
    The order of keys does not count: not every rival keeps it.
    """
    wrong: list[str] = []
    theirs = dict(leaves(found))
    ours = dict(leaves(expected))
    wrong += [f"{path}: missing" for path in ours if path not in theirs]
    wrong += [f"{path}: unexpected" for path in theirs if path not in ours]
    for path, leaf in ours.items():
        if len(wrong) >= limit:
            break
        if path in theirs and (problem := _difference(leaf, theirs[path])):
            wrong.append(f"{path}: {problem}")
    return wrong[:limit]


def _difference(expected: Any, found: Any) -> str:
    if not is_tensor(expected):
        same = type(expected) is type(found) and expected == found
        return "" if same else f"expected {expected!r:.60}, found {found!r:.60}"
    if not is_tensor(found):
        return f"expected a tensor, found {type(found).__name__}"
    mine, other = (str(t.dtype).removeprefix("torch.") for t in (expected, found))
    if mine != other or tuple(expected.shape) != tuple(found.shape):
        return f"expected {mine}{tuple(expected.shape)}, found {other}{tuple(found.shape)}"
    return "" if np.array_equal(raw_bytes(expected), raw_bytes(found)) else "bytes differ"


def touch(obj: Any) -> int:
    """Read one byte of every page of every tensor, so that nothing stays merely promised."""
    seen = 0
    for tensor in tensors(obj):
        flat = raw_bytes(tensor)
        if len(flat):
            seen |= int(flat[::PAGE].max()) | int(flat[-1])
    return seen
