from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..layout import Resolver
from ._torch_outline import Given

class Replay:
    def __init__(
        self,
        data: bytes | bytearray | memoryview,
        start: int,
        name: str,
        where: str,
        base: int,
        events: bytes,
        late: dict[int, int],
        gives: dict[int, Given],
        passages: np.ndarray,
        tensors: Sequence[Any],
        storages: Callable[..., object],
        resolver: Resolver,
        describe: Callable[[int], str],
        given_tensors: Mapping[int, int] | None = None,
        encoding: str | None = None,
    ) -> None: ...
    def replay(self) -> Any: ...
