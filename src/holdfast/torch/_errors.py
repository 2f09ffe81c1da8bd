"""Exceptions that are both what holdfast raises and what callers of torch catch.

``torch.save`` raises RuntimeError where the system refuses a path, and ``torch.load`` raises
RuntimeError, UnpicklingError or EOFError for a file that is not sound. Code written for torch
catches those; code written for holdfast catches OSError and FormatError. These are both.
"""

from __future__ import annotations

import pickle

from ..errors import ChecksumError, FormatError

__all__ = ["CorruptFileError", "DamagedFileError", "EmptyFileError", "corrupt", "unwritable"]


class CorruptFileError(FormatError, RuntimeError, pickle.UnpicklingError):
    """The bytes are not those of a sound file."""


class EmptyFileError(CorruptFileError, EOFError):
    """There are no bytes at all."""


class DamagedFileError(ChecksumError, CorruptFileError):
    """The bytes are not those that were written."""


class _UnwritableError(OSError, RuntimeError):
    """The system refuses to write."""


class _NoDirectoryError(FileNotFoundError, _UnwritableError):
    """The directory of the file does not exist."""


class _DirectoryError(IsADirectoryError, _UnwritableError):
    """The path is that of a directory."""


class _PathError(NotADirectoryError, _UnwritableError):
    """A part of the path is a file."""


class _PermissionError(PermissionError, _UnwritableError):
    """The user may not write there."""


_BY_CLASS: dict[type[OSError], type[_UnwritableError]] = {
    FileNotFoundError: _NoDirectoryError,
    IsADirectoryError: _DirectoryError,
    NotADirectoryError: _PathError,
    PermissionError: _PermissionError,
}


def unwritable(error: OSError) -> OSError:
    """`error`, which a save to a path raised, as one that is a RuntimeError too."""
    made = _BY_CLASS.get(type(error), _UnwritableError)(*error.args)
    if error.filename is not None:
        made.filename = error.filename
    return made


def corrupt(error: FormatError, *, empty: bool) -> FormatError:
    """`error`, which a load raised, as one that callers of ``torch.load`` catch."""
    if isinstance(error, pickle.UnpicklingError):
        return error
    if isinstance(error, ChecksumError):
        return DamagedFileError(*error.args)
    return (EmptyFileError if empty else CorruptFileError)(*error.args)
