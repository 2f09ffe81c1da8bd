"""Publishing beside others, and for good: other savers, what they left, full and failing disks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import _engine

Save = Callable[..., None]
Listing = Callable[[], list[str]]
Script = Callable[..., str]

TEMPORARIES = 32  # names for one target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- others at the same file ---------------------------------------------------------------


def test_maps_of_the_old_file_keep_its_bytes(save: Save, way: str, target: Path) -> None:
    target.write_bytes(b"old" * 10000)
    code = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(memory[:] == b'old' * 10000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        save(target, b"new")
        output, _ = process.communicate("\n", timeout=60)

    assert output == "True\n"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("existing", [False, True])
def test_two_savers_the_last_wins(way: str, target: Path, listing: Listing, existing: bool) -> None:
    if existing:
        target.write_bytes(b"old")
    with _engine.Publication(target) as first, _engine.Publication(target) as second:
        os.write(first.fd, b"first")
        os.write(second.fd, b"second")
        second.commit(True)
        assert target.read_bytes() == b"second"
        first.commit(True)

    assert target.read_bytes() == b"first"
    assert listing() == ["target"]


def test_many_savers_at_once(save: Save, way: str, target: Path, listing: Listing) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def run(content: bytes) -> None:
        try:
            start.wait()
            for _ in range(40):
                save(target, content)
        except BaseException as failure:  # shown by the assertion below
            failures.append(failure)

    contents = [bytes([65 + i]) * 5000 for i in range(4)]
    savers = [threading.Thread(target=run, args=(content,)) for content in contents]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()

    assert failures == []
    assert target.read_bytes() in contents
    assert listing() == ["target"]


def test_no_saver_is_told_that_there_is_nothing_to_replace(target: Path, script: Script) -> None:
    """The file that a path leads to may lose its name before it is looked at: to another saver."""
    code = (
        "import os, sys\n"
        "from holdfast import _engine\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    children += [child] if (child := os.fork()) else []\n"
        "    if not child:\n"
        "        break\n"
        "for _ in range(5000):\n"
        "    with _engine.Publication(sys.argv[1]) as publication:\n"
        "        publication.commit(False)\n"
        "if child:\n"
        "    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]\n"
    )

    script(code, target)

    assert target.read_bytes() == b""


def test_a_forked_child_removes_nothing(target: Path, script: Script) -> None:
    code = (
        "import errno, os, sys, warnings\n"
        "from holdfast import _engine\n"
        "_engine.fault_ban('tmpfile', errno.EOPNOTSUPP)\n"
        "with _engine.Publication(sys.argv[1]) as publication:\n"
        "    os.write(publication.fd, b'new')\n"
        "    warnings.simplefilter('ignore')\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        publication.abort()\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    publication.commit(True)\n"
    )

    script(code, target)

    assert target.read_bytes() == b"new"


# ---- temporaries ---------------------------------------------------------------------------


@pytest.fixture
def named() -> None:
    """A file system without unnamed files."""
    _engine.fault_ban("tmpfile", errno.EOPNOTSUPP)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL])
def test_without_unnamed_files(save: Save, target: Path, listing: Listing, code: int) -> None:
    _engine.fault_ban("tmpfile", code)

    with _engine.Publication(target) as publication:
        (name,) = listing()
        assert name.startswith(".holdfast-")
        assert name.endswith(".tmp")
        os.write(publication.fd, b"new")
        publication.commit(True)

    assert target.read_bytes() == b"new"
    assert listing() == ["target"]


def test_other_failures_to_create_are_failures(target: Path, listing: Listing) -> None:
    _engine.fault_ban("tmpfile", errno.EDQUOT)

    with pytest.raises(OSError) as caught:
        _engine.Publication(target)

    assert caught.value.errno == errno.EDQUOT
    assert listing() == []


def test_temporaries_of_the_living_stay(named: None, save: Save, target: Path, listing: Listing):
    with _engine.Publication(target) as alive:
        os.write(alive.fd, b"alive")
        (temporary,) = listing()
        save(target, b"other")
        assert listing() == sorted([temporary, "target"])
        alive.commit(False)

    assert target.read_bytes() == b"alive"
    assert listing() == ["target"]


def test_temporaries_of_the_dead_are_removed(
    named: None, save: Save, tmp_path: Path, target: Path, listing: Listing
) -> None:
    publications = [_engine.Publication(target) for _ in range(TEMPORARIES)]
    temporaries = listing()
    assert len(temporaries) == TEMPORARIES
    with pytest.raises(OSError) as caught:
        _engine.Publication(target)
    assert caught.value.errno == errno.EBUSY
    for publication in publications:
        publication.abort()
    assert listing() == []

    for temporary in temporaries:  # what savers leave that were killed
        (tmp_path / temporary).write_bytes(b"dead")
    _engine.fault_ban(None, 0)  # whichever way the next saver goes
    save(tmp_path / "another target", b"")
    assert len(listing()) == TEMPORARIES + 1, "temporaries of other targets are left alone"
    save(target, b"new")

    assert listing() == ["another target", "target"]


def test_only_files_are_taken_for_temporaries(
    named: None, save: Save, tmp_path: Path, target: Path, listing: Listing
) -> None:
    with _engine.Publication(target):
        (temporary,) = listing()
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / temporary).symlink_to("precious")

    save(target, b"new")

    assert (tmp_path / temporary).is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_nobody_is_declared_dead(
    named: None, tmp_path: Path, target: Path, save: Save, listing: Listing, code: int
) -> None:
    with _engine.Publication(target):
        (temporary,) = listing()
    (tmp_path / temporary).write_bytes(b"whose?")
    _engine.fault_ban("flock", code)

    save(target, b"new")

    assert target.read_bytes() == b"new"
    assert listing() == sorted([temporary, "target"])


@pytest.mark.parametrize("existing", [False, True])
def test_without_proc(
    save: Save,
    target: Path,
    listing: Listing,
    calls: Callable[[Callable[[], object]], list[str]],
    existing: bool,
) -> None:
    def saved() -> None:
        target.unlink(missing_ok=True)
        if existing:
            target.write_bytes(b"old")
        save(target, b"new")

    nth = calls(saved).index("linkat") + 1
    _engine.fault_arm(nth, errno.ENOENT)

    saved()

    assert _engine.fault_hit() == "linkat"
    assert target.read_bytes() == b"new"
    assert listing() == ["target"]


# ---- durability ----------------------------------------------------------------------------


def test_syncs_only_where_asked(
    save: Save, target: Path, calls: Callable[[Callable[[], object]], list[str]]
) -> None:
    save(target, b"old")

    assert "fsync" not in calls(lambda: save(target, b"new", durable=False))
    names = calls(lambda: save(target, b"new", durable=True))
    last_rename = len(names) - 1 - names[::-1].index("renameat")
    assert "fsync" in names[:last_rename], "the content, before it gets the name"
    assert "fsync" in names[last_rename:], "the name"
    assert names[last_rename - 1] == "linkat", "a file is not to have two names for long"


@pytest.mark.parametrize("existing", [False, True])
def test_the_old_file_comes_back_when_the_new_name_may_not_last(
    save: Save,
    way: str,
    target: Path,
    listing: Listing,
    calls: Callable[[Callable[[], object]], list[str]],
    existing: bool,
) -> None:
    def reset() -> None:
        target.unlink(missing_ok=True)
        if existing:
            target.write_bytes(b"old" * 100_000)
            target.chmod(0o604)

    def durable() -> None:
        reset()
        save(target, b"new", durable=True)

    names = calls(durable)
    of_the_directory = len(names) - names[::-1].index("fsync")
    reset()
    _engine.fault_arm(of_the_directory, errno.EIO)
    with pytest.raises(OSError) as caught:
        save(target, b"new", durable=True)

    assert _engine.fault_hit() == "fsync"
    assert caught.value.errno == errno.EIO
    assert listing() == (["target"] if existing else [])
    if existing:
        assert target.read_bytes() == b"old" * 100_000
        assert mode(target) == 0o604


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_directories_that_cannot_be_synced(
    save: Save, target: Path, calls: Callable[[Callable[[], object]], list[str]], code: int
) -> None:
    save(target, b"old")
    names = calls(lambda: save(target, b"old", durable=True))
    _engine.fault_arm(len(names) - names[::-1].index("fsync"), code)

    save(target, b"new", durable=True)

    assert _engine.fault_hit() == "fsync"
    assert target.read_bytes() == b"new"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "holdfast-test", str(folder)]
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
def test_full_disk(save: Save, way: str, small_disk: Path) -> None:
    target = small_disk / "target"
    old = os.urandom(300 << 10)
    save(target, old)

    with pytest.raises(OSError) as caught:
        save(target, os.urandom(2 << 20), durable=True)

    assert caught.value.errno == errno.ENOSPC
    assert os.fsdecode(caught.value.filename) == str(target)
    assert os.listdir(small_disk) == ["target"]
    assert target.read_bytes() == old
    save(target, old[::-1])  # the space is free again
    assert target.read_bytes() == old[::-1]
