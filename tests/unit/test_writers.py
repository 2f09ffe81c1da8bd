"""How many threads write a file past the page cache."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine


def writers(path: Path, nbytes: int, threads: int | None) -> int:
    """The most threads that the engine had while it saved."""
    block = np.zeros(nbytes + 1, np.uint8)[1:]  # where no direct write can take it from
    held, most, buffers = _engine.live_buffers(), 0, 0
    over = threading.Event()

    def look() -> None:
        nonlocal most, buffers
        while not over.is_set():
            most = max(most, len(os.listdir("/proc/self/task")) - before)
            buffers = max(buffers, _engine.live_buffers() - held)

    onlooker = threading.Thread(target=look)
    before = len(os.listdir("/proc/self/task")) + 1
    onlooker.start()
    try:
        holdfast.save({"w": block}, path, threads=threads)
    finally:
        over.set()
        onlooker.join()
    if not buffers:
        pytest.skip("nothing was written past the page cache here")
    return most + 1  # the caller's own


@pytest.mark.parametrize(
    ("mib", "threads", "expected"), [(112, None, 12), (64, None, 6), (112, 3, 3)]
)
def test_writers(mib: int, threads: int | None, expected: int, tmp_path: Path) -> None:
    most = 0
    for _ in range(20):  # on a busy machine a look may come too late
        most = max(most, writers(tmp_path / "x", mib << 20, threads))
        if most >= expected:
            break
    assert most == expected
