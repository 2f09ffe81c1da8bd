"""Objects of classes that are not allowed: what a pickle says of them, with nothing of it run."""

from __future__ import annotations

from typing import Any

from .errors import FormatError, UnsafeError
from .formats._inert import Global, Record, brief
from .layout import Resolver

__all__ = ["LenientResolver"]


class LenientResolver:
    """Makes inert records of the instances of classes that another resolver refuses.

    What that one refuses to call stays refused: it may be any function.

    Parameters
    ----------
    resolver : Resolver
    """

    __slots__ = ("_refused", "_resolver")

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._refused: dict[int, tuple[Global, UnsafeError]] = {}

    def find(self, module: str, name: str) -> object:
        """What a pickle means by ``module.name``; inert where it is refused."""
        try:
            return self._resolver.find(module, name)
        except UnsafeError as error:
            made = Global(module, name)
            self._refused[id(made)] = (made, error)
            return made

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func` makes."""
        if id(func) in self._refused:
            raise self._refused[id(func)][1]
        if type(func) is Record or type(func) is Global:
            raise FormatError(f"a call of {brief(func)}")
        return self._resolver.call(func, args)

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """An instance of `cls`, or a record of what it would be."""
        if type(cls) is Global or type(cls) is Record:
            return Record(cls, args, kwargs)
        return self._resolver.new(cls, args, kwargs)

    def build(self, obj: object, state: object) -> object:
        """`obj` with `state` set."""
        if type(obj) is Record:
            return obj.with_state(state)
        return self._resolver.build(obj, state)

    def extend(self, obj: object, items: list[Any]) -> None:
        """Append `items` to `obj`."""
        if type(obj) is Record:
            obj.items.extend(items)
        else:
            self._resolver.extend(obj, items)

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        """Set items of `obj`."""
        if type(obj) is Record:
            obj.pairs.extend(pairs)
        else:
            self._resolver.update(obj, pairs)
