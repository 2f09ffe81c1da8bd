from typing import Any

from ._pickle_stack import Truncated as Truncated

def read_plain(
    data: bytes | bytearray | memoryview,
    start: int = 0,
    *,
    name: str,
    where: str = "",
    base: int = 0,
) -> tuple[Any, int]: ...
