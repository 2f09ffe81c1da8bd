"""TorchScript modules and exported programs, loaded with PyTorch.

PyTorch reads them. It is handed the weights apart, as tensors that are mapped or were read by
several threads, together with an archive from which they were taken out.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from collections.abc import Mapping, MutableMapping
from typing import Any, BinaryIO

import numpy as np

from . import adapters, fetch
from .booleans import settle
from .errors import FormatError, UnsafeError
from .formats import _zip, pt2, torchscript
from .formats._records import NameList, Records
from .layout import ENTRY, Index
from .safe import SafeResolver
from .source import Source

__all__ = ["load_program"]

#: Weights are used in place where their address is a multiple of this, as it is in every file that
#: PyTorch wrote: more than any element needs.
_ALIGN = 16
_UINT8 = 1
_MOST = 1 << 40


def load_program(
    source: Source,
    kind: str,
    *,
    map_location: Any = None,
    mmap: bool = False,
    extra_files: MutableMapping[str, Any] | None = None,
    expected_opset_version: dict[str, int] | None = None,
    threads: int = 0,
    verify: bool | None = None,
) -> Any:
    """The program that a file holds. Only for a file that is trusted: it is code.

    Parameters
    ----------
    source : Source
        Stays its owner's to close; the program does not need it.
    kind : {"torchscript", "pt2"}
    map_location : None, str or torch.device
        For TorchScript, as in ``torch.jit.load``. An exported program stays where it was traced.
    mmap : bool
        Whether the weights are views of a private, writable map of the file. Otherwise they are
        read into memory.
    extra_files : dict, optional
        Filled in as ``torch.jit.load`` (for the names in it) and ``torch.export.load`` (for all)
        do.
    expected_opset_version : dict, optional
        As for ``torch.export.load``.
    threads : int
        How many threads read; 0 for what measured fastest.
    verify : bool, optional
        Whether the checksums of the weights are checked, where the file has them. None checks them
        when they are read, and not when they are mapped.

    Returns
    -------
    torch.jit.RecursiveScriptModule or torch.export.ExportedProgram

    Raises
    ------
    FormatError
        The archive is not sound; ChecksumError where it is a checksum.
    ImportError
        PyTorch is not installed.
    """
    adapters.by_name("torch")
    directory = _zip.scan(source.read, source.size, source.name)
    records = Records(source.read, source.name, directory)
    check = not mmap if verify is None else verify
    weights = _Weights(source, records, mmap=mmap, threads=threads, verify=check)
    if kind == "torchscript":
        return _load_script(records, weights, map_location, extra_files)
    assert kind == "pt2", kind
    if map_location is not None:
        raise ValueError(
            f"{source.name}: an exported program stays on the devices that it was traced on; load "
            "it without map_location and move it with torch.export.passes.move_to_device_pass"
        )
    return _load_exported(records, weights, extra_files, expected_opset_version)


def _module(name: str) -> Any:
    """A module of PyTorch."""
    return importlib.import_module(name)


class _Weights:
    """Records of an archive as flat tensors of bytes.

    Parameters
    ----------
    source : Source
    records : Records
    mmap, threads, verify
        As for :func:`load_program`.
    """

    def __init__(
        self, source: Source, records: Records, *, mmap: bool, threads: int, verify: bool
    ) -> None:
        if mmap and not source.mappable:
            raise ValueError(f"{source.name}: mmap=True needs the path of a regular file")
        self.source = source
        self.records = records
        self.mmap = mmap
        self.threads = threads
        self.verify = verify

    def take(self, rows: list[int]) -> list[Any]:
        """A uint8 torch tensor for each of these rows of the directory, in memory of its own."""
        picked = np.array(rows, np.int64)
        found = self.records.directory.rows[picked]
        tensors: list[Any] = [None] * len(rows)
        place = found["method"] != 0
        for i in np.flatnonzero(place).tolist():
            tensors[i] = self._inflated(rows[i])
        mapped = ~place & (found["offset"] % _ALIGN == 0) & self.mmap
        for chosen in (mapped, ~place & ~mapped):
            some = np.flatnonzero(chosen)
            if len(some):
                index = self._index(found[some])
                made = self.of(index, {}, mapped=bool(mapped[some[0]]))
                for i, tensor in zip(some.tolist(), made, strict=True):
                    tensors[i] = tensor
        return tensors

    def of(self, index: Index, kinds: Mapping[int, str], *, mapped: bool) -> list[Any]:
        """The tensors of an index."""
        rows = np.arange(len(index), dtype=np.int64)
        checked = index.crcs is not None or index.storages is not None
        verify = self.verify and checked
        if mapped:
            if verify:
                fetch.verify_rows(self.source, index, rows, threads=self.threads)
            batch = fetch.map_tensors(self.source, index, rows)
        else:
            batch = fetch.read_tensors(
                self.source, index, rows, verify=verify, threads=self.threads
            )
        return adapters.by_name("torch").wrap(settle(index, batch), kinds)

    def _index(self, found: np.ndarray) -> Index:
        """Whole records as tensors of bytes."""
        entries = np.zeros(len(found), ENTRY)
        entries["offset"] = found["offset"]
        entries["nbytes"] = found["size"]
        entries["dims"] = np.arange(len(found))
        entries["dtype"] = _UINT8
        entries["ndim"] = 1
        # A CRC-32 of 0 is what a writer leaves that computed none.
        checked = bool(((found["crc"] != 0) | (found["size"] == 0)).all())
        return Index(
            NameList([f"at offset {offset}" for offset in found["offset"].tolist()]),
            entries,
            found["size"].astype(np.int64),
            {},
            crcs=found["crc"] if checked else None,
            end=self.records.directory.end,
        )

    def _inflated(self, row: int) -> Any:
        torch = _module("torch")
        data = _zip.extract(
            self.source.read,
            self.records.directory,
            row,
            self.source.name,
            limit=_MOST,
            verify=self.verify,
        )
        if not data:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _load_script(
    records: Records,
    weights: _Weights,
    map_location: Any,
    extra_files: MutableMapping[str, Any] | None,
) -> Any:
    """A TorchScript module: PyTorch finds its storages at hand, under the keys of the pickles."""
    torch, recursive = _module("torch"), _module("torch.jit._recursive")
    device = _module("torch.jit._serialization").validate_map_location(map_location)
    slim = torchscript.slim(records)
    context = torch._C.DeserializationStorageContext()
    tensors = weights.take(list(slim.storages.values()))
    for key, tensor in zip(slim.storages, tensors, strict=True):
        context.add_storage(key, tensor)
    reader = torch._C.PyTorchFileReader(_package(slim.records))
    module = torch._C._import_ir_module_from_package(
        torch._C.CompilationUnit(), reader, context, device, _UNIT
    )
    for name in list(extra_files or ()):
        assert extra_files is not None
        held = records.find(torchscript.EXTRA + name) >= 0
        extra_files[name] = records.bytes(torchscript.EXTRA + name, _MOST) if held else b""
    return recursive.wrap_cpp_module(module)


#: The module's number in the package that PyTorch is given.
_UNIT = "0"


def _package(records: Mapping[str, bytes]) -> BinaryIO:
    """The records of a TorchScript archive as a module in a package, whose storages are apart."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        for record, data in records.items():
            if record.endswith(".pkl"):
                record = f".data/ts_code/{_UNIT}/{record}"
            elif record.startswith("code/"):
                record = f".data/ts_code/{record}"
            out.writestr(f"archive/{record}", data)
    archive.seek(0)
    return archive


def _load_exported(
    records: Records,
    weights: _Weights,
    extra_files: MutableMapping[str, Any] | None,
    expected_opset_version: dict[str, int] | None,
) -> Any:
    """An exported program: PyTorch reads the archive through a reader that has the weights."""
    if records.foreign():
        raise FormatError(
            f"{records.name}: a program whose tensors are big-endian cannot be run here; its "
            "parameters and buffers can be loaded, with weights_only=True"
        )
    reader = _Reader(records, weights)
    if records.find(pt2.OLD) >= 0:
        return _load_old(reader, extra_files, expected_opset_version)
    try:
        package = _module("torch.export.pt2_archive._package")
    except ImportError:
        raise ImportError(f"{records.name}: exported programs need PyTorch 2.8 or newer") from None

    version = reader.read_string(package.ARCHIVE_VERSION_PATH)
    if version != package.ARCHIVE_VERSION_VALUE:
        raise ValueError(
            f"{records.name}: record {package.ARCHIVE_VERSION_PATH!r}: expected "
            f"{package.ARCHIVE_VERSION_VALUE!r}, found {version!r}"
        )
    names = reader.get_file_names()
    programs = package._load_exported_programs(reader, names, expected_opset_version)
    if extra_files is not None:
        extra_files.update(package._load_extra_files(reader, names))
    if "model" in programs:
        return programs["model"]
    if len(programs) != 1:
        held = ", ".join(repr(name) for name in programs) or "no exported program"
        raise FormatError(f"{records.name}: expected a program called 'model', found {held}")
    return next(iter(programs.values()))


def _load_old(
    reader: _Reader,
    extra_files: MutableMapping[str, Any] | None,
    expected_opset_version: dict[str, int] | None,
) -> Any:
    """An exported program of PyTorch up to 2.7."""
    serialize = _module("torch._export.serde.serialize")
    expected = _module("torch._export.serde.schema").SCHEMA_VERSION
    records = reader.records
    version = reader.read_string("version").split(".")
    if len(version) != len(expected) or version[0] != str(expected[0]):
        raise RuntimeError(
            f"{records.name}: serialized version {version} does not match the schema version "
            f"{expected} of this PyTorch"
        )
    parts = [
        reader.read_dict(pt2.part_of(records, f"serialized_{part}"))
        for part in ("state_dict", "constants")
    ]
    inputs = reader.read_bytes("serialized_example_inputs.pt")
    program = reader.read_bytes(pt2.OLD)
    artifact = serialize.SerializedArtifact(program, parts[0], parts[1], inputs)
    if extra_files is not None:
        for name in reader.get_file_names():
            if name.startswith("extra_files/"):
                extra_files[name.partition("/")[2]] = reader.read_string(name)
    return serialize.deserialize(artifact, expected_opset_version)


class _Reader:
    """The archive as PyTorch's loader of exported programs asks for it: a ``PT2ArchiveReader``.

    It is its own ``archive_file`` too, of which that loader asks for storages.
    """

    def __init__(self, records: Records, weights: _Weights) -> None:
        self.records = records
        self._weights = weights
        self._tensors: dict[str, Any] | None = None
        self.archive_file = self

    def get_file_names(self) -> list[str]:
        """Names of all records."""
        return self.records.names()

    def get_record_size(self, name: str) -> int:
        """Size of a record in bytes."""
        return int(self.records.directory.rows["size"][self.records.row(name)])

    def get_storage_from_record(self, name: str, numel: int, dtype: Any) -> Any:  # noqa: ARG002
        """A tensor whose storage is a record."""
        if self._tensors is None:
            found = [
                text
                for text in self.records.names()
                if text.startswith(("data/weights/weight_", "data/constants/tensor_"))
            ]
            rows = [self.records.row(text) for text in found]
            self._tensors = dict(zip(found, self._weights.take(rows), strict=True))
        if name not in self._tensors:
            self._tensors[name] = self._weights.take([self.records.row(name)])[0]
        return self._tensors[name]

    def read_bytes(self, name: str) -> Any:
        """All of a record; where it is a dict of tensors as torch.save wrote it, that dict."""
        if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
            return self.read_dict(name)
        return self.records.bytes(name, _MOST)

    def read_string(self, name: str) -> str:
        """All of a record, as text."""
        return self.records.text(name, _MOST)

    def read_dict(self, name: str) -> Any:
        """A dict of tensors that torch.save wrote into a record; all its bytes where it is more."""
        row = self.records.row(name)
        if int(self.records.directory.rows["method"][row]) == 0 and self.get_record_size(name):
            index = pt2.nested(self.records, name)
            assert index.structure is not None
            resolver = SafeResolver("torch", name=f"{self.records.name}: record {name!r}")
            try:
                tensors = self._weights.of(index, index.kinds, mapped=self._weights.mmap)
                return index.structure.replay(tensors, _no_storage, resolver)
            except UnsafeError:
                pass  # objects of a program's own, which PyTorch knows how to make
        return self.records.bytes(name, _MOST)


def _no_storage(row: int, *_: object) -> object:
    raise UnsafeError(f"storage {row}: not a tensor's")
