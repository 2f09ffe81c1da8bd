"""open and load of torch's files: nothing read that is not needed, in time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import fetch, storages
from holdfast.formats import torch_zip
from holdfast.pickling import pickle_object
from holdfast.publish import segments_of

NUMPY: dict[str, Any] = {"framework": "numpy"}
HUGE = 1 << 38


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A file whose first tensor is a hole of 256 GB."""
    obj = {
        "huge": np.broadcast_to(np.zeros(1, "u1"), (1 << 20, HUGE >> 20)),
        "small": np.arange(12.0).reshape(3, 4),
        "n": 3,
    }
    found = pickle_object(obj)
    plan = torch_zip.plan(
        found.keys,
        found.batch,
        framework="numpy",
        metadata=None,
        structure=found.data,
        checksum=False,
        stem="x",
    )
    pieces = torch_zip.seal(plan, None, early=True)
    path = tmp_path / "huge.pt"
    with path.open("wb") as file:
        for row in segments_of(pieces):
            at = int(row["address"]) - int(segments_of(pieces)["address"][0])
            file.seek(int(row["offset"]))
            start = int(pieces.start[0]) + at
            file.write(pieces.data[start : start + int(row["nbytes"])])
        file.seek(int(plan.offsets[1]))
        file.write(obj["small"].tobytes())
        file.truncate(plan.size)
    assert path.stat().st_size > HUGE
    return path


def read_bytes() -> int:
    """What this process has read so far, by system calls."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_only_what_is_asked_for_is_read(huge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mapped in (True, False):
        if not mapped:
            monkeypatch.setattr("holdfast._engine.filesystem", lambda fd: 0x6969)
        before = read_bytes()
        with holdfast.open(huge, **NUMPY) as f:
            assert list(f) == ["huge", "small"]
            assert f.info("huge").nbytes == HUGE
            assert f["small"].tolist() == np.arange(12.0).reshape(3, 4).tolist()
            assert f.slice("small")[1:, 2].tolist() == [6, 10]
            part = f.slice("huge")[(1 << 20) - 3 : (1 << 20) - 1]
            assert part.shape == (2, HUGE >> 20) and not part.any()
            assert f.slice("huge")[-1][-5:].tolist() == [0] * 5
        assert read_bytes() - before < 4 << 20
    before = read_bytes()
    assert holdfast.load(huge, keys="small", **NUMPY)["small"].sum() == 66
    target = {"small": np.zeros((3, 4))}
    holdfast.load_into(target, huge, strict=False)
    assert target["small"].sum() == 66
    found = holdfast.load(huge, mmap=True, **NUMPY)
    assert found["huge"][-1, -1] == 0 and found["n"] == 3
    assert read_bytes() - before < 4 << 20


def test_the_cost_of_a_tensor_does_not_grow(tmp_path: Path) -> None:
    """Each of n tensors is made by work on its own row, not on all of them."""
    sizes = []
    for n in (10, 3000):
        path = tmp_path / f"{n}.pt"
        holdfast.save({f"t{i}": np.ones(3) for i in range(n)}, path)
        seen: list[int] = []

        def noting(
            index: Any,
            rows: np.ndarray,
            seen: list[int] = seen,
            dense: Callable[..., Any] = storages.dense,
        ) -> Any:
            seen.append(len(rows))
            return dense(index, rows)

        with pytest.MonkeyPatch.context() as patch, holdfast.open(path, **NUMPY) as f:
            patch.setattr(storages, "dense", noting)
            for name in list(f)[:10]:
                assert f[name].sum() == 3
        sizes.append(seen)
    assert sizes[0] == sizes[1] and 0 < max(sizes[0]) == 1


def test_prefetch_asks_for_what_is_in_the_file(tmp_path: Path) -> None:
    """Not for what an expanded tensor, or a deflated one, would take without that."""
    from holdfast.reader import Reader
    from holdfast.source import open_source

    golden = Path(__file__).parents[1] / "golden" / "torch" / "views-torch2.13.0.pt"
    with Reader(open_source(golden)) as reader:
        rows = np.arange(len(reader.index))
        found = fetch.stretches(reader.index, rows)
        ends = found["offset"] + found["nbytes"]
        assert len(found) < len(rows) and (ends <= golden.stat().st_size).all()
    with holdfast.open(golden, **NUMPY) as f:
        f.prefetch()
        f.prefetch(list(f))
        for name in f:
            f.prefetch(name)


MEMORY = """
import os, sys
import numpy as np, holdfast
{prepare}
def high():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
start = high()
{action}
print(high() - start)
"""
PREPARE = """
rng = np.random.default_rng(0)
block = rng.random(4_000_000, "f4")
obj = {f"t{i}": block[i:3_999_000 + i].copy() for i in range(6)}
obj["T"] = block[:2_000_000].reshape(1000, 2000).copy().T
obj.update({f"s{i}": block[i : i + 5000].copy() for i in range(2000)})
"""
TARGET = (
    PREPARE
    + """
holdfast.save(obj, sys.argv[1], format=sys.argv[2], durable=False)
"""
)
BOUNDS = {
    "save": (PREPARE, "holdfast.save(obj, sys.argv[1], format=sys.argv[2], durable=False)"),
    "durable save": (PREPARE, "holdfast.save(obj, sys.argv[1], format=sys.argv[2])"),
    "save to a pipe": (
        PREPARE,
        "with open('/dev/null', 'wb') as f: holdfast.save(obj, f, format=sys.argv[2])",
    ),
    "load_into": (TARGET, "holdfast.load_into(obj, sys.argv[1])"),
    "load_into of another type": (
        TARGET + "obj = {k: np.zeros(v.shape, 'f8') for k, v in obj.items()}\n"
        "for v in obj.values(): v[...] = 1\n",
        "holdfast.load_into(obj, sys.argv[1])",
    ),
    "verify": (TARGET + "obj = None\n", "assert holdfast.verify(sys.argv[1]).ok"),
}


@pytest.fixture
def script() -> Callable[..., int]:
    def run(prepare: str, action: str, *arguments: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY.format(prepare=prepare, action=action), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return run


@pytest.mark.skipif(
    "HOLDFAST_SANITIZED" in os.environ, reason="the sanitizer takes memory of its own"
)
@pytest.mark.parametrize("format", ["torch", "torch_legacy"])
@pytest.mark.parametrize("what", BOUNDS)
def test_memory(tmp_path: Path, script: Callable[..., int], what: str, format: str) -> None:
    """Beyond the tensors themselves, which take 140 MB: less than 64 MiB."""
    grown = script(*BOUNDS[what], str(tmp_path / "x"), format)
    print(what, format, grown >> 20)
    assert 0 <= grown < 64 << 20


@pytest.mark.skipif(
    "HOLDFAST_SANITIZED" in os.environ, reason="the sanitizer takes memory of its own"
)
def test_memory_grows_where_it_must(tmp_path: Path, script: Callable[..., int]) -> None:
    """The measure is one: a load into memory of its own takes what the tensors take."""
    action = "keep = holdfast.load(sys.argv[1], mmap=False)"
    assert script(TARGET + "obj = None\n", action, str(tmp_path / "x"), "torch") > 100 << 20
