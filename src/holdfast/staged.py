"""Reading into the memory of devices: parts that the engine fills while others are on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    done = 0

    def fill(part: Part, report: Progress | None = None) -> None:
        each = -(-threads // FILLERS) if several else threads
        source.move(part.segments, checksum=verify, threads=each, progress=report)
        if booleans is not None:
            for i in np.flatnonzero(booleans[part.rows]).tolist():
                settle_bytes(int(part.segments["address"][i]), int(part.segments["nbytes"][i]))

    def finish(part: Part) -> None:
        nonlocal done
        done += int(part.segments["nbytes"].sum())
        if verify:
            part.join(segments)

    coming = staging.to_device(segments, devices, staging=settings)
    if not several:
        with contextlib.closing(coming) as parts:
            for part in parts:
                fill(part, None if progress is None else bind(_behind, progress, done))
                finish(part)
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
        for part in parts:
            try:
                part.filled = pool.submit(fill, part)
            except BaseException:
                # It may have been taken on all the same, and its block goes to others.
                pool.shutdown(cancel_futures=True)
                raise
            filling.append(part)
            finish_filled()
        finish_filled()


def _behind(progress: Progress, before: int, done: int) -> object:
    return progress(before + done)
