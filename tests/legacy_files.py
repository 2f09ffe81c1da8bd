"""Files of torch's old containers, made without torch: the stream of 1.0 to 1.5, and the tar.

Pickles are written by Python's own pickler, to which the names of torch are only names; so every
protocol and every object that a test thinks of can stand in them.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
INFO = {
    "protocol_version": VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}

#: Class of storage -> NumPy type of its elements.
KINDS = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
}


class Named:
    """A global, called by its name only."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self) -> None:
        raise AssertionError("a name was called")

    def __reduce__(self) -> str:
        return self.name


class Persistent:
    """What is pickled as a persistent id."""

    def __init__(self, pid: object) -> None:
        self.pid = pid


class Call:
    """What unpickling makes by calling `func`."""

    def __init__(self, func: Named, *args: object) -> None:
        self.func = func
        self.args = args

    def __reduce__(self) -> tuple[object, ...]:
        return self.func, self.args


class Writer(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Python's pickler, which looks no name up."""

    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Persistent) else None

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.module if isinstance(obj, Named) else obj.__module__
        text = obj.name if isinstance(obj, Named) else obj.__qualname__
        if self.proto >= 4:
            self.save(module)
            self.save(text)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{text}\n".encode())
        self.memoize(obj)


def dump(obj: object, protocol: int = 2) -> bytes:
    """A pickle of `obj`."""
    file = io.BytesIO()
    Writer(file, protocol).dump(obj)
    return file.getvalue()


def storage(
    key: object = "7",
    numel: object = 6,
    kind: str = "FloatStorage",
    *,
    location: object = "cpu",
    view: object = None,
    module: str = "torch",
) -> Persistent:
    """A storage as the stream names it."""
    return Persistent(("storage", Named(module, kind), key, location, numel, view))


def tensor(
    where: object,
    size: Sequence[object],
    stride: Sequence[object] | None = None,
    offset: object = 0,
) -> Call:
    """A tensor over a storage."""
    if stride is None:
        stride = [int(np.prod(size[i + 1 :], dtype="i8")) for i in range(len(size))]
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, where, offset, tuple(size), tuple(stride), False, OrderedDict())


def payload(data: np.ndarray, numel: int | None = None, *, big: bool = False) -> bytes:
    """One storage of the tail; with `big`, its count is big-endian."""
    count = len(data) if numel is None else numel
    return struct.pack(">q" if big else "<q", count) + data.tobytes()


def stream(
    obj: object,
    data: Mapping[object, np.ndarray],
    *,
    protocol: int = 2,
    info: object = INFO,
    keys: object = None,
    magic: object = MAGIC,
    version: object = VERSION,
    tail: bytes | None = None,
    big: bool = False,
) -> bytes:
    """A whole file: five pickles, and the storages in the order of their keys as text.

    With `big` the counts before them are big-endian.
    """
    order = sorted(data) if keys is None else keys
    parts = [dump(part, protocol) for part in (magic, version, info, obj, order)]
    if tail is None:
        tail = b"".join(payload(data[key], big=big) for key in sorted(data))
    return b"".join(parts) + tail


def sample(protocol: int = 2, **kwargs: Any) -> bytes:
    """A file with views, a tie, several types and values that are no tensors."""
    long = storage("94", 4, "LongStorage", location="cuda:0")
    floats = storage("100", 6)
    tied = tensor(floats, (2, 3))
    obj = OrderedDict(
        [
            ("weight", tied),
            ("column", tensor(floats, (2,), (3,), 1)),
            ("tied", tied),
            ("nested", {"count": tensor(long, (4,)), "lr": 0.5, "betas": (0.9, 0.999)}),
            ("empty", tensor(storage("12", 0), (0, 3))),
            ("scalar", tensor(storage("13", 1, "DoubleStorage"), (), ())),
        ]
    )
    return stream(obj, sample_data(), protocol=protocol, **kwargs)


def sample_data() -> dict[object, np.ndarray]:
    """The storages of :func:`sample`."""
    return {
        "94": np.arange(4, dtype="<i8") * 1000,
        "100": np.arange(6, dtype="<f4") + 0.5,
        "12": np.zeros(0, "<f4"),
        "13": np.array([2.25], "<f8"),
    }


def tar_storages(
    rows: Sequence[tuple[object, object, str, np.ndarray]],
    views: object = (),
    protocol: int = 2,
    count: object = None,
) -> bytes:
    """The member ``storages``: rows of (key, location, kind, data)."""
    parts = [dump(len(rows) if count is None else count, protocol)]
    for key, location, kind, data in rows:
        parts.append(dump((key, location, Named("torch", kind)), protocol))
        parts.append(payload(data))
    return b"".join(parts) + dump(list(views), protocol)  # type: ignore[call-overload]


def tar_tensors(
    rows: Sequence[tuple[object, object, Sequence[int], Sequence[int], int]],
    protocol: int = 2,
    count: object = None,
    kind: str = "FloatTensor",
) -> bytes:
    """The member ``tensors``: rows of (key, storage, size, stride, offset)."""
    parts = [dump(len(rows) if count is None else count, protocol)]
    for key, where, size, stride, offset in rows:
        parts.append(dump((key, where, Named("torch", kind)), protocol))
        ndim = len(size)
        parts.append(struct.pack(f"<ii{ndim}q{ndim}qq", ndim, 0, *size, *stride, offset))
    return b"".join(parts)


def tar(members: Mapping[str, bytes] | Sequence[tuple[Any, bytes]], **kwargs: Any) -> bytes:
    """A tar of these members: names, or whole headers, and what is in them."""
    file = io.BytesIO()
    kwargs.setdefault("format", tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=file, mode="w:", **kwargs) as archive:
        for head, data in members.items() if isinstance(members, Mapping) else members:
            entry = head if isinstance(head, tarfile.TarInfo) else tarfile.TarInfo(head)
            entry.size = len(data) if entry.isreg() else entry.size
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def tar_members(protocol: int = 2) -> dict[str, bytes]:
    """Members of a file with two storages, a view of one, and three tensors."""
    floats = np.arange(6, dtype="<f4") + 0.5
    longs = np.arange(4, dtype="<i8") * 1000
    rows = [(1001, "cpu", "FloatStorage", floats), (1002, "cuda:0", "LongStorage", longs)]
    tensors = [
        (2001, 1001, (2, 3), (3, 1), 0),
        (2002, 1003, (2,), (1,), 0),
        (2003, 1002, (2, 2), (1, 2), 0),
        (2004, 1001, (), (), 5),
    ]
    obj = OrderedDict(
        [
            ("weight", Persistent(2001)),
            ("part", Persistent(2002)),
            ("nested", {"longs": Persistent(2003), "lr": 0.5}),
            ("scalar", Persistent(2004)),
            ("tied", Persistent(2001)),
        ]
    )
    return {
        "storages": tar_storages(rows, [(1003, 1001, 2, 3)], protocol),
        "tensors": tar_tensors(tensors, protocol),
        "pickle": dump(obj, protocol),
    }


def reader(data: bytes, name: str = "x.pt", log: list[tuple[int, int]] | None = None) -> Any:
    """`read` over bytes, as a source has it; `log` gets what was asked for."""
    from holdfast.errors import FormatError

    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0 and nbytes >= 0
        if log is not None:
            log.append((offset, nbytes))
        found = data[offset : offset + nbytes]
        if len(found) < nbytes:
            raise FormatError(
                f"{name}: needs {nbytes} bytes at offset {offset}, "
                f"file ends at {offset + len(found)}"
            )
        return found

    return read


def values(data: bytes, index: Any) -> dict[str, np.ndarray]:
    """Every tensor of an index, cut out of the bytes of its file by the slow way."""
    from holdfast.layout import FOREIGN

    found = {}
    for i, name in enumerate(index.names.tolist()):
        row = index.storages[index.storage[i]]
        start, nbytes = int(row["offset"]), int(row["nbytes"])
        assert start + nbytes <= len(data)
        dtype = np.dtype(index.dtype(i).name)
        if int(row["flags"]) & FOREIGN:
            dtype = dtype.newbyteorder()
        shape = index.shape(i)
        at = int(index.entries["dims"][i])
        strides = (
            None if index.strides is None else tuple(index.strides[at : at + len(shape)].tolist())
        )
        offset = int(index.entries["offset"][i])
        if index.dtype(i).nbytes(shape):
            assert start <= offset <= start + nbytes
        else:
            offset = 0
        array = np.ndarray(shape, dtype, data, offset, strides)
        found[name] = array.astype(dtype.newbyteorder("="))
    return found
