"""Files that real releases of PyTorch wrote, read with and without it: tensors by digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
EXPECTED: dict[str, dict[str, Any]] = {
    name: tensors
    for page in sorted(GOLDEN.glob("expected-*.json"))
    for name, tensors in json.loads(page.read_text()).items()
    if isinstance(tensors, dict)
}
TORCH = importlib.util.find_spec("torch") is not None
#: NumPy has none of these by itself.
ML = ("bfloat16", "float8_e4m3fn", "float8_e5m2")

#: Loads files as one who has no PyTorch, and says what is in them.
WITHOUT = """
import hashlib, json, sys
sys.modules["torch"] = None
import numpy as np
import holdfast
found = {}
for path in sys.argv[1:]:
    found[path] = {}
    with holdfast.open(path) as f:
        for name in f:
            tensor = f[name]
            assert type(tensor) is np.ndarray
            digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
            found[path][name] = [f.info(name).dtype, list(tensor.shape), digest]
    if "module" not in path:
        holdfast.load(path)
print(json.dumps(found))
"""


def digest(tensor: Any) -> str:
    if not isinstance(tensor, np.ndarray):
        import torch

        flat = tensor.detach().contiguous().reshape(-1)
        tensor = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0)
    return hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()


def test_every_file_is_there() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in GOLDEN.glob("*.pt"))
    assert len(EXPECTED) == 25


def readable(name: str, framework: str) -> bool:
    """Whether the framework, as it is installed, has the dtypes of a file."""
    kinds = {row["dtype"] for row in EXPECTED[name].values()}
    return framework != "numpy" or not kinds & {*ML} or bool(importlib.util.find_spec("ml_dtypes"))


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_tensors(name: str, framework: str) -> None:
    if framework == "torch" and not TORCH:
        pytest.skip("torch is not installed")
    if not readable(name, framework):
        pytest.skip("ml_dtypes is not installed")
    with holdfast.open(GOLDEN / name, framework=framework) as f:
        found = {n: (f.info(n).dtype, tuple(f[n].shape), digest(f[n])) for n in f}
    expected = {
        n: (row["dtype"], tuple(row["shape"]), row["sha256"]) for n, row in EXPECTED[name].items()
    }
    assert {n: found.get(n) for n in expected} == expected
    # Of tied tensors one name is enough; there is nothing else.
    assert set(found.values()) == set(expected.values()) or len(found) > len(expected)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_objects(name: str, mmap: bool) -> None:
    if not readable(name, "torch" if TORCH else "numpy"):
        pytest.skip("ml_dtypes is not installed")
    path = GOLDEN / name
    if name.startswith("module"):
        with pytest.raises(holdfast.UnsafeError, match=r"torch\.nn\.modules.*safe_globals"):
            holdfast.load(path, mmap=mmap)
        return
    obj = holdfast.load(path, mmap=mmap)
    digests = [digest(leaf) for leaf in leaves(obj)]
    assert {row["sha256"] for row in EXPECTED[name].values()} <= set(digests)
    assert holdfast.verify(path).ok


def leaves(obj: Any) -> list[Any]:
    if isinstance(obj, dict):
        return [leaf for value in obj.values() for leaf in leaves(value)]
    if isinstance(obj, list | tuple):
        return [leaf for value in obj for leaf in leaves(value)]
    return [obj] if hasattr(obj, "dtype") and hasattr(obj, "shape") else []


@pytest.mark.skipif(not TORCH, reason="torch is not installed")
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", sorted(n for n in EXPECTED if n.startswith("module")))
@pytest.mark.filterwarnings("ignore")
def test_modules(name: str, mmap: bool) -> None:
    module = holdfast.load(GOLDEN / name, weights_only=False, mmap=mmap)
    state = module.state_dict()
    assert {n: digest(t) for n, t in state.items()} == {
        n: row["sha256"] for n, row in EXPECTED[name].items()
    }
    import torch

    assert module.eval()(torch.ones(2, 7)).shape[0] == 2


def test_without_torch() -> None:
    names = [n for n in sorted(EXPECTED) if readable(n, "numpy")]
    assert len(names) > 15
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *(str(GOLDEN / name) for name in names)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in names:
        for tensor, row in EXPECTED[name].items():
            expected = [row["dtype"], row["shape"], row["sha256"]]
            assert found[str(GOLDEN / name)][tensor] == expected, (name, tensor)
