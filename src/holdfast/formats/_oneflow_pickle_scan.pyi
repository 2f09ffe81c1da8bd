from typing import Any

import numpy as np

BLOCK: np.dtype[Any]

class Scanner:
    pos: int
    done: bool
    def __init__(self, name: str, where: str, size: int, most: int) -> None: ...
    @property
    def condensed(self) -> bytes: ...
    @property
    def blocks(self) -> np.ndarray: ...
    def feed(self, data: bytes | memoryview) -> int: ...
