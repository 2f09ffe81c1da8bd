"""Making many objects without looking for garbage among them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]

#: So many objects made at once are promoted; fewer are left to the next collection.
_MANY = 10_000

#: Full collections when objects were last promoted, or were seen to be frozen.
_promoted = -1


@contextmanager
def uncollected() -> Iterator[None]:
    """For a time in which much is made and nothing dropped: nobody looks for garbage.

    Of thousands of new objects none is garbage yet, and collections, one for every few hundred of
    them, would look at them again and again. The one that would follow may be spared too: where
    thousands were made, they are counted as old, as if they had outlived two collections.
    """
    collecting = gc.isenabled()
    gc.disable()
    before = gc.get_count()[0]
    try:
        yield
    finally:
        if collecting:
            if gc.get_count()[0] - before > _MANY > before:
                _promote()
            gc.enable()


def _promote() -> None:
    """Move the young objects to the oldest generation, once between two full collections.

    Not more often: it makes the collector forget how many objects there are, so that a program
    which loads again and again would never come to a full one. And not where a program has frozen
    objects (``gc.freeze`` before a ``fork``, say): they would be thawed.
    """
    global _promoted
    full = gc.get_stats()[2]["collections"]
    if full == _promoted:
        return
    _promoted = full
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()
