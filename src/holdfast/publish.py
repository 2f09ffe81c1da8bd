"""Where bytes go: a path, replaced whole or not at all, or a binary file object."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from . import _engine, _engine_py
from .layout import SEGMENT, Plan
from .progress import ProgressArgument, reporting
from .source import FileLike, is_path, path_text
from .views import DENSE, SWAPPED, TensorBatch

__all__ = ["check_target", "write_out"]

#: From this size on a file is written past the page cache whether or not it has to be durable.
LARGE = 256 << 20

Seal = Callable[[Plan, "np.ndarray | None"], bytes | bytearray]
Report = Callable[[int], object] | None


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be written behind the head: segments in the order of the file."""

    rows: np.ndarray  # which tensor of the batch each segment is
    segments: np.ndarray
    layouts: list[_engine.Layout]

    def crcs(self, plan: Plan) -> np.ndarray:
        """Checksums in the order of the batch; where there are no bytes, the CRC-32 of none: 0."""
        crcs = np.zeros(len(plan.offsets), np.uint32)
        crcs[self.rows] = self.segments["crc"]
        return crcs


def check_target(f: object) -> None:
    """Raise TypeError unless `f` is something that :func:`write_out` can write to."""
    if is_path(f):
        return
    if not hasattr(f, "write"):
        raise TypeError(
            f"f must be a path or a binary file object with write(), not {type(f).__name__}"
        )
    if isinstance(f, io.TextIOBase):
        raise TypeError(f"{path_text(f)}: a text file object; open it with mode 'wb'")


def write_out(
    f: FileLike,
    plan: Plan,
    batch: TensorBatch,
    seal: Seal,
    *,
    durable: bool,
    checksum: bool,
    threads: int,
    progress: ProgressArgument,
) -> None:
    """Write the tensors of `batch` where `plan` wants them, and before them what `seal` returns.

    To a path, the tensors are written first and the sealed bytes last, once the checksums are
    known; then the file gets its name. To a file object all is written in order, so the checksums
    are computed beforehand.
    """
    work = _segments(plan, batch)
    with reporting(progress, plan.size) as report:
        if is_path(f):
            path = cast("str | bytes | os.PathLike[str]", f)
            try:
                publication = _engine.Publication(path)
            except OSError as error:
                # A pipe or a device under this name: there is nothing to replace.
                if error.errno != errno.ESPIPE:
                    raise
            else:
                with publication:
                    _write_file(
                        publication,
                        path_text(f),
                        plan,
                        work,
                        seal,
                        # Past the page cache where the data have to reach the device anyway, or
                        # are so many that the cache only slows them.
                        direct=durable or plan.size >= LARGE,
                        checksum=checksum,
                        threads=threads,
                        report=report,
                    )
                    publication.commit(durable)
                return
            try:
                with open(path, "wb") as pipe:
                    _write_stream(pipe, plan, work, seal, checksum, report)
            except OSError as error:
                error.filename = path_text(f)
                raise
        else:
            _write_stream(cast(BinaryIO, f), plan, work, seal, checksum, report)


def _segments(plan: Plan, batch: TensorBatch) -> _Work:
    """The segments in the order of the file, and the layouts of those that are not dense."""
    views = batch.views
    rows = np.argsort(plan.offsets, kind="stable")
    rows = rows[views["nbytes"][rows] > 0]
    segments = np.zeros(len(rows), SEGMENT)
    segments["offset"] = plan.offsets[rows]
    segments["nbytes"] = views["nbytes"][rows]
    segments["address"] = views["address"][rows]
    odd = (views["flags"][rows] & (DENSE | SWAPPED)) != DENSE
    layouts: list[_engine.Layout] = []
    for i in np.flatnonzero(odd).tolist():
        layout = batch[int(rows[i])].layout()
        if layout is not None:
            layouts.append((i, *layout))
    return _Work(rows, segments, layouts)


def _write_file(
    publication: _engine.Publication,
    name: str,
    plan: Plan,
    work: _Work,
    seal: Seal,
    *,
    direct: bool,
    checksum: bool,
    threads: int,
    report: Report,
) -> None:
    """Write all of a publication's file."""
    _engine.write(
        publication.fd,
        work.segments,
        layouts=work.layouts,
        threads=threads,
        checksum=checksum,
        direct=direct,
        progress=report,
        filename=name,
    )
    head = seal(plan, work.crcs(plan) if checksum else None)
    _engine.write(publication.fd, _head_segment(head), checksum=False, direct=direct, filename=name)


def _head_segment(head: bytes | bytearray) -> np.ndarray:
    segment = np.zeros(1, SEGMENT)
    segment["nbytes"] = len(head)
    segment["address"] = np.frombuffer(head, np.uint8).ctypes.data
    return segment


def _write_stream(
    stream: BinaryIO,
    plan: Plan,
    work: _Work,
    seal: Seal,
    checksum: bool,
    report: Report,
) -> None:
    """Write everything in order to a file object that may not seek."""
    crcs = None
    if checksum:
        _engine_py.checksum(work.segments, layouts=work.layouts)
        crcs = work.crcs(plan)
    head = seal(plan, crcs)
    _engine_py.write_stream(stream, _head_segment(head), checksum=False)
    _engine_py.write_stream(
        stream, work.segments, layouts=work.layouts, checksum=False, progress=report
    )
