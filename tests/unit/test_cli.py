"""The command: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli import main


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ckpt"
    holdfast.save({"m": {"w": np.ones((2, 3), "f4")}, "s": np.array(1)}, path, metadata={"a": "b"})
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# a: b" and lines[-1] == "2 tensors, 32 bytes"
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["m.w", "float32", "2x3"], ["s", "int64", "scalar"],
    ]  # fmt: skip
    assert main(["info", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["shape"]) for row in rows] == [("m.w", [2, 3]), ("s", [])]


def test_verify_goes_on_after_a_file_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holdfast.save({"w": np.ones(2)}, tmp_path / "good")
    (tmp_path / "bad").write_bytes(b"no checkpoint")
    paths = [str(tmp_path / name) for name in ("missing", "bad", "good")]
    assert main(["verify", *paths]) == 1
    printed = capsys.readouterr()
    assert "missing" in printed.err and "not a checkpoint" in printed.out
    assert f"{paths[2]}: ok, 1 tensors checked" in printed.out
    assert main(["verify", paths[2]]) == 0
    assert main(["info", paths[1]]) == 1


def test_names_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holdfast.save({"a\x1b[31m\nb": np.ones(2)}, tmp_path / "x", metadata={"k\n": "\x1b[0m"})
    assert main(["info", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"a\x1b[31m\nb  float64" in out and len(out.splitlines()) == 3


def test_names_that_the_output_cannot_encode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    holdfast.save({"\u00e9": np.ones(2)}, path)
    for command, shown in (("info", b"\\xe9  float64"), ("verify", b": ok, 1 tensors")):
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", command, path],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
        )
        assert done.returncode == 0 and shown in done.stdout, done


def test_info_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    obj = {"a": np.ones(2, "f4"), "b": np.ones(3, "f4")}
    holdfast.save(obj, tmp_path / "shards", max_shard_size=8)
    assert main(["info", str(tmp_path / "shards")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("shards/model-00001-of-00002.safetensors")
    assert lines[1].endswith("shards/model-00002-of-00002.safetensors")


def test_warnings_are_told_as_errors_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    holdfast.save({"w": np.ones(2)}, tmp_path / "m", format="oneflow")
    (tmp_path / "m" / "snapshot_done").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().err
    assert told.startswith("holdfast: ") and "interrupted" in told and ".py" not in told
