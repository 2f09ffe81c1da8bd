"""The examples run, and the command does what its help says."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    holdfast.save({"model": {"w": np.ones((3, 4), "f4")}, "n": np.array(2)}, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout


def test_training() -> None:
    pytest.importorskip("torch")
    assert "resumed to" in run("training.py")


def test_inspect(saved: Path) -> None:
    assert "model.w: float32 (3, 4)" in run("inspect_weights.py", str(saved))


def test_a_torch_file_without_torch(saved: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "model.pt", tmp_path / "model.safetensors"
    holdfast.convert(saved, path)
    text = run("read_torch_file.py", str(path), str(out))
    assert "model.w: float32 (3, 4)" in text
    assert "holds a dict of values" in text
    assert "2 tensors with checksums" in text


def test_a_torch_file_that_is_not_trusted(tmp_path: Path) -> None:
    holdfast.save({"w": np.ones(2), "x": Fraction(1, 3)}, tmp_path / "model.pt")
    text = run("read_torch_file.py", str(tmp_path / "model.pt"))
    assert "w begins with [1. 1.]" in text
    assert "safe_globals=[fractions.Fraction]" in text


def test_the_drop_in() -> None:
    pytest.importorskip("torch")
    assert "last.ckpt: 4 tensors, whole" in run("drop_in.py")


def test_info(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved)]) == 0
    assert "model.w  float32  3x4  48 bytes at" in capsys.readouterr().out
    assert main(["info", "--json", str(saved)]) == 0
    assert capsys.readouterr().out.count('"shape"') == 2


def test_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "ok, 2 tensors" in capsys.readouterr().out
    whole = bytearray(saved.read_bytes())
    whole[-1] ^= 1
    saved.write_bytes(whole)
    assert main(["verify", str(saved)]) == 1
    assert "'n'" in capsys.readouterr().out


def test_a_wrong_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "absent")]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--size", "many"])
