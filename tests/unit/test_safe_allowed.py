"""Nested classes and methods: what a caller allows is reached by getattr, and nothing else is."""

from __future__ import annotations

import datetime
import enum
import os
import pickle
import zoneinfo
from typing import Any

import pytest

from holdfast.errors import FormatError, UnsafeError
from holdfast.safe import SafeResolver
from slow_machine import replay


class Outer:
    """What a caller allows."""

    class Nested:
        """Allowed or not."""

        class Inner:
            """One level more."""

        def method(self) -> str:
            return "called"

    system = staticmethod(os.system)
    table: dict[str, Any] = {}

    @classmethod
    def make(cls, *args: Any) -> Any:
        return (cls, *args)

    @property
    def run(self) -> Any:
        raise AssertionError("a property was asked for")


class Sub(Outer):
    """Inherits a class method that is allowed for its base."""


class Color(enum.Enum):
    RED = 1


def resolver(*allowed: Any) -> SafeResolver:
    return SafeResolver("numpy", safe_globals=[getattr, *allowed], name="a.pt")


def reached(made: SafeResolver, owner: Any, name: Any, *more: Any) -> Any:
    owner = made.find(__name__, owner) if type(owner) is str else owner
    return made.call(made.find("builtins", "getattr"), (owner, name, *more))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_nested_classes(protocol: int) -> None:
    data = pickle.dumps({"a": Outer.Nested(), "b": [Outer.Nested]}, protocol)
    full = f"{__name__}.Outer.Nested"
    for allowed in ([], [Outer]):
        with pytest.raises(UnsafeError, match="Nested|GLOBAL getattr|GLOBAL .*Outer"):
            replay(data, resolver(*allowed))
    with pytest.raises(UnsafeError, match=rf"GLOBAL {full} was not .*safe_globals=\[{full}\]"):
        replay(data, resolver(Outer))
    got = replay(data, resolver(Outer, Outer.Nested))
    assert type(got["a"]) is Outer.Nested and got["b"] == [Outer.Nested]


def test_getattr_itself_has_to_be_allowed() -> None:
    made = SafeResolver("numpy", safe_globals=[Outer, Outer.Nested], name="a.pt")
    with pytest.raises(UnsafeError, match="GLOBAL getattr was not an allowed"):
        made.find("builtins", "getattr")
    with pytest.raises(UnsafeError, match=r"unrecognized function builtins\.getattr"):
        made.call(getattr, (Outer, "Nested"))


def test_each_level_has_to_be_allowed() -> None:
    made = resolver(Outer, Outer.Nested.Inner)
    with pytest.raises(UnsafeError, match="Nested was not an allowed"):
        reached(made, "Outer", "Nested")
    made = resolver(Outer, Outer.Nested, Outer.Nested.Inner)
    inner = reached(made, reached(made, "Outer", "Nested"), "Inner")
    assert type(made.new(inner, (), {})) is Outer.Nested.Inner


def test_members_of_an_enum() -> None:
    assert reached(resolver(Color), "Color", "RED") is Color.RED
    with pytest.raises(UnsafeError, match=r"Color\._member_map_ was not"):
        reached(resolver(Color), "Color", "_member_map_")


def test_methods_by_function_and_object() -> None:
    made = resolver(Outer, Sub, Outer.make)
    assert made.call(reached(made, "Outer", "make"), (1,)) == (Outer, 1)
    with pytest.raises(UnsafeError, match=r"Sub\.make was not an allowed"):
        reached(made, "Sub", "make")
    with pytest.raises(UnsafeError, match=r"a method of .*Sub, .*Outer\.make"):
        made.call(Sub.make, ())
    with pytest.raises(UnsafeError, match=r"Outer\.make was not an allowed"):
        reached(resolver(Outer), "Outer", "make")
    bound = Outer.Nested().method
    with pytest.raises(UnsafeError, match="unrecognized function a method of a Nested"):
        resolver(Outer.Nested.method).call(bound, ())


def test_methods_in_c() -> None:
    moment = datetime.datetime(2025, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC"))
    data = pickle.dumps(moment, 2)
    with pytest.raises(UnsafeError, match=r"_unpickle.*zoneinfo\.ZoneInfo"):
        replay(data, resolver(zoneinfo.ZoneInfo))
    found = replay(data, resolver(zoneinfo.ZoneInfo, zoneinfo.ZoneInfo._unpickle))  # type: ignore[attr-defined]
    assert found == moment and type(found.tzinfo) is zoneinfo.ZoneInfo
    made = resolver(zoneinfo.ZoneInfo._unpickle)  # type: ignore[attr-defined]
    with pytest.raises(UnsafeError, match="unrecognized function .*from_file"):
        made.call(zoneinfo.ZoneInfo.from_file, ())
    kind = made.find("datetime", "datetime")
    with pytest.raises(FormatError, match="its time zone is a ZoneInfo"):
        made.call(kind, (moment.__reduce__()[1][0], zoneinfo.ZoneInfo("UTC")))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("Outer", "__dict__"),
        ("Outer", "__subclasses__"),
        ("Outer", "__init__"),
        ("Outer", "__class__"),
        ("Outer", "mro"),
        ("Outer", "table"),
        ("Outer", "system"),
        ("Outer", "make"),
        ("function", "__globals__"),
        ("function", "__code__"),
    ],
)
def test_what_attributes_would_lead_to(owner: str, name: str) -> None:
    made = resolver(Outer, pytest.raises, (reached, f"{__name__}.function"))
    with pytest.raises(UnsafeError):
        reached(made, owner, name)


def test_nothing_of_what_is_allowed_by_default_has_attributes() -> None:
    made = SafeResolver("numpy", safe_globals=[getattr], name="a.pt")
    for module, name in (
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
        ("builtins", "bytes"),
        ("numpy", "ndarray"),
        ("torch", "float32"),
        ("torch._utils", "_rebuild_parameter"),
        ("builtins", "getattr"),
    ):
        for attribute in ("call", "new", "fromhex", "tofile", "__globals__", "__self__", "real"):
            with pytest.raises((UnsafeError, FormatError)):
                reached(made, made.find(module, name), attribute)
    for value in (b"bytes", [], {}, 1, None, Outer()):
        with pytest.raises(UnsafeError, match="Trying to get the attribute"):
            reached(made, value, "run")


def test_modules_that_nothing_allows() -> None:
    made = resolver(Outer, Outer.system)
    with pytest.raises(UnsafeError, match="whose module posix is blocked|whose module nt is"):
        reached(made, "Outer", "system")
    with pytest.raises(UnsafeError, match="unrecognized function"):
        made.call(os.system, ("true",))
    renamed = resolver((reached, "os.reached"))
    with pytest.raises(UnsafeError, match="unrecognized function"):
        renamed.call(reached, ())


@pytest.mark.parametrize("args", [(), (Outer,), (Outer, 3), (Outer, "missing"), (Outer, "a", 1)])
def test_arguments_of_getattr(args: tuple[Any, ...]) -> None:
    made = resolver(Outer)
    made.find(__name__, "Outer")
    with pytest.raises(FormatError, match=r"builtins\.getattr"):
        made.call(made.find("builtins", "getattr"), args)


def test_what_has_rules_keeps_them() -> None:
    """To allow what is allowed already takes nothing away from the rules that it is under."""
    import numpy as np

    made = SafeResolver("numpy", safe_globals=[np.ndarray, bytes, datetime.date], name="a.pt")
    with pytest.raises(UnsafeError):
        made.new(made.find("numpy", "ndarray"), ((1 << 40,),), {})
    with pytest.raises(FormatError):
        made.call(made.find("builtins", "bytes"), (1 << 40,))
