from typing import Any

def brief(item: object) -> str: ...
def shorten(text: str, limit: int = 60) -> str: ...

class Global:
    module: str
    name: str
    def __init__(self, module: str, name: str) -> None: ...
    @property
    def path(self) -> str: ...

class Record:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    items: list[Any]
    pairs: list[tuple[Any, Any]]
    called: bool
    offset: int
    def __init__(
        self,
        cls: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        called: bool = False,
        offset: int = -1,
    ) -> None: ...
    @property
    def cls(self) -> Any: ...
    @property
    def state(self) -> Any: ...
    def with_state(self, state: object) -> Record: ...

class Tensor:
    entry: int
    def __init__(self, entry: int) -> None: ...

class Storage:
    row: int
    code: int
    def __init__(self, row: int, code: int, part: tuple[int, int] | None = None) -> None: ...
