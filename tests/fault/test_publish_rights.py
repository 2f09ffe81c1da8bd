"""Publishing a file or folder: who may do what with it before and after."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import _engine

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
