"""Publishing a file or folder: who may do what with it before and after."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import _engine

Save = Callable[..., None]
Script = Callable[..., str]

NOBODY = 65534
OTHER = 65533

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


#: Runs as nobody: begins to publish each path and commits, durably; prints the errno of each, or 0.
AS_NOBODY = f"""
import json, os, sys
from holdfast import _engine
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
codes = []
for path in sys.argv[1:]:
    try:
        with _engine.Publication(path) as publication:
            os.write(publication.fd, b"new")
            publication.commit(True)
        codes.append(0)
    except OSError as error:
        assert os.fspath(error.filename) == path
        codes.append(error.errno)
print(json.dumps(codes))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that belongs to whom AS_NOBODY runs as, all of whose parents may be entered."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-test-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        folder.chmod(0o755)
        if any(not parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip(f"others may not enter {folder.parent}")
        yield folder
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def make(path: Path, mode: int) -> Path:
    path.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    path.chmod(mode)
    return path


def test_read_only_file(shared: Path, script: Script) -> None:
    file = make(shared / "file", 0o444)

    assert json.loads(script(AS_NOBODY, file)) == [errno.EACCES]
    assert file.read_bytes() == b"old"
    assert os.listdir(shared) == ["file"]


def test_read_only_directory(shared: Path, script: Script) -> None:
    file = make(shared / "file", 0o644)
    shared.chmod(0o555)

    codes = json.loads(script(AS_NOBODY, shared / "new", file))

    assert codes == [errno.EACCES, errno.EACCES]
    assert file.read_bytes() == b"old"
    assert os.listdir(shared) == ["file"]


def test_directory_that_may_be_written_but_not_read(shared: Path, script: Script) -> None:
    file = make(shared / "file", 0o644)
    shared.chmod(0o333)

    assert json.loads(script(AS_NOBODY, shared / "new", file)) == [0, 0]

    shared.chmod(0o755)
    assert file.read_bytes() == (shared / "new").read_bytes() == b"new"
    assert sorted(os.listdir(shared)) == ["file", "new"]


def test_file_that_may_be_written_but_not_read(shared: Path, script: Script) -> None:
    file = make(shared / "file", 0o200)

    assert json.loads(script(AS_NOBODY, file)) == [0]
    assert mode(file) == 0o200
    file.chmod(0o600)
    assert file.read_bytes() == b"new"


# ---- groups ----------------------------------------------------------------------------------


@pytest.mark.root
@as_root
def test_group_that_cannot_be_kept_opens_nothing_to_another(shared: Path, script: Script) -> None:
    file = make(shared / "file", 0o664)
    os.chown(file, NOBODY, OTHER)  # whom AS_NOBODY is not among

    assert json.loads(script(AS_NOBODY, file)) == [0]

    assert file.read_bytes() == b"new"
    assert (file.stat().st_gid, mode(file)) == (NOBODY, 0o644)


def test_nobody_but_the_owner_before_it_has_its_group(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o666)

    with _engine.Publication(target) as publication:
        assert stat.S_IMODE(os.fstat(publication.fd).st_mode) == 0o600
        publication.commit()

    assert mode(target) == 0o666


# ---- links in folders of everybody's ---------------------------------------------------------


@pytest.mark.root
@as_root
@pytest.mark.parametrize("folder", [False, True])
def test_links_of_strangers(shared: Path, folder: bool) -> None:
    """What the kernel does not follow with fs.protected_symlinks is not followed by other means."""
    kind = _engine.FolderPublication if folder else _engine.Publication
    (shared / "victim").mkdir()
    everybodys = shared / "everybodys"
    everybodys.mkdir()
    os.chown(everybodys, OTHER, OTHER)
    everybodys.chmod(0o1777)
    for name, owner in (("own", 0), ("folders", OTHER), ("stranger", NOBODY)):
        (everybodys / name).symlink_to(shared / "victim" / name)
        os.lchown(everybodys / name, owner, owner)

    for name in ("own", "folders"):
        with kind(everybodys / name) as publication:
            if folder:
                publication.commit(may_replace=lambda fd: True)
            else:
                publication.commit()
    with pytest.raises(PermissionError):
        kind(everybodys / "stranger")
    assert sorted(os.listdir(shared / "victim")) == ["folders", "own"]
    everybodys.chmod(0o777)  # where anybody may rename anything, a link is as good as a file
    kind(everybodys / "stranger").abort()


def test_what_the_kernel_says_of_a_link_is_believed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for kind in (_engine.Publication, _engine.FolderPublication):
        _engine.fault_arm(1, errno.EACCES)
        with pytest.raises(PermissionError):
            kind(tmp_path / "link")
        assert _engine.fault_hit() == "fstatat"
    assert os.listdir(tmp_path) == ["link"]


# ---- access control lists --------------------------------------------------------------------

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
ANYBODY = 0xFFFFFFFF


def acl(user: int, named: int, group: int, mask: int, other: int) -> bytes:
    """An ACL as the kernel has it, in which OTHER is the user who is named."""
    rows = [(1, user, ANYBODY), (2, named, OTHER), (4, group, ANYBODY), (16, mask, ANYBODY)]
    rows.append((32, other, ANYBODY))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


def give(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"no ACLs in {path.parent}: {error}")


def acls(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if "acl" in name}


def test_acl_is_kept(save: Save, way: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    give(target, ACCESS, acl(6, 6, 0, 6, 0))
    assert mode(target) == 0o660  # of which the group has nothing: this is the mask
    before = acls(target)

    save(target, b"new")

    assert target.read_bytes() == b"new"
    assert (acls(target), mode(target)) == (before, 0o660)


def test_acl_that_a_folder_gives_is_not_for_a_file_that_has_none(
    save: Save, way: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o640)
    give(tmp_path, DEFAULT, acl(7, 7, 7, 7, 0))

    save(target, b"new")
    save(tmp_path / "first", b"new")

    assert target.read_bytes() == b"new"
    assert (acls(target), mode(target)) == ({}, 0o640)
    assert ACCESS in acls(tmp_path / "first")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_acl_that_cannot_be_kept(save: Save, tmp_path: Path, code: int) -> None:
    """The group gets no more than everybody: what its bits were is the mask."""
    target = tmp_path / "target"
    target.write_bytes(b"old")
    give(target, ACCESS, acl(6, 6, 0, 6, 4))
    _engine.fault_ban("fsetxattr", code)

    save(target, b"new")

    assert (target.read_bytes(), acls(target), mode(target)) == (b"new", {}, 0o644)


def test_acl_that_is_read_without_proc(save: Save, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    give(target, ACCESS, acl(6, 6, 0, 6, 0))
    give(tmp_path, DEFAULT, acl(7, 7, 7, 7, 0))
    before = acls(target)
    (tmp_path / "plain").write_bytes(b"old")
    os.removexattr(tmp_path / "plain", ACCESS)
    (tmp_path / "plain").chmod(0o640)
    _engine.fault_ban("getxattr", errno.ENOENT)

    save(target, b"new")
    save(tmp_path / "plain", b"new")

    assert (target.read_bytes(), acls(target), mode(target)) == (b"new", before, 0o660)
    assert (acls(tmp_path / "plain"), mode(tmp_path / "plain")) == ({}, 0o640)


def test_acl_that_cannot_be_seen(save: Save, tmp_path: Path) -> None:
    """The group's bits may be a mask."""
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o664)
    _engine.fault_ban("getxattr", errno.EACCES)

    save(target, b"new")

    assert (target.read_bytes(), mode(target)) == (b"new", 0o644)


def test_acl_of_more_entries_than_are_kept(save: Save) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no file system that takes so many")
    rows = [(1, 6, ANYBODY), *((2, 4, 100_000 + i) for i in range(600))]
    rows += [(4, 0, ANYBODY), (16, 6, ANYBODY), (32, 4, ANYBODY)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        target = Path(folder) / "target"
        target.write_bytes(b"old")
        give(target, ACCESS, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *r) for r in rows))

        save(target, b"new")

        assert (target.read_bytes(), acls(target), mode(target)) == (b"new", {}, 0o644)


@pytest.mark.parametrize("call", ["getxattr", "fsetxattr"])
def test_acl_that_fails(save: Save, tmp_path: Path, call: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    give(target, ACCESS, acl(6, 6, 0, 6, 4))
    before = acls(target)
    _engine.fault_ban(call, errno.EIO)

    with pytest.raises(OSError) as raised:
        save(target, b"new")

    assert raised.value.errno == errno.EIO
    assert (target.read_bytes(), acls(target)) == (b"old", before)
    assert os.listdir(tmp_path) == ["target"]


def test_acls_of_a_folder_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    give(target, ACCESS, acl(7, 5, 0, 5, 0))
    give(target, DEFAULT, acl(6, 4, 0, 4, 0))
    target.chmod(0o550)  # changes the list, too
    before = acls(target)

    with _engine.FolderPublication(target) as publication:
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=publication.fd)
        os.close(fd)
        publication.commit()

    assert os.listdir(target) == ["file"]
    assert (acls(target), mode(target)) == (before, 0o550)
    assert mode(target / "file") == 0o640
    assert ACCESS in acls(target / "file")
