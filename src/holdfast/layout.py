"""What the three axes hand each other about bytes in files.

Going out, a format makes a :class:`Plan`; coming in, it makes an :class:`Index`. The engine
knows neither: it moves :data:`SEGMENT` rows, each a run of bytes of a file and the memory that
holds or takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .dtypes import DTYPES, DType
from .structure import QUANTIZED, Persistent, Resolver, Structure
from .views import CONJUGATE, NEGATIVE

__all__ = [
    "CHECKED",
    "CONJUGATE",
    "ENTRY",
    "FOREIGN",
    "NEGATIVE",
    "QUANTIZED",
    "SEGMENT",
    "STORAGE",
    "Entry",
    "Folder",
    "FolderPlan",
    "Guess",
    "Index",
    "Names",
    "Part",
    "Persistent",
    "Pieces",
    "Plan",
    "Resolver",
    "Structure",
    "alignment_order",
    "pack",
]

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

#: One tensor in a file. ``offset`` counts from the start of the file, which is one of
#: ``Index.files``; ``dims`` is the index of the first extent in ``Index.dims``. Shapes are those in
#: memory (see ``DType.pack``).
ENTRY = np.dtype(
    [
        ("offset", np.uint64),
        ("nbytes", np.uint64),
        ("dims", np.int64),
        ("dtype", np.int16),
        ("ndim", np.int16),
        ("file", np.uint32),
    ],
    align=True,
)


#: A run of bytes of a file that one tensor or several are views of. ``packed`` is what it takes in
#: the file where it is deflated, 0 where it stands as it is; ``dtype`` the code of the type that it
#: was saved as, uint8 for untyped bytes; ``crc`` the CRC-32 of its bytes once inflated; ``skip``
#: how many bytes of what is inflated stand before them and are not its own.
STORAGE = np.dtype(
    [
        ("offset", np.uint64),
        ("nbytes", np.uint64),
        ("packed", np.uint64),
        ("crc", np.uint32),
        ("dtype", np.uint16),
        ("flags", np.uint16),
        ("file", np.uint32),
        ("skip", np.uint32),
    ],
    align=True,
)
#: Flag of :data:`STORAGE`: the file has its CRC-32.
CHECKED = 1
#: Flag of :data:`STORAGE`: its elements have the byte order that the machine does not have.
FOREIGN = 2


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
    encoding : str or None
        What the bytes of a quantized tensor are blocks of, such as ``"Q4_K"``; the last axis is
        then that of the bytes of a block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: str
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class Guess:
    """What there is to know of a checkpoint that says neither types nor shapes of its tensors.

    Attributes
    ----------
    warning : str
        What those are told who have no better source than the index.
    told : callable
        Given type and shape of some entries, of just as many bytes as those have, returns the index
        in which they are these.
    """

    warning: str
    told: Callable[[Mapping[int, tuple[DType, tuple[int, ...]]]], Index]


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
    metadata : mapping of str to str
        What the user (or another writer) put there; nothing of the format's own. In some formats
        values are of other types, and made when they are asked for.
    framework : str or None
        Name of the adapter whose tensors were saved, where the file says so.
    tree : object or None
        The structure (:mod:`holdfast.tree`), decoded from JSON but not yet interpreted; None for a
        flat dict of tensors.
    crcs : ndarray of uint32 or None
        CRC-32 of each tensor's bytes, where the file has them.
    checked : ndarray of bool or None
        Of which tensors `crcs` is known; None: of all, where there are any.
    end : int
        Where the format's bytes end, from the start of the file; 0 where there are several.
    files : sequence of str or None
        The files that a checkpoint of several is made of, relative to their folder; None for one
        that is a single file.
    strides : ndarray of int64 or None
        Strides in bytes, laid out as `dims`; None where every tensor is dense in C order.
    storages : ndarray of STORAGE or None
        The runs of bytes that the tensors are views of; None where each is its own. Checksums are
        then those of the storages, and `crcs` is None. The offset of an entry counts as if its
        storage were not deflated.
    storage : ndarray of int64 or None
        Row of `storages` for each entry.
    flags : ndarray of uint16 or None
        ``CONJUGATE`` and ``NEGATIVE`` for each entry; None for none.
    kinds : dict of int to str
        For some entries, what a plain tensor of `framework` does not say of them.
    encodings : dict of int to str
        For the entries that are blocks of quantized numbers, the type of the blocks.
    locations : sequence of str or None
        For each storage, the device that it was on, as the file has it.
    structure : Structure or None
        Where the object was pickled; `tree` is then None.
    inert : bool
        Whether a load gives inert records for instances of classes that are not allowed, rather
        than refuse the object that they are in.
    format : str
        What the format is called: ``"safetensors"``, ``"torch"``, ``"torch_legacy"``, …
    byteorder : str or None
        Where the file has a place for it and says it: ``"little"`` or ``"big"``.
    program : str or None
        ``"torchscript"`` or ``"pt2"`` where the file holds a program besides its tensors.
    users : ndarray of int64 or None
        How many entries each storage has; counted when it is first asked for.
    others : callable or None
        Returns the runs of bytes besides `storages` that the file has a CRC-32 of, as rows of
        STORAGE, and what they are called. Called where all of the file is to be checked.
    guess : Guess or None
        Where types and shapes are guessed of the sizes.
    refused : mapping of str to str
        What stands beside the tensors, under a name as theirs are, and cannot be read here: the
        message that says why.
    """

    names: Names
    entries: np.ndarray
    dims: np.ndarray
    metadata: Mapping[str, Any]
    framework: str | None = None
    tree: Any = None
    crcs: np.ndarray | None = None
    checked: np.ndarray | None = None
    end: int = 0
    files: Sequence[str] | None = None
    strides: np.ndarray | None = None
    storages: np.ndarray | None = None
    storage: np.ndarray | None = None
    flags: np.ndarray | None = None
    kinds: Mapping[int, str] = field(default_factory=dict)
    encodings: Mapping[int, str] = field(default_factory=dict)
    locations: Sequence[str] | None = None
    structure: Structure | None = None
    inert: bool = False
    format: str = ""
    byteorder: str | None = None
    program: str | None = None
    users: np.ndarray | None = field(default=None, repr=False)
    others: Callable[[], tuple[np.ndarray, Sequence[str]]] | None = None
    guess: Guess | None = field(default=None, repr=False)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def some(self, rows: np.ndarray) -> np.ndarray:
        """Those `entries` that are asked for: a copy, or themselves if they all are, in order."""
        n = len(self.entries)
        if len(rows) == n and np.array_equal(rows, np.arange(n)):
            return self.entries
        found: np.ndarray = self.entries[rows]
        return found

    def dtype(self, i: int) -> DType:
        """Element type of entry `i`."""
        return DTYPES[int(self.entries[i]["dtype"])]

    def shape(self, i: int) -> tuple[int, ...]:
        """Shape of entry `i`, in elements in memory."""
        start = int(self.entries[i]["dims"])
        return tuple(self.dims[start : start + int(self.entries[i]["ndim"])].tolist())

    def file(self, name: str, number: int) -> str:
        """What messages call one file of the checkpoint `name`."""
        return name if self.files is None else f"{name.rstrip('/')}/{self.files[number]}"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Bytes of a format's own, and where in the file they go.

    Attributes
    ----------
    data : bytes or bytearray
    offset : ndarray of uint64, shape (n,)
        Where in the file each piece begins; ascending.
    nbytes : ndarray of uint64, shape (n,)
    start : ndarray of int64, shape (n,)
        Where in `data` each piece begins.
    """

    data: bytes | bytearray
    offset: np.ndarray
    nbytes: np.ndarray
    start: np.ndarray

    @classmethod
    def one(cls, data: bytes | bytearray, offset: int) -> Pieces:
        """A single piece."""
        return cls(
            data,
            np.array([offset], np.uint64),
            np.array([len(data)], np.uint64),
            np.zeros(1, np.int64),
        )


@dataclass(slots=True)
class Plan:
    """Where every byte of a file to be written stands: what a format's ``plan`` returns.

    Attributes
    ----------
    offsets : ndarray of uint64, shape (n,)
        Where in the file the bytes of each tensor of the batch go. Together with the pieces that
        ``seal`` returns they cover the file from 0 to `size` without a gap.
    size : int
        Of the whole file, in bytes.
    early : ndarray of bool, shape (n,), or None
        Where the format's bytes stand between the tensors: which tensors' checksums to compute
        before anything is written, so that most of those bytes can be written in one go with the
        tensors around them. ``seal`` is then called twice. None: nothing stands between them.
    state : object
        What the format wants back in ``seal``.
    """

    offsets: np.ndarray
    size: int
    state: Any = field(default=None, repr=False)
    early: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """Which files a folder to be written holds: what the ``plan`` of such a format returns.

    All paths are relative to it, their components plain and separated by ``/``.

    Attributes
    ----------
    paths : list of str
        For each tensor of the batch the file that its bytes alone make up.
    texts : dict of str to bytes
        The small files of the format's own, and what is in them.
    last : str or None
        Which of them is written when all else is in place.
    """

    paths: list[str]
    texts: dict[str, bytes]
    last: str | None = None


class Part(Protocol):
    """One file of a folder, as a format that reads single files wants it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    def peek(self, nbytes: int) -> bytes:
        """At most its first bytes."""

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        """Exactly those bytes, or FormatError."""


class Folder(Protocol):
    """A folder being read, as formats see it: they do no I/O of their own.

    Every method raises FormatError for what is no regular file, and for a symbolic link unless the
    format follows them.
    """

    #: What those are to be warned of who read it.
    notes: list[str]

    @property
    def name(self) -> str: ...  # noqa: D102
    def entries(self, path: str = "") -> Mapping[str, str]:
        """What is in a sub-folder: names, sorted, and ``"file"``, ``"folder"``, ``"link"`` or
        ``"other"``.
        """

    def read(self, paths: Sequence[str], *, most: int) -> list[bytes | None]:
        """The whole contents of small files; None for those that do not exist.

        Raises
        ------
        FormatError
            One is larger than `most` bytes.
        """

    def sizes(self, paths: Sequence[str]) -> np.ndarray:
        """Sizes of files in bytes, as int64; -1 for those that do not exist."""

    def part(self, path: str) -> Part:
        """One file, to be read before others are asked for; FormatError where there is none."""


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
