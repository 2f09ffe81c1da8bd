"""Folders that are saved to while they are read: what is had is one checkpoint, or an error."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import reader
from holdfast.errors import FormatError

SHARD = 160_000


def checkpoint(value: int, dtype: str = "f4") -> dict[str, Any]:
    """One large shard, which is mapped, and one that is too small for it."""
    return {"w": np.full(40_000, value, "f4"), "b": np.full(1000, value, dtype)}


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_an_open_checkpoint_keeps_its_shards(saves: int, tmp_path: Path) -> None:
    """Their names are used again by the save after the next."""
    path = tmp_path / "ckpt"
    holdfast.save(checkpoint(1), path, max_shard_size=SHARD)
    with holdfast.open(path) as f:
        for i in range(saves):
            holdfast.save(checkpoint(i + 2, "i4"), path, max_shard_size=SHARD)
        assert f["w"][0] == 1 and f["b"][0] == 1 and f["b"].dtype == np.float32
    assert holdfast.load(path)["b"][0] == saves + 1


def test_a_shard_that_was_replaced_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of another file are never taken for those that the header was of."""
    path = tmp_path / "ckpt"
    holdfast.save(checkpoint(1), path, max_shard_size=SHARD)
    monkeypatch.setattr(holdfast._engine, "filesystem", lambda fd: 0x6969)  # nothing is mapped
    with holdfast.open(path) as f:
        shard = Path(f.info("b").file)
        other = tmp_path / "other"
        holdfast.save({"b": np.full(1000, 7, "f4")}, other)
        os.replace(other, shard)
        with pytest.raises(FormatError, match="was replaced by another file since"):
            f["b"]


def test_a_folder_that_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt"
    holdfast.save(checkpoint(1), path, max_shard_size=SHARD)
    index = path / "model.safetensors.index.json"
    real = reader.Reader._index_once
    calls = []

    def replace(self: Any, *args: Any) -> Any:
        found = real(self, *args)
        if len(calls) < least:
            (path / "new").write_bytes(index.read_bytes())
            os.replace(path / "new", index)
        calls.append(1)
        return found

    monkeypatch.setattr(reader.Reader, "_index_once", replace)
    least = 3
    assert holdfast.load(path)["b"][0] == 1
    assert len(calls) == 4
    least = 7
    assert holdfast.load(index)["b"][0] == 1
    assert len(calls) == 8
    least = 1000
    with pytest.raises(FormatError, match="was replaced again and again"):
        holdfast.open(path)


def test_a_folder_that_is_gone_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has its name by then is read."""
    path = tmp_path / "ckpt"
    holdfast.save(checkpoint(1), path, max_shard_size=SHARD)
    holdfast.save(checkpoint(2), tmp_path / "new", max_shard_size=SHARD)
    real = reader.Reader._index_once

    def replace(self: Any, *args: Any) -> Any:
        if (tmp_path / "new").exists():
            path.rename(tmp_path / "old")
            (tmp_path / "new").rename(path)
            (tmp_path / "old" / "model.safetensors.index.json").unlink()
        return real(self, *args)

    monkeypatch.setattr(reader.Reader, "_index_once", replace)
    assert holdfast.load(path)["b"][0] == 2


def test_with_few_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    tensors = {f"w{i}": np.full(30_000, i, "f4") for i in range(40)}
    holdfast.save(tensors, path, max_shard_size=120_000)
    assert len(list(path.glob("*.safetensors"))) == 40
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "import holdfast\n"
        "for mmap in (True, False):\n"
        "    assert holdfast.load(sys.argv[1], mmap=mmap)['w7'][0] == 7\n"
        "assert holdfast.verify(sys.argv[1]).ok\n"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=100)


def _save_on(path: Path, kind: str, stop: Any) -> None:
    value = 1
    while not stop.is_set():
        value += 1
        _save(path, kind, value)


def _save(path: Path, kind: str, value: int) -> None:
    if kind == "shards":
        tensors = {f"w{i}": np.full(20_000, value, "f4") for i in range(12)}
        holdfast.save(tensors, path, max_shard_size=80_000, durable=False)
    else:
        small = {f"w{i}": np.full((2, 100), value, np.int64) for i in range(3)}
        holdfast.save(small, path, format="oneflow", durable=False)


@pytest.mark.parametrize("kind", ["shards", "oneflow"])
@pytest.mark.parametrize("way", ["mapped", "read", "filled", "verified"])
def test_beside_a_saver(kind: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    _save(path, kind, 1)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    saver = context.Process(target=_save_on, args=(path, kind, stop))
    saver.start()
    try:
        seen, end = set(), time.monotonic() + 20
        while time.monotonic() < end and len(seen) < 12:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if way == "verified":
                    report = holdfast.verify(path)
                    assert report.ok, report.problems
                    seen.add(len(seen))
                    continue
                if way == "filled":
                    target = holdfast.load(path, mmap=False, framework="numpy")
                    holdfast.load_into(target, path)
                else:
                    target = holdfast.load(path, mmap=way == "mapped", framework="numpy")
            values = {float(array.flat[i]) for array in target.values() for i in (0, -1)}
            assert len(values) == 1 and len(target) == (12 if kind == "shards" else 3)
            seen |= values
    finally:
        stop.set()
        saver.join(30)
    assert len(seen) > 1
