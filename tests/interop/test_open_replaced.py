"""An open checkpoint that is a folder, and a newer one that is saved over it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow
from holdfast import folder

#: Bytes of one tensor: read while the folder is listed, looked at again for it, mapped.
SIZES = {"tiny": 64, "small": 8000, "nearly": folder.SMALL - 4, "large": 500_000, "none": 0}


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for name, size in SIZES.items():
        made[f"{name}.a"] = rng.random(size // 4, "f4")
        made[f"{name}.b"] = rng.integers(0, 99, (size // 8, 2), "i4")
    return made


def write(path: Path, seed: int, layout: str) -> None:
    obj: Any = arrays(seed)
    if layout == "pickle":
        obj = {"model": obj, "step": seed}
    holdfast.oneflow.save(obj, path, layout=layout)


@pytest.mark.parametrize("layout", ["snapshot", "pickle"])
@pytest.mark.parametrize("gone", [True, False])
def test_keeps_what_it_had(tmp_path: Path, layout: str, gone: bool) -> None:
    path = tmp_path / "ckpt"
    write(path, 1, layout)
    prefix = "model." if layout == "pickle" else ""
    with holdfast.open(path, framework="numpy") as f:
        if not f._mapped:
            pytest.skip("not on a local file system, where large tensors are not mapped")
        if gone:
            shutil.rmtree(path)
        else:
            write(path, 2, layout)
        for name, array in arrays(1).items():
            assert np.array_equal(f[prefix + name], array), name
            assert np.array_equal(f.slice(prefix + name)[1:5], array[1:5]), name
        one = f[prefix + "tiny.a"]
        one[:] = 0
        assert np.array_equal(f[prefix + "tiny.a"], arrays(1)["tiny.a"])  # each its own
        f.prefetch()
    if not gone:
        found = holdfast.load(path, framework="numpy")
        found = found["model"] if prefix else found
        assert all(np.array_equal(found[name], array) for name, array in arrays(2).items())


def test_more_than_is_kept_is_an_error_and_never_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "KEPT", 100)
    write(tmp_path / "ckpt", 1, "snapshot")
    with holdfast.open(tmp_path / "ckpt", framework="numpy") as f:
        write(tmp_path / "ckpt", 2, "snapshot")
        old = arrays(1)
        lost: dict[str, str] = {}
        for name in f:
            try:
                assert np.array_equal(f[name], old[name])
            except holdfast.FormatError as error:
                lost[name] = str(error)
    assert all("removed or replaced since the folder was opened" in why for why in lost.values())
    assert list(lost) == ["nearly.a", "nearly.b", "small.a", "small.b", "tiny.b"]
