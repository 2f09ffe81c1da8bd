"""Checking a file against the checksums that were written with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import fetch
from .checkpoint import Reader
from .errors import FormatError
from .source import FileLike, open_source

__all__ = ["Report", "verify_file"]


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`holdfast.verify` found.

    Attributes
    ----------
    problems : list of str
        What is wrong, each with the file, the tensor and the place. Empty for a sound file.
    checked : int
        How many tensors had a checksum, which was compared.
    unchecked : int
        How many had none: another program wrote the file, or ``checksum=False`` did.
    """

    problems: list[str]
    checked: int
    unchecked: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. A file without checksums can only be right in its structure."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok


def verify_file(f: FileLike, *, threads: int) -> Report:
    """What :func:`holdfast.verify` does."""
    source = open_source(f)
    try:
        reader = Reader(source)
    except FormatError as error:
        return Report([str(error)], 0, 0)
    with reader:
        index = reader.index
        rows = np.arange(len(index), dtype=np.int64)
        if index.crcs is None:
            return Report([], 0, len(index))
        segments = fetch.segments_of(index, rows)
        try:
            fetch.move(source, segments, verify=True, threads=threads)
        except FormatError as error:
            return Report([str(error)], 0, len(index))
        bad = np.flatnonzero(segments["crc"] != index.crcs).tolist()
        problems = [
            fetch.mismatch(source.name, index, row, int(segments["crc"][row])) for row in bad
        ]
        return Report(problems, len(index), 0)
