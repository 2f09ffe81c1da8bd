"""What the three axes hand each other about bytes in files.

Going out, a format makes a :class:`Plan`; coming in, it makes an :class:`Index`. The engine
knows neither: it moves :data:`SEGMENT` rows, each a run of bytes of a file and the memory that
holds or takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .dtypes import DTYPES, DType

__all__ = ["ENTRY", "SEGMENT", "Entry", "Index", "Names", "Plan", "alignment_order", "pack"]

#: A run of bytes of a file and its place in memory; the C struct ``hold_segment`` byte for byte.
#: ``layout`` is 0 for dense memory, else the address of a ``hold_layout`` that the engine's glue
#: fills in. ``crc`` is an output: the CRC-32 of the bytes in the file.
SEGMENT = np.dtype(
    [
        ("offset", np.uint64),
        ("nbytes", np.uint64),
        ("address", np.uint64),
        ("layout", np.uint64),
        ("file", np.uint32),
        ("crc", np.uint32),
    ],
    align=True,
)

#: One tensor in a file. ``offset`` counts from the start of the file; ``dims`` is the index of the
#: first extent in ``Index.dims``. Shapes are those in memory (see ``DType.pack``).
ENTRY = np.dtype(
    [
        ("offset", np.uint64),
        ("nbytes", np.uint64),
        ("dims", np.int64),
        ("dtype", np.int32),
        ("ndim", np.int16),
        ("file", np.uint16),
    ],
    align=True,
)


class Names(Protocol):
    """The names of an index, in header order; a format may build them only when asked."""

    def __len__(self) -> int: ...
    def tolist(self) -> list[str]:
        """Every name, in header order."""

    def find(self, name: str) -> int:
        """Position of `name`, or -1."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: what ``Checkpoint.info`` returns.

    Attributes
    ----------
    name : str
    dtype : str
        Name in the dtype table, such as ``"float32"``.
    shape : tuple of int
    nbytes : int
    offset : int
        Of the first byte, from the start of `file`.
    file : str
        Path of the file, or the text that stands for a file object.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: str


@dataclass(slots=True)
class Index:
    """Where the tensors of a checkpoint stand: what a format's ``parse`` returns.

    Attributes
    ----------
    names : Names
    entries : ndarray of ENTRY, shape (n,)
        In header order; every row checked against the size of the file.
    dims : ndarray of int64
        The extents of all tensors, end to end.
    metadata : dict of str to str
        What the user (or another writer) put there; nothing of the format's own.
    framework : str or None
        Name of the adapter whose tensors were saved, where the file says so.
    tree : object or None
        The structure (:mod:`holdfast.tree`), decoded from JSON but not yet interpreted; None for a
        flat dict of tensors.
    crcs : ndarray of uint32 or None
        CRC-32 of each tensor's bytes, where the file has them.
    end : int
        Where the format's bytes end, from the start of the file.
    """

    names: Names
    entries: np.ndarray
    dims: np.ndarray
    metadata: Mapping[str, str]
    framework: str | None = None
    tree: Any = None
    crcs: np.ndarray | None = None
    end: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    def dtype(self, i: int) -> DType:
        """Element type of entry `i`."""
        return DTYPES[int(self.entries[i]["dtype"])]

    def shape(self, i: int) -> tuple[int, ...]:
        """Shape of entry `i`, in elements in memory."""
        start = int(self.entries[i]["dims"])
        return tuple(self.dims[start : start + int(self.entries[i]["ndim"])].tolist())


@dataclass(slots=True)
class Plan:
    """Where every byte of a file to be written stands: what a format's ``plan`` returns.

    Attributes
    ----------
    offsets : ndarray of uint64, shape (n,)
        Where in the file the bytes of each tensor of the batch go. Together with the bytes that
        ``seal`` returns they cover the file from 0 to `size` without a gap.
    size : int
        Of the whole file, in bytes.
    state : object
        What the format wants back in ``seal``.
    """

    offsets: np.ndarray
    size: int
    state: Any = field(default=None, repr=False)


def alignment_order(nbytes: np.ndarray, page: int = 4096) -> np.ndarray:
    """Order in which tensors of these sizes, end to end, are all aligned without a gap.

    Sorted by the largest power of two that divides the size, at most `page`, descending; stable,
    so that tensors of one class keep their order. Where the first starts at a multiple of `page`,
    each starts at a multiple of its own power of two. A size of 0 counts as divisible by `page`.

    Parameters
    ----------
    nbytes : ndarray of uint64, shape (n,)
    page : int
        A power of two.

    Returns
    -------
    ndarray of int64, shape (n,)
        Positions in `nbytes`, in the order of the file.

    Examples
    --------
    >>> alignment_order(np.array([12, 4096, 8, 64, 0], np.uint64)).tolist()
    [1, 4, 3, 2, 0]
    """
    sizes = nbytes.astype(np.int64, copy=False)
    power = np.minimum(np.where(sizes == 0, page, sizes & -sizes), page)
    if len(power) == 0 or bool((power == power[0]).all()):
        return np.arange(len(power), dtype=np.int64)
    return np.argsort(-power, kind="stable").astype(np.int64, copy=False)


def pack(nbytes: np.ndarray, order: Sequence[int] | np.ndarray, start: int) -> np.ndarray:
    """Offsets of tensors laid end to end in `order`, the first at `start`.

    Returns
    -------
    ndarray of uint64, shape (n,)
        In the order of `nbytes`, not in that of the file.
    """
    sizes = nbytes[order]
    ends = np.cumsum(sizes, dtype=np.uint64)
    offsets = np.empty(len(nbytes), np.uint64)
    offsets[order] = ends - sizes + np.uint64(start)
    return offsets
