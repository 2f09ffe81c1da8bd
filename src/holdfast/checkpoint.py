"""A checkpoint opened and not yet loaded: names at once, tensors when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np

import holdfast

from . import adapters, ahead, fetch, objects
from .booleans import BOOL, settle
from .collect import opaque
from .destinations import destination, said_of
from .fetch import Destination
from .folder import FolderSource, Origin, open_origin
from .layout import Entry
from .maps import Maps
from .reader import Reader
from .source import FileLike
from .views import TensorBatch

__all__ = ["Checkpoint", "TensorSlice", "open_checkpoint"]


class TensorSlice:
    """One tensor of a checkpoint, of which parts are taken: what ``Checkpoint.slice`` returns.

    Index it as the tensor itself (``f.slice(name)[10:20, ::2]``). Of a mapped file only the pages
    that the part touches are read; otherwise the rows of the first axis that it spans.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        As ``Checkpoint.info`` has them; but where that tells of the bytes of elements whose type
        the dtype table lacks, these are those of the elements.
    """

    __slots__ = ("_checkpoint", "_name", "dtype", "shape")

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.info(name)
        self._checkpoint = checkpoint
        self._name = name
        self.shape = info.shape
        self.dtype = info.dtype
        reader = checkpoint._reader
        kind = opaque(reader.kinds.get(reader.find(name)))
        if kind:
            self.shape, self.dtype = info.shape[:-1], kind.removeprefix("dtype:")

    def __getitem__(self, key: Any) -> Any:
        return self._checkpoint._part(self._name, key)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"tensor {self._name!r} has no axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<TensorSlice {self._name!r} {self.dtype} {self.shape}>"


class Checkpoint(Mapping[str, Any]):
    """The tensors of a file by name, each read when it is asked for; made by :func:`holdfast.open`.

    Opening reads the header and nothing else. On a local file system tensors are views of a
    private, writable map of the file and cost no read until they are touched, but those of bool,
    each byte of which has to be 0 or 1; elsewhere, and for file objects, each is read when asked
    for. Tensors stay valid after ``close``: they keep the
    memory they need. Threads may share it; ``close`` beside one that is reading lets that end
    first, without waiting for it.

    Attributes
    ----------
    metadata : mapping of str to object
        What the one who saved it put there: texts, or of a GGUF file values and lists of them.
    """

    def __init__(
        self,
        source: Origin,
        framework: str | None,
        threads: int,
        strict: bool = False,
        dequantize: bool = False,
        location: Any = None,
        staging: holdfast.Staging | None = None,
    ) -> None:
        self._reader = Reader(source, strict=strict)
        self._dequantize = dequantize
        self._staging = staging
        if dequantize:
            from .dequantize import dequantized

            self._reader.described = dequantized(self._reader.index)
        self._threads = threads
        self._maps: Maps | None = None
        self._held: dict[int, Any] = {}
        self._settled: set[int] = set()  # entries of bool whose mapped bytes were looked at
        self._laid: TensorBatch | None = None  # where all tensors are in the map, and ...
        self._plain = b""  # ... for each, 1 if it is what stands there, 2 if it is large, too
        self._asked = 0  # for so many tensors
        self._closed = False
        # One for each thread that reads from the file, with its process: a fork copies them.
        self._users: set[tuple[int, object]] = set()
        self._ending = [self._reader.source]  # whoever takes it from here closes it
        index = self._reader.index
        self._location = location = said_of(index, location)
        self._adapter = adapters.choose(framework, index.framework)
        self._forced = framework is not None
        # Asked for once, not for every tensor, but not before one is wanted: some frameworks have
        # no memory but a device's, and names are to be had without any device.
        self._elsewhere: bool | None = True if location is not None else None
        self._mapped = self._reader.source.local
        if self._mapped and isinstance(self._reader.source, FolderSource):
            # Its files are opened by name, and may be gone when they are wanted: see FolderSource.
            self._map()
        texts = isinstance(index.metadata, dict)
        self.metadata: Mapping[str, Any] = dict(index.metadata) if texts else index.metadata

    # The names.

    def __len__(self) -> int:
        index = self._reader.index
        plain = index.tree is None and index.structure is None
        return (len(index) if plain else len(self._reader.paths())) + len(index.refused)

    def __iter__(self) -> Iterator[str]:
        yield from self._reader.paths()
        yield from self._reader.index.refused

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            self._reader.position(name) >= 0 or name in self._reader.index.refused
        )

    # Two checkpoints are equal where they are one; comparing would read both.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor called `name`, or `default` where there is none."""
        row = self._reader.position(name)
        if row >= 0:
            return self._tensor(row)
        self._reader.check([name])
        return default

    def info(self, name: str) -> Entry:
        """Name, dtype, shape, size, offset and file of one tensor; nothing is read.

        Raises
        ------
        KeyError
            No tensor has this name.
        FormatError
            What has this name cannot be read: an array of Python objects.
        """
        return self._reader.entry(name, self._reader.find(name))

    def tree(self) -> Any:
        """The object that was saved, with an :class:`Entry` in place of every tensor."""
        self._reader.check()
        index = self._reader.index
        names = index.names.tolist()

        def leaf(row: int, kind: str | None) -> Any:
            # A long bytes or str is no tensor of the user's: it is read.
            return self._wrap(row) if kind == "blob" else self._reader.entry(names[row], row)

        return objects.rebuild(index, leaf, self._reader.source.name)

    # The tensors.

    def __getitem__(self, name: str) -> Any:
        return self._tensor(self._reader.find(name))

    def _tensor(self, row: int, whole: bool = True) -> Any:
        held = self._held.get(row)
        return self._wrap(row, whole) if held is None else held

    def slice(self, name: str) -> TensorSlice:
        """One tensor to take parts of, with no more read than they need."""
        return TensorSlice(self, name)

    def prefetch(self, keys: str | Iterable[str] | None = None) -> None:
        """Bring tensors into memory now, with several threads, so that using them does not wait.

        Parameters
        ----------
        keys : str or iterable of str, optional
            Names or patterns; by default all tensors, without what cannot be read.
        """
        index = self._reader.index
        with self._using():
            if keys is None:
                rows = np.arange(len(index), dtype=np.int64)
            else:
                rows = np.array(sorted(set(self._reader.select(keys).values())), np.int64)
            to = self._destination(rows)
            if self._mapped and to is None:
                ahead.bring(self._map(), fetch.stretches(index, rows), self._threads)
                return
            maker = self._assembler(self._read(rows, to), rows, to)
            made = maker.named({str(row): row for row in rows.tolist()})
            self._held.update((int(row), tensor) for row, tensor in made.items())

    def close(self) -> None:
        """Close the file. Tensors already taken stay valid.

        Where another thread is reading from it, that happens once it is through.
        """
        self._closed = True
        self._leave()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self._reader.source.name}: an open checkpoint can be neither copied nor pickled; "
            "open the file again"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<holdfast.Checkpoint {self._reader.source.name!r}, {len(self)} tensors, {state}>"

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the file open meanwhile: a descriptor closed beneath a read may become another's.

        Without a lock, that a fork or a signal could find taken: a set changes in one step.
        """
        user = os.getpid(), object()
        try:
            self._users.add(user)
            if self._closed:
                raise ValueError(f"{self._reader.source.name}: the checkpoint is closed")
            yield
        finally:
            self._users.discard(user)
            if self._closed:
                self._leave()

    def _leave(self) -> None:
        """Close the file, which is to be closed, unless a thread reads from it."""
        own = os.getpid()
        if not self._ending or any(pid == own for pid, _ in list(self._users)):
            return
        self._laid = None
        self._held.clear()
        self._maps = None
        with suppress(IndexError):  # another thread was first
            self._ending.pop().close()

    def _map(self) -> Maps:
        maps = self._maps
        if maps is None:
            self._maps = maps = self._reader.source.maps(self._reader.index)
        return maps

    def _destination(self, rows: np.ndarray) -> Destination | None:
        """The devices that these entries are read to; None for the memory of the host alone."""
        if not self._away() or self._dequantize or self._adapter.dataless(self._location):
            return None
        return destination(
            self._reader.source,
            self._reader.index,
            rows,
            self._adapter,
            location=self._where,
            kinds=self._reader.kinds,
            forced=self._forced,
            staging=self._staging,
        )

    def _away(self) -> bool:
        """Whether tensors may have to be anywhere but in the memory of the host."""
        if self._elsewhere is None:
            self._elsewhere = self._adapter.destination(None) != 0
        return self._elsewhere

    @property
    def _where(self) -> Any:
        """``map_location``: by default what is opened stays in the memory of the host."""
        locations = self._reader.index.locations
        return "cpu" if self._location is None and locations else self._location

    def _read(self, rows: np.ndarray, to: Destination | None) -> TensorBatch:
        index = self._reader.index
        batch = fetch.read_tensors(
            self._reader.source,
            index,
            rows,
            verify=fetch.checkable(index),
            threads=self._threads,
            to=to,
        )
        return settle(index, batch)

    def _lay(self) -> None:
        """Find out at once where all tensors are, once enough of them are asked for singly.

        To look at one costs a dozen array operations, to look at hundreds hardly more.
        """
        index = self._reader.index
        self._asked += 1
        if (
            self._asked <= len(index) // 512
            or self._away()
            or self._dequantize
            or not self._mapped
            or index.storages is not None
        ):
            return
        batch, stray = fetch.lay(index, index.entries, self._map())
        plain = ~stray & (batch.views["dtype"] != BOOL)
        plain[list(self._reader.kinds)] = False
        large = plain & (index.entries["nbytes"] >= ahead.EXPECT_LEAST)
        self._plain, self._laid = (plain.astype("u1") + large).tobytes(), batch

    def _wrap(self, row: int, whole: bool = True) -> Any:
        laid = self._laid
        if laid is None:
            with self._using():
                self._lay()
                laid = self._laid
                if laid is None:
                    return self._wrap_apart(row, whole)
        if self._plain[row]:
            maps = self._maps
            if whole and self._plain[row] > 1 and maps is not None:
                self._expect(row, maps)
            owner = None if laid.owner is None else laid.owner[row : row + 1]
            one = TensorBatch(laid.views[row : row + 1], laid.dims, laid.owners, owner=owner)
            try:
                return self._adapter.wrap(one, {})[0]
            except (TypeError, ValueError):
                pass  # it is told below of what
        with self._using():
            return self._wrap_apart(row, whole)

    def _wrap_apart(self, row: int, whole: bool) -> Any:
        """A tensor that takes more than to say where it is in the map."""
        index = self._reader.index
        rows = np.array([row], np.int64)
        to = self._destination(rows)
        if self._mapped and to is None:
            if whole:
                self._expect(row, self._map())
            batch = fetch.map_tensors(self._reader.source, index, rows, self._map())
            if index.entries["dtype"][row] == BOOL and row not in self._settled:
                settle(index, batch)
                if self._map().cover(batch.views["address"]).all():
                    self._settled.add(row)
        else:
            batch = self._read(rows, to)
        return self._assembler(batch, rows, to).named({"": row})[""]

    def _expect(self, row: int, maps: Maps) -> None:
        """All of a tensor is going to be used."""
        index = self._reader.index
        at = index.entries[row]
        nbytes = int(at["nbytes"])
        if nbytes < ahead.EXPECT_LEAST:
            return
        if index.storages is None:
            ahead.expect_one(maps, int(at["file"]), int(at["offset"]), nbytes)
        else:
            ahead.expect(maps, fetch.stretches(index, np.array([row], np.int64)))

    def _assembler(
        self, batch: TensorBatch, rows: np.ndarray, to: Destination | None
    ) -> objects.Maker:
        if self._dequantize:
            from .dequantize import dequantize

            batch = dequantize(self._reader.index, batch, rows, threads=self._threads)
        return objects.assembler(
            self._reader.index,
            batch,
            rows,
            self._adapter,
            name=self._reader.source.name,
            forced=self._forced,
            kinds=self._reader.kinds,
            location=self._where,
            placed=to is not None and to.whole,
        )

    def _part(self, name: str, key: Any) -> Any:
        row = self._reader.find(name)
        shape = self._reader.described.shape(row)
        first = key[0] if isinstance(key, tuple) and key else key
        plain = shape and type(first) in (int, slice) and row not in self._reader.kinds
        plain = plain and not (self._dequantize and row in self._reader.index.encodings)
        if (
            (self._mapped and self._location is None)
            or row in self._held
            or not (plain and fetch.partial(self._reader.index, row))
        ):
            return self._tensor(row, whole=False)[key]
        rest = key[1:] if isinstance(key, tuple) else ()
        start, stop, local = _span(first, shape[0], name)
        with self._using():
            batch = fetch.read_part(
                self._reader.source,
                self._reader.index,
                row,
                start * math.prod(shape[1:]),
                (stop - start, *shape[1:]),
            )
        part = self._adapter.wrap(settle(self._reader.index, batch), {})[0]
        if self._location is not None:
            part = self._adapter.place(part, self._location)
        return part[(local,) + rest]


def _span(key: int | slice, extent: int, name: str) -> tuple[int, int, int | slice]:
    """Rows of the first axis to read, and the key that takes the asked ones out of them."""
    if isinstance(key, int):
        row = key + extent if key < 0 else key
        if not 0 <= row < extent:
            raise IndexError(f"tensor {name!r}: index {key} is out of range for {extent} rows")
        return row, row + 1, 0
    rows = range(extent)[key]
    if not rows:
        return 0, 0, slice(0, 0)
    low, high = min(rows[0], rows[-1]), max(rows[0], rows[-1])
    step = rows.step
    local = slice(rows[0] - low, None if step < 0 else high - low + 1, step)
    return low, high + 1, local


def open_checkpoint(
    f: FileLike,
    framework: str | None,
    threads: int,
    strict: bool = False,
    dequantize: bool = False,
    location: Any = None,
    staging: holdfast.Staging | None = None,
) -> Checkpoint:
    """What :func:`holdfast.open` does."""
    return Checkpoint(open_origin(f), framework, threads, strict, dequantize, location, staging)
