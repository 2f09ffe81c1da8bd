"""Arrays of CuPy, saved from a CUDA device and loaded to it, alone and beside torch's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from cuda_tensors import small_ring

DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"]
FORMATS = ["a.safetensors", "a.npz", "shards", "folder"]


@pytest.fixture(autouse=True)
def _adapter(cupy: Any) -> None:
    pytest.importorskip("holdfast.adapters.cupy", reason="there is no adapter for CuPy")


def values(folder: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for dtype in DTYPES:
        if folder and dtype not in ("bool", "u1", "i1", "i4", "i8", "f2", "f4", "f8"):
            continue  # OneFlow has no such type
        for shape in ((), (1,), (0,), (3, 0, 2), (5, 3), (70_001,)):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            data = rng.integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
            found[f"{dtype}{shape}"] = data.view(dtype).reshape(shape)
    return found


def same(found: Any, expected: dict[str, np.ndarray], cupy: Any) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        array = found[name]
        assert type(array) is cupy.ndarray and array.device.id == 0, name
        assert (array.dtype, array.shape) == (value.dtype, value.shape), name
        assert cupy.asnumpy(array).tobytes() == value.tobytes(), name


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_dtype_and_format(cupy: Any, tmp_path: Path, name: str, pinned: bool) -> None:
    expected = values(name == "folder")
    how: dict[str, Any] = {"shards": {"max_shard_size": 100_000}, "folder": {"format": "oneflow"}}
    with small_ring(pinned) as ring:
        arrays = {key: cupy.asarray(value) for key, value in expected.items()}
        holdfast.save(arrays, tmp_path / name, staging=ring, **how.get(name, {}))
        assert holdfast.verify(tmp_path / name).ok
        plain = holdfast.load(tmp_path / name, framework="numpy")
        assert all(plain[key].tobytes() == value.tobytes() for key, value in expected.items())
        locations: list[Any] = [None, "cuda", "cuda:0", 0, cupy.cuda.Device(0)]
        for location in locations:
            found = holdfast.load(tmp_path / name, location, framework="cupy", staging=ring)
            same(found, expected, cupy)


def test_arrays_that_are_not_dense(cupy: Any, tmp_path: Path) -> None:
    base = np.arange(301 * 411, dtype=np.int32).reshape(301, 411)
    there = cupy.asarray(base)
    views = {"transposed": (there.T, base.T), "step": (there[::2, 1::3], base[::2, 1::3]),
             "backwards": (there[::-1, ::-2], base[::-1, ::-2]),
             "fortran": (cupy.asfortranarray(there), base)}  # fmt: skip
    views["expanded"] = cupy.broadcast_to(there[:1], (9, 411)), np.broadcast_to(base[:1], (9, 411))
    holdfast.save({key: array for key, (array, _) in views.items()}, tmp_path / "x")
    same(holdfast.load(tmp_path / "x"), {key: value for key, (_, value) in views.items()}, cupy)


def test_beside_torchs_and_numpys(cupy: Any, torch: Any, tmp_path: Path) -> None:
    value = np.arange(70_000, dtype=np.float32)
    tree = {"cupy": cupy.asarray(value), "torch": torch.from_numpy(value).cuda(), "numpy": value}
    holdfast.save(tree, tmp_path / "x")
    for framework, kind in (("numpy", np.ndarray), ("cupy", cupy.ndarray)):
        found = holdfast.load(tmp_path / "x", framework=framework)
        assert {type(array) for array in found.values()} == {kind}
        assert all(_host(array).tobytes() == value.tobytes() for array in found.values())
    found = holdfast.load(tmp_path / "x", "cuda", framework="torch")
    assert all(tensor.cpu().numpy().tobytes() == value.tobytes() for tensor in found.values())


def _host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def test_filled_in_place_and_opened(cupy: Any, tmp_path: Path) -> None:
    expected = values()
    holdfast.save(expected, tmp_path / "x")
    target = {key: cupy.zeros(value.shape, value.dtype) for key, value in expected.items()}
    before = {key: array.data.ptr for key, array in target.items()}
    holdfast.load_into(target, tmp_path / "x")
    same(target, expected, cupy)
    assert {key: array.data.ptr for key, array in target.items()} == before
    with holdfast.open(tmp_path / "x", framework="cupy", map_location="cuda:0") as f:
        same({"x": f["f4(5, 3)"]}, {"x": expected["f4(5, 3)"]}, cupy)
        part = f.slice("c16(70001,)")[5:70_000:7]
        assert cupy.asnumpy(part).tobytes() == expected["c16(70001,)"][5:70_000:7].tobytes()


def test_what_is_changed_after_a_save_is_not_in_the_file(cupy: Any, tmp_path: Path) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.full(80 << 20, 7, cupy.uint8)
        holdfast.save({"x": array}, tmp_path / "x")
        array.fill(0)
    stream.synchronize()
    assert (holdfast.load(tmp_path / "x", framework="numpy")["x"] == 7).all()
