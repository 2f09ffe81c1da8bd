"""With the real OneFlow, in an interpreter of its own: what each side writes, the other one reads.

``HOLDFAST_ONEFLOW_PYTHON`` names that interpreter, in which holdfast is installed too. OneFlow
0.9.0 runs on Python 3.10, without a GPU:
``pip install oneflow==0.9.0 'numpy<2' nvidia-cudnn-cu11==8.9.6.50 nvidia-cublas-cu11``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow

PYTHON = os.environ.get("HOLDFAST_ONEFLOW_PYTHON", "")
HERE = Path(__file__).parent
WRITTEN = HERE.parent / "golden" / "oneflow" / "written"

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="HOLDFAST_ONEFLOW_PYTHON names no interpreter with OneFlow"
)

Other = Callable[[str, Path], dict[str, Any]]


def environment() -> dict[str, str]:
    """What OneFlow needs to be imported: the libraries that its wheels do not find themselves."""
    code = "import site, sys; print(*site.getsitepackages(), sep='\\n')"
    run = subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True)
    libraries = [
        str(path)
        for folder in run.stdout.split()
        for path in sorted(Path(folder).glob("nvidia/*/lib"))
    ]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    others = [kept["LD_LIBRARY_PATH"]] if kept.get("LD_LIBRARY_PATH") else []
    return {**kept, "LD_LIBRARY_PATH": ":".join([*libraries, *others])}


@pytest.fixture(scope="module")
def other() -> Other:
    """Runs a command of ``other_side.py`` on a folder; what it says of the tensors there."""
    env = environment()

    def run(command: str, folder: Path) -> dict[str, Any]:
        script = [PYTHON, "-W", "ignore", str(HERE / "other_side.py"), command, str(folder)]
        done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-4000:]
        result = folder.with_suffix(".json")
        found: dict[str, Any] = json.loads(result.read_text())
        result.unlink()
        assert found, "nothing was compared"
        return found

    return run


def digest(array: Any, kind: str = "Tensor") -> list[Any]:
    """What the other side says of a tensor."""
    array = np.asarray(array)
    sha = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [kind, str(array.dtype), list(array.shape), sha]


def flat(obj: Any, name: str = "") -> dict[str, Any]:
    if isinstance(obj, np.ndarray):
        return {name: digest(obj)}
    pairs: Any = ()
    if isinstance(obj, dict):
        pairs = obj.items()
    elif isinstance(obj, list | tuple):
        pairs = enumerate(obj)
    found = {}
    for key, value in pairs:
        found.update(flat(value, f"{name}.{key}" if name else str(key)))
    return found


def test_what_is_kept_as_golden_files_loads_there(other: Other, tmp_path: Path) -> None:
    expected = json.loads((WRITTEN / "manifest.json").read_text())["tensors"]
    folder = tmp_path / "written"
    subprocess.run(["cp", "-r", WRITTEN, folder], check=True)
    (folder / "manifest.json").unlink()
    found = other("load", folder)
    assert sorted(found) == sorted(expected)
    assert len(found) > 5
    assert found == expected


def test_what_is_written_here_is_read_there(other: Other, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    dtypes = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")
    every = {name: (8 * rng.random((3, 5, 2))).astype(name) for name in dtypes}
    every.update(zero=np.full((), 2, np.float32), none=np.zeros((2, 0)), turned=every["int32"].T)
    every["large"] = rng.random((700, 1001)).astype("f4")
    folder = tmp_path / "here"
    folder.mkdir()
    expected = {}
    for layout in ("snapshot", "pickle", "file"):
        for name, obj in (("flat", every), ("deep", {"model": every, "rest": [every["bool"], 1]})):
            path = folder / f"{name}-{layout}"
            holdfast.oneflow.save(obj, path, layout=layout)
            flat_folder = (layout, name) == ("snapshot", "flat")
            assert (path / "snapshot_done").exists() == flat_folder
            expected[path.name] = flat(obj)
    assert other("load", folder) == expected


def test_what_is_written_there_is_read_here(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    expected = other("save", folder)
    for name, tensors in expected.items():
        made = holdfast.load(folder / name, framework="numpy")
        found = {key or name: value for key, value in flat(made).items()}
        wanted = {key or name: ["Tensor", *value[1:]] for key, value in tensors.items()}
        assert found == wanted, name


def test_both_ways_with_its_own_tensors(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    expected = other("here", folder)
    assert len(expected) == 15
    assert other("load", folder) == expected


def test_modules(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    text = other("modules", folder)["error"]
    assert "Error(s) in loading state_dict for Sequential:" in text
    assert 'Unexpected key(s) in state_dict: "3.bias", "3.weight". ' in text
    assert "size mismatch for 0.weight: copying a param with shape" in text
    module = holdfast.load(folder / "weights.safetensors", framework="numpy")
    assert list(module)[:2] == ["0.weight", "0.bias"]


def test_weights_of_torch_without_torch(other: Other, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    folder = tmp_path / "torch"
    folder.mkdir()
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    expected = {name: digest(value.numpy()) for name, value in state.items()}
    assert other("foreign", folder) == {"zip.pth": expected, "old.pth": expected}


def test_global_tensors_of_one_process(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    found = other("ranks", folder)
    placed = ['oneflow.placement(type="cpu", ranks=[0])', "(oneflow.sbp.broadcast,)"]
    assert len(found["places"]) == 8
    assert all(place == [placed] for place in found["places"].values())
    made = holdfast.load(folder / "theirs", framework="numpy")
    assert flat(made) == found["tensors"]
    errors = found["errors"]
    for who in ("", ", partly"):
        # What OneFlow says stands in ours line for line, of the same class.
        theirs, ours = errors[f"theirs{who}"].split("\n\t"), errors[f"ours{who}"].split("\n\t")
        assert theirs[0].startswith("RuntimeError") and ours[0].startswith("RuntimeError")
        assert ours[1:] == theirs[1:]
        assert any(line.startswith('local / global mismatch for "weight"') for line in theirs)
    assert 'Missing key(s) in state_dict: "x". ' in errors["missing"]
    assert errors["rank 1"] == (
        "ValueError: global_src_rank out of range (expected to be in range of [0, 1), but got 1)."
    )
    assert errors["no rank"].startswith("ValueError: Please set global_dst_rank in `flow.save`")
    assert errors["text"].startswith("TypeError: global_dst_rank expected type int")


def test_graphs(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    folder.mkdir()
    found = other("graphs", folder)
    assert found["errors"][0] == "RuntimeError: graph must be compiled first."
    assert found["errors"][1].startswith("ValueError: path_or_buffer must be the type of {`str`")
    graph = holdfast.load(folder / "graph", framework="numpy")
    assert sorted(graph) == sorted(found["values"])
    assert len(graph) == 7
    for name, array in graph.items():
        assert digest(array)[1:] == found["values"][name][1:], name


def test_modules_from_before_there_was_meta(other: Other, tmp_path: Path) -> None:
    folder = tmp_path / "oldest"
    folder.mkdir()
    found = other("oldest", folder)
    assert len(found["values"]) >= 7
    assert (
        "size mismatch for 0.bias: float32 of shape oneflow.Size([9]) in the current model needs "
        "36 bytes, the checkpoint has 32" in found["error"]
    )


def test_bfloat16_in_the_single_file(other: Other, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.randn(30, 40).to(torch.bfloat16), "b": torch.randn(4).to(torch.bfloat16)}
    folder = tmp_path / "narrow"
    folder.mkdir()
    holdfast.oneflow.save(tensors, folder / "file", layout="file")
    found = other("narrow", folder)["file"]
    wide = {name: digest(tensor.float().numpy()) for name, tensor in tensors.items()}
    assert found == {name: [kind, "bfloat16", *rest] for name, (kind, _, *rest) in wide.items()}


@pytest.mark.parametrize("what", ["tutorials", "real_oneflow/test_adapter.py"])
def test_what_runs_there(what: str, tmp_path: Path) -> None:
    """The tutorials with OneFlow's modules, and the suite of adapters: with pytest beside it."""
    env = environment()
    if subprocess.run([PYTHON, "-c", "import pytest"], env=env, check=False).returncode:
        pytest.skip("pytest is not installed beside OneFlow")
    command = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--noconftest"]
    command += [f"--rootdir={tmp_path}", "-c", os.devnull, f"--basetemp={tmp_path / 'run'}"]
    command.append(str(HERE.parent / what))
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "oneflow" in done.stdout.lower()
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) >= 8
