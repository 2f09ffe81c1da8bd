"""Making many objects without looking for garbage among them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """For a time in which much is made and nothing dropped: nobody looks for garbage.

    Of thousands of new objects none is garbage yet, and collections, one for every few hundred of
    them, would look at them again and again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
