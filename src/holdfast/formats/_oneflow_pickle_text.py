"""An object that was found in a pickle, pickled anew: with a number for each of its tensors.

What :mod:`._torch_outline` makes of a pickle of OneFlow is a graph of containers, plain values and
records. From a part of it, the object that was saved, comes the pickle of that part alone, in which
tensors are persistent ids, so that whatever reads the pickles of tars reads it too.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FormatError
from ._inert import Global, Record, Storage, brief

__all__ = ["Writer"]

#: Texts of more characters, and integers of more bits, are written once.
_SHORT_TEXT = 5
_SHORT_BITS = 64

_PAIR = struct.Struct("<cI")


class _Code(bytes):
    """Opcodes, among the objects that are still to be written."""

    __slots__ = ()


class _Closing:
    """What is to be written when the parts of an immutable object have been.

    Attributes
    ----------
    obj : object
    code : bytes
        Opcodes that make it of its parts.
    drop : bytes
        Opcodes that drop them, where it has been made meanwhile: it is a part of itself.
    """

    __slots__ = ("code", "drop", "obj")

    def __init__(self, obj: object, code: bytes, drop: bytes) -> None:
        self.obj = obj
        self.code = code
        self.drop = drop


_SETITEMS, _APPENDS, _ADDITEMS, _BUILD = _Code(b"u"), _Code(b"e"), _Code(b"\x90"), _Code(b"b")
_MARK = _Code(b"(")


class Writer:
    """Writes the pickle of one object.

    Parameters
    ----------
    tensor : callable
        Whether a record is a tensor.
    inline : callable
        The opcodes of the bytes that a :class:`Storage` stands for.
    name : str
        Of the file, for messages.
    room : int
        How many members tuples may have in all: more than any pickle of so many bytes can ask for,
        but by tuples that are parts of themselves on very many ways.

    Attributes
    ----------
    tensors : list of Record
        Those that were met, in order; the number of each is its position.
    """

    __slots__ = (
        "_inline",
        "_memo",
        "_name",
        "_out",
        "_place",
        "_room",
        "_tensor",
        "_work",
        "tensors",
    )

    def __init__(
        self,
        tensor: Callable[[Record], bool],
        inline: Callable[[int], bytes],
        name: str,
        room: int,
    ) -> None:
        self.tensors: list[Record] = []
        self._tensor = tensor
        self._inline = inline
        self._name = name
        self._room = room
        self._out = bytearray(b"\x80\x04")
        self._memo: dict[int, bytes] = {}  # what gets an object again, by its id: all are alive
        self._work: list[Any] = []
        self._place = 0

    def write(self, root: object) -> bytes:
        """The pickle of `root`."""
        out, work, memo = self._out, self._work, self._memo
        work.append(root)
        while work:
            obj = work.pop()
            kind = type(obj)
            if kind is _Code:
                out += obj
            elif id(obj) in memo:
                out += memo[id(obj)]
            elif kind is str:
                self._text(obj)
            elif kind is _Closing:
                self._close(obj)
            else:
                _WRITERS.get(kind, Writer._unknown)(self, obj)
        out += b"."
        return bytes(out)

    def _remember(self, obj: object) -> None:
        """Put what stands on top of the stack, which is `obj`, into the memo."""
        self._out += b"\x94"
        self._memo[id(obj)] = _PAIR.pack(b"j", self._place)
        self._place += 1

    # -- plain values ----------------------------------------------------------------------------

    def _text(self, obj: str) -> None:
        data = obj.encode("utf-8", "surrogatepass")
        if len(data) < 256:
            self._out += b"\x8c%c" % len(data)
        else:
            self._out += _PAIR.pack(b"X", len(data))
        self._out += data
        if len(data) > _SHORT_TEXT:
            self._remember(obj)

    def _none(self, _: None) -> None:
        self._out += b"N"

    def _bool(self, obj: bool) -> None:
        self._out += b"\x88" if obj else b"\x89"

    def _int(self, obj: int) -> None:
        if 0 <= obj < 256:
            self._out += b"K%c" % obj
        elif -(1 << 31) <= obj < 1 << 31:
            self._out += b"J" + struct.pack("<i", obj)
        else:
            data = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            short = len(data) < 256
            self._out += b"\x8a%c" % len(data) if short else _PAIR.pack(b"\x8b", len(data))
            self._out += data
            if obj.bit_length() > _SHORT_BITS:
                self._remember(obj)

    def _float(self, obj: float) -> None:
        self._out += b"G" + struct.pack(">d", obj)

    def _bytes(self, obj: bytes) -> None:
        self._out += _PAIR.pack(b"B", len(obj)) + obj
        self._remember(obj)

    def _block(self, obj: Storage) -> None:
        self._out += self._inline(obj.row)
        self._remember(obj)

    # -- containers ------------------------------------------------------------------------------

    def _pairs(self, pairs: Any) -> None:
        """Set items of what stands on top of the stack."""
        work = self._work
        work.append(_SETITEMS)
        for key, value in reversed(pairs):
            work += (value, key)
        work.append(_MARK)

    def _dict(self, obj: dict[Any, Any]) -> None:
        self._out += b"}"
        self._remember(obj)
        if obj:
            self._pairs(obj.items())

    def _ordered(self, obj: OrderedDict[Any, Any]) -> None:
        self._out += b"ccollections\nOrderedDict\n)R"
        self._remember(obj)
        if vars(obj):
            self._work += (_BUILD, vars(obj))
        if obj:
            self._pairs(obj.items())

    def _list(self, obj: list[Any]) -> None:
        self._out += b"]"
        self._remember(obj)
        if obj:
            self._work.append(_APPENDS)
            self._work += reversed(obj)
            self._work.append(_MARK)

    def _set(self, obj: set[Any]) -> None:
        self._out += b"\x8f"
        self._remember(obj)
        if obj:
            self._work.append(_ADDITEMS)
            self._work += obj
            self._work.append(_MARK)

    def _take(self, members: int) -> None:
        self._room -= 1 + members
        if self._room < 0:
            raise FormatError(f"{self._name}: an object that is part of itself on too many ways")

    def _frozenset(self, obj: frozenset[Any]) -> None:
        self._take(len(obj))
        self._work += (_Closing(obj, b"\x91", b"1"), *obj, _MARK)

    def _tuple(self, obj: tuple[Any, ...]) -> None:
        self._take(len(obj))
        if not obj:
            self._out += b")"
        else:
            self._work += (_Closing(obj, b"t", b"1"), *reversed(obj), _MARK)

    def _close(self, closing: _Closing) -> None:
        obj = closing.obj
        again = self._memo.get(id(obj))
        if again is not None:
            self._out += closing.drop + again
            return
        self._out += closing.code
        self._remember(obj)
        if type(obj) is Record:
            self._fill(obj)

    # -- what stands for classes and their instances ---------------------------------------------

    def _global(self, obj: Global) -> None:
        self._text(obj.module)
        self._text(obj.name)
        self._out += b"\x93"
        self._remember(obj)

    def _record(self, obj: Record) -> None:
        if self._tensor(obj):
            number = len(self.tensors)
            self.tensors.append(obj)
            self._out += b"J" + struct.pack("<i", number) + b"Q"
            self._remember(obj)
            return
        if obj.called:
            self._work += (_Closing(obj, b"R", b"00"), obj.args, obj.cls)
        elif obj.kwargs:
            self._work += (_Closing(obj, b"\x92", b"000"), obj.kwargs, obj.args, obj.cls)
        else:
            self._work += (_Closing(obj, b"\x81", b"00"), obj.args, obj.cls)

    def _fill(self, obj: Record) -> None:
        """What an instance is told when it is made: items, and then its state."""
        if obj.state is not None:
            self._work += (_BUILD, obj.state)
        if obj.pairs:
            self._pairs(obj.pairs)
        if obj.items:
            self._work.append(_APPENDS)
            self._work += reversed(obj.items)
            self._work.append(_MARK)

    def _unknown(self, obj: object) -> None:
        raise FormatError(f"{self._name}: {brief(obj)} in the object, which OneFlow has no use for")


_WRITERS: Mapping[type, Callable[[Writer, Any], None]] = {
    type(None): Writer._none,
    bool: Writer._bool,
    int: Writer._int,
    float: Writer._float,
    bytes: Writer._bytes,
    Storage: Writer._block,
    dict: Writer._dict,
    OrderedDict: Writer._ordered,
    list: Writer._list,
    set: Writer._set,
    frozenset: Writer._frozenset,
    tuple: Writer._tuple,
    Global: Writer._global,
    Record: Writer._record,
}
