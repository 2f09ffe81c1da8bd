"""Making many objects without looking for garbage among them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]

#: So many new objects are promoted; fewer are left to the next collection.
_MANY = 10_000


@contextmanager
def uncollected() -> Iterator[None]:
    """For a time in which much is made and nothing dropped: nobody looks for garbage.

    Of thousands of new objects none is garbage yet, and collections, one for every few hundred of
    them, would look at them again and again. The one that would follow is spared too: where
    thousands were made, all that is young now is counted as old, as if it had outlived two
    collections. What of it is garbage is found by the next full collection.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if gc.get_count()[0] > _MANY:
                _promote()
            gc.enable()


def _promote() -> None:
    """Move the young objects to the oldest generation, in constant time.

    Not where a program has frozen objects (``gc.freeze`` before a ``fork``, say): they would be
    thawed.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()
