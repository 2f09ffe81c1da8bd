"""Filling tensors that are as those in the file are: looked at as columns, read in one pass."""

from __future__ import annotations

from operator import is_
from typing import Any

import numpy as np

from . import fetch
from .adapters import Adapter
from .booleans import BOOL
from .collect import by_adapter, join_kind, opaque
from .layout import Index
from .reader import Reader
from .views import DENSE, SWAPPED, TensorBatch

__all__ = ["fill_straight"]


def fill_straight(
    reader: Reader, leaves: dict[str, Any], stored: dict[str, int], threads: int
) -> bool:
    """Fill tensors by name where nothing has to be said or done about any of them.

    To look at one tensor by itself costs twenty times what it costs among many.

    Parameters
    ----------
    reader : Reader
    leaves : dict of str to tensor
        What is to be filled.
    stored : dict of str to int
        Names and entries of what there is for them.
    threads : int

    Returns
    -------
    bool
        Whether that was so: all names match, dtypes and shapes too, and no two tensors share
        memory, here or in the file; all are dense, in the memory of the host, and may be written
        to. Otherwise nothing has been done.
    """
    index = reader.index
    plain = index.storages is None and index.guess is None and reader.described is index
    if not plain or not leaves or leaves.keys() != stored.keys():
        return False
    names, members = list(leaves), list(leaves.values())
    ((adapter, _), *more) = by_adapter(members).items()
    if more or any(adapter.mismatch(leaf, name) is not None for name, leaf in leaves.items()):
        return False
    if not all(map(adapter.writable, members)):
        return False
    batch, kinds = adapter.describe(members, names)
    rows = np.array([stored[name] for name in names], np.int64)
    if not _in_reach(batch, members) or not _alike(index, rows, batch):
        return False
    told = {join_kind(adapter.name, kind) for kind in set(kinds.values())}
    if any(map(opaque, told)) or any(map(opaque, set(reader.kinds.values()))):
        return False
    verify = fetch.checkable(index)
    if verify and not fetch.expected_crcs(index, rows)[0].all():
        return False
    _read(reader, adapter, members, batch, rows, verify, threads)
    return True


def _in_reach(batch: TensorBatch, members: list[Any]) -> bool:
    """Whether the tensors are dense memory of the host, each its own and no other's."""
    views = batch.views
    if batch.owner is not None or len(batch.owners) != len(members):
        return False
    if not all(map(is_, batch.owners, members)):  # one is a copy
        return False
    if batch.devices is not None and batch.devices.any():
        return False
    if (views["flags"] & (DENSE | SWAPPED) != DENSE).any() or (views["dtype"] == BOOL).any():
        return False
    held = views[["address", "nbytes"]][views["nbytes"] > 0]
    order = np.argsort(held["address"])
    starts, sizes = held["address"][order], held["nbytes"][order]
    return bool((starts[:-1] + sizes[:-1] <= starts[1:]).all())


def _alike(index: Index, rows: np.ndarray, batch: TensorBatch) -> bool:
    """Whether dtypes and shapes are those of the entries, of which none is there twice."""
    views, entries = batch.views, index.some(rows)
    if len(np.unique(rows)) < len(rows):
        return False
    if any((views[column] != entries[column]).any() for column in ("dtype", "ndim", "nbytes")):
        return False
    for axis in range(int(views["ndim"].max(initial=0))):
        some = views["ndim"] > axis
        here = batch.dims[views["dims"][some].astype(np.int64) + axis]
        there = index.dims[entries["dims"][some].astype(np.int64) + axis]
        if (here != there).any():
            return False
    return True


def _read(
    reader: Reader,
    adapter: Adapter,
    members: list[Any],
    batch: TensorBatch,
    rows: np.ndarray,
    verify: bool,
    threads: int,
) -> None:
    segments = fetch.segments_of(reader.index, rows)
    segments["address"] = np.where(batch.views["nbytes"] > 0, batch.views["address"], 0)
    adapter.changing(members)
    fetch.move(reader.source, segments, verify=verify, threads=threads)
    if verify:
        fetch.check(reader.source.name, reader.index, rows, segments)
