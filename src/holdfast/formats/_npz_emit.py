"""What stands around the arrays of a ``.npz`` archive: headers as zipfile writes them, aligned."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from ..layout import Pieces
from ._crc import shift
from ._header_text import short

__all__ = ["ALIGNMENT", "Skeleton"]

#: Of the elements of every array in the file, in bytes.
ALIGNMENT = 64

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
#: Where in a local header, and in an entry of the directory, the CRC-32 stands.
_LOCAL_CRC, _CENTRAL_CRC = 14, 16

_UTF8 = 0x0800
_DATE = 1 << 5 | 1  # the first day that a zip archive can say: 1980-01-01
_VERSION, _VERSION64 = 20, 45
_UNIX = 3 << 8
_MODE = 0o600 << 16
_MARK = 0xFFFFFFFF
#: Extra field that aligns payloads: to how much, and zeros. It is what Android's archives have.
_PADDING = 0xD935


class Skeleton:
    """A stored archive without the elements of its arrays, which stand elsewhere in memory.

    Parameters
    ----------
    names : list of str
        Of the records.
    heads : list of bytes
        What each record begins with; their lengths are multiples of `ALIGNMENT`.
    nbytes : ndarray of uint64, shape (n,)
        Of what follows in each.

    Attributes
    ----------
    offsets : ndarray of uint64, shape (n,)
        Where in the file the elements of each array go.
    size : int
        Of the file.
    nbytes : ndarray of uint64

    Raises
    ------
    ValueError
        A name that is too long, or no Unicode; a file of 2**63 bytes.
    """

    def __init__(self, names: list[str], heads: list[bytes], nbytes: np.ndarray) -> None:
        self.nbytes = nbytes
        self._parts: list[bytes] = []
        self._length = 0  # of the parts
        self._starts = [0]  # of the pieces, in the data
        self._places = [0]  # of the pieces, in the file
        self._sums = np.array([zlib.crc32(head) for head in heads], np.uint32)
        cursor = 0
        offsets, locals_, piece, headers = [], [], [], []
        encoded = [_encoded(name) for name in names]
        for name, head, size in zip(encoded, heads, nbytes.tolist(), strict=True):
            headers.append(cursor)
            locals_.append(self._length + _LOCAL_CRC)
            piece.append(len(self._starts) - 1)
            cursor += self._put(_local(name, len(head) + size, cursor)) + self._put(head)
            offsets.append(cursor)
            cursor += size
            if size:
                self._starts.append(self._length)
                self._places.append(cursor)
        entries = [
            _central(name, len(head) + size, header)
            for name, head, size, header in zip(
                encoded, heads, nbytes.tolist(), headers, strict=True
            )
        ]
        lengths = [len(entry) for entry in entries]
        begins = np.cumsum([self._length, *lengths])[:-1]
        directory = self._put(b"".join(entries))
        self._put(_tail(len(names), directory, cursor))
        if cursor + directory >= 1 << 62:
            raise ValueError(f"{cursor} bytes are more than a file can have")
        self.offsets = np.array(offsets, np.uint64)
        self.size = self._places[-1] + self._length - self._starts[-1]
        self._data = bytearray(b"".join(self._parts))
        self._parts.clear()
        self._piece = np.array(piece, np.int64)
        self._locals = np.array(locals_, np.int64)
        self._centrals = begins.astype(np.int64) + _CENTRAL_CRC
        self.stamp(np.flatnonzero(nbytes == 0), np.zeros(int((nbytes == 0).sum()), np.uint32))

    def _put(self, part: bytes) -> int:
        self._parts.append(part)
        self._length += len(part)
        return len(part)

    def stamp(self, rows: np.ndarray, crcs: np.ndarray) -> None:
        """Set the checksums of records, given those of their elements."""
        whole = shift(self._sums[rows], self.nbytes[rows]) ^ crcs.astype(np.uint32)
        data = np.frombuffer(self._data, np.uint8)
        digits = whole.astype("<u4").view(np.uint8).reshape(-1, 4)
        for places in (self._locals, self._centrals):
            data[places[rows][:, None] + np.arange(4)] = digits

    def pieces(self, rows: np.ndarray | None = None) -> Pieces:
        """All that stands around the elements; or the parts that say something of `rows`.

        The bytes are the skeleton's own: they change with :meth:`stamp`.
        """
        starts = np.array(self._starts, np.int64)
        nbytes = np.diff(np.append(starts, len(self._data))).astype(np.uint64)
        places = np.array(self._places, np.uint64)
        if rows is None:
            return Pieces(self._data, places, nbytes, starts)
        which = np.unique(np.append(self._piece[rows], len(starts) - 1)) if len(rows) else rows
        return Pieces(self._data, places[which], nbytes[which], starts[which])


def _encoded(name: str) -> bytes:
    try:
        found = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"record {short(name)}: the name cannot be written as UTF-8") from None
    if len(found) > 0xFFFF:
        raise ValueError(f"record {short(name)}: its name has {len(found)} bytes, at most 65535")
    return found


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8


def _local(name: bytes, size: int, header: int) -> bytes:
    """The local header of a record of `size` bytes, whose checksum is still to come."""
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _MARK else b""
    end = header + _LOCAL.size + len(name) + len(extra)
    if end % ALIGNMENT:
        pad = (-end - 6) % ALIGNMENT
        extra += struct.pack("<HHH", _PADDING, 2 + pad, ALIGNMENT) + bytes(pad)
    version, told = (_VERSION64, _MARK) if size >= _MARK else (_VERSION, size)
    return (
        _LOCAL.pack(
            0x04034B50, version, _flags(name), 0, 0, _DATE, 0, told, told, len(name), len(extra)
        )
        + name
        + extra
    )


def _central(name: bytes, size: int, header: int) -> bytes:
    """The entry of a record in the directory."""
    wide = [size, size] if size >= _MARK else []
    wide += [header] if header >= _MARK else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _VERSION64 if wide else _VERSION
    told = min(size, _MARK)
    return (
        _CENTRAL.pack(
            *(0x02014B50, _UNIX | version, version, _flags(name), 0, 0, _DATE, 0, told, told),
            *(len(name), len(extra), 0, 0, 0, _MODE, min(header, _MARK)),
        )
        + name
        + extra
    )


def _tail(count: int, nbytes: int, start: int) -> bytes:
    """What ends the file, whose directory has `nbytes` bytes from `start` on."""
    wide = b""
    if count >= 0xFFFF or nbytes >= _MARK or start >= _MARK:
        wide = _END64.pack(
            *(0x06064B50, 44, _VERSION64, _VERSION64, 0, 0, count, count, nbytes, start)
        )
        wide += _LOCATOR.pack(0x07064B50, 0, start + nbytes, 1)
    narrow = min(count, 0xFFFF)
    return wide + _END.pack(
        0x06054B50, 0, 0, narrow, narrow, min(nbytes, _MARK), min(start, _MARK), 0
    )
