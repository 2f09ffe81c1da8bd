"""Zip archives: which of the formats that are zips one holds, told from its records."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import cache
from typing import Protocol, cast

import numpy as np

from ..errors import FormatError
from ..layout import Index
from ._records import runs_of
from ._zip import Directory, scan

__all__ = ["NEEDS_SIZE", "index", "sniff"]

#: The directory of an archive stands at its end.
NEEDS_SIZE = True

Read = Callable[[int, int], bytes | memoryview]

#: Modules of this package, in the order in which they are asked, and whether case makes no
#: difference to the names of their records: PyTorch ignores it. TorchScript comes before
#: torch.save's archives, whose records it has too.
_KINDS = {"torchscript": True, "pt2": True, "_torch_zip_read": True, "npz": False}


class _Kind(Protocol):
    """What the module of a format that is a zip offers."""

    def claims(self, directory: Directory) -> bool:
        """Whether the archive is of this kind, sound or not."""

    def index(
        self, read: Read, size: int, name: str, directory: Directory, *, verify: bool
    ) -> Index:
        """Find the tensors."""


@cache
def _kind(module: str) -> _Kind:
    return cast(_Kind, importlib.import_module(f".{module}", __package__))


def _others(directory: Directory, index: Index) -> tuple[np.ndarray, list[str]]:
    """The records that have a checksum and are no storages."""
    records = directory.rows
    has = (records["crc"] != 0) & (records["size"] > 0)
    if index.storages is not None:
        has &= ~np.isin(records["offset"], index.storages["offset"])
    return runs_of(directory, np.flatnonzero(has))


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is a zip archive, sound or not.

    As for torch.load, only what begins with a record is, or has none: not a file that ends in an
    archive.
    """
    return prefix[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def index(read: Read, size: int, name: str, *, verify: bool = True) -> Index:
    """Find the tensors of a file, of which ``read(offset, nbytes)`` returns the bytes.

    Raises
    ------
    FormatError
        The archive is damaged or dangerous, or of none of the kinds known here.
    """
    directory = scan(read, size, name, caseless=False)
    for module, caseless in _KINDS.items():
        kind = _kind(module)
        if kind.claims(directory):
            if caseless:
                directory.check_case(name)
            found = kind.index(read, size, name, directory, verify=verify)
            if found.others is None:
                found.others = functools.partial(_others, directory, found)
            return found
    names = directory.names
    shown = ", ".join(repr(text) for text in names[:4]) + (", …" if len(names) > 4 else "")
    raise FormatError(
        f"{name}: a zip archive, but not one of torch.save, TorchScript, torch.export or NumPy: "
        f"expected a record 'data.pkl' in one folder, or arrays '….npy', found {shown}"
    )
