"""How an object that no opcode is for is pickled: what ``pickle`` asks it, and globals by name."""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from _compat_pickle import REVERSE_IMPORT_MAPPING, REVERSE_NAME_MAPPING
from collections.abc import Iterable, Iterator
from pickle import PicklingError, whichmodule  # type: ignore[attr-defined]
from types import FunctionType
from typing import Any

__all__ = ["MixedError", "batches", "reduce_object"]

#: How many items one opcode adds, as in Python's pickler.
_BATCH = 1000

#: Whether a class is made with ``NEWOBJ``, function, arguments, state, items of a list, pairs of a
#: dict, and what sets the state; all as ``__reduce_ex__`` returns them.
Reduction = tuple[bool, Any, tuple[Any, ...], Any, Any, Any, Any]

_SINGLETONS = (None, NotImplemented, ...)


class MixedError(Exception):
    """A tensor of the first kind was met after one of the second had been written as a tensor."""


def batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of what `items` gives, none of them empty, each as long as one opcode may add."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def reduce_object(obj: Any, protocol: int = 2) -> bytes | Reduction:
    """How protocol 2, or 4, says `obj`, which is neither atom, dict, list nor tuple.

    Returns
    -------
    bytes
        For a global: module and name as the opcode ``GLOBAL`` has them, each with a newline behind.
        Those of protocol 2 are what Python 2 called them.
    tuple
        For what a call makes, see ``Reduction``.

    Raises
    ------
    pickle.PicklingError, AttributeError, TypeError
        As Python's pickler does, for what cannot be pickled; and whatever the object raises itself.
    """
    kind = type(obj)
    if kind is set or kind is frozenset:
        return _call(kind, (list(obj),))
    if kind is bytearray:
        return _call(kind, (bytes(obj),) if obj else ())
    if kind is type or kind is FunctionType:
        return _name(obj, None, protocol)
    reducer = copyreg.dispatch_table.get(kind)
    if reducer is not None:
        found = reducer(obj)
    elif issubclass(kind, type):
        return _name(obj, None, protocol)
    else:
        found = obj.__reduce_ex__(protocol)
    if isinstance(found, str):
        return _name(obj, found, protocol)
    return _check(obj, found)


def _call(func: Any, args: tuple[Any, ...]) -> Reduction:
    return False, func, args, None, None, None, None


def _check(obj: Any, found: Any) -> Reduction:
    """What ``__reduce_ex__`` returned, in full."""
    if not isinstance(found, tuple):
        raise PicklingError("__reduce__ must return a string or tuple")
    if not 2 <= len(found) <= 6:
        raise PicklingError("tuple returned by __reduce__ must contain 2 through 6 elements")
    func, args, state, items, pairs, setter = (*found, None, None, None, None)[:6]
    if not isinstance(args, tuple):
        raise PicklingError("second item of the tuple returned by __reduce__ must be a tuple")
    if not callable(func):
        raise PicklingError("first item of the tuple returned by __reduce__ must be callable")
    name = getattr(func, "__name__", "")
    new = name == "__newobj__"
    if new or name == "__newobj_ex__":
        cls = args[0]
        if not hasattr(cls, "__new__"):
            raise PicklingError(f"args[0] from {name} args has no __new__")
        if obj.__class__ is not cls:
            raise PicklingError(f"args[0] from {name} args has the wrong class")
        if new:
            func, args = cls, args[1:]
        else:
            func, args = functools.partial(cls.__new__, cls, *args[1], **args[2]), ()
    return new, func, args, state, items, pairs, setter


def _name(obj: Any, name: str | None, protocol: int) -> bytes | Reduction:
    """A global: `name`, or that which `obj` has itself."""
    for single in _SINGLETONS:
        if obj is type(single):
            return _call(type, (single,))
    if name is None:
        name = str(getattr(obj, "__qualname__", None) or obj.__name__)
    parts = name.split(".")
    if "<locals>" in parts:
        raise AttributeError(f"Can't pickle local object {name!r}: define it in a module")
    module_name = whichmodule(obj, name)
    parent, found = _find(obj, module_name, parts)
    if found is not obj:
        raise PicklingError(
            f"Can't pickle {obj!r}: it's not the same object as {module_name}.{name}"
        )
    if protocol >= 4:
        return f"{module_name}\n{name}\n".encode("utf-8", "surrogatepass")
    if len(parts) > 1:  # a class in a class, which protocol 2 has no name for
        return _call(getattr, (parent, parts[-1]))
    if (module_name, name) in REVERSE_NAME_MAPPING:
        module_name, name = REVERSE_NAME_MAPPING[module_name, name]
    else:
        module_name = REVERSE_IMPORT_MAPPING.get(module_name, module_name)
    try:
        return f"{module_name}\n{name}\n".encode("ascii")
    except UnicodeEncodeError:
        raise PicklingError(
            f"can't pickle global identifier '{module_name}.{name}' using pickle protocol 2"
        ) from None


def _find(obj: Any, module_name: str, parts: list[str]) -> tuple[Any, Any]:
    """What the dotted name stands for in the module, and what it is an attribute of."""
    try:
        importlib.import_module(module_name)
        parent: Any = None
        found: Any = sys.modules[module_name]
        for part in parts:
            parent, found = found, getattr(found, part)
    except (ImportError, KeyError, AttributeError) as error:
        name = ".".join(parts)
        raise PicklingError(
            f"Can't pickle {obj!r}: attribute lookup {name} on {module_name} failed"
        ) from error
    return parent, found
