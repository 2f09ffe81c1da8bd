"""Saves and loads tensors at the speed of the hardware, safely and crash-proof.

>>> import holdfast, numpy, tempfile
>>> path = tempfile.mkdtemp() + "/ckpt"
>>> holdfast.save({"w": numpy.ones(3, "f4"), "step": 7}, path)
>>> holdfast.load(path)
{'w': array([1., 1., 1.], dtype=float32), 'step': 7}
"""

from .api import convert, load, load_into, open, save, verify
from .checkpoint import Checkpoint
from .errors import ChecksumError, FormatError, UnsafeError
from .fill import IncompatibleKeys
from .layout import Entry
from .verification import Report

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "ChecksumError",
    "Entry",
    "FormatError",
    "IncompatibleKeys",
    "Report",
    "UnsafeError",
    "convert",
    "load",
    "load_into",
    "open",
    "save",
    "verify",
]
