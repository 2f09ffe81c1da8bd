"""What was written for OneFlow, and opened by the real one, is what is written now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow
from oneflow_files import samples

WRITTEN = Path(__file__).parents[1] / "golden" / "oneflow" / "written"
MANIFEST = json.loads((WRITTEN / "manifest.json").read_text())
SAMPLES = samples()


def contents(path: Path) -> dict[str, str]:
    """A digest of each file of a folder, or of the file itself."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {
        str(file.relative_to(path.parent)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_the_manifest_is_whole() -> None:
    found: dict[str, str] = {}
    for name in MANIFEST["tensors"]:
        found.update(contents(WRITTEN / name))
    assert found == MANIFEST["files"]
    assert len(found) > 60
    assert sorted(MANIFEST["tensors"]) == sorted(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_bytes_are_written(name: str, tmp_path: Path) -> None:
    obj, layout = SAMPLES[name]
    holdfast.oneflow.save(obj, tmp_path / name, layout=layout)
    assert contents(tmp_path / name) == contents(WRITTEN / name)


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_read_as_it_was(name: str) -> None:
    expected, _ = SAMPLES[name]
    found = holdfast.load(WRITTEN / name, framework="numpy")
    assert _same(found, expected) > 2
    if "training" in name:
        assert found["again"] is found["model"]["l1.weight"]


def _same(found: Any, expected: Any) -> int:
    """Compare, in depth; how many arrays there were."""
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        return 1
    if isinstance(expected, dict):
        assert sorted(found, key=str) == sorted(expected, key=str)
        return sum(_same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        return sum(_same(a, b) for a, b in zip(found, expected, strict=True))
    assert found == expected
    return 0


def _array(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach() if hasattr(tensor, "detach") else tensor)


ERAS = WRITTEN.parent / "eras"
EXPECTED = json.loads((ERAS / "expected.json").read_text())


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("era", sorted(EXPECTED))
def test_what_oneflow_wrote_opens_tensor_for_tensor(era: str, framework: str) -> None:
    if framework == "torch":
        pytest.importorskip("torch")
    with holdfast.open(ERAS / era, framework=framework, strict=True) as f:
        assert set(f) >= set(EXPECTED[era])
        for name, tensor in EXPECTED[era].items():
            info = f.info(name)
            assert (info.dtype, list(info.shape)) == (tensor["dtype"], tensor["shape"])
            found = _array(f[name])
            assert hashlib.sha256(found.tobytes()).hexdigest() == tensor["sha256"]
    loaded = holdfast.load(ERAS / era, framework=framework, mmap=False, keys="*")
    for name, tensor in EXPECTED[era].items():
        found = _array(loaded[name])
        assert hashlib.sha256(found.tobytes()).hexdigest() == tensor["sha256"]


@pytest.mark.parametrize("target", ["x.pt", "x.safetensors", "x"])
def test_what_was_not_loaded_is_not_saved(tmp_path: Path, target: str) -> None:
    module = holdfast.load(ERAS / "module_v3", framework="numpy")
    form = {} if "." in target else {"format": "oneflow"}
    with pytest.raises((TypeError, AttributeError), match=r"(?i)inert|cannot|Record"):
        holdfast.save({"module": module}, tmp_path / target, **form)
    assert not (tmp_path / target).exists()


def test_arrays_beside_tensors_stay_arrays(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    holdfast.oneflow.save({"w": torch.ones(2), "n": np.ones(3)}, tmp_path / "m")
    assert (tmp_path / "m" / "pickled_data").exists()
    found = holdfast.load(tmp_path / "m", framework="torch")
    assert isinstance(found["w"], torch.Tensor) and isinstance(found["n"], np.ndarray)


def test_warnings_point_to_the_caller(tmp_path: Path) -> None:
    holdfast.oneflow.save({"w": np.ones(2)}, tmp_path / "m")
    (tmp_path / "m" / "snapshot_done").unlink()
    for action in (holdfast.load, holdfast.open, holdfast.oneflow.load):
        with pytest.warns(UserWarning, match="interrupted") as found:
            action(tmp_path / "m")
        assert found[0].filename == __file__
