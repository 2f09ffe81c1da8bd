"""A folder of tensors, one file for each: filled under a temporary name, published whole."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from . import _engine
from .layout import SEGMENT, FolderPlan
from .progress import ProgressArgument, reporting
from .publish import RELEASE
from .source import path_text
from .views import DENSE, SWAPPED, TensorBatch

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["write_folder"]

#: Up to this size a dense tensor is written in one go with many others, each by one thread.
SMALL = 1 << 20
#: From so many bytes on what need not be durable is written in both ways at once.
LARGE = 256 << 20

#: Files written at once: past the page cache each waits for the device; through it memory is what
#: limits, and more would be in each other's way. As in csrc/write.c for parts of one file.
DIRECT_WORKERS = 6
BUFFERED_WORKERS = 2

Report = Callable[[int], object] | None


@dataclass(frozen=True, slots=True)
class _Files:
    """Small files, sorted by folder: what ``write_files`` takes."""

    folders: list[bytes]
    names: list[bytes]
    first: np.ndarray
    address: np.ndarray
    nbytes: np.ndarray
    owner: bytes  # in which the texts among them are


@dataclass(slots=True)
class _Progress:
    """Bytes over several transfers, each of which counts its own from 0."""

    report: Report
    before: int = 0

    def part(self) -> Report:
        """What to hand to the next transfer."""
        report, before = self.report, self.before
        return None if report is None else lambda done: report(before + done)


def write_folder(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    plan: FolderPlan,
    batch: TensorBatch,
    *,
    durable: bool,
    threads: int = 0,
    progress: ProgressArgument = None,
    replace: bool | Callable[[int], bool] = True,
    release: np.ndarray | None = None,
    staging: Staging | None = None,
) -> None:
    """Write each tensor of `batch` to a file of its own, and the plan's texts beside them.

    Nothing can be seen under `path` until all is written; then it is a folder of exactly those
    files, whatever was there before.

    Parameters
    ----------
    path : path
        Of the folder; the one that it is in exists.
    plan : FolderPlan
    batch : TensorBatch
    durable : bool
        Whether everything is on the device before the folder gets its name, and that before this
        returns.
    threads : int
        0: the engine chooses.
    progress : callable or True, optional
    replace : bool or callable
        Whether a folder of that name with something in it may be replaced; or what says so, given
        a descriptor of it. That is asked before anything is written, and again when all is: no
        other folder is replaced than the one about which it was asked then.
    release : ndarray of bool, optional
        Rows of the batch that are memory of unchanged maps, of which what has been written is let
        go. Small ones are not.
    staging : Staging, optional
        How tensors in the memory of devices come to the host.

    Raises
    ------
    FileExistsError
        There is such a folder, and not `replace`. Or two of the plan's paths are the same file.
    NotADirectoryError
        There is something else under that name.
    """
    name = path_text(path)
    nbytes = batch.views["nbytes"]
    dense = (batch.views["flags"] & (DENSE | SWAPPED)) == DENSE
    staged = np.zeros(len(batch), bool)
    if batch.devices is not None:
        staged = (batch.devices != 0) & (nbytes > 0)
    small = ((dense & (nbytes <= SMALL)) | (nbytes == 0)) & ~staged
    texts = {key: text for key, text in plan.texts.items() if key != plan.last}
    total = int(nbytes.sum()) + sum(map(len, plan.texts.values()))
    ask = replace if callable(replace) else None
    with (
        reporting(progress, total) as report,
        _engine.FolderPublication(path, replace=bool(replace)) as publication,
    ):
        # Not before it has begun, which puts back what a process that died has moved away.
        if ask is not None:
            publication.ask(ask)
        so_far = _Progress(report)
        few = _gathered(plan, batch, np.flatnonzero(small), texts)
        _write_small(publication.fd, few, threads, so_far, name)
        writer = _Writer(publication.fd, name, plan, batch, threads, so_far, release)
        writer.write_all(np.flatnonzero(~small & ~staged), durable)
        writer.write_staged(np.flatnonzero(staged), durable, staging)
        if plan.last is not None:
            last = _gathered(plan, batch, np.arange(0), {plan.last: plan.texts[plan.last]})
            _write_small(publication.fd, last, threads, so_far, name)
        publication.commit(durable, ask)


def _gathered(
    plan: FolderPlan, batch: TensorBatch, rows: np.ndarray, texts: dict[str, bytes]
) -> _Files:
    """The tensors in `rows`, and `texts`, by the folders that they are in."""
    paths = _encoded([*(plan.paths[i] for i in rows.tolist()), *texts])
    own = np.array([len(text) for text in texts.values()], np.uint64)
    owner = b"".join(texts.values())
    base = np.frombuffer(owner or b"\0", np.uint8).ctypes.data
    starts = np.cumsum(own, dtype=np.uint64) - own + np.uint64(base)
    address = np.concatenate([batch.views["address"][rows], starts])
    nbytes = np.concatenate([batch.views["nbytes"][rows], own])
    parts = [path.rpartition(b"/") for path in paths]
    for path, (head, slash, _) in zip(paths, parts, strict=True):
        if slash and not head:
            raise ValueError(f"{os.fsdecode(path)!r} is not a path inside a folder: it is absolute")
    numbers: dict[bytes, int] = {}
    folder = np.array([numbers.setdefault(part[0], len(numbers)) for part in parts], np.int64)
    order = np.argsort(folder, kind="stable")
    return _Files(
        list(numbers),
        [parts[i][2] for i in order.tolist()],
        np.searchsorted(folder[order], np.arange(len(numbers) + 1)),
        address[order],
        nbytes[order],
        owner,
    )


def _encoded(paths: list[str]) -> list[bytes]:
    """Paths as the system has them, all in one go."""
    if not paths:
        return []
    encoded = os.fsencode("\0".join(paths)).split(b"\0")
    if len(encoded) != len(paths):
        raise ValueError(f"embedded null byte in path {next(p for p in paths if chr(0) in p)!r}")
    return encoded


def _write_small(fd: int, files: _Files, threads: int, so_far: _Progress, name: str) -> None:
    _engine.write_files(
        fd,
        files.folders,
        files.names,
        files.first,
        files.address,
        files.nbytes,
        threads=threads,
        progress=so_far.part(),
        filename=name,
    )
    so_far.before += int(files.nbytes.sum())


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes tensors that are large, or not dense, each to a file of its own."""

    fd: int
    name: str
    plan: FolderPlan
    batch: TensorBatch
    threads: int
    so_far: _Progress
    release: np.ndarray | None

    def write_all(self, rows: np.ndarray, durable: bool) -> None:
        """Write these rows of the batch, the largest first."""
        nbytes = self.batch.views["nbytes"][rows].astype(np.int64)
        order = np.argsort(-nbytes, kind="stable")
        rows, nbytes = rows[order], nbytes[order]
        total = int(nbytes.sum())
        workers = self.threads or DIRECT_WORKERS
        # One that would keep a single worker busy when the others are through is all of theirs.
        alone = int(np.count_nonzero(nbytes > total // workers)) if workers > 1 else 0
        if durable:
            ways = [True] * (self.threads or DIRECT_WORKERS)
        elif total < LARGE:
            ways = [False] * (self.threads or BUFFERED_WORKERS)
        else:
            few = min(BUFFERED_WORKERS, self.threads - 1) if self.threads else BUFFERED_WORKERS
            ways = [True] * ((self.threads or DIRECT_WORKERS + few) - few) + [False] * few
        self.write_side_by_side(rows[:alone].tolist(), rows[alone:].tolist(), ways)

    def write_side_by_side(self, alone: list[int], rows: list[int], ways: list[bool]) -> None:
        """Write rows from several threads at once, each file by one of them.

        Parameters
        ----------
        alone : list of int
            Rows that come first, each by as many threads as there are.
        rows : list of int
            The others, the largest first.
        ways : list of bool
            For each thread, whether it writes past the page cache. That is as fast as the device,
            always; through the cache as fast as the kernel finds pages, which changes from minute
            to minute. Where there are threads of both kinds, both are busy at once: those take the
            largest file that is left, the others the smallest, for as long as it is likely to be
            done before the rest is (docs/decisions/0011).
        """
        sizes = self.batch.views["nbytes"]
        total = int(sizes[alone].sum()) + int(sizes[rows].sum())
        ways = ways[: max(1, len(rows) + bool(alone))]
        waiting = deque(rows)
        moved = [0] * len(ways)
        failures: list[BaseException] = []
        cleared = threading.Event()

        def next_row(rank: int) -> int | None:
            try:
                if ways[rank] or True not in ways:
                    return waiting.popleft()
                # Bytes so far, in the same time: those that go past the cache bound the rest.
                own, past = moved[rank], sum(compress(moved, ways))
                if int(sizes[waiting[-1]]) * past > own * (total - sum(moved)) and own:
                    return None
                return waiting.pop()
            except IndexError:  # another took the last one
                return None

        def work(rank: int) -> None:
            report = self.so_far.part() if rank == 0 else None
            try:
                if rank == 0:
                    for row in alone:
                        before = moved[0]
                        counted = partial(count, 0, before, report)
                        self.write_one(row, self.threads, ways[0], counted)
                        moved[0] = before + int(sizes[row])
                    cleared.set()
                elif ways[rank] == ways[0]:
                    cleared.wait()
                while not failures:
                    chosen = next_row(rank)
                    if chosen is None:
                        break
                    before = moved[rank]
                    self.write_one(chosen, 1, ways[rank], partial(count, rank, before, report))
                    moved[rank] = before + int(sizes[chosen])
            except BaseException as error:
                failures.append(error)
            finally:
                if rank == 0:
                    cleared.set()

        def count(rank: int, before: int, report: Report, done: int) -> None:
            moved[rank] = before + done
            if failures:
                raise failures[0]
            if report is not None:
                report(sum(moved))

        crew = [threading.Thread(target=work, args=(rank,)) for rank in range(1, len(ways))]
        started = []
        try:
            for thread in crew:
                thread.start()
                started.append(thread)
        except RuntimeError:
            pass  # there can be no more of them: fewer do the work
        work(0)
        for thread in started:
            while thread.is_alive():
                try:
                    thread.join()
                except BaseException as error:  # which stops the others, too
                    failures.append(error)
        if failures:
            raise failures[0]
        self.so_far.before += total

    def write_staged(self, rows: np.ndarray, durable: bool, settings: Staging | None) -> None:
        """Write rows that are in the memory of devices, as they come to the host.

        Small ones go many at a time; of a larger one each part to where it belongs.
        """
        if not len(rows):
            return
        from . import staging

        batch = self.batch
        assert batch.devices is not None
        segments = np.zeros(len(rows), SEGMENT)
        segments["file"] = np.arange(len(rows))
        segments["nbytes"] = batch.views["nbytes"][rows]
        segments["address"] = batch.views["address"][rows]
        layouts = [
            (i, *layout)
            for i, layout in enumerate(batch[row].layout() for row in rows.tolist())
            if layout is not None
        ]
        parts = staging.to_host(segments, batch.devices[rows], layouts=layouts, staging=settings)
        arrived = TensorBatch(batch.views.copy(), batch.dims, batch.owners)
        with closing(parts), ExitStack() as files:
            current, fd = -1, -1
            for part in parts:
                own = part.segments
                whole = (own["nbytes"] == segments["nbytes"][part.rows]) & (own["nbytes"] <= SMALL)
                few = rows[part.rows[whole]]
                arrived.views["address"][few] = own["address"][whole]
                if len(few):
                    gathered = _gathered(self.plan, arrived, few, {})
                    _write_small(self.fd, gathered, self.threads, self.so_far, self.name)
                for i in np.flatnonzero(~whole).tolist():
                    row = int(rows[part.rows[i]])
                    path = self.plan.paths[row]
                    if row != current:
                        files.close()
                        current, fd = row, files.enter_context(_created(self.fd, path, self.name))
                    piece = own[i : i + 1].copy()
                    piece["file"] = 0  # to the engine it says whether to let go of the memory
                    _engine.write(
                        fd,
                        piece,
                        threads=self.threads,
                        checksum=False,
                        direct=durable,
                        progress=self.so_far.part(),
                        filename=os.path.join(self.name, path),
                    )
                    self.so_far.before += int(own["nbytes"][i])

    def write_one(self, row: int, threads: int, direct: bool | None, progress: Report) -> None:
        """Write one file."""
        path = self.plan.paths[row]
        segment = np.zeros(1, SEGMENT)
        segment["nbytes"] = self.batch.views["nbytes"][row]
        segment["address"] = self.batch.views["address"][row]
        segment["file"] = RELEASE if self.release is not None and self.release[row] else 0
        layout = self.batch[row].layout()
        with _created(self.fd, path, self.name) as fd:
            _engine.write(
                fd,
                segment,
                layouts=[(0, *layout)] if layout is not None else None,
                threads=threads,
                checksum=False,
                direct=direct,
                progress=progress,
                filename=os.path.join(self.name, path),
            )


@contextmanager
def _created(dirfd: int, path: str, name: str) -> Iterator[int]:
    """A new file in a folder, closed at the end."""
    fd = _engine.create_beneath(dirfd, os.fsencode(path), filename=name)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        raise
    try:
        os.close(fd)  # network file systems may say only now what could not be written
    except OSError as error:
        error.filename = os.path.join(name, path)
        raise
