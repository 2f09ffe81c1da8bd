"""Formats: where every byte of a file stands.

Adding one is a module with the functions of :class:`Format`, and a row in the tables here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol, cast

import numpy as np

from ..errors import FormatError
from ..layout import Index, Plan
from ..views import TensorBatch

#: ``read(offset, nbytes)``: exactly those bytes of the file, or FormatError.
Read = Callable[[int, int], bytes | memoryview]

__all__ = ["PREFIX", "Format", "for_saving", "recognise"]

#: How many bytes of a file :func:`recognise` wants to see.
PREFIX = 512


class Format(Protocol):
    """What a format's module offers. None of it does I/O: bytes come in and go out as arguments."""

    def sniff(self, prefix: bytes, size: int) -> bool:
        """Whether a file that begins with `prefix` is of this format; `size` is -1 if unknown."""

    def index(self, read: Read, size: int, name: str, *, verify: bool) -> Index:
        """Find the tensors. `read(offset, nbytes)` returns exactly that or raises FormatError."""

    def plan(
        self,
        names: list[str],
        batch: TensorBatch,
        *,
        framework: str | None,
        metadata: Mapping[str, str] | None,
        tree: object | None,
        checksum: bool,
    ) -> Plan:
        """Decide where every byte of a new file stands."""

    def seal(self, plan: Plan, crcs: np.ndarray | None) -> bytes | bytearray:
        """Make the bytes that stand before the tensors, now that their checksums are known."""


_MODULES = {"safetensors": "safetensors"}

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
}

#: First bytes of what others write, so that a file of another kind is called by its name.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (torch.save, TorchScript or npz)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"GGUF", "a GGUF file"),
    (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", "a legacy torch.save stream"),
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


def _format(name: str) -> Format:
    return cast(Format, importlib.import_module(f".{_MODULES[name]}", __name__))


def for_saving(name: str | None, extension: str) -> Format:
    """The format to write: `name` where it is given, else the one that `extension` stands for.

    Raises
    ------
    ValueError
        Unknown, or one that this version only knows by name.
    """
    chosen = name if name is not None else _EXTENSIONS.get(extension, _EXTENSIONS[""])
    if chosen in _MODULES:
        return _format(chosen)
    known = ", ".join(repr(text) for text in _MODULES)
    if name is None:
        raise ValueError(
            f"a path that ends in {extension!r} means the format {chosen!r}, which cannot be "
            f"written yet; choose another extension, or one of format={known}"
        )
    raise ValueError(f"format {name!r} is unknown; known are {known}")


def recognise(prefix: bytes, size: int, name: str) -> Format:
    """The format of a file that begins with `prefix`, whatever its name ends in.

    Raises
    ------
    FormatError
        None of those known here; the message says which it seems to be.
    """
    for text in _MODULES:
        module = _format(text)
        if module.sniff(prefix, size):
            return module
    if size == 0 or not prefix:
        raise FormatError(f"{name}: the file is empty")
    for magic, kind in _FOREIGN:
        if prefix.startswith(magic):
            raise FormatError(f"{name}: this is {kind}, which cannot be read here")
    raise FormatError(
        f"{name}: not a checkpoint: expected a safetensors header at offset 0, "
        f"found {prefix[:16]!r}"
    )
