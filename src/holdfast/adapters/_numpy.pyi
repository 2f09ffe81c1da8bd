from collections.abc import Callable
from typing import Any

import numpy as np

def address(array: Any) -> int: ...
def describe(
    arrays: list[Any],
    user: dict[int, int],
    vet: Callable[[Any, int], None],
    name_kind: Callable[[Any, int], str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[int, str]]: ...
def wrap(
    rows: np.ndarray,
    dims: np.ndarray,
    buffers: list[Any],
    owner: np.ndarray | None,
    descrs: list[Any],
) -> list[Any]: ...
