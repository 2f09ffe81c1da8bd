import numpy as np

from . import Read

RECORD: np.dtype[np.void]

class Directory:
    rows: np.ndarray
    root: str | None
    start: int
    end: int
    def __len__(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    def find(self, name: str) -> int: ...
    def check_case(self, name: str) -> None: ...

class Skeleton:
    data: bytearray
    offsets: np.ndarray
    size: int
    piece_offset: np.ndarray
    piece_nbytes: np.ndarray
    piece_start: np.ndarray
    def stamp(self, rows: np.ndarray, crcs: np.ndarray) -> None: ...
    def late(self, mask: np.ndarray) -> np.ndarray: ...

def scan(read: Read, size: int, name: str, *, caseless: bool = True) -> Directory: ...
def extract(
    read: Read, directory: Directory, row: int, name: str, *, limit: int, verify: bool = True
) -> bytes: ...
def inflate(data: bytes | bytearray | memoryview, size: int, where: str) -> bytes: ...
def emit(
    root: str,
    names: list[str],
    sizes: np.ndarray,
    inline: dict[int, bytes],
    alignment: int = 64,
) -> Skeleton: ...
