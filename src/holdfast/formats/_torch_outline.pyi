from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

# Row and code of a storage, and of a view also its first element and their number.
Given = tuple[int, int] | tuple[int, int, tuple[int, int]]

class Giving(Protocol):
    def __contains__(self, pid: int, /) -> bool: ...
    def __getitem__(self, pid: int, /) -> Given: ...

class Outline:
    keys: list[str]
    locations: list[str]
    kinds: dict[int, str]
    late: dict[int, int]
    globals: dict[str, None]
    def __init__(
        self,
        data: bytes | bytearray | memoryview,
        start: int,
        name: str,
        where: str,
        base: int,
        legacy: bool = False,
        tensors: Mapping[int, int] | None = None,
        storages: Giving | Mapping[int, Given] | None = None,
        quick: bool = True,
    ) -> None: ...
    def outline(self) -> Any: ...
    @property
    def end(self) -> int: ...
    def columns(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, bool]: ...
    def storages(self) -> np.ndarray: ...
    def gives(self) -> dict[int, Given]: ...
    def passages_array(self) -> np.ndarray: ...
    def event_bytes(self) -> bytes: ...
