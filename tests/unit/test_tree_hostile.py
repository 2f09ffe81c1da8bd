"""Trees that someone tampered with: refused with their place, in bounded time and memory."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import pytest

from holdfast.errors import FormatError
from holdfast.tree import Codec, decode_tree, leaf_paths, loads, walk
from patience import within

NAMES = ["m.a", "m.b", "x"]


def bad_codec(payload: Any) -> Any:
    return {}[payload]


CODECS = [Codec("lib.bad", (), bad_codec, bad_codec)]


def decode(tree: Any, names: list[str] = NAMES) -> Any:
    contents = [name.encode() for name in names]
    return decode_tree(tree, contents, names, CODECS, name="ckpt", unblob=bytes)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, ": no node: dict"),
        (float("nan"), ": no node: float"),
        (["list", 1, float("inf")], "[2]: no node: float"),
        ([], ": an array that starts with neither a tag nor a position"),
        (["list", [None]], "[1]: an array that starts with"),
        (["list", [True]], "[1]: an array that starts with"),
        (["list", [[0]]], "[1]: an array that starts with"),
        ([3], ": tensor 3, but the file has 3"),
        ([-1], ": tensor -1, but the file has 3"),
        (["list", 0, ["dict", "k", [10**30]]], "[2][2]: tensor 1000"),
        ([0, None], ": neither [position, kind] nor"),
        ([0, 1, 0], ": a run of tensors where no key"),
        (["list", [0, 1, 0]], "[1]: a run of tensors where no key"),
        (["dict", "k", [0, 1, 0]], "[2]: a run of tensors where no key"),
        (["defaultdict", [0, 1, 0]], "[1]: a run of tensors where no key"),
        (["state_dict", [0, 1, 0]], "[1]: a run of tensors where no key"),
        (["dict", [0, 4, 0]], "[1]: a run [0, 4, 0], but the file has 3 tensors"),
        (["dict", [2, 2, 0]], "[1]: a run [2, 2, 0]"),
        (["dict", [-1, 2, 0]], "[1]: a run [-1, 2, 0]"),
        (["dict", [0, 0, 0]], "[1]: a run [0, 0, 0]"),
        (["dict", [0, 1, -1]], "[1]: a run [0, 1, -1]"),
        (["dict", [0, True, 0]], "[1]: neither"),
        (["dict", [0, 1, 0, 1]], "[1]: neither"),
        (["dict", [0, 1, 0, "k", 1]], "[1]: neither"),
        (["dict", [0, 3, 2]], "[1]: a run that strips 2 characters off a shorter name"),
        (["dict", [0, 2, 1], [0, 2, 0]], "[2]: runs that are together longer"),
        (["dict", [0, 2, 3]], ": 'dict': two equal keys"),
        (["dict", "a", 1, "a", 2], ": 'dict': two equal keys"),
        (["dict", 1, 1, True, 2], ": 'dict': two equal keys"),
        (["dict", "a"], ": 'dict': a key without a value"),
        (["dict", [0], 1], "[1]: a tensor as a key or as a member of a set"),
        (["defaultdict", None, "k", 1, ["tuple", [0]], 1], "[4][1]: a tensor as a key"),
        (["state_dict", [0], ["frozenset", 1, [1, "kind"]], 1], "[2][2]: a tensor as a key"),
        (["list", ["set", ["tuple", 1, ["tuple", [0]]]]], "[1][1][2][1]: a tensor as a key"),
        (["dict", ["bytes", [0]], 1], "[1][1]: a tensor as a key"),
        (["dict", ["list"], 1], ": 'dict': unhashable type: 'list'"),
        (["list", ["set", ["dict"]]], "[1]: 'set': unhashable type: 'dict'"),
        (["set", 1, 1], ": 'set': two equal members"),
        (["state_dict"], ": 'state_dict': a key without"),
        (["defaultdict", "eval"], ": 'defaultdict': not a known default factory"),
        (["defaultdict", ["list"]], ": 'defaultdict': not a known default factory"),
        (["deque"], ": 'deque': expected null or a length"),
        (["deque", True], ": 'deque': expected null or a length"),
        (["deque", 1, 2, 3], ": 'deque': 2 items in a deque of at most 1"),
        (["deque", -1], ": 'deque': maxlen must be non-negative"),
        (["deque", 2**70], ": 'deque': Python int too large"),
        (["int", "12"], ": 'int': expected -0x"),
        (["int", "0x_1"], ": 'int': expected -0x"),
        (["int", 12], ": 'int': expected (str), found (int)"),
        (["float", "7ff8"], ": 'float': expected 16"),
        (["float"], ": 'float': expected (str), found ()"),
        (["complex", 1, 2.0], ": 'complex': expected (float, float), found (int, float)"),
        (["range", 1, 2, 0], ": 'range': range() arg 3 must not be zero"),
        (["range", 1, 2, True], ": 'range': expected (int, int, int)"),
        (["slice", 1], ": 'slice': expected 3 elements, found 1"),
        (["none", 1], ": 'none': expected (), found (int)"),
        (["bytes", "a"], ": 'bytes': "),
        (["bytes", "aGk=\n"], ": 'bytes': "),
        (["bytes", "aGk=", "aGk="], ": 'bytes': expected one element, found 2"),
        (["bytes", 10**9], ": 'bytes': expected base64, found int"),
        (["bytes", ["list", 1]], ": 'bytes': expected base64, found list"),
        (["str", "/w=="], ": 'str': 'utf-8' codec can't decode"),
        (["list", ["bytearray", [0]], ["bytearray", [0]]], "[2]: 'bytearray': tensor 0 is the"),
        (["torch.Thing", 1], ": 'torch.Thing': a tag that neither holdfast nor"),
        (["lib.bad"], ": 'lib.bad': expected one payload, found 0"),
        (["lib.bad", 1, 2], ": 'lib.bad': expected one payload, found 2"),
        (["tuple", ["lib.bad", "x"]], "[1]: 'lib.bad': 'x'"),
        (["x" * 10**6, 1], ": 'xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_nodes_are_refused_with_their_place(tree: Any, message: str) -> None:
    with pytest.raises(FormatError) as error:
        decode(tree)
    assert str(error.value).startswith(f"ckpt: tree{message}")
    assert len(str(error.value)) < 400
    leaf_paths(tree, NAMES)


def test_what_the_environment_lacks_is_no_fault_of_the_file() -> None:
    def decode_late(payload: Any) -> Any:
        raise ImportError("pip install lib")

    codec = Codec("lib.late", (), decode_late, decode_late)
    with pytest.raises(ImportError, match="pip install lib"):
        decode_tree(["lib.late", 1], [], [], [codec], name="f")


@pytest.mark.parametrize("tag", ["dict", "OrderedDict", "Counter", "defaultdict", "state_dict"])
def test_a_run_alone_and_among_others_gives_the_same(tag: str) -> None:
    first = {"defaultdict": [None], "state_dict": [["dict"]]}.get(tag, [])
    alone = decode([tag, *first, [0, 2, 2]])
    assert alone == {"a": b"m.a", "b": b"m.b"}
    among = decode([tag, *first, [0, 2, 2], "x", 1])
    assert among == {**alone, "x": 1}
    assert type(among) is type(alone)
    with pytest.raises(FormatError, match="two equal keys"):
        decode([tag, *first, [0, 2, 2]], ["m.a", "n.a"])


def test_a_blob_is_read_once() -> None:
    found = decode(["list", ["bytes", [0]], ["bytes", [0]], ["str", [0]], ["bytearray", [0]]])
    assert found == [b"m.a", b"m.a", "m.a", bytearray(b"m.a")]
    assert found[0] is found[1]


@pytest.mark.parametrize("text", ["", "[", "[1,]", "NaN ", "9" * 5000, "[" * 100_000])
def test_text_that_is_no_tree_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^ckpt: tree"):
        decode(loads(text, name="ckpt"))


def test_deep_trees_need_no_stack() -> None:
    for tag in ("list", "dict", "lib.bad"):
        tree: Any = 1
        for _ in range(100_000):
            tree = [tag, tree]
        with pytest.raises(FormatError, match="more than 201 levels deep"):
            decode(tree)
        leaf_paths(tree, NAMES)
        while type(tree) is list:  # freed level by level
            tree = tree.pop()
    key = ["tuple", 1]
    for _ in range(5000):
        key = ["tuple", key]
    # What such a key is called depends on how deep this Python's json goes; it has a name.
    assert list(leaf_paths(["dict", key, [0]], ["a"]).values()) == [0, 0]


def test_runs_cannot_multiply_the_tensors() -> None:
    names = [f"t{i}" for i in range(10_000)]
    tree = ["list", *(["dict", [0, 10_000, 0]] for _ in range(1000))]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"tree\[2\]\[1\]: runs that are together longer"):
            decode(tree, names)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_hashes_made_to_collide_are_refused() -> None:
    keys = [["int", hex(i * (2**61 - 1))] for i in range(2, 20_002)]
    pairs = [part for key in keys for part in (key, None)]
    for tree in (["dict", *pairs], ["set", *keys], ["dict", ["frozenset", *keys], 1]):
        refused = pytest.raises(FormatError, match="20000 keys with the same hash 0")
        with within(2), refused:  # inserting them takes minutes
            decode(tree)
    assert len(decode(["set", *range(100_000)])) == 100_000


def test_paths_of_ties_are_bounded() -> None:
    tree = ["dict", "k" * (1 << 24), ["list", *([0] for _ in range(1000))]]
    with pytest.raises(FormatError, match="paths of more than 268435456 characters"):
        leaf_paths(tree, ["a"])


def test_walk_sees_every_tensor_that_decoding_asks_for() -> None:
    trees = [
        ["dict", "j", ["list", [1]], "k", [2, "kind"], [0], 1],
        ["dict", ["tuple", 0], [1], [2, 1, 0], ["tuple", [0]], 1],
        ["defaultdict", None, [0, 2, 0], "k", ["bytes", [2]]],
        ["state_dict", ["dict", [0, 1, 0]], ["set", [1]], 1, "k", [2]],
        ["deque", None, [0], ["slice", [1], None, [2]]],
    ]
    for tree in trees:
        asked: set[int] = set()

        def ask(position: int, kind: str | None, asked: set[int] = asked) -> bytes:
            asked.add(position)
            return b"content"

        with contextlib.suppress(FormatError):
            decode_tree(tree, ask, NAMES, (), name="f", unblob=bytes)
        assert asked
        seen = set()
        for _, node in walk(tree):
            seen.update(range(node[0], node[0] + (node[1] if len(node) > 2 else 1)))
        assert asked <= seen
