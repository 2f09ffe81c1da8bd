"""Saves and loads tensors at the speed of the hardware, safely and crash-proof.

>>> import holdfast, numpy, tempfile
>>> path = tempfile.mkdtemp() + "/ckpt"
>>> holdfast.save({"w": numpy.ones(3, "f4"), "step": 7}, path)
>>> holdfast.load(path)
{'w': array([1., 1., 1.], dtype=float32), 'step': 7}
"""

from typing import TYPE_CHECKING, Any

from .api import convert, load, load_into, open, save, verify
from .checkpoint import Checkpoint
from .errors import ChecksumError, FormatError, UnsafeError
from .fill import IncompatibleKeys
from .layout import Entry
from .verification import Report

if TYPE_CHECKING:
    from .staging import Staging, release_pinned

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
    "release_pinned",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Only programs that have a device need them: imported when they are asked for.
    if name in ("Staging", "release_pinned"):
        from . import staging

        return getattr(staging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
