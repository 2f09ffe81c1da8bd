"""Arrays of JAX on a CUDA device, saved from it and loaded to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from cuda_tensors import small_ring

DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5, 3), (70_001,)]


@pytest.fixture(autouse=True)
def jax(cupy: Any) -> Iterator[Any]:
    """JAX with a CUDA device and elements of 64 bits; CuPy has the memory that it loads to."""
    module: Any = pytest.importorskip("jax", reason="JAX is not installed")
    try:
        module.local_devices(backend="cuda")
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", before)


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            data = rng.integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
            found[f"{dtype}{shape}"] = data.view(dtype).reshape(shape)
    return found


def there(jax: Any, value: np.ndarray) -> Any:
    return jax.device_put(value, jax.local_devices(backend="cuda")[0])


def same(jax: Any, found: Any, expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    device = jax.local_devices(backend="cuda")[0]
    for name, value in expected.items():
        array = found[name]
        assert isinstance(array, jax.Array) and array.devices() == {device}, name
        assert (array.dtype, array.shape) == (value.dtype, value.shape), name
        assert np.asarray(array).tobytes() == value.tobytes(), name


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_every_dtype(jax: Any, tmp_path: Path, name: str, pinned: bool) -> None:
    expected = values()
    with small_ring(pinned) as ring:
        arrays = {key: there(jax, value) for key, value in expected.items()}
        holdfast.save(arrays, tmp_path / name, staging=ring)
        assert holdfast.verify(tmp_path / name).ok
        plain = holdfast.load(tmp_path / name, framework="numpy")
        assert all(plain[key].tobytes() == value.tobytes() for key, value in expected.items())
        for location in ("cuda:0", "gpu", jax.local_devices(backend="cuda")[0]):
            found = holdfast.load(tmp_path / name, location, framework="jax", staging=ring)
            same(jax, found, expected)


def test_saved_is_what_will_have_been_computed(jax: Any, tmp_path: Path) -> None:
    x = there(jax, np.ones((3000, 3000), np.float32))
    for _ in range(50):
        x = x @ x / 3000
    holdfast.save({"x": x + 1}, tmp_path / "x")
    found = holdfast.load(tmp_path / "x", framework="numpy")["x"]
    assert np.array_equal(found, np.asarray(x + 1))


def test_what_is_loaded_outlives_the_load_and_can_be_computed_with(
    jax: Any, tmp_path: Path
) -> None:
    value = np.arange(20_000_000, dtype=np.float32)
    holdfast.save({"x": value, "y": value[:5]}, tmp_path / "x")
    found = holdfast.load(tmp_path / "x", "cuda:0", framework="jax")
    others = [holdfast.load(tmp_path / "x", "cuda:0", framework="jax") for _ in range(3)]
    sums = [float(each["y"].sum()) for each in (found, *others)]
    del others
    assert sums == [10.0] * 4
    same(jax, found, {"x": value, "y": value[:5]})
    assert float((found["y"] * 2).sum()) == 20.0


def test_arrays_that_are_not_laid_out_in_order(jax: Any, tmp_path: Path) -> None:
    value = np.arange(301 * 411, dtype=np.int32).reshape(301, 411)
    holdfast.save({"x": there(jax, value).T, "y": there(jax, value)[::2, 1:7]}, tmp_path / "x")
    found = holdfast.load(tmp_path / "x", framework="numpy")
    assert np.array_equal(found["x"], value.T)
    assert np.array_equal(found["y"], value[::2, 1:7])
