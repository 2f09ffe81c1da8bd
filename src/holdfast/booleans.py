"""Elements of type bool that are neither 0 nor 1, which a file may hold and no program expects.

NumPy and PyTorch take any other byte for true in most of what they do and for itself in some;
compiled code may do anything with one. Here it becomes 1 before a framework sees it.
"""

from __future__ import annotations

import numpy as np

from .dtypes import BY_NAME, DTYPES
from .layout import Index
from .views import TensorBatch, TensorView, elements

__all__ = ["BOOL", "settle", "settle_bytes", "settle_view"]

BOOL = BY_NAME["bool"].code


def settle(index: Index, batch: TensorBatch) -> TensorBatch:
    """`batch`, with every element of type bool made 0 or 1 where it stands.

    Nothing is written where there is nothing to mend, so that pages of a private map stay those of
    the file.

    Parameters
    ----------
    index : Index
        What the batch was brought into memory by.
    batch : TensorBatch
        Writable, and nobody else's: no map that is shared. In the memory of a device there is
        nothing to do: it was done on the way there (:func:`settle_bytes`).
    """
    for row in np.flatnonzero(batch.views["dtype"] == BOOL).tolist():
        view = batch[row]
        if not view.owner.device:  # type: ignore[attr-defined]
            settle_view(view)
    found = batch.storages
    if found is not None and index.storages is not None:
        # A storage may be there by itself, or have more elements than its tensors.
        typed = (index.storages["dtype"] == BOOL) & (found.address > 0) & (found.nbytes > 0)
        for row in np.flatnonzero(typed).tolist():
            owner = found.owners[int(found.owner[row])]
            if not owner.device:  # type: ignore[attr-defined]
                settle_bytes(int(found.address[row]), int(found.nbytes[row]))
    return batch


def settle_view(view: TensorView) -> None:
    """Make every element of one tensor 0 or 1, if its type is bool and its memory the host's."""
    if view.dtype.code == BOOL and view.nbytes and not view.device:
        found = elements(view, "|u1")
        if found.max() > 1:
            np.minimum(found, 1, out=found)


def settle_bytes(address: int, nbytes: int) -> None:
    """Make every byte of some memory of the host, all of it of type bool, 0 or 1."""
    settle_view(TensorView(DTYPES[BOOL], (nbytes,), address, None))
