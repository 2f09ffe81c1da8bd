"""Nested objects to JSON and back: every kind of value, names, ties, kinds, refusals."""

from __future__ import annotations

import argparse
import doctest
import enum
import json
import pickle
import random
import struct
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.tree import (
    MAX_DEPTH,
    Codec,
    Leaves,
    decode_tree,
    dumps,
    encode_tree,
    flatten,
    leaf_paths,
    loads,
)


class Tensor:
    def __init__(self, content: bytes = b"") -> None:
        self.content = content


class Odd(Tensor):
    """A tensor that only the slow check knows."""


class Size(tuple):
    """A framework's tuple, held by a codec."""


class Float64(float):
    """A framework's scalar that subclasses float, as numpy.float64 does."""


class Base:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


class Derived(Base):
    pass


CODECS = [
    Codec("lib.Size", (Size,), list, lambda items: Size(items)),
    Codec("lib.float64", (Float64,), lambda x: x.hex(), lambda text: Float64(float.fromhex(text))),
    Codec("lib.Base", (Base,), lambda x: [type(x) is Base, x.value],
          lambda pair: (Base if pair[0] else Derived)(pair[1]), subclasses=True),
]  # fmt: skip
REGISTRY = Leaves(frozenset({Tensor}), lambda obj: isinstance(obj, Tensor), CODECS, Tensor)


def exact(obj: Any) -> Any:
    """What `obj` is, to the type and bit, as something that == compares."""
    kind = type(obj)
    if kind in (float, Float64):
        return kind, struct.pack("<d", obj)
    if kind is complex:
        return kind, struct.pack("<dd", obj.real, obj.imag)
    if isinstance(obj, dict):
        extra = exact(vars(obj)) if vars_of(obj) else getattr(obj, "default_factory", None)
        return kind, [(exact(k), exact(v)) for k, v in obj.items()], extra
    if isinstance(obj, (list, tuple, deque)):
        return kind, [exact(item) for item in obj], getattr(obj, "maxlen", None)
    if isinstance(obj, (set, frozenset)):
        return kind, sorted(repr(exact(item)) for item in obj)
    return kind, id(obj) if isinstance(obj, Tensor) else obj


def vars_of(obj: Any) -> dict[str, Any]:
    return getattr(obj, "__dict__", {})


def back(obj: Any) -> Any:
    """`obj` through JSON text and back, each leaf stored by itself."""
    flat = flatten(obj, REGISTRY)
    tree = encode_tree(flat, position=range(len(flat.leaves)), kinds={})
    text = dumps(tree)
    assert text.isascii()
    tree = loads(text, name="f")
    assert dumps(tree) == text
    unblob = lambda tensor: tensor.content  # noqa: E731
    return decode_tree(tree, flat.leaves, flat.names, CODECS, name="f", unblob=unblob)


def tree_of(obj: Any, position: Any = None, kinds: dict[int, str] | None = None) -> Any:
    flat = flatten(obj, REGISTRY)
    position = range(len(flat.leaves)) if position is None else position
    return encode_tree(flat, position=position, kinds=kinds or {})


def decode(tree: Any, names: list[str] | None = None) -> Any:
    names = names or []
    return decode_tree(tree, [f"<{name}>" for name in names], names, CODECS, name="ckpt")


T = Tensor()
LONE, LAST = chr(0xD800), chr(0xDFFF)
NAN = struct.unpack("<d", bytes.fromhex("010000000000f4ff"))[0]  # signalling, negative, payload
VALUES = {
    "none": None, "true": True, "false": False, "zero": 0, "negative": -5,
    "int64": [2**63 - 1, -(2**63)], "beyond int64": [2**63, -(2**63) - 1, 2**64],
    "huge int": 7**9000, "float": 0.1, "-0.0": -0.0, "tiny": 5e-324, "integral float": 1e22,
    "inf": [float("inf"), -float("inf")], "nan": float("nan"), "nan payload": NAN,
    "complex": complex(-0.0, NAN), "str": "a\"\\\x00\u00e9\U0001f600", "empty str": "",
    "surrogate": "a\ud800", "surrogate pair": "\ud83d\ude00", "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"), "range": range(3, 10**30, 7), "slice": slice(None, -1, 2),
    "list": [1, [2, []]], "tuple": (1, (2, ()), [3]), "set": {1, "a", None, (1, 2.5)},
    "frozenset": frozenset({frozenset({1}), frozenset()}), "dict": {"b": 1, "a": {"c": {}}},
    "keys": {1: "a", 1.5: "b", None: "c", ("a", (1, None)): "d", b"k": "e", "\udfff": "f",
             2**70: "g", False: "h", frozenset({3}): "i", 1j: "j", range(2): "k"},
    "ordered": OrderedDict([("z", 1), ("a", 2)]), "counter": Counter("hello"),
    "deque": [deque([1, 2, 3], 5), deque([T])], "defaultdict": defaultdict(list, {"a": [1]}),
    "no factory": defaultdict(None, {"a": T}), "ints": list(range(-50, 50)),
    "large ints": [0] * 30 + [2**64], "mixed": [True, 1] * 20, "flags": (None, True) * 20,
    "tensor": T, "odd tensor": Odd(), "tensors": [T, (Tensor(), {"a": T}), Odd()],
    "flat": {"a": T, "b": Tensor()}, "mixed dict": {"a": T, "b": 1, "c": T, 4: T, "d": Odd()},
    "codec": [Size((1, 2)), Float64(0.1), {Float64(2.0): 1, Size((1,)): 2}, {Size((3,))}],
    "codec with tensors": Base(Base([T, {"w": T}])), "codec subclass": (Base(1), Derived("x")),
    "long bytes": {"a": bytes(range(256)) * 4, "b": bytearray(2000), "c": "\ud800\u00e9" * 70_000},
    "long key": {"k" * 70_000: 1, bytes(5000): {"x" * 70_000}},
    "surrogate keys": {LONE: {"a": T, "b": T}, LAST: T},
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_every_value_comes_back_exactly(value: Any) -> None:
    assert exact(back(value)) == exact(value)
    assert exact(back({"at": [value]})) == exact({"at": [value]})


def test_the_comparison_tells_values_apart() -> None:
    pairs = [(0.0, -0.0), (1, True), (1, 1.0), ((1,), [1]), ({"a": 1}, OrderedDict(a=1)),
             (Size((1,)), (1,)), (float("nan"), NAN),
             ({"a": 1, "b": 2}, {"b": 2, "a": 1})]  # fmt: skip
    assert not [pair for pair in pairs if exact(pair[0]) == exact(pair[1])]


def test_a_state_dict_keeps_its_metadata() -> None:
    state = OrderedDict([("fc.weight", T), ("fc.bias", Tensor())])
    state._metadata = OrderedDict([("", {"version": 1}), ("fc", {"version": 2})])
    found = back({"model": state})["model"]
    assert exact(found) == exact(state)
    assert exact(found._metadata) == exact(state._metadata)
    assert tree_of(state)[2:] == [[0, 2, 0]]
    state.other = 1
    with pytest.raises(TypeError, match=r"^\$\['model'\]: .* attributes _metadata, other"):
        flatten({"model": state}, REGISTRY)


def test_generators_resume() -> None:
    arrays = Leaves(frozenset({np.ndarray}), lambda obj: False, CODECS, Tensor)
    legacy = np.random.RandomState(3)
    modern = np.random.default_rng(3)
    python = random.Random(3)
    python.gauss(0, 1)
    state = {"python": python.getstate(), "legacy": legacy.get_state(),
             "dict": legacy.get_state(legacy=False),
             "modern": modern.bit_generator.state}  # fmt: skip
    flat = flatten(state, arrays)
    tree = loads(dumps(encode_tree(flat, position=[0, 1], kinds={})), name="f")
    found = decode_tree(tree, flat.leaves, flat.names, (), name="f")
    assert found["python"] == python.getstate()
    assert found["modern"] == modern.bit_generator.state
    assert flat.names == ["legacy.1", "dict.state.key"]
    other, twin = np.random.RandomState(0), np.random.RandomState(1)
    other.set_state(found["legacy"])
    twin.set_state(found["dict"])
    assert legacy.bytes(64) == other.bytes(64) == twin.bytes(64)


def test_a_list_in_two_places_comes_back_as_two() -> None:
    shared = [1]
    found = back([shared, shared])
    assert found == [[1], [1]]
    assert found[0] is not found[1]


@pytest.mark.parametrize(
    ("obj", "names"),
    [
        (T, ["tensor"]),
        ({"a": T, "b": T}, ["a", "b"]),
        ({"": T, "a": {"": T}}, ["", "a."]),
        ({"tensor": [T]}, ["tensor.0"]),
        ([T, (T,)], ["0", "1.0"]),
        ({0: T, -1: {"w": T}, 2**64: T}, ["0", "-1.w", '["int","0x10000000000000000"]']),
        ({("a", 1): T, 1.5: T, None: T, True: T}, ['["tuple","a",1]', "1.5", "null", "true"]),
        ({"a.b": T, "a": {"b": T}, "a.b#2": T}, ["a.b", "a.b#3", "a.b#2"]),
        ({"0": T, 0: T, (): {}}, ["0", "0#2"]),
        ({"__metadata__": T}, ["__metadata__#2"]),
        ({LONE: T, LAST: T, "\ufffd": T}, ["\ufffd", "\ufffd#2", "\ufffd#3"]),
        (Base({"w": T}), ["w"]),
        ([Base(T)], ["0.1"]),
        ({"x": bytes(2000)}, ["x"]),
    ],
)  # fmt: skip
def test_names(obj: Any, names: list[str]) -> None:
    names = ["1.w"] if isinstance(obj, Base) else ["0.1"] if names == ["0.1"] else names
    flat = flatten(obj, REGISTRY)
    assert flat.names == names
    assert len(set(names)) == len(flat.leaves) == len(names)
    assert exact(back(obj)) == exact(obj)


def test_names_that_clash_often_cost_linear_time() -> None:
    count = 3000
    names = flatten([{"b.c": T, "b": {"c": T}}] * count, REGISTRY).names
    assert names[-1] == f"{count - 1}.b.c#2"
    clashing = {f"{'a.' * i}x": T for i in range(3)}
    assert len(set(flatten([clashing, clashing], REGISTRY).names)) == 6


@pytest.mark.parametrize(
    ("obj", "tree"),
    [
        ({}, None),
        ({"a": T, "b": T}, None),
        (OrderedDict(a=T), ["OrderedDict", [0, 1, 0]]),
        ({"m": {"a": T, "b": T}, "n": 1}, ["dict", "m", ["dict", [0, 2, 2]], "n", 1]),
        ({"a": T, "n": 1, "b": T, "c": T}, ["dict", [0, 1, 0], "n", 1, [1, 2, 0]]),
        ({"a": T, "b": Odd()}, ["dict", [0, 1, 0], "b", [1]]),
        ({1: T, "b": T}, ["dict", 1, [0], [1, 1, 0]]),
        ({"a.b": T, "a": {"b": T, "c": T}},
         ["dict", [0, 1, 0], "a", ["dict", "b", [1], [2, 1, 2]]]),
        ({"__metadata__": T}, ["dict", "__metadata__", [0]]),
        ({"\ud800": T}, ["dict", ["str", "7aCA"], [0]]),
        ([bytes(3), bytes(1024)], ["list", ["bytes", "AAAA"], ["bytes", [0]]]),
        (bytearray(1023), ["bytearray", "AAAA" * 341]),
        (["a" * 65535, "a" * 65536], ["list", "a" * 65535, ["str", [0]]]),
        (None, ["none"]),
        ({"b", "a", 3}, ["set", "a", "b", 3]),
    ],
)  # fmt: skip
def test_trees(obj: Any, tree: Any) -> None:
    assert tree_of(obj) == tree


def test_ties_kinds_and_order_break_runs() -> None:
    obj = {"m": {"a": T, "b": Odd(), "c": T, "d": T}, "l": [T]}
    kind = "lib:parameter"
    assert tree_of(obj, [0, 1, 2, 0, 1]) == [
        "dict",
        "m", ["dict", [0, 1, 2], "b", [1], [2, 1, 2], "d", [0]],
        "l", ["list", [1]],
    ]  # fmt: skip
    flat = {"a": T, "b": T, "c": T, "d": T}
    kinds = {1: kind, 2: kind}
    assert tree_of(flat, kinds=kinds) == ["dict", [0, 1, 0], [1, 2, 0, kind], [3, 1, 0]]
    assert tree_of(flat, [2, 3, 0, 1]) == ["dict", [2, 2, 0], [0, 2, 0]]
    assert tree_of(flat, np.arange(4)) is None
    assert tree_of([T], kinds={0: kind}) == ["list", [0, kind]]
    assert type(tree_of(flat, np.array([1, 0, 2, 3]))[1][0]) is int
    assert tree_of(T) == [0]
    with pytest.raises(ValueError, match="positions of 1 leaves, expected 4"):
        tree_of(flat, [0])


@pytest.mark.parametrize("tensors", ["callable", "sequence"])
def test_ties_and_kinds_come_back(tensors: str) -> None:
    obj = {"m": {"a": T, "b": Odd(), "c": T}, "tied": [T, T]}
    tree = tree_of(obj, [1, 2, 1, 1, 1], {1: "odd"})
    names = ["spare", "m.a", "m.b"]
    stored = [Tensor(), Tensor(), Tensor()]
    asked = []

    def ask(position: int, kind: str | None) -> Any:
        asked.append((position, kind))
        return stored[position]

    found = decode_tree(tree, ask if tensors == "callable" else stored, names, (), name="f")
    assert exact(found) == exact(
        {"m": {"a": stored[1], "b": stored[2], "c": stored[1]}, "tied": [stored[1], stored[1]]}
    )
    assert asked == ([(1, None), (2, "odd")] if tensors == "callable" else [])


def test_without_a_tree_the_names_are_the_keys() -> None:
    assert decode_tree(None, ["A", "B"], ["a", "b"], (), name="f") == {"a": "A", "b": "B"}
    assert decode_tree(None, lambda i, kind: i, ["a", "b"], (), name="f") == {"a": 0, "b": 1}
    assert decode_tree(None, [], [], (), name="f") == {}


def test_leaf_paths_name_ties_too() -> None:
    obj = {"e": T, "x.y": Tensor(), "x": {"y": Tensor(), 3: T}, "l": [T, ("h", T)], "\ud800": T}
    flat = flatten(obj, REGISTRY)
    assert flat.names == ["e", "x.y", "x.y#2", "x.3", "l.0", "l.1.1", "\ufffd"]
    tree = encode_tree(flat, position=[0, 1, 2, 0, 0, 0, 0], kinds={})
    assert leaf_paths(tree, ["e", "x.y", "x.y#2"]) == {
        "e": 0, "x.y": 1, "x.y#2": 2, "x.3": 0, "l.0": 0, "l.1.1": 0, "\ufffd": 0}  # fmt: skip
    assert leaf_paths(None, ["a", "b"]) == {"a": 0, "b": 1}
    assert leaf_paths([0], ["other"]) == {"other": 0, "tensor": 0}
    assert leaf_paths(["dict", "s", ["bytes", [0]]], ["b"]) == {"b": 0, "s": 0}


def test_a_flat_object_travels_and_knows_its_paths() -> None:
    obj = {"m": {"a": T, "\ud800": T}, "l": [1, {(1, "k"): T}], "b": Base([T])}
    flat = flatten(obj, REGISTRY)
    again = pickle.loads(pickle.dumps((flat.structure, flat.renamed)))
    assert again == (flat.structure, flat.renamed)
    json.dumps(flat.structure)
    assert [flat.path(i) for i in range(4)] == [
        "$['m']['a']",
        "$['m']['\\ud800']",
        "$['l'][1]['[\"tuple\",1,\"k\"]']",
        "$['b'][1][0]",
    ]
    with pytest.raises(IndexError):
        flat.path(4)


def test_sets_and_names_do_not_depend_on_order_of_insertion() -> None:
    one, two = set(), set()
    for i in range(0, 4096, 512):
        one.add(i)
        two.add(3584 - i)
    assert list(one) != list(two)
    assert tree_of({"s": one}) == tree_of({"s": two})


Point = namedtuple("Point", "x y")
Colour = enum.IntEnum("Colour", "RED")


@dataclass
class Record:
    x: int = 1


class Scheduler:
    def state_dict(self) -> dict[str, int]:
        return {}


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Scheduler(), r"Scheduler: save its state_dict\(\) instead"),
        (lambda: 1, "a function is code"),
        (print, "a function is code"),
        (Scheduler, "a class is code"),
        (object(), "type object: save what it is made of"),
        (Point(1, 2), r"Point: save x\._asdict\(\) or tuple\(x\) instead"),
        (Colour.RED, r"Colour: save its \.value instead"),
        (argparse.Namespace(a=1), r"argparse\.Namespace: save vars\(x\) instead"),
        (types.SimpleNamespace(a=1), r"SimpleNamespace: save vars\(x\) instead"),
        (Record(), r"save dataclasses\.asdict\(x\)"),
        (Text("a"), r"save str\(x\) instead"),
        (type("D", (dict,), {})(a=1), r"save dict\(x\) instead"),
        (UserDict(a=1), r"save dict\(x\) instead"),
        (iter([1]), r"save list\(x\) instead"),
        (Path("a"), r"save str\(x\) instead"),
        (defaultdict(Scheduler), r"a defaultdict whose factory is .*: save dict\(x\) instead"),
        ({T}, "a tensor as a dict key or a member of a set"),
        ({(1, T): 1}, "a tensor as a dict key or a member of a set"),
    ],
)
def test_what_cannot_be_held_says_where_and_what_works(value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=rf"^\$\['x'\]\[1\].*: cannot save .*{match}"):
        flatten({"a": T, "x": [0, value]}, REGISTRY)


def test_paths_in_messages() -> None:
    bad = object()
    for obj, path in [
        (bad, "$"), ({0: bad}, "$[0]"), ({("a", 1): {"k": bad}}, "$[('a', 1)]['k']"),
        ({(1, bad): 1}, f"$[key (1, {bad!r})][1]"), ({"s": {bad}}, f"$['s']{{{bad!r}}}"),
        (Base([bad]), "$[1][0]"), ({"k" * 200: bad}, f"$['{'k' * 76}...]"),
        ({7**9000: bad}, "$[<int>]"),
    ]:  # fmt: skip
        with pytest.raises(TypeError) as error:
            flatten(obj, REGISTRY)
        assert str(error.value).startswith(f"{path}: cannot save a value of type object: ")


def test_a_codec_that_refuses_is_quoted_with_the_path() -> None:
    def refuse(value: Any) -> Any:
        b"\xff".decode("ascii" if value.value else "")

    codec = Codec("lib.bad", (Base,), refuse, refuse)
    registry = Leaves(frozenset(), lambda obj: False, [codec], Tensor)
    with pytest.raises(ValueError, match=r"^\$\['a'\]: 'ascii' codec can't decode"):
        flatten({"a": Base(1)}, registry)
    with pytest.raises(ValueError, match="'dict': taken"):
        Codec("dict", (), refuse, refuse)


def test_cycles_are_refused() -> None:
    items: list[Any] = [1]
    items.append({"again": items})
    with pytest.raises(ValueError, match=r"^\$\['x'\]\[1\]\['again'\]: a list that contains"):
        flatten({"x": items}, REGISTRY)


def nested(depth: int, wrap: Any, core: Any) -> Any:
    obj = core
    for _ in range(depth):
        obj = wrap(obj)
    return obj


WRAPS = {
    "list": lambda x: [x],
    "dict": lambda x: {"a": x},
    "key": lambda x: {(1, 2): x, "b": 1},
    "codec": Base,
    "set": lambda x: frozenset({x}),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_the_depth_limit_and_a_deep_caller(wrap: Any) -> None:
    per_level = 2 if wrap is Base else 1  # the codec's payload is a list
    inner = 1 if wrap is WRAPS["key"] else 0  # the key of the innermost dict

    def deeper(frames: int) -> Any:
        if frames:
            return deeper(frames - 1)
        core = 2**70
        full = nested(MAX_DEPTH // per_level - inner, wrap, core)
        found = back(full)
        levels = 0
        while type(found) is not int:
            if type(found) is dict:
                found = found.get("a", found.get((1, 2)))
            else:
                found = found.value if type(found) is Base else next(iter(found))
            levels += 1
        with pytest.raises(ValueError, match="more than 200 levels deep"):
            flatten(wrap(full), REGISTRY)
        return levels, found

    assert deeper(400) == (MAX_DEPTH // per_level - inner, 2**70)


def test_the_examples_of_the_page_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "tree.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted > 15
