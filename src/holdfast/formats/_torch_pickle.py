"""Objects as torch.save pickles them: the tensors found without running anything, then the object.

The pickle is run twice, by a machine that imports and calls nothing. The first run
(:func:`read_object`) turns every tensor into a row, checked against the storage that it is a view
of. The second (:meth:`PickledObject.replay`), where the object is wanted, puts tensors in their
places and asks a resolver for all else. All ways in which PyTorch 1.0 to 2.13 make tensors are
known: plain ones, parameters and Variables become rows; those of special kinds (sparse, quantized,
nested, of subclasses, on other devices) are asked for, the plain tensors in them being rows. The
integers of a quantized tensor are no entry: they are not its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..layout import Index, Names, Persistent, Resolver
from ._inert import Global, Record, Storage
from ._pickle_stack import PassedOver
from ._torch_names import STORAGE_TYPES
from ._torch_outline import Outline
from ._torch_paths import Paths
from ._torch_replay import Replay

__all__ = ["Given", "Pickled", "PickledObject", "build_index", "read_object"]

#: Row and code of a storage, and of a view its first element and the number of elements.
Given = tuple[int, int] | tuple[int, int, tuple[int, int]]


@dataclass(slots=True)
class Pickled:
    """What the first run found.

    Attributes
    ----------
    structure : PickledObject
    end : int
        Where the pickle ends, in the data that was given.
    keys : list of str
        Keys of the storages, in the order in which they are first named; each a plain name.
    storages : ndarray of STORAGE
        They know their size and dtype; where they are is for the format to say.
    locations : list of str
        The device that each storage was on.
    entries : ndarray of ENTRY
        Their offsets count from the start of their storage.
    dims, strides : ndarray of int64
        Strides in bytes.
    storage : ndarray of int64
        Row of `storages` for each entry.
    flags : ndarray of uint16 or None
    kinds : dict of int to str
    dense : bool
        Whether every entry is dense, in C order.
    """

    structure: PickledObject
    end: int
    keys: list[str]
    storages: np.ndarray
    locations: list[str]
    entries: np.ndarray
    dims: np.ndarray
    strides: np.ndarray
    storage: np.ndarray
    flags: np.ndarray | None
    kinds: dict[int, str]
    dense: bool

    @property
    def data(self) -> memoryview:
        """The bytes of the pickle."""
        return self.structure.data

    @property
    def root(self) -> Any:
        """The object, with inert stand-ins."""
        return self.structure.root

    @property
    def globals(self) -> list[str]:
        """What the pickle needs besides tensors and storages."""
        return self.structure.globals

    @property
    def names(self) -> Names:
        """What the entries are called."""
        if len(self.entries):  # in the tar, those that the format put here
            self.structure.count = len(self.entries)
        return _Names(self.structure)


class PickledObject:
    """The object around the tensors (:class:`holdfast.layout.Structure`).

    Attributes
    ----------
    data : memoryview
        The bytes of the pickle.
    globals : list of str
        The ``module.name`` that it needs, in order, but for those of tensors and storages.
    root : object
        What the first run made: containers and plain values, with ``Tensor``, ``Storage``,
        ``Global`` and ``Record`` of :mod:`holdfast.formats._inert` for all else. Not to be changed.
    count : int
        Of entries.
    """

    __slots__ = (
        "_base",
        "_events",
        "_gives",
        "_keys",
        "_late",
        "_name",
        "_passages",
        "_paths",
        "_rows",
        "_storages",
        "_tensors",
        "_where",
        "count",
        "data",
        "globals",
        "root",
    )  # fmt: skip

    def __init__(
        self,
        run: Outline,
        root: object,
        data: memoryview,
        name: str,
        where: str,
        base: int,
        tensors: Mapping[int, int] | None,
        storages: Mapping[int, Given] | None,
    ) -> None:
        self.root = root
        self.data = data
        self.globals = list(run.globals)
        self.count = 0
        self._name = name
        self._where = where
        self._base = base
        self._events = run.event_bytes()
        self._gives = run.gives()
        self._passages = run.passages_array()
        self._late = run.late
        self._keys = run.keys
        self._rows: dict[str, int] | None = None  # by key
        self._tensors = tensors
        self._storages = storages
        self._paths: Paths | None = None

    def walked(self) -> Paths:
        """The paths of the object; found when first asked for."""
        if self._paths is None:
            self._paths = Paths(self.root, self.count, len(self.data))
        return self._paths

    def paths(self) -> Mapping[str, int]:
        """Every name a tensor can be asked for, and its entry."""
        return self.walked().entries

    def replay(
        self,
        tensors: Sequence[Any],
        storages: Callable[..., object],
        resolver: Resolver,
        *,
        encoding: str | None = None,
    ) -> object:
        """The object, with `tensors`; see :class:`holdfast.layout.Structure`.

        Raises
        ------
        FormatError
            What the resolver raised, with the path of the object that it is about before it; its
            ``TypeError`` likewise. ``UnsafeError``, ``ImportError`` and ``OSError`` pass.
        """
        return Replay(
            self.data,
            0,
            self._name,
            self._where,
            self._base,
            self._events,
            self._late,
            self._gives,
            self._passages,
            tensors,
            storages,
            resolver,
            self._describe,
            self._tensors,
            encoding,
        ).replay()

    def outline(self, leaf: Callable[[int], object]) -> object:
        """The object with ``leaf(entry)`` for its tensors, and inert records for all classes."""
        return self.replay(_Leaves(leaf, self.count), Storage, _Inert())

    def persistent(self, pid: Any) -> Persistent:
        """What a persistent id stands for; see :class:`holdfast.layout.Structure`."""
        if type(pid) is int:
            if self._tensors is not None and pid in self._tensors:
                return Persistent(self._tensors[pid])
            return Persistent(-1, *(self._storages or {})[pid])
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise KeyError(pid)
        key = pid[2].decode() if type(pid[2]) is bytes else pid[2]
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self._keys)}
        view = pid[5] if len(pid) == 6 else None
        part = None if view is None else (view[1], view[2])
        return Persistent(-1, self._rows[key], STORAGE_TYPES[pid[1]], part)

    def _describe(self, offset: int) -> str:
        """What the opcode at an offset of the pickle is about, for messages."""
        path = self.walked().records.get(offset)
        if path is None:
            where = f"{self._where}: " if self._where else ""
            return f"{where}offset {self._base + offset}"
        return f"tensor {path!r}" if path else "the object"


class _Names:
    """Names of the entries (:class:`holdfast.layout.Names`), found when first asked for."""

    __slots__ = ("_structure",)

    def __init__(self, structure: PickledObject) -> None:
        self._structure = structure

    def __len__(self) -> int:
        return self._structure.count

    def tolist(self) -> list[str]:
        """Every name."""
        return list(self._structure.walked().names)

    def find(self, name: str) -> int:
        """Position of `name`, or -1."""
        walked = self._structure.walked()
        entry = walked.entries.get(name, -1)
        return entry if entry >= 0 and walked.names[entry] == name else -1


class _Leaves(Sequence[Any]):
    """``leaf(i)`` for each entry, made when asked for."""

    __slots__ = ("_count", "_leaf")

    def __init__(self, leaf: Callable[[int], object], count: int) -> None:
        self._leaf = leaf
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._leaf(i)


class _Inert:
    """A resolver that makes nothing but records of what it was asked for."""

    def find(self, module: str, name: str) -> object:
        return Global(module, name)

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        return Record(func, args, called=True)

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return Record(cls, args, kwargs)

    def build(self, obj: object, state: object) -> object:
        assert isinstance(obj, Record)  # the first run saw to it
        return obj.with_state(state)

    def extend(self, obj: object, items: list[Any]) -> None:
        assert isinstance(obj, Record)
        obj.items.extend(items)

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        assert isinstance(obj, Record)
        obj.pairs.extend(pairs)


def read_object(
    data: bytes | bytearray | memoryview,
    start: int = 0,
    *,
    name: str,
    where: str = "",
    base: int = 0,
    legacy: bool = False,
    tensors: Mapping[int, int] | None = None,
    storages: Mapping[int, Given] | None = None,
) -> Pickled:
    """Run the pickle of an object inertly, and find its tensors.

    Parameters
    ----------
    data : bytes-like
        Not copied: it has to stay as it is.
    start : int
        Where in `data` the pickle begins.
    name : str
        Of the file, for messages.
    where : str
        What the pickle is called in messages.
    base : int
        Offset of `data` in the file, for messages.
    legacy : bool
        Whether persistent ids are those of the legacy stream.
    tensors : mapping of int to int, optional
        Entries by the persistent ids, as in the tar.
    storages : mapping of int to tuple, optional
        Row and code of storages by the persistent ids, as in the tar; of those that are views, also
        their first element and how many they have.

    Raises
    ------
    FormatError
        The pickle is malformed or makes a tensor that does not fit into its storage.
    Truncated
        `data` ends before the pickle does; a FormatError too.
    """
    try:
        run = Outline(data, start, name, where, base, legacy, tensors, storages)
        root = run.outline()
    except PassedOver:
        run = Outline(data, start, name, where, base, legacy, tensors, storages, False)
        root = run.outline()
    view = memoryview(data).cast("B")[start : run.end]
    structure = PickledObject(run, root, view, name, where, base + start, tensors, storages)
    entries, dims, strides, owners, flags, dense = run.columns()
    structure.count = len(entries) if tensors is None else len(tensors)
    return Pickled(
        structure=structure,
        end=run.end,
        keys=run.keys,
        storages=run.storages(),
        locations=run.locations,
        entries=entries,
        dims=dims,
        strides=strides,
        storage=owners,
        flags=flags,
        kinds=run.kinds,
        dense=dense,
    )


def build_index(
    pickled: Pickled,
    *,
    metadata: Mapping[str, str] | None = None,
    framework: str | None = "torch",
    end: int = 0,
) -> Index:
    """The index of a file, once `pickled.storages` says where the storages are.

    Returns
    -------
    Index
        Its entries have their offsets in the file, counted as if no storage were deflated.
    """
    entries = pickled.entries.copy()
    if len(entries):
        entries["offset"] += pickled.storages["offset"][pickled.storage]
        entries["file"] = pickled.storages["file"][pickled.storage]
    return Index(
        names=pickled.names,
        entries=entries,
        dims=pickled.dims,
        metadata=dict(metadata or {}),
        framework=framework,
        end=end,
        strides=None if pickled.dense else pickled.strides,
        storages=pickled.storages,
        storage=pickled.storage,
        flags=pickled.flags,
        kinds=pickled.kinds,
        locations=pickled.locations,
        structure=pickled.structure,
    )
