"""Symbolic links in folders of checkpoints."""

from __future__ import annotations

import os

from .errors import FormatError

__all__ = ["check_place"]

#: How many levels above a snapshot the ``blobs`` of the hub's cache may be: a revision's folder,
#: and folders in that.
_CACHE_LEVELS = 4


def check_place(name: str, folder: int, real: str) -> None:
    """Raise FormatError for a file that a link has brought in from anywhere.

    From the folder itself it may be, and from the ``blobs`` beside the snapshots in the cache of
    Hugging Face's hub.

    Parameters
    ----------
    name : str
        Of the file, for messages.
    folder : int
        A descriptor of the folder.
    real : str
        Where the file really is.
    """
    root = os.path.realpath(f"/proc/self/fd/{folder}")
    parent = os.path.dirname(real)
    above = root
    for _ in range(_CACHE_LEVELS):
        above = os.path.dirname(above)
        if parent == os.path.join(above, "blobs"):
            return
    if os.path.commonpath([root, real]) != root:
        raise FormatError(
            f"{name}: a link that leads out of the folder, to {real}; give the path of what it "
            "leads to"
        )
