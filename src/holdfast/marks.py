"""Loads in several calls of the engine: whether one came before, and a note that this one did.

A load in one call leaves that to the engine; ``csrc/uncached.h`` says what the note is.
"""

from __future__ import annotations

import contextlib

import numpy as np

from . import _engine
from .ahead import has_room
from .folder import Origin

__all__ = ["Load"]


class Load:
    """One load of files, from before the first call until after the last.

    Parameters
    ----------
    source : Source or FolderSource
    segments : ndarray of SEGMENT
        All that is going to be read.

    Attributes
    ----------
    fill : int
        For the calls of the engine: ``FILL_NOW`` where the files were loaded before and ought to be
        in the page cache from now on, else ``FILL_NEVER``.
    """

    def __init__(self, source: Origin, segments: np.ndarray) -> None:
        self._source = source
        self._new: list[int] = []  # files that were not loaded before
        self.fill = _engine.FILL_NEVER
        if not source.mappable or not has_room(segments):
            return
        files, inverse = np.unique(segments["file"], return_inverse=True)
        wanted = np.bincount(inverse, segments["nbytes"]).astype(np.int64)
        known = False
        for file, nbytes in zip(files.tolist(), wanted.tolist(), strict=True):
            before = None
            if nbytes >= _engine.MARK_LEAST:
                with contextlib.suppress(OSError):  # whoever reads will say what is wrong with it
                    before = _engine.loaded_before(source.at(file).fd, nbytes)
            known |= before is True
            if before is False:
                self._new.append(file)
        if known and not self._new:
            self.fill = _engine.FILL_NOW

    def done(self) -> None:
        """All of it was read."""
        for file in self._new:
            with contextlib.suppress(OSError):  # of a file that is gone there is nothing to note
                _engine.mark_loaded(self._source.at(file).fd)
