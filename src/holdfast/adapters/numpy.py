"""NumPy arrays, and the scalars and dtypes that are saved beside them.

Subclasses that only add manners (``memmap``, ``matrix``, ``recarray``) are held as plain arrays;
those that carry more than their elements are refused. Dtypes that the table lacks (dates, text,
records, long double) are stored as bytes, and the kind ``dtype:…`` says which.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from ..dtypes import BY_NUMPY, DTYPES, DType
from ..tree import Codec
from ..views import CONJUGATE, NEGATIVE, TensorBatch
from . import _numpy
from ._numpy_storages import NumpyStorages
from .base import dtypes_of, refusal

__all__ = ["ADAPTER", "NumpyAdapter", "decode_dtype", "encode_dtype"]

_BUILTIN = 24  # type numbers from here on are not NumPy's own (or are its StringDType)
_MAX_NDIM = 64
_LONGEST = 2**31 - 1  # bytes of an element
_MAX_DEPTH = 16  # of records in records

#: What ``dtype.str`` is for the types that are stored; nothing else is ever given to np.dtype.
_DTYPE = re.compile(
    r"[|<>](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SUV][0-9]{1,10}"
    r"|[mM]8(?:\[[0-9]{0,10}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)

#: Types of ml_dtypes that the table lacks; each element has a byte or more in memory.
_ML_DTYPES = frozenset(
    {
        *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
        *("int1", "int2", "int4", "uint1", "uint2", "uint4", "bcomplex32", "complex32"),
        *(row.numpy for row in DTYPES if row.numpy and row.ml_dtypes),
    }
)


def encode_dtype(dtype: np.dtype[Any]) -> Any:
    """A dtype as JSON: ``dtype.str``, or what ``np.dtype`` takes for records and sub-arrays.

    Raises
    ------
    TypeError
        For objects, variable-length strings, and types of packages other than ``ml_dtypes``.

    Examples
    --------
    >>> encode_dtype(np.dtype("datetime64[ns]"))
    '<M8[ns]'
    >>> encode_dtype(np.dtype([("a", "i1"), ("b", "f4", (2,))]))["formats"]
    ['|i1', ['<f4', [2]]]
    """
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype}: references to Python objects cannot be saved")
    if dtype.subdtype is not None:
        return [encode_dtype(dtype.base), list(dtype.shape)]
    if dtype.names is not None:
        fields: list[tuple[Any, ...]] = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]
        spec: dict[str, Any] = {
            "names": list(dtype.names),
            "formats": [encode_dtype(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "itemsize": dtype.itemsize,
        }
        if any(len(field) > 2 for field in fields):
            spec["titles"] = [field[2] if len(field) > 2 else None for field in fields]
        if dtype.isalignedstruct:
            spec["aligned"] = True
        return spec
    if 0 <= dtype.num < _BUILTIN and _DTYPE.fullmatch(dtype.str):
        return dtype.str
    if getattr(dtype.type, "__module__", None) == "ml_dtypes" and dtype.name in _ML_DTYPES:
        return f"ml_dtypes.{dtype.name}"
    raise TypeError(f"dtype {dtype}: not one that can be saved")


def decode_dtype(value: Any) -> np.dtype[Any]:
    """The dtype that :func:`encode_dtype` made `value` of, which may come from a hostile file.

    Raises
    ------
    ValueError
        Where `value` is nothing that `encode_dtype` returns.
    TypeError
        Where the dtype comes from ``ml_dtypes``, which is not installed (or is too old).
    """
    try:
        dtype = _decode_dtype(value, 0)
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"dtype {_short(value)}: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"dtype {_short(value)}: references to Python objects")
    return dtype


def _decode_dtype(value: Any, depth: int) -> np.dtype[Any]:
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(value, str):
        if value.startswith("ml_dtypes."):
            return _ml_dtype(value.removeprefix("ml_dtypes."))
        if not _DTYPE.fullmatch(value):
            raise ValueError("not the name of one")
        # Old releases of NumPy take a length modulo 2**32.
        if value[1] in "SUV" and int(value[2:]) * (4 if value[1] == "U" else 1) > _LONGEST:
            raise ValueError(f"elements longer than {_LONGEST} bytes")
        spec: Any = value
    elif isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        if not all(type(extent) is int and extent >= 0 for extent in value[1]):
            raise ValueError("the shape of a sub-array is not a list of integers")
        spec = (_decode_dtype(value[0], depth + 1), tuple(value[1]))
    elif isinstance(value, dict) and set(value) <= {
        "names", "formats", "offsets", "itemsize", "titles", "aligned"
    }:  # fmt: skip
        if not isinstance(value["formats"], list):
            raise ValueError("the formats of a record are not a list")
        spec = dict(value)
        spec["formats"] = [_decode_dtype(part, depth + 1) for part in value["formats"]]
    else:
        raise ValueError("neither a name nor a record")
    try:
        dtype: np.dtype[Any] = np.dtype(spec)
        return dtype
    except TypeError as error:
        raise ValueError(str(error)) from error


def _ml_dtype(name: str) -> np.dtype[Any]:
    if name not in _ML_DTYPES:
        raise ValueError("not a type of ml_dtypes")
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name}: NumPy has no such type by itself: pip install ml_dtypes"
        ) from None
    try:
        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype
    except AttributeError:
        raise TypeError(
            f"{name}: ml_dtypes {ml_dtypes.__version__} has no such type: "
            "pip install --upgrade ml_dtypes"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- scalars -------------------------------------------------------------------------------------


def _encode_scalar(obj: np.generic) -> list[Any]:
    # Text has its own ways: the dtype of an array element would drop NULs at its end.
    if isinstance(obj, np.str_):
        return [f"<U{len(obj)}", obj.encode("utf-32-le", "surrogatepass").hex()]
    if isinstance(obj, np.bytes_):
        return [f"|S{len(obj)}", bytes(obj).hex()]
    return [encode_dtype(obj.dtype), obj.tobytes().hex()]


def _decode_scalar(value: Any) -> Any:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
        raise ValueError("not a dtype and the bytes of one element")
    dtype = decode_dtype(value[0])
    if len(value[1]) != 2 * dtype.itemsize:
        raise ValueError(f"{len(value[1])} digits for the {dtype.itemsize} bytes of a {dtype}")
    raw = bytearray.fromhex(value[1])
    if len(raw) != dtype.itemsize:
        raise ValueError("white space among the digits")
    if dtype.kind == "U":
        return np.str_(raw.decode("utf-32-le", "surrogatepass"))
    if dtype.kind == "S":
        return np.bytes_(raw)
    if dtype.kind == "b" and raw[0] > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if dtype.subdtype is not None:
        raise ValueError("a scalar is not an array")
    return np.ndarray((), dtype, raw if raw else None)[()]


# -- the adapter ---------------------------------------------------------------------------------


class NumpyAdapter:
    """NumPy, as the rest of the library sees it (:class:`holdfast.adapters.base.Adapter`)."""

    name = "numpy"
    plain_types: frozenset[type] = frozenset({np.ndarray})
    codecs = (
        Codec(
            "numpy.scalar",
            (np.generic, *{np.dtype(letter).type for letter in "?bBhHiIlLqQefdgFDGSUVMm"}),
            _encode_scalar,
            _decode_scalar,
            subclasses=True,
        ),
        Codec("numpy.dtype", (np.dtype,), encode_dtype, decode_dtype, subclasses=True),
    )

    def __init__(self) -> None:
        self._user: dict[int, int] = {}  # code of the table for the type numbers of ml_dtypes

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is an array, of any type; 0-d ones too, scalars not."""
        return isinstance(obj, np.ndarray)

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of arrays; nothing is copied. See :meth:`Adapter.describe`."""

        def vet(array: Any, i: int) -> None:
            _vet(array, names[i])

        def name_kind(array: Any, i: int) -> str:
            return _kind(array, names[i])

        if not self._user and sys.modules.get("ml_dtypes") is not None:
            self._user = _user_codes()
        views, dims, strides, kinds = _numpy.describe(tensors, self._user, vet, name_kind)
        return TensorBatch(views, dims, tensors, strides), kinds

    def storages(self, *, legacy: bool = False) -> NumpyStorages:  # noqa: ARG002
        """A new collection of arrays, each a storage. See :meth:`Adapter.storages`."""
        return NumpyStorages(self)

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Arrays over the memory of a batch. See :meth:`Adapter.wrap`."""
        descrs: list[Any] = [None] * len(DTYPES)
        for row in dtypes_of(batch):
            descrs[row.code] = self.dtype_of(row)
        arrays = _numpy.wrap(batch.views, batch.dims, list(batch.owners), batch.owner, descrs)
        for i, kind in kinds.items():
            text = _dtype_text(kind)
            if text is not None:
                arrays[i] = _cast(arrays[i], text)
        return arrays

    def relocates(self, locations: Sequence[str], location: Any) -> bool:  # noqa: ARG002
        """False: arrays are in host memory, whatever device their bytes came from."""
        self.place(None, location)
        return False

    def dataless(self, location: Any) -> bool:  # noqa: ARG002
        """False: arrays have elements."""
        return False

    def wrap_storages(
        self,
        batch: TensorBatch,
        locations: Sequence[str],  # noqa: ARG002
        offsets: Sequence[int],  # noqa: ARG002
        location: Any,
    ) -> list[Any]:
        """Arrays of bytes. See :meth:`Adapter.wrap_storages`."""
        self.place(None, location)
        return self.wrap(batch, {})

    def handle_of(self, tensor: Any) -> Any:
        """The bytes of an array in C order."""
        return tensor.reshape(-1).view(np.uint8)

    def view(
        self,
        handle: Any,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        flags: int,
        kind: str,
    ) -> Any:
        """An array over a part of the bytes. See :meth:`Adapter.view`.

        One whose elements share memory among themselves (expanded) is read-only.
        """
        descr = self.dtype_of(dtype)
        text = _dtype_text(kind)
        if 0 in shape:
            empty = np.empty(shape, descr)
            return empty if text is None else _cast(empty, text)
        array: Any = np.ndarray(shape, descr, handle.data, offset, strides)
        if flags:
            array = _resolved(array, flags)
        spread = zip(strides or (), shape, strict=False)
        if any(s == 0 and n > 1 for s, n in spread):
            array.flags.writeable = False
        return array if text is None else _cast(array, text)

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """A flat array; of quantized elements, their bytes. See :meth:`Adapter.storage`."""
        found = handle if code < 0 else handle.view(self.dtype_of(DTYPES[code]))
        return found if part is None else found[part[0] : part[0] + part[1]]

    def dtype_of(self, row: DType) -> np.dtype[Any]:
        """The dtype of a row of the table.

        Raises
        ------
        TypeError
            NumPy has no such type, or has it of ``ml_dtypes``, which is not installed.
        """
        if row.numpy is None:
            raise TypeError(f"{row.name}: NumPy has no such type")
        return _ml_dtype(row.numpy) if row.ml_dtypes else np.dtype(row.name)

    def destination(self, location: Any) -> int:  # noqa: ARG002
        """0: arrays are in host memory."""
        return 0

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` itself: arrays are in host memory."""
        if location is None or str(location) == "cpu":
            return tensor
        raise ValueError(
            f"map_location={location!r}: NumPy arrays are in host memory; framework='torch' loads "
            "tensors that can be elsewhere"
        )

    def program(self, obj: object) -> str | None:  # noqa: ARG002
        """None: NumPy has no programs."""
        return None

    def named_tensors(self, obj: object) -> dict[str, Any] | None:  # noqa: ARG002
        """None: NumPy has no modules."""
        return None

    def own_loader(self, obj: object, stored: Container[str]) -> None:
        """None: there are no modules."""

    def writable(self, tensor: Any) -> bool:
        """Whether the array allows it."""
        return bool(tensor.flags.writeable)

    def mismatch(self, tensor: Any, name: str) -> str | None:  # noqa: ARG002
        """None: the tensors of a file are such as these."""
        return None

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """A shape as NumPy prints it."""
        return str(shape)

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy with the dtype converted as ``astype`` does."""
        np.copyto(tensor, source, casting="unsafe")

    def changing(self, tensors: Sequence[Any]) -> None:
        """Nothing: arrays do not count their changes."""


def _user_codes() -> dict[int, int]:
    import ml_dtypes

    return {
        np.dtype(getattr(ml_dtypes, name)).num: row.code
        for name, row in BY_NUMPY.items()
        if row.ml_dtypes and hasattr(ml_dtypes, name)
    }


def _vet(array: Any, name: str) -> None:
    """Raise TypeError unless an array that is not exactly an ndarray is held as one."""
    kind = type(array)
    if kind is np.memmap or kind is np.recarray or kind is np.matrix:
        return
    if not isinstance(array, np.ndarray):
        raise refusal(name, f"a {kind.__name__} is not a NumPy array")
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(array, masked.MaskedArray):
        raise refusal(name, "a masked array; save its .data and its .mask")
    raise refusal(
        name,
        f"a {kind.__module__}.{kind.__qualname__} may carry more than its elements; save "
        "numpy.asarray(x)",
    )


def _kind(array: Any, name: str) -> str:
    """The kind of an array whose dtype the table lacks."""
    dtype = array.dtype
    if dtype.kind == "T":
        raise refusal(name, "strings of variable length have no fixed bytes; save x.astype('U')")
    if dtype.hasobject:
        raise refusal(
            name, "an object array holds references, not values; save x.tolist(), or a real dtype"
        )
    if array.ndim >= _MAX_NDIM:
        raise refusal(name, f"{array.ndim} dimensions of {dtype}, more than {_MAX_NDIM - 1}")
    try:
        spec = encode_dtype(dtype)
    except TypeError as error:
        raise refusal(name, str(error)) from None
    text = spec if isinstance(spec, str) else json.dumps(spec, separators=(",", ":"))
    return f"dtype:{text}"


def _dtype_text(kind: str) -> str | None:
    """What a kind says after ``dtype:``, behind the framework's name or not."""
    what, _, text = kind.removeprefix("numpy:").partition(":")
    return text if what == "dtype" else None


def _cast(array: Any, text: str) -> Any:
    """An array of bytes as what the kind ``dtype:text`` says it is."""
    try:
        dtype = decode_dtype(text if not text.startswith("{") else json.loads(text))
    except RecursionError:
        raise ValueError(f"dtype {_short(text)}: too deep") from None
    if array.dtype != np.uint8 or array.ndim == 0 or array.shape[-1] != dtype.itemsize:
        raise ValueError(
            f"an array of {dtype} cannot be stored as {array.dtype} {list(array.shape)}"
        )
    if dtype.subdtype is not None:
        raise ValueError("an array of sub-arrays is no array of its own")
    shape = array.shape[:-1]
    if array.size == 0:
        return np.zeros(shape, dtype)  # elements of no bytes can become those of one
    return array.view(dtype).reshape(shape)


ADAPTER = NumpyAdapter()


def _resolved(array: Any, flags: int) -> Any:
    """A copy whose elements are conjugated or negated, as the flags say.

    Where a shape shows one place many times, so does that of the copy: a few bytes of a file may
    say of one element that there are 2**40.
    """
    steps = zip(array.shape, array.strides, strict=True)
    reach = sum((n - 1) * step for n, step in steps) // array.itemsize + 1
    own = array
    if reach < array.size:
        own = np.lib.stride_tricks.as_strided(array, (reach,), (array.itemsize,))
    if flags & CONJUGATE:
        own = np.conj(own)
    if flags & NEGATIVE:
        own = np.negative(own)
    if reach < array.size:
        return np.lib.stride_tricks.as_strided(own, array.shape, array.strides)
    return np.asarray(own)
