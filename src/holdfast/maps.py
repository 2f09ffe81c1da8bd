"""Files mapped into memory: where their bytes are, and what keeps them there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ._buffer import Buffer

__all__ = ["Maps"]

#: How many stretches of the maps of a checkpoint may be marked, each of which may make two more
#: maps of one; a process may have 65,530.
MARKS = 1 << 14


@dataclass(frozen=True, slots=True)
class Maps:
    """The files of a checkpoint, mapped into memory.

    Attributes
    ----------
    buffers : list of Buffer
    owner : ndarray of int64 or None
        Which of them is the map of each file; -1 for a file that is not mapped. None for a
        checkpoint that is a single file.
    marks : iterator
        Has one more for each stretch that may still be marked.
    """

    buffers: list[Buffer]
    owner: np.ndarray | None = None
    marks: Iterator[int] = field(default_factory=lambda: iter(range(MARKS)), compare=False)

    def has(self, file: np.ndarray) -> np.ndarray | None:
        """Which of these files are mapped; None for all."""
        return None if self.owner is None else self.owner[file] >= 0

    def place(self, offset: np.ndarray, file: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Where bytes of the files are in memory, and in which of the buffers.

        Returns
        -------
        address : ndarray of uint64
            Meaningless for files that are not mapped.
        owner : ndarray of int64 or None
            None: all in the first.
        """
        if self.owner is None:
            return offset + np.uint64(self.buffers[0].address), None
        starts = np.array([buffer.address for buffer in self.buffers] + [0], np.uint64)
        owner = self.owner[file]
        return offset + starts[owner], owner

    def of(self, file: int) -> Buffer | None:
        """The map of this file, if it is mapped."""
        if self.owner is None:
            return self.buffers[0]
        owner = int(self.owner[file])
        return self.buffers[owner] if owner >= 0 else None

    def cover(self, address: np.ndarray) -> np.ndarray:
        """Which of these addresses are in a map."""
        if not self.buffers:
            return np.zeros(len(address), bool)
        starts = np.array([buffer.address for buffer in self.buffers], np.uint64)
        ends = np.array([buffer.address + len(buffer) for buffer in self.buffers], np.uint64)
        order = np.argsort(starts)
        at = np.searchsorted(starts[order], address, side="right") - 1
        found: np.ndarray = (at >= 0) & (address < ends[order][at])
        return found
