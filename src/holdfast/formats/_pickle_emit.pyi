from typing import Any

class Emitter:
    source: Any
    steps: list[Any]
    def __init__(
        self,
        first: Any,
        first_types: frozenset[type],
        second: Any,
        second_types: frozenset[type],
        legacy: bool,
    ) -> None: ...
    def dump(self, obj: object) -> bytes: ...
