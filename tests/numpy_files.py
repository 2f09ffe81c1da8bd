"""Files of NumPy made by hand, in which everything can be made wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from holdfast.errors import FormatError
from holdfast.layout import Index


def npy(
    text: str | bytes,
    data: bytes = b"",
    version: tuple[int, int] = (1, 0),
    length: int | None = None,
) -> bytes:
    """An array whose header is `text`; its length said as it is, or wrongly."""
    raw = (
        text.encode("utf-8" if version == (3, 0) else "latin-1") if isinstance(text, str) else text
    )
    width = 2 if version[0] == 1 else 4
    said = (len(raw) if length is None else length).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes(version) + said + raw + data


def literal(descr: str = "'<f4'", shape: str = "(2, 3)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def reader(data: bytes, name: str = "x.npy") -> Any:
    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0 and nbytes >= 0
        if offset + nbytes > len(data):
            raise FormatError(f"{name}: {nbytes} bytes at {offset}, file ends at {len(data)}")
        return data[offset : offset + nbytes]

    return read


def check_index(index: Index, size: int) -> None:
    """Everything that an index says is within a file of `size` bytes."""
    assert index.storages is not None and index.storage is not None
    assert 0 <= index.end <= size
    assert index.storage.tolist() == list(range(len(index)))
    rows = index.storages
    taken = np.where(rows["packed"] > 0, rows["packed"], rows["nbytes"]).astype(object)
    assert (rows["offset"].astype(object) + taken <= size).all()
    names = index.names.tolist()
    assert len(names) == len(index) == len(set(names))
    for i in range(len(index)):
        shape, dtype = index.shape(i), index.dtype(i)
        entry = index.entries[i]
        assert min(shape, default=0) >= 0 and len(shape) <= 64
        assert dtype.nbytes(shape) == entry["nbytes"] == rows["nbytes"][i]
        assert entry["offset"] == rows["offset"][i]
        if entry["nbytes"] and index.strides is not None:
            at = int(entry["dims"])
            steps = index.strides[at : at + len(shape)].tolist()
            last = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
            assert min(steps, default=0) >= 0
            assert last + dtype.itemsize == entry["nbytes"]
