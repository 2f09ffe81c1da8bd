"""Folders that others replace, or save to, while they are read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .errors import FormatError

__all__ = ["TRIES", "Identity", "ReplacedError", "again", "identity"]

#: How often a folder is read that another save replaces meanwhile.
TRIES = 20

#: Device, inode, size and time of the last change.
Identity = tuple[int, int, int, int]
_P = ParamSpec("_P")
_R = TypeVar("_R")


class ReplacedError(FormatError):
    """A file is not the one any more that it was when its folder was first looked at."""


def identity(state: os.stat_result) -> Identity:
    """What tells a file from another that has its name later, and maybe its inode."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def again(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a function be called again where what it reads was replaced meanwhile.

    It raises ReplacedError where that has happened `TRIES` times.
    """

    @functools.wraps(function)
    def called(*args: _P.args, **options: _P.kwargs) -> _R:
        for _ in range(TRIES - 1):
            try:
                return function(*args, **options)
            except ReplacedError:
                continue
        return function(*args, **options)

    return called
