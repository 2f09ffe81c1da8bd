from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._dlpack import Exchange
from .base import Placed

class Places:
    keys: list[str]
    storages: list[Any]
    places: list[str]
    elsewhere: list[int]
    def __init__(
        self,
        exchange: Exchange | None,
        place: Callable[[Any], tuple[int, int, tuple[int, ...], tuple[int, ...], bool, int] | None],
        said: Sequence[int],
        cuda: bool = False,
    ) -> None: ...
    def add(self, tensor: Any) -> Placed | None: ...
    @property
    def placer(self) -> object: ...
    def see(self, storage: Any, said: int, code: int, memory: bool = True) -> int: ...
    def columns(self) -> tuple[np.ndarray, np.ndarray]: ...
