"""Saving torch's files beside others and against time: kills, full disks, threads, forks."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine

FORMATS = ["torch", "torch_legacy"]
KILLS = 16  # for each way in which a file gets its name

#: Saves for ever files that hold one number throughout, which grows from save to save.
SAVER = """
import sys
import numpy as np
import holdfast
from holdfast import _engine
path, first, durable, ban, format = sys.argv[1:]
if ban != "-":
    _engine.fault_ban(ban, 95)
print("ready", flush=True)
for n in range(int(first), 1 << 60):
    obj = {"big": np.full(700_000, n), "n": n, "small": [np.full(i, n) for i in range(50)]}
    holdfast.save(obj, path, format=format, durable=durable == "1")
"""


def generation_of(path: Path) -> int:
    """The number that a file consists of, all of it."""
    assert holdfast.verify(path).ok
    found = holdfast.load(path, mmap=False, framework="numpy")
    n: int = found["n"]
    assert (found["big"] == n).all() and len(found["big"]) == 700_000
    assert all((part == n).all() for part in found["small"]) and len(found["small"]) == 50
    return n


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ban", ["-", "tmpfile"], ids=["unnamed", "named"])
def test_killed_at_any_moment(tmp_path: Path, ban: str, format: str) -> None:
    chance = random.Random(7)
    path = tmp_path / "x.pt"
    small = [np.full(i, 0) for i in range(50)]
    holdfast.save({"big": np.full(700_000, 0), "n": 0, "small": small}, path, format=format)
    last = moved = 0
    for kill in range(4 * KILLS):
        if kill >= KILLS and moved > 2:
            break  # on a busy machine few savers come far enough before they are killed
        arguments = [str(path), str(last + 1), str(kill % 2), ban, format]
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, *arguments], stdout=subprocess.PIPE, text=True
        ) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.005, 0.25))
            saver.send_signal(signal.SIGKILL)
        generation = generation_of(path)
        assert generation >= last
        moved += generation > last
        last = generation
        assert len(os.listdir(tmp_path)) <= 2
    assert moved > 2, "the savers never came as far as to save"
    holdfast.save({"n": 1}, path, format=format)
    assert os.listdir(tmp_path) == ["x.pt"], "what the dead left is gone after the next save"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "holdfast-test", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root and mount")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", ["one", "many"])
def test_full_disk(small_disk: Path, format: str, shape: str) -> None:
    path = small_disk / "x.pt"
    old = {"old": np.arange(100_000.0)}
    holdfast.save(old, path, format=format)
    before = path.read_bytes()
    obj: dict[str, Any] = {"x": np.ones(600_000)}
    if shape == "many":
        obj = {f"t{i}": np.ones(1000) for i in range(600)}
    for durable in (True, False):
        with pytest.raises(OSError) as caught:
            holdfast.save(obj, path, format=format, durable=durable)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        assert os.listdir(small_disk) == ["x.pt"]
        assert path.read_bytes() == before
    holdfast.save({"new": np.ones(200_000)}, path, format=format)  # the space is free again
    assert holdfast.load(path, framework="numpy", mmap=False)["new"].sum() == 200_000


@pytest.mark.parametrize("format", FORMATS)
def test_many_savers_of_one_path(tmp_path: Path, format: str) -> None:
    """Threads that save over one path, and load from it: always one of the files, whole."""
    path = tmp_path / "x.pt"
    failures: list[BaseException] = []

    def obj(n: int) -> dict[str, Any]:
        small = [np.full(i, n) for i in range(20)]
        return {"n": n, "big": np.full(100_000, n), "small": small, "shared": {"s": small}}

    holdfast.save(obj(0), path, format=format)
    start = threading.Barrier(5)

    def work(n: int) -> None:
        try:
            start.wait()
            for turn in range(15):
                if n == 4:
                    found = holdfast.load(path, mmap=turn % 2 == 0, framework="numpy")
                    assert (found["big"] == found["n"]).all()
                    assert found["shared"]["s"][7][6] == found["n"]
                    assert found["shared"]["s"][7] is found["small"][7]
                else:
                    holdfast.save(obj(n), path, format=format, durable=False)
        except BaseException as failure:  # shown by the assertion below
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["x.pt"]
    assert holdfast.load(path, framework="numpy")["n"] in range(4)


@pytest.mark.parametrize("format", FORMATS)
def test_one_object_saved_by_many_threads(format: str) -> None:
    """Pickling the same object at once gives the same bytes; none of it is touched."""
    shared = [np.arange(float(i)) for i in range(200)]
    obj = {"a": shared, "b": {"c": shared, "d": [{"e": shared[5]}] * 50}, "n": list(range(999))}
    alone = io.BytesIO()
    holdfast.save(obj, alone, format=format)
    found: list[bytes] = []

    def work() -> None:
        for _ in range(10):
            out = io.BytesIO()
            holdfast.save(obj, out, format=format)
            found.append(out.getvalue())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and set(found) == {alone.getvalue()}


@pytest.mark.parametrize("format", FORMATS)
def test_forks_while_others_save(tmp_path: Path, format: str) -> None:
    """A child of a process in which a save is going on saves and loads for itself."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                holdfast.save(
                    {"x": np.ones(400_000)}, tmp_path / "parent.pt", format=format, durable=False
                )
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for n in range(8):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    path = tmp_path / "child.pt"
                    holdfast.save({"n": n, "x": np.full(300_000, n)}, path, format=format)
                    found = holdfast.load(path, mmap=n % 2 == 0, framework="numpy")
                    code = 0 if (found["x"] == n).all() and found["n"] == n else 2
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            assert generation(tmp_path / "child.pt") == n
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert sorted(os.listdir(tmp_path)) == ["child.pt", "parent.pt"]


def generation(path: Path) -> int:
    found = holdfast.load(path, framework="numpy", mmap=False)
    assert len(found["x"]) == 300_000 and (found["x"] == found["n"]).all()
    return int(found["n"])


def test_a_map_outlives_the_file_and_its_successors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    holdfast.save({"x": np.full(300_000, 1)}, path)
    kept = holdfast.load(path, mmap=True, framework="numpy")["x"]
    before = _engine.live_buffers()
    for n in range(2, 6):
        holdfast.save({"x": np.full(300_000, n)}, path, durable=False)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    path.unlink()
    assert (kept == 1).all()
    assert _engine.live_buffers() == before
    kept[0] = 9  # in this process alone
    holdfast.save({"x": kept}, path)
    assert holdfast.load(path, mmap=False, framework="numpy")["x"][0] == 9
