"""GGUF: what llama.cpp and its kin keep quantized models in. Read, not written.

Key-value pairs of several types, then for each tensor a name, a shape, a type and an offset, then
the tensors. Those of plain types are mapped in place; of quantized ones the blocks are, as bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import FormatError
from ..layout import ENTRY, Index
from . import Read
from ._gguf import MIN_PAIR, MIN_TENSOR, Fault, lay, pairs, tensors, texts
from ._gguf_metadata import Metadata
from ._gguf_types import REMOVED, TABLE, TYPES
from ._header_text import short
from ._pickle import Truncated
from ._records import NameList
from ._window import MOST, Window

__all__ = ["MAGIC", "NEEDS_SIZE", "index", "sniff"]

MAGIC = b"GGUF"
#: The header stands at the beginning.
NEEDS_SIZE = False

#: Bytes before the pairs: magic, version and the two counts.
_FIXED = 24
_VERSIONS = (2, 3)
#: What a reader takes at first: the header of a model without its vocabulary, and most of one.
_FIRST = 1 << 20

_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_U32 = 4


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is of this format, sound or not."""
    return prefix.startswith(MAGIC)


def index(read: Read, size: int, name: str, *, verify: bool = True) -> Index:  # noqa: ARG001
    """Find the tensors of a file, of which ``read(offset, nbytes)`` returns the bytes.

    Raises
    ------
    FormatError
        The header is malformed, or says what the file does not hold.
    """
    window = Window(read, size, name)
    window.take(0, _FIXED, "header")

    def parse(data: memoryview) -> Index:
        return _Header(data, size, name).index()

    return window.grow(0, parse, _FIRST)


class _Header:
    """A header, of which there may be more than `data`; Truncated is raised then."""

    def __init__(self, data: memoryview, size: int, name: str) -> None:
        self.data = data
        self.size = size
        self.name = name

    def index(self) -> Index:
        version = int.from_bytes(self.data[4:8], "little")
        self._check_version(version)
        ntensors = self._count(8, "tensors")
        npairs = self._count(16, "key-value pairs")
        rows, at = self._pairs(_FIXED, npairs)
        keys = self._keys(rows)
        alignment = self._alignment(keys)
        behind = at
        found, at = self._tensors(at, ntensors)
        names = self._names(found)
        start = (at + alignment - 1) & -alignment
        try:
            dims = lay(found, TABLE, start, alignment, self.size)
        except Fault as fault:
            raise self._unsound(fault, names[fault.row], found[fault.row]) from None
        entries = np.zeros(ntensors, ENTRY)
        for column in ("offset", "nbytes", "dims", "dtype"):
            entries[column] = found[column]
        entries["ndim"] = found["shape_ndim"]
        types = found["type"]
        raw = np.flatnonzero(TABLE["raw"][types])
        end = int(found["offset"][-1] + found["nbytes"][-1]) if ntensors else at
        return Index(
            NameList(names),
            entries,
            dims,
            Metadata(bytes(self.data[:behind]), keys),
            end=end,
            encodings={row: TYPES[int(types[row])].name for row in raw.tolist()},
            format="gguf",
        )

    # -- the fixed part ---------------------------------------------------------------------------

    def _check_version(self, version: int) -> None:
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:
            swapped = int.from_bytes(self.data[4:8], "big")
            raise FormatError(
                f"{self.name}: header: the version at offset 4 is {version:#x}, which is "
                f"{swapped} in big-endian: the file was written for a big-endian machine, which "
                "cannot be read here"
            )
        older = " (it has counts of 32 bits; convert it with llama.cpp)" if version == 1 else ""
        raise FormatError(
            f"{self.name}: header: expected version 2 or 3 at offset 4, found {version}{older}"
        )

    def _count(self, at: int, what: str) -> int:
        count = int.from_bytes(self.data[at : at + 8], "little", signed=True)
        if count < 0:
            raise FormatError(
                f"{self.name}: header: expected the number of {what} at offset {at}, found {count}"
            )
        return count

    def _text(self, at: int, length: int) -> str:
        """What stands there, for messages."""
        return bytes(self.data[at : at + length]).decode("utf-8", "replace")

    def _want(self, at: int, count: int, least: int, what: str) -> None:
        """Raise where `count` things of at least so many bytes cannot stand from `at` on."""
        if count * least > len(self.data) - at:
            raise self._ended(at, at + count * least, f"header: {count} {what}")

    def _ended(self, at: int, end: int, what: str) -> FormatError:
        """The error for `what` reaching from `at` to `end`, behind the bytes that are here."""
        size = self.size if self.size >= 0 else len(self.data)
        limit = f"file ends at {size}"
        if end > MOST and not 0 <= self.size < end:
            limit = f"a header ends at {MOST} at the latest"
        text = f"{self.name}: {what}: needs {end - at} bytes at offset {at}, {limit}"
        return Truncated(text, end)

    # -- pairs ------------------------------------------------------------------------------------

    def _pairs(self, at: int, n: int) -> tuple[np.ndarray, int]:
        self._want(at, n, MIN_PAIR, "key-value pairs")
        try:
            found: tuple[np.ndarray, int] = pairs(self.data, at, n)
        except Fault as fault:
            raise self._bad_pair(fault) from None
        return found

    def _keys(self, rows: np.ndarray) -> dict[str, tuple[int, int, int, int]]:
        """Keys and where their values are."""
        found: dict[str, tuple[int, int, int, int]] = {}
        columns = ["key", "key_length", "value", "count", "kind", "element"]
        for at, length, *value in rows[columns].tolist():
            raw = bytes(self.data[at : at + length])
            try:
                key = raw.decode()
            except UnicodeDecodeError:
                raise FormatError(
                    f"{self.name}: header: expected a key of UTF-8 at offset {at}, found "
                    f"{raw[:80]!r}"
                ) from None
            if key in found:
                raise FormatError(
                    f"{self.name}: header: key {short(key)} at offset {at} is there twice"
                )
            found[key] = tuple(value)
        return found

    def _alignment(self, keys: dict[str, tuple[int, int, int, int]]) -> int:
        if _ALIGNMENT not in keys:
            return _DEFAULT_ALIGNMENT
        value, _, kind, _ = keys[_ALIGNMENT]
        if kind != _U32:
            raise FormatError(
                f"{self.name}: header: {_ALIGNMENT}: expected a value of type {_U32} (uint32), "
                f"found type {kind}"
            )
        alignment = int.from_bytes(self.data[value : value + 4], "little")
        if alignment == 0 or alignment & (alignment - 1):
            raise FormatError(
                f"{self.name}: header: {_ALIGNMENT}: expected a power of two at offset {value}, "
                f"found {alignment}"
            )
        return alignment

    def _bad_pair(self, fault: Fault) -> FormatError:
        row = fault.rows[fault.row] if fault.rows is not None else None
        what = f"key-value pair {fault.row}"
        if row is not None and row["key_length"] and row["key"]:
            at = int(row["key"])
            length = int(row["key_length"])
            if at + length <= len(self.data):
                what = f"key {short(self._text(at, length))}"
        where = f"{self.name}: header: {what}: "
        if fault.kind == "end":
            return self._ended(fault.position, fault.expected, f"header: {what}")
        text = {
            "key": "expected a key, found an empty one",
            "kind": f"expected the type of a value (0 to 12), found {fault.found}",
            "nested": "an array of arrays, which nothing reads",
            "truth": f"expected a bool, which is 0 or 1, found {fault.found}",
            "count": f"expected a length of at most {fault.expected}, found {fault.found}",
        }[fault.kind]
        return FormatError(f"{where}{text} at offset {fault.position}")

    # -- tensors ----------------------------------------------------------------------------------

    def _tensors(self, at: int, n: int) -> tuple[np.ndarray, int]:
        self._want(at, n, MIN_TENSOR, "tensors")
        try:
            found: tuple[np.ndarray, int] = tensors(self.data, at, n)
        except Fault as fault:
            raise self._bad_tensor(fault) from None
        return found

    def _names(self, rows: np.ndarray) -> list[str]:
        starts = np.ascontiguousarray(rows["name"])
        lengths = rows["name_length"].astype(np.uint64)
        try:
            found: list[str] = texts(self.data, starts, lengths)
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.name}: header: expected the name of a tensor in UTF-8, found "
                f"{error.object[:80]!r}"
            ) from None
        seen: set[str] = set()
        for at, text in zip(starts.tolist(), found, strict=True):
            if text in seen or "\0" in text:
                wrong = "holds a NUL" if "\0" in text else "is there twice"
                raise FormatError(
                    f"{self.name}: tensor {short(text)}: the name at offset {at} {wrong}"
                )
            seen.add(text)
        return found

    def _bad_tensor(self, fault: Fault) -> FormatError:
        row = fault.rows[fault.row] if fault.rows is not None else None
        what = f"tensor {fault.row}"
        if row is not None and row["name"]:
            at = int(row["name"])
            what = f"tensor {short(self._text(at, int(row['name_length'])))}"
        if fault.kind == "end":
            return self._ended(fault.position, fault.expected, what)
        text = {
            "name": f"expected a name of at most {fault.expected} bytes, found {fault.found}",
            "ndim": f"expected at most {fault.expected} dimensions, found {fault.found}",
            "extent": f"expected extents of 0 or more, found {fault.found - (1 << 64)}",
        }[fault.kind]
        return FormatError(f"{self.name}: {what}: {text} at offset {fault.position}")

    def _unsound(self, fault: Fault, tensor: str, row: np.ndarray) -> FormatError:
        """The error for a tensor that is read whole and cannot be."""
        number = int(row["type"])
        known = TYPES.get(number)
        text: dict[str, Any] = {
            "type": f"expected a type that is known, found {number}",
            "row": f"expected rows of a multiple of {fault.expected} elements, as "
            f"{known.name if known else number} has it, found {fault.found}",
            "overflow": "2**63 elements or bytes, or more: shape "
            f"{row['extents'][: int(row['ndim'])].tolist()[::-1]}",
            "unaligned": f"expected an offset that is a multiple of {fault.expected}, found "
            f"{fault.found}",
            "tiling": f"expected the offset {fault.expected}, where the tensor before it ends, "
            f"found {fault.found}",
            "short": f"needs {fault.expected - fault.position} bytes at offset {fault.position}, "
            f"file ends at {fault.found}",
        }
        more = ""
        if fault.kind == "type" and number in REMOVED:
            more = f" ({REMOVED[number]}, which was removed from GGUF: quantize the model anew)"
        return FormatError(f"{self.name}: tensor {short(tensor)}: {text[fault.kind]}{more}")
