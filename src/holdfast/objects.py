"""Nested objects with tensors of real frameworks in them: the tree and the adapters, joined.

A tree gives some leaves a *kind*: what a plain tensor of the file's framework does not say of
them. ``"numpy"`` is an array in a file of torch tensors, ``"torch:parameter"`` a parameter, and
``"blob"`` the content of a long ``bytes`` or ``str``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import adapters, tree
from ._tree_json import short
from .adapters import Adapter
from .collect import Collection, opaque, split_kind
from .errors import FormatError
from .formats._garbage import uncollected
from .layout import Index
from .pickled import PickleAssembler, Trust
from .views import TensorBatch

__all__ = [
    "BLOB",
    "Assembler",
    "Blob",
    "Maker",
    "arrays_of",
    "assembler",
    "flatten",
    "kinds_of",
    "rebuild",
    "shared_out",
    "tree_of",
]

#: Kind of the content of a long ``bytes`` or ``str``, which is no tensor of the user's.
BLOB = "blob"

#: An entry of an index and the kind of tensor that it is to become.
_Use = tuple[int, str | None]


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of a leaf of the kind ``"blob"``, told apart from tensors by its class."""

    data: bytes


def flatten(obj: Any, known: Sequence[Adapter] | None = None) -> tuple[tree.Flat, set[int]]:
    """Take `obj` apart, with the tensors and values of every framework in use.

    Returns
    -------
    flat : Flat
    blobs : set of int
        The ids of those leaves that are no tensors of the user's.
    """
    known = adapters.loaded() if known is None else known
    blobs: set[int] = set()

    def blob(data: bytes) -> np.ndarray:
        leaf = np.frombuffer(data, np.uint8)
        blobs.add(id(leaf))
        return leaf

    flat = tree.flatten(
        obj,
        tree.Leaves(
            tensor_types=frozenset().union(*(adapter.plain_types for adapter in known)),
            is_tensor=lambda leaf: any(adapter.is_tensor(leaf) for adapter in known),
            codecs=[codec for adapter in known for codec in adapter.codecs],
            blob=blob,
        ),
    )
    return flat, blobs


def tree_of(flat: tree.Flat, blobs: set[int], found: Collection) -> Any:
    """JSON tree of a flattened object whose leaves have been collected; None if it needs none."""
    kinds = found.kinds
    if blobs:
        rows = [i for i, leaf in enumerate(flat.leaves) if id(leaf) in blobs]
        kinds = {**kinds, **dict.fromkeys(rows, BLOB)}
    return tree.encode_tree(flat, position=found.position, kinds=kinds)


def arrays_of(
    obj: Any, structure: str, known: Sequence[Adapter] | None = None
) -> tuple[list[str], list[Any]]:
    """Names and tensors of an object for a format that holds nothing but tensors.

    Parameters
    ----------
    obj : object
        A tensor, for the structure ``"array"``; a mapping of str to tensors, for ``"arrays"``.

    Raises
    ------
    TypeError
        It is anything else; the message has the path and says what can hold it.
    """
    known = adapters.loaded() if known is None else known

    def is_tensor(value: object) -> bool:
        kind = type(value)
        return any(kind in adapter.plain_types or adapter.is_tensor(value) for adapter in known)

    other = "a .safetensors or .pt file holds any nesting"
    if structure == "array":
        if is_tensor(obj):
            return ["tensor"], [obj]
        raise TypeError(
            f"$: a {type(obj).__name__}; this format holds a single array: a .npz file holds a "
            f"dict of them, {other}"
        )
    if not isinstance(obj, Mapping):
        way = "save({'x': x})" if is_tensor(obj) else "a .npy file holds a single array"
        raise TypeError(
            f"$: a {type(obj).__name__}; this format holds a flat dict of arrays: {way}, {other}"
        )
    for key, value in obj.items():
        path = f"$[{short(key)}]"
        if not isinstance(key, str):
            raise TypeError(f"{path}: a key of type {type(key).__name__}; this format has names")
        if not is_tensor(value):
            raise TypeError(
                f"{path}: a {type(value).__name__}; this format holds a flat dict of arrays "
                f"and nothing else: {other}"
            )
    return list(obj), list(obj.values())


def kinds_of(index: Index) -> dict[int, str]:
    """For the entries whose tree gives them a kind, the first one."""
    kinds: dict[int, str] = dict(index.kinds)
    if index.tree is not None:
        for _, node in tree.walk(index.tree):
            if len(node) in (2, 4) and type(node[-1]) is str:
                first, count = (node[0], 1) if len(node) == 2 else node[:2]
                if first >= 0 and type(count) is int and first + count <= len(index):
                    for row in range(first, first + count):
                        kinds.setdefault(row, node[-1])
    return kinds


class Maker(Protocol):
    """What makes tensors of a batch, and the object that was saved."""

    def named(self, names: dict[str, int]) -> dict[str, Any]:
        """A flat dict of the tensors of these entries."""

    def whole(self) -> Any:
        """The object that was saved."""


def assembler(
    index: Index,
    batch: TensorBatch,
    rows: np.ndarray,
    adapter: Adapter,
    *,
    name: str,
    forced: bool,
    kinds: dict[int, str],
    location: Any = None,
    placed: bool = False,
    trust: Trust | None = None,
) -> Maker:
    """The maker for an index: by storages and a pickle, or by a tree. See both for parameters."""
    if index.storages is not None:
        return PickleAssembler(
            index,
            batch,
            rows,
            adapter,
            name=name,
            location=location,
            placed=placed,
            trust=trust,
        )
    return Assembler(
        index,
        batch,
        rows,
        adapter,
        name=name,
        forced=forced,
        kinds=kinds,
        location=None if placed else location,
    )


class Assembler:
    """Makes tensors of some entries of an index, and from them the object that was saved.

    Parameters
    ----------
    index : Index
    batch : TensorBatch
        One row for each of `rows`.
    rows : ndarray of int64
        Entries of `index`.
    adapter : Adapter
        Whose tensors plain leaves become.
    name : str
        What messages call the file.
    forced : bool
        Whether the caller asked for this adapter: leaves of other frameworks then become its
        tensors too.
    kinds : dict of int to str
        What :func:`kinds_of` says of `index`.
    location : object
        ``map_location``.
    """

    def __init__(
        self,
        index: Index,
        batch: TensorBatch,
        rows: np.ndarray,
        adapter: Adapter,
        *,
        name: str,
        forced: bool,
        kinds: dict[int, str],
        location: Any = None,
    ) -> None:
        self._index = index
        self._batch = batch
        self._adapter = adapter
        self._name = name
        self._forced = forced
        self._kinds = kinds
        self._location = location
        self._whole = len(rows) == len(index)
        self._at = None if self._whole else {row: i for i, row in enumerate(rows.tolist())}

    def named(self, names: dict[str, int]) -> dict[str, Any]:
        """A flat dict of the tensors of these entries."""
        kinds = self._kinds
        made = self._make(dict.fromkeys((row, kinds.get(row)) for row in names.values()))
        return {name: made[row, kinds.get(row)] for name, row in names.items()}

    def whole(self) -> Any:
        """The object that was saved."""
        index = self._index
        names = index.names.tolist()
        tensors: Any
        if not self._kinds:
            tensors = self._place(self._wrap(self._adapter, self._batch, {}))
        else:
            made = self._make(_uses(index))

            def tensors(row: int, kind: str | None) -> Any:
                return made[row, kind]

        with uncollected():
            return tree.decode_tree(
                index.tree, tensors, names, self._codecs(), name=self._name, unblob=_unblob
            )

    def _codecs(self) -> tuple[tree.Codec, ...]:
        return adapters.codecs(only=self._adapter.name if self._forced else None)

    def _place(self, made: list[Any]) -> list[Any]:
        location = self._location
        if location is None:
            return made
        return [self._adapter.place(tensor, location) for tensor in made]

    def _wrap(self, adapter: Adapter, batch: TensorBatch, kinds: dict[int, str]) -> list[Any]:
        try:
            with uncollected():
                return adapter.wrap(batch, kinds)
        except ValueError as error:  # a shape, or a kind, that no tensor of the framework has
            raise FormatError(f"{self._name}: {error}") from error
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from error

    def _make(self, pairs: Iterable[_Use]) -> dict[_Use, Any]:
        """Tensors for entries with kinds, those of one framework in one batch."""
        groups: dict[Adapter, list[tuple[int, str | None, str]]] = {}
        made: dict[_Use, Any] = {}
        for row, text in pairs:
            if text == BLOB:
                array = adapters.by_name("numpy").wrap(self._rows([row]), {})[0]
                made[row, text] = Blob(array.tobytes())
                continue
            adapter, kind = _resolve(text, self._adapter, self._forced)
            groups.setdefault(adapter, []).append((row, text, kind))
        for adapter, members in groups.items():
            kinds = {i: kind for i, (_, _, kind) in enumerate(members) if kind}
            tensors = self._wrap(adapter, self._rows([row for row, _, _ in members]), kinds)
            if adapter is self._adapter:
                tensors = self._place(tensors)
            for (row, text, _), tensor in zip(members, tensors, strict=True):
                made[row, text] = tensor
        return made

    def _rows(self, rows: list[int]) -> TensorBatch:
        at = rows if self._at is None else [self._at[row] for row in rows]
        return self._batch.take(at)


def _resolve(text: str | None, own: Adapter, forced: bool) -> tuple[Adapter, str]:
    """Whose tensor a leaf of this kind becomes, and what kind of one."""
    if text is None:
        return own, ""
    framework, kind = split_kind(text)
    if framework == own.name:
        return own, kind
    # NumPy has the dtypes of all those whose arrays are like its own.
    if opaque(text) and (own.name == "numpy" or not adapters.available(framework)):
        return adapters.by_name("numpy"), kind
    # Elements of a dtype that only the other framework has cannot be said otherwise.
    if adapters.available(framework) and (opaque(text) or not forced):
        return adapters.by_name(framework), kind
    return own, ""


def shared_out(index: Index, adapter: Adapter, *, forced: bool) -> tuple[set[int], set[int]]:
    """The entries that tensors of `adapter` are made of, and those that anything else is.

    An entry may be among both.
    """
    own: set[int] = set()
    others: set[int] = set()
    for row, text in _uses(index):
        mine = text != BLOB and _resolve(text, adapter, forced)[0] is adapter
        (own if mine else others).add(row)
    return own, others


def _uses(index: Index) -> dict[_Use, None]:
    """Every entry and kind that the tree asks for, once each."""
    uses: dict[_Use, None] = {}
    n = len(index)
    left = n  # what runs may cover together: a tree where they overlap is refused when decoded
    for _, node in tree.walk(index.tree):
        kind = node[-1] if type(node[-1]) is str else None
        first, count = (node[0], 1) if len(node) <= 2 else node[:2]
        if type(count) is not int or not (first >= 0 and 0 < count <= n - first):
            continue
        left -= count if len(node) > 2 else 0
        if left < 0:
            break
        uses.update(dict.fromkeys((row, kind) for row in range(first, first + count)))
    return uses


def _unblob(tensor: Any) -> bytes:
    """Bytes of the tensor that stands for them; a bad file may name any other tensor."""
    if not isinstance(tensor, Blob):
        raise ValueError("a tensor that was not stored for a bytes or str")
    return tensor.data


def rebuild(index: Index, leaf: Callable[[int, str | None], Any], name: str) -> Any:
    """The object that was saved, with what `leaf` returns in place of each tensor."""
    if index.structure is not None:
        return index.structure.outline(lambda row: leaf(row, None))
    return tree.decode_tree(
        index.tree,
        leaf,
        index.names.tolist(),
        adapters.codecs(only=None),
        name=name,
        unblob=_unblob,
    )
