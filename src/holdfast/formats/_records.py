"""The records of an archive, as the formats that live in one ask for them."""

from __future__ import annotations

import sys

import numpy as np

from ..errors import FormatError
from ..layout import CHECKED, STORAGE
from . import Read, _zip

__all__ = ["NameList", "Records", "most_parsed", "runs_of"]

#: What a deflated record that is parsed may be inflated to: so many bytes, and for each byte of the
#: file so many more. Pickles of state dicts deflate to a fifth; but what is parsed may take a
#: hundred times its size in memory, which after a thousandfold inflation no machine has.
_MOST_INFLATED = 1 << 20
_MOST_RATIO = 10


def most_parsed(directory: _zip.Directory, row: int, limit: int) -> int:
    """The most bytes that a record may have that is parsed: `limit`, or less if it is deflated."""
    at = directory.rows[row]
    if int(at["method"]) == 0:
        return limit
    return min(limit, _MOST_INFLATED + _MOST_RATIO * int(at["packed"]))


def runs_of(directory: _zip.Directory, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Where the bytes of these records stand, and their checksums; and the records' names."""
    records, found = directory.rows[rows], np.zeros(len(rows), STORAGE)
    found["offset"], found["nbytes"] = records["offset"], records["size"]
    found["packed"] = np.where(records["method"] == 0, 0, records["packed"])
    found["crc"], found["flags"] = records["crc"], CHECKED
    return found, [directory.names[row] for row in rows.tolist()]


class Records:
    """An archive whose records are read by the names that they have under its root.

    Parameters
    ----------
    read : callable
        ``read(offset, nbytes)``: exactly those bytes of the file, or FormatError.
    name : str
        Of the file, for messages.
    directory : Directory
        What ``_zip.scan`` made of it.
    verify : bool
        Whether the checksums of the records that :meth:`bytes` returns are checked.
    """

    __slots__ = ("_root", "directory", "name", "read", "verify")

    def __init__(
        self, read: Read, name: str, directory: _zip.Directory, *, verify: bool = True
    ) -> None:
        self.read = read
        self.name = name
        self.directory = directory
        self.verify = verify
        self._root = "" if directory.root is None else f"{directory.root}/"

    def names(self) -> list[str]:
        """Names of all records, under the root, in the order of the directory."""
        cut = len(self._root)
        return [text[cut:] for text in self.directory.names]

    def find(self, record: str) -> int:
        """Row of `record` in the directory, or -1."""
        return self.directory.find(self._root + record)

    def row(self, record: str) -> int:
        """Row of `record` in the directory.

        Raises
        ------
        FormatError
            There is none.
        """
        row = self.find(record)
        if row < 0:
            raise FormatError(f"{self.name}: the archive has no record {record!r}")
        return row

    def bytes(self, record: str, limit: int, *, parsed: bool = False) -> bytes:
        """All of a record of at most `limit` bytes, inflated where it is deflated.

        With `parsed`, which is for what objects are made of, far less where it is deflated.
        """
        row = self.row(record)
        if parsed:
            limit = most_parsed(self.directory, row, limit)
        return _zip.extract(
            self.read, self.directory, row, self.name, limit=limit, verify=self.verify
        )

    def text(self, record: str, limit: int, *, parsed: bool = False) -> str:
        """All of a record that is UTF-8; the arguments are those of :meth:`bytes`."""
        try:
            return str(self.bytes(record, limit, parsed=parsed), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.name}: record {record!r}: expected UTF-8, found the byte "
                f"{error.object[error.start]:#04x} at offset {error.start}"
            ) from None

    def foreign(self) -> bool:
        """Whether the elements have the byte order that this machine does not have."""
        if self.find("byteorder") < 0:
            return sys.byteorder != "little"
        order = self.bytes("byteorder", 64)
        if order not in (b"little", b"big"):
            raise FormatError(
                f"{self.name}: record 'byteorder': expected 'little' or 'big', found {order!r}"
            )
        return order != sys.byteorder.encode()


class NameList:
    """Names that are known already: :class:`holdfast.layout.Names` of a list."""

    __slots__ = ("_names", "_positions")

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._positions: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def tolist(self) -> list[str]:
        """Every name, in order."""
        return self._names

    def find(self, name: str) -> int:
        """Position of `name`, or -1."""
        if self._positions is None:
            self._positions = {text: i for i, text in enumerate(self._names)}
        return self._positions.get(name, -1)
