"""The headers of the arrays in an archive of NumPy's, read together and each made sense of once.

An archive may have very many arrays, of which few differ in dtype or shape; so headers are compared
as bytes, and what is done for each array by itself is as little as that takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import FormatError
from . import Read
from ._header_text import short
from ._npy_dtype import ObjectsError
from ._npy_header import MAGIC, PREFIX, Header, length, parse
from ._zip_inflate import exactly

__all__ = ["Headers", "read_headers"]

#: Bytes that are read for a header at first, which is all of most.
_FIRST = 128
#: Records so close to each other are read together, so many bytes of them.
_NEAR, _WINDOW = 16 << 10, 1 << 20
#: From so many on, what is alike of records is found out for all of them at once.
_MANY = 16
#: Bytes of a deflated record that are read at once to get at its header.
_PACKED = 512

#: How a header begins that has two bytes for its length, which all but the longest have.
_USUAL = MAGIC + b"\x01\x00"
_START = len(_USUAL) + 2


@dataclass(slots=True)
class Headers:
    """What the headers of an archive's arrays say.

    Attributes
    ----------
    heads : list of Header
        Those that differ.
    sums : list of int
        The CRC-32 of each.
    which : ndarray of int64
        The one that each array has; of an array of Python objects the complement of its place in
        `reasons`.
    reasons : list of str
        Why arrays cannot be read, as a message goes on behind their name.
    """

    heads: list[Header]
    sums: list[int]
    which: np.ndarray
    reasons: list[str]


@dataclass(slots=True)
class _Reading:
    """Headers being read."""

    read: Read
    records: np.ndarray
    names: list[str]
    name: str
    which: np.ndarray
    offsets: list[int]
    sizes: list[int]
    known: dict[bytes, int] = field(default_factory=dict)
    heads: list[Header] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def where(self, row: int) -> str:
        """How a message about an array begins."""
        return f"{self.name}: array {short(self.names[row])}"

    def add(self, row: int, raw: bytes) -> None:
        """The header of one array."""
        number = self.known.get(raw)
        if number is None:
            number = self.known[raw] = self._parse(row, raw)
        self.which[row] = number

    def _parse(self, row: int, raw: bytes) -> int:
        try:
            self.heads.append(parse(raw, ""))
        except ObjectsError as error:
            self.reasons.append(str(error))
            return ~(len(self.reasons) - 1)
        except FormatError:
            parse(raw, self.where(row))  # which raises again, and says of what
            raise
        return len(self.heads) - 1

    def inflate(self, row: int) -> None:
        """The header of an array that is deflated."""
        packed = int(self.records["packed"][row])
        raw = _inflated(self.read, self.offsets[row], packed, self.where(row), self.name)
        self.add(row, raw)

    def one(self, row: int, first: bytes) -> None:
        """The header of an array of which the first bytes are at hand."""
        offset, nbytes = self.offsets[row], self.sizes[row]
        total = len(first) + 1
        if len(first) >= PREFIX and first.startswith(_USUAL):
            total = _START + (first[8] | first[9] << 8)
        if total > len(first):
            where = self.where(row)
            total = length(first, where)
            if total > nbytes:
                raise FormatError(
                    f"{where}: header: needs {total} bytes at offset {offset}, found {nbytes}"
                )
            if total > len(first):
                first = exactly(self.read, offset, total, self.name)
        self.add(row, first[:total])

    def run(self, begin: int, end: int, nbytes: int) -> None:
        """The headers of arrays that stand near each other."""
        offset = self.offsets[begin]
        data = exactly(self.read, offset, nbytes, self.name)
        rest = self._many(begin, end, data) if end - begin >= _MANY else range(begin, end)
        for row in rest:
            start = self.offsets[row] - offset
            self.one(row, data[start : start + min(self.sizes[row], _FIRST)])

    def _many(self, begin: int, end: int, data: bytes) -> list[int]:
        """The headers that are at hand whole, of the usual version; returns those that are not."""
        offset = self.records["offset"][begin:end]
        starts = (offset - offset[0]).astype(np.int64)
        first = np.minimum(self.records["size"][begin:end], _FIRST).astype(np.int64)
        room = np.flatnonzero(first >= PREFIX)
        prefix = np.frombuffer(data, np.uint8)[starts[room, None] + np.arange(PREFIX)]
        low, high = prefix[:, 8].astype(np.int64), prefix[:, 9].astype(np.int64)
        total = _START + low + (high << 8)
        usual = (prefix[:, : len(_USUAL)] == np.frombuffer(_USUAL, np.uint8)).all(axis=1)
        usual &= total <= first[room]
        rows, begins = room[usual] + begin, starts[room[usual]]
        ends = begins + total[usual]
        raws = [data[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        found = dict(zip(reversed(raws), reversed(rows.tolist()), strict=True))  # the first of each
        for raw, row in sorted(found.items(), key=lambda item: item[1]):
            self.add(row, raw)
        known = self.known
        self.which[rows] = [known[raw] for raw in raws]
        return sorted(set(range(begin, end)).difference(rows.tolist()))


def read_headers(read: Read, records: np.ndarray, names: list[str], name: str) -> Headers:
    """Read the headers of the arrays in these records.

    Raises
    ------
    FormatError
        A record is no array.
    """
    which = np.zeros(len(records), np.int64)
    columns = records["offset"].tolist(), records["size"].tolist()
    reading = _Reading(read, records, names, name, which, *columns)
    for begin, end, nbytes in _runs(records):
        if nbytes >= 0:
            reading.run(begin, end, nbytes)
        else:
            reading.inflate(begin)
    sums = [zlib.crc32(raw) for raw, number in reading.known.items() if number >= 0]
    return Headers(reading.heads, sums, reading.which, reading.reasons)


def _runs(records: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Which records to read together, and how many bytes; -1 for one that is deflated."""
    offsets = records["offset"].tolist()
    ends = (records["offset"] + np.minimum(records["size"], _FIRST)).tolist()
    begin = 0
    for i, method in enumerate(records["method"].tolist()):
        joins = (
            begin < i
            and not method
            and 0 <= offsets[i] - offsets[i - 1] <= _NEAR
            and ends[i] - offsets[begin] <= _WINDOW
        )
        if joins:
            continue
        if begin < i:
            yield begin, i, ends[i - 1] - offsets[begin]
        begin = i
        if method:
            yield i, i + 1, -1
            begin = i + 1
    if begin < len(records):
        yield begin, len(records), ends[-1] - offsets[begin]


def _inflated(read: Read, offset: int, packed: int, where: str, name: str) -> bytes:
    """The header of a record that is deflated, of which no more is inflated than that takes."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    out = b""
    done = 0

    def fill(total: int) -> None:
        nonlocal out, done
        data = machine.unconsumed_tail
        while len(out) < total:
            part = b"" if machine.eof else machine.decompress(data, total - len(out))
            out, data = out + part, machine.unconsumed_tail
            if part or (data and not machine.eof):
                continue
            if machine.eof or done >= packed:
                raise FormatError(
                    f"{where}: header: needs {total} bytes, its deflated data at offset {offset} "
                    f"are {len(out)}"
                )
            data = exactly(read, offset + done, min(_PACKED, packed - done), name)
            done += len(data)

    try:
        fill(PREFIX)
        total = length(out, where)
        fill(total)
    except zlib.error as error:
        raise FormatError(f"{where}: is no deflated data: {error}") from None
    return out[:total]
