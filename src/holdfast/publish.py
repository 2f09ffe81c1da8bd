"""Where bytes go: a path, replaced whole or not at all, or a binary file object."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import numpy as np

from . import _engine, _engine_py
from .layout import SEGMENT, Pieces, Plan
from .pace import Pace
from .progress import ProgressArgument, reporting
from .source import FileLike, is_path, path_text
from .views import DENSE, SWAPPED, TensorBatch, pick_layouts

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["check_target", "segments_of", "write_out"]

#: From this size on a file that need not be durable is written past the page cache where that takes
#: fewer than so many bytes a second and the device more, which changes from minute to minute
#: (docs/decisions/0005).
LARGE = 64 << 20
ENOUGH = 4e9
PAGE = 4096
#: ``file`` of a segment whose memory is that of a map to be let go of: ``HOLD_RELEASE``.
RELEASE = 1

#: A segment as bytes, which NumPy moves all at once rather than field by field.
_ROW = np.dtype((np.void, SEGMENT.itemsize))

Report = Callable[[int], object] | None
#: Given segments in host memory, their layouts, and how many bytes came before them.
Act = Callable[[np.ndarray, "Sequence[_engine.Layout]", int], None]
#: Given the checksums of all tensors, raises where they are not what they should be.
Check = Callable[[np.ndarray], None] | None


class Sealer(Protocol):
    """What a format makes of a plan once checksums are known (``Format.seal``)."""

    def __call__(self, plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """The tensors to be written: segments in the order of the file."""

    rows: np.ndarray  # which tensor of the batch each segment is
    segments: np.ndarray
    layouts: list[_engine.Layout]
    devices: np.ndarray | None  # where the memory of each segment is; None: all the host's
    staging: Staging | None

    def crcs(self, plan: Plan) -> np.ndarray:
        """Checksums in the order of the batch; where there are no bytes, the CRC-32 of none: 0."""
        crcs = np.zeros(len(plan.offsets), np.uint32)
        crcs[self.rows] = self.segments["crc"]
        return crcs

    def summed(self, chosen: np.ndarray | None, threads: int, name: str) -> None:
        """Compute the checksums of the tensors that `chosen` says, or of all."""

        def act(part: np.ndarray, layouts: Sequence[_engine.Layout], _: int) -> None:
            _engine.checksum(part, layouts=layouts, threads=threads, filename=name)

        if chosen is None or chosen.all():
            self._on_host(self.segments, self.layouts, self.devices, act)
            return
        picked = np.flatnonzero(chosen[self.rows])
        part = self.segments[picked]
        devices = None if self.devices is None else self.devices[picked]
        self._on_host(part, pick_layouts(self.layouts, picked), devices, act)
        self.segments["crc"][picked] = part["crc"]

    def among(self, pieces: Pieces) -> tuple[_Work, np.ndarray]:
        """The tensors and `pieces` in one row of segments, and which of those are the tensors."""
        own = segments_of(pieces)
        n = len(self.segments)
        # Both are in the order of the file, so each goes where it is plus how many go before it.
        place = np.arange(n) + np.searchsorted(own["offset"], self.segments["offset"])
        is_tensor = np.zeros(n + len(own), np.bool_)
        is_tensor[place] = True
        both = np.empty(n + len(own), SEGMENT)
        whole = both.view(_ROW)
        whole[is_tensor], whole[~is_tensor] = self.segments.view(_ROW), own.view(_ROW)
        layouts = [(int(place[layout[0]]), *layout[1:]) for layout in self.layouts]
        devices = None
        if self.devices is not None:
            devices = np.zeros(len(both), np.int32)
            devices[is_tensor] = self.devices
        return _Work(place, both, layouts, devices, self.staging), is_tensor

    def each(self, act: Act) -> None:
        """Do `act` to the segments in host memory: to all at once, or as they come from devices."""
        self._on_host(self.segments, self.layouts, self.devices, act)

    def _on_host(
        self,
        segments: np.ndarray,
        layouts: Sequence[_engine.Layout],
        devices: np.ndarray | None,
        act: Act,
    ) -> None:
        if devices is None:
            act(segments, layouts, 0)
            return
        from . import staging

        done = 0
        parts = staging.to_host(segments, devices, layouts=layouts, staging=self.staging)
        with contextlib.closing(parts):
            for part in parts:
                act(part.segments, part.layouts, done)
                part.join(segments)
                done += int(part.segments["nbytes"].sum())


def segments_of(pieces: Pieces) -> np.ndarray:
    """Segments of the pieces of a format. They are valid while the pieces live."""
    segments = np.zeros(len(pieces.offset), SEGMENT)
    base = np.frombuffer(pieces.data, np.uint8).ctypes.data if len(pieces.data) else 0
    segments["offset"] = pieces.offset
    segments["nbytes"] = pieces.nbytes
    segments["address"] = pieces.start.astype(np.uint64) + np.uint64(base)
    return segments


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
    seal: Sealer,
    *,
    durable: bool,
    checksum: bool,
    threads: int,
    progress: ProgressArgument,
    release: np.ndarray | None = None,
    check: Check = None,
    blank: bool = False,
    staging: Staging | None = None,
) -> None:
    """Write the tensors of `batch` where `plan` wants them, and before them what `seal` returns.

    To a path, the tensors are written first and the sealed bytes last, once the checksums are
    known; then the file gets its name. To a file object all is written in order, so the checksums
    are computed beforehand.

    Rows of the batch that `release` says are memory of unchanged maps, of which what has been
    written is let go, so that the memory taken does not grow with the file. `check` is given the
    checksums of all rows before the file gets its name; to raise there is to leave all as it was.
    With `blank` only the format's own bytes are written, with room for the tensors between them.
    Tensors in the memory of devices come to the host as `staging` says.
    """
    work = _segments(plan, batch, staging)
    if release is not None:
        work.segments["file"] = np.where(release[work.rows], RELEASE, 0)
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
                    if blank:
                        _write_blank(publication, plan, seal)
                        publication.commit(durable)
                        return
                    _write_file(
                        publication,
                        path_text(f),
                        plan,
                        work,
                        seal,
                        # Past the page cache where the data have to reach the device anyway; so
                        # many that the cache may only slow them, in whichever way is faster.
                        direct=durable or (None if plan.size >= LARGE else False),
                        checksum=checksum,
                        threads=threads,
                        report=report,
                        check=check,
                    )
                    publication.commit(durable)
                return
            try:
                with open(path, "wb") as pipe:
                    _write_stream(pipe, plan, work, seal, checksum, report, check)
            except OSError as error:
                error.filename = path_text(f)
                raise
        elif blank:
            _write_blank(cast(BinaryIO, f), plan, seal)
        else:
            _write_stream(cast(BinaryIO, f), plan, work, seal, checksum, report, check)


def _segments(plan: Plan, batch: TensorBatch, staging: Staging | None) -> _Work:
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
    devices = None if batch.devices is None else batch.devices[rows]
    return _Work(rows, segments, layouts, devices, staging)


def _write_file(
    publication: _engine.Publication,
    name: str,
    plan: Plan,
    work: _Work,
    seal: Sealer,
    *,
    direct: bool | None,
    checksum: bool,
    threads: int,
    report: Report,
    check: Check,
) -> None:
    """Write all of a publication's file: the tensors, and what stands around them.

    Bytes of the format's own that wait for the checksum of a tensor are written last.
    """
    whole, tensors = work, None
    first, summing = None, checksum
    if plan.early is not None:
        if checksum:
            work.summed(plan.early, threads, name)
            summing = not plan.early.all()
        first = seal(plan, work.crcs(plan) if checksum else None, early=True)
        whole, tensors = work.among(first)
    pace = Pace(direct)

    def write(part: np.ndarray, layouts: Sequence[_engine.Layout], done: int) -> None:
        begun = time.perf_counter()
        _engine.write(
            publication.fd,
            part,
            layouts=layouts,
            threads=threads,
            checksum=summing or check is not None,
            # What comes in parts is too little at a time for the engine to find out.
            direct=direct if whole.devices is None else pace.direct,
            enough=ENOUGH,
            size=plan.size,
            progress=_behind(report, done),
            filename=name,
        )
        pace.saw(int(part["nbytes"].sum()), time.perf_counter() - begun)

    whole.each(write)
    del first  # its bytes had to live until here
    if tensors is not None:
        work.segments["crc"] = whole.segments["crc"][tensors]
    if check is not None:
        check(work.crcs(plan))
    last = seal(plan, work.crcs(plan) if checksum else None)
    rest = segments_of(last)
    for i in range(len(rest)):
        _engine.write(
            publication.fd,
            rest[i : i + 1],
            checksum=False,
            # A few bytes between others are cheapest patched in the page cache.
            direct=bool(direct) and int(rest["offset"][i]) % PAGE == 0,
            filename=name,
        )


def _behind(report: Report, done: int) -> Report:
    """Progress of a part that so many bytes came before."""
    return report if report is None or not done else lambda more: report(done + more)


def _write_blank(target: _engine.Publication | BinaryIO, plan: Plan, seal: Sealer) -> None:
    """Write what stands around the tensors, and nothing of them: holes, or zeros to a stream."""
    pieces = seal(plan, None, early=plan.early is not None)
    segments = segments_of(pieces)
    done = 0
    for i in range(len(segments)):
        part = segments[i : i + 1]
        if isinstance(target, _engine.Publication):
            name = os.fsdecode(target.path)
            _engine.write(target.fd, part, checksum=False, filename=name)
            continue
        offset, nbytes = int(part["offset"][0]), int(part["nbytes"][0])
        while done < offset:
            zeros = bytes(min(offset - done, 1 << 20))
            target.write(zeros)
            done += len(zeros)
        _engine_py.write_stream(target, part, checksum=False)
        done = offset + nbytes


def _write_stream(
    stream: BinaryIO,
    plan: Plan,
    work: _Work,
    seal: Sealer,
    checksum: bool,
    report: Report,
    check: Check,
) -> None:
    """Write everything in order to a file object that may not seek."""
    if checksum or check is not None:
        work.summed(None, 0, path_text(stream))
    if check is not None:
        check(work.crcs(plan))
    crcs = work.crcs(plan) if checksum else None
    parts = [seal(plan, crcs, early=True)] if plan.early is not None else []
    parts.append(seal(plan, crcs))
    # Of pieces that were handed out twice, the later one is complete.
    found = {int(s["offset"]): s for pieces in parts for s in segments_of(pieces)}
    own = np.array(list(found.values()), SEGMENT)
    both = np.concatenate([work.segments, own])
    order = np.argsort(both["offset"], kind="stable")
    devices = None
    if work.devices is not None:
        devices = np.concatenate([work.devices, np.zeros(len(own), np.int32)])[order]
    layouts = pick_layouts(work.layouts, order)
    whole = _Work(order, both[order], layouts, devices, work.staging)

    def write(part: np.ndarray, layouts: Sequence[_engine.Layout], done: int) -> None:
        _engine_py.write_stream(
            stream, part, layouts=layouts, checksum=False, progress=_behind(report, done)
        )

    whole.each(write)
