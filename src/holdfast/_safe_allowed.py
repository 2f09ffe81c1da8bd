"""What the caller of a load allows besides what is allowed by default."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

__all__ = ["BLOCKED", "Allowed", "full_name", "origin"]

#: Modules of which nothing is allowed, whatever the caller says.
BLOCKED = frozenset({"sys", "os", "posix", "nt"})


class Allowed:
    """The classes, functions and methods that a caller allows, and who registered them with torch.

    Parameters
    ----------
    safe_globals : iterable
        As :class:`holdfast.safe.SafeResolver` gets it.
    ruled : frozenset of int
        The ``id`` of what is allowed by default: that is bound to its rules, whoever else allows
        it, unless the file names it as the caller does.
    """

    __slots__ = ("_extra", "_methods", "_objects", "_registered", "_ruled")

    def __init__(self, safe_globals: Iterable[Any], ruled: frozenset[int]) -> None:
        self._extra = _by_name(safe_globals)
        self._ruled = ruled
        self._registered: dict[str, Any] | None = None
        # By their id: all are kept, so that the ids stay their own.
        self._objects: dict[int, Any] = {}
        self._methods: list[Any] = []

    def find(self, full: str) -> tuple[Any] | None:
        """What the caller allows under a name, in a tuple."""
        registered = self._settle()
        if full in self._extra:
            return (self._extra[full],)
        return (registered[full],) if full in registered else None

    def name(self, obj: Any) -> None:
        """Note that the file names `obj`, by a name under which the caller allows it."""
        self._objects[id(obj)] = obj

    def __contains__(self, obj: object) -> bool:
        """Whether the caller allows `obj` itself; of nothing that a file made is it asked."""
        self._settle()
        if id(obj) in self._objects:
            return True
        return _is_method(obj) and any(_same(obj, other) for other in self._methods)

    def _settle(self) -> dict[str, Any]:
        """What is registered with torch: read once, when something is first asked for."""
        if self._registered is None:
            serialization = sys.modules.get("torch.serialization")
            listed: Any = getattr(serialization, "get_safe_globals", tuple)()
            self._registered = _by_name(listed)
            for full, obj in (*self._registered.items(), *self._extra.items()):
                if id(obj) in self._ruled or origin(obj) in BLOCKED or _module(full) in BLOCKED:
                    continue
                self._objects[id(obj)] = obj
                if _is_method(obj):
                    self._methods.append(obj)
        return self._registered


_METHODS = (types.MethodType, types.BuiltinMethodType)


def _is_method(obj: object) -> bool:
    """Whether `obj` is a method; those of classes in C have a type of their own in Python 3.13."""
    return issubclass(type(obj), _METHODS)


def _same(method: Any, other: Any) -> bool:
    """Whether two methods, which are made anew each time, are one function of one object."""
    if type(method) is not type(other) or method.__self__ is not other.__self__:
        return False
    if type(method) is types.MethodType:
        return method.__func__ is other.__func__
    # Of functions in C only addresses are compared.
    return bool(method.__name__ == other.__name__ and method == other)


def _module(full: str) -> str:
    return full.partition(".")[0]


def origin(obj: Any) -> str | None:
    """The module that something says it is of."""
    found = getattr(obj, "__module__", None)
    if found is None and _is_method(obj) and isinstance(obj.__self__, type):
        found = getattr(obj.__self__, "__module__", None)
    return found if type(found) is str else None


def full_name(kind: type) -> str:
    """``module.Class``, without asking the class or its metaclass what it says of itself."""
    module = type.__dict__["__module__"].__get__(kind)
    return f"{module}.{type.__dict__['__qualname__'].__get__(kind)}"


def _by_name(allowed: Iterable[Any]) -> dict[str, Any]:
    """What a caller allows, by the name that files know it by."""
    found: dict[str, Any] = {}
    for entry in allowed:
        if isinstance(entry, tuple):
            if len(entry) != 2:
                raise ValueError(
                    "Expected tuple of length 2 (global, str of callable full path), but got "
                    f"tuple of length: {len(entry)}"
                )
            if type(entry[1]) is not str:
                raise TypeError(
                    "Expected second item in tuple to be str of callable full path, but got: "
                    f"{type(entry[1])}"
                )
            found[entry[1]] = entry[0]
            continue
        module, name = origin(entry), getattr(entry, "__qualname__", None)
        if module is None or type(name) is not str:
            raise TypeError(
                f"safe_globals: a {type(entry).__name__} is no class or function; pass what the "
                "error names, such as safe_globals=[package.Class], or (object, 'module.name')"
            )
        found[f"{module}.{name}"] = entry
    return found
