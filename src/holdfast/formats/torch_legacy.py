"""The stream that ``torch.save`` of torch 0.2 to 1.5 wrote, and newer ones write when asked to.

Five pickles, a magic number, a version, a few words on the system, the object and the keys of its
storages, and then the storages in the order of the keys, each behind the count of its elements. A
pickle does not say how long it is, and nothing is aligned.
"""

from __future__ import annotations

import itertools
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES
from ..errors import FormatError
from ..layout import FOREIGN, Index
from . import Read
from ._pickle import read_plain
from ._torch_legacy_write import METADATA, STRUCTURE, plan, seal
from ._torch_pickle import Pickled, build_index, read_object
from ._window import Window

#: It is read from its beginning.
NEEDS_SIZE = False

__all__ = ["METADATA", "NEEDS_SIZE", "STRUCTURE", "index", "plan", "seal", "sniff"]

#: The first pickle, a long integer, as protocol 0 and 1, 2 and 3, 4 and 5 have it.
_MAGIC = 0x1950A86A20F9469CFC6C
_SNIFF = re.compile(
    rb"(L%dL\n|\x80[\x02-\x05](\x95.{8})?\x8a\x0a%b)\."
    % (_MAGIC, re.escape(_MAGIC.to_bytes(10, "little"))),
    re.DOTALL,
)
_VERSION = 1001

#: Bytes of the count of elements that stands before each storage.
_COUNT = 8
#: Counts this near to one another are read together where there are at least so many of them.
_NEAR = 1 << 20
_CROWD = 32

_UNITS = np.array([row.unit for row in DTYPES], np.uint64)
_ITEMSIZES = np.array([max(row.itemsize, 1) for row in DTYPES], np.uint64)


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the storages: the object, their keys, and where they begin."""

    pickled: Pickled
    keys: list[str]
    listed: int
    end: int
    little: bool


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is of this format: all of its first pickle."""
    return _SNIFF.match(prefix) is not None


def index(read: Read, size: int, name: str, *, verify: bool) -> Index:  # noqa: ARG001
    """Find the tensors: run the pickles without running anything that they name.

    Of the storages only the counts before them are read. A file of unknown size is read to the end
    of the last storage. Bytes behind it are left alone, as torch leaves them.

    Parameters
    ----------
    verify : bool
        Changes nothing: this format has no checksums.

    Raises
    ------
    FormatError
        Anything that is not as torch writes it, or too short.
    """
    window = Window(read, size, name)
    head = window.grow(0, lambda data: _head(data, name))
    storages = head.pickled.storages
    rows = _rows(head, name)
    nbytes = storages["nbytes"][rows]
    ends = list(itertools.accumulate((nbytes + np.uint64(_COUNT)).tolist(), initial=head.end))
    counts = nbytes // _ITEMSIZES[storages["dtype"][rows]]
    _check(window, ends, counts, head.keys, head.little)
    storages["offset"][rows] = np.array(ends[:-1], np.uint64) + np.uint64(_COUNT)
    if sys.byteorder != "little":
        storages["flags"][_UNITS[storages["dtype"]] > 1] |= FOREIGN
    found = build_index(head.pickled, end=ends[-1])
    found.format = "torch_legacy"
    return found


def _head(data: memoryview, name: str) -> _Head:
    """Run the five pickles at the start of `data`."""
    magic, at = read_plain(data, 0, name=name, where="magic number")
    _expect(magic, _MAGIC, name, "magic number", 0)
    start = at
    version, at = read_plain(data, start, name=name, where="version")
    _expect(version, _VERSION, name, "version of the format", start)
    start = at
    system, at = read_plain(data, start, name=name, where="system information")
    little = system.get("little_endian", True) if type(system) is dict else None
    if type(little) is not bool:
        raise FormatError(
            f"{name}: system information at offset {start}: expected a dict that says "
            f"'little_endian': True or False, found {reprlib.repr(system)}"
        )
    pickled = read_object(data, at, name=name, legacy=True)
    keys, end = read_plain(data, pickled.end, name=name, where="keys of storages")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise FormatError(
            f"{name}: keys of storages at offset {pickled.end}: expected a list of str, "
            f"found {reprlib.repr(keys)}"
        )
    return _Head(pickled, keys, pickled.end, end, little)


def _expect(found: object, expected: int, name: str, what: str, offset: int) -> None:
    if type(found) is not int or found != expected:
        raise FormatError(
            f"{name}: {what} at offset {offset}: expected {expected}, found {reprlib.repr(found)}"
        )


def _rows(head: _Head, name: str) -> np.ndarray:
    """Row of ``storages`` for each key in the list, which is all of them in another order."""
    where = f"{name}: keys of storages at offset {head.listed}"
    known = {key: row for row, key in enumerate(head.pickled.keys)}
    rows = np.empty(len(head.keys), np.int64)
    for i, key in enumerate(head.keys):
        row = known.pop(key, None)
        if row is None:
            twice = key in head.pickled.keys
            expected = "each key once" if twice else "keys that the object names"
            text = reprlib.repr(key)
            raise FormatError(
                f"{where}: expected {expected}, found {text} {'twice' if twice else ''}".rstrip()
            )
        rows[i] = row
    if known:
        key = reprlib.repr(next(iter(known)))
        raise FormatError(
            f"{where}: expected the {len(head.pickled.keys)} storages that the object names, "
            f"found no {key}"
        )
    return rows


def _check(
    window: Window, ends: Sequence[int], expected: np.ndarray, keys: list[str], little: bool
) -> None:
    """Compare the count before each storage with what the object says, and that all are there.

    Counts had the byte order of the machine until that was mended in 2019, so those of a file that
    says it was written on a big-endian machine may be big-endian. Data were little-endian from the
    beginning, on every machine.

    Parameters
    ----------
    ends : sequence of int, one more than there are storages
        Where each begins, its count included; the last is where they end.
    little : bool
        What the file says of the machine.
    """
    whole = window.reaches(ends[-1])
    starts: list[Any] = list(ends[:-1])
    if not whole:
        starts = [start for start in starts if start + _COUNT <= window.stop]
    positions = np.array(starts, np.int64)
    found = _counts(window, positions)
    counts = expected[: len(found)].astype(np.int64)
    swapped = not little and bool((found != counts).any() and (found.byteswap() == counts).all())
    wrong = np.flatnonzero((found.byteswap() if swapped else found) != counts)
    if len(wrong):
        i = int(wrong[0])
        raise FormatError(
            f"{window.name}: storage {keys[i]!r}: the count of its elements at offset {ends[i]}: "
            f"expected {int(expected[i])} as the object says, found {int(found[i])}"
        )
    if not whole:
        i = next(i for i in range(len(keys)) if ends[i + 1] > window.stop)
        raise window.short(ends[i], ends[i + 1] - ends[i], f"storage {reprlib.repr(keys[i])}")


def _counts(window: Window, positions: np.ndarray) -> np.ndarray:
    """The int64 at each of these ascending positions, which all are in the file."""
    found = np.empty(len(positions), np.dtype("<i8"))
    reach = np.searchsorted(positions, positions + (_NEAR - _COUNT), "right")
    first = 0
    while first < len(positions):
        at = int(positions[first])
        last = int(reach[first])
        if last - first < _CROWD:
            count = window.take(at, _COUNT, "count of elements")
            found[first] = int.from_bytes(count, "little", signed=True)
            first += 1
            continue
        span = int(positions[last - 1]) - at + _COUNT
        data = np.frombuffer(window.take(at, span, "counts of elements"), np.uint8)
        places = (positions[first:last] - at)[:, None] + np.arange(_COUNT)
        found[first:last] = data[places].view("<i8")[:, 0]
        first = last
    return found
