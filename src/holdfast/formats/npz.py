"""Arrays by name in an archive of NumPy's: ``.npz``.

A zip archive, each record of which is an array as it would stand in a ``.npy`` file. Records are
written stored, never deflated, so that the arrays can be mapped, and an extra field of each local
header is as long as it takes for the elements to begin at a multiple of 64.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from ..errors import FormatError
from ..layout import CHECKED, Index, Pieces, Plan
from ..views import TensorBatch
from . import Read
from ._crc import shift
from ._header_text import short
from ._npy_header import heads, index_of
from ._npz_emit import Skeleton
from ._npz_headers import read_headers
from ._records import runs_of
from ._zip import Directory

__all__ = ["METADATA", "STRUCTURE", "claims", "index", "plan", "seal"]

#: It holds a flat dict of arrays and nothing else; each always has a checksum.
STRUCTURE = "arrays"
METADATA = False

_SUFFIX = ".npy"
#: Arrays smaller than this have their checksums computed before anything is written, so that the
#: headers, which have them, are written along with the arrays.
_EARLY = 4 << 20


# -- reading -------------------------------------------------------------------------------------


def claims(directory: Directory) -> bool:
    """Whether this is an archive of NumPy's, sound or not; ``numpy.savez`` of nothing is empty."""
    return len(directory) == 0 or any(name.endswith(_SUFFIX) for name in directory.names)


def index(
    read: Read,
    size: int,  # noqa: ARG001
    name: str,
    directory: Directory,
    *,
    verify: bool = True,  # noqa: ARG001 - headers share the checksums of their arrays
) -> Index:
    """Find the arrays.

    Raises
    ------
    FormatError
        A record is no array, or has another size than its header says.
    """
    rows = [row for row, text in enumerate(directory.names) if not text.endswith("/")]
    names = []
    for row in rows:
        text = directory.names[row]
        if not text.endswith(_SUFFIX):
            raise FormatError(
                f"{name}: record {short(text)}: expected arrays alone, whose records end in "
                f"{_SUFFIX!r}"
            )
        names.append(text[: -len(_SUFFIX)])
    records = directory.rows[rows]
    found = read_headers(read, records, names, name)
    which, refused, unread = found.which, {}, runs_of(directory, np.zeros(0, np.int64))
    if found.reasons:
        for i in np.flatnonzero(which < 0).tolist():
            refused[names[i]] = f"{name}: array {short(names[i])}{found.reasons[~which[i]]}"
        unread = runs_of(directory, np.array(rows, np.int64)[which < 0])
        kept = np.flatnonzero(which >= 0)
        names = [names[i] for i in kept.tolist()]
        records, which = records[kept], which[kept]
    lengths = np.array([head.nbytes for head in found.heads], np.int64)[which]
    sizes = np.array([head.size for head in found.heads], np.int64)[which]
    bad = np.flatnonzero(records["size"].astype(np.int64) != lengths + sizes)
    if len(bad):
        i = int(bad[0])
        raise FormatError(
            f"{name}: array {short(names[i])}: expected {sizes[i]} bytes of elements after "
            f"{lengths[i]} of the header at offset {int(records['offset'][i])}, found "
            f"{int(records['size'][i]) - lengths[i]}"
        )
    offsets = records["offset"] + lengths.astype(np.uint64)
    made = index_of(found.heads, which, offsets, names, directory.end)
    sums = np.array(found.sums, np.uint32)[which]
    _fill(made, records, sums, lengths.astype(np.uint64))
    made.format = "npz"
    # The checksums of the arrays' records are all that there is besides those of their elements.
    made.others = lambda: unread
    made.refused = refused
    return made


def _fill(index: Index, records: np.ndarray, sums: np.ndarray, lengths: np.ndarray) -> None:
    """Say how the storages stand in their records, and what their checksums are.

    That of a record is of header and elements together; what the header contributed is taken out.
    """
    storages = index.storages
    assert storages is not None
    packed = records["method"] != 0
    storages["packed"] = np.where(packed, records["packed"], 0)
    storages["skip"] = np.where(packed, lengths, 0)
    storages["offset"][packed] = records["offset"][packed]
    index.entries["offset"] = storages["offset"]
    storages["crc"] = records["crc"] ^ shift(sums, storages["nbytes"])
    storages["flags"] |= CHECKED


# -- writing -------------------------------------------------------------------------------------


def plan(
    names: list[str],
    batch: TensorBatch,
    *,
    framework: str | None,  # noqa: ARG001 - what is loaded are arrays
    metadata: Mapping[str, str] | None,
    structure: Mapping[int, str],
    checksum: bool,
    stem: str,  # noqa: ARG001
) -> Plan:
    """Lay out a file.

    Parameters
    ----------
    names : list of str
    batch : TensorBatch
    framework : str or None
        Nothing in the file says it.
    metadata : mapping of str to str, optional
        There is no place for any.
    structure : mapping of int to str
        What the dtype table does not say of some tensors.
    checksum : bool
        True: every reader of zip archives expects checksums.
    stem : str
        Nothing in the file says it.

    Raises
    ------
    TypeError
        A tensor of a type that no array of NumPy's can hold as bytes.
    ValueError
        A name that no record can have, or that NumPy takes for another; metadata.
    """
    if metadata:
        raise ValueError("metadata have no place in a .npz file; a .safetensors file has one")
    if not checksum:
        raise ValueError("a .npz file without checksums cannot be read by NumPy")
    _check_names(names)
    skeleton = Skeleton(
        [name + _SUFFIX for name in names],
        heads(names, batch, dict(structure), "a .npz file"),
        batch.views["nbytes"].astype(np.uint64),
    )
    return Plan(
        offsets=skeleton.offsets,
        size=skeleton.size,
        early=skeleton.nbytes < _EARLY,
        state=skeleton,
    )


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
    """The headers of all records, and the directory; see :class:`holdfast.formats.Writing`."""
    skeleton: Skeleton = plan.state
    assert plan.early is not None
    if crcs is None or len(crcs) != len(plan.offsets):
        raise ValueError(f"expected the checksums of {len(plan.offsets)} tensors")
    rows = np.flatnonzero(plan.early if early else ~plan.early)
    skeleton.stamp(rows, crcs[rows])
    return skeleton.pieces(None if early else rows)


def _check_names(names: list[str]) -> None:
    """Raise ValueError for names that cannot be those of records, or that NumPy confuses."""
    every = set(names)
    for name in names:
        member = name + _SUFFIX
        if (
            "\0" in name
            or "\\" in name
            or any(part in ("", ".", "..") for part in member.split("/"))
        ):
            raise ValueError(
                f"tensor {short(name)}: a record of a .npz file has to be called by a relative "
                "path without NUL, backslash and empty, '.' or '..' parts"
            )
        if member in every:
            raise ValueError(
                f"tensors {short(name)} and {short(member)}: numpy.load of a .npz file takes the "
                "one name for the other"
            )
    for first, second in itertools.pairwise(sorted(names)):
        if first == second:
            raise ValueError(f"tensor {short(first)}: the name is there twice")
