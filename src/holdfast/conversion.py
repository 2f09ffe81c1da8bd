"""From one format to another: tensors' bytes copied from map to file, never made tensors of."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from . import adapters, ahead, fetch, formats, objects, sharding, storages
from .annotated import as_texts
from .collect import Collection, collect, split_kind
from .errors import FormatError, UnsafeError, warn
from .folder import open_origin
from .formats import Writing
from .layout import FOREIGN, SEGMENT, Plan, Structure
from .maps import Maps
from .omitting import Omitting, Storage
from .pickling import pickle_around
from .publish import check_target, write_out
from .reader import Reader
from .references import Ref, RefAdapter, RefStorages, view_of
from .safe import SafeResolver
from .saving import SaveOptions, written_apart
from .scratch import float_index, floats_of
from .source import FileLike, is_path
from .views import TensorBatch

__all__ = ["convert_file"]


class _Conversion:
    """A file that is open to be converted.

    Parameters
    ----------
    reader : Reader
    threads : int
        0 lets the engine choose.
    dequantize : bool
        Whether blocks of quantized numbers become float32, where their type is known.
    folder : str, optional
        Where a file without a name may be for those; by default that of temporary files.
    """

    def __init__(
        self, reader: Reader, threads: int, dequantize: bool = False, folder: str | None = None
    ) -> None:
        reader.check()
        self.index = index = reader.index
        self.reader = reader
        self.threads = threads
        foreign = index.storages is not None and index.storages["flags"] & FOREIGN
        self.swapped = bool(np.any(foreign))
        source = reader.source
        rows = np.arange(len(index), dtype=np.int64)
        self.maps: Maps | None = None
        if source.mappable:
            self.maps = source.maps(index)
            ahead.pass_through(self.maps)
            self.batch = fetch.map_tensors(source, index, rows, self.maps, aligned=False)
        else:
            check = fetch.checkable(index)
            self.batch = fetch.read_tensors(source, index, rows, verify=check, threads=threads)
        if dequantize:
            self._dequantize(folder)
        self._adapters: dict[str | None, RefAdapter] = {}
        self._views: dict[tuple[int, int, Any], int] | None = None

    def _dequantize(self, folder: str | None) -> None:
        """Put floats in the place of blocks. What has a checksum is checked here and now."""
        index, source = self.index, self.reader.source
        self.index = float_index(index)
        if self.index is index:
            return
        self.swapped = False
        if fetch.checkable(index):
            rows = np.arange(len(index), dtype=np.int64)
            fetch.verify_rows(source, index, rows, threads=self.threads)
        self.batch, floats = floats_of(source, index, self.batch, folder, self.threads)
        self.maps = Maps([*(self.maps.buffers if self.maps is not None else ()), floats])

    @property
    def adapters(self) -> list[Any]:
        """Of every framework whose tensors there are."""
        return list(self._adapters.values())

    def ref(self, row: int) -> Ref:
        """The stand-in for the tensor of an entry."""
        framework, kind = self.index.framework, self.reader.kinds.get(row, "")
        if kind and self.index.structure is None:
            framework, kind = split_kind(kind)
        return self._adapter(framework).ref(row, kind)  # type: ignore[no-any-return]

    def _adapter(self, framework: str | None) -> RefAdapter:
        if framework not in self._adapters:
            self._adapters[framework] = RefAdapter(framework, self.index, self.batch)
        return self._adapters[framework]

    def object(self) -> Any:
        """The object in the file around stand-ins; where it cannot be made, its tensors by name."""
        index, reader = self.index, self.reader
        if index.tree is not None:
            return objects.rebuild(index, self._leaf, reader.source.name)
        if index.structure is not None:
            try:
                return self._replayed(index.structure)
            except (FormatError, TypeError) as error:
                return self.flat(error)
        return self._by_name()

    def _by_name(self) -> dict[str, Any]:
        return {name: self.ref(row) for name, row in self.reader.paths().items()}

    def flat(self, error: Exception) -> dict[str, Any]:
        """The tensors by name, with a warning, where the object around them cannot be written.

        Raises
        ------
        Exception
            `error`, if there is no more to the file than its tensors.
        TypeError
            The file holds more than the tensors that have names.
        """
        if self.index.structure is None:
            raise error
        self._refuse_loss()
        warn(
            f"{self.reader.source.name}: converted as a flat dict of its tensors, since the object "
            f"itself needs more than values: {error}"
        )
        return self._by_name()

    def _replayed(self, structure: Structure) -> Any:
        """The object around stand-ins. Its framework is imported only if it has values of it."""
        name = self.reader.source.name
        refs = [self.ref(row) for row in range(len(self.index))]
        plain = _Plain(name, self.index.framework or "")
        try:
            return structure.replay(refs, _untold, plain)
        except UnsafeError:
            if not plain.needed:
                raise
        framework = adapters.choose(None, self.index.framework).name
        resolver = Omitting(framework, self._entry, name=name)
        made = structure.replay(refs, _untold, resolver)
        if resolver.omitted:
            few = [repr(key[:40]) for key in itertools.islice(resolver.omitted, 10)]
            more = ", …" if len(resolver.omitted) > len(few) else ""
            warn(f"{name}: attributes of tensors are left out: {', '.join(few)}{more}")
        return made

    def _entry(self, storage: int, code: int, view: tuple[Any, Any, Any]) -> Ref | None:
        """The stand-in for a view of a storage, where an entry is that."""
        index = self.index
        if self._views is None:
            assert index.storage is not None
            owners, dtypes = index.storage.tolist(), index.entries["dtype"].tolist()
            lazy = [0] * len(index) if index.flags is None else index.flags.tolist()
            self._views = {
                (owners[row], dtypes[row], view_of(index, row)): row
                for row in range(len(index))
                if not lazy[row]
            }
        row = self._views.get((storage, code, view))
        return None if row is None else self._adapter(index.framework).ref(row, "")

    def _refuse_loss(self) -> None:
        """Raise TypeError where the file holds more than the tensors that have names."""
        index = self.index
        if index.storages is None or index.storage is None:
            return
        lost = np.setdiff1d(np.arange(len(index.storages)), index.storage)
        if len(lost):
            raise TypeError(
                f"{self.reader.source.name}: {len(lost)} of its {len(index.storages)} storages are "
                "those of no plain tensor (quantized ones, or storages by themselves): load and "
                "save it instead of converting it"
            )

    def _leaf(self, row: int, kind: str | None) -> Any:
        if kind != objects.BLOB:
            framework, text = split_kind(kind) if kind else (self.index.framework, "")
            return self._adapter(framework).ref(row, text)
        address, nbytes = self.batch.views[["address", "nbytes"]][row].tolist()
        return objects.Blob(ctypes.string_at(address, nbytes))

    def mapped(self, batch: TensorBatch) -> np.ndarray:
        """Which rows of `batch` are in a map of the file."""
        if self.maps is None or not self.maps.buffers:
            return np.zeros(len(batch), bool)
        return self.maps.cover(batch.views["address"])

    def verify(self, rows: np.ndarray, whole: bool) -> None:
        """Raise ChecksumError for damage that :meth:`check` will not see, before it is copied."""
        if not fetch.checkable(self.index):
            return
        if self.swapped:
            rows = np.arange(len(self.index), dtype=np.int64)
        elif whole:
            return
        else:
            # What is a view among others of checked bytes has no checksum of its own.
            rows = rows[~fetch.expected_crcs(self.index, rows)[0]]
        if len(rows):
            fetch.verify_rows(self.reader.source, self.index, rows, threads=self.threads)

    def check(self, crcs: np.ndarray, rows: np.ndarray, whole: bool) -> None:
        """Raise ChecksumError where what was written is not what the file says it holds.

        Parameters
        ----------
        crcs : ndarray of uint32
            Of what was written, which is what the file holds unless bytes were swapped.
        rows : ndarray of int64
            The entry, or with `whole` the storage, that each of them is of; -1 for none.
        """
        if self.swapped:
            return
        crcs, rows = crcs[rows >= 0], rows[rows >= 0]
        index, name = self.index, self.reader.source.name
        if whole and index.storages is not None:
            storages.damage(name, index, rows, crcs)
            return
        segments = np.zeros(len(rows), SEGMENT)
        segments["crc"] = crcs
        fetch.check(name, index, rows, segments)


class _Plain(SafeResolver):
    """Allows plain values; `needed` says that it stopped at one of the framework's."""

    def __init__(self, name: str, framework: str) -> None:
        super().__init__("numpy", name=name)
        self.needed = False
        self._framework = framework

    def find(self, module: str, name: str) -> object:
        """What a pickle means by ``module.name``."""
        if module.partition(".")[0] == self._framework:
            self.needed = True
            raise UnsafeError(f"{module}.{name} is a value of {self._framework}")
        return super().find(module, name)


def _untold(row: int, code: int, *_: object) -> Storage:
    return Storage(row, code)


def convert_file(
    src: FileLike, dst: FileLike, options: SaveOptions, *, dequantize: bool = False
) -> None:
    """What :func:`holdfast.convert` does."""
    if options.max_shard_size is not None:
        most = sharding.size_of(options.max_shard_size)
        folder = sharding.target(dst, options)
        _convert_to_shards(src, folder, options, most, dequantize)
        return
    check_target(dst)
    path = os.fsdecode(dst) if is_path(dst) else ""  # type: ignore[arg-type]
    stem, extension = os.path.splitext(os.path.basename(path))
    apart = written_apart(options.format)
    if apart is not None:
        _convert_apart(src, dst, apart, replace(options, checksum=True), dequantize)
        return
    form = formats.for_saving(options.format, extension.lower())
    with Reader(open_origin(src)) as reader:
        work = _Conversion(reader, options.threads, dequantize, _around(dst))
        plan = {"tree": _plan_tree, "arrays": _plan_arrays, "array": _plan_arrays}.get(
            form.STRUCTURE, _plan_pickle
        )
        checksum = formats.checksummed(form, options.checksum)
        made, batch, rows, whole = plan(work, form, checksum, stem)
        work.verify(rows[rows >= 0], whole)
        write_out(
            dst,
            made,
            batch,
            form.seal,
            durable=options.durable,
            checksum=checksum,
            threads=options.threads,
            progress=options.progress,
            release=work.mapped(batch),
            check=lambda crcs: work.check(crcs, rows, whole),
        )


def _convert_apart(
    src: FileLike, dst: FileLike, apart: ModuleType, options: SaveOptions, dequantize: bool
) -> None:
    """Convert to a format whose checkpoints are no single files."""
    with Reader(open_origin(src)) as reader:
        work = _Conversion(reader, options.threads, dequantize, _around(dst))
        rows = np.arange(len(reader.index), dtype=np.int64)
        if fetch.checkable(reader.index):  # there are none in what is written
            fetch.verify_rows(reader.source, reader.index, rows, threads=options.threads)
        if reader.index.metadata:
            _warn_metadata(work)
        obj = work.object()
        known = [*adapters.loaded(), *work.adapters]
        apart.save_apart(obj, dst, options, known=known, release=work.mapped)


def _convert_to_shards(
    src: FileLike, folder: str, options: SaveOptions, most: int, dequantize: bool
) -> None:
    """Convert to several files of at most `most` bytes of tensors in a folder."""
    form = formats.for_saving("safetensors", "")
    with Reader(open_origin(src)) as reader:
        work = _Conversion(reader, options.threads, dequantize, _around(folder))
        found, tree, rows = _tree(work)
        work.verify(rows[rows >= 0], False)
        content = sharding.Content(
            found,
            tree,
            release=work.mapped(found.batch),
            check=lambda crcs, part: work.check(crcs, rows[part], False),
        )
        options = replace(options, metadata=_metadata(work, form))
        sharding.write_shards(content, folder, options, most)


def _around(dst: object) -> str | None:
    """The folder that a path is in; None for a file object, or where there is no such folder."""
    if not is_path(dst):
        return None
    path = os.path.realpath(os.fsdecode(dst))  # type: ignore[arg-type]
    folder = os.path.dirname(path)
    return folder if os.path.isdir(folder) else None


def _metadata(work: _Conversion, form: Writing) -> Mapping[str, str] | None:
    """What the user put beside the tensors, as far as the other format has a place for it."""
    metadata = work.index.metadata
    if form.METADATA and not isinstance(metadata, dict):
        metadata = as_texts(metadata)
        names = work.index.names.tolist()
        encodings = {names[row]: text for row, text in work.index.encodings.items()}
        if encodings:
            metadata["gguf.encodings"] = json.dumps(encodings)
    if form.METADATA or not metadata:
        return metadata
    _warn_metadata(work)
    return None


def _warn_metadata(work: _Conversion) -> None:
    warn(
        f"{work.reader.source.name}: the metadata {sorted(work.index.metadata)} are left out: the "
        "format has no place for them"
    )


_Planned = tuple[Plan, TensorBatch, np.ndarray, bool]


_CONTAINERS = (dict, list, tuple, set, frozenset)
#: Items that a tree may have which shares no part, besides four for each byte of a pickle.
_MOST_ITEMS = 1 << 20


def _check_extent(obj: Any, work: _Conversion) -> None:
    """Raise FormatError where a tree of `obj` would be out of all proportion to the file.

    A tree has what stands at many places at each of them: a few hundred bytes of a pickle are
    enough for 2**60 items. What contains itself is for others to refuse.
    """
    structure = work.index.structure
    most = _MOST_ITEMS + 4 * len(structure.data if structure is not None else b"")
    extents: dict[int, int] = {}  # of a container by its id; 0 while it is not known
    stack = [obj] if isinstance(obj, _CONTAINERS) else []
    while stack:
        item = stack[-1]
        values = item.values() if isinstance(item, dict) else item
        inner = [value for value in values if isinstance(value, _CONTAINERS)]
        if id(item) not in extents:
            extents[id(item)] = 0
            stack += [value for value in inner if id(value) not in extents]
            continue
        stack.pop()
        if not extents[id(item)]:
            extents[id(item)] = 1 + len(item) + sum(extents[id(value)] for value in inner)
        if extents[id(item)] > most:
            raise FormatError(
                f"{work.reader.source.name}: expected an object of at most {most} items, each as "
                "often as it stands in it, found more: convert it with format='torch'"
            )


def _tree(work: _Conversion) -> tuple[Collection, object, np.ndarray]:
    """The object as a tree of JSON around its tensors, and the entry that each of these is of."""
    obj = work.object()
    _check_extent(obj, work)
    try:
        return _tree_of(work, obj)
    except TypeError as error:  # a value that only a pickle has, such as a date
        return _tree_of(work, work.flat(error))


def _tree_of(work: _Conversion, obj: Any) -> tuple[Collection, object, np.ndarray]:
    known = [*adapters.loaded(), *work.adapters]
    flat, blobs = objects.flatten(obj, known)
    found = collect(flat.names, flat.leaves, known)
    rows = np.full(len(found.names), -1, np.int64)
    for leaf, place in zip(flat.leaves, found.position, strict=True):
        rows[place] = leaf.row if isinstance(leaf, Ref) else -1
    return found, objects.tree_of(flat, blobs, found), rows


def _plan_tree(work: _Conversion, form: Writing, checksum: bool, stem: str) -> _Planned:
    """Plan a file in which the object is a tree of JSON around its tensors."""
    found, tree, rows = _tree(work)
    plan = form.plan(
        found.names,
        found.batch,
        framework=found.framework,
        metadata=_metadata(work, form),
        structure=tree,
        checksum=checksum,
        stem=stem,
    )
    return plan, found.batch, rows, False


def _plan_arrays(work: _Conversion, form: Writing, checksum: bool, stem: str) -> _Planned:
    """Plan a file that holds a flat dict of tensors, or a single one, and nothing else."""
    obj = work.object()
    known = [*adapters.loaded(), *work.adapters]
    names, refs = objects.arrays_of(obj, form.STRUCTURE, known)
    found = collect(names, refs, known, ties=False)
    plan = form.plan(
        found.names,
        found.batch,
        framework=found.framework,
        metadata=_metadata(work, form),
        structure=found.kinds,
        checksum=checksum,
        stem=stem,
    )
    rows = [ref.row if isinstance(ref, Ref) else -1 for ref in refs]
    return plan, found.batch, np.array(rows, np.int64), False


def _plan_pickle(work: _Conversion, form: Writing, checksum: bool, stem: str) -> _Planned:
    """Plan a file in which the object is a pickle around its tensors' storages."""
    obj = work.object()
    refs: dict[bool, set[type]] = {False: set(), True: set()}  # arrays of NumPy's, or not
    framework = work.index.framework
    for adapter in work.adapters:
        refs[adapter.name == "numpy"].add(adapter.ref)
        if framework == "numpy":  # which is that of most; beside others arrays stay arrays
            framework = adapter.name
    found, storage = pickle_around(
        obj,
        lambda numpy: RefStorages(work.index, work.batch, arrays=numpy),
        frozenset(refs[False]),
        frozenset(refs[True]),
        legacy=form.STRUCTURE == "legacy pickle",
    )
    assert isinstance(storage, RefStorages)
    copied = np.array([row for adapter in work.adapters for row in adapter.copied], np.int64)
    if len(copied) and fetch.checkable(work.index):  # they have no storage that is checked later
        rows = np.unique(copied)
        fetch.verify_rows(work.reader.source, work.index, rows, threads=work.threads)
    plan = form.plan(
        found.keys,
        found.batch,
        framework=framework,
        metadata=_metadata(work, form),
        structure=found.data,
        checksum=checksum,
        stem=stem,
    )
    return plan, found.batch, np.array(storage.rows, np.int64), True
