"""The stream that torch wrote up to 1.5, and still does on request: the writing side.

Pickles of a magic number, a version, the machine's sizes, the object and the keys of its storages;
behind them each storage, its number of elements before it. Nothing is aligned and nothing has a
checksum.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping

import numpy as np

from ..dtypes import DTYPES
from ..layout import Pieces, Plan
from ..views import TensorBatch
from ._torch_storages import CLASSES

__all__ = ["STRUCTURE", "plan", "seal"]

#: How an object stands in this format: its persistent ids are not those of the zip.
STRUCTURE = "legacy pickle"
METADATA = False

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

#: Bytes of an element as a storage of this dtype counts them.
_UNITS = np.array([row.itemsize if row.code in CLASSES else 1 for row in DTYPES], np.uint64)


def plan(
    names: list[str],
    batch: TensorBatch,
    *,
    framework: str | None,  # noqa: ARG001
    metadata: Mapping[str, str] | None,
    structure: bytes,
    checksum: bool,  # noqa: ARG001
    stem: str,  # noqa: ARG001
) -> Plan:
    """Lay out a file. See :func:`.torch_zip.plan`.

    Neither checksums nor the framework have a place in it; what is loaded are torch's tensors.

    Raises
    ------
    ValueError
        There are metadata, which have no place either.
    """
    if metadata:
        raise ValueError("metadata have no place in a legacy torch file; format='torch' has one")
    info = {
        "protocol_version": _VERSION,
        "little_endian": sys.byteorder == "little",
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    head = b"".join(
        [
            *(pickle.dumps(value, protocol=2) for value in (_MAGIC, _VERSION, info)),
            structure,
            pickle.dumps(sorted(names), protocol=2),
        ]
    )
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    sizes = batch.views["nbytes"].astype(np.uint64, copy=False)[order]
    counts = sizes // _UNITS[batch.views["dtype"][order]]
    starts = np.cumsum(sizes + np.uint64(8), dtype=np.uint64) - sizes + np.uint64(len(head))
    offsets = np.empty(len(names), np.uint64)
    offsets[order] = starts
    size = int(starts[-1] + sizes[-1]) if len(names) else len(head)
    return Plan(
        offsets=offsets,
        size=size,
        early=np.zeros(len(names), np.bool_),
        state=_pieces(head, starts, sizes, counts),
    )


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:  # noqa: ARG001
    """What stands before and between the storages: all of it with `early`, then nothing."""
    pieces: Pieces = plan.state
    if early:
        return pieces
    return Pieces(b"", pieces.offset[:0], pieces.nbytes[:0], pieces.start[:0])


def _pieces(head: bytes, starts: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> Pieces:
    """The head and the numbers of elements, those that nothing stands between in one piece."""
    data = head + counts.astype("<i8").tobytes()
    # A number begins a piece where a storage with bytes in it stands before it.
    new = np.flatnonzero(sizes[:-1] > 0) + 1
    offset = np.concatenate([np.zeros(1, np.uint64), starts[new] - np.uint64(8)])
    start = np.concatenate([np.zeros(1, np.int64), len(head) + 8 * new.astype(np.int64)])
    nbytes = np.diff(np.append(start, len(data))).astype(np.uint64)
    return Pieces(data, offset, nbytes, start)
