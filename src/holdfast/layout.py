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
    "Index",
    "Names",
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
        ("file", np.uint16),
        ("flags", np.uint32),
        ("skip", np.uint32),
    ],
    align=True,
)
#: Flag of :data:`STORAGE`: the file has its CRC-32.
CHECKED = 1
#: Flag of :data:`STORAGE`: its elements have the byte order that the machine does not have.
FOREIGN = 2

#: Quantized element types of PyTorch, whose integers mean nothing without scale and zero point.
#: Where a storage is asked for by the code of a dtype, position i stands here as code ``-2 - i``.
QUANTIZED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")


class Resolver(Protocol):
    """Who decides what a pickle may name and call. Every method raises where it may not."""

    def find(self, module: str, name: str) -> object:
        """What a pickle means by ``module.name``."""

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func`, which :meth:`find` returned, makes."""

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """An instance of `cls`, which :meth:`find` returned."""

    def build(self, obj: object, state: object) -> object:
        """`obj` with `state` set; it may be another object."""

    def extend(self, obj: object, items: list[Any]) -> None:
        """Append `items` to `obj`, which is no list."""

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        """Set items of `obj`, which is no dict."""


@dataclass(frozen=True, slots=True)
class Persistent:
    """What a persistent id of a pickle stands for: a tensor, or a storage that is none's alone.

    Attributes
    ----------
    entry : int
        Of the index; -1 for a storage.
    row : int
        Of ``Index.storages``; -1 for a tensor.
    code : int
        Of the storage's dtype: -1 for untyped bytes, and below that for :data:`QUANTIZED`.
    part : tuple of int or None
        First element and number of elements, where it is a view of a part of the row.
    """

    entry: int = -1
    row: int = -1
    code: int = -1
    part: tuple[int, int] | None = None


class Structure(Protocol):
    """An object that was pickled around its tensors: read without running any of it.

    Attributes
    ----------
    data : bytes-like
        The pickle of the object, which a program that trusts it may unpickle.
    globals : sequence of str
        The ``module.name`` that it needs, in order, but for those of tensors and storages.
    """

    @property
    def data(self) -> bytes | memoryview: ...  # noqa: D102
    @property
    def globals(self) -> Sequence[str]: ...  # noqa: D102

    def paths(self) -> Mapping[str, int]:
        """Every name a tensor can be asked for, and its entry."""

    def replay(
        self,
        tensors: Sequence[Any],
        storages: Callable[..., object],
        resolver: Resolver,
        *,
        encoding: str | None = None,
    ) -> object:
        """The object, with `tensors` in the order of the entries for its tensors.

        Parameters
        ----------
        tensors : sequence
            One for each entry.
        storages : callable
            The storage of a row of ``Index.storages`` as one of a dtype's code (-1: untyped), for
            where the object holds a storage that is no tensor's, or a tensor of a special kind
            needs it. For one that is a view of a part of the row, a third argument says which:
            first element and number of elements.
        resolver : Resolver
            Asked for every other global and call.
        encoding : str, optional
            What a ``str`` of Python 2 is decoded by, strictly; ``"bytes"`` leaves it bytes. By
            default it is text where it is UTF-8, else bytes.

        Raises
        ------
        UnicodeDecodeError
            A ``str`` of Python 2 is not what `encoding` says.
        """

    def outline(self, leaf: Callable[[int], object]) -> object:
        """The object with ``leaf(entry)`` for its tensors, and inert records for all classes."""

    def persistent(self, pid: object) -> Persistent:
        """What a persistent id stands for.

        Parameters
        ----------
        pid : object
            As the pickle has it, but for the class of a storage, which is the name of the class.

        Raises
        ------
        KeyError
            It names nothing.
        """


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
    locations : sequence of str or None
        For each storage, the device that it was on, as the file has it.
    structure : Structure or None
        Where the object was pickled; `tree` is then None.
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
    """

    names: Names
    entries: np.ndarray
    dims: np.ndarray
    metadata: Mapping[str, str]
    framework: str | None = None
    tree: Any = None
    crcs: np.ndarray | None = None
    end: int = 0
    strides: np.ndarray | None = None
    storages: np.ndarray | None = None
    storage: np.ndarray | None = None
    flags: np.ndarray | None = None
    kinds: Mapping[int, str] = field(default_factory=dict)
    locations: Sequence[str] | None = None
    structure: Structure | None = None
    format: str = ""
    byteorder: str | None = None
    program: str | None = None
    users: np.ndarray | None = field(default=None, repr=False)
    others: Callable[[], tuple[np.ndarray, Sequence[str]]] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def dtype(self, i: int) -> DType:
        """Element type of entry `i`."""
        return DTYPES[int(self.entries[i]["dtype"])]

    def shape(self, i: int) -> tuple[int, ...]:
        """Shape of entry `i`, in elements in memory."""
        start = int(self.entries[i]["dims"])
        return tuple(self.dims[start : start + int(self.entries[i]["ndim"])].tolist())


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
