"""A large file that is replaced is closed by a thread that nobody waits for, but a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import holdfast

MIB = 1 << 20
SIZE = 40 * MIB


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def unmount(place: Path) -> None:
    """What is still being closed there keeps it busy for a moment."""
    for _ in range(200):
        if subprocess.run(["umount", place], capture_output=True, timeout=60).returncode == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"{place} stays busy")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("durable", [True, False])
def test_nothing_is_left(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "ckpt"
    before = threads()
    for value in range(4):
        saved = np.full(SIZE, value, np.uint8)
        holdfast.save({"x": saved}, path, durable=durable)
        assert np.array_equal(holdfast.load(path)["x"], saved)
    assert eventually(lambda: threads() == before)
    open_files = [
        os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)
    ]
    assert not [name for name in open_files if str(tmp_path) in name]
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("durable", [True, False])
def test_who_has_it_open_keeps_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "ckpt"
    holdfast.save({"x": np.full(SIZE, 1, np.uint8)}, path, durable=durable)
    old = holdfast.load(path, mmap=True)
    holdfast.save({"x": np.full(SIZE, 2, np.uint8)}, path, durable=durable)
    assert (old["x"] == 1).all()
    assert (holdfast.load(path)["x"] == 2).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 with room for two files, but not for three."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as f:
        f.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, timeout=60)
    options = ["-o", "loop"]
    done = subprocess.run(["mount", *options, image, place], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no loop mounts here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        unmount(place)


@pytest.mark.parametrize("shards", [None, 20 * MIB], ids=["file", "shards"])
@pytest.mark.parametrize("durable", [True, False])
def test_a_disk_with_room_for_two(small_disk: Path, durable: bool, shards: int | None) -> None:
    """Save over and again, at once: what was replaced gives its room to the next."""
    for value in range(12):
        saved = {str(i): np.full(SIZE // 2, value, np.uint8) for i in range(2)}
        holdfast.save(saved, small_disk / "ckpt", durable=durable, max_shard_size=shards)
    loaded = holdfast.load(small_disk / "ckpt", mmap=False)
    assert all((loaded[name] == 11).all() for name in saved)
    assert os.listdir(small_disk) in (["ckpt", "lost+found"], ["lost+found", "ckpt"])


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with room for two files, but not for three."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "memory"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", place]
    done = subprocess.run(command, capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        unmount(place)


@pytest.mark.parametrize("durable", [True, False])
def test_room_that_comes_just_then(small_memory: Path, durable: bool) -> None:
    """The old file may be gone between the call that fails and the look at whether it is."""
    for value in range(40):
        saved = np.full(SIZE, value, np.uint8)
        holdfast.save({"x": saved}, small_memory / "ckpt", durable=durable)
    assert (holdfast.load(small_memory / "ckpt", mmap=False)["x"] == 39).all()


@pytest.mark.skipif("HOLDFAST_SANITIZED" in os.environ, reason="its locks stay held in a child")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_does_not_wait_for_threads_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    for value in range(3):
        holdfast.save({"x": np.full(SIZE, value, np.uint8)}, path, durable=False)
        child = os.fork()
        if not child:
            holdfast.save({"x": np.full(SIZE, 9, np.uint8)}, tmp_path / "child", durable=False)
            holdfast.save({"x": np.full(SIZE, 8, np.uint8)}, tmp_path / "child", durable=False)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert (holdfast.load(tmp_path / "child")["x"] == 8).all()
