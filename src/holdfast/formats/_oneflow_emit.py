"""Objects pickled around their tensors as ``oneflow.save`` does it, without needing OneFlow.

Python's pickle protocol 4, in which a tensor is an instance of ``oneflow.Tensor`` or
``oneflow.nn.Parameter`` and its state. What the state is depends on the layout, so it is left out
here: the emitter notes where it goes, and :mod:`._oneflow_write` fills it in. Everything else is
pickled as Python's own pickler pickles it, so that the object loads wherever its classes are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any

from ._pickle_reduce import MixedError, batches, reduce_object

__all__ = ["CONSTANTS", "INLINE_CONSTANTS", "Emitted", "Emitter", "get", "integer", "text"]

#: Opcodes, as Python's module ``pickletools`` calls them.
PROTO, STOP, MARK, POP, POP_MARK = b"\x80\x04", b".", b"(", b"0", b"1"
NONE, TRUE, FALSE, TUPLE, REDUCE, BUILD = b"N", b"\x88", b"\x89", b"t", b"R", b"b"
MEMOIZE, STACK_GLOBAL, NEWOBJ = b"\x94", b"\x93", b"\x81"
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")

#: What the states of tensors refer to, in the order of their numbers: texts, and globals as pairs.
#: They are pushed, numbered and dropped before the first tensor.
CONSTANTS: tuple[str | tuple[str, str], ...] = (
    ("oneflow", "Tensor"),
    ("oneflow.nn", "Parameter"),
    "path",
)
#: The same for tensors whose elements stand in the pickle, as NumPy's arrays. The old name of
#: NumPy's module is the one that all versions have.
INLINE_CONSTANTS: tuple[str | tuple[str, str], ...] = (
    *CONSTANTS[:2],
    ("oneflow._oneflow_internal", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *("data", "dtype", "device", "cpu"),
)

#: NumPy's modules since version 2, which older ones lack, and what they were called before.
_RENAMED = ("numpy._core", "numpy.core")


def text(value: str) -> bytes:
    """A str, without a number."""
    data = value.encode("utf-8", "surrogatepass")
    if len(data) < 1 << 8:
        return b"\x8c" + bytes((len(data),)) + data
    if len(data) < 1 << 32:
        return b"X" + struct.pack("<I", len(data)) + data
    return b"\x8d" + struct.pack("<Q", len(data)) + data


def raw(value: bytes) -> bytes:
    """Bytes, without a number."""
    if len(value) < 1 << 8:
        return b"C" + bytes((len(value),)) + value
    if len(value) < 1 << 32:
        return b"B" + struct.pack("<I", len(value)) + value
    return b"\x8e" + struct.pack("<Q", len(value)) + value


def integer(value: int) -> bytes:
    """An int of any size."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes((value,))
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
    if value < 0 and data[-1] == 0xFF and data[-2] & 0x80:
        data = data[:-1]
    if len(data) < 1 << 8:
        return b"\x8a" + bytes((len(data),)) + data
    return b"\x8b" + struct.pack("<i", len(data)) + data


def get(number: int) -> bytes:
    """The object that has this number."""
    return b"h" + bytes((number,)) if number < 1 << 8 else b"j" + struct.pack("<I", number)


@dataclass(frozen=True, slots=True)
class Emitted:
    """A pickle without the states of its tensors.

    Attributes
    ----------
    data : bytes
    places : list of int
        Where in `data` each tensor goes, ascending: nothing of it is there but its number, which is
        the last thing that is done for it.
    tensors : list
        Each once.
    names : list of str
        Their paths in the object, for messages.
    base : int
        Number of the first of `constants`.
    constants : sequence
        Those that were asked for.
    """

    data: bytes
    places: list[int]
    tensors: list[Any]
    names: list[str]
    base: int
    constants: tuple[str | tuple[str, str], ...]

    def constant(self, value: str | tuple[str, str]) -> bytes:
        """One of `constants`."""
        return get(self.base + self.constants.index(value))


class Emitter:
    """One run of the pickler.

    Parameters
    ----------
    is_tensor : callable
        Whether an object is a tensor of a framework.
    arrays : frozenset of type
        Exact types of arrays that are tensors too; but only where there is no other tensor, and
        where no class's own way of being pickled holds them.
    constants : tuple
        :data:`CONSTANTS` or :data:`INLINE_CONSTANTS`.

    Attributes
    ----------
    steps : list
        Keys and indices to where the emitter is, or where it stopped.
    """

    def __init__(
        self,
        is_tensor: Callable[[object], bool],
        arrays: frozenset[type],
        constants: tuple[str | tuple[str, str], ...],
    ) -> None:
        self.steps: list[Any] = []
        self._is_tensor = is_tensor
        self._arrays = arrays
        self._constants = constants
        self._out = bytearray(PROTO)
        self._memo: dict[int, tuple[int, object]] = {}  # by id; the object is kept alive
        self._texts: dict[str, int] = {}
        self._globals: dict[bytes, int] = {}
        self._count = 0
        self._base = -1
        self._places: list[int] = []
        self._tensors: list[Any] = []
        self._names: list[str] = []
        self._kinds: dict[type, bool] = {}
        self._seen_array: bool | None = None
        self._foreign = 0  # how many reductions' own arguments and states surround the object
        self._ways: dict[type, Callable[[Any], None]] = {
            dict: self._dict,
            list: self._list,
            tuple: self._tuple,
            bytes: self._bytes,
        }

    def dump(self, obj: object) -> Emitted:
        """The pickle of `obj`.

        Raises
        ------
        MixedError
            There are arrays that were taken for tensors, and other tensors.
        pickle.PicklingError, TypeError, AttributeError
            Something cannot be pickled; `steps` say where it is.
        """
        self._save(obj)
        self._out += STOP
        return Emitted(
            bytes(self._out),
            self._places,
            self._tensors,
            self._names,
            max(self._base, 0),
            self._constants if self._tensors else (),
        )

    # -- the memo --------------------------------------------------------------------------------

    def _remember(self, obj: object) -> None:
        self._memo[id(obj)] = (self._count, obj)
        self._number()

    def _number(self) -> int:
        self._out += MEMOIZE
        self._count += 1
        return self._count - 1

    def _recall(self, obj: object) -> bool:
        """Write what stands for an object that was written before, if it was."""
        found = self._memo.get(id(obj))
        if found is None:
            return False
        self._out += get(found[0])
        return True

    # -- atoms -----------------------------------------------------------------------------------

    def _atom(self, obj: Any) -> bool:
        """Write one of the values that most leaves are."""
        kind = type(obj)
        if kind is str:
            self._text(obj)
        elif kind is int:
            self._out += integer(obj)
        elif kind is float:
            self._out += b"G" + struct.pack(">d", obj)
        elif obj is None:
            self._out += NONE
        elif kind is bool:
            self._out += TRUE if obj else FALSE
        else:
            return False
        return True

    def _text(self, value: str) -> None:
        number = self._texts.get(value)
        if number is not None:
            self._out += get(number)
            return
        self._out += text(value)
        self._texts[value] = self._number()

    def _bytes(self, value: bytes) -> None:
        self._out += raw(value)
        self._remember(value)

    def _global(self, name: bytes) -> int:
        """A global by its text, module and name each with a newline behind; its number."""
        number = self._globals.get(name)
        if number is not None:
            self._out += get(number)
            return number
        module, path = name.decode("utf-8", "surrogatepass").split("\n")[:2]
        if module == _RENAMED[0] or module.startswith(_RENAMED[0] + "."):
            module = _RENAMED[1] + module[len(_RENAMED[0]) :]
        self._text(module)
        self._text(path)
        self._out += STACK_GLOBAL
        self._globals[name] = self._number()
        return self._globals[name]

    # -- tensors ---------------------------------------------------------------------------------

    def _tensor(self, obj: Any, array: bool) -> None:
        """Note where a tensor goes, and give it its number."""
        if self._seen_array not in (None, array):
            raise MixedError
        self._seen_array = array
        if self._base < 0:
            self._base = self._count
            for constant in self._constants:
                if isinstance(constant, str):
                    self._out += text(constant)
                else:
                    self._out += text(constant[0]) + text(constant[1]) + STACK_GLOBAL
                self._number()
                self._out += POP
        self._places.append(len(self._out))
        self._tensors.append(obj)
        self._names.append(".".join([str(step) for step in self.steps]) or "tensor")
        self._memo[id(obj)] = (self._count, obj)
        self._count += 1  # MEMOIZE is written with the tensor

    def _holds(self, kind: type, obj: object) -> bool:
        """Whether objects of this type are tensors of a framework."""
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._is_tensor(obj)
        return known

    # -- objects ---------------------------------------------------------------------------------

    def _save(self, obj: Any) -> None:
        if self._atom(obj) or self._recall(obj):
            return
        kind = type(obj)
        way = self._ways.get(kind)
        if way is not None:
            way(obj)
        elif kind in self._arrays:
            # Beside tensors, or as a part of another object, it is an array and nothing else.
            if self._foreign or self._seen_array is False:
                self._other(obj)
            else:
                self._tensor(obj, True)
        elif self._holds(kind, obj):
            self._tensor(obj, False)
        else:
            self._other(obj)

    def _dict(self, obj: dict[Any, Any]) -> None:
        self._out += b"}"
        self._remember(obj)
        self._pairs(obj.items())

    def _pairs(self, pairs: Iterable[Any]) -> None:
        """Items of a dict, or those that a reduction gives for one of its own kind."""
        self.steps.append(None)
        for batch in batches(pairs):
            if len(batch) > 1:
                self._out += MARK
            for pair in batch:
                if type(pair) is not tuple or len(pair) != 2:
                    raise PicklingError("dict items iterator must return 2-tuples")
                self.steps[-1] = pair[0]
                self._save(pair[0])
                self._save(pair[1])
            self._out += b"u" if len(batch) > 1 else b"s"
        self.steps.pop()

    def _list(self, obj: list[Any]) -> None:
        self._out += b"]"
        self._remember(obj)
        self._items(obj)

    def _items(self, items: Iterable[Any]) -> None:
        """Items of a list, or those that a reduction gives for one of its own kind."""
        self.steps.append(None)
        i = 0
        for batch in batches(items):
            if len(batch) > 1:
                self._out += MARK
            for item in batch:
                self.steps[-1] = i
                i += 1
                self._save(item)
            self._out += b"e" if len(batch) > 1 else b"a"
        self.steps.pop()

    def _tuple(self, obj: tuple[Any, ...]) -> None:
        n = len(obj)
        if n == 0:
            self._out += _TUPLES[0]
            return
        if n > 3:
            self._out += MARK
        self.steps.append(None)
        for i, item in enumerate(obj):
            self.steps[-1] = i
            self._save(item)
        self.steps.pop()
        if id(obj) in self._memo:  # it contains itself, and what it contains has written it
            self._out += POP_MARK if n > 3 else POP * n
            self._recall(obj)
            return
        self._out += TUPLE if n > 3 else _TUPLES[n]
        self._remember(obj)

    def _other(self, obj: Any) -> None:
        """An object of a type that no opcode is for."""
        found = reduce_object(obj, 4)
        if isinstance(found, tuple):
            self._reduce(obj, found)
        else:
            self._memo[id(obj)] = (self._global(found), obj)

    def _reduce(self, obj: Any, reduction: tuple[Any, ...]) -> None:
        """The call that makes `obj`, and what is then done to it."""
        new, func, args, state, items, pairs, setter = reduction
        self._foreign += 1
        self._save(func)
        self._save(args)
        self._foreign -= 1
        self._out += NEWOBJ if new else REDUCE
        if id(obj) in self._memo:  # its own arguments contain it
            self._out += POP
            self._recall(obj)
        else:
            self._remember(obj)
        if items is not None:
            self._items(items)
        if pairs is not None:
            self._pairs(pairs)
        if state is None:
            return
        self._foreign += 1
        if setter is None:
            self._save(state)
            self._out += BUILD
        else:
            self._save(setter)
            self._save(obj)
            self._save(state)
            self._out += _TUPLES[2] + REDUCE + POP
        self._foreign -= 1
