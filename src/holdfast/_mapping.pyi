from collections.abc import Iterable
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")

def dict_of(keys: Iterable[_K], values: Iterable[_V]) -> dict[_K, _V]: ...
