"""Where bytes come from: a path, or a binary file object."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np

from . import _engine, _engine_py
from ._buffer import Buffer
from .errors import FormatError
from .layout import SEGMENT, Index
from .maps import Maps

__all__ = [
    "FileLike",
    "Maps",
    "Source",
    "is_local",
    "is_path",
    "open_source",
    "path_text",
    "reading",
]

FileLike = str | bytes | os.PathLike[str] | os.PathLike[bytes] | BinaryIO

#: File systems that a map is the wrong default for, by the magic number of statfs(2): each page
#: fault there is a round trip, and a server that goes away is a SIGBUS.
_NETWORK = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x65735546: "fuse",
    0x0BD00BD0: "lustre",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x5346414F: "afs",
    0x6B414653: "kafs",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x7461636F: "ocfs2",
    0x73757245: "coda",
    0x564C: "ncp",
    0x20030528: "orangefs",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
}


def is_local(fd: int) -> bool:
    """Whether a descriptor is of a file system that is not behind a network."""
    return _engine.filesystem(fd) not in _NETWORK


def is_path(f: object) -> bool:
    """Whether `f` names a file, rather than being one."""
    return isinstance(f, str | bytes | os.PathLike)


def path_text(f: Any) -> str:
    """What messages call `f`."""
    if is_path(f):
        return os.fsdecode(f)
    name = getattr(f, "name", None)
    return name if isinstance(name, str) else f"<{type(f).__name__}>"


#: From this size on, bytes that are read go to huge pages. Less is better off in memory that the
#: allocator has at hand.
HUGE = 4 << 20


class Source:
    """A file being read.

    Attributes
    ----------
    name : str
        For messages.
    path : str
        Of a regular file that was opened by it; else empty.
    size : int
        In bytes, from where the checkpoint begins; -1 for a stream whose end is not known.
    fd : int
        Descriptor of a regular file, or -1 for a stream.
    stream : BinaryIO or None
        The file object, where `fd` is -1. It stands behind the bytes of `head`.
    """

    __slots__ = (
        "_given",
        "_head",
        "_lock",
        "_origin",
        "_owned",
        "_spent",
        "_start",
        "fd",
        "name",
        "path",
        "size",
        "stream",
    )

    def __init__(
        self,
        name: str,
        size: int,
        fd: int = -1,
        stream: BinaryIO | None = None,
        *,
        owned: bool = False,
    ) -> None:
        self.name = name
        self.path = ""
        self.size = size
        self.fd = fd
        self.stream = stream
        self._head = b""
        self._owned = owned
        self._spent = False
        self._lock = threading.Lock()
        self._origin = stream.tell() if stream is not None and size >= 0 else -1
        self._given: BinaryIO | None = None if owned else stream
        self._start = self._origin

    @property
    def mappable(self) -> bool:
        """Whether the bytes can be mapped into memory at all."""
        return self.fd >= 0

    @property
    def local(self) -> bool:
        """Whether a map is the right default: a regular file that is not behind a network."""
        return self.fd >= 0 and is_local(self.fd)

    @property
    def repeatable(self) -> bool:
        """Whether the bytes can be read more than once: not those of a pipe."""
        return self.fd >= 0 or self._origin >= 0

    @contextmanager
    def replay(self) -> Iterator[BinaryIO]:
        """A stream's bytes from where the checkpoint begins, those already taken included.

        Where the stream can seek, each call starts anew; where it cannot, the bytes pass once. One
        thread at a time has them.

        Raises
        ------
        io.UnsupportedOperation
            They have passed.
        """
        assert self.stream is not None
        with self._lock:
            if self.repeatable:
                self.stream.seek(self._origin)
                yield self.stream
                return
            if self._spent:
                raise io.UnsupportedOperation(
                    f"{self.name}: has been read and cannot seek back; read it once, with load()"
                )
            self._spent = True
            head, self._head = self._head, b""
            yield cast(BinaryIO, _Replay(head, self.stream))

    def maps(self, index: Index, rows: np.ndarray | None = None, *, shared: bool = False) -> Maps:
        """The file that `index` is of, mapped; of a folder, those files that `rows` are in."""
        del rows
        return Maps([self.map(index.end, shared=shared)])

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
        """Read `segments`, which are in the order of the file, to their places in memory.

        `fill` says whether the file is brought into the page cache, as for ``_engine.read``.
        """
        if self.fd >= 0:
            _engine.read(
                [self.fd],
                segments,
                layouts=layouts,
                threads=threads,
                checksum=checksum,
                fill=fill,
                progress=progress,
                filenames=[self.name],
            )
            return
        with self.replay() as stream:
            _engine_py.read_stream(
                stream,
                segments,
                layouts=layouts,
                checksum=checksum,
                progress=progress,
                name=self.name,
            )

    def map(self, end: int, *, shared: bool = False) -> Buffer:
        """The first `end` bytes of a regular file, mapped: private and writable.

        With `shared`, what is written to them is in the file.

        Raises
        ------
        FormatError
            The file has become shorter than that. To touch a map beyond it would be a SIGBUS.
        OSError
            With `shared`, the file cannot be written to.
        """
        size = os.fstat(self.fd).st_size
        if size < end:
            raise FormatError(
                f"{self.name}: needs {end} bytes, found {size}: the file was cut meanwhile"
            )
        if not shared:
            return _engine.map_file(self.fd, 0, end, self.name)
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        try:
            return _engine.map_file(fd, 0, end, self.name, shared=True)
        finally:
            os.close(fd)

    def at(self, file: int) -> Source:
        """Itself: a checkpoint that is one file has no other."""
        assert file == 0
        return self

    def peek(self, nbytes: int) -> bytes:
        """At most the first `nbytes` bytes; fewer only where the file ends before."""
        if self.fd >= 0:
            return _read_exactly(self.fd, 0, nbytes, self.name)
        if self._origin >= 0:
            return self._seek_read(0, nbytes)
        self._fill(nbytes)
        return self._head[:nbytes]

    def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        """Exactly the bytes ``[offset, offset + nbytes)``.

        Raises
        ------
        FormatError
            The file ends before.
        """
        data: bytes | memoryview
        if self.fd >= 0 and HUGE <= nbytes <= self.size - offset:
            data = self._read_huge(offset, nbytes)
        elif self.fd >= 0:
            data = _read_exactly(self.fd, offset, nbytes, self.name)
        elif self._origin >= 0:
            data = self._seek_read(offset, nbytes)
        else:
            self._fill(offset + nbytes)
            data = self._head[offset : offset + nbytes]
        if len(data) < nbytes:
            raise FormatError(
                f"{self.name}: needs {nbytes} bytes at offset {offset}, "
                f"file ends at {self._end(offset + len(data))}"
            )
        return data

    def _end(self, reached: int) -> int:
        """Where the file ends, of which nothing was found from `reached` on: there, or before."""
        if self.fd >= 0:
            return min(reached, os.fstat(self.fd).st_size)
        if self._origin < 0:
            return min(reached, len(self._head))
        assert self.stream is not None
        with self._lock:
            self.stream.seek(self._origin)
            left = _remaining(self.stream)
        return min(reached, left) if left >= 0 else reached

    def settle(self) -> None:
        """Learn the size of a stream that cannot tell it, by taking all of it into memory."""
        if self.size >= 0:
            return
        assert self.stream is not None
        taken = io.BytesIO()
        taken.write(self._head)
        while part := _checked(self.stream.read(1 << 20), self.name):
            taken.write(part)
        if self._owned:
            self.stream.close()
        self.size = taken.tell()
        self.stream, self._origin, self._head, self._owned = taken, 0, b"", False

    def leave(self, end: int) -> None:
        """Put a caller's file object behind the checkpoint, which ends at `end`, if it can seek."""
        if self._given is not None and self._start >= 0:
            self._given.seek(self._start + end)

    def _seek_read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of a stream that can seek; fewer only where it ends before."""
        assert self.stream is not None
        parts = []
        with self._lock:
            self.stream.seek(self._origin + offset)
            while nbytes > 0:
                part = _checked(self.stream.read(min(nbytes, 1 << 24)), self.name)
                if not part:
                    break
                parts.append(part)
                nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_huge(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of a header so large that faulting in small pages for it would take longest."""
        segment = np.zeros(1, SEGMENT)
        buffer = _engine.allocate(nbytes)
        segment["offset"], segment["nbytes"], segment["address"] = offset, nbytes, buffer.address
        _engine.read([self.fd], segment, checksum=False, threads=1, filenames=[self.name])
        return memoryview(buffer)

    def _fill(self, nbytes: int) -> None:
        """Take bytes from the stream until `nbytes` of them are in the head, or it ends."""
        assert self.stream is not None
        parts = [self._head]
        missing = nbytes - len(self._head)
        while missing > 0:
            # Bounded requests: a hostile length must not make a file object allocate it at once.
            part = _checked(self.stream.read(min(missing, 1 << 20)), self.name)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self._head = b"".join(parts)

    def close(self) -> None:
        """Close the descriptor. A file object stays its owner's to close."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        elif self._owned and self.stream is not None:
            self.stream.close()


def _checked(part: Any, name: str) -> bytes:
    """What ``read`` of a file object returned, if it is bytes."""
    if not isinstance(part, bytes | bytearray | memoryview):
        raise TypeError(
            f"{name}: read() returned {type(part).__name__}; "
            "the file object must be opened in binary mode"
        )
    return bytes(part)


class _Replay:
    """Bytes already taken from a stream, and then the stream."""

    __slots__ = ("_head", "_stream", "_taken")

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._taken = 0
        self._stream = stream

    def read(self, nbytes: int = -1) -> bytes:
        if self._taken >= len(self._head):
            return self._stream.read(nbytes)
        stop = len(self._head) if nbytes < 0 else self._taken + nbytes
        part = self._head[self._taken : stop]
        self._taken += len(part)
        return part


def _read_exactly(fd: int, offset: int, nbytes: int, name: str) -> bytes:
    """The bytes at `offset`; fewer only where the file ends before."""
    parts = []
    while nbytes > 0:
        try:
            part = os.pread(fd, nbytes, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
        if not part:
            break
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def open_source(f: FileLike) -> Source:
    """Open `f` for reading.

    Raises
    ------
    OSError
        As open(2) has it: ``FileNotFoundError``, ``IsADirectoryError``, ``PermissionError``.
    TypeError
        `f` is neither a path nor a binary file object.
    """
    if is_path(f):
        return _open_path(cast("str | bytes | os.PathLike[str]", f))
    if not hasattr(f, "read"):
        raise TypeError(
            f"f must be a path or a binary file object with read(), not {type(f).__name__}"
        )
    if isinstance(f, io.TextIOBase):
        raise TypeError(f"{path_text(f)}: a text file object; open it with mode 'rb'")
    stream = cast(BinaryIO, f)
    fd = _descriptor(stream)
    if fd < 0:
        return Source(path_text(f), _remaining(stream), stream=stream)
    source = Source(path_text(f), os.fstat(fd).st_size, fd)
    source._given, source._start = stream, 0
    return source


def _descriptor(stream: BinaryIO) -> int:
    """A descriptor of our own for a file object that is a regular file at its start, or -1.

    Only for classes whose ``fileno`` is known to be what they read: that of a GzipFile is not.
    """
    plain: Any = stream
    kind = type(stream)
    if (kind.__module__, kind.__name__) == ("tempfile", "_TemporaryFileWrapper"):
        plain = stream.file  # type: ignore[attr-defined]  # of a NamedTemporaryFile
    if type(plain) not in (io.BufferedReader, io.BufferedRandom, io.FileIO):
        return -1
    try:
        if stream.tell() != 0 or not plain.readable():
            return -1
        if isinstance(plain, io.BufferedRandom):
            plain.flush()
        fd = plain.fileno()
        if type(getattr(plain, "raw", plain)) is io.FileIO and stat.S_ISREG(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        pass
    return -1


def _open_path(path: str | bytes | os.PathLike[str]) -> Source:
    name = os.fsdecode(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if stat.S_ISREG(status.st_mode):
            source = Source(name, status.st_size, fd)
            source.path = name
            return source
    except BaseException:
        os.close(fd)
        raise
    return Source(name, -1, stream=cast(BinaryIO, os.fdopen(fd, "rb")), owned=True)


def _remaining(stream: BinaryIO) -> int:
    """Bytes from the position of `stream` to its end, or -1 where it cannot tell."""
    try:
        here = stream.tell()
        stream.seek(0, os.SEEK_END)
        end = stream.tell()  # seek() of somebody's own may return nothing
        stream.seek(here)
    except (AttributeError, OSError, ValueError):
        return -1
    return end - here


@contextmanager
def reading(f: FileLike) -> Iterator[Source]:
    """``open_source`` that closes."""
    source = open_source(f)
    try:
        yield source
    finally:
        source.close()
