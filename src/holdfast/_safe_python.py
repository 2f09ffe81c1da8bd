"""Values of Python's standard library that a pickle of a stranger may hold."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import os
import pathlib
import types
from functools import cache
from typing import Any

from .adapters._rules import Making, Manner, Table, attributes, integers, weigh

__all__ = ["table"]

#: Codecs that bytes can have gone through on their way into a pickle; every other name would
#: import a module to look for one.
_CODECS = frozenset({"latin1", "latin-1", "iso-8859-1", "iso8859-1", "ascii", "utf-8", "utf8"})

#: Longest name of a file, and what paths are taken apart at, those of the other system too.
_MAX_NAME = 255
_SEPARATORS = frozenset("/\\:")

#: What an element of a defaultdict may be made with: each makes something empty.
_FACTORIES: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset),
    *(collections.OrderedDict, collections.Counter, collections.defaultdict, collections.deque),
)


@cache
def table() -> Table:
    """What is allowed of the standard library."""
    made = Table()
    _builtins(made)
    _collections(made)
    _datetime(made)
    _paths(made)
    made.kind("argparse", "Namespace", argparse.Namespace, _namespace, _namespace)
    made.manners[argparse.Namespace] = Manner(build=_build_namespace)
    made.kind("types", "SimpleNamespace", types.SimpleNamespace, _simple_namespace)
    made.manners[types.SimpleNamespace] = Manner(build=_build_namespace)
    return made


def _count(args: tuple[Any, ...], least: int, most: int) -> None:
    if not least <= len(args) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise TypeError(f"{len(args)} arguments, expected {wanted}")


# -- builtins --------------------------------------------------------------------------------------

_BUILTINS = "builtins __builtin__"


def _builtins(made: Table) -> None:
    made.function("_codecs", "encode", _encode)
    made.kind(_BUILTINS, "bytes", bytes, _bytes, _bytes)
    made.kind(_BUILTINS, "bytearray", bytearray, _bytearray, _bytearray)
    made.kind(_BUILTINS, "set", set, _members(set))
    made.kind(_BUILTINS, "frozenset", frozenset, _members(frozenset))
    made.kind(_BUILTINS, "complex", complex, _complex, _complex)
    made.kind(_BUILTINS, "slice", slice, _slice)
    made.kind("builtins", "range", range, _range)
    made.names["__builtin__", "xrange"] = range
    for kind in (bool, int, float, str, list, tuple, dict):
        for module in _BUILTINS.split():
            made.value(module, kind.__name__, kind)
    made.value("__builtin__", "long", int)
    made.value("__builtin__", "unicode", str)
    for name in ("Ellipsis", "NotImplemented"):
        for module in _BUILTINS.split():
            made.value(module, name, getattr(builtins, name))
    made.manners[set] = Manner(extend=_extend_set)


def _encode(args: tuple[Any, ...], making: Making) -> bytes:
    _count(args, 1, 2)
    text, codec = args if len(args) == 2 else (*args, "utf-8")
    if type(text) is not str or type(codec) is not str:
        raise TypeError("expected a text and the name of its encoding")
    if codec not in _CODECS:
        raise ValueError(f"encoding {codec[:40]!r}, expected latin1, ascii or utf-8")
    making.copies(text, len(text))
    return text.encode(codec)


def _bytes(args: tuple[Any, ...], making: Making) -> bytes:
    if not args:
        return b""
    if len(args) == 1 and type(args[0]) in (bytes, bytearray):
        making.copies(args[0], len(args[0]))
        return bytes(args[0])
    if len(args) == 2:
        return _encode(args, making)
    raise TypeError("expected nothing, bytes, or a text and the name of its encoding")


def _bytearray(args: tuple[Any, ...], making: Making) -> bytearray:
    made = bytearray(_bytes(args, making))
    making.copy(made, len(made))
    return made


def _members(kind: type) -> Any:
    def make(args: tuple[Any, ...], making: Making) -> Any:
        found = kind(_items(args, making))
        return making.copy(found, 64 * len(found))

    return make


def _items(args: tuple[Any, ...], making: Making) -> Any:
    """The items of a new set."""
    _count(args, 0, 1)
    if not args:
        return ()
    if type(args[0]) not in (list, tuple, set, frozenset):
        raise TypeError(f"made of a {type(args[0]).__name__}, expected a list")
    making.copies(args[0], 64 * len(args[0]))
    for item in args[0]:
        weigh(item)
    return args[0]


def _extend_set(obj: set[Any], items: list[Any]) -> None:
    for item in items:
        weigh(item)
    obj.update(items)


def _complex(args: tuple[Any, ...], _: Making) -> complex:
    _count(args, 0, 2)
    for part in args:
        if type(part) not in (float, int):
            raise TypeError(f"made of a {type(part).__name__}, expected floats")
    return complex(*args)


def _slice(args: tuple[Any, ...], _: Making) -> slice:
    _count(args, 1, 3)
    for part in args:
        if part is not None and (type(part) is not int or part.bit_length() > 64):
            raise TypeError("expected integers of 64 bits or None")
    return slice(*args)


def _range(args: tuple[Any, ...], _: Making) -> range:
    _count(args, 1, 3)
    return range(*integers(args, "a range", -(1 << 63)))


# -- collections -----------------------------------------------------------------------------------


def _collections(made: Table) -> None:
    ordered, counter = collections.OrderedDict, collections.Counter
    made.kind("collections", "OrderedDict", ordered, _ordered, _ordered)
    made.manners[ordered] = Manner(build=_build_ordered, update=_update)
    made.kind("collections", "Counter", counter, _counter)
    made.manners[counter] = Manner(update=_update)
    made.kind("collections", "defaultdict", collections.defaultdict, _defaultdict)
    made.manners[collections.defaultdict] = Manner(update=_update)
    made.kind("collections", "deque", collections.deque, _deque)
    made.manners[collections.deque] = Manner(extend=lambda obj, items: obj.extend(items))


def _update(obj: dict[Any, Any], pairs: list[tuple[Any, Any]]) -> None:
    for key, _ in pairs:
        if type(key) is not str:
            weigh(key)
    if isinstance(obj, collections.Counter):  # whose own update() would add
        dict.update(obj, pairs)
    else:
        obj.update(pairs)


def _ordered(args: tuple[Any, ...], making: Making) -> collections.OrderedDict[Any, Any]:
    _count(args, 0, 1)
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    if not args:
        return made
    pairs = args[0]
    if type(pairs) in (dict, list, tuple):
        making.copies(pairs, 128 * len(pairs))
    if type(pairs) is dict:
        pairs = list(pairs.items())
    if type(pairs) not in (list, tuple) or not all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
    ):
        raise TypeError("expected a list of pairs")
    _update(made, [tuple(pair) for pair in pairs])
    return made


def _build_ordered(obj: collections.OrderedDict[Any, Any], state: Any, making: Making) -> None:
    found = attributes(state, collections.OrderedDict)
    making.copies(state, 64 * len(found))
    obj.__dict__.update(found)


def _counter(args: tuple[Any, ...], making: Making) -> collections.Counter[Any]:
    _count(args, 0, 1)
    made: collections.Counter[Any] = collections.Counter()
    if args:
        if type(args[0]) is not dict:
            raise TypeError(f"made of a {type(args[0]).__name__}, expected a dict")
        making.copies(args[0], 64 * len(args[0]))
        dict.update(made, args[0])
    return made


def _defaultdict(args: tuple[Any, ...], _: Making) -> collections.defaultdict[Any, Any]:
    _count(args, 0, 1)
    factory = args[0] if args else None
    if factory is not None and not any(factory is kind for kind in _FACTORIES):
        raise TypeError("its factory is none of the types that make something empty")
    return collections.defaultdict(factory)


def _deque(args: tuple[Any, ...], making: Making) -> collections.deque[Any]:
    _count(args, 0, 2)
    items = args[0] if args else ()
    most = args[1] if len(args) == 2 else None
    if type(items) not in (list, tuple):
        raise TypeError(f"made of a {type(items).__name__}, expected a list")
    if most is not None:
        (most,) = integers((most,), "the greatest length")
    making.copies(items, 8 * len(items))
    made = collections.deque(items, most)
    making.nest(made, items)
    return made


# -- dates -----------------------------------------------------------------------------------------


def _datetime(made: Table) -> None:
    made.kind("datetime", "datetime", datetime.datetime, _moment)
    made.kind("datetime", "date", datetime.date, _date)
    made.kind("datetime", "time", datetime.time, _time)
    made.kind("datetime", "timedelta", datetime.timedelta, _timedelta)
    made.kind("datetime", "timezone", datetime.timezone, _timezone)


def _packed(value: Any, length: int) -> bytes:
    """The bytes that a date is pickled as; Python 2 made them a text."""
    if type(value) is str:
        value = value.encode("latin-1")
    if type(value) is not bytes or len(value) != length:
        raise TypeError(f"expected {length} bytes")
    return bytes(value)


def _zone(args: tuple[Any, ...], making: Making) -> datetime.tzinfo | None:
    zone = args[1] if len(args) == 2 else None
    if zone is None or type(zone) is datetime.timezone:
        return zone
    if not (isinstance(zone, datetime.tzinfo) and making.trusted(type(zone))):
        raise TypeError(f"its time zone is a {type(zone).__name__}, expected datetime.timezone")
    return zone


# The types themselves take bytes unchecked: dates that do not exist would come of them.
def _moment(args: tuple[Any, ...], making: Making) -> datetime.datetime:
    _count(args, 1, 2)
    packed = _packed(args[0], 10)
    high, low, month, day, hour, minute, second = packed[:7]
    return datetime.datetime(
        high << 8 | low,
        month & 0x7F,
        day,
        hour,
        minute,
        second,
        int.from_bytes(packed[7:], "big"),
        _zone(args, making),
        fold=month >> 7,
    )


def _date(args: tuple[Any, ...], _: Making) -> datetime.date:
    _count(args, 1, 1)
    high, low, month, day = _packed(args[0], 4)
    return datetime.date(high << 8 | low, month, day)


def _time(args: tuple[Any, ...], making: Making) -> datetime.time:
    _count(args, 1, 2)
    packed = _packed(args[0], 6)
    hour, minute, second = packed[:3]
    microsecond = int.from_bytes(packed[3:], "big")
    return datetime.time(
        hour & 0x7F, minute, second, microsecond, _zone(args, making), fold=hour >> 7
    )


def _timedelta(args: tuple[Any, ...], _: Making) -> datetime.timedelta:
    _count(args, 0, 3)
    return datetime.timedelta(*integers(args, "a timedelta", -(1 << 63)))


def _timezone(args: tuple[Any, ...], _: Making) -> datetime.timezone:
    _count(args, 1, 2)
    if type(args[0]) is not datetime.timedelta or not all(type(x) is str for x in args[1:]):
        raise TypeError("expected a timedelta and a name")
    return datetime.timezone(*args)


# -- paths and namespaces --------------------------------------------------------------------------


def _paths(made: Table) -> None:
    # Paths of the other system can be named there, but not made: their pure kind stands for them.
    windows = os.name == "nt"
    kinds: dict[str, type[pathlib.PurePath]] = {
        "PurePath": pathlib.PurePath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
        "Path": pathlib.Path,
        "PosixPath": pathlib.PurePosixPath if windows else pathlib.PosixPath,
        "WindowsPath": pathlib.WindowsPath if windows else pathlib.PureWindowsPath,
    }

    def path(kind: type[pathlib.PurePath]) -> Any:
        def make(args: tuple[Any, ...], making: Making) -> pathlib.PurePath:
            making.copies(args, 64 * len(args))
            for part in args:
                if type(part) is not str or "\0" in part:
                    raise TypeError("expected texts without NUL")
                # Names are not copied, and one may be in the paths of millions of files.
                if len(part) > _MAX_NAME or not _SEPARATORS.isdisjoint(part):
                    making.copies(part, 32 * len(part))
            return kind(*args)

        return make

    for name, kind in kinds.items():
        made.kind("pathlib pathlib._local", name, kind, path(kind))


def _namespace(args: tuple[Any, ...], _: Making) -> argparse.Namespace:
    _count(args, 0, 0)
    return argparse.Namespace()


def _simple_namespace(args: tuple[Any, ...], _: Making) -> types.SimpleNamespace:
    _count(args, 0, 0)
    return types.SimpleNamespace()


def _build_namespace(obj: Any, state: Any, making: Making) -> None:
    found = attributes(state, type(obj))
    making.copies(state, 64 * len(found))
    obj.__dict__.update(found)
