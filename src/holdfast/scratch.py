"""Dequantized tensors in a file without a name, for what writes from maps.

A conversion takes no memory that grows with the file, and what is quantized takes several times its
size as floats: so these go to the disk first, a part at a time, and are mapped from there.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace

import numpy as np

from . import _engine
from ._buffer import Buffer
from .dequantize import dequantized, read_part
from .folder import Origin
from .formats._gguf_types import DEQUANTIZED
from .layout import SEGMENT, Index
from .views import DENSE, TensorBatch

__all__ = ["float_index", "floats_of"]

#: Elements that are in memory at a time; a multiple of those of a block.
PART = 2 << 20
#: Each tensor begins at a multiple of this.
ALIGN = 64


def float_index(index: Index) -> Index:
    """What an index is whose tensors are dequantized and stand each by itself.

    There are no checksums of what is in it, so the file has to be checked before. `index` itself,
    where there is nothing to dequantize.
    """
    found = dequantized(index)
    if found is index:
        return index
    return replace(found, storages=None, storage=None, strides=None, locations=None)


def floats_of(
    source: Origin, index: Index, batch: TensorBatch, folder: str | None, threads: int
) -> tuple[TensorBatch, Buffer]:
    """The tensors of `batch`, those that are quantized replaced by their numbers in a map.

    Parameters
    ----------
    source : Source or FolderSource
        Where the blocks are read from; those of `batch` are not touched.
    index : Index
        Of the blocks; some of them are of types that can be dequantized.
    batch : TensorBatch
        All entries of `index`, in their order.
    folder : str, optional
        Where the file is to be; by default the folder for temporary files.
    threads : int
        0: one for each CPU.

    Raises
    ------
    OSError
        There is no room for them.
    """
    floats = dequantized(index)
    rows = [row for row, text in index.encodings.items() if text in DEQUANTIZED]
    nbytes = floats.entries["nbytes"][rows].astype(np.int64)
    spans = (nbytes + (ALIGN - 1)) & -ALIGN
    starts = np.cumsum(spans) - spans
    size = max(ALIGN, int(spans.sum()))  # none at all cannot be mapped
    name = folder or tempfile.gettempdir()
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
        fd = file.fileno()
        for row, start, own in zip(rows, starts.tolist(), nbytes.tolist(), strict=True):
            count = own // 4
            for first in range(0, count, PART):
                few = min(PART, count - first)
                part = read_part(source, index, row, first, (few,), threads=threads)
                segment = np.zeros(1, SEGMENT)
                segment["offset"], segment["nbytes"] = start + first * 4, few * 4
                segment["address"] = part.views["address"]
                _engine.write(fd, segment, checksum=False, direct=False, filename=name)
        os.ftruncate(fd, size)
        buffer = _engine.map_file(fd, 0, size, name)
    views = batch.views.copy()
    for column in ("nbytes", "dims", "dtype", "ndim"):
        views[column][rows] = floats.entries[column][rows]
    views["dims"][rows] += len(batch.dims) - len(index.dims)
    views["address"][rows] = starts.astype(np.uint64) + np.uint64(buffer.address)
    views["flags"][rows] = DENSE
    more = floats.dims[len(index.dims) :]
    dims = np.concatenate([batch.dims, more])
    strides = batch.strides
    if strides is not None:
        strides = np.concatenate([strides, np.zeros(len(more), np.int64)])
    return TensorBatch(views, dims, [*batch.owners, buffer], strides), buffer
