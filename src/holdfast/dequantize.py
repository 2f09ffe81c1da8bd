"""Tensors that are stored as blocks of quantized numbers, as the numbers that they stand for."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import fetch
from .dtypes import BY_NAME
from .folder import Origin
from .formats import _gguf
from .formats._gguf_types import BY_TYPE_NAME, DEQUANTIZED
from .layout import Index
from .views import TensorBatch

__all__ = ["dequantize", "dequantized", "read_part"]

_FLOAT = BY_NAME["float32"]


def dequantized(index: Index) -> Index:
    """What an index is once its tensors are dequantized: those that can be are float32.

    Offsets and checksums stay those of the blocks. `index` itself, where there is nothing to do.

    Returns
    -------
    Index
        Its `encodings` are those that are left.
    """
    rows = [row for row, text in index.encodings.items() if text in DEQUANTIZED]
    if not rows:
        return index
    floats, dims = _floats(index, rows)
    floats["dims"] += len(index.dims)
    entries = index.entries.copy()
    entries[rows] = floats
    left = {row: text for row, text in index.encodings.items() if text not in DEQUANTIZED}
    return dataclasses.replace(
        index,
        entries=entries,
        dims=np.concatenate([index.dims, dims]),
        encodings=left,
        crcs=None,
    )


def _floats(index: Index, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Entries of these rows as float32, and the extents that they count from."""
    entries = index.entries[rows]
    types = [BY_TYPE_NAME[index.encodings[row]] for row in rows]
    dims: list[int] = []
    for i, (row, block) in enumerate(zip(rows, types, strict=True)):
        *shape, count, _ = index.shape(row)
        entries[i]["dims"], entries[i]["ndim"] = len(dims), len(shape) + 1
        dims += [*shape, count * block.elements]
    blocks = np.array([block.nbytes for block in types], np.uint64)
    entries["nbytes"] = entries["nbytes"] // blocks * (32 * _FLOAT.itemsize)
    entries["dtype"] = _FLOAT.code
    return entries, np.array(dims, np.int64)


def dequantize(
    index: Index, batch: TensorBatch, rows: np.ndarray, *, threads: int = 0
) -> TensorBatch:
    """The same tensors, those of the types that are known here as float32, in memory of their own.

    Parameters
    ----------
    index : Index
        Of the blocks, as the file has them.
    batch : TensorBatch
        One row for each of `rows`, mapped or read. What is not dequantized is taken over.
    rows : ndarray of int64
        Entries of `index`.
    threads : int
        0: one for each CPU.
    """
    at = [i for i, row in enumerate(rows.tolist()) if index.encodings.get(row) in DEQUANTIZED]
    if not at:
        return batch
    # Of the chosen rows alone: tensors are asked for one by one of files that have very many.
    chosen = rows[at].tolist()
    few = Index(index.names, *_floats(index, chosen), {})
    made = fetch.blank_tensors(few, np.arange(len(chosen)))
    blocks = [BY_TYPE_NAME[index.encodings[row]] for row in chosen]
    _gguf.dequantize(
        np.ascontiguousarray(batch.views["address"][at]),
        np.ascontiguousarray(made.views["address"]),
        batch.views["nbytes"][at] // np.array([block.nbytes for block in blocks], np.uint64),
        np.array([block.id for block in blocks], np.int32),
        threads,
    )
    views = batch.views.copy()
    dims = _own_dims(views, batch.dims)
    made.views["dims"] += len(dims)
    views[at] = made.views
    owner = np.zeros(len(batch), np.int64) if batch.owner is None else batch.owner.copy()
    assert made.owner is not None
    owner[at] = made.owner + len(batch.owners)
    return TensorBatch(
        views, np.concatenate([dims, made.dims]), [*batch.owners, *made.owners], owner=owner
    )


def read_part(
    source: Origin,
    index: Index,
    row: int,
    first: int,
    shape: tuple[int, ...],
    *,
    threads: int = 0,
) -> TensorBatch:
    """Elements of one dequantized tensor; as :func:`holdfast.fetch.read_part`, of its numbers.

    Parameters
    ----------
    index : Index
        Of the blocks.
    first : int
        In elements of float32, in C order; at the beginning of a block.
    shape : tuple of int
        Of the part, of which the last axis is whole blocks.
    """
    text = index.encodings[row]
    block = BY_TYPE_NAME[text]
    count, rest = divmod(shape[-1], block.elements)
    at, odd = divmod(first, block.elements)
    assert not rest
    assert not odd
    blocks = (*shape[:-1], count, block.nbytes)
    raw = fetch.read_part(source, index, row, at * block.nbytes, blocks)
    entries = index.entries[[row]]
    entries["nbytes"] = raw.views["nbytes"]
    entries["dims"] = 0
    part = Index(index.names, entries, raw.dims, {}, encodings={0: text})
    return dequantize(part, raw, np.zeros(1, np.int64), threads=threads)


def _own_dims(views: np.ndarray, dims: np.ndarray) -> np.ndarray:
    """The extents of these views alone, of those of a whole file; the views then count in them."""
    ndim = views["ndim"].astype(np.int64)
    starts = np.cumsum(ndim) - ndim
    found = dims[np.repeat(views["dims"] - starts, ndim) + np.arange(int(ndim.sum()))]
    views["dims"] = starts
    return found
