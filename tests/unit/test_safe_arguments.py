"""What SafeResolver's rules make of arguments and states that no program would have written."""

from __future__ import annotations

import argparse
import collections
import pathlib
from typing import Any

import numpy as np
import pytest

from holdfast.errors import FormatError, UnsafeError
from holdfast.safe import SafeResolver

# -- wild arguments --------------------------------------------------------------------------------

WILD: list[tuple[str, str, tuple[Any, ...]]] = [
    ("builtins", "bytearray", (10**12,)),
    ("builtins", "bytes", (10**12,)),
    ("builtins", "bytearray", ([1, 2],)),
    ("builtins", "complex", ("1j" * 1000,)),
    ("builtins", "complex", (10**400,)),
    ("builtins", "range", (0, 10, 0)),
    ("builtins", "range", (1 << 70,)),
    ("builtins", "slice", ("a", [], {})),
    ("builtins", "set", (range(10**9),)),
    ("builtins", "set", ({"a": 1},)),
    ("builtins", "set", ([[]],)),
    ("builtins", "frozenset", ("abc", 1)),
    ("_codecs", "encode", ("abc", "rot13")),
    ("_codecs", "encode", ("x" * 10, "idna")),
    ("_codecs", "encode", (b"abc", "zlib")),
    ("_codecs", "encode", ("abc", "latin1", "ignore")),
    ("_codecs", "encode", ("\u1234", "latin1")),
    ("collections", "OrderedDict", ([(1, 2, 3)],)),
    ("collections", "OrderedDict", (iter([]),)),
    ("collections", "OrderedDict", ([([], 1)],)),
    ("collections", "Counter", ([1, 2],)),
    ("collections", "Counter", ("a", "b")),
    ("collections", "defaultdict", (print,)),
    ("collections", "defaultdict", (np.ndarray,)),
    ("collections", "defaultdict", (int, {"a": 1})),
    ("collections", "deque", ((), -1)),
    ("collections", "deque", ((), 1 << 64)),
    ("collections", "deque", (range(10**9),)),
    ("datetime", "datetime", (b"\xff" * 10,)),
    ("datetime", "datetime", (b"\x07\xe8\x02\x1f\x00\x00\x00\x00\x00\x00",)),
    ("datetime", "datetime", (b"\x07\xe8\x02\x01\xff\x00\x00\x00\x00\x00",)),
    ("datetime", "datetime", (2020, 1, 1)),
    ("datetime", "datetime", (b"\x07\xe8\x02\x01\x00\x00\x00\x00\x00\x00", "UTC")),
    ("datetime", "date", (b"\x00\x00\x00\x00",)),
    ("datetime", "time", (b"\x1f\x3c\x00\x00\x00\x00",)),
    ("datetime", "timedelta", (1 << 62,)),
    ("datetime", "timedelta", (float("nan"),)),
    ("datetime", "timezone", (3,)),
    ("pathlib", "PosixPath", ("a\0b",)),
    ("pathlib", "PurePosixPath", (3,)),
    ("argparse", "Namespace", (1,)),
    ("numpy", "dtype", ("O,O", False, True)),
    ("numpy", "dtype", ("i4,f8", False, True)),
    ("numpy", "dtype", ([("a", "O")],)),
    ("numpy", "dtype", ("float64",)),
    ("numpy", "dtype", ("V99999999999", False, True)),
    ("numpy", "dtype", (np.generic,)),
    ("numpy", "dtype", (print,)),
    ("numpy", "dtype", ("f8", [], {})),
    ("numpy._core.multiarray", "_reconstruct", (np.ndarray, (10**12,), b"b")),
    ("numpy._core.multiarray", "_reconstruct", (np.ndarray, (0,), b"O")),
    ("numpy._core.multiarray", "_reconstruct", (np.matrix, (0,), b"b")),
    ("numpy._core.multiarray", "_reconstruct", (dict, (0,), b"b")),
    ("numpy._core.multiarray", "scalar", (np.dtype("f8"), b"1234567")),
    ("numpy._core.multiarray", "scalar", (np.dtype("O"), b"12345678")),
    ("numpy._core.multiarray", "scalar", ("f8", b"12345678")),
    ("numpy._core.numeric", "_frombuffer", (b"12", np.dtype("i4"), (1,), "C")),
    ("numpy._core.numeric", "_frombuffer", (b"", np.dtype("V0"), (10**15,), "C")),
    ("numpy._core.numeric", "_frombuffer", (b"12345678", np.dtype("O"), (1,), "C")),
    ("numpy._core.numeric", "_frombuffer", (b"1234", np.dtype("i4"), (-1,), "C")),
    ("numpy._core.numeric", "_frombuffer", (b"\2", np.dtype("?"), (1,), "C")),
    ("numpy._core.numeric", "_frombuffer", (b"1" * 4, np.dtype("i4"), (1,) * 65, "C")),
    ("torch", "Size", ((1.5,),)),
    ("torch", "Size", ((1 << 64,),)),
    ("torch", "Size", (range(10**9),)),
    ("torch", "Size", ((True,),)),
    ("torch", "device", ("cuda" * 100,)),
    ("torch", "device", ("cuda", 10**6)),
    ("torch", "device", ("cuda:0; rm",)),
    ("torch.serialization", "_get_layout", ("torch.load",)),
    ("torch.serialization", "_get_layout", ("sys",)),
]


@pytest.mark.parametrize("adapter", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("module", "name", "args"), WILD, ids=[f"{name}{i}" for i, (_, name, _) in enumerate(WILD)]
)
def test_wild_arguments(adapter: str, module: str, name: str, args: tuple[Any, ...]) -> None:
    if adapter == "torch":
        pytest.importorskip("torch")
    resolver = SafeResolver(adapter, name="a.pt")
    with pytest.raises(FormatError, match=name):
        resolver.call(resolver.find(module, name), args)


def nest(depth: int, width: int) -> tuple[Any, ...]:
    made: tuple[Any, ...] = ()
    for _ in range(depth):
        made = (made,) * width
    return made


@pytest.mark.parametrize("bomb", [nest(60, 2), nest(100_000, 1), (frozenset([nest(150, 1)]),) * 2])
def test_what_takes_too_long_to_hash(bomb: Any) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    heavy = type(bomb[0]) is not frozenset  # the last one is just light enough
    for kind in ("set", "frozenset"):
        if heavy:
            with pytest.raises(FormatError, match="more than"):
                resolver.call(resolver.find("builtins", kind), ([bomb],))
        else:
            resolver.call(resolver.find("builtins", kind), ([bomb],))
    for obj in (collections.OrderedDict(), collections.Counter(), collections.defaultdict()):
        if heavy:
            with pytest.raises(FormatError, match="more than"):
                resolver.update(obj, [("a", 1), (bomb, 1)])
    if heavy:
        with pytest.raises(FormatError, match="more than"):
            resolver.extend(set(), [bomb])
        del bomb  # whose end is deep, too


@pytest.mark.parametrize(
    "state",
    [
        {"__class__": 1},
        {"__dict__": {}},
        {"items": 1},
        {"keys": None},
        {3: 1},
        [("a", 1)],
        ({"a": 1}, {"b": 2}),
        None,
    ],
)
@pytest.mark.parametrize("kind", [collections.OrderedDict, argparse.Namespace])
def test_attributes_that_would_hide_methods(kind: type, state: Any) -> None:
    if kind is argparse.Namespace and state in ({"items": 1}, {"keys": None}):
        state = {"_get_kwargs": 1}
    resolver = SafeResolver("numpy", name="a.pt")
    obj = kind()
    with pytest.raises(FormatError):
        resolver.build(obj, state)
    assert type(obj) is kind and not obj.__dict__


def test_other_types_get_no_state() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    for obj in (collections.deque(), collections.Counter(), set(), pathlib.PurePath("a"), 3):
        with pytest.raises(UnsafeError, match="Can only build"):
            resolver.build(obj, {"a": 1})


ARRAY: list[Any] = [
    (1, (10**12,), np.dtype("i1"), False, b""),
    (1, (2, 3), np.dtype("f8"), False, b"x" * 47),
    (1, (-1,), np.dtype("i1"), False, b""),
    (1, (1 << 40, 1 << 40, 0), np.dtype("f8"), False, b"x"),
    (1, (1.0,), np.dtype("i1"), False, b"x"),
    (1, (1,) * 65, np.dtype("i1"), False, b"x"),
    (1, (1,), "i1", False, b"x"),
    (1, (1,), np.dtype("O"), False, b"12345678"),
    (1, (3,), np.dtype("O"), False, [1, 2]),
    (1, (1,), np.dtype([("a", "O")]), False, [1]),
    (1, (1,), np.dtype(("i4", (2,))), False, b"12345678"),
    (1, (0,), np.dtype("S2000000000"), False, b""),
    (1, (1,), np.dtype("?"), False, b"\x02"),
    (2, (1,), np.dtype("i1"), False, b"x"),
    (1, (1,), np.dtype("i1"), [], b"x"),
    (1, (1,), np.dtype("i1"), False, ["x"]),
    (1, (1,), np.dtype("U1"), False, "\u1234" * 4),
    "text",
    (),
]


@pytest.mark.parametrize("state", ARRAY, ids=range(len(ARRAY)))
def test_wild_states_of_arrays(state: Any) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    make = resolver.find("numpy._core.multiarray", "_reconstruct")
    array = resolver.call(make, (np.ndarray, (0,), b"b"))
    with pytest.raises(FormatError, match=r"^numpy\.ndarray: "):
        resolver.build(array, state)
    assert array.shape == (0,)  # type: ignore[attr-defined]


def test_an_array_gets_its_state_once() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    make = resolver.find("numpy._core.multiarray", "_reconstruct")
    array = resolver.call(make, (np.ndarray, (0,), b"b"))
    state = (1, (2,), np.dtype("i1"), False, b"ab")
    assert resolver.build(array, state) is array
    with pytest.raises(FormatError, match="complete"):
        resolver.build(array, state)
    with pytest.raises(FormatError, match="complete"):
        resolver.build(np.arange(3), state)


DTYPE: list[tuple[str, Any]] = [
    ("f8", (3, ">", None, None, None, 16, 1, 255)),
    ("f8", (3, "x", None, None, None, -1, -1, 0)),
    ("f8", (3, "<", None, ("a",), {"a": (np.dtype("i1"), 0)}, 8, 1, 0)),
    ("V4", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 4, 1, 0)),
    ("V8", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 4)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a",), {"a": (np.dtype("f4"), -4)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a",), {"a": ("f8", 0)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a", "a"), {"a": (np.dtype("f4"), 0)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a",), {}, 8, 1, 0)),
    ("V8", (3, "|", (np.dtype("f8"), (10**9,)), None, None, 8, 1, 0)),
    ("V8", (3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 63)),
    ("V8", (3, "|", (np.dtype("f8"), (-1,)), None, None, 8, 1, 0)),
    ("M8", (4, "<", None, None, None, -1, -1, 0, ({}, ("s, O", 1, 1, 1)))),
    ("M8", (4, "<", None, None, None, -1, -1, 0, ({}, (b"s", 1 << 40, 1, 1)))),
    ("M8", (4, "<", None, None, None, -1, -1, 0, ({}, ()))),
    ("f8", (1, "<", None)),
    ("f8", None),
]


@pytest.mark.parametrize(("text", "state"), DTYPE, ids=range(len(DTYPE)))
def test_wild_states_of_dtypes(text: str, state: Any) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    dtype = resolver.call(resolver.find("numpy", "dtype"), (text, False, True))
    if state == DTYPE[0][1]:  # the rest of it is what NumPy itself writes, whatever the file says
        assert resolver.build(dtype, state) == np.dtype(">f8")
        assert dtype.itemsize == 8  # type: ignore[attr-defined]
        return
    with pytest.raises(FormatError):
        resolver.build(dtype, state)
    assert dtype == np.dtype(text)


def test_the_dtypes_of_the_process_are_never_changed() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    state = (3, ">", None, None, None, -1, -1, 0)
    for args in [("f8", False, False), ("f8", 0), ("f8",), (np.float64,)]:
        dtype = resolver.call(resolver.find("numpy", "dtype"), args)
        assert dtype is not np.dtype("f8")
        resolver.build(dtype, state)
    with pytest.raises(FormatError, match="complete"):
        resolver.build(np.dtype("f8"), state)
    with pytest.raises(FormatError, match="complete"):
        resolver.build(dtype, state)
    assert np.dtype("f8").isnative


def test_records_do_not_nest_without_end() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    part: Any = resolver.call(resolver.find("numpy", "dtype"), ("V4", False, True))
    resolver.build(part, (3, "|", None, ("a",), {"a": (np.dtype("i4"), 0)}, 4, 1, 0))

    def wrapped(part: Any) -> Any:
        outer = resolver.call(resolver.find("numpy", "dtype"), ("V4", False, True))
        return resolver.build(outer, (3, "|", None, ("a",), {"a": (part, 0)}, 4, 1, 0))

    for _ in range(15):
        part = wrapped(part)
    with pytest.raises(FormatError, match="deeper than 16"):
        wrapped(part)


MILLION = bytes(1 << 20)


@pytest.mark.parametrize(
    ("module", "name", "args"),
    [
        ("builtins", "bytearray", (MILLION,)),
        ("builtins", "bytes", (bytearray(MILLION),)),
        ("_codecs", "encode", ("\0" * (1 << 20), "latin1")),
        ("builtins", "set", (list(range(1 << 16)),)),
        ("builtins", "frozenset", (list(range(1 << 16)),)),
        ("collections", "Counter", (dict.fromkeys(range(1 << 16)),)),
        ("collections", "OrderedDict", ([(i, None) for i in range(1 << 15)],)),
        ("collections", "deque", ([None] * (1 << 20),)),
        ("numpy._core.numeric", "_frombuffer", (MILLION, np.dtype("u1"), (1 << 20,), "C")),
    ],
)
def test_what_is_made_of_the_same_thing_again_and_again(
    module: str, name: str, args: tuple[Any, ...]
) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    make = resolver.find(module, name)

    def repeat() -> None:
        for _ in range(1 << 12):
            resolver.call(make, args)

    with pytest.raises(FormatError, match="copies of the same things"):
        repeat()


def test_states_that_are_set_again_and_again() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    state = {f"x{i}": None for i in range(1 << 14)}
    array = (1, (1 << 20,), np.dtype("u1"), False, MILLION)
    make = resolver.find("numpy._core.multiarray", "_reconstruct")

    def namespaces() -> None:
        for _ in range(1 << 12):
            resolver.build(argparse.Namespace(), state)

    def arrays() -> None:
        for _ in range(1 << 12):
            resolver.build(resolver.call(make, (np.ndarray, (0,), b"b")), array)

    for repeat in (namespaces, arrays):
        with pytest.raises(FormatError, match="copies of the same things"):
            repeat()
