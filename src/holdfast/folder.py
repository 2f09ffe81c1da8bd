"""A folder that bytes come from: a checkpoint of many files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from . import _engine
from ._buffer import Buffer
from .errors import FormatError
from .layout import Index
from .links import check_place
from .maps import Maps
from .replaced import Identity, ReplacedError, identity
from .source import FileLike, Source, is_local, is_path, open_source
from .views import pick_layouts

__all__ = ["FolderSource", "Origin", "beside", "open_origin"]

#: Files of less are read whole, opened and closed one by one: a map of one, or a descriptor kept
#: open for it, would cost more than its bytes.
SMALL = 64 << 10
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # often 1024
#: How many files are open at a time while they are read.
DESCRIPTORS = 256 if _LIMIT < 0 else max(4, min(256, _LIMIT // 4))
#: How many files are mapped at most, the largest first; a process may have 65,530 maps.
MAPS = 1 << 14
#: Room for a small file at the first try, and how many are read in one go.
ROOM = 1 << 10
TOGETHER = 1 << 14
#: Of the files whose sizes were asked for, small ones are kept, up to so many bytes in all; and up
#: to so many that are no smaller than ROOM, which takes another look at each.
KEPT = 64 << 20
KEPT_LARGER = 1 << 11

#: What is wrong with a file that was not to be had, for messages.
_WRONG = {
    errno.ELOOP: "a symbolic link, which is not followed",
    errno.EISDIR: "a folder, expected a file",
    errno.EINVAL: "neither a file nor a folder",
}


class FolderSource:
    """A folder being read; for the rest of the library what :class:`holdfast.source.Source` is.

    Attributes
    ----------
    name : str
        For messages.
    start : str
        Name of the file in it that was asked for, where it was one; else empty.
    links : bool
        Whether symbolic links are followed: by formats whose writers make some.
    files : sequence of str
        The files that the index of the checkpoint counts, once there is one.
    notes : list of str
        What those are to be warned of who read it, once it is known that it was not replaced.

    Parameters
    ----------
    fd : int, optional
        A descriptor of the folder, which is then not looked for by its name.
    """

    __slots__ = (
        "_fd", "_kept", "_known", "_lock", "_named", "_parts", "_top", "files", "links", "name",
        "notes", "start",
    )  # fmt: skip

    mappable = True
    repeatable = True

    def __init__(
        self, path: str | bytes | os.PathLike[str], start: str = "", fd: int | None = None
    ) -> None:
        self.name = os.fsdecode(path)
        self.start = start
        self.links = False
        self.files: Sequence[str] = ()
        self.notes: list[str] = []
        self._parts: dict[str, Source] = {}
        self._kept: dict[str, bytes] = {}  # whole contents of small files
        self._known: dict[str, Identity] = {}  # which files were opened under their names
        self._named = fd is None  # whether it was found by its name
        self._lock = threading.Lock()
        self._top: tuple[bool, Mapping[str, str]] | None = None  # what is in it, listed once
        where = path or "." if fd is None else "."
        self._fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)

    @property
    def local(self) -> bool:
        """Whether maps are the right default."""
        return is_local(self._fd)

    def leave(self, end: int) -> None:
        """Nothing: a folder has no position."""

    def close(self) -> None:
        """Close all that is open."""
        self.forget()
        self._kept = {}
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # What formats ask for.

    def entries(self, path: str = "") -> Mapping[str, str]:
        """What is in a sub-folder, by name."""
        if not path and self._top is not None and self._top[0] == self.links:
            return self._top[1]
        fd = self._folder(path)
        try:
            with os.scandir(fd) as inside:
                kinds = [(entry.name, self._kind(entry)) for entry in inside]
        finally:
            os.close(fd)
        kinds.sort()
        found = dict(kinds)
        if not path:
            self._top = self.links, found
        return found

    def read(self, paths: Sequence[str], *, most: int) -> list[bytes | None]:
        """The whole contents of small files; None for those that do not exist."""
        contents: list[bytes | None] = []
        for begin in range(0, len(paths), TOGETHER):
            some = paths[begin : begin + TOGETHER]
            room = np.full(len(some), min(ROOM, most), np.uint64)
            contents += self._contents(some, room, most)
        return contents

    def sizes(self, paths: Sequence[str]) -> np.ndarray:
        """Sizes of files; -1 for those that do not exist.

        What is in small ones is kept: they are open already, and to open them again costs more than
        to read them; and they may be gone by then, where the folder is replaced by a newer one.
        """
        found = [
            self._keep(paths[begin : begin + TOGETHER], np.uint64(ROOM))
            for begin in range(0, len(paths), TOGETHER)
        ]
        sizes = np.concatenate([np.empty(0, np.int64), *found])
        larger = np.flatnonzero((sizes > ROOM) & (sizes < SMALL))
        if len(larger) <= KEPT_LARGER and int(sizes[larger].sum()) <= KEPT:
            self._keep([paths[i] for i in larger.tolist()], sizes[larger].astype(np.uint64))
        return sizes

    def _keep(self, paths: Sequence[str], room: np.ndarray | np.uint64) -> np.ndarray:
        """Sizes of files; of those that fit into so much room, the contents are kept."""
        rooms = np.broadcast_to(np.uint64(0) + room, len(paths)).astype(np.uint64)
        ends = np.cumsum(rooms, dtype=np.uint64)
        memory = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        starts = ends - rooms
        sizes = self._take(paths, starts + np.uint64(memory.ctypes.data), rooms)
        left = KEPT - sum(map(len, self._kept.values()))
        fit = (sizes >= 0) & (sizes <= rooms.astype(np.int64))
        fit &= np.cumsum(np.where(fit, sizes, 0)) <= left
        data = memory.data
        chosen = np.flatnonzero(fit)
        begins = starts[chosen].astype(np.int64)
        ends = begins + sizes[chosen]
        for i, begin, end in zip(chosen.tolist(), begins.tolist(), ends.tolist(), strict=True):
            self._kept[paths[i]] = bytes(data[begin:end])
        return sizes

    def part(self, path: str) -> Source:
        """One file, open until so many others have been asked for."""
        with self._lock:
            if path not in self._parts:
                while len(self._parts) >= DESCRIPTORS:
                    self._parts.pop(next(iter(self._parts))).close()
                self._parts[path] = self._opened(path)
            return self._parts[path]

    def _opened(self, path: str) -> Source:
        """One file, newly opened."""
        try:
            fd = _engine.open_beneath(self._fd, os.fsencode(path), links=self.links)
        except OSError as error:
            raise self._problem(path, error.errno or errno.EIO) from None
        try:
            if self.links:
                check_place(self._called(path), self._fd, os.readlink(f"/proc/self/fd/{fd}"))
            state = os.fstat(fd)
            if self._known.setdefault(path, identity(state)) != identity(state):
                raise ReplacedError(
                    f"{self._called(path)}: was replaced by another file since the folder was "
                    "opened; load it again"
                )
            return Source(self._called(path), state.st_size, fd)
        except BaseException:
            os.close(fd)
            raise

    def at(self, file: int) -> Source:
        """One of `files`; what is mapped or taken from it has to be so before another is closed."""
        return self.part(self.files[file])

    def is_current(self) -> bool:
        """Whether the folder and the files that were opened still have their names."""
        try:
            if self._named and not os.path.samestat(os.stat(self.name or "."), os.fstat(self._fd)):
                return False
            return all(
                identity(os.stat(path, dir_fd=self._fd)) == known
                for path, known in self._known.items()
            )
        except OSError:
            return False

    def again(self) -> Origin:
        """What has the name now; closes this one."""
        self.close()
        return open_origin(os.path.join(self.name, self.start) if self.start else self.name or ".")

    def forget(self) -> None:
        """Close the files that are open."""
        with self._lock:
            for part in self._parts.values():
                part.close()
            self._parts.clear()

    # What a load asks for.

    def maps(self, index: Index, rows: np.ndarray | None = None, *, shared: bool = False) -> Maps:
        """Those files mapped that entries are in, of all of them or of `rows`, but small ones."""
        extents = index.entries if index.storages is None else index.storages
        ends = np.zeros(len(self.files), np.uint64)
        nbytes = extents["nbytes"]
        if index.storages is not None:
            nbytes = np.where(extents["packed"] > 0, extents["packed"], nbytes)
        np.maximum.at(ends, extents["file"], extents["offset"] + nbytes)
        wanted = ends >= (1 if shared else SMALL)
        if rows is not None:
            used = np.zeros(len(ends), bool)
            used[index.entries["file"][rows]] = True
            wanted &= used
        if not shared and np.count_nonzero(wanted) > MAPS:
            wanted &= ends >= np.sort(ends[wanted])[-MAPS]
        owner = np.full(len(ends), -1, np.int64)
        buffers: list[Buffer] = []
        for file in np.flatnonzero(wanted).tolist():
            owner[file] = len(buffers)
            with contextlib.closing(self._opened(self.files[file])) as part:
                buffers.append(part.map(int(ends[file]), shared=shared))
        if rows is None and not shared:
            small = np.flatnonzero((ends > 0) & (ends < SMALL)).tolist()
            self._hold([self.files[file] for file in small])
        return Maps(buffers, owner)

    def _hold(self, paths: Sequence[str]) -> None:
        """Keep what is in small files, which may be replaced before they are asked for."""
        left = KEPT - sum(map(len, self._kept.values()))
        for path in paths[:KEPT_LARGER]:
            if path in self._kept:
                continue
            with contextlib.closing(self._opened(path)) as part:
                left -= part.size
                if left < 0 or part.size > SMALL:
                    return
                self._kept[path] = bytes(part.read(0, part.size))

    def move(
        self,
        segments: np.ndarray,
        *,
        layouts: Sequence[_engine.Layout] | None = None,
        checksum: bool,
        fill: int = _engine.FILL_NEVER,
        threads: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Read `segments`, which are in the order of the files, to their places in memory.

        `fill` says whether files are brought into the page cache, as for ``_engine.read``.
        """
        done = 0
        plain = np.ones(len(segments), bool)
        if layouts:
            plain[[layout[0] for layout in layouts]] = False
        if checksum or not len(segments):
            plain[:] = False
        file = segments["file"]
        kept = self._move_kept(segments, plain)
        if kept.any():
            plain &= ~kept
            done = int(segments["nbytes"][kept].sum())
            if progress is not None:
                progress(done)
        alone = np.ones(len(segments), bool)
        alone[1:] &= file[1:] != file[:-1]
        alone[:-1] &= file[1:] != file[:-1]
        small = plain & alone & (segments["offset"] == 0) & (segments["nbytes"] < SMALL)
        if small.any():
            self._move_small(segments[small], threads)
            done += int(segments["nbytes"][small].sum())
            if progress is not None:
                progress(done)
        rest = np.flatnonzero(~small & ~kept & (segments["nbytes"] > 0))
        for group in self._groups(file[rest]):
            chosen = rest[group]
            part = np.ascontiguousarray(segments[chosen])
            numbers, part["file"] = np.unique(part["file"], return_inverse=True)
            with contextlib.ExitStack() as opened:
                sources = [
                    opened.enter_context(contextlib.closing(self._opened(self.files[number])))
                    for number in numbers.tolist()
                ]
                _engine.read(
                    [source.fd for source in sources],
                    part,
                    layouts=pick_layouts(layouts, chosen),
                    threads=threads,
                    checksum=checksum,
                    fill=fill,
                    progress=_behind(progress, done),
                    filenames=[source.name for source in sources],
                )
            segments["crc"][chosen] = part["crc"]
            done += int(part["nbytes"].sum())

    def _groups(self, file: np.ndarray) -> Iterator[slice]:
        """Runs of segments in no more files than may be open at a time."""
        starts = np.flatnonzero(np.diff(file, prepend=np.iinfo(file.dtype).max)).tolist()
        edges = [*starts[::DESCRIPTORS], len(file)]
        for begin, end in itertools.pairwise(edges):
            yield slice(begin, end)

    def _move_kept(self, segments: np.ndarray, plain: np.ndarray) -> np.ndarray:
        """Copy what files have that are kept; which of the segments that were."""
        moved = np.zeros(len(segments), bool)
        if not self._kept:
            return moved
        wanted = np.flatnonzero(plain & ((segments["address"] > 0) | (segments["nbytes"] == 0)))
        rows = segments[["file", "offset", "nbytes", "address"]][wanted].tolist()
        found = [self._kept.get(self.files[row[0]]) for row in rows]
        for i, data, (_, offset, nbytes, address) in zip(wanted.tolist(), found, rows, strict=True):
            if data is not None and offset + nbytes <= len(data):
                ctypes.memmove(address, data[offset : offset + nbytes], nbytes)
                moved[i] = True
        return moved

    def _move_small(self, segments: np.ndarray, threads: int) -> None:
        """Read files whole, each into the memory of its only segment."""
        paths = [self.files[number] for number in segments["file"].tolist()]
        nbytes = segments["nbytes"]
        room = np.where(segments["address"] > 0, nbytes, 0).astype(np.uint64)
        found = self._take(paths, np.ascontiguousarray(segments["address"]), room, threads)
        short = np.flatnonzero(found < nbytes.astype(np.int64))
        if len(short):
            i = int(short[0])
            what = f"found {int(found[i])}: the file was cut meanwhile"
            if found[i] < 0:
                what = "found no file: it was removed or replaced since the folder was opened"
            raise FormatError(f"{self._called(paths[i])}: needs {int(nbytes[i])} bytes, {what}")

    def _contents(self, paths: Sequence[str], room: np.ndarray, most: int) -> list[bytes | None]:
        ends = np.cumsum(room)
        memory = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        starts = ends - room
        sizes = self._take(paths, starts + np.uint64(memory.ctypes.data), room)
        large = np.flatnonzero(sizes > room.astype(np.int64)).tolist()
        for i in large:
            if int(sizes[i]) > most:
                raise FormatError(
                    f"{self._called(paths[i])}: expected at most {most} bytes, "
                    f"found {int(sizes[i])}"
                )
        data = memory.data  # of which most is never written to
        found: list[bytes | None] = [
            None if size < 0 else bytes(data[start : start + size])
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
        for i in large:
            part = self.part(paths[i])
            found[i] = bytes(part.read(0, int(sizes[i])))
        return found

    def _take(
        self, paths: Sequence[str], address: np.ndarray, room: np.ndarray, threads: int = 0
    ) -> np.ndarray:
        """Sizes of files, of which the first bytes go to `address`; -1 where there is none."""
        encoded = os.fsencode("\0".join(paths)).split(b"\0") if paths else []
        if len(encoded) != len(paths):  # a path has a zero byte, which the engine refuses
            encoded = [os.fsencode(path) for path in paths]
        sizes = _engine.read_files(
            self._fd,
            encoded,
            address,
            room,
            links=self.links,
            threads=threads,
        )
        absent = (sizes == -errno.ENOENT) | (sizes == -errno.ENOTDIR)
        bad = np.flatnonzero((sizes < 0) & ~absent)
        if len(bad):
            raise self._problem(paths[int(bad[0])], -int(sizes[bad[0]]))
        sizes[absent] = -1
        return cast(np.ndarray, sizes)

    def _problem(self, path: str, error: int) -> Exception:
        """What to raise for a file that could not be had."""
        name = self._called(path)
        if error in _WRONG:
            return FormatError(f"{name}: is {_WRONG[error]}")
        if error in (errno.ENOENT, errno.ENOTDIR):
            kind = ReplacedError if path in self._known else FormatError
            return kind(
                f"{name}: a file of the checkpoint is missing, or was replaced since it was opened"
            )
        return OSError(error, os.strerror(error), name)

    def _called(self, path: str) -> str:
        return f"{self.name.rstrip('/')}/{path}"

    def _folder(self, path: str) -> int:
        if not path:
            return os.dup(self._fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if self.links else os.O_NOFOLLOW)
        fd = self._fd
        try:
            for name in path.split("/"):
                try:
                    deeper = os.open(name, flags, dir_fd=fd)
                except NotADirectoryError:
                    raise FormatError(
                        f"{self._called(path)}: expected a folder, found a file or a link"
                    ) from None
                except OSError as error:
                    raise self._problem(path, error.errno or errno.EIO) from None
                if fd != self._fd:
                    os.close(fd)
                fd = deeper
            return fd
        except BaseException:
            if fd != self._fd:
                os.close(fd)
            raise

    def _kind(self, entry: os.DirEntry[str]) -> str:
        try:
            # Without following them, links are neither files nor folders.
            if entry.is_file(follow_symlinks=self.links):
                return "file"
            if entry.is_dir(follow_symlinks=self.links):
                return "folder"
            return "link" if not self.links and entry.is_symlink() else "other"
        except OSError:  # gone meanwhile
            return "other"


#: Where the bytes of a checkpoint come from.
Origin = Source | FolderSource


def open_origin(f: FileLike) -> Origin:
    """Open a file or a folder for reading.

    Raises
    ------
    OSError, TypeError
        As :func:`holdfast.source.open_source`.
    """
    if is_path(f) and os.path.isdir(f):  # type: ignore[arg-type]
        return FolderSource(f)  # type: ignore[arg-type]
    return open_source(f)


def beside(source: Source) -> FolderSource:
    """The folder of a file that says which others make up the checkpoint; closes `source`.

    Raises
    ------
    FormatError
        It is a file object, which does not say where it is.
    """
    if not source.path:
        raise FormatError(f"{source.name}: names files beside it, so it has to be given as a path")
    folder, name = os.path.split(source.path)
    source.close()
    return FolderSource(folder or ".", name)


def _behind(progress: Callable[[int], object] | None, done: int) -> Callable[[int], object] | None:
    """`progress` for what comes after `done` bytes."""
    if progress is None or not done:
        return progress
    return lambda more: progress(done + more)
