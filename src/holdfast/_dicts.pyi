from typing import TypeVar

_Value = TypeVar("_Value")

def from_lists(keys: list[str], values: list[_Value]) -> dict[str, _Value]: ...
