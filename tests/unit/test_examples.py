"""The examples run, and the command does what its help says."""

from __future__ import annotations

import subprocess
import sys
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
