"""A folder is published whole, or the old one stays as it was: whatever fails, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine

FATAL = [errno.ENOSPC, errno.EIO]
PASSING = [errno.EINTR, 0]
#: How a folder takes the place of another: in one step; in two, where the file system has no such
#: call; and with every file synced by itself or all at once.
WAYS: dict[str, tuple[str | None, int]] = {
    "exchanged": (None, 0),
    "aside": ("exchange", errno.EINVAL),
    "stepwise": ("openat2", errno.ENOSYS),
}
NEW = {"a/meta": b"m" * 20, "a/out": b"o" * 5000, "b/out": b"", "snapshot_done": b""}
OLD = {"a/meta": b"old", "gone/deep/er/x": b"x" * 100, "snapshot_done": b""}
OLD_MODE = 0o770  # more than the umask leaves to a new folder


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    _engine.fault_ban(*WAYS[request.param])
    return request.param


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory, where syncing takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


def fill(fd: int, files: dict[str, bytes]) -> None:
    contents = [np.frombuffer(data or b"-", np.uint8) for data in files.values()]
    parts = [path.rpartition("/") for path in files]
    for k, (folder, _, name) in enumerate(parts):
        _engine.write_files(
            fd,
            [folder.encode()],
            [name.encode()],
            np.array([0, 1]),
            np.array([contents[k].ctypes.data], np.uint64),
            np.array([len(files["/".join(filter(None, (folder, name)))])], np.uint64),
            threads=1,
        )


def save(
    path: Path | str,
    files: dict[str, bytes] = NEW,
    *,
    durable: bool = False,
    replace: bool = True,
    begun: Callable[[], object] = lambda: None,
    ask: Callable[[int], bool] | None = None,
) -> None:
    with _engine.FolderPublication(path, replace=replace) as publication:
        begun()
        if ask is not None:
            publication.ask(ask)
        fill(publication.fd, files)
        publication.commit(durable, ask)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """All that can be seen in a folder."""
    return {
        str(path.relative_to(folder)): (
            stat.S_IMODE(path.lstat().st_mode),
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def make(target: Path, existing: str) -> None:
    """The state before a save, of which nothing depends on the engine."""
    if target.exists():
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        target.rmdir()
    if existing == "nothing":
        return
    target.mkdir()
    for path, data in OLD.items() if existing == "full" else ():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(data)
    target.chmod(OLD_MODE)


def fail_each(target: Path, existing: str, error: int, **how: Any) -> tuple[int, Counter[str]]:
    """Save with the 1st, 2nd, 3rd... call failing; how many there are, and which raised."""
    raised: Counter[str] = Counter()
    n = 0
    while True:
        n += 1
        make(target, existing)
        before = state(target.parent)
        failure = None
        _engine.fault_arm(n, error)
        try:
            save(target, **how)
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        after = state(target.parent)
        if hit is None:
            assert failure is None
            return n - 1, raised
        where = f"call {n} ({hit})"
        if failure is None:
            assert os.listdir(target.parent) == [target.name], where
            assert files_of(target) == NEW, where
            assert existing == "nothing" or stat.S_IMODE(target.stat().st_mode) == OLD_MODE
        else:
            assert error in FATAL, f"{where} should have been overcome: {failure!r}"
            assert failure.errno == error, where
            assert failure.filename is not None, where
            assert after == before, where
            raised[hit] += 1


@pytest.mark.parametrize("existing", ["nothing", "empty", "full"])
@pytest.mark.parametrize("durable", [False, True], ids=["fast", "durable"])
@pytest.mark.parametrize("error", FATAL, ids=errno.errorcode.get)
def test_survives(way: str, place: Path, error: int, durable: bool, existing: str) -> None:
    count, raised = fail_each(place / "target", existing, error, durable=durable)

    assert count > 20
    must_raise = {"mkdirat", "pwrite", "flock", "close"}
    must_raise |= {"openat"} if way == "stepwise" else {"openat2"}
    if durable:
        must_raise |= {"fsync", "getdents"}
    if existing != "nothing":
        must_raise |= {"faccessat", "renameat" if way == "aside" else "exchange"}
    assert must_raise <= set(raised)
    if durable:  # of eight: four files, two folders, the folder itself, and the one that it is in,
        assert raised["fsync"] >= 4  # less what several threads do in another order each time


@pytest.mark.parametrize("existing", ["nothing", "empty", "full"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR], ids=errno.errorcode.get)
def test_survives_where_it_is_asked(way: str, place: Path, error: int, existing: str) -> None:
    count, raised = fail_each(place / "target", existing, error, durable=True, ask=lambda fd: True)

    assert count > 20
    assert bool(raised) == (error == errno.EIO)


@pytest.mark.parametrize("existing", ["nothing", "empty", "full"])
@pytest.mark.parametrize("durable", [False, True], ids=["fast", "durable"])
@pytest.mark.parametrize("error", PASSING, ids=["EINTR", "short"])
def test_overcomes(way: str, place: Path, error: int, durable: bool, existing: str) -> None:
    count, raised = fail_each(place / "target", existing, error, durable=durable)

    assert count > 20
    assert not raised


@pytest.mark.parametrize("existing", ["nothing", "empty"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR], ids=errno.errorcode.get)
def test_survives_where_nothing_may_be_replaced(place: Path, error: int, existing: str) -> None:
    target = place / "target"

    count, raised = fail_each(target, existing, error, durable=True, replace=False)

    assert count > 20
    assert bool(raised) == (error == errno.EIO)


def test_what_cannot_be_removed_is_left_to_the_next_save(tmp_path: Path) -> None:
    target = tmp_path / "target"
    save(target, OLD)
    _engine.fault_ban("unlinkat", errno.EACCES)
    save(target, NEW)
    _engine.fault_ban(None, 0)
    assert len(os.listdir(tmp_path)) == 2
    assert files_of(target) == NEW

    save(target, OLD)

    assert os.listdir(tmp_path) == ["target"]
    assert files_of(target) == OLD


@pytest.mark.parametrize("ban", ["exchange", "renameat"])
def test_the_old_folder_stays_where_it_cannot_be_put_back(tmp_path: Path, ban: str) -> None:
    """The folder's name cannot be made to last, and then it cannot be undone either."""
    target = tmp_path / "target"
    many = {f"t{i}": b"x" for i in range(300)}  # synced all at once, so only the name is not
    save(target, OLD)
    failures: list[OSError] = []

    def saver() -> None:
        try:
            save(target, many, durable=True)
        except OSError as error:
            failures.append(error)

    # Whoever undoes a save waits for the old folder's lock: time to make the next call fail.
    fd = os.open(target, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    _engine.fault_ban("fsync", errno.EIO)
    try:
        thread = threading.Thread(target=saver)
        thread.start()
        until = time.monotonic() + 60
        while not (target / "t0").exists() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.2)
        _engine.fault_ban(ban, errno.EIO)
    finally:
        os.close(fd)
        thread.join()
        _engine.fault_ban(None, 0)

    assert [error.errno for error in failures] == [errno.EIO]
    if ban == "renameat":  # which an exchange does not need
        assert files_of(target) == OLD
        assert os.listdir(tmp_path) == ["target"]
    else:
        assert files_of(target) == many
        (left,) = (path for path in tmp_path.iterdir() if path != target)
        assert files_of(left) == OLD


def test_many_files_are_synced_all_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    many = {f"t{i}": b"x" for i in range(300)}
    few = {f"t{i}": b"x" for i in range(100)}

    _engine.fault_ban("syncfs", errno.EIO)
    save(target, few, durable=True)
    with pytest.raises(OSError) as caught:
        save(target, many, durable=True)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(target)
    assert files_of(target) == few

    _engine.fault_ban("syncfs", errno.ENOSYS)  # then each by itself
    save(target, many, durable=True)
    assert files_of(target) == many

    _engine.fault_ban("fsync", errno.EIO)
    with pytest.raises(OSError):
        save(target, few, durable=True)
    assert files_of(target) == many
    assert os.listdir(tmp_path) == ["target"]


# ---- other processes -----------------------------------------------------------------------


KILLS = 24  # for each way
FILES = 40

#: Saves folders of FILES files that all hold one number, which grows from save to save.
SAVER = f"""
import sys
import numpy as np
from holdfast import _engine

path, first, durable, ban = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
_engine.fault_ban(ban or None, 22)
names = [b"t%d" % i for i in range({FILES} // 2)]
print("ready", flush=True)
for generation in range(first, 1 << 62):
    word = np.array([generation], np.uint64)
    with _engine.FolderPublication(path) as publication:
        _engine.write_files(
            publication.fd, names, [b"meta", b"out"] * len(names),
            np.arange(0, {FILES} + 1, 2), np.full({FILES}, word.ctypes.data, np.uint64),
            np.full({FILES}, 8, np.uint64),
        )
        publication.commit(durable)
"""


def generation_of(target: Path) -> int:
    """The number that all files hold."""
    found = files_of(target)
    assert len(found) == FILES
    words = set(found.values())
    assert len(words) == 1, "a mixture"
    return int.from_bytes(words.pop(), sys.byteorder)


@pytest.mark.parametrize("ban", ["", "exchange"], ids=["exchanged", "aside"])
def test_killed_at_any_moment(tmp_path: Path, ban: str) -> None:
    chance = random.Random(2024)
    target = tmp_path / "target"
    last, moved, left, longest = 0, 0, 0, 0.03
    save(target, {f"t{i}/{name}": bytes(8) for i in range(FILES // 2) for name in ("meta", "out")})

    for kill in range(KILLS):
        arguments = [str(target), str(last + 1), str(kill % 2), ban]
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, *arguments], stdout=subprocess.PIPE, text=True
        ) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.001, longest))
            saver.kill()

        left += len(os.listdir(tmp_path)) > 1
        if ban and not target.exists():  # between two renames: the next save begins by undoing it
            with _engine.FolderPublication(target):
                pass
        generation = generation_of(target)
        assert generation >= last
        moved += generation > last
        if generation == last:  # a machine that others use is slower: give the next one longer
            longest = min(1.2 * longest, 2.0)
        last = generation
        with _engine.FolderPublication(target):
            pass
        assert os.listdir(tmp_path) == ["target"]

    assert moved > 0, "the savers never came as far as to save"
    assert left > 0, "no saver was killed while it wrote"


def test_two_renames_cut_short_are_undone(tmp_path: Path, script: Callable[..., str]) -> None:
    target = tmp_path / "target"
    save(target, OLD)
    script(
        """
import os, signal, sys
from holdfast import _engine
publication = _engine.FolderPublication(sys.argv[1])
print("begun")
temp = next(n for n in os.listdir(sys.argv[2]) if n.endswith(".tmp"))
os.rename(sys.argv[1], os.path.join(sys.argv[2], temp[:-3] + "old"))
os._exit(0)
""",
        target,
        tmp_path,
    )
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 2

    with pytest.raises(FileExistsError):
        _engine.FolderPublication(target, replace=False)
    assert files_of(target) == OLD
    save(target, NEW)

    assert files_of(target) == NEW
    assert os.listdir(tmp_path) == ["target"]


def test_a_save_for_oneflow_undoes_them_too(tmp_path: Path, script: Callable[..., str]) -> None:
    target = tmp_path / "model"
    holdfast.save({"a": np.zeros(2)}, target, format="oneflow")
    script(
        """
import os, sys
from holdfast import _engine
publication = _engine.FolderPublication(sys.argv[1])
temp = next(n for n in os.listdir(sys.argv[2]) if n.endswith(".tmp"))
os.rename(sys.argv[1], os.path.join(sys.argv[2], temp[:-3] + "old"))
os._exit(0)
""",
        target,
        tmp_path,
    )
    assert not target.exists()

    holdfast.save({"b": np.ones(2)}, target, format="oneflow")

    assert list(holdfast.load(target)) == ["b"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_living_owner_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with _engine.FolderPublication(target) as first:
        fill(first.fd, OLD)
        save(target, NEW)
        assert files_of(target) == NEW
        first.commit(True)

    assert files_of(target) == OLD
    assert os.listdir(tmp_path) == ["target"]


def test_a_forked_child_removes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with _engine.FolderPublication(target) as publication:
        fill(publication.fd, NEW)
        pid = os.fork()
        if pid == 0:
            publication.abort()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        publication.commit(False)

    assert files_of(target) == NEW
