"""From the leaves of an object to one batch of tensors to store: described, ties found.

The mirror image of :mod:`holdfast.fetch` on the way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import adapters
from .adapters import Adapter
from .views import VIEW, TensorBatch

__all__ = ["Collection", "by_adapter", "collect", "join_kind", "opaque", "split_kind"]


@dataclass(frozen=True, slots=True)
class Collection:
    """What there is to store.

    Attributes
    ----------
    names : list of str
        Of the stored tensors, in header order.
    batch : TensorBatch
        The stored tensors; its owners keep their memory alive.
    position : sequence of int
        For each leaf, which stored tensor it is: ties share one.
    kinds : dict of int to str
        For the leaves that a plain tensor of `framework` does not say all of.
    framework : str or None
        Name of the adapter that most leaves belong to; None where there are none.
    """

    names: list[str]
    batch: TensorBatch
    position: Sequence[int]
    kinds: dict[int, str]
    framework: str | None


def join_kind(framework: str, kind: str) -> str:
    """Text of a leaf that is not a plain tensor of the file's framework."""
    return f"{framework}:{kind}" if kind else framework


def split_kind(text: str) -> tuple[str, str]:
    """Framework and kind that `text` was joined from."""
    framework, _, kind = text.partition(":")
    return framework, kind


def opaque(text: str | None) -> str:
    """The dtype in the kind of a leaf that is stored as bytes, since the table lacks it; or ""."""
    kind = split_kind(text)[1] if text else ""
    return kind if kind.startswith("dtype:") else ""


def collect(
    names: list[str],
    leaves: list[object],
    known: Sequence[Adapter] | None = None,
    *,
    ties: bool = True,
) -> Collection:
    """Describe `leaves`, and find which of them are one tensor, unless `ties` is False.

    Raises
    ------
    TypeError
        A leaf cannot be held; the message has its name.
    """
    groups = by_adapter(leaves, known)
    framework = max(groups, key=lambda adapter: len(groups[adapter])).name if groups else None
    kinds: dict[int, str] = {}
    parts: list[tuple[np.ndarray | None, TensorBatch]] = []
    for adapter, rows in groups.items():
        whole = len(groups) == 1
        batch, own = adapter.describe(
            leaves if whole else [leaves[row] for row in rows],
            names if whole else [names[row] for row in rows],
        )
        parts.append((None if whole else np.array(rows, np.int64), batch))
        if adapter.name != framework:
            own = {i: own.get(i, "") for i in range(len(rows))}
        for i, kind in own.items():
            kinds[i if whole else rows[i]] = join_kind(adapter.name, kind)
    batch = _merge(parts, len(leaves))
    keep, position = _ties(batch) if ties else (None, range(len(batch)))
    if keep is None:
        return Collection(names, batch, position, kinds, framework)
    return Collection([names[row] for row in keep], batch.take(keep), position, kinds, framework)


def by_adapter(
    leaves: list[object], known: Sequence[Adapter] | None = None
) -> Mapping[Adapter, Sequence[int]]:
    """Rows of `leaves` for each adapter, in the order of the adapters' table."""
    known = adapters.loaded() if known is None else known
    types = set(map(type, leaves))
    owner: dict[type, Adapter | None] = {
        kind: next((a for a in known if kind in a.plain_types), None) for kind in types
    }
    found = set(owner.values())
    if len(found) == 1 and None not in found:
        (adapter,) = found
        assert adapter is not None
        return {adapter: range(len(leaves))}
    groups: dict[Adapter, list[int]] = {adapter: [] for adapter in known}
    for row, leaf in enumerate(leaves):
        adapter = owner[type(leaf)] or next(a for a in known if a.is_tensor(leaf))
        groups[adapter].append(row)
    return {adapter: rows for adapter, rows in groups.items() if rows}


def _merge(parts: list[tuple[np.ndarray | None, TensorBatch]], n: int) -> TensorBatch:
    """One batch of several, whose rows stand at the given places."""
    if len(parts) == 1:
        return parts[0][1]
    views = np.zeros(n, VIEW)
    devices = np.zeros(n, np.int32)
    dims: list[np.ndarray] = [np.empty(0, np.int64)]
    strides: list[np.ndarray] = [np.empty(0, np.int64)]
    start = 0
    for rows, batch in parts:
        assert rows is not None
        views[rows] = batch.views
        if batch.devices is not None:
            devices[rows] = batch.devices
        views["dims"][rows] += start
        start += len(batch.dims)
        dims.append(batch.dims)
        strides.append(np.zeros_like(batch.dims) if batch.strides is None else batch.strides)
    owners = [owner for _, batch in parts for owner in batch.owners]
    return TensorBatch(
        views,
        np.concatenate(dims),
        owners,
        np.concatenate(strides),
        devices=devices if devices.any() else None,
    )


def _ties(batch: TensorBatch) -> tuple[list[int] | None, Sequence[int]]:
    """Which rows to store, and for each row which stored one it is.

    Two rows are one tensor where address, dtype, shape and strides are equal and there are bytes
    at all. Returns None in place of the rows where there are no ties.
    """
    n = len(batch)
    addresses = np.sort(batch.views["address"][batch.views["nbytes"] > 0])
    if not bool((addresses[1:] == addresses[:-1]).any()):
        return None, range(n)
    repeated = Counter(batch.views["address"].tolist())
    seen: dict[tuple[object, ...], int] = {}
    keep: list[int] = []
    position: list[int] = []
    for row, (address, nbytes) in enumerate(batch.views[["address", "nbytes"]].tolist()):
        if nbytes and repeated[address] > 1:
            view = batch[row]
            key = (address, view.dtype.code, view.shape, view.strides, view.swapped)
            first = seen.setdefault(key, len(keep))
            position.append(first)
            if first < len(keep):
                continue
        else:
            position.append(len(keep))
        keep.append(row)
    return (None if len(keep) == n else keep), position
