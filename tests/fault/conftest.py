"""What the fault tests share: saving through the engine, and arming its faults."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast import _engine
from holdfast.layout import SEGMENT

#: Ways in which a file gets its name, each with the call that is refused for it to be taken:
#: an unnamed file that is linked; a temporary name, where there are no unnamed files; an unnamed
#: file that turns out to be impossible to link.
WAYS: dict[str, tuple[str | None, int]] = {
    "unnamed": (None, 0),
    "named": ("tmpfile", errno.EOPNOTSUPP),
    "copied": ("linkat", errno.EPERM),
}


@pytest.fixture(autouse=True)
def disarmed(nothing_kept: None) -> Iterator[None]:
    """No fault outlives its test."""
    yield
    _engine.fault_arm(0, 0)
    _engine.fault_ban(None, 0)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """The test is run for each way in which a file gets its name."""
    _engine.fault_ban(*WAYS[request.param])
    return request.param


@pytest.fixture
def save() -> Callable[..., None]:
    """Publish bytes under a path; `begun` is called when there is a file to write to."""

    def save(
        path: str | bytes | os.PathLike[str],
        data: bytes,
        *,
        durable: bool = False,
        direct: bool = False,
        begun: Callable[[], object] = lambda: None,
    ) -> None:
        content = np.frombuffer(data, np.uint8)
        segments = np.zeros(1, SEGMENT)
        segments["nbytes"] = len(data)
        segments["address"] = content.ctypes.data
        with _engine.Publication(path) as publication:
            begun()
            _engine.write(
                publication.fd,
                segments,
                checksum=False,
                direct=direct,
                filename=os.fsdecode(path),
            )
            publication.commit(durable)

    return save


@pytest.fixture
def calls() -> Callable[[Callable[[], object]], list[str]]:
    """Names of the system calls that an action makes, in order; runs it once for each of them."""

    def calls(action: Callable[[], object]) -> list[str]:
        names: list[str] = []
        while True:
            _engine.fault_arm(len(names) + 1, 0)  # a fault that does nothing but say where it is
            action()
            name = _engine.fault_hit()
            _engine.fault_arm(0, 0)
            if name is None:
                return names
            names.append(name)

    return calls


@pytest.fixture
def script() -> Callable[..., str]:
    """Run Python code in a process of its own; returns what it printed."""

    def script(code: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return script
