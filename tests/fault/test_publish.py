"""Publishing a file: names, modes and owners, links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine

Save = Callable[..., None]
Listing = Callable[[], list[str]]

NOBODY = 65534


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_appears_at_commit(way: str, target: Path, listing: Listing, durable: bool) -> None:
    with _engine.Publication(target) as publication:
        os.write(publication.fd, b"content")
        assert "target" not in listing()
        publication.commit(durable)

    assert target.read_bytes() == b"content"
    assert listing() == ["target"]


@pytest.mark.parametrize("durable", [False, True])
def test_replaces(save: Save, way: str, target: Path, listing: Listing, durable: bool) -> None:
    target.write_bytes(b"old, and longer than the new")
    inode = target.stat().st_ino

    save(target, b"new", durable=durable)

    assert target.read_bytes() == b"new"
    assert target.stat().st_ino != inode
    assert listing() == ["target"]


@pytest.mark.parametrize("existing", [False, True])
def test_abort_leaves_all_as_it_was(
    way: str, target: Path, listing: Listing, existing: bool
) -> None:
    if existing:
        target.write_bytes(b"old")
    before = listing()

    with _engine.Publication(target) as publication:
        os.write(publication.fd, b"new")

    assert listing() == before
    assert not existing or target.read_bytes() == b"old"


@pytest.mark.parametrize("form", [str, os.fsencode, Path])
def test_forms_of_a_path(save: Save, target: Path, form: Callable[[Path], object]) -> None:
    save(form(target), b"content")

    assert target.read_bytes() == b"content"


def test_names_of_any_bytes_and_length(save: Save, way: str, tmp_path: Path) -> None:
    for name in (b"n" * 255, b"\xff\xfe\n", b" ", b"-x"):
        path = os.path.join(os.fsencode(tmp_path), name)
        save(path, b"one")
        save(path, b"two")
        assert Path(os.fsdecode(path)).read_bytes() == b"two"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", FileNotFoundError),
        ("missing/x", FileNotFoundError),
        ("missing/x/", FileNotFoundError),
        ("folder", IsADirectoryError),
        ("folder/", IsADirectoryError),
        ("folder/.", IsADirectoryError),
        ("folder/..", IsADirectoryError),
        (".", IsADirectoryError),
        ("/", IsADirectoryError),
        ("new/", IsADirectoryError),
        ("file/", IsADirectoryError),
        ("file/x", NotADirectoryError),
    ],
)
def test_refused_as_open_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: type[OSError]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_bytes(b"old")
    with pytest.raises(expected) as by_open:
        os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)

    with pytest.raises(expected) as caught:
        _engine.Publication(path)

    assert caught.value.errno == by_open.value.errno
    assert os.fspath(caught.value.filename) == path
    assert sorted(os.listdir()) == ["file", "folder"]


@pytest.mark.parametrize("path", ["n" * 256, "n" * 5000, "folder/" * 1000 + "x"])
def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(OSError) as caught:
        _engine.Publication(path)

    assert caught.value.errno == errno.ENAMETOOLONG


def test_neither_chdir_nor_a_renamed_parent_leads_astray(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    with _engine.Publication("target") as publication:
        monkeypatch.chdir(tmp_path / "there")
        (tmp_path / "here").rename(tmp_path / "moved")
        publication.commit(True)

    assert os.listdir(tmp_path / "moved") == ["target"]
    assert os.listdir(tmp_path / "there") == []


# ---- modes and owners ----------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077, 0o222, 0o777])
def test_umask(save: Save, way: str, target: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(target, b"new")
    finally:
        assert os.umask(before) == umask, "the umask of the process was touched"

    assert mode(target) == 0o666 & ~umask


@pytest.mark.parametrize("old", [0o600, 0o640, 0o666, 0o755, 0o777, 0o2755, 0o4750])
def test_mode_of_an_existing_file(save: Save, way: str, target: Path, old: int) -> None:
    target.write_bytes(b"old")
    target.chmod(old)

    save(target, b"new", durable=True)

    assert mode(target) == old
    assert target.read_bytes() == b"new"


def test_never_more_open_than_the_old_file(target: Path, listing: Listing) -> None:
    target.write_bytes(b"secret")
    target.chmod(0o600)
    _engine.fault_ban("tmpfile", errno.EOPNOTSUPP)

    with _engine.Publication(target) as publication:
        assert len(listing()) == 2
        assert stat.S_IMODE(os.fstat(publication.fd).st_mode) == 0o600


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owner_and_group_are_kept(save: Save, way: str, target: Path) -> None:
    target.write_bytes(b"old")
    os.chown(target, NOBODY, NOBODY)
    target.chmod(0o4600)

    save(target, b"new")

    status = target.stat()
    assert (status.st_uid, status.st_gid, mode(target)) == (NOBODY, NOBODY, 0o4600)


# ---- links and things that are not regular files -------------------------------------------


def test_symbolic_link_stays_and_its_file_is_replaced(save: Save, way: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "file"
    file.write_bytes(b"old")
    file.chmod(0o640)
    (tmp_path / "relative").symlink_to("data/file")
    (tmp_path / "chain").symlink_to(tmp_path / "relative")

    save(tmp_path / "chain", b"new")

    assert (tmp_path / "chain").is_symlink()
    assert (tmp_path / "relative").is_symlink()
    assert (file.read_bytes(), mode(file)) == (b"new", 0o640)
    assert os.listdir(tmp_path / "data") == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["chain", "data", "relative"]


def test_dangling_link_creates_what_it_points_to(save: Save, way: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data/file")

    save(tmp_path / "link", b"new")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "data" / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("to", "code"),
    [("link", errno.ELOOP), ("missing/x", errno.ENOENT), (".", errno.EISDIR), ("x/", errno.EISDIR)],
)
def test_links_that_lead_nowhere(tmp_path: Path, listing: Listing, to: str, code: int) -> None:
    link = tmp_path / "link"
    link.symlink_to(to)

    with pytest.raises(OSError) as caught:
        _engine.Publication(link)

    assert caught.value.errno == code
    assert listing() == ["link"]


def test_links_in_a_chain_of_any_sane_length(save: Save, tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}").symlink_to(f"{i + 1}")

    save(tmp_path / "0", b"new")

    assert not (tmp_path / "40").is_symlink()
    (tmp_path / "-").symlink_to("0")
    with pytest.raises(OSError) as caught:  # as open(2)
        save(tmp_path / "-", b"new")
    assert caught.value.errno == errno.ELOOP


def test_other_hard_links_keep_the_old_content(save: Save, target: Path, tmp_path: Path) -> None:
    target.write_bytes(b"old")
    os.link(target, tmp_path / "other")

    save(target, b"new")

    assert (tmp_path / "other").read_bytes() == b"old"


def test_streams_are_told_apart(tmp_path: Path, listing: Listing) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to("fifo")
    reader, writer = os.pipe()
    try:
        for path in (fifo, tmp_path / "link", "/dev/null", f"/proc/self/fd/{writer}"):
            with pytest.raises(OSError) as caught:
                _engine.Publication(path)
            assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(reader)
        os.close(writer)
    assert listing() == ["fifo", "link"]


def test_a_file_without_a_name_is_none_to_be_replaced(tmp_path: Path, listing: Listing) -> None:
    """What its link in /proc says, "/path (deleted)", became a file of that name."""
    gone = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT)
    (tmp_path / "gone").unlink()
    memory = os.memfd_create("memory")
    try:
        for fd in (gone, memory):
            with pytest.raises(OSError) as caught:
                _engine.Publication(f"/proc/self/fd/{fd}")
            assert caught.value.errno == errno.ESPIPE
            os.write(fd, b"longer than what is saved" * 1000)
            holdfast.save({"w": np.ones(3)}, f"/proc/self/fd/{fd}")
            assert holdfast.load(f"/proc/self/fd/{fd}", framework="numpy")["w"].tolist() == [1] * 3
        assert listing() == []
        (tmp_path / "gone (deleted)").write_bytes(b"another")
        holdfast.save({"w": np.ones(3)}, f"/proc/self/fd/{gone}")
        assert (tmp_path / "gone (deleted)").read_bytes() == b"another"
    finally:
        os.close(gone)
        os.close(memory)
    assert not os.path.exists("/memfd:memory (deleted)")
