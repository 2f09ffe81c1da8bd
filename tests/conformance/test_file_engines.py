"""What every engine does with many files of a folder: one suite for C and for plain Python."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from holdfast import _engine, _engine_files_py

NOISE = np.frombuffer(os.urandom(1 << 20), np.uint8)
BASE = NOISE.ctypes.data

NOT_PLAIN = [b"", b"/", b"/a", b"a/", b"a//b", b".", b"..", b"./a", b"a/.", b"a/../b", b"../a"]


@pytest.fixture
def folder(tmp_path: os.PathLike[str]) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_left(folder: int) -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def put(folder: int, path: str, data: bytes) -> None:
    parts = path.split("/")
    for n in range(1, len(parts)):
        if not os.path.isdir(f"/proc/self/fd/{folder}/" + "/".join(parts[:n])):
            os.mkdir("/".join(parts[:n]), dir_fd=folder)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, dir_fd=folder), "wb") as file:
        file.write(data)


def get(folder: int, path: str) -> bytes:
    with open(os.open(path, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


@pytest.fixture
def kinds(folder: int, request: pytest.FixtureRequest) -> dict[bytes, int]:
    """One of everything that can be in a folder; what there is to be found of it."""
    put(folder, "file", b"f" * 10)
    put(folder, "a/b/inner", b"i" * 20)
    put(folder, "empty", b"")
    os.symlink("file", "link", dir_fd=folder)
    os.symlink("a", "way", dir_fd=folder)
    os.symlink("nowhere", "dangling", dir_fd=folder)
    os.symlink("/proc/self/fd", "fds", dir_fd=folder)
    os.mkfifo("fifo", dir_fd=folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/socket")
    return {
        b"file": 10,
        b"a/b/inner": 20,
        b"empty": 0,
        b"missing": -errno.ENOENT,
        b"missing/inner": -errno.ENOENT,
        b"file/inner": -errno.ENOTDIR,
        b"link": -errno.ELOOP,
        b"way/b/inner": -errno.ELOOP,
        b"dangling": -errno.ELOOP,
        b"fds/0": -errno.ELOOP,
        b"a": -errno.EISDIR,
        b"a/b": -errno.EISDIR,
        b"fifo": -errno.EINVAL,
        b"socket": -errno.EINVAL,
        b"n" * 256: -errno.ENAMETOOLONG,
        b"n" * 256 + b"/inner": -errno.ENAMETOOLONG,
    }


class FileEngineSuite:
    """A subclass gives the engine."""

    engine: ModuleType

    def read(
        self, folder: int, paths: list[bytes], room: int = 100, links: bool = False
    ) -> tuple[list[int], list[bytes]]:
        """Sizes, and what is in the memory of each file; what no byte was read to is "-"."""
        memory = np.full((len(paths), room), ord("-"), np.uint8)
        address = memory.ctypes.data + np.arange(len(paths), dtype=np.uint64) * np.uint64(room)
        rooms = np.full(len(paths), room, np.uint64)
        sizes = self.engine.read_files(folder, paths, address, rooms, links=links, threads=3)
        assert sizes.dtype == np.int64
        return sizes.tolist(), [row.tobytes() for row in memory]

    # ---- reading ---------------------------------------------------------------------------

    def test_each_kind_is_what_it_is(self, folder: int, kinds: dict[bytes, int]) -> None:
        sizes, contents = self.read(folder, list(kinds))

        assert dict(zip(kinds, sizes, strict=True)) == kinds
        for path, content in zip(kinds, contents, strict=True):
            letter = {b"file": b"f", b"a/b/inner": b"i"}.get(path, b"-")
            assert content == (letter * max(0, kinds[path])).ljust(100, b"-"), path

    @pytest.mark.parametrize("room", [0, 1, 9, 10, 11])
    def test_no_more_than_there_is_room_for(self, folder: int, room: int) -> None:
        put(folder, "file", b"0123456789")

        sizes, contents = self.read(folder, [b"file", b"file"], room)

        assert sizes == [10, 10]
        assert contents == [b"0123456789"[:room].ljust(room, b"-")] * 2

    def test_links_are_followed_where_that_is_asked_for(
        self, folder: int, kinds: dict[bytes, int]
    ) -> None:
        sizes, _ = self.read(folder, [b"link", b"way/b/inner", b"dangling", b"way"], links=True)

        assert sizes == [10, 20, -errno.ENOENT, -errno.EISDIR]

    def test_open_says_the_same(self, folder: int, kinds: dict[bytes, int]) -> None:
        for path, size in kinds.items():
            if size >= 0:
                fd = self.engine.open_beneath(folder, path)
                assert os.fstat(fd).st_size == size
                assert not os.get_inheritable(fd)
                os.close(fd)
                continue
            with pytest.raises(OSError) as caught:
                self.engine.open_beneath(folder, path, filename="model")
            assert caught.value.errno == -size, path
            assert caught.value.filename == "model/" + path.decode()

    def test_nothing(self, folder: int) -> None:
        assert self.read(folder, []) == ([], [])

    @pytest.mark.parametrize("path", [*NOT_PLAIN, b"nul\0byte"])
    def test_paths_that_lead_elsewhere(self, folder: int, path: bytes) -> None:
        for links in (False, True):
            with pytest.raises(ValueError):
                self.read(folder, [b"file", path], links=links)
            with pytest.raises(ValueError):
                self.engine.open_beneath(folder, path, links=links)
        with pytest.raises(ValueError):
            self.engine.create_beneath(folder, path)
        assert os.listdir(folder) == []

    # ---- writing ---------------------------------------------------------------------------

    def write(self, folder: int, wanted: dict[bytes, dict[bytes, int]]) -> None:
        """Make folders of files of given sizes."""
        counts = [len(files) for files in wanted.values()]
        sizes = [size for files in wanted.values() for size in files.values()]
        self.engine.write_files(
            folder,
            list(wanted),
            [name for files in wanted.values() for name in files],
            np.cumsum([0, *counts], dtype=np.int64),
            np.uint64(BASE) + np.arange(len(sizes), dtype=np.uint64),
            np.array(sizes, np.uint64),
            threads=3,
        )

    def test_files_in_folders(self, folder: int) -> None:
        self.write(
            folder,
            {
                b"": {b"top": 3, b"zero": 0},
                b"a": {b"one": 1000, b"two": 1},
                b"deep/er/still": {b"x": 70_000},
                b"none": {},
            },
        )

        assert sorted(os.listdir(folder)) == ["a", "deep", "none", "top", "zero"]
        sizes = {"top": 3, "zero": 0, "a/one": 1000, "a/two": 1, "deep/er/still/x": 70_000}
        for k, (path, size) in enumerate(sizes.items()):
            assert get(folder, path) == NOISE[k : k + size].tobytes(), path
            mode = os.stat(path, dir_fd=folder).st_mode & 0o777
            umask = os.umask(0)
            os.umask(umask)
            assert mode == 0o666 & ~umask

    def test_folders_may_be_there_but_files_may_not(self, folder: int) -> None:
        put(folder, "a/one", b"old")
        self.write(folder, {b"a": {b"two": 5}})

        with pytest.raises(FileExistsError) as caught:
            self.write(folder, {b"a": {b"one": 5}})

        assert caught.value.filename == "a/one"
        assert get(folder, "a/one") == b"old"

    def test_no_link_leads_a_write_elsewhere(self, folder: int, kinds: dict[bytes, int]) -> None:
        for way, name in [(b"way", b"x"), (b"way/b", b"x"), (b"", b"link"), (b"", b"dangling")]:
            with pytest.raises(OSError) as caught:
                self.write(folder, {way: {name: 1}})
            assert caught.value.errno in (errno.ELOOP, errno.EEXIST)
            with pytest.raises(OSError):
                self.engine.create_beneath(folder, os.path.join(way, name))
        with pytest.raises(NotADirectoryError):
            self.write(folder, {b"file": {b"x": 1}})

        assert get(folder, "file") == b"f" * 10
        assert sorted(os.listdir(f"/proc/self/fd/{folder}/a")) == ["b"]
        assert os.listdir(f"/proc/self/fd/{folder}/a/b") == ["inner"]

    @pytest.mark.parametrize("name", [*NOT_PLAIN, b"a/b"])
    def test_names_are_single_components(self, folder: int, name: bytes) -> None:
        with pytest.raises(ValueError):
            self.write(folder, {b"sub": {name: 1}})
        if name not in (b"", b"a/b"):
            with pytest.raises(ValueError):
                self.write(folder, {name: {b"x": 1}})
        found = [path for path, _, files in os.walk(f"/proc/self/fd/{folder}") for _ in files]
        assert found == []

    def test_create_makes_the_folders_on_the_way(self, folder: int) -> None:
        for path in ("x", "a/b/c/x", "a/b/y"):
            fd = self.engine.create_beneath(folder, path.encode())
            os.write(fd, path.encode())
            assert os.pread(fd, 100, 0) == path.encode()
            os.close(fd)
            assert get(folder, path) == path.encode()
        with pytest.raises(FileExistsError) as caught:
            self.engine.create_beneath(folder, b"a/b/y", filename="model")
        assert caught.value.filename == "model/a/b/y"

    def test_many(self, folder: int) -> None:
        n = 300
        self.write(folder, {b"t%d" % i: {b"meta": 20, b"out": i} for i in range(n)})

        paths = [b"t%d/out" % i for i in range(n)]
        sizes, contents = self.read(folder, paths, n)

        assert sizes == list(range(n))
        for i, content in enumerate(contents):
            assert content[:i] == NOISE[2 * i + 1 : 3 * i + 1].tobytes()

    def test_progress(self, folder: int) -> None:
        seen: list[int] = []
        sizes = np.array([10, 20], np.uint64)
        address = np.full(2, BASE, np.uint64)
        self.engine.write_files(
            folder, [b"a"], [b"x", b"y"], np.array([0, 2]), address, sizes, progress=seen.append
        )
        memory = np.zeros(30, np.uint8)
        self.engine.read_files(
            folder,
            [b"a/x", b"a/y"],
            np.array([0, 10], np.uint64) + np.uint64(memory.ctypes.data),
            sizes,
            progress=seen.append,
        )

        assert seen == [30, 30]
        assert memory.tobytes() == NOISE[:10].tobytes() + NOISE[:20].tobytes()


class TestC(FileEngineSuite):
    engine = _engine


class TestCWithoutOpenat2(FileEngineSuite):
    """A kernel, or a sandbox, that lacks the call which walks a path by rules."""

    engine = _engine

    @pytest.fixture(autouse=True, params=[errno.ENOSYS, errno.EPERM])
    def ban(self, request: pytest.FixtureRequest) -> Iterator[None]:
        _engine.fault_ban("openat2", request.param)
        yield
        _engine.fault_ban(None, 0)


class TestPython(FileEngineSuite):
    engine = _engine_files_py
