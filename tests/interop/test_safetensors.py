"""The safetensors package reads what holdfast writes, and the other way round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast

safetensors = pytest.importorskip("safetensors")
st_numpy = pytest.importorskip("safetensors.numpy")

NUMPY = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64",
)  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    found = {}
    for name in NUMPY:
        dtype = np.dtype(name)
        raw = rng.integers(0, 2 if name == "bool" else 256, 48 * dtype.itemsize, np.uint8)
        found[name] = raw.view(dtype).reshape(3, 16)
        found[f"{name}.0d"] = np.array(found[name][0, 0])
        found[f"{name}.empty"] = found[name][:0]
    found["odd"] = rng.integers(0, 256, 13, np.uint8)
    found['é "quoted" \n'] = np.arange(3)
    return found


def test_ours_opens_there(tmp_path: Path) -> None:
    obj = arrays()
    holdfast.save(obj, tmp_path / "x.safetensors", metadata={"k": "v"})
    got = st_numpy.load_file(tmp_path / "x.safetensors")
    assert set(got) == set(obj)
    for name, array in obj.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as f:
        assert f.metadata()["k"] == "v" and f.metadata()["format"] == "np"


@pytest.mark.parametrize("mmap", [True, False])
def test_theirs_opens_here(tmp_path: Path, mmap: bool) -> None:
    obj = arrays()
    st_numpy.save_file(obj, tmp_path / "x.safetensors", metadata={"k": "v"})
    got = holdfast.load(tmp_path / "x.safetensors", mmap=mmap, framework="numpy")
    assert set(got) == set(obj)
    for name, array in obj.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
        assert got[name].flags.aligned
    report = holdfast.verify(tmp_path / "x.safetensors")
    assert report.ok and report.checked == 0 and report.unchecked == len(obj)
    with holdfast.open(tmp_path / "x.safetensors") as f:
        assert f.metadata == {"k": "v"}


@pytest.mark.parametrize("mmap", [True, False])
def test_a_misaligned_tensor_is_usable(tmp_path: Path, mmap: bool) -> None:
    """Any contiguous order is legal, so a foreign file may start doubles at an odd offset."""
    b = np.arange(4.0)
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"b":{"dtype":"F64","shape":[4],"data_offsets":[3,35]}}'
    )
    data = len(header).to_bytes(8, "little") + header + b"\1\2\3" + b.tobytes()
    (tmp_path / "x").write_bytes(data)
    got = holdfast.load(tmp_path / "x", mmap=mmap, framework="numpy")
    assert got["b"].flags.aligned and got["b"].tolist() == b.tolist()
    assert got["a"].tolist() == [1, 2, 3]


def test_alignment(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sizes = [1, 3, 4096, 64, 100, 8192, 2, 4096 * 5, 192, 12, 0]
    obj = {f"t{i}": rng.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
    holdfast.save(obj, tmp_path / "x")
    with holdfast.open(tmp_path / "x") as f:
        assert list(f) == list(obj)
        for i, size in enumerate(sizes):
            assert size == 0 or f.info(f"t{i}").offset % min(4096, size & -size) == 0


def test_torch_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    st_torch = pytest.importorskip("safetensors.torch")
    names = "bool uint8 int16 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2"
    obj = {
        name: torch.randint(0, 2, (64,), dtype=torch.uint8).view(getattr(torch, name))
        for name in names.split()
    }
    holdfast.save(obj, tmp_path / "ours")
    st_torch.save_file(obj, tmp_path / "theirs")
    ours, theirs = st_torch.load_file(tmp_path / "ours"), holdfast.load(tmp_path / "theirs")
    assert set(ours) == set(theirs) == set(obj)
    for name, tensor in obj.items():
        for got in (ours[name], theirs[name]):
            assert got.dtype == tensor.dtype
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
