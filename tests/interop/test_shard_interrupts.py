"""Saves of several files that are stopped between any two steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import sharding
from shard_files import INDEX, index_of, listing, same, tensors

STEPS = ("write_out", "_remove", "_flush")
OLD, NEW = {"seed": 0, "n": 4}, {"seed": 1, "n": 4}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], bool]:
    """Raise KeyboardInterrupt when so many steps are done; what says whether it was."""
    left = steps

    def counted(real: Any) -> Any:
        def step(*args: Any, **more: Any) -> Any:
            nonlocal left
            found = real(*args, **more)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return found

        return step

    for name in STEPS:
        monkeypatch.setattr(sharding, name, counted(getattr(sharding, name)))
    return lambda: left <= 0


def needed(folder: Path) -> list[str]:
    """The files of the checkpoint in a folder."""
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    return sorted({INDEX, *index_of(folder)["weight_map"].values()})


def sizes(old_single: bool, new_single: bool) -> tuple[int, int]:
    return (1 << 20 if old_single else 4000), (1 << 20 if new_single else 4000)


@pytest.mark.parametrize("new_single", [False, True])
@pytest.mark.parametrize("old_single", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_a_save_that_is_stopped_leaves_one_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,
    old_single: bool,
    new_single: bool,
) -> None:
    """The new index may be there already when it is stopped: the new shards are needed then."""
    before, after = sizes(old_single, new_single)
    for steps in range(1, 20):
        folder = tmp_path / str(steps)
        holdfast.save(tensors(**OLD), folder, max_shard_size=before, durable=False)
        with monkeypatch.context() as patched:
            stopped = stop_after(patched, steps)
            settle, asked = sharding._settle, 0

            def once(path: str) -> Any:
                nonlocal asked
                asked += 1
                if asked > 1:  # nobody is there any more to do it
                    raise OSError
                return settle(path)  # noqa: B023

            if killed:
                patched.setattr(sharding, "_settle", once)
            try:
                holdfast.save(tensors(**NEW), folder, max_shard_size=after)
            except KeyboardInterrupt:
                assert stopped()
        found = holdfast.load(folder)
        assert same(found, tensors(**OLD)) or same(found, tensors(**NEW)), steps
        if not killed:
            strays = set(listing(folder)) - set(needed(folder))
            # Written before the index of the old one goes; the next save replaces or removes it.
            assert strays <= ({"model.safetensors"} if new_single else set()), steps
        holdfast.save(tensors(2, n=3), folder, max_shard_size=4000, durable=False)
        assert listing(folder) == needed(folder), steps
        assert same(holdfast.load(folder), tensors(2, n=3))
        if not stopped():
            break
    else:
        pytest.fail("the save never came to its end")
    assert steps > 3


def test_a_damaged_index_costs_no_shard(tmp_path: Path) -> None:
    """What it names cannot be told, so nothing is removed for not being named."""
    holdfast.save(tensors(), tmp_path / "m", max_shard_size=4000, durable=False)
    index = tmp_path / "m" / INDEX
    shards = [name for name in listing(tmp_path / "m") if name != INDEX]
    text = index.read_text()
    index.write_text(text[:-9])
    (tmp_path / "m" / ".holdfast-shards").write_text("\n".join(shards))
    holdfast.save(tensors(1), tmp_path / "m", max_shard_size=4000, durable=False)
    assert same(holdfast.load(tmp_path / "m"), tensors(1))
    index.write_text(text)
    assert same(holdfast.load(tmp_path / "m"), tensors())
