"""The zip that ``torch.save`` writes, laid out as it does: the writing side.

Records, in this order: the pickle, what says how the file is laid out, the storages, the version.
One more, ``.holdfast``, says what torch has no place for; torch ignores it, as any record that no
pickle refers to. Reading stands in :mod:`._torch_zip_read`.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..layout import Pieces, Plan
from ..views import TensorBatch
from ._zip import Skeleton, emit

__all__ = ["ALIGNMENT", "STRUCTURE", "plan", "seal"]

#: How an object stands in this format.
STRUCTURE = "pickle"
METADATA = True

#: Of the storages in the file, in bytes; what torch uses too.
ALIGNMENT = 64

#: Storages smaller than this have their checksums computed before anything is written, so that
#: what stands between them is written along with them.
_EARLY = 4 << 20

#: What the folder of all records may be called: torch takes the name of the file, if it is ASCII.
_ROOT = re.compile(r"[0-9A-Za-z_ !#$%&'()+,;=@^`{}~\[\]-][0-9A-Za-z_ !#$%&'()+,;=@^`{}~.\[\]-]*")


@dataclass(slots=True)
class _State:
    """What :func:`seal` needs of a plan."""

    skeleton: Skeleton
    first: int  # the record of the first storage
    late: np.ndarray  # storages whose checksums are not known early


def plan(
    names: list[str],
    batch: TensorBatch,
    *,
    framework: str | None,
    metadata: Mapping[str, str] | None,
    structure: bytes,
    checksum: bool,
    stem: str,
    alignment: int = ALIGNMENT,
    byteorder_record: bool = True,
    data: bool = True,
) -> Plan:
    """Lay out a file.

    Parameters
    ----------
    names : list of str
        Keys of the storages, as the pickle calls them.
    batch : TensorBatch
        The storages.
    framework : str or None
        The file says so where that is not torch.
    metadata : mapping of str to str, optional
        For whoever reads it with this library.
    structure : bytes
        The pickle of the object.
    checksum : bool
        Whether the records of storages get a CRC-32; 0, which stands for none, otherwise.
    stem : str
        Name of the file, without extension.
    alignment : int
        Of the storages in the file, in bytes, 1 to 32768.
    byteorder_record : bool
        Whether the record which says what byte order the elements have is where torch puts it;
        False puts it behind the version.
    data : bool
        False where the caller leaves the bytes of all storages out: these get no checksum either.

    Raises
    ------
    TypeError
        Metadata that are not str.
    ValueError
        An alignment out of range.
    """
    before = {
        "data.pkl": structure,
        ".format_version": b"1",
        ".storage_alignment": b"%d" % alignment,
    }
    after = {"version": b"3\n"}
    (before if byteorder_record else after)["byteorder"] = sys.byteorder.encode()
    note = _note(framework, metadata)
    if note:
        after[".holdfast"] = note
    sizes = batch.views["nbytes"].astype(np.uint64, copy=False)
    after[".data/serialization_id"] = _identity(structure, sizes)
    records = [*before, *[f"data/{key}" for key in names], *after]
    inline = dict(enumerate(before.values()))
    inline.update(enumerate(after.values(), start=len(before) + len(names)))
    skeleton = emit(
        stem if _ROOT.fullmatch(stem) else "archive",
        records,
        np.concatenate(
            [
                np.array([len(data) for data in before.values()], np.uint64),
                sizes,
                np.array([len(data) for data in after.values()], np.uint64),
            ]
        ),
        inline,
        alignment,
    )
    summed = checksum and data
    early = (sizes < _EARLY) & summed
    return Plan(
        offsets=skeleton.offsets[len(before) : len(before) + len(names)],
        size=skeleton.size,
        early=early,
        state=_State(skeleton, len(before), ~early & summed),
    )


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
    """The headers and all records but the storages.

    Returns
    -------
    Pieces
        All of them with `early`; then those that lacked a checksum, of which there may be none.
    """
    state: _State = plan.state
    skeleton = state.skeleton
    assert plan.early is not None
    ready = plan.early if early else state.late
    if crcs is not None and ready.any():
        rows = np.flatnonzero(ready)
        skeleton.stamp(rows + state.first, crcs[rows])
    which: Any = slice(None)
    if not early:
        which = np.zeros(0, np.int64)
        if state.late.any():
            mask = np.zeros(len(skeleton.offsets), np.bool_)
            mask[state.first : state.first + len(state.late)] = state.late
            which = skeleton.late(mask)
    return Pieces(
        skeleton.data,
        skeleton.piece_offset[which],
        skeleton.piece_nbytes[which],
        skeleton.piece_start[which],
    )


def _note(framework: str | None, metadata: Mapping[str, str] | None) -> bytes:
    """What torch has no place for; nothing for a file as torch itself would write it."""
    note: dict[str, Any] = {}
    if framework not in (None, "torch"):
        note["framework"] = framework
    if metadata:
        for key, text in metadata.items():
            if not isinstance(key, str) or not isinstance(text, str):
                raise TypeError(f"metadata: expected str to str, found {key!r}: {text!r}")
        note["metadata"] = dict(metadata)
    return json.dumps(note, ensure_ascii=True, separators=(",", ":")).encode() if note else b""


def _identity(structure: bytes, sizes: np.ndarray) -> bytes:
    """40 digits that tell one file from another; torch only logs them.

    They are made of the pickle and the sizes, so that an object always gives the same file.
    """
    parts = (structure, sizes.astype("<u8").tobytes())
    halves = [zlib.crc32(part) << 32 | len(part) & 0xFFFFFFFF for part in parts]
    return "".join([f"{half:020d}" for half in halves]).encode()
