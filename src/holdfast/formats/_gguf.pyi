import numpy as np

Bytes = bytes | bytearray | memoryview

PAIR: np.dtype[np.void]
TENSOR: np.dtype[np.void]
TYPE: np.dtype[np.void]
MIN_PAIR: int
MIN_TENSOR: int

class Fault(Exception):
    kind: str
    row: int
    position: int
    expected: int
    found: int
    rows: np.ndarray | None
    def __init__(
        self,
        kind: str,
        row: int,
        position: int,
        expected: int,
        found: int,
        rows: np.ndarray | None = None,
    ) -> None: ...

def pairs(data: Bytes, at: int, n: int) -> tuple[np.ndarray, int]: ...
def tensors(data: Bytes, at: int, n: int) -> tuple[np.ndarray, int]: ...
def lay(
    rows: np.ndarray, types: np.ndarray, start: int, alignment: int, size: int
) -> np.ndarray: ...
def texts(
    data: Bytes, starts: np.ndarray, lengths: np.ndarray, errors: bytes | None = None
) -> list[str]: ...
def strings(data: Bytes, at: int, n: int) -> list[str]: ...
def dequantize(
    data: np.ndarray, out: np.ndarray, count: np.ndarray, type: np.ndarray, threads: int = 0
) -> None: ...
def variant(which: int, data: int, out: int, count: int, type: int) -> bool: ...
