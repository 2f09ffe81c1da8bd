"""Filling tensors that are as those in the file are: looked at as columns, read in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np

from . import fetch
from .adapters import Adapter
from .booleans import BOOL
from .collect import join_kind, opaque
from .layout import Index
from .reader import Reader
from .views import DENSE, SWAPPED, TensorBatch

__all__ = ["Group", "fill_straight"]


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one framework, as its adapter describes them.

    Attributes
    ----------
    adapter : Adapter
    names : list of str
    members : list of tensor
    batch : TensorBatch
    kinds : dict of int to str
    """

    adapter: Adapter
    names: list[str]
    members: list[Any]
    batch: TensorBatch
    kinds: dict[int, str]


def fill_straight(
    reader: Reader, groups: list[Group], stored: dict[str, int], threads: int
) -> bool:
    """Fill tensors where nothing has to be said or done about any of them.

    To look at one tensor by itself costs ten times what it costs among many.

    Parameters
    ----------
    reader : Reader
    groups : list of Group
        What is to be filled.
    stored : dict of str to int
        Names and entries of what there is for them.
    threads : int

    Returns
    -------
    bool
        Whether that was so: all are of one framework, names match, dtypes and shapes too, and no
        two tensors share memory, here or in the file; all are dense, in the memory of the host,
        and may be written to. Otherwise nothing has been done.
    """
    index = reader.index
    plain = index.storages is None and index.guess is None and reader.described is index
    if not plain or len(groups) != 1 or stored.keys() != set(groups[0].names):
        return False
    (group,) = groups
    batch = group.batch
    if not all(map(group.adapter.writable, group.members)):
        return False
    rows = np.array([stored[name] for name in group.names], np.int64)
    if not _in_reach(batch, group.members) or not _alike(index, rows, batch):
        return False
    told = {join_kind(group.adapter.name, kind) for kind in set(group.kinds.values())}
    if any(map(opaque, told)) or any(map(opaque, set(reader.kinds.values()))):
        return False
    segments = fetch.segments_of(index, rows)
    if not _apart(segments["file"], segments["offset"], segments["nbytes"]):
        return False
    segments["address"] = np.where(batch.views["nbytes"] > 0, batch.views["address"], 0)
    group.adapter.changing(group.members)
    verify = fetch.checkable(index)
    fetch.move(reader.source, segments, verify=verify, threads=threads)
    if verify:
        fetch.check(reader.source.name, index, rows, segments)
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
    return _apart(np.zeros(len(views), np.uint32), views["address"], views["nbytes"])


def _alike(index: Index, rows: np.ndarray, batch: TensorBatch) -> bool:
    """Whether dtypes and shapes are those of the entries."""
    views, entries = batch.views, index.some(rows)
    if any((views[column] != entries[column]).any() for column in ("dtype", "ndim", "nbytes")):
        return False
    for axis in range(int(views["ndim"].max(initial=0))):
        some = views["ndim"] > axis
        here = batch.dims[views["dims"][some].astype(np.int64) + axis]
        there = index.dims[entries["dims"][some].astype(np.int64) + axis]
        if (here != there).any():
            return False
    return True


def _apart(file: np.ndarray, start: np.ndarray, nbytes: np.ndarray) -> bool:
    """Whether no two of these runs of bytes share any."""
    some = nbytes > 0
    file, start, nbytes = file[some], start[some], nbytes[some]
    order = np.lexsort((start, file))
    file, start, end = file[order], start[order], (start + nbytes)[order]
    return bool(((end[:-1] <= start[1:]) | (file[:-1] != file[1:])).all())
