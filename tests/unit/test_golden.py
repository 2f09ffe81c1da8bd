"""Files whose bytes are fixed: they are read for ever, and written the same."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import holdfast

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def test_the_manifest_is_whole() -> None:
    assert sorted(MANIFEST) == sorted(path.name for path in GOLDEN.glob("*.safetensors"))
    assert len(MANIFEST) >= 3


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_tensors(name: str) -> None:
    data = (GOLDEN / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == MANIFEST[name]["sha256"]
    with holdfast.open(GOLDEN / name, framework="numpy") as f:
        assert set(f) == set(MANIFEST[name]["tensors"])
        for tensor, (dtype, shape, digest) in MANIFEST[name]["tensors"].items():
            info = f.info(tensor)
            assert (info.dtype, list(info.shape)) == (dtype, shape)
            raw = data[info.offset : info.offset + info.nbytes]
            assert hashlib.sha256(raw).hexdigest() == digest
    assert holdfast.verify(GOLDEN / name).ok


def test_nested(tmp_path: Path) -> None:
    path = GOLDEN / "nested-v1.safetensors"
    got = holdfast.load(path)
    assert type(got["model"]) is OrderedDict
    assert got["model"]["tied"] is got["model"]["fc.weight"]
    assert got["model"]["fc.weight"].tolist() == np.arange(24.0).reshape(4, 6).tolist()
    assert got["optimizer"]["state"][0]["step"] == 7
    assert got["optimizer"]["betas"] == (0.9, 0.999)
    assert got["values"][:3] == [None, True, 1 << 80]
    assert str(got["values"][3]) == "-0.0"
    assert got["values"][4:] == [float("inf"), 1 + 2j, b"\0\xff", "\u00e9", {1, 2}]
    assert got["stored as bytes"].tolist() == [1 + 2j, 3 - 4j]
    assert got["scalar"] == np.float32(1.5) and type(got["scalar"]) is np.float32
    assert got["long"] == bytes(range(256)) * 5
    holdfast.save(got, tmp_path / "again", metadata={"who": "golden"})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_state_dict(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = GOLDEN / "state_dict-v1.safetensors"
    got = holdfast.load(path)
    layer = torch.nn.Linear(3, 2)
    layer.load_state_dict({name: got[name] for name in ("weight", "bias")})
    assert layer.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["half"].tolist() == got["eighth"].float().tolist() == [0, 1, 2, 3, 4]
    assert got._metadata == OrderedDict({"": {"version": 1}})
    holdfast.save(got, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
