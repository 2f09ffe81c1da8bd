"""What every test shares: the check that no memory of the engine outlives a test."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from holdfast import _engine, kept

# How long one example takes says nothing on a machine that others use too.
settings.register_profile("holdfast", deadline=None)
settings.load_profile("holdfast")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_buffer_left() -> Iterator[None]:
    """Every mapping and allocation made during a test is gone after it."""
    before = _engine.live_buffers()
    yield
    if _engine.live_buffers() > before:
        gc.collect()
    # JAX lets go of what it has read while garbage is collected, some of it the next time.
    end = time.monotonic() + 5
    while _engine.live_buffers() > before and time.monotonic() < end:
        time.sleep(0.01)
        gc.collect()
    assert _engine.live_buffers() <= before, "a test left buffers of the engine alive"


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No memory is kept from before, nor for later: each run makes the same system calls."""
    _engine.keep(0)
    yield
    _engine.keep(0)
    _engine.keep(kept.most())


@pytest.fixture
def golden() -> Path:
    """The folder of files whose bytes are fixed."""
    return GOLDEN


@pytest.fixture
def listing(tmp_path: Path) -> object:
    """Names in the temporary directory, sorted: a callable."""
    return lambda: sorted(path.name for path in tmp_path.iterdir())
