"""Whatever call fails, and however: the new file is there whole, or the old one is as it was."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import _engine

Save = Callable[..., None]

SHORT = 0  # the code of the engine for a transfer that moves half of what it was asked to
FATAL = [errno.ENOSPC, errno.EIO]
PASSING = [errno.EINTR, SHORT]

OLD = b"old" * 1000
OLD_MODE = 0o666  # more than the umask leaves to a new file


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that can be seen of the files in a folder."""
    return {
        path.name: (stat.S_IMODE(path.lstat().st_mode), path.read_bytes())
        for path in folder.iterdir()
    }


def reset(target: Path, existing: bool) -> None:
    """The state before a save."""
    target.unlink(missing_ok=True)
    if existing:
        target.write_bytes(OLD)
        target.chmod(OLD_MODE)


def fail_each(
    action: Callable[[Callable[[], object]], None],
    target: Path,
    new: bytes,
    existing: bool,
    error: int,
) -> tuple[int, Counter[str]]:
    """Run `action` with its 1st, 2nd, 3rd... call failing; how many there are, and which raised.

    The action saves `new` to `target`. It is given a callable that arms the fault: calls are
    counted from when it calls that.
    """
    raised: Counter[str] = Counter()
    n = 0
    while True:
        n += 1
        reset(target, existing)
        before = state(target.parent)
        failure = None
        try:
            action(functools.partial(_engine.fault_arm, n, error))
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        after = state(target.parent)
        if hit is None:
            assert failure is None
            return n - 1, raised
        where = f"call {n} ({hit})"
        if failure is None:
            assert list(after) == [target.name], where
            assert after[target.name][1] == new, where
            assert not existing or after[target.name][0] == OLD_MODE, where
        else:
            assert error in FATAL, f"{where} should have been overcome: {failure!r}"
            assert failure.errno == error, where
            assert os.fsdecode(failure.filename) == str(target), where
            assert after == before, where
            raised[hit] += 1


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("durable", [False, True], ids=["fast", "durable"])
@pytest.mark.parametrize("error", FATAL, ids=errno.errorcode.get)
def test_publish_survives(
    save: Save, way: str, tmp_path: Path, error: int, durable: bool, existing: bool
) -> None:
    target, new = tmp_path / "target", b"new content"

    def action(arm: Callable[[], object]) -> None:
        arm()
        save(target, new, durable=durable)

    count, raised = fail_each(action, target, new, existing, error)

    assert count > 5
    must_raise = {"pwrite", "flock", "openat" if way == "named" else "tmpfile"}
    if existing or way != "unnamed":
        must_raise |= {"renameat"}
    if durable:
        must_raise |= {"fsync"}
    if existing:
        must_raise |= {"faccessat", "fchmod"}
    assert must_raise <= set(raised)
    if durable:
        assert raised["fsync"] >= 2, "both the file's and the directory's count"


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("durable", [False, True], ids=["fast", "durable"])
@pytest.mark.parametrize("error", PASSING, ids=["EINTR", "short"])
def test_publish_overcomes(
    save: Save, way: str, tmp_path: Path, error: int, durable: bool, existing: bool
) -> None:
    target, new = tmp_path / "target", b"new content" * 1000

    def action(arm: Callable[[], object]) -> None:
        arm()
        save(target, new, durable=durable)

    count, raised = fail_each(action, target, new, existing, error)

    assert count > 5
    assert not raised


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("error", FATAL + PASSING, ids=["ENOSPC", "EIO", "EINTR", "short"])
def test_write_survives(save: Save, tmp_path: Path, error: int, direct: bool) -> None:
    # Two chunks, and an end that no alignment suits.
    target, new = tmp_path / "target", os.urandom((9 << 20) + 4321)

    def action(arm: Callable[[], object]) -> None:
        save(target, new, direct=direct, begun=arm)

    count, raised = fail_each(action, target, new, existing=True, error=error)

    assert count > 5
    assert bool(raised) == (error in FATAL)


def test_abort_leaves_nothing_that_lasts(save: Save, way: str, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def begin_and_abort() -> None:
        with _engine.Publication(target) as publication:
            os.write(publication.fd, b"forget me")

    hits = set()
    n = 0
    while True:
        n += 1
        _engine.fault_arm(n, errno.EIO)
        with contextlib.suppress(OSError):
            begin_and_abort()
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if hit is None:
            break
        hits.add(hit)
        left = os.listdir(tmp_path)
        if hit == "unlinkat":  # nothing can be done, but the next save does it
            assert len(left) == 1
            save(target, b"")
            target.unlink()
        else:
            assert left == [], hit
        assert os.listdir(tmp_path) == [], hit

    assert n > 5
    assert ("unlinkat" in hits) == (way == "named")


def test_a_closed_descriptor_is_closed_although_close_failed(save: Save, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    closes = 0
    for n in range(1, 1000):
        _engine.fault_arm(n, errno.EIO)
        with contextlib.suppress(OSError):
            save(tmp_path / "target", b"x", durable=True)
        hit = _engine.fault_hit()
        closes += hit == "close"
        assert descriptors() == before, hit
        if hit is None:
            break

    assert closes >= 2
