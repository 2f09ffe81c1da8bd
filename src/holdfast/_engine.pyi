from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from ._buffer import Buffer

Bytes: TypeAlias = bytes | bytearray | memoryview | Buffer | np.ndarray[Any, Any]
#: (index of the segment, shape, strides in bytes, itemsize, unit whose bytes are swapped or 0)
Layout: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int, int]
Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]

def allocate(nbytes: int) -> Buffer: ...
def lend(address: int, nbytes: int, owner: object, device: int) -> Buffer: ...
def map_file(
    fd: int, offset: int, nbytes: int, filename: object = None, shared: bool = False
) -> Buffer: ...
def filesystem(fd: int) -> int: ...
def expect(buffer: Buffer, offset: int, nbytes: int) -> None: ...
def prefetch(buffer: Buffer, offset: int, nbytes: int, threads: int = 0) -> None: ...
def populate_cached(buffer: Buffer, most: int, threads: int = 0) -> int: ...
def drop(buffer: Buffer, offset: int, nbytes: int) -> None: ...
def resident(buffer: Buffer, offset: int, nbytes: int) -> int: ...
def live_buffers() -> int: ...
def crc32(data: Bytes, value: int = 0) -> int: ...
def crc32_combine(a: int, b: int, nbytes_b: int) -> int: ...
def crc32_variants(data: Bytes, value: int = 0) -> list[int]: ...
def crc32_copies(data: Bytes, value: int = 0) -> list[tuple[int, bytearray]]: ...
def checksum(
    segments: np.ndarray[Any, Any],
    *,
    layouts: Sequence[Layout] | None = None,
    threads: int = 0,
    filename: object = None,
) -> None: ...
def write(
    fd: int,
    segments: np.ndarray[Any, Any],
    *,
    layouts: Sequence[Layout] | None = None,
    threads: int = 0,
    checksum: bool = True,
    direct: bool | None = False,
    size: int = 0,
    progress: Callable[[int], object] | None = None,
    filename: object = None,
) -> bool: ...
def read(
    fds: Sequence[int],
    segments: np.ndarray[Any, Any],
    *,
    layouts: Sequence[Layout] | None = None,
    threads: int = 0,
    checksum: bool = True,
    progress: Callable[[int], object] | None = None,
    filenames: Sequence[object] | None = None,
) -> None: ...

class Publication:
    path: str | bytes
    def __init__(self, path: Path) -> None: ...
    @property
    def fd(self) -> int: ...
    def commit(self, durable: bool = True) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Publication: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def read_files(
    dirfd: int,
    paths: Sequence[bytes],
    address: np.ndarray[Any, Any],
    room: np.ndarray[Any, Any],
    *,
    links: bool = False,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
    filename: Path | None = None,
) -> np.ndarray[Any, Any]: ...
def write_files(
    dirfd: int,
    folders: Sequence[bytes],
    files: Sequence[bytes],
    first: np.ndarray[Any, Any],
    address: np.ndarray[Any, Any],
    nbytes: np.ndarray[Any, Any],
    *,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
    filename: Path | None = None,
) -> None: ...
def open_beneath(
    dirfd: int, path: bytes, *, links: bool = False, filename: Path | None = None
) -> int: ...
def create_beneath(dirfd: int, path: bytes, *, filename: Path | None = None) -> int: ...

class FolderPublication:
    path: str | bytes
    def __init__(self, path: Path, *, replace: bool = True) -> None: ...
    @property
    def fd(self) -> int: ...
    def ask(self, may_replace: Callable[[int], bool]) -> None: ...
    def commit(
        self, durable: bool = True, may_replace: Callable[[int], bool] | None = None
    ) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> FolderPublication: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def fault_arm(n: int, error: int) -> int: ...
def fault_ban(name: str | None, error: int) -> None: ...
def fault_hit() -> str | None: ...
