"""Saves and loads tensors at the speed of the hardware, safely and crash-proof.

>>> import holdfast, numpy, tempfile
>>> path = tempfile.mkdtemp() + "/ckpt"
>>> holdfast.save({"w": numpy.ones(3, "f4"), "step": 7}, path)
>>> holdfast.load(path)
{'w': array([1., 1., 1.], dtype=float32), 'step': 7}
"""

from typing import TYPE_CHECKING, Any

from .api import convert, load, load_into, open, save, verify
from .errors import ChecksumError, FormatError, UnsafeError
from .kept import release_kept

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .fill import IncompatibleKeys
    from .layout import Entry
    from .staging import Staging, release_pinned
    from .verification import Report

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "ChecksumError",
    "Entry",
    "FormatError",
    "IncompatibleKeys",
    "Report",
    "Staging",
    "UnsafeError",
    "convert",
    "load",
    "load_into",
    "open",
    "release_kept",
    "release_pinned",
    "save",
    "verify",
]


#: Names that few programs ask for, and the modules they are imported from when one does.
_LATE = {
    "Checkpoint": "checkpoint",
    "Entry": "layout",
    "IncompatibleKeys": "fill",
    "Report": "verification",
    "Staging": "staging",
    "release_pinned": "staging",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        import importlib

        found = getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
        globals()[name] = found  # which the next one finds without coming here
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
