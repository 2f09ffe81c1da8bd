"""Formats: where every byte of a file stands.

Adding one is a module with the functions of :class:`Reading` or :class:`Writing`, and a row in
the tables here.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol, TypeGuard, cast

import numpy as np

from ..errors import FormatError
from ..layout import Folder, Index, Pieces, Plan
from ..views import TensorBatch

#: ``read(offset, nbytes)``: exactly those bytes of the file, or FormatError.
Read = Callable[[int, int], bytes | memoryview]

__all__ = [
    "PREFIX",
    "FolderReading",
    "Reading",
    "Writing",
    "checksummed",
    "for_saving",
    "is_extension",
    "of_folders",
    "recognise",
    "recognise_folder",
]

#: How many bytes of a file :func:`recognise` wants to see.
PREFIX = 512


class Reading(Protocol):
    """What the module of a format offers to a load.

    None of it does I/O: bytes come in as arguments.

    Attributes
    ----------
    NEEDS_SIZE : bool
        Whether :meth:`index` has to know where the file ends.
    """

    NEEDS_SIZE: bool

    def sniff(self, prefix: bytes, size: int) -> bool:
        """Whether a file that begins with `prefix` is of this format; `size` is -1 if unknown."""

    def index(self, read: Read, size: int, name: str, *, verify: bool) -> Index:
        """Find the tensors. `read(offset, nbytes)` returns exactly that or raises FormatError."""


class FolderReading(Protocol):
    """What the module of a format whose checkpoints are folders offers to a load.

    Attributes
    ----------
    LINKS : bool
        Whether symbolic links in such a folder are followed.
    """

    LINKS: bool

    def sniff_folder(self, folder: Folder) -> bool:
        """Whether a folder is of this format."""

    def index_folder(self, folder: Folder, *, verify: bool, strict: bool) -> Index:
        """Find the tensors. With `strict`, a folder not saved to its end is a FormatError."""


class Writing(Protocol):
    """What the module of a format offers to a save; it does no I/O either.

    Attributes
    ----------
    STRUCTURE : {"tree", "pickle", "legacy pickle", "arrays", "array"}
        How an object stands in it: what :meth:`plan` wants as `structure`. ``"arrays"`` is a flat
        dict of tensors and nothing else, ``"array"`` a single tensor; `structure` then has the
        kinds of those that the dtype table does not say all of, by their position.
    METADATA : bool
        Whether it has a place for texts of the user's.
    """

    STRUCTURE: str
    METADATA: bool

    def plan(
        self,
        names: list[str],
        batch: TensorBatch,
        *,
        framework: str | None,
        metadata: Mapping[str, str] | None,
        structure: Any,
        checksum: bool,
        stem: str,
    ) -> Plan:
        """Decide where every byte of a new file stands. `stem` is its name without extension."""

    def seal(self, plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
        """Make the bytes that stand around the tensors, now that their checksums are known.

        With `early`, which is asked for only where ``plan.early`` is not None: `crcs` are right for
        those rows, and returned are all pieces, those that lack a checksum as placeholders. The
        second call has all checksums and returns the pieces that lacked one.
        """


#: Modules that read, in the order in which they are asked whether a file is theirs.
_READERS = (
    "safetensors",
    "archive",
    "torch_legacy",
    "torch_tar",
    "npy",
    "gguf",
    "oneflow_file",
    "shards",
)

#: Modules that read folders, likewise.
_FOLDERS = ("shards", "oneflow_pickle", "oneflow_snapshot", "lone_file")

#: What ``format=`` calls a format -> the module that writes it.
_WRITERS = {
    "safetensors": "safetensors",
    "torch": "torch_zip",
    "torch_legacy": "torch_legacy",
    "npz": "npz",
    "npy": "npy",
}

#: File name extension -> format that ``save`` writes to it. The empty one stands for all others.
_EXTENSIONS = {
    "": "safetensors",
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".npz": "npz",
    ".npy": "npy",
    ".gguf": "gguf",
    ".pt2": "pt2",
}

#: First bytes of what others write, so that a file of another kind is called by its name.
_FOREIGN = (
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"version https://git-lfs", "a git-lfs pointer: the weights themselves were not fetched"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


def is_extension(text: str) -> bool:
    """Whether a file name that ends so means a format."""
    return bool(text) and text in _EXTENSIONS


def checksummed(form: Writing, asked: bool) -> bool:
    """Whether a file is written with checksums: as `asked`, unless the format leaves no choice."""
    return {"arrays": True, "array": False}.get(form.STRUCTURE, asked)


def for_saving(name: str | None, extension: str) -> Writing:
    """The format to write: `name` where it is given, else the one that `extension` stands for.

    Raises
    ------
    ValueError
        Unknown, or one that this version only knows by name.
    """
    chosen = name if name is not None else _EXTENSIONS.get(extension, _EXTENSIONS[""])
    if chosen in _WRITERS:
        return cast(Writing, _module(_WRITERS[chosen]))
    known = ", ".join(repr(text) for text in (*_WRITERS, "oneflow"))
    if chosen == "pt2":
        raise ValueError(
            "a path that ends in '.pt2' is for exported programs (torch.export); choose another "
            f"extension for a checkpoint, or one of format={known}"
        )
    if name is None or name in _EXTENSIONS.values():
        where = f"a path that ends in {extension!r} means" if name is None else "this is"
        raise ValueError(
            f"{where} the format {chosen!r}, which is read and not written; choose another "
            f"extension, or one of format={known}"
        )
    raise ValueError(f"format {name!r} is unknown; known are {known}")


def of_folders(form: Reading | FolderReading) -> TypeGuard[FolderReading]:
    """Whether the tensors of a format are in several files."""
    return hasattr(form, "index_folder")


def recognise_folder(folder: Folder) -> FolderReading:
    """The format of a folder.

    Raises
    ------
    FormatError
        None of those known here, but one that is known by name.
    IsADirectoryError
        It is no checkpoint at all; the message says what is in it.
    """
    for text in _FOLDERS:
        module = cast(FolderReading, _module(text))
        if module.sniff_folder(folder):
            return module
    found = list(folder.entries())
    if ".metadata" in found or any(name.endswith(".distcp") for name in found):
        raise FormatError(
            f"{folder.name}: this is a folder of torch.distributed.checkpoint, which cannot be "
            "read here"
        )
    shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
    raise IsADirectoryError(
        errno.EISDIR,
        "Is a directory, and no checkpoint: expected snapshot_done, pickled_data, an index of "
        f"shards or one file of weights in it, found {shown or 'nothing'}",
        folder.name,
    )


def recognise(prefix: bytes, size: int, name: str) -> Reading | FolderReading:
    """The format of a file that begins with `prefix`, whatever its name ends in.

    Raises
    ------
    FormatError
        None of those known here; the message says which it seems to be.
    """
    for text in _READERS:
        module = _module(text)
        if module.sniff(prefix, size):
            return cast("Reading | FolderReading", module)
    if size == 0 or not prefix:
        raise FormatError(f"{name}: the file is empty")
    for magic, kind in _FOREIGN:
        if prefix.startswith(magic):
            raise FormatError(f"{name}: this is {kind}, which cannot be read here")
    raise FormatError(
        f"{name}: not a checkpoint: expected a safetensors header at offset 0, "
        f"found {prefix[:16]!r}"
    )
