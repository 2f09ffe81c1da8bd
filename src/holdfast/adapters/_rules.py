"""What a pickle of a stranger may name, and what may be done with it.

A :class:`Table` lists every global that is allowed, each by its exact module and name. What can be
called has a :class:`Rule`, whose functions trust nothing in their arguments; what can be changed
once it is made has a :class:`Manner`. A rule raises ``ValueError``, ``TypeError`` and the like for
arguments that cannot be right, :class:`UnsafeRequestError` for what it must not do, and
:class:`LackingError` for what the framework asked for cannot hold.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "LackingError",
    "Making",
    "Manner",
    "Rule",
    "Table",
    "UnsafeRequestError",
    "attributes",
    "integers",
    "is_dunder",
    "one_of",
    "span",
    "weigh",
]

_MAX_DEPTH = 200
_MAX_NODES = 100_000
_LIMIT = 1 << 63
_SMALL = 512  # bytes from which on a copy is counted
#: Python and NumPy take these apart by recursion, one in another, without a limit.
_NESTING = (collections.defaultdict, collections.deque, np.ndarray)
_MAX_LEVELS = 200
_MAX_LATE = 1000
_MAX_COPIED = 1 << 28


class UnsafeRequestError(ValueError):
    """What a pickle asks for is not to be done."""


class LackingError(TypeError):
    """What a pickle asks for is right, and cannot be had without a framework."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A global that may be called.

    Attributes
    ----------
    name : str
        ``module.name``, for messages.
    call : callable or None
        What REDUCE does, given the arguments and a :class:`Making`.
    new : callable or None
        What NEWOBJ does; it takes no keywords.
    """

    name: str
    call: Callable[[tuple[Any, ...], Making], object] | None = None
    new: Callable[[tuple[Any, ...], Making], object] | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, slots=True)
class Manner:
    """How instances of exactly one type may be changed; None: not at all.

    Attributes
    ----------
    build : callable or None
        Sets the state of an object in place.
    extend : callable or None
        Appends a list of items.
    update : callable or None
        Sets pairs of keys and values.
    """

    build: Callable[[Any, Any, Making], None] | None = None
    extend: Callable[[Any, list[Any]], None] | None = None
    update: Callable[[Any, list[tuple[Any, Any]]], None] | None = None


@dataclass(slots=True)
class Making:
    """What the rules of one load share.

    Attributes
    ----------
    fresh : dict of int to object
        By their ``id``, objects that still wait for the one state that they may be given.
    extents : dict of int to (object, (int, int))
        By ``id``, how deep made dtypes nest, and how many parts they have; the object is kept so
        that its ``id`` stays its own.
    map_location : object
        As the caller of ``load`` gave it.
    call : callable or None
        Calls something that was found, under its rule.
    sources : dict of int to object
        By their ``id``, large objects that something was made of.
    copied : int
        Bytes that were made of objects that something had been made of already.
    levels : dict of int to (object, int, bool)
        By ``id``, how many levels of what nests are in an object, and whether it is in another.
    late : int
        Levels that came into what was in another already.
    trusted : callable
        Whether the caller allowed an object by ``safe_globals``.
    """

    fresh: dict[int, Any] = field(default_factory=dict)
    extents: dict[int, tuple[Any, tuple[int, int]]] = field(default_factory=dict)
    map_location: Any = None
    call: Callable[[Any, tuple[Any, ...]], object] | None = None
    sources: dict[int, Any] = field(default_factory=dict)
    copied: int = 0
    levels: dict[int, tuple[Any, int, bool]] = field(default_factory=dict)
    late: int = 0
    trusted: Callable[[object], bool] = lambda _: False

    def begin(self, obj: Any) -> Any:
        """`obj`, which may be given its state once."""
        self.fresh[id(obj)] = obj
        return obj

    def finish(self, obj: Any) -> None:
        """Note that `obj` is given its state now; ValueError where that is not its due."""
        if self.fresh.pop(id(obj), None) is not obj:
            raise ValueError(f"a state for a {type(obj).__name__} that is complete")

    def copies(self, source: Any, nbytes: int) -> None:
        """Note that `nbytes` are made of `source`; ValueError where that goes on without end.

        What is made of a thing once is as large as the file made it; but a few bytes of a pickle
        are enough to have it made of the same thing again.
        """
        if nbytes < _SMALL:
            return
        again = id(source) in self.sources
        self.sources[id(source)] = source  # kept, so that its id stays its own
        if again:
            self.grows(nbytes)

    def copy(self, obj: Any, nbytes: int) -> Any:
        """`obj`, a copy of `nbytes`: what is made of it is not made for the first time."""
        if nbytes >= _SMALL:
            self.sources[id(obj)] = obj
        return obj

    def grows(self, nbytes: int) -> None:
        """Note that `nbytes` are made that the file does not have; ValueError as for `copies`."""
        self.copied += nbytes
        if self.copied > _MAX_COPIED:
            raise ValueError(f"more than {_MAX_COPIED} bytes of copies of the same things")

    def nest(self, holder: Any, items: Iterable[Any]) -> None:
        """Note that `items` come into `holder`; ValueError where that is too deep to be freed.

        A pickle that was written puts together what is innermost first, so that the levels of an
        item are known. What comes later is counted in all: no chain is longer than both limits.
        """
        if type(holder) not in _NESTING:
            return
        below = 0
        for item in items:
            if type(item) not in _NESTING or (
                type(item) is np.ndarray and not item.dtype.hasobject and not self.pending(item)
            ):
                continue
            levels = self.levels[id(item)][1] if id(item) in self.levels else 0
            self.levels[id(item)] = item, levels, True
            below = max(below, levels + 1)
        if not below:
            return
        _, levels, inside = self.levels.get(id(holder), (holder, 0, False))
        self.late += below if inside else 0
        levels = max(levels, below)
        if levels > _MAX_LEVELS or self.late > _MAX_LATE:
            raise ValueError(f"more than {_MAX_LEVELS} levels of such objects, one in another")
        self.levels[id(holder)] = holder, levels, inside

    def pending(self, obj: Any) -> bool:
        """Whether `obj` still waits for its state."""
        return self.fresh.get(id(obj)) is obj


@dataclass(slots=True)
class Table:
    """Everything that is allowed, of one origin.

    Attributes
    ----------
    names : dict of (str, str) to object
        What a module and a name stand for: a value, a class, or, for a function, its rule.
    rules : dict of int to Rule
        The rule of a value of `names`, by its ``id``.
    manners : dict of type to Manner
    """

    names: dict[tuple[str, str], Any] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)
    manners: dict[type, Manner] = field(default_factory=dict)

    def value(self, module: str, name: str, value: object) -> None:
        """Allow a value, which can stand in the object and not be called."""
        self.names[module, name] = value

    def function(
        self, modules: str, name: str, call: Callable[[tuple[Any, ...], Making], object]
    ) -> None:
        """Allow calls of a function, in any of the `modules`; where it stands, its rule does."""
        rule = Rule(f"{modules.split()[0]}.{name}", call)
        for module in modules.split():
            self.names[module, name] = rule
        self.rules[id(rule)] = rule

    def kind(
        self,
        modules: str,
        name: str,
        value: object,
        call: Callable[[tuple[Any, ...], Making], object] | None = None,
        new: Callable[[tuple[Any, ...], Making], object] | None = None,
    ) -> None:
        """Allow a class, in any of the `modules`: as a value, and to make instances of."""
        for module in modules.split():
            self.names[module, name] = value
        if id(value) not in self.rules:
            self.rules[id(value)] = Rule(f"{modules.split()[0]}.{name}", call, new)

    def join(self, other: Table) -> None:
        """Allow what `other` does, too."""
        self.names.update(other.names)
        self.rules.update(other.rules)
        self.manners.update(other.manners)


def integers(value: Any, what: str, least: int = 0) -> tuple[int, ...]:
    """`value`, a tuple or a list of integers from `least` to 2**63, as a tuple."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{what} is a {type(value).__name__}, expected a tuple of integers")
    for number in value:
        if type(number) is not int:
            raise TypeError(f"{what} holds a {type(number).__name__}, expected integers")
        if not least <= number < _LIMIT:
            raise ValueError(f"{what} holds {_digits(number)}, expected {least} to 2**63 - 1")
    return tuple(value)


def one_of(value: Any, *choices: Any) -> bool:
    """Whether `value` is among `choices`, which are plain: nothing else is asked whether it is."""
    return type(value) in (str, bytes, int, bool) and value in choices


def _digits(number: int) -> str:
    # Python refuses to write integers of many digits, and would take long for them.
    return str(number) if number.bit_length() <= 128 else f"a number of {number.bit_length()} bits"


def span(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> int:
    """Elements that a strided view needs, from the first of its storage on; 0 for an empty one."""
    if len(size) != len(stride):
        raise ValueError(f"{len(size)} extents and {len(stride)} strides")
    if 0 in size:
        return 0
    return offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def weigh(obj: object) -> None:
    """Raise ValueError for a tuple or frozenset that takes too long to hash.

    Tuples are hashed as trees, even where the same one stands in many places, and by recursion
    without a limit: a hundred bytes of a pickle can keep Python busy for years, or crash it.
    """
    if not isinstance(obj, tuple | frozenset | np.void):
        return
    nodes, stack = 0, [(obj, 1)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, np.void):
            raise ValueError("a record as a key or as the element of a set")
        nodes += len(node)
        if nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(
                f"a key or the element of a set has more than {_MAX_NODES} items "
                f"or {_MAX_DEPTH} levels"
            )
        for item in node:
            if isinstance(item, tuple | frozenset | np.void):
                stack.append((item, depth + 1))


def is_dunder(name: str) -> bool:
    """Whether Python itself gives `name` a meaning (``__class__``)."""
    return name.startswith("__") and name.endswith("__")


def attributes(state: Any, owner: type, *, known: frozenset[str] | None = None) -> dict[str, Any]:
    """`state`, a dict of attributes that hide nothing that the class `owner` has.

    Parameters
    ----------
    state : object
        From the file.
    owner : type
    known : frozenset of str or None
        The names that must not be set, where those are not all that the class has.
    """
    if type(state) is not dict:
        raise TypeError(f"the state of a {owner.__name__} is a {type(state).__name__}, not a dict")
    for key in state:
        if type(key) is not str:
            raise TypeError(f"the name of an attribute is a {type(key).__name__}")
        if is_dunder(key) or (hasattr(owner, key) if known is None else key in known):
            raise UnsafeRequestError(
                f"attribute {key[:80]!r} of a {owner.__name__} would be replaced"
            )
    return state
