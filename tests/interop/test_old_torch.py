"""What is written here is read by old releases of PyTorch, where there are some.

``HOLDFAST_OLD_TORCH_PYTHONS`` is a list of interpreters, separated by ``:``, each with a PyTorch
from 1.6 on; none of them needs this library.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

PYTHONS = [p for p in os.environ.get("HOLDFAST_OLD_TORCH_PYTHONS", "").split(":") if p]

pytestmark = pytest.mark.skipif(
    not PYTHONS, reason="HOLDFAST_OLD_TORCH_PYTHONS names no interpreter"
)

#: Loads a file and says what is in it: for each tensor its dtype, shape and digest.
READER = """
import hashlib, json, sys
import torch

def walk(obj, path, found):
    if isinstance(obj, torch.Tensor):
        flat = obj.detach().contiguous().view(-1)
        if flat.dtype == torch.bfloat16:
            flat = flat.view(torch.int16)
        digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
        found[path] = [str(obj.dtype)[6:], list(obj.shape), digest]
    elif isinstance(obj, dict):
        for key, value in obj.items():
            walk(value, path + "." + str(key) if path else str(key), found)
    elif isinstance(obj, (list, tuple)):
        for i, value in enumerate(obj):
            walk(value, path + "." + str(i), found)
    else:
        found[path] = repr(obj)

found = {}
obj = torch.load(sys.argv[1])
walk(obj, "", found)
found["tied"] = obj["model"]["w"].storage().data_ptr() == obj["head"].storage().data_ptr()
print(json.dumps([torch.__version__, found]))
"""


def described(array: np.ndarray) -> list[Any]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [array.dtype.name, list(array.shape), digest]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("format", ["torch", "torch_legacy"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_old_releases_read_it(tmp_path: Path, python: str, format: str, framework: str) -> None:
    rng = np.random.default_rng(3)
    w = rng.random((3, 5), "f4")
    arrays = {
        "f8": rng.random(7),
        "i8": rng.integers(-9, 9, (2, 2)),
        "u1": rng.integers(0, 255, 5, np.uint8),
        "b1": np.array([True, False]),
        "f2": rng.random(3).astype("f2"),
        "zero": np.empty((0, 4), "f4"),
        "scalar": np.array(2.5, "f4"),
    }
    path = tmp_path / "old.pt"
    model: dict[str, Any] = OrderedDict(w=w, **arrays)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        model = OrderedDict((name, torch.from_numpy(a)) for name, a in model.items())
    obj = {"model": model, "head": model["w"], "epoch": 3, "lr": [0.5, (None, True)], "s": "é"}
    holdfast.save(obj, path, format=format)
    done = subprocess.run(
        [python, "-c", READER, str(path)], capture_output=True, text=True, timeout=120, env={}
    )
    assert done.returncode == 0, done.stderr
    version, found = json.loads(done.stdout)
    assert version
    for name, array in {"w": w, **arrays}.items():
        assert found[f"model.{name}"] == described(array), (version, name)
    assert found["head"] == described(w)
    assert found["tied"] is True
    assert found["epoch"] == "3"
    assert found["lr.0"] == "0.5"
    assert found["lr.1.1"] == "True"
    assert found["s"] == repr("é")
