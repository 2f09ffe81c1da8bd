"""Headers of NumPy's arrays, ``.npy`` files and the members of ``.npz`` archives: read and written.

A magic number, a version, a length, and the text of a Python dict: ``descr``, ``fortran_order`` and
``shape``. NumPy pads it with spaces so that the elements begin at a multiple of 64.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from ..layout import ENTRY, FOREIGN, STORAGE, Index
from ..views import TensorBatch, dense_strides
from ._npy_dtype import KIND, Element, ObjectsError, describe, read_dtype, read_plain
from ._npy_literal import read_literal
from ._records import NameList

__all__ = [
    "MAGIC",
    "MAX_HEADER",
    "PREFIX",
    "Header",
    "emit",
    "heads",
    "index_of",
    "length",
    "parse",
]

MAGIC = b"\x93NUMPY"
#: As many bytes tell how long any header is.
PREFIX = 12
#: The most bytes that a header may have. NumPy itself reads no more than 10,000 unless it is told.
MAX_HEADER = 1 << 20

_ALIGNMENT = 64
#: Room that NumPy leaves for the first extent to grow in place.
_GROWTH = 21
_MAX_NDIM = 64
_MOST = (1 << 63) - 1
#: How many elements of no bytes an array may have: nothing in a file bounds them.
_MOST_EMPTY = 1 << 20
_HINT = "holdfast: "

#: What nearly every header is; others are read as the literals that they are.
_USUAL = re.compile(
    rb"\{'descr': '([<>|][a-z][0-9]{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\), \} *\n"
)


@dataclass(frozen=True, slots=True)
class Header:
    """An array as its header describes it.

    Attributes
    ----------
    nbytes : int
        Of the header, which the elements follow.
    element : Element
    shape : tuple of int
    fortran : bool
        Whether the first axis is that along which elements follow one another.
    """

    nbytes: int
    element: Element
    shape: tuple[int, ...]
    fortran: bool

    @property
    def size(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.element.itemsize


def length(prefix: bytes | memoryview, where: str) -> int:
    """How many bytes a header has that begins with `prefix`, of at least `PREFIX` bytes.

    Raises
    ------
    FormatError
        It is none, or of a version that is not known, or too long.
    """
    if len(prefix) < PREFIX or bytes(prefix[:6]) != MAGIC:
        raise FormatError(
            f"{where}: expected an array of NumPy, which begins with {MAGIC!r}, found "
            f"{bytes(prefix[:8])!r}"
        )
    version = prefix[6], prefix[7]
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise FormatError(
            f"{where}: header: expected version 1.0, 2.0 or 3.0, found {version[0]}.{version[1]}"
        )
    start = 10 if version == (1, 0) else 12
    found = start + int.from_bytes(prefix[8:start], "little")
    if found > MAX_HEADER:
        raise FormatError(f"{where}: header: expected at most {MAX_HEADER} bytes, found {found}")
    return found


def parse(head: bytes, where: str) -> Header:
    """What a whole header says.

    Parameters
    ----------
    head : bytes
        As many as :func:`length` said.
    where : str
        How a message begins: file and array.

    Raises
    ------
    ObjectsError
        It is one of Python objects.
    FormatError
        It is no header, or one of an array that nobody has.
    """
    start = 10 if head[6] == 1 else 12
    usual = _USUAL.fullmatch(head, start)
    if usual:
        descr: object = usual[1].decode()
        fortran: object = usual[2] == b"True"
        extents = usual[3].split(b",")
        if len(extents) == 1 and extents[0]:
            raise FormatError(f"{where}: header: expected a tuple as shape, found {usual[3]!r}")
        shape: object = tuple(int(extent) for extent in extents if extent.strip())
        comment = ""
    else:
        descr, fortran, shape, comment = _literal(head, start, where)
    hint = comment[len(_HINT) :] if comment.startswith(_HINT) else None
    if not isinstance(shape, tuple) or not all(type(extent) is int for extent in shape):
        raise FormatError(
            f"{where}: header: expected a tuple of integers as shape, found {str(shape)[:80]}"
        )
    if type(fortran) is not bool:
        raise FormatError(
            f"{where}: header: expected True or False as fortran_order, found {str(fortran)[:80]}"
        )
    try:
        element = read_plain(usual[1].decode()) if usual else read_dtype(descr, hint)
    except ValueError as error:
        kind = ObjectsError if isinstance(error, ObjectsError) else FormatError
        raise kind(f"{where}: header: dtype {str(error)[:400]}") from None
    _check_shape(shape, element, where)
    return Header(len(head), element, shape, fortran)


def _literal(head: bytes, start: int, where: str) -> tuple[object, object, object, str]:
    """What a header says that is not laid out as usual: descr, order, shape and the comment."""
    try:
        text = head[start:].decode("utf-8" if head[6] == 3 else "latin-1")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: header: expected UTF-8, as its version 3.0 says, found other bytes at "
            f"{start + error.start}"
        ) from None
    found, comment = read_literal(text, where)
    if set(found) != {"descr", "fortran_order", "shape"}:
        raise FormatError(
            f"{where}: header: expected the keys 'descr', 'fortran_order' and 'shape', found "
            f"{str(sorted(found))[:200]}"
        )
    return found["descr"], found["fortran_order"], found["shape"], comment


def _check_shape(shape: tuple[int, ...], element: Element, where: str) -> None:
    """Raise FormatError for what no array can have."""
    most = _MAX_NDIM - (1 if element.kind else 0)
    if len(shape) > most:
        raise FormatError(
            f"{where}: header: expected at most {most} dimensions, found {len(shape)}"
        )
    # As NumPy has it, extents of 0 do not make the others possible.
    if math.prod(max(extent, 1) for extent in shape) * max(element.itemsize, 1) > _MOST:
        raise FormatError(f"{where}: header: shape {str(shape)[:200]} has 2**63 bytes or more")
    if element.itemsize == 0 and math.prod(shape) > _MOST_EMPTY:
        raise FormatError(
            f"{where}: header: expected at most {_MOST_EMPTY} elements that have no bytes, found "
            f"{math.prod(shape)}"
        )


# -- the index -----------------------------------------------------------------------------------


def index_of(
    found: Sequence[Header], which: np.ndarray, offsets: np.ndarray, names: list[str], end: int
) -> Index:
    """The index of a file's arrays, each a storage of its own, whose checksum is not known.

    Parameters
    ----------
    found : sequence of Header
    which : ndarray of int64
        The one that each array has.
    offsets : ndarray of uint64
        Where the elements of each stand.
    names : list of str
    end : int
        Where the file ends.
    """
    shapes, strides = [], []
    for head in found:
        shape, steps = head.shape, _strides(head.shape, head.element.itemsize, head.fortran)
        if head.element.kind:
            shape, steps = (*shape, head.element.itemsize), (*steps, 1)
        shapes.append(shape)
        strides.append(steps)
    ndim = np.array([len(shape) for shape in shapes], np.int64)
    own = np.cumsum(ndim) - ndim
    counts = ndim[which]
    starts = np.cumsum(counts) - counts
    at = np.repeat(own[which] - starts, counts) + np.arange(int(counts.sum()))
    entries = np.zeros(len(names), ENTRY)
    entries["offset"] = offsets
    entries["nbytes"] = np.array([head.size for head in found], np.uint64)[which]
    entries["dims"], entries["ndim"] = starts, counts
    entries["dtype"] = np.array([head.element.code for head in found], np.int16)[which]
    storages = np.zeros(len(names), STORAGE)
    for column in ("offset", "nbytes", "dtype"):
        storages[column] = entries[column]
    flags = [FOREIGN if head.element.swapped else 0 for head in found]
    storages["flags"] = np.array(flags, np.uint16)[which]
    fortran = any(head.fortran and len(head.shape) > 1 for head in found)
    kinds = {number: head.element.kind for number, head in enumerate(found) if head.element.kind}
    return Index(
        NameList(names),
        entries,
        _flat(shapes)[at],
        {},
        framework="numpy",
        end=end,
        strides=_flat(strides)[at] if fortran else None,
        storages=storages,
        storage=np.arange(len(names), dtype=np.int64),
        kinds={i: kinds[k] for i, k in enumerate(which.tolist()) if k in kinds} if kinds else {},
    )


def _flat(extents: Sequence[tuple[int, ...]]) -> np.ndarray:
    """All of them, end to end."""
    return np.array(list(itertools.chain.from_iterable(extents)), np.int64)


def _strides(shape: tuple[int, ...], itemsize: int, fortran: bool) -> tuple[int, ...]:
    """Strides in bytes of an array without gaps; those of one without elements mean nothing."""
    if 0 in shape:
        shape = (0,) * len(shape)
    if fortran:
        return tuple(reversed(dense_strides(tuple(reversed(shape)), itemsize)))
    return dense_strides(shape, itemsize)


# -- writing -------------------------------------------------------------------------------------


def heads(names: list[str], batch: TensorBatch, kinds: dict[int, str], what: str) -> list[bytes]:
    """The header of each tensor of a batch, whose elements will follow in C order.

    Parameters
    ----------
    names : list of str
    batch : TensorBatch
    kinds : dict of int to str
        What the dtype table does not say of some.
    what : str
        The format, for messages.

    Raises
    ------
    TypeError
        NumPy's files cannot hold one.
    """
    made: dict[tuple[int, str, int], tuple[object, str]] = {}
    found = []
    dims = batch.dims.tolist()
    for i, (first, code, ndim) in enumerate(batch.views[["dims", "dtype", "ndim"]].tolist()):
        kind = kinds.get(i, "")
        shape = tuple(dims[first : first + ndim])
        last = -1
        if kind.startswith(KIND) and shape:
            shape, last = shape[:-1], shape[-1]
        key = code, kind, last
        try:
            if key not in made:
                made[key] = describe(*key)
        except ValueError as error:
            raise TypeError(f"tensor {names[i]!r}: {what} cannot hold it: {error}") from None
        descr, hint = made[key]
        found.append(emit(descr, shape, hint))
    return found


def emit(descr: object, shape: tuple[int, ...], hint: str = "") -> bytes:
    """A header, laid out as NumPy does, whose length is a multiple of 64.

    Parameters
    ----------
    descr : object
        A text, or a list of fields.
    shape : tuple of int
    hint : str
        What the elements are, if no text of NumPy's says it: a comment, which NumPy ignores.

    Examples
    --------
    >>> emit("<f4", (2, 3))[10:].decode().rstrip()
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    """
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    if shape:
        text += " " * (_GROWTH - len(repr(shape[0])))
    if hint:
        text += f" # {_HINT}{hint}"
    try:
        body, version = text.encode("latin-1"), 1
    except UnicodeEncodeError:
        body, version = text.encode("utf-8"), 3
    if version == 1 and len(body) + 1 + _ALIGNMENT > 0xFFFF:
        version = 2
    start = 10 if version == 1 else 12
    total = start + len(body) + 1
    total += _ALIGNMENT - total % _ALIGNMENT
    size = (total - start).to_bytes(start - 8, "little")
    body += b" " * (total - start - len(body) - 1) + b"\n"
    return MAGIC + bytes((version, 0)) + size + body
