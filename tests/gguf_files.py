"""GGUF files made by hand, in which everything can be made wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.errors import FormatError
from holdfast.formats._gguf_types import BY_TYPE_NAME, TYPES
from holdfast.layout import Index

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
           U64: "Q", I64: "q", F64: "d"}  # fmt: skip


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: int, what: Any) -> bytes:
    return string(what) if kind == STRING else struct.pack("<" + FORMATS[kind], what)


def pair(key: str | bytes, kind: int, what: Any) -> bytes:
    return string(key) + struct.pack("<i", kind) + value(kind, what)


def array(
    key: str | bytes, kind: int, items: Sequence[Any], length: int | None = None, of: int = ARRAY
) -> bytes:
    count = len(items) if length is None else length
    body = b"".join(value(kind if kind in FORMATS else STRING, item) for item in items)
    return string(key) + struct.pack("<iiQ", of, kind, count) + body


def info(
    name: str | bytes,
    shape: Sequence[int],
    kind: int | str,
    offset: int,
    *,
    length: int | None = None,
    ndim: int | None = None,
) -> bytes:
    """A tensor; `shape` as NumPy has it, in elements."""
    number = BY_TYPE_NAME[kind].id if isinstance(kind, str) else kind
    count = len(shape) if ndim is None else ndim
    extents = b"".join(struct.pack("<Q", extent % (1 << 64)) for extent in reversed(shape))
    return (
        string(name, length)
        + struct.pack("<I", count)
        + extents
        + struct.pack("<iQ", number, offset % (1 << 64))
    )


def head(
    pairs: Sequence[bytes],
    infos: Sequence[bytes],
    *,
    version: int = 3,
    npairs: int | None = None,
    ninfos: int | None = None,
) -> bytes:
    n = len(infos) if ninfos is None else ninfos
    m = len(pairs) if npairs is None else npairs
    fixed = b"GGUF" + struct.pack("<IQQ", version, n % (1 << 64), m % (1 << 64))
    return fixed + b"".join(pairs) + b"".join(infos)


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a tensor of a file is made of: its bytes are as many as shape and type take."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: bytes

    @classmethod
    def random(cls, name: str, shape: tuple[int, ...], kind: str, seed: int = 0) -> Tensor:
        block = BY_TYPE_NAME[kind]
        nbytes = int(np.prod(shape, dtype=np.int64)) // block.elements * block.nbytes
        raw = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
        if block.dtype is None and block.nbytes:  # scales that are finite
            raw.reshape(-1, block.nbytes)[:, 1] &= 0x3B
            if block.name in ("Q4_1", "Q5_1"):
                raw.reshape(-1, block.nbytes)[:, 3] &= 0x3B
        return cls(name, shape, kind, raw.tobytes())


def build(
    tensors: Sequence[Tensor],
    pairs: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    said: bool | None = None,
    version: int = 3,
) -> bytes:
    """A sound file."""
    if said if said is not None else alignment != 32:
        pairs = [*pairs, pair("general.alignment", U32, alignment)]
    infos, data = [], b""
    for tensor in tensors:
        data = padded(data, alignment)
        infos.append(info(tensor.name, tensor.shape, tensor.kind, len(data)))
        data += tensor.data
    return padded(head(pairs, infos, version=version), alignment) + data


def reader(data: bytes, name: str = "x") -> Any:
    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0 and nbytes >= 0
        if offset + nbytes > len(data):
            raise FormatError(f"{name}: {nbytes} bytes at {offset}, file ends at {len(data)}")
        return data[offset : offset + nbytes]

    return read


def check_index(index: Index, size: int) -> None:
    """Everything that an index says is within a file of `size` bytes, and agrees with itself."""
    assert index.storages is None and index.tree is None and index.format == "gguf"
    names = index.names.tolist()
    assert len(names) == len(index) == len(set(names))
    end = 0
    for i in range(len(index)):
        entry, shape, dtype = index.entries[i], index.shape(i), index.dtype(i)
        assert min(shape, default=0) >= 0 and len(shape) <= 5
        assert dtype.nbytes(shape) == entry["nbytes"]
        assert end <= entry["offset"] and entry["offset"] + entry["nbytes"] <= size
        end = int(entry["offset"] + entry["nbytes"])
        if i in index.encodings:
            block = BY_TYPE_NAME[index.encodings[i]]
            assert block.dtype is None and dtype.name == "uint8" and shape[-1] == block.nbytes
        else:
            assert dtype.name in {row.dtype for row in TYPES.values()}
    assert end <= index.end <= size
