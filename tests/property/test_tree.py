"""Any object round trips; any JSON is an object or a FormatError."""

from __future__ import annotations

import copy
import struct
from collections import Counter, OrderedDict, deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast._tree_decode import TAGS
from holdfast._tree_json import MAPPINGS
from holdfast.errors import FormatError
from holdfast.tree import (
    Codec,
    Flat,
    Leaves,
    decode_tree,
    dumps,
    encode_tree,
    flatten,
    leaf_paths,
    loads,
    walk,
)


class Tensor:
    def __init__(self, content: bytes = b"") -> None:
        self.content = content


class Size(tuple):
    pass


TEXTS = ["bytes", "bytearray", "str"]
CODECS = [Codec("lib.Size", (Size,), list, lambda items: Size(items))]
REGISTRY = Leaves(frozenset({Tensor}), lambda obj: False, CODECS, Tensor)

floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
texts = st.text(st.characters(codec=None, categories=None), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**4000])
    | floats
    | st.sampled_from([0.0, -0.0, float("inf"), -float("inf"), 1e308, 5e-324])
    | texts
    | st.sampled_from(["__metadata__", "tensor", "a.b", "a", "b", "0", "a#2"])
    | st.binary(max_size=8)
    | st.builds(complex, floats, floats)
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
)
hashables = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(inner, max_size=3)
        | st.lists(inner, max_size=3).map(Size)
    ),
    max_leaves=5,
)
short_leaves = (
    scalars | st.builds(Tensor) | st.builds(Tensor) | st.builds(bytearray, st.binary(max_size=5))
)
leaves = short_leaves | st.binary(min_size=1024, max_size=1030)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=4)
    pairs = st.lists(st.tuples(hashables, inner), max_size=4)
    named = st.lists(st.tuples(texts, st.builds(Tensor)), max_size=4)
    return (
        items
        | items.map(tuple)
        | items.map(Size)
        | st.builds(deque, items, st.none() | st.integers(4, 9))
        | st.sets(hashables, max_size=4)
        | pairs.map(dict)
        | named.map(dict)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner)
        | pairs.map(OrderedDict)
        | st.builds(with_metadata, named, inner)
        | st.dictionaries(hashables, inner, max_size=3).map(counter)
    )


def with_metadata(pairs: list[tuple[str, Any]], metadata: Any) -> OrderedDict[str, Any]:
    state = OrderedDict(pairs)
    state._metadata = metadata
    return state


def counter(items: dict[Any, Any]) -> Counter[Any]:
    made: Counter[Any] = Counter()
    dict.update(made, items)
    return made


objects = st.recursive(leaves, containers, max_leaves=25)
#: Without long bytes, whose tensors cannot be tied to others.
plain_objects = st.recursive(short_leaves, containers, max_leaves=25)


def exact(obj: Any) -> Any:
    """What `obj` is, to the type and bit, as something that == compares."""
    kind = type(obj)
    if kind is float:
        return kind, struct.pack("<d", obj)
    if kind is complex:
        return kind, struct.pack("<dd", obj.real, obj.imag)
    if isinstance(obj, dict):
        extra = exact(vars(obj)) if getattr(obj, "__dict__", None) else None
        return kind, [(exact(key), exact(value)) for key, value in obj.items()], extra
    if isinstance(obj, (list, tuple, deque)):
        return kind, [exact(item) for item in obj], getattr(obj, "maxlen", None)
    if isinstance(obj, (set, frozenset)):
        return kind, sorted(repr(exact(item)) for item in obj)
    if kind is int:
        return kind, hex(obj)
    return kind, id(obj) if kind is Tensor else obj


def stored(flat: Flat, data: st.DataObject) -> tuple[list[int], list[str], dict[int, str]]:
    """Some leaves tied, the stored ones in some order: positions, stored names, and kinds."""
    count = len(flat.leaves)
    groups = data.draw(st.lists(st.integers(0, count), min_size=count, max_size=count))
    first: dict[int, int] = {}
    for leaf, group in enumerate(groups):
        first.setdefault(group, leaf)
    chosen = list(first.values())
    if data.draw(st.booleans()):
        chosen = data.draw(st.permutations(chosen))
    place = {leaf: position for position, leaf in enumerate(chosen)}
    leaf_numbers = st.integers(0, max(count - 1, 0))
    kinds = data.draw(st.dictionaries(leaf_numbers, st.sampled_from(["k", "l"]), max_size=count))
    return [place[first[group]] for group in groups], [flat.names[leaf] for leaf in chosen], kinds


@given(objects)
@settings(deadline=None, max_examples=300)
def test_objects_come_back_exactly(obj: Any) -> None:
    flat = flatten(obj, REGISTRY)
    assert len(set(flat.names)) == len(flat.names) == len(flat.leaves)
    assert "__metadata__" not in flat.names
    "".join(flat.names).encode()
    tree = encode_tree(flat, position=range(len(flat.leaves)), kinds={})
    text = dumps(tree)
    again = flatten(obj, REGISTRY)
    assert again.names == flat.names
    assert dumps(encode_tree(again, position=range(len(flat.leaves)), kinds={})) == text
    tree = loads(text, name="f")
    assert dumps(tree) == text
    found = decode_tree(
        tree, flat.leaves, flat.names, CODECS, name="f", unblob=lambda tensor: tensor.content
    )
    assert exact(found) == exact(obj)
    assert leaf_paths(tree, flat.names) == {name: i for i, name in enumerate(flat.names)}


@given(plain_objects, st.data())
@settings(deadline=None, max_examples=200)
def test_ties_kinds_and_any_order_of_the_file(obj: Any, data: st.DataObject) -> None:
    flat = flatten(obj, REGISTRY)
    position, names, kinds = stored(flat, data)
    tree = loads(dumps(encode_tree(flat, position=position, kinds=kinds)), name="f")
    asked: dict[tuple[int, str | None], Tensor] = {}

    def ask(place: int, kind: str | None) -> Tensor:
        assert (place, kind) not in asked
        return asked.setdefault((place, kind), Tensor())

    found = decode_tree(tree, ask, names, CODECS, name="f")
    # Each leaf of the object is to be the tensor of its position and kind.
    expected = [asked[place, kinds.get(leaf)] for leaf, place in enumerate(position)]
    plain = encode_tree(flat, position=range(len(flat.leaves)), kinds={})
    assert exact(found) == exact(decode_tree(plain, expected, flat.names, CODECS, name="f"))
    assert len(asked) == len(set(map(id, expected)))
    paths = leaf_paths(tree, names)
    assert paths.items() >= {name: i for i, name in enumerate(names)}.items()
    for name, place in zip(flat.names, position, strict=True):
        assert "#" in name or name in names or paths[name] == place


json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.sampled_from(["0x1f", "7ff8000000000001", "aGk=", "a", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.builds(
            lambda tag, rest: [tag, *rest],
            st.sampled_from([*sorted(TAGS), *sorted(MAPPINGS), *TEXTS, "lib.Size", "unknown"]),
            st.lists(inner | st.lists(st.integers(-1, 6), min_size=1, max_size=4), max_size=5),
        )
    ),
    max_leaves=30,
)


def check_hostile(tree: Any, names: list[str]) -> None:
    asked = set()

    def ask(place: int, kind: str | None) -> Tensor:
        asked.add((place, kind))
        return Tensor(b"content")

    message = "ckpt: tree"
    try:
        decode_tree(tree, ask, names, CODECS, name="ckpt", unblob=lambda tensor: tensor.content)
    except FormatError as error:
        message = str(error)
    assert message.startswith("ckpt: tree")
    leaf_paths(tree, names)
    if tree is None:
        return
    seen = set()
    for _, node in walk(tree):
        count = node[1] if len(node) > 2 and type(node[1]) is int else 1
        kind = node[-1] if type(node[-1]) is str else None
        seen.update((place, kind) for place in range(node[0], node[0] + min(count, 100)))
    assert asked <= seen


@given(json)
@settings(deadline=None, max_examples=500)
def test_any_json_is_an_object_or_an_error(tree: Any) -> None:
    check_hostile(tree, ["a", "b.c", "b.d", "e", "f"])


def arrays(tree: Any) -> list[list[Any]]:
    found = [tree] if isinstance(tree, list) else []
    for array in found:
        found.extend(child for child in array if isinstance(child, list))
    return found


@given(objects, st.data())
@settings(deadline=None, max_examples=300)
def test_mutated_trees_are_objects_or_errors(obj: Any, data: st.DataObject) -> None:
    flat = flatten(obj, REGISTRY)
    tree = encode_tree(flat, position=range(len(flat.leaves)), kinds={})
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        nodes = [array for array in arrays(tree) if array]
        if not nodes:
            break
        node = data.draw(st.sampled_from(nodes))
        at = data.draw(st.integers(0, len(node) - 1))
        change = data.draw(st.integers(0, 3))
        if change == 0:
            del node[at]
        elif change == 1:
            node[at] = data.draw(json)
        elif change == 2:
            node.insert(at, copy.deepcopy(data.draw(st.sampled_from(nodes))))
        else:
            node[at] = copy.deepcopy(data.draw(st.sampled_from(nodes)))
    check_hostile(tree, flat.names)
