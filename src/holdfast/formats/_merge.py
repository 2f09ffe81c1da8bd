"""The indexes of several files made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..dtypes import DTYPES
from ..errors import FormatError
from ..layout import ENTRY, STORAGE, Index
from ..views import dense_strides
from ._header_text import short
from ._records import NameList

__all__ = ["merge", "select"]

#: A file, its index, and of that the names wanted and their entries; None for all there are.
Shard = tuple[str, Index, tuple[list[str], list[int]] | None]


def _paths(index: Index) -> dict[str, int]:
    """Every name in a file, and its entry."""
    if index.structure is not None:
        return dict(index.structure.paths())
    return {name: i for i, name in enumerate(index.names.tolist())}


def select(index: Index, wanted: Sequence[str], name: str) -> tuple[list[int], list[str]]:
    """The entries of these names in a file, and the names of all others.

    Raises
    ------
    FormatError
        One is not in it.
    """
    paths = _paths(index)
    missing = [tensor for tensor in wanted if tensor not in paths]
    if missing:
        raise FormatError(
            f"{name}: tensor {short(missing[0])} is not in it, as the index says "
            f"({len(missing)} are missing)"
        )
    taken = set(wanted)
    chosen = [paths[tensor] for tensor in wanted]
    used = set(chosen)
    rest = [tensor for tensor, row in paths.items() if tensor not in taken and row not in used]
    return chosen, rest


@dataclass(slots=True)
class _Merger:
    """Columns of many files, end to end."""

    placed: bool  # whether tensors are views of storages, in any of them
    strided: bool
    names: list[str] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)
    dims: list[np.ndarray] = field(default_factory=list)
    strides: list[np.ndarray] = field(default_factory=list)
    storages: list[np.ndarray] = field(default_factory=list)
    storage: list[np.ndarray] = field(default_factory=list)
    flags: list[np.ndarray] = field(default_factory=list)
    crcs: list[np.ndarray] = field(default_factory=list)
    checked: list[np.ndarray] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    encodings: dict[int, str] = field(default_factory=dict)
    ndims: int = 0
    nstorages: int = 0

    def add(self, number: int, index: Index, names: list[str], rows: np.ndarray) -> None:
        """Append entries of the file that has this number."""
        entries = index.entries[rows]
        entries["dims"] += self.ndims
        entries["file"] = number
        n = len(rows)
        base = len(self.names)
        for texts, own in ((self.kinds, index.kinds), (self.encodings, index.encodings)):
            chosen = enumerate(rows.tolist() if own else ())
            texts.update((base + i, own[row]) for i, row in chosen if row in own)
        self.names += names
        self.entries.append(entries)
        self.dims.append(index.dims)
        self.ndims += len(index.dims)
        if self.strided:
            self.strides.append(_strides(index) if index.strides is None else index.strides)
        self.flags.append(np.zeros(n, np.uint16) if index.flags is None else index.flags[rows])
        if self.placed:
            self._add_storages(number, index, entries, rows)
            return
        known = index.crcs is not None
        self.crcs.append(index.crcs[rows] if index.crcs is not None else np.zeros(n, np.uint32))
        self.checked.append(np.full(n, known))

    def _add_storages(
        self, number: int, index: Index, entries: np.ndarray, rows: np.ndarray
    ) -> None:
        if index.storages is not None and index.storage is not None:
            own = index.storages.copy()
            of = index.storage[rows]
            where = list(index.locations or ["cpu"] * len(own))
        else:
            own = np.zeros(len(rows), STORAGE)
            for column in ("offset", "nbytes", "dtype"):
                own[column] = entries[column]
            if index.crcs is not None:
                own["crc"], own["flags"] = index.crcs[rows], 1
            of = np.arange(len(rows))
            where = ["cpu"] * len(own)
        own["file"] = number
        self.storages.append(own)
        self.storage.append(of + self.nstorages)
        self.locations += where
        self.nstorages += len(own)


def _strides(index: Index) -> np.ndarray:
    """Strides in bytes of entries that are all dense."""
    found = np.zeros(len(index.dims), np.int64)
    for row in range(len(index)):
        first, ndim = int(index.entries["dims"][row]), int(index.entries["ndim"][row])
        itemsize = DTYPES[int(index.entries["dtype"][row])].itemsize
        found[first : first + ndim] = dense_strides(index.shape(row), itemsize)
    return found


def _joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def merge(name: str, shards: Sequence[Shard], order: Sequence[str] | None = None) -> Index:
    """One index of several files, as a flat dict of tensors.

    A single file that is asked for whole keeps its structure.

    Parameters
    ----------
    name : str
        For messages.
    order : sequence of str, optional
        The names in the order that they are to have.

    Raises
    ------
    FormatError
        A name stands in two of them.
    """
    if len(shards) == 1 and shards[0][2] is None:
        file, only, _ = shards[0]
        only.files = [file]
        return only
    merger = _Merger(
        placed=any(index.storages is not None for _, index, _ in shards),
        strided=any(index.strides is not None for _, index, _ in shards),
    )
    for number, (_, index, chosen) in enumerate(shards):
        if chosen is None:
            paths = _paths(index)
            chosen = list(paths), list(paths.values())
        merger.add(number, index, chosen[0], np.array(chosen[1], np.int64))
    frameworks = {index.framework for _, index, _ in shards}
    metadata: dict[str, str] = {}
    for _, index, _ in shards:
        metadata |= index.metadata
    merged = Index(
        NameList(merger.names),
        _joined(merger.entries, ENTRY),
        _joined(merger.dims, np.dtype(np.int64)),
        metadata,
        framework=frameworks.pop() if len(frameworks) == 1 else None,
        files=[file for file, _, _ in shards],
        strides=_joined(merger.strides, np.dtype(np.int64)) if merger.strided else None,
        kinds=merger.kinds,
        encodings=merger.encodings,
        format=shards[0][1].format if shards else "",
    )
    flags = _joined(merger.flags, np.dtype(np.uint16))
    merged.flags = flags if flags.any() else None
    if merger.placed:
        merged.storages = _joined(merger.storages, STORAGE)
        merged.storage = _joined(merger.storage, np.dtype(np.int64))
        merged.locations = merger.locations
    else:
        checked = _joined(merger.checked, np.dtype(np.bool_))
        if checked.any():
            merged.crcs = _joined(merger.crcs, np.dtype(np.uint32))
            merged.checked = None if checked.all() else checked
    _reorder(merged, order, name)
    return merged


def _reorder(index: Index, order: Sequence[str] | None, name: str) -> None:
    """Give the entries the order of these names."""
    names = index.names.tolist()
    position = {tensor: i for i, tensor in enumerate(names)}
    if len(position) != len(names):
        seen: set[str] = set()
        twice = next(t for t in names if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise FormatError(f"{name}: tensor {short(twice)} stands in two files")
    if order is None or list(order) == names:
        return
    rows = np.array([position[tensor] for tensor in order], np.int64)
    index.names = NameList(list(order))
    index.entries = index.entries[rows]
    for texts in ("kinds", "encodings"):
        own = getattr(index, texts)
        chosen = enumerate(rows.tolist() if own else ())
        setattr(index, texts, {i: own[row] for i, row in chosen if row in own})
    for column in ("storage", "flags", "crcs", "checked"):
        values = getattr(index, column)
        if values is not None:
            setattr(index, column, values[rows])
