from collections.abc import Callable
from typing import Any

import numpy as np

class Exchange:
    def __init__(self, tensor: type, parameter: type, byte_dtypes: tuple[Any, ...]) -> None: ...
    def describe(
        self, tensors: list[Any], resolve: Callable[[Any, int], Any]
    ) -> tuple[
        np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, list[Any], dict[int, str]
    ]: ...
    def wrap(
        self, rows: np.ndarray, dims: np.ndarray, buffers: list[Any], owner: np.ndarray | None
    ) -> list[Any]: ...
