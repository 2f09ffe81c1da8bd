"""Many files of a folder in plain Python: the oracle of the C engine's functions in tests.

Everything here is the simplest thing that is right. Paths are walked component by component, each
opened without following a link.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["create_beneath", "open_beneath", "read_files", "write_files"]

Array = np.ndarray[Any, Any]
Progress = Callable[[int], object] | None

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def _components(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    if any(part in (b"", b".", b"..") for part in parts):
        raise ValueError(f"{os.fsdecode(path)!r} is not a path inside a folder")
    if b"\0" in path:
        raise ValueError("embedded null byte")
    return parts


def _enter(dirfd: int, parts: Sequence[bytes], make: bool = False) -> int:
    """A descriptor of the folder that `parts` lead to."""
    at = os.dup(dirfd)
    for part in parts:
        try:
            if make and not _exists(at, part):
                os.mkdir(part, 0o777, dir_fd=at)
            if stat.S_ISLNK(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            inner = os.open(part, _FOLDER, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    return at


def _exists(at: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open(dirfd: int, path: bytes, links: bool) -> int:
    """A regular file; any OSError is about it."""
    parts = _components(path)
    if links:
        fd = os.open(path, _READ, dir_fd=dirfd)
    else:
        at = _enter(dirfd, parts[:-1])
        try:
            fd = os.open(parts[-1], _READ | os.O_NOFOLLOW, dir_fd=at)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a socket
                raise
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        finally:
            os.close(at)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, os.strerror(code))


def _named(error: OSError, path: bytes, filename: Any) -> OSError:
    name = os.fsdecode(path)
    return OSError(
        error.errno,
        os.strerror(error.errno or 0),
        name if filename is None else os.path.join(os.fsdecode(filename), name),
    )


def open_beneath(dirfd: int, path: bytes, *, links: bool = False, filename: Any = None) -> int:
    """Open a regular file in a folder for reading: a descriptor, which the caller closes."""
    try:
        return _open(dirfd, path, links)
    except OSError as error:
        raise _named(error, path, filename) from None


def create_beneath(dirfd: int, path: bytes, *, filename: Any = None) -> int:
    """Create a file in a folder, and the folders on the way: a descriptor, for the caller."""
    parts = _components(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        at = _enter(dirfd, parts[:-1], make=True)
        try:
            return os.open(parts[-1], flags, 0o666, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise _named(error, path, filename) from None


def read_files(
    dirfd: int,
    paths: Sequence[bytes],
    address: Array,
    room: Array,
    *,
    links: bool = False,
    threads: int = 0,  # noqa: ARG001 - the signature of the C engine
    progress: Progress = None,
    filename: Any = None,  # noqa: ARG001
) -> Array:
    """Read the first bytes of many files in a folder, one after the other."""
    sizes = np.zeros(len(paths), np.int64)
    done = 0
    for i, path in enumerate(paths):
        try:
            fd = _open(dirfd, path, links)
        except OSError as error:
            sizes[i] = -(error.errno or errno.EIO)
            continue
        size = os.fstat(fd).st_size
        with os.fdopen(fd, "rb", buffering=0) as file:
            data = file.read(min(size, int(room[i])))
        ctypes.memmove(int(address[i]), data, len(data))
        sizes[i] = size
        done += len(data)
    if progress is not None:
        progress(done)
    return sizes


def write_files(
    dirfd: int,
    folders: Sequence[bytes],
    files: Sequence[bytes],
    first: Array,
    address: Array,
    nbytes: Array,
    *,
    threads: int = 0,  # noqa: ARG001 - the signature of the C engine
    progress: Progress = None,
    filename: Any = None,
) -> None:
    """Make folders in a folder and new files in them, one after the other."""
    for i, folder in enumerate(folders):
        if folder:
            try:
                os.close(_enter(dirfd, _components(folder), make=True))
            except OSError as error:
                raise _named(error, folder, filename) from None
        for k in range(int(first[i]), int(first[i + 1])):
            if b"/" in files[k]:
                raise ValueError(f"{os.fsdecode(files[k])!r} is not a name in a folder")
            path = os.path.join(folder, files[k])
            with open(create_beneath(dirfd, path, filename=filename), "wb") as file:
                file.write(ctypes.string_at(int(address[k]), int(nbytes[k])))
    if progress is not None:
        progress(int(nbytes.sum()))
