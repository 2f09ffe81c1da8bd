"""Files of NumPy's, with NumPy: both directions, every dtype and order; golden files."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.dtypes import DTYPES

GOLDEN = Path(__file__).parents[1] / "golden" / "numpy"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())

PLAIN = [np.dtype(code) for code in "?bBhHiIlLqQefdgFDG"]
OTHERS = ["<M8[ns]", ">M8[D]", "<m8[3s]", "<m8", "|S3", "<U2", ">U2", "|V5"]
RECORDS: list[Any] = [
    [("a", "<i1"), ("b", ">f4", (2, 3))],
    [(("title", "a"), "<M8[s]"), ("", "|V3"), ("b", [("x", "|S2"), ("y", "?")])],
]
EVERY = [*PLAIN, *(dtype.newbyteorder(">") for dtype in PLAIN if dtype.itemsize > 1)]
EVERY += [np.dtype(text) for text in OTHERS]
EVERY += [np.lib.format.descr_to_dtype(descr) for descr in RECORDS]

LAYOUTS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "turned": lambda x: x.transpose(2, 0, 1),
    "reversed": lambda x: x[:, ::-1],
    "expanded": lambda x: np.broadcast_to(x[:1], x.shape),
    "a row": lambda x: x[1],
    "an element": lambda x: x[1, 2, 3, ...],
    "nothing": lambda x: x[:0],
}


def sample(dtype: np.dtype[Any]) -> np.ndarray:
    """An array of 2 x 3 x 4 different elements."""
    if dtype.kind in "biufc":
        return np.arange(24).reshape(2, 3, 4).astype(dtype)
    if dtype.kind == "U":
        return np.array([f"{i:2}" for i in range(24)]).reshape(2, 3, 4).astype(dtype)
    raw = np.random.default_rng(0).integers(0, 2, 24 * dtype.itemsize, np.uint8)
    return np.ndarray((2, 3, 4), dtype, raw.tobytes())


def native(array: np.ndarray) -> np.ndarray:
    """Numbers that the table has come back in the machine's byte order."""
    plain = (
        array.dtype.kind in "biufc" and array.dtype.itemsize <= 16 and array.dtype.char not in "gG"
    )
    return array.astype(array.dtype.newbyteorder("=")) if plain else array


def same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.names:  # between the fields anything may stand, which NumPy does not always copy
        return a.dtype == b.dtype and all(same(a[name], b[name]) for name in a.dtype.names)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_every_dtype_and_order(dtype: np.dtype[Any], layout: str, tmp_path: Path) -> None:
    array = LAYOUTS[layout](sample(dtype))
    array = np.asarray(array)
    other = np.arange(3.0)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    holdfast.save({"x": array, "y": other}, f"{ours}.npz")
    with np.load(f"{ours}.npz") as found:
        assert same(found["x"], native(array)) or same(found["x"], array)
        assert same(found["y"], other)
    holdfast.save(array, f"{ours}.npy")
    assert same(native(np.load(f"{ours}.npy")), native(array))
    np.save(f"{theirs}.npy", array)
    for savez in (np.savez, np.savez_compressed):
        savez(f"{theirs}.npz", x=array, y=other)
        for mmap in (True, False):
            got = holdfast.load(f"{theirs}.npz", mmap=mmap)
            assert same(got["x"], native(array)) and same(got["y"], other)
            assert got["x"].flags.writeable
            assert same(holdfast.load(f"{theirs}.npy", mmap=mmap), native(array))
            assert same(holdfast.load(f"{ours}.npy", mmap=mmap), native(array))
            assert same(holdfast.load(f"{ours}.npz", mmap=mmap)["x"], native(array))
        assert holdfast.verify(f"{theirs}.npz").checked == 2
        with holdfast.open(f"{theirs}.npz") as f:
            assert same(f["x"], native(array))
    fortran = np.load(f"{theirs}.npy").flags.f_contiguous
    assert holdfast.load(f"{theirs}.npy").flags.f_contiguous == fortran


@pytest.mark.parametrize("extension", [".npz", ".npy"])
@pytest.mark.parametrize(
    "name", [row.name for row in DTYPES if row.ml_dtypes] + ["int4", "float8_e3m4"]
)
def test_what_numpy_lacks_comes_back(name: str, extension: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(1, 7).reshape(2, 3).astype(getattr(ml_dtypes, name))
    path = tmp_path / f"x{extension}"
    holdfast.save({"x": array} if extension == ".npz" else array, path)
    got = holdfast.load(path)
    assert same(got["x"] if extension == ".npz" else got, array)
    theirs = np.load(path)
    theirs = theirs["x"] if extension == ".npz" else theirs
    assert theirs.dtype == np.dtype(f"V{array.itemsize}")
    assert same(theirs.view(array.dtype), array)
    # What NumPy writes by itself says only how many bytes there are.
    if array.dtype.kind == "V":
        out = io.BytesIO()
        np.savez(out, x=array)
        again = holdfast.load(io.BytesIO(out.getvalue()))["x"]
        assert again.dtype == theirs.dtype and again.tobytes() == array.tobytes()


def test_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    names = [row.torch for row in DTYPES if row.torch and row.itemsize]
    state = {
        **layer.state_dict(),
        "parameter": layer.weight,
        "turned": torch.arange(6.0).reshape(2, 3).T,
        **{name: torch.arange(1, 17, dtype=torch.uint8).view(getattr(torch, name)) for name in names
           if name != "bool"},
    }  # fmt: skip
    path = tmp_path / "x.npz"
    holdfast.save(state, path)
    got = holdfast.load(path, framework="torch")
    assert list(got) == list(state)
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(
            got[name].contiguous().view(torch.uint8),
            tensor.detach().contiguous().view(torch.uint8),
        )
    arrays = holdfast.load(path, keys=["weight", "bias", "bfloat16"])
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    with np.load(path) as theirs:
        assert np.array_equal(theirs["weight"], layer.weight.detach().numpy())
        assert np.array_equal(theirs["turned"], state["turned"].numpy())
    other = torch.nn.Linear(3, 2)
    holdfast.save(layer.state_dict(), path)
    assert holdfast.load_into(other, path).missing_keys == []
    assert torch.equal(other.weight, layer.weight)
    np.savez_compressed(path, **{name: x.numpy() for name, x in layer.state_dict().items()})
    holdfast.load_into(other, path)
    half = torch.arange(1, 17, dtype=torch.uint8).view(torch.complex32)
    holdfast.save({"x": half}, path)
    with pytest.raises(TypeError, match=r"complex32.*NumPy has no such type"):
        holdfast.load(path)


@pytest.mark.parametrize("extension", [".safetensors", ".pt"])
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed, None])
def test_convert_there_and_back(extension: str, savez: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((300, 200)),
        "f": np.asfortranarray(rng.random((30, 20), "f4")),
        "big": rng.integers(0, 9, 50).astype(">i4"),
        "none": np.zeros((0, 3)),
        "scalar": np.array(5, "i2"),
    }
    src, mid, dst = tmp_path / "src.npz", tmp_path / f"mid{extension}", tmp_path / "dst.npz"
    if savez is None:
        holdfast.save(arrays, src)
    else:
        savez(src, **arrays)
    holdfast.convert(src, mid)
    holdfast.convert(mid, dst)
    for path in (mid, dst):
        got = holdfast.load(path, framework="numpy")
        assert list(got) == list(arrays)
        assert all(same(got[name], native(array)) for name, array in arrays.items())
    with np.load(dst) as theirs:
        assert all(same(theirs[name], native(array)) for name, array in arrays.items())
    np.save(tmp_path / "x.npy", arrays["f"])
    holdfast.convert(tmp_path / "x.npy", mid)
    assert same(holdfast.load(mid, framework="numpy"), arrays["f"])
    holdfast.convert(mid, tmp_path / "y.npy")
    assert same(np.load(tmp_path / "y.npy"), arrays["f"])


def test_convert_tells_damage(tmp_path: Path) -> None:
    for savez in (np.savez, np.savez_compressed):
        savez(tmp_path / "x.npz", a=np.random.default_rng(0).random(1000))
        data = bytearray((tmp_path / "x.npz").read_bytes())
        if savez is np.savez:
            data[3000] ^= 1
        else:
            at = data.rindex(b"PK\x01\x02") + 16
            data[at] ^= 1
            data[14] ^= 1
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(holdfast.ChecksumError, match="'a'"):
            holdfast.convert(tmp_path / "x.npz", tmp_path / "y.safetensors")
        assert not (tmp_path / "y.safetensors").exists()


def test_convert_of_what_is_not_flat(tmp_path: Path) -> None:
    holdfast.save({"model": {"w": np.zeros(3)}, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(TypeError, match=r"\$\['model'\]: a dict; this format holds a flat dict"):
        holdfast.convert(tmp_path / "x.pt", tmp_path / "x.npz")
    holdfast.save(np.zeros(3), tmp_path / "one")
    with pytest.raises(TypeError, match=r"\$: a tensor; this format holds a flat dict of arrays"):
        holdfast.convert(tmp_path / "one", tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_without_ml_dtypes(tmp_path: Path) -> None:
    """What is not asked for costs nothing; what is, is told."""
    code = """
import sys
sys.modules["ml_dtypes"] = None
sys.modules["torch"] = None
import holdfast, pathlib
path = pathlib.Path(sys.argv[1])
assert holdfast.load(path, keys="matrix")["matrix"].tolist() == [[0, 1, 2], [3, 4, 5]]
try:
    holdfast.load(path, keys="bfloat16")
except TypeError as error:
    assert "pip install ml_dtypes" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN / "holdfast.npz")], check=True, timeout=60
    )


# -- golden files --------------------------------------------------------------------------------


def test_the_manifest_is_whole() -> None:
    assert sorted(MANIFEST) == sorted(path.name for path in GOLDEN.glob("*.np[yz]"))
    assert len(MANIFEST) == 5


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_golden(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    data = (GOLDEN / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == MANIFEST[name]["sha256"]
    found = holdfast.load(GOLDEN / name)
    arrays = found if isinstance(found, dict) else {"tensor": found}
    assert sorted(arrays) == sorted(MANIFEST[name]["arrays"])
    for key, (dtype, shape, digest) in MANIFEST[name]["arrays"].items():
        assert (arrays[key].dtype.name, list(arrays[key].shape)) == (dtype, shape)
        assert hashlib.sha256(arrays[key].tobytes()).hexdigest() == digest
    assert holdfast.verify(GOLDEN / name).ok
    if name.startswith("holdfast"):
        holdfast.save(found, tmp_path / name)
        assert (tmp_path / name).read_bytes() == data
