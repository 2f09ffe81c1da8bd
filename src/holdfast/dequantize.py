"""Tensors that are stored as blocks of quantized numbers, as the numbers that they stand for."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import fetch
from .dtypes import BY_NAME
from .formats import _gguf
from .formats._gguf_types import BY_TYPE_NAME, DEQUANTIZED
from .layout import Index
from .views import TensorBatch

__all__ = ["dequantize", "dequantized"]

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
    entries = index.entries.copy()
    dims = [index.dims]
    at = len(index.dims)
    for row in rows:
        block = BY_TYPE_NAME[index.encodings[row]]
        *shape, count, _ = index.shape(row)
        dims.append(np.array([*shape, count * block.elements], np.int64))
        entries[row]["dims"], entries[row]["ndim"] = at, len(shape) + 1
        at += len(shape) + 1
    blocks = np.array([BY_TYPE_NAME[index.encodings[row]].nbytes for row in rows], np.uint64)
    entries["nbytes"][rows] = entries["nbytes"][rows] // blocks * (32 * _FLOAT.itemsize)
    entries["dtype"][rows] = _FLOAT.code
    left = {row: text for row, text in index.encodings.items() if text not in DEQUANTIZED}
    return dataclasses.replace(
        index, entries=entries, dims=np.concatenate(dims), encodings=left, crcs=None
    )


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
    types = {row: BY_TYPE_NAME[text] for row, text in index.encodings.items()}
    at = [
        i for i, row in enumerate(rows.tolist()) if row in types and types[row].name in DEQUANTIZED
    ]
    if not at:
        return batch
    made = fetch.blank_tensors(dequantized(index), rows[at])
    blocks = [types[row] for row in rows[at].tolist()]
    _gguf.dequantize(
        np.ascontiguousarray(batch.views["address"][at]),
        np.ascontiguousarray(made.views["address"]),
        batch.views["nbytes"][at] // np.array([block.nbytes for block in blocks], np.uint64),
        np.array([block.id for block in blocks], np.int32),
        threads,
    )
    views = batch.views.copy()
    made.views["dims"] += len(batch.dims)
    views[at] = made.views
    owner = np.zeros(len(batch), np.int64) if batch.owner is None else batch.owner.copy()
    assert made.owner is not None
    owner[at] = made.owner + len(batch.owners)
    return TensorBatch(
        views, np.concatenate([batch.dims, made.dims]), [*batch.owners, *made.owners], owner=owner
    )
