"""How long hostile bytes may take: in processor time, which a busy machine hardly stretches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["within"]

#: What the sanitizers multiply time by, at most.
SLOWDOWN = 10 if "HOLDFAST_SANITIZED" in os.environ else 1


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Check that this process spends at most `seconds` of the processor inside the block.

    What would wait for ever is stopped by the limit that each test has.
    """
    start = time.process_time()
    yield
    took = time.process_time() - start
    assert took < seconds * SLOWDOWN, f"{took:.1f} s of the processor, {seconds} are enough"
