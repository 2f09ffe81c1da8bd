"""JAX's adapter: the suite for adapters, and what is JAX's alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from conformance.test_adapters import AdapterSuite, batch_of, stored_bytes
from holdfast import _engine
from holdfast.adapters import _capsules
from holdfast.dtypes import BY_NAME, DType
from holdfast.views import TensorBatch, TensorView

jax = pytest.importorskip("jax", reason="JAX is not installed")

from holdfast.adapters.jax import JaxAdapter, _over  # noqa: E402


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Elements of 64 bits; arrays on the CPU, wherever JAX would have put them."""
    before = jax.config.jax_enable_x64, jax.config.jax_default_device
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
    yield
    jax.config.update("jax_enable_x64", before[0])
    jax.config.update("jax_default_device", before[1])


def live() -> int:
    """JAX lets go of arrays of NumPy that it has read when garbage is collected."""
    gc.collect()
    return _engine.live_buffers()


class TestJax(AdapterSuite):
    adapter = JaxAdapter()
    column = "numpy"

    def has(self, row: DType) -> bool:
        return row.numpy is not None and hasattr(jax.numpy, row.numpy)

    def batch(self, rows: Sequence[tuple[str, tuple[int, ...]]], apart: bool = False) -> Any:
        return batch_of(rows, apart, align=64)

    def live(self) -> int:
        return live()

    def make(self, array: np.ndarray) -> Any:
        return jax.numpy.array(array)

    def layouts(self) -> dict[str, Any]:
        layout = pytest.importorskip("jax.experimental.layout")
        if not hasattr(layout, "Format"):
            pytest.skip("this JAX cannot be told how to lay out an array")
        flat = jax.numpy.arange(120, dtype=jax.numpy.int32)
        made = {}
        for shape, order in (
            ((10, 12), (1, 0)), ((4, 5, 6), (2, 1, 0)), ((4, 5, 6), (0, 2, 1)),
            ((2, 3, 4, 5), (0, 2, 3, 1)),
        ):  # fmt: skip
            plain = flat.reshape(shape)
            form = layout.Format(layout.Layout(major_to_minor=order), plain.sharding)
            made[f"{shape} by {order}"] = jax.device_put(plain, form)
        return made

    def data(self, tensor: Any) -> bytes:
        return bytes(np.asarray(tensor).tobytes())

    def address(self, tensor: Any) -> int:
        return int(tensor.unsafe_buffer_pointer())

    def unholdable(self) -> dict[str, Any]:
        deleted = jax.numpy.ones(3)
        deleted.delete()
        kept: list[Any] = []
        jax.eval_shape(kept.append, jax.numpy.ones(2))
        return {"key_data": jax.random.key(0), "deleted": deleted, "tracer": kept[0]}

    def kinds(self) -> list[Any]:
        jnp = jax.numpy
        names = ("int4", "uint4", "float8_e4m3b11fnuz")
        return [jnp.asarray([[1, 2, 3]], getattr(jnp, name)) for name in names]

    def same(self, a: Any, b: Any) -> bool:
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bool((a == b).all())

    def test_tensors_are_writable_and_share_the_memory(self) -> None:
        batch = self.batch([("int32", (5, 3)), ("int32", (4,))])
        for i, array in enumerate(self.adapter.wrap(batch, {})):
            assert self.address(array) == batch[i].address
            assert not self.adapter.writable(array)

    def test_fill_converts(self) -> None:
        with pytest.raises(TypeError, match="immutable"):
            self.adapter.fill(self.make(np.zeros(2)), self.make(np.ones(2)))

    def test_what_is_not_aligned_is_copied(self) -> None:
        batch = batch_of([("int8", (16,)), ("float32", (5, 3)), ("bool", (3,))])
        start = live()
        arrays = self.adapter.wrap(batch, {})
        assert [self.data(a) for a in arrays] == [stored_bytes(batch, i) for i in range(3)]
        assert self.address(arrays[1]) % 64 == 0 != batch[1].address % 64
        del batch, arrays
        assert live() == start - 1


class TestWidth:
    """JAX cuts elements of 64 bits to 32, unless told not to; holdfast never does."""

    @pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
    def test_is_never_cut(self, name: str, tmp_path: Path) -> None:
        array = np.full(3, 2**40, name)
        holdfast.save({"step": array}, tmp_path / "x")
        assert (np.asarray(holdfast.load(tmp_path / "x", framework="jax")["step"]) == array).all()
        jax.config.update("jax_enable_x64", False)
        with pytest.raises(TypeError, match=rf"x: {name}: .*jax_enable_x64.*framework='numpy'"):
            holdfast.load(tmp_path / "x", framework="jax")

    def test_arrays_that_have_it_are_saved(self, tmp_path: Path) -> None:
        wide = jax.numpy.full(3, 2**40, jax.numpy.int64)
        jax.config.update("jax_enable_x64", False)
        holdfast.save({"step": wide}, tmp_path / "x")
        assert holdfast.load(tmp_path / "x", framework="numpy")["step"].tolist() == [2**40] * 3


class TestFiles:
    def test_a_nested_object_comes_back(self, tmp_path: Path) -> None:
        jnp = jax.numpy
        tree = {
            "params": [jnp.arange(6.0).reshape(2, 3), jnp.ones((), jnp.bfloat16)],
            "mask": (jnp.array([True, False]), jnp.zeros((0, 3), jnp.complex64)),
            "quarter": jnp.asarray([-8, 7], jnp.int4),
            "step": 3,
        }
        holdfast.save(tree, tmp_path / "x.safetensors")
        for options in ({}, {"mmap": False}):
            back = holdfast.load(tmp_path / "x.safetensors", **options)
            assert jax.tree.structure(back) == jax.tree.structure(tree)
            for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
                assert type(a) is type(b)
                assert np.array_equal(a, b) and getattr(a, "dtype", 0) == getattr(b, "dtype", 0)
        plain = holdfast.load(tmp_path / "x.safetensors", framework="numpy")
        assert plain["quarter"].dtype.name == "int4" and plain["quarter"].tolist() == [-8, 7]

    def test_parts_of_a_file(self, tmp_path: Path) -> None:
        holdfast.save({"w": jax.numpy.arange(24).reshape(4, 6)}, tmp_path / "x")
        with holdfast.open(tmp_path / "x") as f:
            part = f.slice("w")[1:3, 2]
            assert isinstance(part, jax.Array) and part.tolist() == [8, 14]

    def test_nothing_is_filled(self, tmp_path: Path) -> None:
        target = {"w": jax.numpy.zeros(3)}
        holdfast.save({"w": jax.numpy.ones(3)}, tmp_path / "x")
        with pytest.raises((TypeError, ValueError), match="'w'"):
            holdfast.load_into(target, tmp_path / "x")
        assert target["w"].tolist() == [0, 0, 0]

    def test_files_of_torch(self, tmp_path: Path) -> None:
        tree = {"w": jax.numpy.arange(6.0).reshape(2, 3).T, "half": jax.numpy.ones(2, "bfloat16")}
        holdfast.save(tree, tmp_path / "x.pt")
        back = holdfast.load(tmp_path / "x.pt", framework="jax")
        assert all(isinstance(back[name], jax.Array) for name in tree)
        assert all(np.array_equal(back[name], tree[name]) for name in tree)
        moved = holdfast.load(tmp_path / "x.pt", "cpu", framework="jax")
        assert np.array_equal(moved["w"], tree["w"])
        with pytest.raises(TypeError, match=r"int4.*safetensors"):
            holdfast.save({"w": jax.numpy.ones(2, "int4")}, tmp_path / "y.pt")

    def test_frameworks_do_not_mix_in_files_of_torch(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        mixed = {"a": torch.ones(2), "b": {"c": jax.numpy.ones(2)}}
        with pytest.raises(TypeError, match=r"jax.*safetensors|torch.*safetensors"):
            holdfast.save(mixed, tmp_path / "x.pt")
        holdfast.save(mixed, tmp_path / "x.safetensors")
        back = holdfast.load(tmp_path / "x.safetensors")
        assert isinstance(back["b"]["c"], jax.Array) and isinstance(back["a"], torch.Tensor)


class TestPlaces:
    adapter = JaxAdapter()

    def test_places(self) -> None:
        array = jax.device_put(jax.numpy.ones(3), jax.devices("cpu")[0])
        assert self.adapter.place(array, None) is array
        assert self.adapter.place(array, "cpu") is array
        assert self.adapter.place(array, jax.devices("cpu")[0]) is array
        assert self.adapter.place(array, array.sharding) is array
        with pytest.raises(ValueError, match="has 1 such|has . such"):
            self.adapter.place(array, "cpu:4000")
        with pytest.raises(ValueError, match="'disk'"):
            self.adapter.place(array, "disk")
        with pytest.raises(TypeError, match="not dict"):
            self.adapter.place(array, {"cpu": "cpu"})
        with pytest.raises(RuntimeError):
            self.adapter.place(array, "rocm")  # JAX's own word for a kind that it lacks

    def test_cpus_are_no_destination(self) -> None:
        assert self.adapter.destination(jax.devices("cpu")[0]) == 0
        assert self.adapter.destination("rocm") == 0


class TestStorages:
    """Views of storages, in the host's memory and as if in that of a device."""

    adapter = JaxAdapter()

    def handles(self) -> tuple[Any, Any, np.ndarray, TensorBatch]:
        batch = batch_of([("uint8", (256,))], align=64)
        stored = np.frombuffer(stored_bytes(batch, 0), np.int32)
        (host,) = self.adapter.wrap_storages(batch, ["cpu"], [0], None)
        # The same memory, looked at as that of a device is: by address alone.
        device = type(host)(None, batch[0], None)
        return host, device, stored, batch

    def test_views(self) -> None:
        host, device, stored, _batch = self.handles()
        int32 = BY_NAME["int32"]
        for offset, shape, strides in (
            (0, (64,), None),
            (8, (3, 5), None),
            (4, (4, 3), (4, 16)),
            (0, (3, 2), (0, 8)),
            (0, (), ()),
            (16, (0, 3), (12, 4)),
        ):
            want = np.ndarray(shape, np.int32, stored, offset, strides)
            for handle in (host, device):
                got = self.adapter.view(handle, int32, offset, shape, strides, 0, "")
                assert got.dtype == np.int32 and np.array_equal(got, want), (offset, shape)
        for handle in (host, device):
            with pytest.raises((ValueError, TypeError)):
                self.adapter.view(handle, int32, 0, (65,), None, 0, "")
            with pytest.raises(ValueError, match="repeat"):
                self.adapter.view(handle, int32, 0, (2**40,), (0,), 0, "")
            whole = self.adapter.storage(handle, int32.code)
            assert np.array_equal(whole, stored)
            assert np.array_equal(
                self.adapter.storage(handle, -1, (4, 4)), [*stored.view("u1")[4:8]]
            )

    def test_conjugates(self) -> None:
        host, device, stored, _batch = self.handles()
        want = -np.conj(stored.view(np.float32).view(np.complex64)[:4])
        for handle in (host, device):
            got = self.adapter.view(handle, BY_NAME["complex64"], 0, (4,), None, 4 | 8, "")
            assert np.array_equal(got, want)

    def test_a_storage_of_an_array(self) -> None:
        handle = self.adapter.handle_of(jax.numpy.arange(4, dtype=jax.numpy.int16))
        again = self.adapter.storage(handle, BY_NAME["int16"].code, (1, 2))
        assert again.tolist() == [1, 2]


class TestCapsules:
    """Memory handed out by address, as that of devices is: here the host's."""

    @pytest.mark.parametrize("name", ["float32", "int64", "bfloat16", "bool", "float8_e5m2"])
    def test_jax_takes_them(self, name: str) -> None:
        batch = batch_of([(name, (3, 4))], align=64)
        start = live()
        array = _over(batch[0])
        assert array.dtype.name == name
        assert np.asarray(array).tobytes() == stored_bytes(batch, 0)
        del batch
        if name == "float32":
            assert live() == start
        del array
        assert live() == start - 1
        assert not _capsules._alive

    def test_a_type_that_this_jax_does_not_import(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = batch_of([("float8_e5m2", (2, 3)), ("bool", (4,)), ("float32", (1,))], align=64)
        real = jax.dlpack.from_dlpack

        def bytes_only(exported: Any) -> Any:
            if exported._row.name != "uint8":
                raise TypeError("no such type")
            return real(exported)

        monkeypatch.setattr(jax.dlpack, "from_dlpack", bytes_only)
        for i, name in ((0, "float8_e5m2"), (1, "bool")):
            made = _over(batch[i])
            assert made.dtype.name == name
            assert np.asarray(made).tobytes() == stored_bytes(batch, i)
        with pytest.raises(TypeError, match="no such type"):
            _over(batch[2])

    def test_a_capsule_that_nobody_takes(self) -> None:
        batch = batch_of([("float32", (2,))])
        view: TensorView = batch[0]
        exported = _capsules.Exported(view.address, view.dtype, (2,), view.owner, (1, 0))
        capsule = exported.__dlpack__()
        assert len(_capsules._alive) == 1
        found = _capsules.look(capsule)
        assert (found.data, found.ndim, found.shape[0]) == (view.address, 1, 2)
        del capsule
        assert not _capsules._alive


def run(code: str, path: Path, **environ: str) -> str:
    """Run a program of its own, as JAX asks for its devices but once."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_several_devices(tmp_path: Path) -> None:
    code = """
import sys, jax, holdfast, numpy as np
from holdfast import adapters
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), ("x",))
spread = NamedSharding(mesh, PartitionSpec("x"))
whole = NamedSharding(mesh, PartitionSpec())
array = np.arange(8, dtype=np.float32)
holdfast.save({"w": jax.device_put(array, whole)}, sys.argv[1])
for location in (None, "cpu:3", jax.devices()[2], spread, whole):
    back = holdfast.load(sys.argv[1], location)["w"]
    assert np.array_equal(back, array)
    print(sorted(device.id for device in back.devices()))
assert adapters.by_name("jax").place(back, whole) is back
try:
    holdfast.save({"w": jax.device_put(array, spread)}, sys.argv[1])
except TypeError as error:
    print(error)
"""
    said = run(code, tmp_path / "x", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    *places, error = said.splitlines()
    assert places == ["[0]", "[3]", "[2]", "[0, 1, 2, 3]", "[0, 1, 2, 3]"]
    assert error == "tensor 'w': sharded over 4 devices; save jax.device_get(x)"


def test_without_jax(tmp_path: Path) -> None:
    tree = {"w": jax.numpy.arange(3), "four": jax.numpy.asarray([[-8, 7]], jax.numpy.int4)}
    holdfast.save(tree, tmp_path / "x")
    code = """
import sys
sys.modules["jax"] = None
import holdfast
back = holdfast.load(sys.argv[1])
print(type(back["w"]).__name__, back["four"].dtype, back["four"].tolist())
"""
    assert run(code, tmp_path / "x") == "ndarray int4 [[-8, 7]]\n"


def test_arrays_that_outlive_all_else(tmp_path: Path) -> None:
    code = """
import holdfast, jax
from conformance.test_jax_adapter import _over, batch_of
kept = _over(batch_of([("float32", (64,))], align=64)[0])
holdfast.save({"w": jax.numpy.ones(1000)}, __import__("sys").argv[1])
mapped = holdfast.load(__import__("sys").argv[1])
"""
    tests = str(Path(__file__).parents[1])
    assert run(code, tmp_path / "x", PYTHONPATH=os.pathsep.join([*sys.path, tests])) == ""


def test_looking_for_arrays_starts_no_device(tmp_path: Path) -> None:
    code = """
import sys, jax, numpy as np, holdfast
holdfast.save({"w": np.ones(3)}, sys.argv[1])
assert type(holdfast.load(sys.argv[1])["w"]) is np.ndarray
from jax._src import xla_bridge
print(len(xla_bridge._backends))
"""
    assert run(code, tmp_path / "x") == "0\n"
