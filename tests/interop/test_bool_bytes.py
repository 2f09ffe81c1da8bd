"""Elements of type bool whose bytes are neither 0 nor 1: in memory each is 0 or 1."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow

torch = pytest.importorskip("torch")

#: More than a page, and more than what of a folder is always read; and very few.
LARGE = np.random.default_rng(6).choice(np.array([0, 1, 2, 128, 255], "u1"), (500, 300))
SMALL = np.array([[0, 1], [2, 255]], "u1")
BYTES = {"large": LARGE, "small": SMALL, "bytes": LARGE.copy()}
#: What has to come of them; `bytes` is of another type and stays.
WANTED = {"large": np.minimum(LARGE, 1), "small": np.minimum(SMALL, 1), "bytes": LARGE}


def arrays() -> dict[str, np.ndarray]:
    return {"large": LARGE.view("?"), "small": SMALL.view("?"), "bytes": LARGE.copy()}


def tensors() -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays().items()}


def _npy(path: Path) -> None:
    np.save(path, arrays()["large"])


def _fortran(path: Path) -> None:
    np.save(path, np.asfortranarray(arrays()["large"]))


#: How a file comes to be in which they are, by its name.
WRITERS: dict[str, Callable[[Path], Any]] = {
    "x.safetensors": lambda path: holdfast.save(arrays(), path),
    "x.pt": lambda path: torch.save(tensors(), path),
    "old.pt": lambda path: torch.save(tensors(), path, _use_new_zipfile_serialization=False),
    "x.npz": lambda path: np.savez(path, **arrays()),
    "deflated.npz": lambda path: np.savez_compressed(path, **arrays()),
    "x.npy": _npy,
    "fortran.npy": _fortran,
    "snapshot": lambda path: holdfast.oneflow.save(arrays(), path),
    "folder": lambda path: holdfast.oneflow.save(arrays(), path, layout="pickle"),
    "file": lambda path: holdfast.oneflow.save(arrays(), path, layout="file"),
    "shards": lambda path: holdfast.save(arrays(), path, max_shard_size=160_000),
}


@pytest.fixture(params=WRITERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    WRITERS[request.param](path)
    return path


def check(found: Any, *, alone: bool = False) -> None:
    """All elements are as they have to be, and those of bool are 0 or 1 in memory."""
    named = {"large": found} if isinstance(found, np.ndarray | torch.Tensor) else dict(found)
    if alone:
        named = {"large": next(iter(named.values()))}
    assert sorted(named) == (["large"] if len(named) == 1 else sorted(WANTED))
    for name, tensor in named.items():
        array = tensor.numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)
        assert array.dtype == ("u1" if name == "bytes" else "?")
        assert np.array_equal(array.view("u1"), WANTED[name]), name


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("mmap", [True, False])
def test_loads(saved: Path, mmap: bool, framework: str) -> None:
    before = [file.read_bytes() for file in sorted(saved.rglob("*")) if file.is_file()]
    check(holdfast.load(saved, mmap=mmap, framework=framework))
    # The file is as it was, and so is what is mapped of it.
    assert before == [file.read_bytes() for file in sorted(saved.rglob("*")) if file.is_file()]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_opens(saved: Path, framework: str) -> None:
    with holdfast.open(saved, framework=framework) as f:
        name = "large" if "large" in f else next(iter(f))
        check({name: f[name]}, alone=True)
        part = np.asarray(f.slice(name)[3:9, ::7]).view("u1")
        assert np.array_equal(part, WANTED["large"][3:9, ::7])
        check(f, alone=len(f) == 1)
        check({name: f[name]}, alone=True)


def test_streams(saved: Path) -> None:
    if saved.is_dir():
        return
    data = io.BytesIO(saved.read_bytes())
    check(holdfast.load(data, framework="numpy"))
    data.seek(0)
    with holdfast.open(data, framework="numpy") as f:
        name = "large" if "large" in f else next(iter(f))
        assert np.array_equal(f.slice(name)[3:9].view("u1"), WANTED["large"][3:9])
        f.prefetch()
        check({name: f[name]}, alone=True)


def test_fills(saved: Path) -> None:
    with holdfast.open(saved, framework="numpy") as f:
        names = {"large": next(iter(f))} if len(f) == 1 else {name: name for name in f}
    for make in (
        lambda shape: np.zeros(shape, "?"),
        lambda shape: np.zeros(shape[::-1], "?").T,
        lambda shape: torch.zeros(shape, dtype=torch.bool),
        lambda shape: torch.zeros(shape[::-1], dtype=torch.bool).T,
    ):
        target = {name: make(WANTED[key].shape) for key, name in names.items() if key != "bytes"}
        holdfast.load_into(target, saved, strict=False)
        for key, name in names.items():
            if key != "bytes":
                assert np.array_equal(np.asarray(target[name]).view("u1"), WANTED[key]), key
    converted = {names["large"]: torch.zeros(LARGE.shape)}
    holdfast.load_into(converted, saved, strict=False)
    assert np.array_equal(converted[names["large"]].numpy(), WANTED["large"])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = tensors()["large"]
    torch.save({"turned": whole.T, "part": whole[1:4, 2:8:3], "storage": whole.storage()},
               tmp_path / "x.pt")  # fmt: skip
    for mmap in (True, False):
        found = holdfast.load(tmp_path / "x.pt", mmap=mmap, framework="torch")
        wanted = WANTED["large"]
        assert np.array_equal(found["turned"].numpy().view("u1"), wanted.T)
        part = np.ascontiguousarray(found["part"].numpy()).view("u1")
        assert np.array_equal(part, wanted[1:4, 2:8:3])
        bits = torch.tensor([], dtype=torch.bool).set_(found["storage"]).numpy().view("u1")
        assert np.array_equal(bits, wanted.reshape(-1))
    torch.save(whole.storage(), tmp_path / "alone.pt")
    alone = holdfast.load(tmp_path / "alone.pt", mmap=True, framework="torch")
    bits = torch.tensor([], dtype=torch.bool).set_(alone).numpy().view("u1")
    assert np.array_equal(bits, WANTED["large"].reshape(-1))


def test_the_oldest_folders_and_untyped_bytes(tmp_path: Path) -> None:
    (tmp_path / "old" / "w").mkdir(parents=True)
    (tmp_path / "old" / "w" / "out").write_bytes(SMALL.tobytes())
    (tmp_path / "old" / "snapshot_done").touch()
    target = {"w": np.zeros((2, 2), "?")}
    holdfast.load_into(target, tmp_path / "old")
    assert np.array_equal(target["w"].view("u1"), WANTED["small"])


@pytest.mark.parametrize("layout", ["snapshot", "pickle"])
def test_a_folder_of_small_ones_alone(tmp_path: Path, layout: str) -> None:
    holdfast.oneflow.save({"small": SMALL.view("?")}, tmp_path / "x", layout=layout)
    with holdfast.open(tmp_path / "x", framework="numpy") as f:
        for _ in range(2):
            assert np.array_equal(f["small"].view("u1"), WANTED["small"])


def test_bytes_that_are_sound_cost_no_pages(tmp_path: Path) -> None:
    holdfast.save({"x": np.ones(1 << 20, "?")}, tmp_path / "x")
    before = _private()
    found = holdfast.load(tmp_path / "x", mmap=True, framework="numpy")["x"]
    assert found.all()
    assert _private() - before < 512


def _private() -> int:
    """KiB of memory that is this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
