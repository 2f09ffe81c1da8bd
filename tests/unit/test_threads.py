"""Saves and loads from many threads at once, and after fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import holdfast


def test_many_threads_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    objects = [{"a": rng.random(200_000), "b": {"c": rng.random(17)}} for _ in range(8)]

    def work(i: int) -> bool:
        path = tmp_path / str(i % 4)
        for _ in range(4):
            holdfast.save(objects[i], path, durable=False)
            got = holdfast.load(path, mmap=bool(i % 2))
            if not any(np.array_equal(got["a"], o["a"]) for o in objects[i % 4 :: 4]):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_after_fork(tmp_path: Path) -> None:
    holdfast.save({"x": np.arange(1e6)}, tmp_path / "x")
    mapped = holdfast.load(tmp_path / "x", mmap=True)["x"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            holdfast.save({"x": mapped + 1}, tmp_path / "y")
            status = 0 if holdfast.load(tmp_path / "y", mmap=False)["x"][9] == 10 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert holdfast.load(tmp_path / "y")["x"][5] == 6


def test_the_gil_is_released(tmp_path: Path) -> None:
    """Another thread goes on while a save writes and a load reads."""
    obj = {"x": np.random.default_rng(0).integers(0, 256, 256 << 20, np.uint8)}
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    holdfast.save(obj, tmp_path / "x", durable=False)
    holdfast.load(tmp_path / "x", mmap=False)
    took = time.perf_counter() - start
    stop.set()
    thread.join()
    inside = [t for t in ticks if start < t < start + took]
    assert len(inside) > 10, f"{len(inside)} ticks in {took:.2f} s"


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_number_of_threads_changes_nothing(tmp_path: Path, threads: int) -> None:
    rng = np.random.default_rng(0)
    obj = {str(i): rng.random(n) for i, n in enumerate((3_000_000, 10, 1, 70_000))}
    holdfast.save(obj, tmp_path / "a", threads=threads)
    holdfast.save(obj, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    got = holdfast.load(tmp_path / "a", mmap=False, threads=threads)
    assert all(np.array_equal(got[name], obj[name]) for name in obj)


DAEMON = """
import os, threading, time
import numpy as np
from holdfast import _engine
from holdfast.layout import SEGMENT

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

kept = Slow()  # so that the interpreter takes its time to end
called = threading.Event()

def read():
    segment = np.zeros(1, SEGMENT)
    segment["nbytes"] = 1 << 42  # without an address: to nowhere
    fd = os.open("/dev/zero", os.O_RDONLY)
    _engine.read([fd], segment, threads=8, checksum=False, progress=lambda done: called.set())

def deep(n):  # more of the stack than is kept for the next thread
    list(map(lambda _: deep(n - 1), [0])) if n else read()

threading.Thread(target=deep, args=(200,), daemon=True).start()
assert called.wait(60)
"""


def test_workers_end_with_the_thread_that_called_them() -> None:
    """A daemon thread is ended while it calls back, by an interpreter that ends."""
    done = subprocess.run([sys.executable, "-c", DAEMON], timeout=60, check=False)
    assert done.returncode == 0
