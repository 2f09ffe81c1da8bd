"""Zip archives byte by byte, in which every field can be made wrong."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holdfast.errors import FormatError
from holdfast.formats import _zip

LOCAL = {
    "signature": ("I", 0x04034B50),
    "needed": ("H", 20),
    "flags": ("H", None),
    "method": ("H", None),
    "time": ("H", 0),
    "date": ("H", 0),
    "crc": ("I", None),
    "packed": ("I", None),
    "size": ("I", None),
    "name_length": ("H", None),
    "extra_length": ("H", None),
}
CENTRAL = {
    "signature": ("I", 0x02014B50),
    "made": ("H", 20),
    "needed": ("H", 20),
    "flags": ("H", None),
    "method": ("H", None),
    "time": ("H", 0),
    "date": ("H", 0),
    "crc": ("I", None),
    "packed": ("I", None),
    "size": ("I", None),
    "name_length": ("H", None),
    "extra_length": ("H", None),
    "comment_length": ("H", None),
    "disk": ("H", 0),
    "internal": ("H", 0),
    "external": ("I", 0),
    "header": ("I", None),
}
END = {
    "signature": ("I", 0x06054B50),
    "disk": ("H", 0),
    "first_disk": ("H", 0),
    "here": ("H", None),
    "count": ("H", None),
    "size": ("I", None),
    "start": ("I", None),
    "comment_length": ("H", None),
}
END64 = {
    "signature": ("I", 0x06064B50),
    "length": ("Q", 44),
    "made": ("H", 45),
    "needed": ("H", 45),
    "disk": ("I", 0),
    "first_disk": ("I", 0),
    "here": ("Q", None),
    "count": ("Q", None),
    "size": ("Q", None),
    "start": ("Q", None),
}
LOCATOR = {
    "signature": ("I", 0x07064B50),
    "disk": ("I", 0),
    "offset": ("Q", None),
    "disks": ("I", 1),
}


def fields(layout: dict[str, tuple[str, int | None]], **values: int) -> bytes:
    """The bytes of a header; what `layout` has no value for is in `values`, which win."""
    assert set(values) <= set(layout)
    return b"".join(
        struct.pack("<" + kind, values.get(key, default)) for key, (kind, default) in layout.items()
    )


def deflate(data: bytes) -> bytes:
    machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return machine.compress(data) + machine.flush()


@dataclass
class Record:
    """A record; `local` and `central` replace fields of its headers."""

    name: str | bytes
    data: bytes = b"payload"
    method: int = 0
    flags: int = 0x800
    local: dict[str, int] = field(default_factory=dict)
    central: dict[str, int] = field(default_factory=dict)
    local_name: bytes | None = None
    extra: bytes = b""
    central_extra: bytes = b""
    comment: bytes = b""
    payload: bytes | None = None
    descriptor: bytes | None = None
    before: bytes = b""

    @property
    def raw(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name


def described(name: str, data: bytes = b"payload", **more: Any) -> Record:
    """A record whose sizes stand behind its payload, as PyTorch writes it."""
    crc = zlib.crc32(data)
    return Record(
        name,
        data,
        flags=0x808,
        local={"crc": 0, "packed": 0, "size": 0},
        descriptor=struct.pack("<IIII", 0x08074B50, crc, len(data), len(data)),
        **more,
    )


def build(
    records: Sequence[Record],
    *,
    end: dict[str, int] | None = None,
    end64: dict[str, int] | None = None,
    locator: dict[str, int] | None = None,
    comment: bytes = b"",
    before_end: bytes = b"",
    in_directory: bytes = b"",
) -> bytes:
    """The archive; with a zip64 end record where `end64` or `locator` are not None."""
    out = bytearray()
    directory = bytearray()
    for record in records:
        out += record.before
        header = len(out)
        payload = record.payload
        if payload is None:
            payload = deflate(record.data) if record.method == 8 else record.data
        values = {
            "flags": record.flags,
            "method": record.method,
            "crc": zlib.crc32(record.data),
            "packed": len(payload),
            "size": len(record.data),
            "name_length": len(record.raw),
        }
        local_name = record.raw if record.local_name is None else record.local_name
        own = {"name_length": len(local_name), "extra_length": len(record.extra)}
        out += fields(LOCAL, **values | own | record.local) + local_name + record.extra + payload
        out += record.descriptor or b""
        own = {"extra_length": len(record.central_extra), "comment_length": len(record.comment)}
        directory += fields(CENTRAL, **values | own | {"header": header} | record.central)
        directory += record.raw + record.central_extra + record.comment
    directory += in_directory
    start = len(out)
    out += directory
    place = {"here": len(records), "count": len(records), "size": len(directory), "start": start}
    if end64 is not None or locator is not None:
        offset = len(out)
        out += fields(END64, **place | (end64 or {}))
        out += fields(LOCATOR, **{"offset": offset} | (locator or {}))
    out += before_end
    out += fields(END, **place | {"comment_length": len(comment)} | (end or {})) + comment
    return bytes(out)


def reader(data: bytes, name: str = "x.zip") -> Callable[[int, int], bytes]:
    """What a format reads `data` with."""

    def read(offset: int, nbytes: int) -> bytes:
        if offset + nbytes > len(data):
            raise FormatError(f"{name}: file ends at {len(data)}")
        return data[offset : offset + nbytes]

    return read


def scan(data: bytes, name: str = "x.zip") -> _zip.Directory:
    return _zip.scan(reader(data, name), len(data), name)


def extract(data: bytes, record: str, *, limit: int = 1 << 20, verify: bool = True) -> bytes:
    found = scan(data)
    row = found.find(record)
    assert row >= 0
    return _zip.extract(reader(data), found, row, "x.zip", limit=limit, verify=verify)


def assemble(skeleton: _zip.Skeleton, payloads: dict[int, bytes]) -> bytes:
    """The file of a skeleton: its pieces, and the payloads at their offsets."""
    out = bytearray(skeleton.size)
    taken = np.zeros(skeleton.size, np.uint8)
    parts = [(int(skeleton.offsets[row]), data) for row, data in payloads.items()]
    for offset, nbytes, start in zip(
        skeleton.piece_offset.tolist(),
        skeleton.piece_nbytes.tolist(),
        skeleton.piece_start.tolist(),
        strict=True,
    ):
        parts.append((offset, bytes(skeleton.data[start : start + nbytes])))
    for offset, data in parts:
        taken[offset : offset + len(data)] += 1
        out[offset : offset + len(data)] = data
    assert (taken == 1).all(), "pieces and payloads do not tile the file"
    return bytes(out)
