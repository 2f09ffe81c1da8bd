"""Trees read back from JSON: :class:`Decoder`, which trusts nothing that it reads."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ._tree_json import FACTORIES, MAPPINGS, MAX_ARRAYS, Node, is_tensor_node, unpack
from .errors import FormatError

__all__ = ["TAGS", "Decoder"]

#: How many keys of one dict, or members of one set, may share a hash: past that, a file was made
#: to turn linear work into quadratic work.
_MAX_EQUAL_HASHES = 32

_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_HASHING = frozenset({"set", "frozenset", *MAPPINGS})
_LITERALS = frozenset({type(None), bool, int, str})


def _check_hashes(keys: Sequence[Any]) -> None:
    """Refuse what was made to collide; hashes of str and bytes are secret, so they cannot be."""
    if len(keys) > _MAX_EQUAL_HASHES and set(map(type, keys)) != {str}:
        ((value, count),) = Counter(map(hash, keys)).most_common(1)
        if count > _MAX_EQUAL_HASHES:
            raise ValueError(f"{count} keys with the same hash {value}")


def _hashes(node: list[Any], items: list[Any]) -> bool:
    """Whether what comes next into a node, behind `items`, is a key or the member of a set."""
    tag = node[0]
    if tag not in _HASHING:
        return False
    skip = MAPPINGS.get(tag)
    if skip is None:
        return True
    return len(items) >= skip and (len(items) - skip) % 2 == 0


def _expect(items: list[Any], *kinds: type) -> list[Any]:
    if [type(item) for item in items] != list(kinds):
        expected = ", ".join(kind.__name__ for kind in kinds)
        found = ", ".join(type(item).__name__ for item in items[: len(kinds) + 1])
        raise ValueError(f"expected ({expected}), found ({found})")
    return items


class _Run(NamedTuple):
    """All keys, which are names of tensors, and all values of a dict."""

    keys: list[str]
    values: list[Any]


class Decoder:
    """Makes the object that a tree stands for; one instance decodes one tree.

    Parameters
    ----------
    tensors : list, or callable of (int, str or None)
        The tensor at a position of the header, with the kind that the tree gives it. A callable is
        asked once for each position and kind, so that ties come back as one tensor; a list
        knows nothing of kinds.
    names : list of str
        Of the stored tensors, in header order.
    decoders : mapping of str to callable
        What makes a framework's value from its payload, by tag.
    unblob : callable
        The bytes of a tensor that holds a long bytes or str.
    name : str
        What messages call the file.
    """

    def __init__(
        self,
        tensors: list[Any] | Callable[[int, str | None], Any],
        names: list[str],
        decoders: Mapping[str, Callable[[Any], Any]],
        unblob: Callable[[Any], bytes],
        name: str,
    ) -> None:
        self._names = names
        self._decoders = decoders
        self._unblob = unblob
        self._name = name
        self._known: dict[str | None, dict[int, Any]] = {}
        self._blobs: dict[tuple[str, int], Any] = {}
        self._left = len(names)
        self._stack: list[tuple[list[Any], int, list[Any], bool]] = []
        self._ask = tensors if callable(tensors) else None
        self._tensors: list[Any] = [] if callable(tensors) else tensors

    def decode(self, tree: Node) -> Any:
        """The object; see :func:`holdfast.tree.decode_tree`."""
        stack = self._stack
        node: list[Any] = [None, tree]
        items: list[Any] = []
        at = 1
        hashed = False  # whether the node is in a key, or in a member of a set
        while True:
            if at == len(node):
                if not stack:
                    return items[0]
                try:
                    value = self._build(node, items)
                except (MemoryError, ImportError, OSError):
                    raise
                except Exception as error:
                    raise self._bad(f"{node[0]!r}: {error}") from error
                node, at, items, hashed = stack.pop()
                items.append(value)
                continue
            child = node[at]
            at += 1
            if type(child) is not list:
                if type(child) not in _LITERALS and not (
                    type(child) is float and math.isfinite(child)
                ):
                    raise self._bad(f"no node: {type(child).__name__}", at - 1)
                items.append(child)
                continue
            head = child[0] if child else None
            stack.append((node, at, items, hashed))
            if type(head) is int:
                self._put_tensors(node, items, child, hashed)
                stack.pop()
            elif type(head) is str:
                if len(stack) > MAX_ARRAYS:
                    raise self._bad(f"more than {MAX_ARRAYS} levels deep")
                hashed = hashed or _hashes(node, items)
                node, at, items = child, 1, []
                if len(child) > 16 and _LITERALS.issuperset(map(type, child)):
                    items, at = child[1:], len(child)
            else:
                raise self._bad("an array that starts with neither a tag nor a position")

    def _bad(self, what: str, at: int | None = None) -> FormatError:
        steps = [index - 1 for _, index, _, _ in self._stack[1:]]
        if at is not None and self._stack:
            steps.append(at)
        where = "".join(f"[{step}]" for step in steps)
        return FormatError(f"{self._name}: tree{where}: {what[:200]}")

    def _put_tensors(
        self, node: list[Any], items: list[Any], child: list[Any], hashed: bool
    ) -> None:
        """Append a tensor to the items of `node`, or the keys and values of a run."""
        size = len(child)
        if size == 1 or (size == 2 and type(child[1]) is str):
            if hashed or _hashes(node, items):
                raise self._bad("a tensor as a key or as a member of a set")
            position = child[0]
            if not 0 <= position < len(self._names):
                raise self._bad(f"tensor {position}, but the file has {len(self._names)}")
            (tensor,) = self._take(range(position, position + 1), child[1] if size == 2 else None)
            items.append(tensor)
            return
        if not (
            (size == 3 or (size == 4 and type(child[3]) is str))
            and type(child[1]) is type(child[2]) is int
        ):
            raise self._bad("neither [position, kind] nor [start, count, strip, kind]")
        if node[0] not in MAPPINGS or (len(items) - MAPPINGS[node[0]]) % 2:
            raise self._bad("a run of tensors where no key of a dict can stand")
        start, count, strip, *kind = child
        if not (start >= 0 and 0 < count <= len(self._names) - start and strip >= 0):
            raise self._bad(f"a run {child[:3]}, but the file has {len(self._names)} tensors")
        self._left -= count
        if self._left < 0:
            raise self._bad("runs that are together longer than the list of tensors")
        # No copy where they are all there are: to touch each of thousands of objects takes long.
        keys = self._names if count == len(self._names) else self._names[start : start + count]
        if strip:
            if min(map(len, keys)) < strip:
                raise self._bad(f"a run that strips {strip} characters off a shorter name")
            keys = [key[strip:] for key in keys]
        values = self._take(range(start, start + count), kind[0] if kind else None)
        if len(node) == 2 + MAPPINGS[node[0]]:
            items.append(_Run(keys, values))
            return
        base = len(items)
        items.extend(keys)  # makes the room; then keys and values take turns
        items.extend(keys)
        items[base::2] = keys
        items[base + 1 :: 2] = values

    def _take(self, positions: range, kind: str | None) -> list[Any]:
        """The tensors at some positions, each asked for once."""
        ask = self._ask
        if ask is None:
            every = len(positions) == len(self._tensors)
            return self._tensors if every else self._tensors[positions.start : positions.stop]
        known = self._known.setdefault(kind, {})
        for position in positions:
            if position not in known:
                known[position] = ask(position, kind)
        return [known[position] for position in positions]

    def _build(self, node: list[Any], items: list[Any]) -> Any:
        """The object of a tagged node whose elements are decoded."""
        tag = node[0]
        if tag in MAPPINGS:
            return _build_mapping(tag, items)
        if tag in ("bytes", "bytearray", "str"):
            return self._build_text(tag, node, items)
        make = TAGS.get(tag)
        if make is not None:
            return make(items)
        decode = self._decoders.get(tag)
        if decode is None:
            raise ValueError("a tag that neither holdfast nor a framework in use here knows")
        if len(items) != 1:
            raise ValueError(f"expected one payload, found {len(items)}")
        return decode(items[0])

    def _build_text(self, tag: str, node: list[Any], items: list[Any]) -> Any:
        """A bytes, bytearray or str, from base64 or from the tensor that holds it."""
        if len(items) != 1:
            raise ValueError(f"expected one element, found {len(items)}")
        if not is_tensor_node(node[1]):
            data = unpack(items[0])
            if tag == "str":
                return data.decode("utf-8", "surrogatepass")
            return data if tag == "bytes" else bytearray(data)
        key = (tag, node[1][0])
        if key not in self._blobs:
            data = self._unblob(items[0])
            if tag == "str":
                self._blobs[key] = data.decode("utf-8", "surrogatepass")
            else:
                self._blobs[key] = data if tag == "bytes" else bytearray(data)
        elif tag == "bytearray":
            # Each would be a copy of its own: a small tree could ask for any amount of memory.
            raise ValueError(f"tensor {node[1][0]} is the content of a second bytearray")
        return self._blobs[key]


def _build_mapping(tag: str, items: list[Any]) -> Any:
    skip = MAPPINGS[tag]
    keys: Sequence[Any]
    values: Sequence[Any]
    if items and type(items[-1]) is _Run:
        keys, values = items[-1]
        if tag == "dict":
            from ._dicts import from_lists

            return _counted(from_lists(keys, values), keys)
    elif len(items) < skip or (len(items) - skip) % 2:
        raise ValueError("a key without a value")
    else:
        keys, values = items[skip::2], items[skip + 1 :: 2]
        _check_hashes(keys)
    pairs = zip(keys, values, strict=True)
    made: dict[Any, Any]
    if tag == "dict":
        made = dict(pairs)
    elif tag in ("OrderedDict", "state_dict"):
        made = OrderedDict(pairs)
        if skip:
            vars(made)["_metadata"] = items[0]
    elif tag == "Counter":
        made = Counter()
        dict.update(made, pairs)
    else:
        if not isinstance(items[0], (str, type(None))) or items[0] not in FACTORIES:
            raise ValueError("not a known default factory")
        made = defaultdict(FACTORIES[items[0]], pairs)
    return _counted(made, keys)


def _counted(made: dict[Any, Any], keys: Sequence[Any]) -> dict[Any, Any]:
    if len(made) != len(keys):
        raise ValueError("two equal keys")
    return made


def _build_none(items: list[Any]) -> None:
    _expect(items)


def _build_set(kind: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    def build(items: list[Any]) -> Any:
        _check_hashes(items)
        made = kind(items)
        if len(made) != len(items):
            raise ValueError("two equal members")
        return made

    return build


def _build_int(items: list[Any]) -> int:
    (text,) = _expect(items, str)
    if _HEX_INT.fullmatch(text) is None:
        raise ValueError("expected -0x and lowercase digits")
    return int(text, 16)


def _build_float(items: list[Any]) -> float:
    (text,) = _expect(items, str)
    if _HEX_FLOAT.fullmatch(text) is None:
        raise ValueError("expected 16 lowercase hexadecimal digits")
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value


def _build_deque(items: list[Any]) -> deque[Any]:
    if not items or (items[0] is not None and type(items[0]) is not int):
        raise ValueError("expected null or a length first")
    made = deque(items[1:], items[0])
    if len(made) != len(items) - 1:
        raise ValueError(f"{len(items) - 1} items in a deque of at most {items[0]}")
    return made


def _build_slice(items: list[Any]) -> slice:
    if len(items) != 3:
        raise ValueError(f"expected 3 elements, found {len(items)}")
    return slice(*items)


#: How the decoded elements of a tagged node become an object; mappings, bytes, bytearray and str
#: have code of their own.
TAGS: dict[str, Callable[[list[Any]], Any]] = {
    "none": _build_none,
    "list": list,
    "tuple": tuple,
    "set": _build_set(set),
    "frozenset": _build_set(frozenset),
    "int": _build_int,
    "float": _build_float,
    "complex": lambda items: complex(*_expect(items, float, float)),
    "range": lambda items: range(*_expect(items, int, int, int)),
    "slice": _build_slice,
    "deque": _build_deque,
}
