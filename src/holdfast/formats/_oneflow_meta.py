"""The small texts that say what a variable of OneFlow is: ``meta``, and the types that it names.

It is the text form of a protocol buffer, written in one way by OneFlow and read here in all ways
that this form allows: a message ``shape`` of numbers ``dim``, and ``data_type``.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..dtypes import BY_NAME, DType
from ..errors import FormatError
from ..layout import Folder

__all__ = [
    "BY_NUMBER",
    "BY_TEXT",
    "DATA_TYPES",
    "MAX_NDIM",
    "MOST",
    "NUMBERS",
    "DataType",
    "meta_text",
    "parse",
    "parse_all",
    "read_all",
]

#: A `meta` of more bytes than this is refused.
MOST = 1 << 20
#: Together those of a folder may have so many bytes for each, and so many besides: what OneFlow
#: writes is at most 2 KiB, and all of them are in memory at once.
_EACH, _BESIDES = 4 << 10, 16 << 20
#: More dimensions than this no framework has.
MAX_NDIM = 64
#: How deep messages that are not known may nest.
_MAX_LEVELS = 32
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class DataType:
    """One element type as OneFlow calls it.

    Attributes
    ----------
    number : int
        What pickles and old texts say.
    name : str
        What a ``meta`` says.
    dtype : DType or None
        The row of the dtype table; None for what no tensor has.
    loadable : bool
        Whether OneFlow itself reads tensors of it.
    """

    number: int
    name: str
    dtype: DType | None
    loadable: bool


def _row(number: int, name: str, dtype: str | None, loadable: bool) -> DataType:
    return DataType(number, name, None if dtype is None else BY_NAME[dtype], loadable)


#: All that OneFlow has a number for, by that number.
DATA_TYPES: tuple[DataType, ...] = (
    _row(0, "kInvalidDataType", None, False),
    _row(1, "kChar", "int8", True),
    _row(2, "kFloat", "float32", True),
    _row(3, "kDouble", "float64", True),
    _row(4, "kInt8", "int8", True),
    _row(5, "kInt32", "int32", True),
    _row(6, "kInt64", "int64", True),
    _row(7, "kUInt8", "uint8", True),
    _row(8, "kOFRecord", None, False),
    _row(9, "kFloat16", "float16", True),
    _row(10, "kTensorBuffer", None, False),
    _row(11, "kBFloat16", "bfloat16", False),
    _row(12, "kBool", "bool", True),
    _row(13, "kUInt16", "uint16", False),
    _row(14, "kUInt32", "uint32", False),
    _row(15, "kUInt64", "uint64", False),
    _row(16, "kUInt128", None, False),
    _row(17, "kInt16", "int16", True),
    _row(18, "kInt128", None, False),
    _row(19, "kComplex32", "complex32", False),
    _row(20, "kComplex64", "complex64", True),
    _row(21, "kComplex128", "complex128", True),
)
BY_NUMBER: dict[int, DataType] = {row.number: row for row in DATA_TYPES}
BY_TEXT: dict[str, DataType] = {row.name: row for row in DATA_TYPES}
#: Code of a dtype -> the number by which OneFlow writes it: of two for one, the newer one.
NUMBERS: dict[int, int] = {row.dtype.code: row.number for row in DATA_TYPES if row.dtype}

#: A text as OneFlow writes it.
_USUAL = re.compile(
    rb"shape \{\n((?:  dim: [0-9]{1,18}\n){0,%d})\}\ndata_type: (k[0-9A-Za-z]+)\n" % MAX_NDIM
)
_SPACE = re.compile(r"[ \t\r\n\v\f]*")
_TOKEN = re.compile(
    r"(?:(?P<name>[A-Za-z_][0-9A-Za-z_]*)"
    r"|(?P<number>[+-]?\.?[0-9][0-9A-Za-z_.+-]*)"
    r"|(?P<text>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')"
    r"|(?P<sign>[-:{}<>\[\],;/.])"
    r"|(?P<end>\Z))"
)
_INTEGER = re.compile(r"0[xX][0-9A-Fa-f]+|0[0-7]*|[1-9][0-9]*")


def meta_text(shape: Sequence[int], code: int) -> bytes:
    r"""The text for a tensor, byte for byte as OneFlow writes it.

    Parameters
    ----------
    shape : sequence of int
    code : int
        Of its dtype, one of :data:`NUMBERS`.

    Examples
    --------
    >>> meta_text((64, 3), BY_NAME["float32"].code)
    b'shape {\n  dim: 64\n  dim: 3\n}\ndata_type: kFloat\n'
    """
    dims = "".join([f"  dim: {extent}\n" for extent in shape])
    return f"shape {{\n{dims}}}\ndata_type: {BY_NUMBER[NUMBERS[code]].name}\n".encode()


def parse(data: bytes, where: object) -> tuple[DType, tuple[int, ...]]:
    """Element type and shape that a text says.

    Parameters
    ----------
    data : bytes
    where : object
        File and tensor: what it is as text stands in messages.

    Raises
    ------
    FormatError
        It is malformed, lacks one of them, has one of them twice, or says what no tensor has.

    Examples
    --------
    >>> dtype, shape = parse(b"data_type: 2, shape < dim: [0x40, 3] >", "w")
    >>> dtype.name, shape
    ('float32', (64, 3))
    """
    usual = _USUAL.fullmatch(data)
    if usual is not None:
        dims = tuple(map(int, re.findall(rb"[0-9]+", usual[1])))
        # A leading zero is octal here, which only the careful reader knows.
        if b": 0" not in usual[1] or all(len(text) == 1 for text in _zeros(usual[1])):
            return _known(usual[2].decode(), where), dims
    if len(data) > MOST:
        raise FormatError(f"{where}: expected at most {MOST} bytes of 'meta', found {len(data)}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: 'meta' is not UTF-8: found the byte {data[error.start]:#04x} at offset "
            f"{error.start}"
        ) from None
    return _Reader(text, where).read()


def read_all(folder: Folder, paths: Sequence[str]) -> list[bytes | None]:
    """The texts in these files of a folder; None for those that do not exist.

    Raises
    ------
    FormatError
        One of them is too large, or all of them together are.
    """
    # What OneFlow writes is read at once; asking for sizes would be a second look at every file.
    with contextlib.suppress(FormatError):
        return folder.read(paths, most=_EACH)
    # One that is too large by itself is left to be told of by its name.
    total = sum([size for size in folder.sizes(paths).tolist() if 0 < size <= MOST])
    most = len(paths) * _EACH + _BESIDES
    if total > most:
        raise FormatError(
            f"{folder.name}: expected at most {most} bytes in the 'meta' of {len(paths)} tensors, "
            f"found {total}"
        )
    return folder.read(paths, most=MOST)


def parse_all(
    texts: Sequence[bytes], where: Sequence[object]
) -> list[tuple[DType, tuple[int, ...]]]:
    """What :func:`parse` says of each of many texts, of which most are like another.

    Parameters
    ----------
    texts : sequence of bytes
    where : sequence of object
        File and tensor of each: what it is as text stands in messages.
    """
    known: dict[bytes, tuple[DType, tuple[int, ...]]] = {}
    found = []
    for i, text in enumerate(texts):
        said = known.get(text)
        if said is None:
            said = known[text] = parse(text, where[i])
        found.append(said)
    return found


def _zeros(dims: bytes) -> list[bytes]:
    return re.findall(rb": (0[0-9]*)", dims)


def _known(name: str, where: object) -> DType:
    """The dtype called `name`."""
    row = BY_TEXT.get(name)
    if row is None:
        raise FormatError(f"{where}: 'meta' names the data type {reprlib.repr(name)}, not known")
    return _dtype(row, where)


def _dtype(row: DataType, where: object) -> DType:
    if row.dtype is None:
        raise FormatError(f"{where}: 'meta' has the data type {row.name}, which no tensor can have")
    return row.dtype


class _Reader:
    """Reads one text, token by token."""

    __slots__ = ("_at", "_before", "_kind", "_next", "_text", "_where", "_word")

    def __init__(self, text: str, where: object) -> None:
        self._text = text
        self._where = where
        self._next = self._at = 0
        self._advance()

    def read(self) -> tuple[DType, tuple[int, ...]]:
        """Element type and shape."""
        shape: tuple[int, ...] | None = None
        dtype: DType | None = None
        while self._kind != "end":
            field = self._name()
            if field == "shape":
                if shape is not None:
                    raise self._fault("a second 'shape'", before=True)
                shape = self._shape()
            elif field == "data_type":
                if dtype is not None:
                    raise self._fault("a second 'data_type'", before=True)
                self._expect(":")
                dtype = self._data_type()
            else:
                self._skip(field)
            self._separator()
        for field, found in (("shape", shape), ("data_type", dtype)):
            if found is None:
                raise FormatError(f"{self._where}: expected {field!r} in 'meta', found none")
        assert shape is not None
        assert dtype is not None
        return dtype, shape

    # -- fields ----------------------------------------------------------------------------------

    def _shape(self) -> tuple[int, ...]:
        close = self._open()
        dims: list[int] = []
        while not self._take(close):
            field = self._name()
            if field != "dim":
                self._skip(field)
            else:
                self._expect(":")
                if self._take("["):
                    while not self._take("]"):
                        dims.append(self._extent(dims))
                        if not self._take(",") and self._word != "]":
                            raise self._fault("expected ',' or ']'")
                else:
                    dims.append(self._extent(dims))
            self._separator()
        return tuple(dims)

    def _extent(self, before: list[int]) -> int:
        if len(before) == MAX_NDIM:
            raise self._fault(f"more than {MAX_NDIM} dimensions")
        value = self._integer()
        if not 0 <= value < _INT64:
            raise self._fault(f"an extent of {value}, expected 0 to 2**63 - 1", before=True)
        return value

    def _data_type(self) -> DType:
        if self._kind == "name":
            dtype = _known(self._word, self._where)
            self._advance()
            return dtype
        number = self._integer()
        if number not in BY_NUMBER:
            raise FormatError(f"{self._where}: 'meta' has a data type of a number not known")
        return _dtype(BY_NUMBER[number], self._where)

    def _skip(self, field: str) -> None:
        """Pass over a message that is not known, as newer writers may have; nothing else is."""
        if self._word not in ("{", "<", ":"):
            raise self._fault(f"expected a value for {reprlib.repr(field)}")
        self._take(":")
        if self._word not in ("{", "<"):
            raise self._fault(f"the field {reprlib.repr(field)} is not known", before=True)
        closing = [self._open()]
        while closing:
            if self._kind == "end":
                raise self._fault("the text has no end")
            if self._word in ("{", "<") and self._kind == "sign":
                if len(closing) == _MAX_LEVELS:
                    raise self._fault(f"messages in more than {_MAX_LEVELS} levels")
                closing.append(self._open())
            elif self._kind == "sign" and self._word in ("}", ">"):
                self._expect(closing.pop())
            else:
                self._advance()

    # -- tokens ----------------------------------------------------------------------------------

    def _advance(self) -> None:
        self._before = self._at
        self._at = self._start(self._next)
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            rest = self._text[self._at : self._at + 20]
            raise self._fault(f"expected a name, a number or a sign, found {rest!r}")
        self._kind = str(found.lastgroup)
        self._word = found[self._kind]
        self._next = found.end()

    def _start(self, at: int) -> int:
        """Where the next token begins: behind white space and comments."""
        while True:
            at = _SPACE.match(self._text, at).end()  # type: ignore[union-attr]
            if not self._text.startswith("#", at):
                return at
            end = self._text.find("\n", at)
            at = len(self._text) if end < 0 else end

    def _take(self, sign: str) -> bool:
        if self._kind == "sign" and self._word == sign:
            self._advance()
            return True
        return False

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            raise self._fault(f"expected {sign!r}, found {reprlib.repr(self._word)}")

    def _open(self) -> str:
        """Begin a message; returns the sign that ends it."""
        self._take(":")
        if self._take("{"):
            return "}"
        self._expect("<")
        return ">"

    def _separator(self) -> None:
        if not self._take(","):
            self._take(";")

    def _name(self) -> str:
        if self._kind != "name":
            raise self._fault(f"expected the name of a field, found {reprlib.repr(self._word)}")
        word = self._word
        self._advance()
        return word

    def _integer(self) -> int:
        negative = self._take("-")
        word = self._word
        if self._kind == "number" and word.startswith("-") and not negative:
            negative, word = True, word[1:]
        if self._kind != "number" or not _INTEGER.fullmatch(word) or len(word) > 64:
            raise self._fault(f"expected an integer, found {reprlib.repr(self._word)}")
        self._advance()
        octal = len(word) > 1 and word[0] == "0" and word[1] not in "xX"
        value = int(word, 8) if octal else int(word, 0)
        return -value if negative else value

    def _fault(self, text: str, before: bool = False) -> FormatError:
        """The error at the token that is next, or the one before it."""
        at = self._before if before else self._at
        return FormatError(f"{self._where}: 'meta' at offset {at}: {text}")
