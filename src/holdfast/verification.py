"""Checking a file against the checksums that were written with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import fetch, storages
from .errors import FormatError
from .folder import Origin, open_origin
from .layout import CHECKED, Index
from .reader import Reader
from .replaced import ReplacedError, again
from .source import FileLike

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
    try:
        return _verify_file(f, threads)
    except ReplacedError as error:
        return Report([str(error)], 0, 0)


@again
def _verify_file(f: FileLike, threads: int) -> Report:
    tensors = 0
    try:
        with Reader(open_origin(f), strict=True) as reader:
            tensors = len(reader.index)
            if reader.index.storages is not None:
                return _verify_storages(reader.source, reader.index, threads)
            return _verify_tensors(reader.source, reader.index, threads)
    except ReplacedError:
        raise
    except FormatError as error:
        return Report([str(error)], 0, tensors)


def _verify_tensors(source: Origin, index: Index, threads: int) -> Report:
    """What is wrong with the tensors of a file whose checksums are those of each."""
    if index.crcs is None:
        return Report([], 0, len(index))
    rows = np.arange(len(index), dtype=np.int64)
    segments = fetch.segments_of(index, rows)
    fetch.move(source, segments, verify=True, threads=threads)
    has, expected = fetch.expected_crcs(index, rows)
    bad = np.flatnonzero(has & (segments["crc"] != expected)).tolist()
    problems = [fetch.mismatch(source.name, index, row, int(segments["crc"][row])) for row in bad]
    checked = int(has.sum())
    return Report(problems, checked, len(index) - checked)


def _verify_storages(source: Origin, index: Index, threads: int) -> Report:
    """The same for a file whose checksums are those of storages."""
    assert index.storages is not None
    assert index.storage is not None
    which = np.arange(len(index.storages), dtype=np.int64)
    has = (index.storages["flags"] & CHECKED) != 0
    checked = int(has[index.storage].sum())
    found = storages.checksums(source, index, which[has], fetch.move, threads=threads)
    problems = storages.differing(source.name, index, which[has], found)
    problems += _verify_others(source, index, threads)
    return Report(problems, checked, len(index) - checked)


def _verify_others(source: Origin, index: Index, threads: int) -> list[str]:
    """What is wrong with the parts of a file that no tensor is made of."""
    if index.others is None:
        return []
    rows, names = index.others()
    parts = replace(index, storages=rows)
    which = np.arange(len(rows), dtype=np.int64)
    found = storages.checksums(source, parts, which, fetch.move, threads=threads)
    return [
        f"{source.name}: record {names[i]!r}: the {int(rows['nbytes'][i])} bytes at offset "
        f"{int(rows['offset'][i])} are damaged: expected CRC-32 {int(rows['crc'][i]):08x}, "
        f"found {int(found[i]):08x}"
        for i in np.flatnonzero(rows["crc"] != found).tolist()
    ]
