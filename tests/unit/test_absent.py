"""Where a package is missing, or the system refuses: what still works, and what is said."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast

_WITHOUT = """
import sys
for package in {packages!r}:
    sys.modules[package] = None  # as if it were not installed
import numpy as np
import holdfast
{code}
"""


def _run(packages: tuple[str, ...], code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT.format(packages=packages, code=code), path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _foreign(path: Path, dtype: str, shape: list[int], data: bytes, form: str = "pt") -> None:
    """A file that another program wrote, with one tensor."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": {"format": form}, "w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_everything_but_torch(tmp_path: Path) -> None:
    _foreign(tmp_path / "x", "F32", [2], struct.pack("2f", 1, 2))
    code = """
path = sys.argv[1]
assert holdfast.load(path)["w"].tolist() == [1, 2]
with holdfast.open(path) as f:
    assert f["w"].tolist() == [1, 2]
target = {"w": np.zeros(2)}
holdfast.load_into(target, path)
holdfast.save(target, path)
assert holdfast.load(path, mmap=False)["w"].tolist() == [1, 2]
try:
    holdfast.load(path, framework="torch")
except ImportError as error:
    print(error)
"""
    said = _run(("torch",), code, tmp_path / "x")
    assert "'torch' was asked for and is not installed: pip install torch" in said


def test_bfloat16_without_ml_dtypes(tmp_path: Path) -> None:
    _foreign(tmp_path / "x", "BF16", [2], bytes(4))
    code = """
path = sys.argv[1]
with holdfast.open(path) as f:
    assert f.info("w").dtype == "bfloat16" and f.tree()["w"].shape == (2,)
assert holdfast.verify(path).ok
holdfast.save({"a": np.ones(2)}, path + "y")
try:
    holdfast.load(path)
except TypeError as error:
    print(error)
"""
    said = _run(("torch", "ml_dtypes"), code, tmp_path / "x")
    assert said.startswith(f"{tmp_path}/x: bfloat16: ") and "pip install ml_dtypes" in said


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**62]])
def test_a_shape_that_numpy_has_not(tmp_path: Path, shape: list[int]) -> None:
    """No bytes at all, so the file is sound; but NumPy multiplies what is not zero."""
    _foreign(tmp_path / "x", "F64", shape, b"", "np")
    for action in (
        lambda path: holdfast.load(path, mmap=False),
        lambda path: holdfast.load(path, keys="w"),
        lambda path: holdfast.open(path, framework="numpy")["w"],
    ):
        with pytest.raises(holdfast.FormatError, match="x: "):
            action(tmp_path / "x")


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    for path, action in (
        ("/dev/full", lambda path: holdfast.save({"w": np.ones(2)}, path)),
        ("/proc/self/mem", holdfast.load),
    ):
        if os.path.exists(path):
            with pytest.raises(OSError) as caught:
                action(path)
            assert caught.value.filename == path and caught.value.errno


@pytest.mark.parametrize("threads", [100_000, 10**30])
def test_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    obj = {"w": np.arange(100.0)}
    holdfast.save(obj, tmp_path / "x", threads=threads)
    assert (holdfast.load(tmp_path / "x", mmap=False, threads=threads)["w"] == obj["w"]).all()
    assert holdfast.verify(tmp_path / "x", threads=threads).ok
