"""Memory that is kept, when the calls for it fail: it is not kept then, or not taken."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from holdfast import _engine, kept

MIB = 1 << 20

pytestmark = pytest.mark.skipif(kept.most() == 0, reason="this kernel is too old to keep memory")


@pytest.fixture(autouse=True)
def keeping(disarmed: None) -> None:
    _engine.keep(64 * MIB)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EINVAL])
def test_letting_go(n: int, error: int) -> None:
    buffer = _engine.allocate(4 * MIB)
    _engine.fault_arm(n, error)
    del buffer
    assert _engine.fault_hit() == "madvise"
    assert _engine.kept() == 0


def test_letting_go_is_interrupted() -> None:
    buffer = _engine.allocate(4 * MIB)
    _engine.fault_arm(1, errno.EINTR)
    del buffer
    assert _engine.fault_hit() == "madvise"
    assert _engine.kept() == 4 * MIB


@pytest.mark.parametrize(("n", "call"), [(1, "madvise"), (2, "madvise"), (3, "mprotect")])
def test_taking(n: int, call: str) -> None:
    buffer = _engine.allocate(4 * MIB)
    del buffer
    _engine.fault_arm(n, errno.ENOMEM)
    again = _engine.allocate(4 * MIB)
    assert _engine.fault_hit() == call
    assert _engine.kept() == 0
    np.frombuffer(again, np.uint8)[:] = 1


def test_no_address_space() -> None:
    """What is kept is given back before an allocation fails."""
    buffers = [_engine.allocate(4 * MIB) for _ in range(10)]
    apart = buffers[::2]
    del buffers
    assert _engine.kept() == 20 * MIB
    # As many bytes as are asked for are given back before; then mmap fails.
    _engine.fault_arm(1, errno.ENOMEM)
    buffer = _engine.allocate(9 * MIB)
    assert _engine.fault_hit() == "mmap"
    assert _engine.kept() == 0
    del buffer, apart
    _engine.keep(0)
    _engine.fault_arm(1, errno.ENOMEM)
    with pytest.raises(MemoryError, match="cannot allocate 4194304 bytes"):
        _engine.allocate(4 * MIB)
