"""Nested objects: any nesting of Python values around tensors, as names, leaves and a JSON tree.

:func:`flatten` takes an object apart into its tensors, each with a name; :func:`encode_tree` says
in JSON how they hang together, and :func:`decode_tree` puts them together again. A flat dict of
tensors needs no tree at all. What frameworks there are is passed in (:class:`Leaves`), never
imported. ``docs/tree.md`` states the encoding for other programs.

Values come back with exactly their type and bits. A list that stands in two places comes back as
two lists; tensors keep their identity, as the caller finds ties among the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._tree_decode import Decoder
from ._tree_flatten import Codec, Flattener, Leaves
from ._tree_json import (
    MAX_DEPTH,
    ROOT,
    SAME,
    dumps,
    key_text,
    loads,
    printable,
    short,
    str_node,
    walk,
)
from .errors import FormatError

__all__ = [
    "MAX_DEPTH",
    "Codec",
    "Flat",
    "Leaves",
    "decode_tree",
    "dumps",
    "encode_tree",
    "flatten",
    "leaf_paths",
    "loads",
    "walk",
]

#: Name that safetensors keeps for itself, so that no tensor may have it.
_RESERVED = "__metadata__"
#: How many characters the paths that `leaf_paths` builds may have in all: more than a header of
#: the greatest size needs, and a bound on what a small hostile one can ask for.
_PATH_CHARACTERS = 1 << 28


@dataclass(slots=True)
class Flat:
    """An object taken apart.

    Attributes
    ----------
    names : list of str
        Unique, valid Unicode, never ``"__metadata__"``; one for each leaf.
    leaves : list of object
        The tensors in the order of traversal; one that occurs twice stands here twice.
    structure : object
        The tree as if every leaf were stored, in this order; for :func:`encode_tree`.
    renamed : dict of int to str
        The path of each leaf whose name had to differ from it.
    """

    names: list[str]
    leaves: list[Any]
    structure: Any
    renamed: dict[int, str] = field(default_factory=dict)

    def path(self, leaf: int) -> str:
        """Where in the object a leaf stands, such as ``$['model']['fc.weight']``, for messages."""
        for steps, node in walk(self.structure):
            shown = [step for step in steps if step is not SAME]
            if len(node) >= 3 and node[0] <= leaf < node[0] + node[1]:
                shown.append(self.renamed.get(leaf, self.names[leaf])[node[2] :])
            elif node[0] != leaf:
                continue
            keys = (step if type(step) is int else key_text(step) for step in shown)
            return "$" + "".join(f"[{short(key)}]" for key in keys)
        raise IndexError(f"leaf {leaf} of {len(self.leaves)}")


def flatten(obj: Any, registry: Leaves) -> Flat:
    """Take an object apart into tensors with names, and the structure that holds them.

    A name is the path to the tensor, joined by dots: a str key is itself, an index is decimal, any
    other key its JSON; a tensor that is the whole object is called ``"tensor"``. Lone surrogates
    become U+FFFD. Where two paths read the same, the later one gets ``#2``, ``#3`` and so on.

    Parameters
    ----------
    obj : object
    registry : Leaves

    Returns
    -------
    Flat
        Holds the tensors themselves; nothing is copied but long ``bytearray``.

    Raises
    ------
    TypeError
        For what cannot be held. The message names the path inside `obj` and what can be done.
    ValueError
        Where an object contains itself, or containers nest deeper than 200 levels.

    Examples
    --------
    >>> import numpy as np
    >>> numpy = Leaves(frozenset({np.ndarray}), lambda obj: False, (), np.frombuffer)
    >>> flat = flatten({"model": {"w": np.zeros(3), "b": np.zeros(1)}, "epoch": 3}, numpy)
    >>> flat.names
    ['model.w', 'model.b']
    >>> encode_tree(flat, position=[0, 1], kinds={})
    ['dict', 'model', ['dict', [0, 2, 6]], 'epoch', 3]
    """
    flattener = Flattener(registry)
    structure = flattener.run(obj)
    names = flattener.names
    unique = structure == ["dict", [0, len(names), 0]]  # they are the keys of one dict
    return Flat(names, flattener.leaves, structure, _settle_names(names, unique))


def encode_tree(flat: Flat, *, position: Sequence[int], kinds: Mapping[int, str]) -> Any:
    """Tree of a flattened object, ready for JSON.

    Parameters
    ----------
    flat : Flat
    position : sequence of int
        For each leaf, the position in the header of the stored tensor that it is. Where several
        leaves are one tensor (a tie), that tensor has to have the name of the first of them.
    kinds : mapping of int to str
        For some leaves, what a plain tensor does not say of them, such as ``"torch:parameter"``.

    Returns
    -------
    object or None
        Made of lists, str, int, finite float, bool and None; None for a dict whose keys and
        tensors are the names and tensors of the file, in their order. May share parts with
        `flat`: not to be changed.
    """
    count = len(flat.leaves)
    if len(position) != count:
        raise ValueError(f"positions of {len(position)} leaves, expected {count}")
    tree = flat.structure
    if kinds or flat.renamed or type(position) is not range or position != range(count):
        places = position.tolist() if hasattr(position, "tolist") else list(position)
        if kinds or flat.renamed or places != list(range(count)):
            tree = _place(flat, places, kinds)
    if tree is None:
        return ["none"]  # null is for objects that need no tree
    return None if tree == (["dict", [0, count, 0]] if count else ["dict"]) else tree


def decode_tree(
    tree: Any,
    tensors: list[Any] | Callable[[int, str | None], Any],
    names: list[str],
    codecs: Iterable[Codec],
    *,
    name: str,
    unblob: Callable[[Any], bytes] = bytes,
) -> Any:
    """Object that a tree stands for.

    Parameters
    ----------
    tree : object or None
        As parsed from JSON, trusted in nothing; None for a flat dict.
    tensors : list, or callable of (int, str or None)
        The tensor at a position of the header. A callable is given the kind too, and asked once
        for each position and kind, so that ties come back as one tensor; a list is for
        tensors without kinds, and ignores them.
    names : list of str
        Of the stored tensors, in header order.
    codecs : iterable of Codec
    name : str
        What messages call the file.
    unblob : callable
        The bytes of a tensor that was made by ``Leaves.blob``.

    Raises
    ------
    FormatError
        For anything malformed, with `name` and the indices that lead to the node. ``ImportError``,
        ``OSError`` and ``MemoryError`` of a codec, and whatever `tensors` raises, pass through.

    Notes
    -----
    What is made is bounded by the length of the tree and the number of tensors.

    Examples
    --------
    >>> decode_tree(["dict", "model", ["dict", [0, 2, 6]], "epoch", 3],
    ...             ["w", "b"], ["model.w", "model.b"], (), name="ckpt")
    {'model': {'w': 'w', 'b': 'b'}, 'epoch': 3}
    """
    if tree is None:
        tree = ["dict", [0, len(names), 0]] if names else ["dict"]
    decoders = {codec.tag: codec.decode for codec in codecs}
    return Decoder(tensors, names, decoders, unblob, name).decode(tree)


def leaf_paths(tree: Any, names: Sequence[str]) -> dict[str, int]:
    """Every name by which a tensor can be asked for, with its position in the header.

    These are the names of the stored tensors, and for ties the paths of their other places, as far
    as no stored tensor has that name. Malformed parts of a tree are passed over: decoding reports
    them.

    Examples
    --------
    >>> leaf_paths(["dict", [0, 1, 0], "head", [0]], ["embedding"])
    {'embedding': 0, 'head': 0}
    """
    paths = dict(zip(names, range(len(names)), strict=True))
    left = _PATH_CHARACTERS
    for steps, node in walk(tree):
        position = node[0]
        if len(node) > 2 or not 0 <= position < len(names):
            continue
        parts = [key_text(step) for step in steps if step is not SAME]
        left -= sum(map(len, parts)) + len(parts)
        if left < 0:
            raise FormatError(f"tree: paths of more than {_PATH_CHARACTERS} characters in all")
        path = printable(".".join(parts)) if parts else ROOT
        stored = names[position]
        if path != stored and not (
            stored.startswith(path + "#") and stored[len(path) + 1 :].isdecimal()
        ):
            paths.setdefault(path, position)
    return paths


def _settle_names(names: list[str], unique: bool) -> dict[int, str]:
    """Make names unique and fit for a file, in place; returns the former text of the changed."""
    joined = "".join(names)
    plain = _RESERVED not in joined and printable(joined) == joined
    if plain and (unique or len(set(names)) == len(names)):
        return {}
    texts = [printable(name) for name in names]
    taken = {_RESERVED, *texts}
    used = {_RESERVED}
    numbers: dict[str, int] = {}
    renamed = {}
    for i, text in enumerate(texts):
        name = text
        if name in used:
            number = numbers.get(text, 2)
            while f"{text}#{number}" in taken:
                number += 1
            numbers[text] = number + 1
            name = f"{text}#{number}"
            taken.add(name)
        used.add(name)
        if name != names[i]:
            renamed[i] = names[i]
            names[i] = name
    return renamed


def _place(flat: Flat, places: list[int], kinds: Mapping[int, str]) -> Any:
    """Copy of the structure with positions for leaves; runs break where a name or a tie does."""
    first: dict[int, int] = {}
    for leaf, place in enumerate(places):
        first.setdefault(place, leaf)

    def tensor(leaf: int) -> list[Any]:
        return [places[leaf], kinds[leaf]] if leaf in kinds else [places[leaf]]

    def pieces(start: int, count: int, strip: int) -> list[Any]:
        found: list[Any] = []
        run: list[Any] | None = None
        for leaf in range(start, start + count):
            place = places[leaf]
            kind = [kinds[leaf]] if leaf in kinds else []
            if leaf in flat.renamed or first[place] != leaf:
                key = flat.renamed.get(leaf, flat.names[leaf])[strip:]
                found += (str_node(key), tensor(leaf))
                run = None
            elif run is not None and run[0] + run[1] == place and run[3:] == kind:
                run[1] += 1
            else:
                run = [place, 1, strip, *kind]
                found.append(run)
        return found

    root: list[Any] = []
    stack = [(iter([flat.structure]), root)]
    while stack:
        nodes, out = stack[-1]
        for node in nodes:
            if type(node) is not list:
                out.append(node)
            elif type(node[0]) is str:
                copy: list[Any] = []
                out.append(copy)
                stack.append((iter(node), copy))
                break
            elif len(node) == 1:
                out.append(tensor(node[0]))
            else:
                out.extend(pieces(*node))
        else:
            stack.pop()
    return root[0]
