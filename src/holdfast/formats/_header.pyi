import numpy as np

Bytes = bytes | bytearray | memoryview

class Fault(Exception):
    kind: str
    position: int
    name: str | None
    entry: int
    type: int
    shape: tuple[int, ...]
    begin: int
    end: int
    expected: int
    found: int
    def __init__(
        self,
        kind: str,
        position: int = 0,
        name: str | None = None,
        entry: int = -1,
        type: int = 0,
        shape: tuple[int, ...] = (),
        begin: int = 0,
        end: int = 0,
        expected: int = 0,
        found: int = 0,
    ) -> None: ...

class HeaderNames:
    def __init__(self, head: Bytes) -> None: ...
    def __len__(self) -> int: ...
    def tolist(self) -> list[str]: ...
    def find(self, name: str) -> int: ...

class Header:
    names: HeaderNames
    entries: np.ndarray
    dims: np.ndarray
    metadata: dict[str, str]
    numbers: np.ndarray | None
    marker: int
    nbytes: int

def scan(head: Bytes, key: bytes | None = None) -> Header: ...
def emit(
    names: list[str],
    views: np.ndarray,
    dims: np.ndarray,
    offsets: np.ndarray,
    pairs: list[str],
) -> tuple[bytearray, list[int]]: ...
def header_crc(head: Bytes, at: int) -> int: ...
def stamp(head: bytearray, at: int, values: np.ndarray) -> None: ...
