"""What every adapter promises about memory: nothing grows with the calls."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from typing import Any

import pytest


class Leaks:
    """A part of the suite in ``test_adapters``, whose terms these tests use."""

    adapter: Any
    layouts: Any
    kinds: Any
    batch: Any

    def test_references_are_not_leaked(self) -> None:
        tensors = [*self.layouts().values(), *self.kinds()]
        names = ["t"] * len(tensors)
        batch = self.batch([("int32", (3,)), ("uint8", (2, 2))])
        watched = [*tensors, batch.owners[0], batch.dims, batch.views]

        def once() -> list[int]:
            for _ in range(10):
                self.adapter.describe(tensors, names)
                self.adapter.wrap(batch, {})
            gc.collect()
            return [sys.getrefcount(each) for each in watched]

        first = once()
        assert once() == first

    def test_memory_is_not_leaked(self) -> None:
        """A leak of one object a call grows in every round; caches below come to rest."""
        tensors = [*self.layouts().values(), *self.kinds()]
        batch = self.batch([("int32", (3,))] * 64)
        calls, least = 50, 28  # bytes of an int: of what a call may leave behind, a small one
        grown = []
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            # What was cached before tracing began counts when it is replaced, so that some
            # frameworks need more rounds than others until none grows.
            while len(grown) < 40:
                for _ in range(calls):
                    self.adapter.describe(tensors, ["t"] * len(tensors))
                    self.adapter.wrap(batch, {})
                gc.collect()
                now = tracemalloc.get_traced_memory()[0]
                grown.append(now - before)
                before = now
                if len(grown) > 1 and max(grown[-2:]) < calls * least:
                    return
        finally:
            tracemalloc.stop()
        pytest.fail(f"bytes that {calls} calls left, round by round: {grown}")
