"""Publishing a folder: names, links, modes, and what may be replaced."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine

ROOT = os.geteuid() == 0


def save(
    path: str | bytes | os.PathLike[str],
    text: bytes = b"new",
    replace: bool = True,
    ask: Callable[[int], bool] | None = None,
) -> None:
    with _engine.FolderPublication(path, replace=replace) as publication:
        with open(_engine.create_beneath(publication.fd, b"file"), "wb") as file:
            file.write(text)
        publication.commit(False, ask)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("durable", [False, True])
def test_appears_at_commit(tmp_path: Path, durable: bool) -> None:
    target = tmp_path / "target"
    with _engine.FolderPublication(target) as publication:
        os.close(_engine.create_beneath(publication.fd, b"a/b"))
        assert not target.exists()
        publication.commit(durable)
        with pytest.raises(ValueError, match="has ended"):
            publication.commit(durable)
        with pytest.raises(ValueError, match="has ended"):
            _ = publication.fd

    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["a"]


@pytest.mark.parametrize("replace", [False, True])
def test_abort_leaves_all_as_it_was(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for _ in range(2):
        with _engine.FolderPublication(target, replace=replace) as publication:
            os.close(_engine.create_beneath(publication.fd, b"a/b/c/d/e"))
        assert os.listdir(tmp_path) == ["target"]
        assert os.listdir(target) == []


def test_only_an_empty_folder_is_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    save(target, b"one", replace=False)
    with pytest.raises(FileExistsError) as caught:
        save(target, b"two", replace=False)
    assert os.fspath(caught.value.filename) == str(target)
    assert (target / "file").read_bytes() == b"one"

    save(target, b"three", replace=True)
    assert (target / "file").read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["target"]


def test_one_that_came_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with _engine.FolderPublication(target, replace=False) as publication:
        save(target, b"theirs")
        with pytest.raises(FileExistsError):
            publication.commit(False)

    assert (target / "file").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("ban", ["", "exchange"], ids=["exchanged", "aside"])
@pytest.mark.parametrize("times", [1, 1000])
def test_only_the_folder_that_was_asked_about_is_replaced(
    tmp_path: Path, ban: str, times: int
) -> None:
    """Another takes its name between the question and the answer."""
    target = tmp_path / "target"
    save(target, b"0")
    asked: list[bytes] = []

    def may_replace(fd: int) -> bool:
        with open(os.open("file", os.O_RDONLY, dir_fd=fd), "rb") as file:
            asked.append(file.read())
        if len(asked) <= times:
            target.rename(tmp_path / f"moved{len(asked)}")
            target.mkdir()
            (target / "file").write_bytes(b"%d" % len(asked))
        return True

    _engine.fault_ban(ban or None, errno.EINVAL)
    try:
        with _engine.FolderPublication(target) as publication:
            if times == 1:
                publication.commit(False, may_replace)
            else:
                with pytest.raises(OSError) as caught:
                    publication.commit(False, may_replace)
                assert caught.value.errno == errno.EBUSY
    finally:
        _engine.fault_ban(None, 0)

    if times == 1:
        assert asked == [b"0", b"1"]
        assert os.listdir(target) == []
        assert sorted(os.listdir(tmp_path)) == ["moved1", "target"]
    else:
        assert (target / "file").read_bytes() == b"%d" % len(asked)
    assert (tmp_path / "moved1" / "file").read_bytes() == b"0"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_no_about_one_that_is_gone_counts_for_nothing(
    tmp_path: Path, times: int, early: bool
) -> None:
    """Another saver replaces the folder, and removes it while it is looked at."""
    target = tmp_path / "target"
    save(target, b"0")
    asked: list[int] = []

    def may_replace(fd: int) -> bool:
        asked.append(fd)
        if len(asked) > times:
            return True
        save(target, b"theirs")
        assert os.listdir(fd) == []
        return False

    with _engine.FolderPublication(target) as publication:
        os.close(_engine.create_beneath(publication.fd, b"ours"))
        if times == 1:
            if early:
                publication.ask(may_replace)
            publication.commit(False, may_replace)
        else:
            with pytest.raises(OSError) as caught:
                (publication.ask if early else lambda ask: publication.commit(False, ask))(
                    may_replace
                )
            assert caught.value.errno == errno.EBUSY

    assert len(asked) == (2 + early if times == 1 else 100)
    assert os.listdir(target) == ["ours" if times == 1 else "file"]
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("ban", ["", "exchange"], ids=["exchanged", "aside"])
def test_one_that_is_removed_meanwhile(tmp_path: Path, ban: str) -> None:
    target = tmp_path / "target"
    save(target, b"old")

    def may_replace(fd: int) -> bool:
        shutil.rmtree(target)
        return True

    _engine.fault_ban(ban or None, errno.EINVAL)
    try:
        save(target, b"new", ask=may_replace)
    finally:
        _engine.fault_ban(None, 0)

    assert (target / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("existing", [False, True])
def test_where_the_folder_is_in_is_removed_meanwhile(tmp_path: Path, existing: bool) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    if existing:
        save(parent / "target", b"old")
    publication = _engine.FolderPublication(parent / "target")
    shutil.rmtree(parent)
    with pytest.raises(FileNotFoundError):
        publication.commit(False, lambda fd: True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_the_last_answer_counts(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "target"
    if existing:
        save(target, b"one")
    with _engine.FolderPublication(target) as publication:
        publication.ask(lambda fd: True)
        save(target, b"two")
        with pytest.raises(FileExistsError):
            publication.ask(lambda fd: False)
        with pytest.raises(FileExistsError):
            publication.commit(False, lambda fd: False)
    with _engine.FolderPublication(target) as publication:
        with pytest.raises(ZeroDivisionError):
            publication.ask(lambda fd: bool(1 / 0))
        with pytest.raises(ZeroDivisionError):
            publication.commit(False, lambda fd: bool(1 / 0))

    assert (target / "file").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_file_is_not_replaced(tmp_path: Path, replace: bool, late: bool) -> None:
    target = tmp_path / "target"
    if not late:
        target.write_bytes(b"a file")
        with pytest.raises(NotADirectoryError):
            save(target, replace=replace)
    else:
        with _engine.FolderPublication(target, replace=replace) as publication:
            target.write_bytes(b"a file")
            with pytest.raises(NotADirectoryError):
                publication.commit(False)

    assert target.read_bytes() == b"a file"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("end", ["", "/", "///"])
def test_links_are_followed_and_slashes_mean_nothing(tmp_path: Path, end: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to("../there/model")
    for text in (b"one", b"two"):
        save(f"{tmp_path}/here/link{end}", text)
        assert (tmp_path / "there" / "model" / "file").read_bytes() == text

    assert (tmp_path / "here" / "link").is_symlink()
    assert os.listdir(tmp_path / "there") == ["model"]
    assert os.listdir(tmp_path / "here") == ["link"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", FileNotFoundError),
        ("missing/x", FileNotFoundError),
        ("file/x", NotADirectoryError),
        ("file", NotADirectoryError),
        ("loop", OSError),
        (".", OSError),
        ("..", OSError),
        ("folder/.", OSError),
        ("/", OSError),
        ("n" * 256, OSError),
        ("n" * 5000, OSError),
    ],
)
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: type[OSError]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_bytes(b"old")
    Path("loop").symlink_to("loop")

    with pytest.raises(expected) as caught:
        _engine.FolderPublication(path)

    assert os.fspath(caught.value.filename) == path
    assert sorted(os.listdir()) == ["file", "folder", "loop"]


def test_a_null_byte(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        _engine.FolderPublication(f"{tmp_path}/a\0b")


def test_names_of_any_bytes_and_length(tmp_path: Path) -> None:
    for name in (b"n" * 255, b"\xff\xfe\n", b" ", b"-x"):
        path = os.path.join(os.fsencode(tmp_path), name)
        save(path, b"one")
        save(path, b"two")
        assert Path(os.fsdecode(path), "file").read_bytes() == b"two"
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("bits", [0o700, 0o755, 0o770, 0o2775, 0o711])
def test_the_mode_is_that_of_the_old_folder(tmp_path: Path, bits: int) -> None:
    target = tmp_path / "target"
    target.mkdir()
    target.chmod(bits)
    for _ in range(2):
        save(target)
        assert mode(target) == bits


def test_a_new_folder_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path / "target")
    finally:
        os.umask(old)

    assert mode(tmp_path / "target") == 0o750
    assert mode(tmp_path / "target" / "file") == 0o640


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    target.chmod(0o555)

    with pytest.raises(PermissionError):
        save(target)


def test_the_old_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    target, kept = tmp_path / "target", tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_bytes(b"x")
    deep = target / "/".join(["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"x")
    for k in range(50):
        (target / f"s{k}" / "t").mkdir(parents=True)
        (target / f"s{k}" / "t" / "u").write_bytes(b"x")
    (target / "link").symlink_to(kept)
    (target / "d" / "link").symlink_to(kept / "precious")
    os.mkfifo(target / "d" / "fifo")

    save(target)

    assert os.listdir(target) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["kept", "target"]
    assert (kept / "precious").read_bytes() == b"x"


def test_neither_chdir_nor_a_renamed_parent_leads_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    with _engine.FolderPublication("target") as publication:
        monkeypatch.chdir(tmp_path / "there")
        (tmp_path / "here").rename(tmp_path / "moved")
        publication.commit(True)

    assert os.listdir(tmp_path / "moved") == ["target"]
    assert os.listdir(tmp_path / "there") == []


def test_a_file_and_a_folder_of_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    target = tmp_path / "target"
    _engine.fault_ban("tmpfile", 95)
    try:
        with (
            _engine.FolderPublication(target) as folder,
            _engine.Publication(target) as file,
            _engine.FolderPublication(target) as another,
        ):
            assert len(os.listdir(tmp_path)) == 3
            another.commit(False)
            folder.commit(False)
            with pytest.raises(IsADirectoryError):
                file.commit(False)
    finally:
        _engine.fault_ban(None, 0)

    assert os.listdir(tmp_path) == ["target"]
    assert target.is_dir()


def test_checkpoints_side_by_side(tmp_path: Path) -> None:
    """Each looks at what it replaces, which others have begun to remove."""
    target = tmp_path / "target"
    failures: list[BaseException] = []
    tree = {f"layer{k}": np.arange(8.0) for k in range(20)}

    def saver(text: bytes) -> None:
        try:
            for _ in range(40):
                holdfast.save(tree, target, format="oneflow", durable=False)
        except BaseException as error:
            failures.append(error)

    side_by_side(saver)

    assert failures == []
    assert len(holdfast.load(target)) == 20
    assert os.listdir(tmp_path) == ["target"]


def side_by_side(saver: Callable[[bytes], None]) -> None:
    """Run four savers, of the texts 0 to 3, in threads of their own, to their end."""
    threads = [threading.Thread(target=saver, args=(b"%d" % k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_first_savers_side_by_side(tmp_path: Path) -> None:
    """Whoever finds the name taken, where there was none a moment ago, replaces what has it."""
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def saver(text: bytes) -> None:
        for k in range(150):
            start.wait()
            try:
                save(tmp_path / str(k), text)
            except BaseException as error:
                failures.append(error)

    side_by_side(saver)

    assert failures == []
    assert all(os.listdir(tmp_path / str(k)) == ["file"] for k in range(150))


@pytest.mark.parametrize("ask", [None, lambda fd: True], ids=["unasked", "asked"])
def test_savers_side_by_side(tmp_path: Path, ask: Callable[[int], bool] | None) -> None:
    target = tmp_path / "target"
    failures: list[BaseException] = []

    def saver(text: bytes) -> None:
        try:
            for _ in range(30):
                save(target, text, ask=ask)
        except BaseException as error:
            failures.append(error)

    side_by_side(saver)

    assert failures == []
    assert (target / "file").read_bytes() in {b"0", b"1", b"2", b"3"}
    save(target)
    assert os.listdir(tmp_path) == ["target"]
