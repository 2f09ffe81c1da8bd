"""Element types as the headers of NumPy's arrays name them, and what each is here.

What the table of :mod:`holdfast.dtypes` has is a row of it. What only NumPy has (dates, texts,
records) is a *kind* ``"numpy:dtype:…"``, as the adapter for NumPy describes such arrays: bytes, and
how to see them. What NumPy lacks (bfloat16) stands in a file as bytes of NumPy's type ``V``, and a
comment in the header says what they are.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import BY_NAME, DTYPES
from ..errors import FormatError

__all__ = ["KIND", "Element", "ObjectsError", "describe", "read_dtype", "read_plain"]

#: What a kind of the adapter for NumPy begins with, where it names the dtype.
KIND = "numpy:dtype:"
_ML = "ml_dtypes."

#: Bytes of the longest element that NumPy has.
_LONGEST = 2**31 - 1
_PLAIN = re.compile(
    r"(?P<order>[<>|=]?)(?:"
    r"(?P<number>b1|[iu][1248]|f[248]|c8|c16)|(?P<wide>f12|f16|c24|c32)"
    r"|(?P<text>[SUV])(?P<length>[0-9]{1,10})"
    r"|(?P<date>[mM]8(?:\[[0-9]{0,10}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?))"
)
_OBJECT = re.compile(r"[<>|=]?O[0-9]*")
_NATIVE, _OTHER = ("<", ">") if sys.byteorder == "little" else (">", "<")
_MAX_DEPTH = 16
_BYTES = BY_NAME["uint8"].code

#: Text of a number's dtype without its byte order, as NumPy has it -> code in the table.
_CODES = {np.dtype(row.name).str[1:]: row.code for row in DTYPES if row.numpy and not row.ml_dtypes}


@dataclass(frozen=True, slots=True)
class Element:
    """What an element of an array is.

    Attributes
    ----------
    code : int
        In the dtype table; that of uint8 where `kind` says more.
    itemsize : int
        In bytes.
    kind : str
        What the table lacks: ``"numpy:dtype:…"``; else empty.
    swapped : bool
        Whether it has the byte order that the machine does not have.
    """

    code: int
    itemsize: int
    kind: str = ""
    swapped: bool = False


class ObjectsError(FormatError):
    """Elements are Python objects: a sound file, of which this part cannot be read here."""


def read_dtype(descr: object, hint: str | None) -> Element:
    """The element type that a header says.

    Parameters
    ----------
    descr : object
        What it says under ``descr``.
    hint : str or None
        What :func:`describe` gave beside it.

    Raises
    ------
    ValueError
        It is none, or one that is not read.
    """
    if isinstance(descr, str):
        match = _PLAIN.fullmatch(descr)
        if match and match["number"]:
            if hint is not None:
                raise ValueError(f"{descr} cannot be {hint}")
            code = _CODES[match["number"]]
            row = DTYPES[code]
            return Element(code, row.itemsize, "", match["order"] == _OTHER and row.unit > 1)
        if hint is not None:
            return _hinted(match, descr, hint)
    elif hint is not None:
        raise ValueError(f"a record cannot be {hint}")
    spec, dtype = _spec(descr, 0)
    text = spec if isinstance(spec, str) else json.dumps(spec, separators=(",", ":"))
    return Element(_BYTES, dtype.itemsize, KIND + text)


@functools.lru_cache(maxsize=64)
def read_plain(descr: str) -> Element:
    """What :func:`read_dtype` says of a short text without a hint, found out once for each."""
    return read_dtype(descr, None)


def _hinted(match: re.Match[str] | None, descr: str, hint: str) -> Element:
    """What `hint` says of bytes."""
    size = int(match["length"]) if match and match["text"] == "V" else -1
    if hint.startswith(_ML) and size > 0 and re.fullmatch("[a-z0-9_]{1,40}", hint[len(_ML) :]):
        return Element(_BYTES, size, KIND + hint)
    row = BY_NAME.get(hint)
    if row is None or row.itemsize == 0 or row.itemsize != size:
        raise ValueError(f"{descr!r} cannot be {hint!r}")
    return Element(row.code, size)


def _spec(descr: object, depth: int) -> tuple[Any, np.dtype[Any]]:
    """A dtype that the table lacks, as JSON has it, and itself."""
    if depth > _MAX_DEPTH:
        raise ValueError("records nest too deep")
    if isinstance(descr, str):
        return _plain_spec(descr)
    if isinstance(descr, tuple) and len(descr) == 2 and depth:
        base, found = _spec(descr[0], depth + 1)
        extents = descr[1] if isinstance(descr[1], tuple) else (descr[1],)
        if not all(type(extent) is int for extent in extents):
            raise ValueError(f"a sub-array of shape {descr[1]!r}")
        return [base, list(extents)], _made((found, extents))
    if not isinstance(descr, list):
        raise ValueError(f"{descr!r} is no dtype")
    return _record(descr, depth)


def _plain_spec(descr: str) -> tuple[str, np.dtype[Any]]:
    if _OBJECT.fullmatch(descr):
        raise ObjectsError(
            f"{descr!r} is Python objects, kept as a pickle, which only numpy.load(…, "
            "allow_pickle=True) reads, and only of a file that you trust"
        )
    match = _PLAIN.fullmatch(descr)
    if match is None:
        raise ValueError(f"{descr!r} is no dtype that is known here")
    # Old releases of NumPy take a length modulo 2**32.
    if match["text"] and int(match["length"]) * (4 if match["text"] == "U" else 1) > _LONGEST:
        raise ValueError(f"{descr!r}: elements longer than {_LONGEST} bytes")
    found = _made(descr)
    return found.str, found


def _record(fields: list[Any], depth: int) -> tuple[dict[str, Any], np.dtype[Any]]:
    """A record, of which `fields` is what NumPy calls its descr."""
    spec: dict[str, Any] = {"names": [], "formats": [], "offsets": []}
    titles: list[Any] = []
    formats = []
    offset = 0
    for field in fields:
        if not isinstance(field, tuple) or not 2 <= len(field) <= 3:
            raise ValueError(f"{field!r} is no field of a record")
        title, name = field[0] if isinstance(field[0], tuple) and len(field[0]) == 2 else (
            None, field[0],
        )  # fmt: skip
        if not isinstance(name, str) or not isinstance(title, str | None):
            raise ValueError(f"{field[0]!r} is no name of a field")
        base, found = _spec(field[1] if len(field) == 2 else (field[1], field[2]), depth + 1)
        if name or found.type is not np.void or found.names is not None or len(field) == 3:
            spec["names"].append(name)
            spec["formats"].append(base)
            spec["offsets"].append(offset)
            formats.append(found)
            titles.append(title)
        offset += found.itemsize
    spec["itemsize"] = offset
    if any(title is not None for title in titles):
        spec["titles"] = titles
    return spec, _made({**spec, "formats": formats})


def _made(spec: Any) -> np.dtype[Any]:
    """The dtype of a spec whose parts have been looked at."""
    try:
        found: np.dtype[Any] = np.dtype(spec)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise ValueError(f"{str(spec)[:80]}: {error}") from None
    return found


# -- writing -------------------------------------------------------------------------------------


def describe(code: int, kind: str, last: int) -> tuple[Any, str]:
    """What a header has under ``descr``, and the hint beside it; or an empty one.

    Parameters
    ----------
    code : int
        Of the dtype table.
    kind : str
        As the collected tensors have it: of any framework; what is no dtype says nothing here.
    last : int
        The last extent, which are the bytes of an element where `kind` says a dtype; -1 for none.

    Raises
    ------
    ValueError
        A file of NumPy's cannot hold it.
    """
    if not kind.startswith(KIND):
        row = DTYPES[code]
        if row.numpy and not row.ml_dtypes:
            return np.dtype(row.name).str, ""
        if row.itemsize == 0:
            raise ValueError(f"{row.name}: NumPy has no elements of {row.bits} bits")
        return f"|V{row.itemsize}", row.name
    text = kind[len(KIND) :]
    itemsize = last
    if text.startswith(_ML) and last > 0:
        descr: Any = f"|V{last}"
    else:
        try:
            found = _from_json(json.loads(text) if text.startswith("{") else text, 0)
            descr, itemsize = np.lib.format.dtype_to_descr(found), found.itemsize
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"dtype {text[:80]}: {error}") from None
    if code != _BYTES or itemsize != last:
        raise ValueError(f"its bytes are not elements of {text[:80]}")
    return descr, text if text.startswith(_ML) else ""


def _from_json(spec: Any, depth: int) -> np.dtype[Any]:
    """The dtype that a kind says, which may come from a hostile file."""
    if depth > _MAX_DEPTH:
        raise ValueError("records nest too deep")
    if isinstance(spec, str):
        return _plain_spec(spec)[1]
    if isinstance(spec, list) and len(spec) == 2 and isinstance(spec[1], list):
        return _made((_from_json(spec[0], depth + 1), tuple(spec[1])))
    if not isinstance(spec, dict) or not isinstance(spec.get("formats"), list):
        raise ValueError("neither a name nor a record")
    formats = [_from_json(part, depth + 1) for part in spec["formats"]]
    return _made({**spec, "formats": formats})
