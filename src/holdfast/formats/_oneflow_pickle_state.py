"""What OneFlow pickles of a tensor, read as rows of an index: each checked against its bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import BY_NAME, BY_NUMPY, DType
from ..errors import FormatError
from ..layout import ENTRY, FOREIGN, STORAGE
from ..views import dense_strides
from ._inert import Global, Record, Storage, brief
from ._oneflow_meta import BY_NUMBER, MAX_NDIM

__all__ = ["Array", "Columns", "array_of", "dtype_of", "folder_of", "is_tensor", "kind_of"]

_INT64 = 1 << 63
_FLOAT32, _BFLOAT16 = BY_NAME["float32"], BY_NAME["bfloat16"]
#: Where in a float32 the bytes of the bfloat16 begin that it was made of.
_UPPER = 2 if sys.byteorder == "little" else 0
_FOREIGN = {"<": sys.byteorder != "little", ">": sys.byteorder != "big", "|": False, "=": False}

_TENSORS = frozenset(
    {("oneflow", "Tensor"), ("oneflow._oneflow_internal", "Tensor"), ("oneflow.tensor", "Tensor")}
)
_PARAMETERS = frozenset(
    {
        ("oneflow.nn", "Parameter"),
        ("oneflow._oneflow_internal.nn", "Parameter"),
        ("oneflow.nn.parameter", "Parameter"),
    }
)
_CLASSES = _TENSORS | _PARAMETERS
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
#: What NumPy calls types in a pickle, without their byte order.
_NUMPY: dict[str, DType] = {
    f"{np.dtype(name).kind}{np.dtype(name).itemsize}": row
    for name, row in BY_NUMPY.items()
    if not row.ml_dtypes
}


def is_tensor(record: Record) -> bool:
    """Whether a record is a tensor of OneFlow's, of whatever era."""
    cls = record.cls
    return not record.called and type(cls) is Global and (cls.module, cls.name) in _CLASSES


def kind_of(record: Record, dtype: DType) -> str:
    """What a plain tensor does not say of a parameter; of other tensors nothing."""
    if _key(record.cls) not in _PARAMETERS:
        return ""
    differentiable = dtype.name.startswith(("float", "bfloat", "complex"))
    return "parameter" if differentiable else "parameter,frozen"


def _key(cls: Any) -> tuple[str, str]:
    return (cls.module, cls.name) if type(cls) is Global else ("", "")


def folder_of(record: Record, what: object) -> str | None:
    """The sub-folder that a tensor's elements are in; None for one that has them in the pickle.

    Parameters
    ----------
    record : Record
        A tensor.
    what : object
        File and tensor: what it is as text stands in messages.

    Raises
    ------
    FormatError
        It has no state, or names no plain sub-folder.
    """
    state = record.state
    if record.args or record.kwargs or record.items or record.pairs:
        raise FormatError(f"{what}: made of arguments or items, expected a state alone")
    if type(state) is not dict or not ("path" in state or "data" in state):
        raise FormatError(f"{what}: expected a state with 'path' or 'data', found {brief(state)}")
    if "path" not in state:
        return None
    path = state["path"]
    if "data" in state or type(path) is not str or not _plain(path):
        shown = ascii(path[:80]) if type(path) is str else brief(path)
        raise FormatError(f"{what}: expected the name of a sub-folder, found the path {shown}")
    return path


def _plain(path: str) -> bool:
    """Whether a path is one plain component, on whatever system."""
    return (
        0 < len(path) <= 255
        and path not in (".", "..")
        and path.isprintable()
        and not any(sign in path for sign in '/\\:*?"<>|')
    )


@dataclass(frozen=True, slots=True)
class Array:
    """An array as its pickle describes it.

    Attributes
    ----------
    block : int
        The run of bytes that has its elements.
    dtype : DType
    shape : tuple of int
    fortran : bool
        Whether the first axis is the one whose elements lie side by side.
    foreign : bool
        Whether its byte order is the one that this machine does not have.
    """

    block: int
    dtype: DType
    shape: tuple[int, ...]
    fortran: bool
    foreign: bool


def array_of(data: object, what: object) -> Array:
    """What a record of an array of NumPy's says."""
    if type(data) is not Record or not data.called or type(data.cls) is not Global:
        raise FormatError(f"{what}: expected elements in an array, found {brief(data)}")
    cls, parts = data.cls, data.state
    if cls.module in _MULTIARRAY and cls.name == "_reconstruct":
        made = data.args[0] if data.args else None
        if type(made) is not Global or _key(made) != ("numpy", "ndarray"):
            raise FormatError(f"{what}: expected an array of numpy.ndarray, found {brief(made)}")
        if type(parts) is not tuple or len(parts) != 5 or parts[0] != 1:
            raise FormatError(f"{what}: expected the state of an array, found {brief(parts)}")
        _, shape, dtype, fortran, block = parts
    elif cls.module in _NUMERIC and cls.name == "_frombuffer" and len(data.args) == 4:
        block, dtype, shape, order = data.args
        fortran = {"C": False, "F": True}.get(order) if type(order) is str else None
    else:
        raise FormatError(f"{what}: expected elements in an array, found {brief(data)}")
    if type(fortran) is not bool:
        raise FormatError(f"{what}: an array whose order of axes is not said")
    if type(block) is not Storage:
        kind = "text, as pickles before protocol 3 have them" if type(block) is Record else ""
        raise FormatError(f"{what}: expected elements in bytes, found {kind or brief(block)}")
    found, foreign = _numpy_dtype(dtype, what)
    return Array(block.row, found, _shape(shape, what), fortran, foreign)


def _shape(shape: object, what: object) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > MAX_NDIM:
        raise FormatError(f"{what}: expected a shape of at most {MAX_NDIM} extents")
    for extent in shape:
        if type(extent) is not int or not 0 <= extent < _INT64:
            raise FormatError(f"{what}: {brief(extent)} as an extent, expected 0 to 2**63 - 1")
    return shape


def _numpy_dtype(record: object, what: object) -> tuple[DType, bool]:
    """Type of the elements, and whether their byte order is foreign."""
    if (
        type(record) is not Record
        or not record.called
        or _key(record.cls) != ("numpy", "dtype")
        or not record.args
        or type(record.args[0]) is not str
    ):
        raise FormatError(f"{what}: expected a dtype of NumPy's, found {brief(record)}")
    text, state = record.args[0], record.state
    order = "="
    if type(state) is tuple and len(state) == 8 and state[0] == 3 and type(state[1]) is str:
        order = state[1]
        if state[2:5] != (None, None, None):
            raise FormatError(f"{what}: an array of fields, expected one of numbers")
    elif state is not None:
        raise FormatError(f"{what}: expected the state of a dtype, found {brief(state)}")
    if text not in _NUMPY or order not in _FOREIGN:
        raise FormatError(f"{what}: an array of {text[:20]!r}, {order[:20]!r}, expected numbers")
    return _NUMPY[text], _FOREIGN[order]


def dtype_of(state: dict[Any, Any], what: object) -> DType:
    """Element type that a tensor had, as OneFlow calls it by number."""
    record = state.get("dtype")
    number = record.state if type(record) is Record and not record.called else None
    named = type(record) is Record and _key(record.cls)[0].partition(".")[0] == "oneflow"
    if not named or type(number) is not int:
        raise FormatError(f"{what}: expected a dtype of OneFlow's, found {brief(record)}")
    row = BY_NUMBER.get(number)
    if row is None or row.dtype is None:
        raise FormatError(f"{what}: a tensor of {row.name if row else f'dtype {brief(number)}'}")
    return row.dtype


#: Elements, bytes, and strides in bytes: none where these are more than any memory has.
_Extent = tuple[int, int, tuple[int, ...]]


def _extent(dtype: DType, shape: tuple[int, ...], fortran: bool) -> _Extent:
    """What a dense tensor takes; one without elements may have extents too large as well."""
    count = math.prod(shape)
    # Numbers of bfloat16 may take twice as much.
    if math.prod([extent for extent in shape if extent]) * 2 * dtype.itemsize >= _INT64:
        return count, count * dtype.itemsize, ()
    strides = dense_strides(shape[::-1] if fortran else shape, dtype.itemsize)
    return count, count * dtype.itemsize, strides[::-1] if fortran else strides


class Columns:
    """Rows of an index and of its storages, collected tensor by tensor.

    Attributes
    ----------
    strided : bool
        Whether any tensor is not dense in C order, from the start of its storage to the end.
    """

    __slots__ = ("_dims", "_known", "_rows", "_runs", "_storage", "_strides", "strided")

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._dims: list[int] = []
        self._strides: list[int] = []
        self._storage: list[int] = []
        self._runs: dict[tuple[int, int, int, int, int], int] = {}
        self._known: dict[tuple[int, tuple[int, ...], bool], _Extent] = {}
        self.strided = False

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        place: tuple[int, int, int],
        what: object,
        *,
        held: DType | None = None,
        fortran: bool = False,
        foreign: bool = False,
    ) -> None:
        """One more tensor.

        Parameters
        ----------
        dtype : DType
        shape : tuple of int
        place : tuple of int
            Number of the file, offset in it, and bytes that are there.
        what : object
            As for :func:`folder_of`.
        held : DType, optional
            What the elements are in the file, where the file says. Numbers of bfloat16 may be
            there as float32, each as it is and two bytes of zeros: OneFlow writes them so.
        fortran, foreign : bool
            As :class:`Array` has them.

        Raises
        ------
        FormatError
            The bytes are not as many as the shape asks for, or elements of another type.
        """
        file, offset, nbytes = place
        said = (dtype.code, shape, fortran)
        if said not in self._known:
            self._known[said] = _extent(dtype, shape, fortran)
        count, needed, strides = self._known[said]
        wide = dtype is _BFLOAT16 and (
            held is _FLOAT32 if held is not None else nbytes == 4 * count
        )
        stored = _FLOAT32 if wide else dtype
        if held is not None and held is not stored:
            raise FormatError(f"{what}: expected elements of {stored.name}, found {held.name}")
        if wide:
            needed, strides = 2 * needed, tuple([2 * step for step in strides])
        if not strides and shape:
            raise FormatError(f"{what}: a tensor of shape {shape}, too large for any memory")
        if nbytes != needed:
            raise FormatError(
                f"{what}: {stored.name} of shape {shape} needs {needed} bytes, found {nbytes}"
            )
        first = offset + (_UPPER if wide and count else 0)
        self.strided |= count > 0 and (wide or (fortran and len(shape) > 1))
        self._rows.append(
            (first, count * dtype.itemsize, len(self._dims), dtype.code, len(shape), file)
        )
        self._dims += shape
        self._strides += strides
        flags = FOREIGN if foreign and stored.unit > 1 else 0
        run = (offset, nbytes, stored.code, flags, file)
        self._storage.append(self._runs.setdefault(run, len(self._runs)))

    def entries(self) -> np.ndarray:
        """Rows of ENTRY."""
        return _table(ENTRY, ("offset", "nbytes", "dims", "dtype", "ndim", "file"), self._rows)

    def storages(self) -> np.ndarray:
        """Rows of STORAGE: each run of bytes once."""
        return _table(STORAGE, ("offset", "nbytes", "dtype", "flags", "file"), list(self._runs))

    def dims(self) -> np.ndarray:
        """The extents of all tensors, end to end."""
        return np.array(self._dims, np.int64)

    def strides(self) -> np.ndarray:
        """Strides in bytes, laid out as the extents."""
        return np.array(self._strides, np.int64)

    def storage(self) -> np.ndarray:
        """The storage of each tensor."""
        return np.array(self._storage, np.int64)


def _table(kind: np.dtype[Any], columns: Sequence[str], rows: list[Any]) -> np.ndarray:
    found = np.zeros(len(rows), kind)
    if rows:
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            found[column] = values
    return found
