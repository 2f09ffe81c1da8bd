"""The exceptions that holdfast adds to Python's own.

The system's failures stay ``OSError``, a caller's mistakes stay ``TypeError`` and
``ValueError``; only what the bytes of a file can cause needs names of its own.
"""

from __future__ import annotations

import pickle
import sys
import warnings

__all__ = ["ChecksumError", "FormatError", "UnsafeError", "warn"]


class FormatError(ValueError):
    """The bytes of a file are not what their format promises.

    Base of everything that the content of a file can cause, so that ``except FormatError``
    tells a bad file from a bad call. The message names the file, the tensor where there is
    one, the offset, what was expected and what was found.
    """


class ChecksumError(FormatError):
    """Bytes were read that do not have the CRC-32 that was recorded when they were written."""


class UnsafeError(FormatError, pickle.UnpicklingError):
    """A pickle asks for what is not allowed without trusting its file.

    The message names the global and says what to pass to allow it. It is an ``UnpicklingError``
    too, as ``torch.load`` raises.
    """


def warn(text: str) -> None:
    """Give a UserWarning about a file that points to the line that called holdfast."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module == __package__ or module.startswith(f"{__package__}.")
