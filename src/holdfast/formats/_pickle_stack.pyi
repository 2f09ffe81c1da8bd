from ..errors import FormatError

class PassedOver(Exception): ...  # noqa: N818

class Truncated(FormatError):
    needed: int
    def __init__(self, text: str, needed: int) -> None: ...
