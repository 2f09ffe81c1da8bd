"""A single array in a file of NumPy's: ``.npy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from ..layout import Index, Pieces, Plan
from ..views import TensorBatch
from . import Read
from ._npy_dtype import ObjectsError
from ._npy_header import MAGIC, PREFIX, heads, index_of, length, parse

__all__ = ["METADATA", "NEEDS_SIZE", "STRUCTURE", "index", "plan", "seal", "sniff"]

#: It holds one array and nothing else, not even a checksum.
STRUCTURE = "array"
METADATA = False
#: The header stands at the beginning.
NEEDS_SIZE = False

#: What the array is called where a name is wanted: as any tensor that is a whole object.
_NAME = "tensor"


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is of this format, sound or not."""
    return prefix.startswith(MAGIC)


def index(read: Read, size: int, name: str, *, verify: bool = True) -> Index:  # noqa: ARG001
    """Find the array of a file, of which ``read(offset, nbytes)`` returns the bytes.

    Raises
    ------
    FormatError
        The header is malformed, or the file has another size than it says.
    """
    if 0 <= size < PREFIX:
        raise FormatError(
            f"{name}: expected a .npy header of at least {PREFIX} bytes, found {size}"
        )
    nbytes = length(read(0, PREFIX), name)
    try:
        head = parse(bytes(read(0, nbytes)), name)
    except ObjectsError as error:
        raise FormatError(str(error)) from None
    end = nbytes + head.size
    if size not in (-1, end):
        raise FormatError(
            f"{name}: expected {head.size} bytes of elements at offset {nbytes}, found "
            f"{max(size - nbytes, 0)}: the file ends at {size}"
        )
    offset = np.array([nbytes], np.uint64)
    found = index_of([head], np.zeros(1, np.int64), offset, [_NAME], end)
    kind = head.element.kind
    found.tree = [0, kind] if kind else [0]
    found.format = "npy"
    return found


def plan(
    names: list[str],
    batch: TensorBatch,
    *,
    framework: str | None,  # noqa: ARG001 - what is loaded are arrays
    metadata: Mapping[str, str] | None,
    structure: Mapping[int, str],
    checksum: bool,  # noqa: ARG001 - there is no place for one
    stem: str,  # noqa: ARG001
) -> Plan:
    """Lay out a file. See :func:`.npz.plan`; there is one tensor."""
    if metadata:
        raise ValueError("metadata have no place in a .npy file")
    (head,) = heads(names, batch, dict(structure), "a .npy file")
    return Plan(
        offsets=np.array([len(head)], np.uint64),
        size=len(head) + int(batch.views["nbytes"][0]),
        state=head,
    )


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:  # noqa: ARG001
    """The header."""
    head: Any = plan.state
    return Pieces.one(head, 0)
