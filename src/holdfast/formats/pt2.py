"""Archives of ``torch.export.save``: an exported program, its weights, its constants.

Layout since torch 2.8 (a zip archive under one root)::

    archive_format                          "pt2"
    models/<name>.json                      the program
    data/weights/weight_<n>                 the bytes of one storage
    data/weights/<name>_weights_config.json which tensor is which view of which of them
    data/constants/…                        the same for constants

Before, ``data/weights/<name>.pt`` was all weights as torch.save writes a dict; up to torch 2.7
``serialized_state_dict.pt`` was, in an archive without a root. Those archives inside of the archive
are read where they stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import BY_TORCH, DType
from ..errors import FormatError
from ..layout import CHECKED, ENTRY, FOREIGN, STORAGE, Index
from . import Read, _torch_zip_read, _zip
from ._records import NameList, Records

__all__ = ["OLD", "claims", "index", "nested", "part_of"]

#: The record that archives of torch up to 2.7 have the program in.
OLD = "serialized_exported_program.json"

_MODELS, _WEIGHTS, _COMPILED = "models/", "data/weights/", "data/aotinductor/"
_MOST_JSON = 1 << 30
_MAX_NDIM = 64

#: Element types by their number in torch.export's schema.
_SCALARS = {
    number: BY_TORCH[name]
    for number, name in {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        6: "float16",
        7: "float32",
        8: "float64",
        9: "complex32",
        10: "complex64",
        11: "complex128",
        12: "bool",
        13: "bfloat16",
        28: "uint16",
        29: "float8_e4m3fn",
        30: "float8_e5m2",
        31: "float8_e4m3fnuz",
        32: "float8_e5m2fnuz",
        33: "float8_e8m0fnu",
        34: "uint32",
        35: "uint64",
    }.items()
}
_STRIDED = 7


def claims(directory: _zip.Directory) -> bool:
    """Whether an archive is one of torch.export."""
    root = "" if directory.root is None else f"{directory.root}/"
    known = (f"{root}archive_format", f"{root}{_MODELS}model.json", OLD)
    return any(directory.find(record) >= 0 for record in known)


def index(read: Read, size: int, name: str, directory: _zip.Directory, *, verify: bool) -> Index:
    """Find the parameters and buffers, under the names of the program's ``state_dict``.

    Of an archive of several programs, each name begins with that of its program and a dot.
    """
    del size
    records = Records(read, name, directory, verify=verify)
    if records.find(OLD) >= 0:
        found = _flat(nested(records, part_of(records, "serialized_state_dict")))
    else:
        _check_format(records)
        names = records.names()
        models = [
            text[len(_MODELS) : -len(".json")]
            for text in names
            if text.startswith(_MODELS) and text.endswith(".json")
        ]
        if not models and any(text.startswith(_COMPILED) for text in names):
            raise FormatError(
                f"{name}: holds a program compiled by AOTInductor alone, in {_COMPILED!r}: "
                f"expected an exported program, in {_MODELS!r}, whose weights could be read here"
            )
        parts = [_weights(records, model) for model in models]
        prefixes = [f"{model}." if len(models) > 1 else "" for model in models]
        found = _joined(parts, prefixes, name)
    found.end = directory.end
    found.format = found.program = "pt2"
    return found


def _check_format(records: Records) -> None:
    """Raise FormatError unless the archive says that it is one of torch.export."""
    if records.find("archive_format") < 0:
        return  # it has a program, as `claims` found
    said = records.bytes("archive_format", 64)
    if said != b"pt2":
        raise FormatError(
            f"{records.name}: record 'archive_format': expected b'pt2', found {said!r}"
        )


def part_of(records: Records, stem: str) -> str:
    """Name of a part of an archive of torch up to 2.7: the very first ones called it .json."""
    return f"{stem}.json" if records.find(f"{stem}.json") >= 0 else f"{stem}.pt"


def _weights(records: Records, model: str) -> Index:
    """The weights of one program."""
    packed = f"{_WEIGHTS}{model}.pt"
    if records.find(packed) >= 0:
        return _flat(nested(records, packed))
    config = f"{_WEIGHTS}{model}_weights_config.json"
    return _Config(records, config, _WEIGHTS).index()


# -- archives inside of the archive --------------------------------------------------------------


def nested(records: Records, record: str) -> Index:
    """What torch.save wrote into a record, with its places counted from the start of the file.

    Raises
    ------
    FormatError
        It is no such archive, or deflated, so that nothing in it can be read where it stands.
    """
    at = records.directory.rows[records.row(record)]
    name = f"{records.name}: record {record!r}"
    if int(at["method"]) != 0:
        raise FormatError(
            f"{name}: is deflated: an archive inside of an archive is read where it stands; "
            "unpack it, or save the program again"
        )
    base, size = int(at["offset"]), int(at["size"])

    def read(offset: int, nbytes: int) -> bytes | memoryview:
        if offset < 0 or nbytes > size - offset:
            raise FormatError(
                f"{name}: needs {nbytes} bytes at offset {offset}, the record ends at {size}"
            )
        return records.read(base + offset, nbytes)

    directory = _zip.scan(read, size, name)
    if not _torch_zip_read.claims(directory):
        raise FormatError(f"{name}: expected an archive of torch.save, found none of its records")
    found = _torch_zip_read.index(read, size, name, directory, verify=records.verify)
    assert found.storages is not None
    found.entries["offset"] += np.uint64(base)
    found.storages["offset"] += np.uint64(base)
    found.end = records.directory.end
    return found


def _flat(found: Index) -> Index:
    """The tensors of a dict, each under its names: without the dict, and without gradients."""
    assert found.structure is not None
    paths = found.structure.paths()
    rows = np.array(list(paths.values()), np.int64)
    assert found.storage is not None
    return Index(
        names=NameList(list(paths)),
        entries=found.entries[rows],
        dims=found.dims,
        metadata={},
        framework="torch",
        end=found.end,
        strides=found.strides,
        storages=found.storages,
        storage=found.storage[rows],
        flags=None if found.flags is None else found.flags[rows],
        byteorder=found.byteorder,
    )


def _joined(parts: list[Index], prefixes: list[str], name: str) -> Index:
    """One index of several."""
    names = [
        prefix + text
        for part, prefix in zip(parts, prefixes, strict=True)
        for text in part.names.tolist()
    ]
    if len(set(names)) < len(names):
        raise FormatError(f"{name}: two tensors of the archive's programs have one name")
    entries, storage, ndims, nstorages = [], [], 0, 0
    for part in parts:
        assert part.storages is not None
        assert part.storage is not None
        moved = part.entries.copy()
        moved["dims"] += ndims
        entries.append(moved)
        storage.append(part.storage + nstorages)
        ndims += len(part.dims)
        nstorages += len(part.storages)
    empty: list[Any] = []
    flagged = any(part.flags is not None for part in parts)
    return Index(
        names=NameList(names),
        entries=np.concatenate([np.zeros(0, ENTRY), *entries]),
        dims=np.concatenate([np.zeros(0, np.int64), *(part.dims for part in parts)]),
        metadata={},
        framework="torch",
        strides=np.concatenate([np.zeros(0, np.int64), *(_strides(part) for part in parts)]),
        storages=np.concatenate([np.zeros(0, STORAGE), *(part.storages for part in parts)]),
        storage=np.concatenate([np.array(empty, np.int64), *storage]),
        flags=np.concatenate([_flags(part) for part in parts]) if flagged else None,
    )


def _flags(part: Index) -> np.ndarray:
    return np.zeros(len(part), np.uint16) if part.flags is None else part.flags


def _strides(part: Index) -> np.ndarray:
    """Strides in bytes, those of dense tensors written out."""
    if part.strides is not None:
        return part.strides
    strides = np.zeros(len(part.dims), np.int64)
    for i, entry in enumerate(part.entries):
        step = part.dtype(i).itemsize
        first = int(entry["dims"])
        for axis in range(first + int(entry["ndim"]) - 1, first - 1, -1):
            strides[axis] = step
            step *= int(part.dims[axis])
    return strides


# -- weights by the table ------------------------------------------------------------------------


class _Config:
    """The table that says which view of which record each weight is.

    Parameters
    ----------
    records : Records
    config : str
        The record that the table is in.
    folder : str
        Where the records are that it names.
    """

    def __init__(self, records: Records, config: str, folder: str) -> None:
        self.records = records
        self.where = f"{records.name}: record {config!r}"
        self.folder = folder
        self.foreign = records.foreign()
        text = records.text(config, _MOST_JSON, parsed=True)
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.where}: not JSON: {error}") from None
        config_of = table.get("config") if isinstance(table, dict) else None
        if not isinstance(config_of, dict):
            raise FormatError(f"{self.where}: expected an object with the object 'config'")
        self.table: dict[str, Any] = config_of
        self.names: list[str] = []
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.dims: list[int] = []
        self.strides: list[int] = []
        self.storage: list[int] = []
        self.storages: dict[str, tuple[int, np.void, DType]] = {}

    def index(self) -> Index:
        """The weights of the table."""
        pickled: list[Index] = []
        prefixes: list[str] = []
        for text, meta in self.table.items():
            if not isinstance(meta, Mapping):
                raise self._wrong(text, "", "an object", meta)
            path = self._get(text, meta, "path_name", str)
            if self._get(text, meta, "use_pickle", bool):
                pickled.append(self._pickled(text, path))
                prefixes.append("")
            else:
                self._add(text, path, self._get(text, meta, "tensor_meta", dict))
        return _joined([self._plain(), *pickled], ["", *prefixes], self.records.name)

    def _plain(self) -> Index:
        """The weights that are views of records."""
        storages = np.zeros(len(self.storages), STORAGE)
        for row, at, dtype in self.storages.values():
            packed = 0 if int(at["method"]) == 0 else int(at["packed"])
            flags = CHECKED if int(at["crc"]) else 0
            if self.foreign and dtype.unit > 1:
                flags |= FOREIGN
            storages[row] = (at["offset"], at["size"], packed, at["crc"], dtype.code, flags, 0, 0)
        return Index(
            names=NameList(self.names),
            entries=np.array(self.rows, ENTRY),
            dims=np.array(self.dims, np.int64),
            metadata={},
            framework="torch",
            strides=np.array(self.strides, np.int64),
            storages=storages,
            storage=np.array(self.storage, np.int64),
        )

    def _pickled(self, text: str, path: str) -> Index:
        """A weight that torch.save wrote: of a tensor subclass, or what makes it up."""
        found = _flat(nested(self.records, self.folder + path))
        inner = found.names.tolist()
        found.names = NameList([text] if len(inner) == 1 else [f"{text}.{name}" for name in inner])
        return found

    def _add(self, text: str, path: str, meta: Mapping[str, Any]) -> None:
        """A weight that is a view of a record."""
        number = self._get(text, meta, "dtype", int)
        if number not in _SCALARS:
            raise self._wrong(text, "dtype", "a known one", number)
        if self._get(text, meta, "layout", int) != _STRIDED:
            raise self._wrong(text, "layout", f"{_STRIDED}, strided", meta["layout"])
        dtype = _SCALARS[number]
        sizes = [self._integer(text, "sizes", item) for item in self._list(text, meta, "sizes")]
        steps = [self._integer(text, "strides", item) for item in self._list(text, meta, "strides")]
        offset = self._integer(text, "storage_offset", meta.get("storage_offset"))
        if len(sizes) != len(steps) or len(sizes) > _MAX_NDIM:
            raise self._wrong(
                text, "strides", f"as many as sizes, at most {_MAX_NDIM}", f"{len(steps)}"
            )
        if path not in self.storages:
            row = self.records.row(self.folder + path)
            at = self.records.directory.rows[row]
            self.storages[path] = len(self.storages), at, dtype
        row, at, _ = self.storages[path]
        count = 1
        for extent in sizes:
            count *= extent
        itemsize = dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        if count and (last + 1) * itemsize > int(at["size"]):
            raise FormatError(
                f"{self.where}: tensor {text!r}: needs {(last + 1) * itemsize} bytes of record "
                f"{self.folder + path!r} at offset {int(at['offset'])}, which has {int(at['size'])}"
            )
        if not count:
            offset, steps = 0, [1] * len(sizes)
        if count * itemsize >= 1 << 63 or any(extent >= 1 << 63 for extent in sizes):
            raise self._wrong(text, "sizes", "fewer than 2**63 bytes", sizes)
        begin = int(at["offset"]) + offset * itemsize
        nbytes = dtype.nbytes(tuple(sizes))
        self.names.append(text)
        self.rows.append((begin, nbytes, len(self.dims), dtype.code, len(sizes), 0))
        self.dims += sizes
        # A step along an axis of one element is never taken; it may be any number.
        self.strides += [
            step * itemsize if n > 1 else itemsize for n, step in zip(sizes, steps, strict=True)
        ]
        self.storage.append(row)

    def _get(self, text: str, meta: Mapping[str, Any], key: str, kind: type) -> Any:
        value = meta.get(key)
        if type(value) is not kind:
            raise self._wrong(text, key, f"of type {kind.__name__}", value)
        return value

    def _list(self, text: str, meta: Mapping[str, Any], key: str) -> list[Any]:
        found = self._get(text, meta, key, list)
        assert isinstance(found, list)
        return found

    def _integer(self, text: str, key: str, value: Any) -> int:
        """A number of 0 or more; symbols have no place in the shape of a weight."""
        number = value.get("as_int") if isinstance(value, dict) else None
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise self._wrong(text, key, "{'as_int': an integer of 0 or more}", value)
        return number

    def _wrong(self, text: str, key: str, expected: str, found: object) -> FormatError:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return FormatError(
            f"{self.where}: tensor {text[:100]!r}: {key or 'its entry'}: expected {expected}, "
            f"found {shown}"
        )
