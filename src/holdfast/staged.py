"""Reading into the memory of devices: parts that the engine fills while others are on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial as bind
from typing import TYPE_CHECKING

import numpy as np

from . import staging
from .booleans import settle_bytes
from .folder import Origin
from .source import Source

if TYPE_CHECKING:
    from .staging import Part, Staging

__all__ = ["move_staged"]

#: Parts that are filled at a time: what Python does between two calls of the engine, and what the
#: engine's threads take to start and to end, then passes while the other part is filled.
FILLERS = 2
#: Fewer bytes are filled one part at a time: there are hardly two of them.
FILLERS_FROM = 64 << 20

Progress = Callable[[int], object]


def move_staged(
    source: Origin,
    segments: np.ndarray,
    devices: np.ndarray,
    booleans: np.ndarray | None,
    settings: Staging | None,
    *,
    verify: bool,
    fill: int,
    threads: int,
    progress: Progress | None,
) -> None:
    """Read segments in the order of the files, some into memory of devices.

    See :func:`holdfast.fetch.move`.
    """
    several = (
        not (isinstance(source, Source) and source.fd < 0)  # a file object stands at one place
        and threads != 1
        and int(segments["nbytes"][devices != 0].sum()) >= FILLERS_FROM
    )
    threads = -(-threads // FILLERS) if several else threads
    done = 0

    def fill_part(part: Part, report: Progress | None = None) -> None:
        source.move(part.segments, checksum=verify, fill=fill, threads=threads, progress=report)
        if booleans is not None:
            for i in np.flatnonzero(booleans[part.rows]).tolist():
                settle_bytes(int(part.segments["address"][i]), int(part.segments["nbytes"][i]))

    def finish(part: Part) -> None:
        nonlocal done
        done += int(part.segments["nbytes"].sum())
        if verify:
            part.join(segments)

    def fill_here(part: Part) -> None:
        fill_part(part, None if progress is None else bind(_behind, progress, done))
        finish(part)

    coming = staging.to_device(segments, devices, staging=settings)
    if not several:
        with contextlib.closing(coming) as parts:
            for part in parts:
                fill_here(part)
        return
    filling: deque[Part] = deque()

    def finish_filled() -> None:
        before = done
        while filling and filling[0].filled is not None and filling[0].filled.done():
            filling[0].filled.result()
            finish(filling.popleft())
        if progress is not None and done > before:
            progress(done)

    # The transfer is closed first, which waits for what is being filled.
    with ThreadPoolExecutor(FILLERS, "holdfast-fill") as pool, contextlib.closing(coming) as parts:
        alone = False
        for part in parts:
            if alone:
                fill_here(part)
                continue
            filling.append(part)
            try:
                part.filled = Future()
                pool.submit(_fulfil, part.filled, bind(fill_part, part))
            except BaseException as error:
                # It may have been taken on all the same, by a thread that the pool does not know
                # of: then it is waited for. What nobody has taken on, nobody will.
                for each in filling:
                    if each.filled is not None:
                        each.filled.cancel()
                if len(filling) > 1 or not isinstance(error, RuntimeError):
                    raise
                if part.filled is None or not part.filled.cancelled():
                    raise
                # No thread is to be had, as while the interpreter ends.
                alone, part.filled = True, None
                filling.clear()
                fill_here(part)
            else:
                finish_filled()
        finish_filled()


def _fulfil(filled: Future[None], fill: Callable[[], None]) -> None:
    """Do what a future stands for, unless it was cancelled."""
    if not filled.set_running_or_notify_cancel():
        return
    try:
        fill()
    except BaseException as error:
        filled.set_exception(error)
    else:
        filled.set_result(None)


def _behind(progress: Progress, before: int, done: int) -> object:
    return progress(before + done)
