"""Memory that tensors no longer need, kept for the next ones: how much, and from when on.

Why, and what it costs: ``docs/decisions/0017-kept-memory.md``.
"""

from __future__ import annotations

import os
import re

from . import _engine

__all__ = ["VARIABLE", "most", "release_kept"]

#: Says how many bytes may be kept; 0: none.
VARIABLE = "HOLDFAST_KEEP_BYTES"
MOST = 4 << 30
#: Of the machine's memory.
SHARE = 8
#: Since this Linux no page that is being read into by O_DIRECT is taken back as one not needed.
LINUX = (5, 18)


def most() -> int:
    """How many bytes may be kept.

    Raises
    ------
    ValueError
        `VARIABLE` is set to what is no number of bytes.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if asked and not re.fullmatch("[0-9]{1,18}", asked):
        raise ValueError(f"{VARIABLE}: expected a number of bytes, found {asked!r}")
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if not found or tuple(map(int, found.groups())) < LINUX:
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(asked) if asked else min(MOST, memory // SHARE)


def release_kept() -> int:
    """Give back to the system what is kept of tensors that are gone.

    ``load`` into memory allocates as any allocator does: what tensors leave behind, from 2 MiB
    on, serves the next ones, and a save's buffers likewise. At most an eighth of the machine's
    memory is kept, and never more than 4 GiB (the environment variable ``HOLDFAST_KEEP_BYTES`` says
    otherwise; 0: nothing is). The kernel takes it back by itself when memory runs short; until then
    it counts as resident. Mapped tensors leave nothing behind.

    Returns
    -------
    int
        How many bytes that was.
    """
    return _engine.release_kept()


_engine.keep(most())
