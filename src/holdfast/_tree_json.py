"""The JSON side of nested objects: single values as nodes, and the tensors of a tree.

``docs/tree.md`` says what a tree looks like. A node is a JSON literal, or an array that starts with
a tag; an array that starts with a number stands for a tensor, or for a run of them inside a dict.
Nothing here recurses, so neither a deep tree nor a deep caller meets Python's limit.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from .errors import FormatError

__all__ = [
    "FACTORIES",
    "INT_MAX",
    "INT_MIN",
    "MAPPINGS",
    "MAX_ARRAYS",
    "MAX_DEPTH",
    "ROOT",
    "SAME",
    "SEQUENCES",
    "Node",
    "dumps",
    "is_tensor_node",
    "key_text",
    "loads",
    "printable",
    "scalar_nodes",
    "short",
    "str_node",
    "text_of",
    "unpack",
    "unpack_str",
    "walk",
]

#: How many containers may stand inside one another.
MAX_DEPTH = 200

#: How deep tagged arrays nest in a tree: a value that is none in Python (a long int) may be one.
MAX_ARRAYS = MAX_DEPTH + 1

#: The ints that stand in a tree as JSON numbers; any other is hexadecimal text.
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

#: Name of a tensor that is the whole object.
ROOT = "tensor"

#: Tags of sequences and of mappings, with the number of elements that precede their items.
SEQUENCES = {"list": 0, "tuple": 0, "set": 0, "frozenset": 0, "deque": 1, "slice": 0}
MAPPINGS = {"dict": 0, "OrderedDict": 0, "Counter": 0, "defaultdict": 1, "state_dict": 1}

#: What ``defaultdict`` may be made with, by its name in a tree.
FACTORIES: dict[str | None, Callable[[], Any] | None] = {
    None: None,
    **{kind.__name__: kind for kind in (bool, bytes, dict, float, int, list, set, str, tuple)},
}

_SURROGATES = re.compile("[\ud800-\udfff]")

Node = Any


def dumps(tree: Node) -> str:
    """Text of a tree: ASCII, without spaces, the same for the same tree."""
    return json.dumps(tree, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def loads(text: str, *, name: str) -> Node:
    """Tree of a text from a file.

    Raises
    ------
    FormatError
        Where `text` is not JSON, nests deeper than Python's parser goes, or has a number of more
        digits than Python converts. The message starts with `name`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise FormatError(f"{name}: tree: nested too deeply to be parsed") from None
    except ValueError as error:
        raise FormatError(f"{name}: tree: not JSON: {error}") from None


def text_of(node: Node) -> str:
    """JSON of one node, for names and for sorting."""
    return json.dumps(node, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def printable(name: str) -> str:
    """`name` with each lone surrogate replaced by U+FFFD, so that UTF-8 can hold it."""
    return name if name.isascii() else _SURROGATES.sub("\ufffd", name)


def key_text(node: Node) -> str:
    """What the node of a dict's key is called in names: a str itself, anything else its JSON."""
    if type(node) is str:
        return node
    if type(node) is int:
        return str(node) if abs(node) < 1 << 64 else hex(node)  # str() refuses 4301 digits
    try:
        if type(node) is list and len(node) == 2 and node[0] == "str":
            return printable(unpack_str(node[1]))
        return text_of(node)
    except (ValueError, RecursionError):
        return "?"  # malformed; decoding says so


def short(value: Any) -> str:
    """A value as messages show it."""
    try:
        text = repr(value)
    except Exception:  # a caller's own __repr__, or an int of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


# -- single values to nodes ----------------------------------------------------------------------


def str_node(text: str) -> Node:
    """A str: itself, or base64 of its UTF-8 where it has lone surrogates, which JSON would join."""
    if text.isascii() or _SURROGATES.search(text) is None:
        return text
    return ["str", base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")]


def _int_node(value: int) -> Node:
    return value if INT_MIN <= value <= INT_MAX else ["int", hex(value)]


def _float_node(value: float) -> Node:
    return value if math.isfinite(value) else ["float", struct.pack(">d", value).hex()]


def _same(value: Any) -> Node:
    return value


#: How a value of exactly this type becomes a node.
scalar_nodes: dict[type, Callable[[Any], Node]] = {
    type(None): _same,
    bool: _same,
    int: _int_node,
    float: _float_node,
    str: str_node,
    complex: lambda value: ["complex", _float_node(value.real), _float_node(value.imag)],
    bytes: lambda value: ["bytes", base64.b64encode(value).decode("ascii")],
    bytearray: lambda value: ["bytearray", base64.b64encode(value).decode("ascii")],
    range: lambda value: ["range", *map(_int_node, (value.start, value.stop, value.step))],
}


def unpack(text: Any) -> bytes:
    """Bytes of base64; ``ValueError`` for anything else."""
    if type(text) is not str:
        raise ValueError(f"expected base64, found {type(text).__name__}")
    return base64.b64decode(text, validate=True)


def unpack_str(text: Any) -> str:
    """Str of base64 of its UTF-8, surrogates included."""
    return unpack(text).decode("utf-8", "surrogatepass")


# -- the tensors of a tree -----------------------------------------------------------------------

#: The step of a node that has the name of the object that it stands for (a codec's payload).
SAME = object()


def _children(node: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The array children of a tagged node, each with the step that leads there: a key or index."""
    tag = node[0]
    if tag not in MAPPINGS:
        first = 1 + SEQUENCES[tag] if tag in SEQUENCES else len(node)
        for i in range(1, len(node)):
            child = node[i]
            if type(child) is list and child:
                yield (i - first if i >= first else SAME), child
        return
    i = 1
    if MAPPINGS[tag]:
        if len(node) > 1 and type(node[1]) is list and node[1]:
            yield "_metadata", node[1]
        i = 2
    while i < len(node):
        key = node[i]
        if type(key) is list and key:
            yield SAME, key
            if is_tensor_node(key) and len(key) > 2:  # a run stands for keys and values
                i += 1
                continue
        if i + 1 < len(node) and type(node[i + 1]) is list and node[i + 1]:
            yield key, node[i + 1]
        i += 2


def is_tensor_node(node: Node) -> bool:
    """Whether a node is a tensor or a run of them."""
    return type(node) is list and len(node) > 0 and type(node[0]) is int


def walk(tree: Node) -> Iterator[tuple[list[Any], list[Any]]]:
    """Every tensor and every run of a tree, each with the steps that lead to it, in order.

    A step is a list index, the node of a dict key, or ``SAME`` where a node has the name of its
    parent; the list of steps is only good until the next is asked for. The tree may be hostile:
    malformed parts are passed over, but all that :class:`holdfast._tree_decode.Decoder` asks for
    is among what comes.
    """
    if is_tensor_node(tree):
        yield [], tree
        return
    if type(tree) is not list or not tree or type(tree[0]) is not str:
        return
    stack, steps = [_children(tree)], [None]
    while stack:
        for steps[-1], child in stack[-1]:
            if type(child[0]) is int:
                yield steps, child
            elif type(child[0]) is str and len(stack) < MAX_ARRAYS:
                stack.append(_children(child))
                steps.append(None)
                break
        else:
            stack.pop()
            steps.pop()
