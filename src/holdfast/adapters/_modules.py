"""What the modules of PyTorch and OneFlow, whose classes are alike, do when they are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

from .base import Loader

__all__ = ["own_loader"]

_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
_TRACKED = "num_batches_tracked"


def own_loader(obj: Any, base: type, norm: type, stored: Container[str]) -> Loader | None:
    """``load_state_dict`` of a module for which it does more than to fill parameters and buffers.

    That is so where the module, or one in it, has hooks for it or methods of its own.

    Parameters
    ----------
    obj : object
    base : type
        The class of all modules.
    norm : type
        The class of batch normalization. Its own method makes up for the counter that versions
        before 0.4.1 of PyTorch did not have, and does nothing else.
    stored : container of str
        Names of the tensors that there are for the module.
    """
    if not isinstance(obj, base):
        return None
    root: Any = obj
    each = root.named_modules()
    if not any(_has_own(module, base, norm, prefix, stored) for prefix, module in each):
        return None

    how = _takes_strict(root.load_state_dict)

    def load(state: Mapping[str, Any], strict: bool) -> tuple[list[str], list[str]]:
        found = root.load_state_dict(state, **({"strict": strict} if how else {}))
        if not isinstance(found, tuple) or len(found) != 2:  # some return nothing
            return [], []
        return list(found[0]), list(found[1])

    return Loader(frozenset(root.state_dict()), load)


def _takes_strict(method: Callable[..., Any]) -> bool:
    """Whether a ``load_state_dict``, which a class may have written anew, can be told `strict`."""
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return True
    return "strict" in parameters or any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
    )


def _has_own(module: Any, base: type, norm: type, prefix: str, stored: Container[str]) -> bool:
    """Whether one module, called `prefix`, has hooks or methods of its own."""
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return True
    for method in _METHODS:
        own = getattr(type(module), method, None)
        if method in vars(module):
            return True
        if own is getattr(base, method, None):
            continue
        if own is not getattr(norm, method, None):
            return True
        counter = f"{prefix}.{_TRACKED}" if prefix else _TRACKED
        if getattr(module, _TRACKED, None) is not None and counter not in stored:
            return True
    return False
