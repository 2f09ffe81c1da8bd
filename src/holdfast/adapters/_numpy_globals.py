"""NumPy's arrays, scalars and dtypes in pickles of a stranger.

NumPy's own functions set the state of an array or a dtype without asking whether it can be one:
each state is taken apart here, and NumPy is only ever given what it would have written itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ._rules import Making, Manner, Table, integers, one_of
from .numpy import _ML_DTYPES, decode_dtype

__all__ = ["table"]

_ARRAYS = "numpy._core.multiarray numpy.core.multiarray"
_NUMERIC = "numpy._core.numeric numpy.core.numeric"
_MAX_DEPTH = 16  # of records in records
#: Parts of a record, those of its parts included, each as often as it stands there: NumPy walks all
#: of them to hash or to print it, and a hundred bytes of a pickle are enough for 10**16.
_MAX_PARTS = 1 << 14
_MAX_NDIM = 64
#: Greatest element of an array without elements, for which NumPy allocates one all the same.
_MAX_EMPTY = 1 << 24
_SMALL_EMPTY = 1 << 12
#: What np.dtype is given for the types that are not records: kind and size, in its own words.
_CODE = re.compile(
    r"[|<>=]?(?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SUV][0-9]{1,10}|[mM]8|O8?)"
)
_UNIT = re.compile(r"Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as")
_ALIGNED = 0x80  # flag in the state of a dtype: laid out as C does it


@cache
def table() -> Table:
    """What is allowed of NumPy."""
    made = Table()
    made.function(_ARRAYS, "_reconstruct", _reconstruct)
    made.function(_ARRAYS, "scalar", _scalar)
    made.function(_NUMERIC, "_frombuffer", _frombuffer)
    made.kind("numpy", "ndarray", np.ndarray)
    made.manners[np.ndarray] = Manner(build=_build_array)
    made.kind("numpy", "dtype", np.dtype, _dtype)
    _scalar_types(made)
    _dtype_types(made)
    _ml_dtypes(made)
    return made


def _scalar_types(made: Table) -> None:
    """``numpy.float32`` and its like, which stand in configurations; they are not called."""
    names = {kind.__name__: kind for kind in set(np.sctypeDict.values())}
    names |= {name: getattr(np, name) for name in ("generic", "number", "integer", "floating")}
    # Aliases, of this NumPy and of older ones.
    names |= {"bool_": np.bool_, "bool": np.bool_, "str_": np.str_, "unicode_": np.str_}
    names |= {"string_": np.bytes_, "longlong": np.longlong, "ulonglong": np.ulonglong}
    for name, kind in names.items():
        made.value("numpy", name, kind)


def _dtype_types(made: Table) -> None:
    """The classes of dtypes: as values, and called without arguments."""
    for name, kind in vars(getattr(np, "dtypes", np)).items():
        if name.endswith("DType") and isinstance(kind, type) and issubclass(kind, np.dtype):
            made.kind("numpy.dtypes", name, kind, _instance(kind))
            made.manners[kind] = Manner(build=_build_dtype)
    # Before NumPy 1.25 they had no names of their own.
    for code in "?bhilqpBHILQPefdgFDGSUVOMm":
        made.manners[type(np.dtype(code))] = Manner(build=_build_dtype)


def _instance(kind: type) -> Any:
    def make(args: tuple[Any, ...], _: Making) -> np.dtype[Any]:
        if args:
            raise TypeError(f"{len(args)} arguments, expected none")
        made: np.dtype[Any] = kind()
        return made

    return make


def _ml_dtypes(made: Table) -> None:
    try:
        import ml_dtypes
    except ImportError:  # `find` then says that the global is not allowed
        return
    for name in _ML_DTYPES:
        kind = getattr(ml_dtypes, name, None)
        if kind is not None:
            made.value("ml_dtypes", name, kind)
            made.manners[type(np.dtype(kind))] = Manner(build=_build_dtype)


# -- dtypes ----------------------------------------------------------------------------------------


def _dtype(args: tuple[Any, ...], making: Making) -> np.dtype[Any]:
    """``numpy.dtype(what, align, copy)``, as dtypes are pickled: a copy that gets its state."""
    if not 1 <= len(args) <= 3 or any(type(flag) not in (bool, int) for flag in args[1:]):
        raise TypeError("expected the name of a type and two flags")
    what = args[0]
    if type(what) is bytes:
        what = what.decode("ascii")
    if isinstance(what, type) and what in _concrete():
        made = np.dtype(what)
        if made.num < 256:
            made = np.dtype(made.str, False, True)
    elif type(what) is str and _CODE.fullmatch(what):
        # A copy always: the state would else be set in the one dtype that all arrays share.
        made = np.dtype(what, False, True)
    else:
        raise ValueError("not the name of a type that arrays may have")
    return made if made.num >= 256 else making.begin(made)


@cache
def _concrete() -> frozenset[type]:
    """The types that elements have, without those that only group them."""
    names = table().names
    return frozenset(np.sctypeDict.values()) | {
        kind for (module, _), kind in names.items() if module == "ml_dtypes"
    }


def _build_dtype(dtype: np.dtype[Any], state: Any, making: Making) -> None:
    """Give a dtype the state that NumPy would write for what the file's state says."""
    if type(state) is not tuple or not 6 <= len(state) <= 9 or not one_of(state[0], 3, 4):
        raise ValueError("not the state of a dtype")
    order = state[1].decode("ascii") if type(state[1]) is bytes else state[1]
    if not one_of(order, "<", ">", "|", "="):
        raise ValueError("byte order is none of <, >, | and =")
    subarray, names, fields = state[2:5]
    if dtype.num >= 256:  # of ml_dtypes: there is only the one
        if subarray is not None or names is not None or np.dtype(f"{order}i2").isnative is False:
            raise ValueError(f"not the state of {dtype}")
        return
    if subarray is not None:
        made, extent = _subarray(subarray, making)
    elif names is not None:
        made, extent = _record(dtype, state, making)
    else:
        if fields is not None:
            raise ValueError("fields without names")
        made, extent = _simple(dtype, order, state), _ALONE
    if made.kind != dtype.kind or made.itemsize != dtype.itemsize:
        raise ValueError(f"the state of {made} for {dtype}")
    making.finish(dtype)
    dtype.__setstate__(made.__reduce__()[2])  # type: ignore[attr-defined]
    making.extents[id(dtype)] = dtype, extent


def _simple(dtype: np.dtype[Any], order: str, state: tuple[Any, ...]) -> np.dtype[Any]:
    text = dtype.str.lstrip("<>|=")
    if dtype.kind == "O":
        return np.dtype("O")
    if dtype.kind in "mM" and len(state) == 9:
        text += _datetime_unit(state[8])
    if order == "=":
        order = "<" if np.little_endian else ">"
    if np.dtype(text).str.startswith("|"):
        order = "|"
    elif order == "|":
        order = "<" if np.little_endian else ">"
    return decode_dtype(order + text)


def _datetime_unit(metadata: Any) -> str:
    if type(metadata) is not tuple or len(metadata) != 2 or type(metadata[1]) is not tuple:
        raise ValueError("not the unit of a date")
    parts: tuple[Any, ...] = metadata[1]
    if len(parts) < 3:
        raise ValueError("not the unit of a date")
    unit, count, divisor = parts[:3]
    unit = unit.decode("ascii") if type(unit) is bytes else unit
    if one_of(unit, "generic"):
        return ""
    if type(unit) is not str or not _UNIT.fullmatch(unit):
        raise ValueError("not the unit of a date")
    if type(count) is not int or not 0 < count < 1 << 31 or not one_of(divisor, 1):
        raise ValueError("not the number of units of a date")
    return f"[{count}{unit}]"


#: Levels of a dtype below its first, and its parts: of one that has none.
_Extent = tuple[int, int]
_ALONE: _Extent = (0, 1)


def _extent(parts: Sequence[Any], making: Making) -> _Extent:
    """The extent of a dtype of these parts; only parts that were made here are parts of others."""
    depth, count = 0, 1
    for dtype in parts:
        if not isinstance(dtype, np.dtype):
            raise TypeError(f"a {type(dtype).__name__} for a dtype")
        known = making.extents.get(id(dtype))
        if making.pending(dtype):
            if dtype.kind == "V" or dtype.hasobject:
                raise ValueError("a part of a dtype that is not complete")
        elif known is None and (dtype.names is not None or dtype.subdtype is not None):
            raise ValueError("a part of a dtype that is not of the file")
        if dtype.hasobject:
            raise ValueError("references to Python objects in a record")
        below, more = _ALONE if known is None else known[1]
        depth, count = max(depth, below + 1), count + more
    if depth > _MAX_DEPTH or count > _MAX_PARTS:
        raise ValueError(f"records nest deeper than {_MAX_DEPTH}, or have over {_MAX_PARTS} parts")
    return depth, count


def _subarray(value: Any, making: Making) -> tuple[np.dtype[Any], _Extent]:
    if type(value) is not tuple or len(value) != 2:
        raise ValueError("not a sub-array")
    extent = _extent(value[:1], making)
    shape = (value[1],) if type(value[1]) is int else value[1]
    return np.dtype((value[0], integers(shape, "the shape of a sub-array"))), extent


def _record(
    dtype: np.dtype[Any], state: tuple[Any, ...], making: Making
) -> tuple[np.dtype[Any], _Extent]:
    names, fields = state[3:5]
    if type(names) is not tuple or type(fields) is not dict:
        raise TypeError("the names or the fields of a record")
    making.copies(fields, 256 * len(names))
    formats: list[Any] = []
    offsets: list[int] = []
    titles: list[str | None] = []
    for name in names:
        if type(name) is not str or type(fields.get(name)) is not tuple:
            raise TypeError("a field of a record")
        part, offset, *title = fields[name]
        if len(title) > 1 or not all(type(text) is str for text in title):
            raise TypeError("the title of a field")
        formats.append(part)
        offsets.append(*integers((offset,), "the offset of a field"))
        titles.append(title[0] if title else None)
    extent = _extent(formats, making)
    spec: dict[str, Any] = {
        "names": list(names),
        "formats": formats,
        "offsets": offsets,
        "itemsize": dtype.itemsize,
    }
    if any(title is not None for title in titles):
        spec["titles"] = titles
    flags = state[7] if len(state) > 7 else 0
    if type(flags) is int and flags & _ALIGNED:
        spec["aligned"] = True
    return np.dtype(spec), extent  # type: ignore[call-overload]


# -- arrays ----------------------------------------------------------------------------------------


def _reconstruct(args: tuple[Any, ...], making: Making) -> Any:
    """An empty array, which BUILD fills."""
    if len(args) != 3 or args[0] is not np.ndarray:
        raise TypeError("expected numpy.ndarray itself; subclasses are not made")
    shape = args[1]
    if type(shape) is not tuple or len(shape) > 1 or any(type(n) is not int or n for n in shape):
        raise ValueError("an array that waits for its state has shape (0,)")
    if not one_of(args[2], b"b", "b"):
        raise ValueError("an array that waits for its state is of type b")
    return making.begin(np.empty((0,), np.int8))


def _build_array(array: Any, state: Any, making: Making) -> None:
    if type(state) is not tuple or not 4 <= len(state) <= 5:
        raise ValueError("not the state of an array")
    if len(state) == 5 and not one_of(state[0], 0, 1):
        raise ValueError("a version of the state of arrays that is not known")
    shape, dtype, fortran, data = state[-4:]
    shape = _shape(shape)
    if type(fortran) not in (bool, int):
        raise TypeError("the order of an array is no bool")
    data = data.encode("latin-1") if type(data) is str else data
    count = _elements(shape, dtype, data, making, objects=True)
    if dtype.hasobject:
        if type(data) is not list or len(data) != count:
            raise ValueError(f"an array of objects of shape {shape} with other than {count} items")
    elif type(data) not in (bytes, bytearray):
        raise TypeError(f"the bytes of an array are a {type(data).__name__}")
    making.copies(state[-1], len(data) * (8 if dtype.hasobject else 1))
    making.finish(array)
    if dtype.hasobject:
        making.nest(array, data)
    array.__setstate__((1, shape, dtype, bool(fortran), data if dtype.hasobject else bytes(data)))


def _shape(value: Any) -> tuple[int, ...]:
    shape = integers(value, "the shape of an array")
    if len(shape) > _MAX_NDIM:
        raise ValueError(f"{len(shape)} dimensions, more than {_MAX_NDIM}")
    return shape


def _elements(
    shape: tuple[int, ...], dtype: Any, data: Any, making: Making, *, objects: bool = False
) -> int:
    """How many elements an array has, whose bytes and dtype are checked against each other."""
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"the dtype of an array is a {type(dtype).__name__}")
    if dtype.subdtype is not None:
        raise ValueError("an array of sub-arrays")
    # The array must not see its dtype change: one without its state is complete as it is.
    making.fresh.pop(id(dtype), None)
    count = 1
    for extent in shape:
        count *= extent
    if dtype.hasobject:
        if not objects or dtype.kind != "O":
            raise ValueError(f"references to Python objects in {dtype}")
        return count
    if count == 0:
        if dtype.itemsize > _MAX_EMPTY:
            raise ValueError(f"an element of {dtype.itemsize} bytes")
        if dtype.itemsize > _SMALL_EMPTY:
            making.grows(dtype.itemsize)
    if count * dtype.itemsize != len(data):
        raise ValueError(
            f"{dtype} of shape {shape} needs {count * dtype.itemsize} bytes, found {len(data)}"
        )
    if dtype.kind == "b" and data and max(data) > 1:
        raise ValueError("a byte of an array of bool is neither 0 nor 1")
    if count > 0 and dtype.itemsize == 0 and count.bit_length() > 40:
        raise ValueError(f"{count} elements of no bytes")
    return count


def _frombuffer(args: tuple[Any, ...], making: Making) -> Any:
    """What arrays are pickled as since protocol 5."""
    if len(args) != 4:
        raise TypeError(f"{len(args)} arguments, expected 4")
    data, dtype, shape, order = args
    if type(data) not in (bytes, bytearray):
        raise TypeError(f"the bytes of an array are a {type(data).__name__}")
    shape = _shape(shape)
    if not one_of(order, "C", "F"):
        raise ValueError("an order that is neither C nor F")
    count = _elements(shape, dtype, data, making)
    if count == 0 or dtype.itemsize == 0:
        return np.empty(shape, dtype, order)
    making.copies(data, len(data))
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)


def _scalar(args: tuple[Any, ...], making: Making) -> Any:
    if len(args) != 2:
        raise TypeError(f"{len(args)} arguments, expected 2")
    dtype, data = args
    data = data.encode("latin-1") if type(data) is str else data
    if type(data) is not bytes:
        raise TypeError(f"the bytes of a scalar are a {type(data).__name__}")
    if isinstance(dtype, np.dtype) and dtype.itemsize == 0:
        return dtype.type()
    _elements((), dtype, data, making)
    making.copies(data, len(data))
    return np.frombuffer(bytearray(data), dtype)[0]  # a record is a view, to which one may write
