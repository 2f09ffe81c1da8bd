"""No flipped bit goes unseen."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest

import holdfast


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    path = tmp_path / "ckpt"
    holdfast.save(
        {"model": {"a.weight": rng.random((9, 5), "f4"), "b": rng.random(3)}, "n": [1, b"x"]},
        path,
        metadata={"k": "v"},
    )
    return path


def test_sound(saved: Path) -> None:
    report = holdfast.verify(saved)
    assert report.ok and report.problems == [] and report.checked == 2 and report.unchecked == 0
    assert holdfast.verify(io.BytesIO(saved.read_bytes())).checked == 2


def test_every_flipped_bit_is_reported(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    assert 4096 < len(whole) < 4500
    flips = 0
    for place in range(len(whole)):
        for bit in range(8):
            whole[place] ^= 1 << bit
            assert not holdfast.verify(io.BytesIO(whole)).ok, (place, bit)
            with pytest.raises(holdfast.FormatError):
                holdfast.load(io.BytesIO(whole))
            whole[place] ^= 1 << bit
            flips += 1
    assert flips == 8 * len(whole)


def test_a_flipped_bit_in_a_file(saved: Path) -> None:
    with holdfast.open(saved) as f:
        info = f.info("model.a.weight")
    whole = bytearray(saved.read_bytes())
    whole[info.offset + 17] ^= 4
    saved.write_bytes(whole)
    report = holdfast.verify(saved)
    assert not report.ok and len(report.problems) == 1 and report.checked == 2
    assert re.search(rf"{saved}: tensor 'model.a.weight'.*offset {info.offset}", report.problems[0])
    for options in ({"mmap": False}, {"mmap": True, "verify": True}):
        with pytest.raises(holdfast.ChecksumError, match="model.a.weight"):
            holdfast.load(saved, **options)  # type: ignore[arg-type]
    for options in ({"mmap": True}, {"mmap": False, "verify": False}):
        assert holdfast.load(saved, **options)["n"] == [1, b"x"]  # type: ignore[arg-type]


def test_without_checksums(tmp_path: Path) -> None:
    holdfast.save({"x": np.ones(9)}, tmp_path / "x", checksum=False)
    report = holdfast.verify(tmp_path / "x")
    assert report.ok and report.checked == 0 and report.unchecked == 1
    assert (holdfast.load(tmp_path / "x", mmap=False)["x"] == 1).all()
