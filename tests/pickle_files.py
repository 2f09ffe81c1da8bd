"""Pickles as torch.save writes them, put together opcode by opcode."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from holdfast.formats._torch_pickle import Pickled, read_object

PROTO = b"\x80\x02"
STOP = b"."
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"


def name(module: str, text: str) -> bytes:
    """A global."""
    return f"c{module}\n{text}\n".encode()


def text(value: str) -> bytes:
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """An integer, as pickle writes it."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def items(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of integers."""
    return items(*[number(value) for value in values])


def pairs(mapping: dict[str, bytes]) -> bytes:
    """A dict of str."""
    return b"}(" + b"".join(text(key) + value for key, value in mapping.items()) + b"u"


def call(module: str, function: str, *args: bytes) -> bytes:
    """The result of a call."""
    return name(module, function) + items(*args) + b"R"


ORDERED = name("collections", "OrderedDict") + b")R"


def storage(kind: str, key: str, numel: int, location: str = "cpu", module: str = "torch") -> bytes:
    """What a persistent id names."""
    parts = text("storage"), name(module, kind), text(key), text(location), number(numel)
    return items(*parts) + b"Q"


def tensor(
    place: bytes,
    offset: int,
    size: Iterable[int],
    stride: Iterable[int],
    *more: bytes,
    gradient: bytes = FALSE,
    hooks: bytes = ORDERED,
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    """A tensor in a storage."""
    parts = [place, number(offset), numbers(size), numbers(stride)]
    if function != "_rebuild_tensor":
        parts += [gradient, hooks]
    return call("torch._utils", function, *parts, *more)


def whole(body: bytes) -> bytes:
    """A pickle."""
    return PROTO + body + STOP


def parameter(inner: bytes, wanted: bytes = TRUE, hooks: bytes = ORDERED) -> bytes:
    return call("torch._utils", "_rebuild_parameter", inner, wanted, hooks)


def read(body: bytes, **more: Any) -> Pickled:
    return read_object(whole(body), name="m.pt", where="data.pkl", **more)


def simple(key: str = "0", size: tuple[int, ...] = (2, 3), **more: Any) -> bytes:
    """A dense tensor that is alone in its storage."""
    count = int(np.prod(size, dtype=object))
    stride = [int(np.prod(size[i + 1 :], dtype=object)) for i in range(len(size))]
    return tensor(storage("FloatStorage", key, count), 0, size, stride, **more)


class Book:
    """A resolver that writes down what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error

    def _ask(self, *what: Any) -> Any:
        self.asked.append(what)
        if self.error is not None:
            raise self.error
        return what

    def find(self, module: str, name: str) -> Any:
        self.asked.append(("find", module, name))
        return f"{module}.{name}"

    def call(self, func: object, args: tuple[Any, ...]) -> Any:
        return self._ask("call", func, args)

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._ask("new", cls, args, kwargs)

    def build(self, obj: object, state: object) -> Any:
        return self._ask("build", obj, state)

    def extend(self, obj: object, items: list[Any]) -> None:
        self._ask("extend", obj, items)

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        self._ask("update", obj, pairs)


def replay(pickled: Pickled, book: Book | None = None) -> Any:
    tensors = [f"T{i}" for i in range(len(pickled.names))]
    storage = lambda row, code: ("storage", row, code)  # noqa: E731
    return pickled.structure.replay(tensors, storage, book or Book())
