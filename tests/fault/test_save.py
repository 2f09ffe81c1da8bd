"""holdfast.save, failing at each system call in turn."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _engine

FAULTS = [errno.ENOSPC, errno.EIO, errno.EINTR, 0]
OLD = {"x": np.arange(100.0)}


@pytest.fixture
def new() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {"big": rng.random(700_000), "odd": rng.random((600, 700), "f4").T, "s": np.ones(3)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda code: errno.errorcode.get(code, "short"))
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("format", ["safetensors", "torch", "torch_legacy"])
def test_every_call(
    tmp_path: Path,
    new: dict[str, np.ndarray],
    fault: int,
    durable: bool,
    existing: bool,
    format: str,
) -> None:
    path = tmp_path / "ckpt"
    if existing:
        holdfast.save(OLD, path)
        path.chmod(0o640)
        before = path.read_bytes()
    failures = 0
    n = 0
    while True:
        n += 1
        _engine.fault_arm(n, fault)
        try:
            holdfast.save(new, path, format=format, durable=durable, threads=2)
            error = None
        except OSError as caught:
            error = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if error is not None:
            failures += 1
            assert fault not in (0, errno.EINTR), f"call {n} ({hit}) was not resumed"
            assert error.errno == fault and error.filename == str(path), (n, hit)
            if existing:
                assert path.read_bytes() == before and path.stat().st_mode & 0o777 == 0o640
            assert [p.name for p in tmp_path.iterdir()] == (["ckpt"] if existing else [])
        else:
            assert [p.name for p in tmp_path.iterdir()] == ["ckpt"], (n, hit)
            got = holdfast.load(path, mmap=False, framework="numpy")
            assert all(np.array_equal(got[name], new[name]) for name in new)
            if existing:
                assert path.stat().st_mode & 0o777 == 0o640
                path.write_bytes(before)
            else:
                path.unlink()
        if hit is None:
            break
    assert n > 8
    assert failures > 4 or fault in (0, errno.EINTR)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda code: errno.errorcode.get(code, "short"))
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("format", ["safetensors", "torch", "torch_legacy"])
def test_every_call_of_a_load(
    tmp_path: Path, new: dict[str, np.ndarray], fault: int, mmap: bool, format: str
) -> None:
    path = tmp_path / "ckpt"
    holdfast.save(new, path, format=format)
    n = 0
    while True:
        n += 1
        _engine.fault_arm(n, fault)
        error: Exception | None = None
        try:
            got = holdfast.load(path, mmap=mmap, framework="numpy")
        except (OSError, MemoryError) as caught:
            error = caught
        else:
            assert all(np.array_equal(got[name], new[name]) for name in new)
            del got
        if error is not None:
            assert fault not in (0, errno.EINTR), f"call {n} ({_engine.fault_hit()})"
            assert not isinstance(error, OSError) or error.errno == fault
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        if hit is None:
            break
    assert n > 1
