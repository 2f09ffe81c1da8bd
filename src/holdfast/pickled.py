"""From storages in memory to tensors that share them, and to the object that was pickled.

The counterpart of :class:`holdfast.objects.Assembler` for files whose tensors are views of
storages, and whose objects are pickles rather than trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import storages, tree
from .adapters import Adapter, available, by_name
from .collect import opaque, split_kind
from .dtypes import DTYPES
from .errors import FormatError, UnsafeError
from .layout import Index, Persistent, Resolver
from .views import TensorBatch

__all__ = ["PickleAssembler", "Trust"]

#: Copies of views that may be made besides of what the storages hold, in bytes.
_MAX_COPIED = 1 << 28


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the pickle in a file is trusted.

    Attributes
    ----------
    weights_only : bool
        Whether only what an exact allow-list has may be made. Else the file may run code.
    safe_globals : sequence
        What the caller allows besides: classes and functions, or pairs of one and its full name.
    pickle_module : module or None
        What unpickles where `weights_only` is False; None for ``pickle``.
    pickle_args : dict
        Keywords for its ``Unpickler``; where `weights_only` is True, ``encoding`` alone counts.
    """

    weights_only: bool = True
    safe_globals: tuple[Any, ...] = ()
    pickle_module: Any = None
    pickle_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # None, the default of torch.load, means True there: it must not come to mean False here.
        if not isinstance(self.weights_only, bool):
            raise TypeError(
                f"weights_only must be True or False, not {type(self.weights_only).__name__}"
            )


class PickleAssembler:
    """Makes tensors of some entries of an index with storages, and the object they stand in.

    Parameters
    ----------
    index : Index
        With storages.
    batch : TensorBatch
        One row for each of `rows`, views of ``batch.storages``.
    rows : ndarray of int64
        Entries of `index`, ascending.
    adapter : Adapter
        Whose tensors they become.
    name : str
        What messages call the file.
    location : object
        ``map_location``.
    placed : bool
        Whether all storages are where `location` wants them already.
    trust : Trust
    """

    def __init__(
        self,
        index: Index,
        batch: TensorBatch,
        rows: np.ndarray,
        adapter: Adapter,
        *,
        name: str,
        location: Any = None,
        placed: bool = False,
        trust: Trust | None = None,
    ) -> None:
        assert batch.storages is not None
        self._index = index
        self._batch = batch
        self._rows = rows
        self._adapter = adapter
        self._name = name
        self._location = location
        self._placed = placed
        self._trust = trust or Trust()
        self._copied = 0
        self._handles: dict[int, Any] = {}
        self._made: dict[Persistent, Any] = {}

    # -- tensors ---------------------------------------------------------------------------------

    def named(self, names: dict[str, int]) -> dict[str, Any]:
        """A flat dict of the tensors of these entries."""
        made = self._tensors()
        at = {row: i for i, row in enumerate(self._rows.tolist())}
        return {name: made[at[row]] for name, row in names.items()}

    def _tensors(self) -> list[Any]:
        """A tensor for every row, those of one storage sharing it."""
        index, rows = self._index, self._rows
        kinds = self._kinds()
        strange = self._opaque(kinds)
        if len(strange):
            return self._apart(strange)
        simple = storages.alone(index, rows)
        if index.flags is not None:
            simple &= index.flags[rows] == 0
        if self._moves():
            simple[:] = False
        fast = np.flatnonzero(simple)
        if len(fast) == len(rows):
            return self._wrap(self._batch, kinds)
        made: list[Any] = [None] * len(rows)
        if len(fast):
            place = {row: i for i, row in enumerate(fast.tolist())}
            own = {place[i]: kind for i, kind in kinds.items() if i in place}
            for i, tensor in zip(fast.tolist(), self._wrap(self._part(fast), own), strict=True):
                made[i] = tensor
        slow = np.flatnonzero(~simple).tolist()
        self._bring([int(row) for row in np.unique(index.storage[rows[slow]])])  # type: ignore[index]
        for i in slow:
            made[i] = self._view(int(rows[i]), kinds.get(i, ""))
        return made

    def _kinds(self) -> dict[int, str]:
        """Kinds by the position in the batch, rather than by the entry."""
        kinds = self._index.kinds
        if not kinds or len(self._rows) == len(self._index):
            return dict(kinds)
        return {i: kinds[row] for i, row in enumerate(self._rows.tolist()) if row in kinds}

    def _opaque(self, kinds: dict[int, str]) -> np.ndarray:
        """Positions in the batch of what only another framework has elements for."""
        name = self._adapter.name
        found = [i for i, kind in kinds.items() if opaque(kind) and split_kind(kind)[0] != name]
        return np.array(found, np.int64)

    def _apart(self, which: np.ndarray) -> list[Any]:
        """Tensors, those at these positions being tensors of the framework that has them."""
        made: list[Any] = [None] * len(self._rows)
        framework = split_kind(self._kinds()[int(which[0])])[0]
        rest = np.setdiff1d(np.arange(len(self._rows)), which)
        for rows, adapter, location in (
            (which, by_name(framework), None),
            (rest, self._adapter, self._location),
        ):
            maker = PickleAssembler(
                self._index,
                self._part(rows),
                self._rows[rows],
                adapter,
                name=self._name,
                location=location,
            )
            for i, tensor in zip(rows.tolist(), maker._tensors(), strict=True):
                made[i] = tensor
        return made

    def _moves(self) -> bool:
        """Whether storages are to be elsewhere than where they were read."""
        if self._placed:
            return False
        locations: Sequence[str] = self._index.locations or ()
        if locations and len(self._rows) < len(self._index):
            locations = [locations[i] for i in storages.used(self._index, self._rows).tolist()]
        return self._adapter.relocates(locations, self._location)

    def _part(self, which: np.ndarray) -> TensorBatch:
        return self._batch.take(which)

    def _wrap(self, batch: TensorBatch, kinds: dict[int, str]) -> list[Any]:
        with self._blamed():
            return self._adapter.wrap(batch, kinds)

    def _blamed(self) -> _Blame:
        return _Blame(self._name)

    def _bring(self, which: list[int]) -> None:
        """Make handles of these storages, where there are none yet."""
        missing = [row for row in which if row not in self._handles]
        if not missing:
            return
        assert self._batch.storages is not None
        locations = self._index.locations
        # What the caller's own function raises is nothing that the file has to answer for.
        with nullcontext() if callable(self._location) else self._blamed():
            handles = self._adapter.wrap_storages(
                self._batch.storages.rows(missing),
                [locations[row] if locations else "cpu" for row in missing],
                self._index.storages["offset"][missing].tolist(),  # type: ignore[index]
                self._location,
            )
        self._handles.update(zip(missing, handles, strict=True))

    def _view(self, row: int, kind: str) -> Any:
        index = self._index
        assert index.storage is not None
        assert index.storages is not None
        entry = index.entries[row]
        dtype = DTYPES[int(entry["dtype"])]
        shape = index.shape(row)
        own = int(index.storage[row])
        first = int(entry["dims"])
        strides = None
        if index.strides is not None:
            strides = tuple(index.strides[first : first + len(shape)].tolist())
        flags = int(index.flags[row]) if index.flags is not None else 0
        with self._blamed():
            if flags:
                self._count_copy(min(int(entry["nbytes"]), int(index.storages["nbytes"][own])))
            return self._adapter.view(
                self._handles[own],
                dtype,
                int(entry["offset"]) - int(index.storages["offset"][own]),
                shape,
                strides,
                flags,
                kind,
            )

    def _count_copy(self, nbytes: int) -> None:
        """Note a view that frameworks without lazy ones copy; ValueError for too many of a file."""
        assert self._index.storages is not None
        self._copied += nbytes
        most = _MAX_COPIED + 2 * int(self._index.storages["nbytes"].sum())
        if self._adapter.name != "torch" and self._copied > most:
            raise ValueError(f"more than {most} bytes of copies, conjugated or negated")

    # -- the object ------------------------------------------------------------------------------

    def whole(self) -> Any:
        """The object that was saved."""
        index = self._index
        structure = index.structure
        if structure is None:
            names, made = index.names.tolist(), self._tensors()
            if index.tree is None:
                return dict(zip(names, made, strict=True))
            return tree.decode_tree(
                index.tree, lambda row, _: made[row], names, (), name=self._name, unblob=_no_blob
            )
        if not self._trust.weights_only:
            return self._unpickled()
        from .lenient import LenientResolver
        from .safe import SafeResolver

        resolver: Resolver = SafeResolver(
            self._adapter.name,
            safe_globals=self._trust.safe_globals,
            name=self._name,
            map_location=self._location,
        )
        if index.inert:
            resolver = LenientResolver(resolver)
        tensors = self._tensors()
        by_storage: dict[int, Any] | None = None

        def storage(row: int, code: int, part: tuple[int, int] | None = None) -> object:
            nonlocal by_storage
            if by_storage is None:  # hardly ever: nothing but a bare storage needs it
                by_storage = self._by_storage(tensors)
            if row in by_storage and row not in self._handles:
                self._handles[row] = self._adapter.handle_of(by_storage[row])
            return self._persistent(Persistent(-1, row, code, part))

        encoding = self._trust.pickle_args.get("encoding")
        return structure.replay(tensors, storage, resolver, encoding=encoding)

    def _persistent(self, found: Persistent) -> Any:
        """The tensor or storage that a persistent id stands for, the same one each time."""
        if found not in self._made:
            index = self._index
            row = found.row
            if found.entry >= 0:
                assert index.storage is not None
                row = int(index.storage[found.entry])
            self._bring([row])
            if found.entry >= 0:
                made = self._view(found.entry, index.kinds.get(found.entry, ""))
            else:
                made = self._adapter.storage(self._handles[row], found.code, found.part)
            self._made[found] = made
        return self._made[found]

    def _by_storage(self, tensors: list[Any]) -> dict[int, Any]:
        """For storages that one tensor alone has, that tensor."""
        assert self._index.storage is not None
        rows = np.arange(len(self._index))
        simple = np.flatnonzero(storages.alone(self._index, rows)).tolist()
        own = self._index.storage[simple].tolist()
        return {row: tensors[i] for row, i in zip(own, simple, strict=True)}

    def _unpickled(self) -> Any:
        """The object, made by an unpickler that does all that the file says."""
        from .unpickling import unpickle

        structure = self._index.structure
        assert structure is not None

        def persistent(pid: Any) -> object:
            if isinstance(pid, tuple) and len(pid) > 1:
                pid = (pid[0], getattr(pid[1], "name", None), *pid[2:])
            try:
                found = structure.persistent(pid)
            except KeyError:
                kind = type(pid).__name__
                text = f"a persistent id, a {kind}, that names nothing in the file"
                raise FormatError(f"{self._name}: {text}") from None
            return self._persistent(found)

        return unpickle(
            structure.data,
            self._trust.pickle_module,
            persistent,
            name=self._name,
            map_location=self._location,
            stand_in=None if self._adapter.name == "torch" else self._stand_in(),
            **self._trust.pickle_args,
        )

    def _stand_in(self) -> Callable[[str, str], Any]:
        """What stands for PyTorch's own where its tensors are to be those of another framework."""
        from .safe import SafeResolver, StandIn

        resolver = SafeResolver(self._adapter.name, name=self._name)

        def find(module: str, name: str) -> Any:
            try:
                return StandIn.of(resolver, module, name)
            except UnsafeError:
                what = f"{self._name}: to unpickle this file needs {module}.{name}"
            if available("torch"):
                raise TypeError(f"{what}: load it with framework='torch'")
            raise ImportError(f"{what}: pip install torch", name="torch")

        return find


def _no_blob(tensor: Any) -> bytes:
    raise ValueError(f"a {type(tensor).__name__} where the bytes of a text should be")


class _Blame:
    """Puts the file's name before what an adapter has to say of its content."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FormatError):
            return
        if isinstance(error, ValueError):
            raise FormatError(f"{self._name}: {error}") from error
        if isinstance(error, TypeError):
            raise TypeError(f"{self._name}: {error}") from error
        if kind is RuntimeError:  # of torch, which lacks the device that a storage was on, say
            raise RuntimeError(f"{self._name}: {error}") from error
