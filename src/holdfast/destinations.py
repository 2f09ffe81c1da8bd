"""Which tensors of a load are read straight into the memory of a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import objects, storages
from .adapters import Adapter
from .booleans import BOOL
from .collect import opaque
from .fetch import Destination
from .folder import Origin
from .layout import Index

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["destination", "said_of"]


def said_of(index: Index, location: Any) -> Any:
    """What ``map_location`` says of the tensors of a file.

    A dict says what becomes of each place that tensors were saved at. Where the file does not tell
    where they were, as ``torch.save``'s do, all are the host's: what ``"cpu"`` becomes.
    """
    if not index.locations and isinstance(location, Mapping):
        return location.get("cpu")
    return location


def destination(
    source: Origin,
    index: Index,
    rows: np.ndarray,
    adapter: Adapter,
    *,
    location: Any,
    kinds: Mapping[int, str],
    forced: bool,
    staging: Staging | None,
) -> Destination | None:
    """The devices that entries are read to.

    Parameters
    ----------
    location : object
        ``map_location``.
    kinds : mapping of int to str
        What :func:`holdfast.objects.kinds_of` says of `index`.
    forced : bool
        Whether the caller asked for `adapter`.
    staging : Staging or None
        For what is returned.

    Returns
    -------
    Destination or None
        None where all are to be read into the memory of the host, and moved, if at all, by their
        framework: what passes once, what is not in the file as it will be in memory, and what
        `location` says by means that only the framework understands.
    """
    if not source.repeatable or not len(rows):
        return None
    find = _by_entries if index.storages is None else _by_storages
    devices = find(index, rows, adapter, location, kinds, forced)
    if devices is None or not devices.any():
        return None
    return Destination(devices, adapter.name, staging)


def _by_entries(
    index: Index,
    rows: np.ndarray,
    adapter: Adapter,
    location: Any,
    kinds: Mapping[int, str],
    forced: bool,
) -> np.ndarray | None:
    code = adapter.destination(location)
    if not code:
        return None
    devices = np.full(len(rows), code, np.int32)
    if kinds:
        own, others = objects.shared_out(index, adapter, forced=forced)
        if own & others:
            return None  # one memory cannot be in both places
        devices[np.isin(rows, list(others))] = 0
    return devices


def _by_storages(
    index: Index,
    rows: np.ndarray,
    adapter: Adapter,
    location: Any,
    kinds: Mapping[int, str],
    forced: bool,
) -> np.ndarray | None:
    del forced
    which = storages.used(index, rows)
    if not storages.plain(index, which).all() or any(map(opaque, kinds.values())):
        return None
    # What is bool for one tensor and bytes for another is put right in the memory of the host.
    views = index.entries["dtype"][rows] == BOOL
    mixed = views & (index.storages["dtype"][index.storage[rows]] != BOOL)  # type: ignore[index]
    if mixed.any():
        return None
    tags = index.locations or ["cpu"] * len(index.storages)  # type: ignore[arg-type]
    codes: dict[str, int] = {}
    devices = np.zeros(len(which), np.int32)
    for i, row in enumerate(which.tolist()):
        tag = tags[row]
        if tag not in codes:
            codes[tag] = adapter.destination(_located(location, tag))
        devices[i] = codes[tag]
    return devices


def _located(location: Any, tag: str) -> Any:
    """Where ``map_location`` wants what was saved at `tag`."""
    if location is None:
        return tag
    return location.get(tag, tag) if isinstance(location, Mapping) else location
