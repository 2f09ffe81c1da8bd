"""CuPy's adapter: the suite for adapters, over a stand-in for CuPy in the memory of the host.

``tests/gpu/test_cupy_adapter.py`` runs the same suite with CuPy itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_cupy_arrays
import holdfast
from conformance.test_adapters import AdapterSuite, batch_of
from holdfast import _engine, adapters, staging
from holdfast.dtypes import BY_NAME, DType
from holdfast.staging.host import HostDevice
from holdfast.views import TensorBatch, device_code


def loaded(module: Any) -> Iterator[Any]:
    """The adapter of a module ``cupy``, as if it were the installed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.delitem(sys.modules, "holdfast.adapters.cupy", raising=False)
        adapters._adapter.cache_clear()
        yield importlib.import_module("holdfast.adapters.cupy").ADAPTER
        patch.delitem(sys.modules, "holdfast.adapters.cupy")
    adapters._adapter.cache_clear()


@pytest.fixture
def cupy() -> Iterator[Any]:
    """The stand-in, in place of any CuPy."""
    module = fake_cupy_arrays.make()
    codes = [device_code(2, number) for number in range(2)]
    for code in codes:
        staging.register(code, Device(module, code & 0xFFFF))
    try:
        for _ in loaded(module):
            yield module
    finally:
        for code in codes:
            staging.unregister(code)


class Device(HostDevice):
    """A device of the stand-in: it allocates as CuPy would."""

    def __init__(self, module: Any, number: int) -> None:
        super().__init__(f"cuda:{number}")
        self.module, self.number = module, number

    def allocate(self, nbytes: int, framework: str | None) -> tuple[int, object]:
        assert framework == "cupy"
        with self.module.cuda.Device(self.number):
            memory = self.module.ndarray((nbytes,), np.uint8)
        return memory.data.ptr, memory


class CupySuite(AdapterSuite):
    column = "numpy"
    fewest_kinds = 0
    cupy: Any

    def has(self, row: DType) -> bool:
        if row.numpy is None:
            return False
        if not row.ml_dtypes:
            return True
        return row.name == "bfloat16" and int(self.cupy.__version__.split(".")[0]) >= 14

    def batch(self, rows: Sequence[tuple[str, tuple[int, ...]]], apart: bool = False) -> Any:
        """The batch of the host, in memory of the device."""
        host = batch_of(rows, apart)
        lent = []
        for i, buffer in enumerate(host.owners):
            held = self.cupy.array(np.frombuffer(memoryview(buffer), np.uint8))
            made = _engine.lend(held.data.ptr, len(buffer), held, device_code(2, 0))
            lent.append(made)
            mine = slice(None) if host.owner is None else host.owner == i
            host.views["address"][mine] += np.uint64((made.address - buffer.address) % 2**64)
        return TensorBatch(host.views, host.dims, lent, owner=host.owner)

    def stored(self, batch: TensorBatch, i: int) -> bytes:
        view = batch[i]
        return self.peek(view.address, view.nbytes)

    def peek(self, address: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        memory = self.cupy.cuda.UnownedMemory(address, nbytes, None, 0)
        pointer = self.cupy.cuda.MemoryPointer(memory, 0)
        array = self.cupy.ndarray((nbytes,), dtype=np.uint8, memptr=pointer)
        return bytes(self.cupy.asnumpy(array).tobytes())

    def make(self, array: np.ndarray) -> Any:
        return self.cupy.array(array)

    def layouts(self) -> dict[str, Any]:
        base = self.cupy.array(np.arange(60, dtype=np.int32).reshape(5, 12))
        expanded = self.cupy.ndarray(
            (5, 4), dtype=np.int32, memptr=base.data, strides=(base.strides[0], 0)
        )
        return {
            "transposed": base.T,
            "step": base[::2, 1::3],
            "negative": base[::-1, ::-2],
            "expanded": expanded,
        }

    def data(self, tensor: Any) -> bytes:
        return bytes(self.cupy.asnumpy(tensor).tobytes())

    def zero(self, tensor: Any) -> None:
        tensor[...] = 0

    def address(self, tensor: Any) -> int:
        return int(tensor.data.ptr)

    def unholdable(self) -> dict[str, Any]:
        unit = type("Unit", (self.cupy.ndarray,), {})
        return {"subok=False": unit((3,), dtype=np.int32)}

    def kinds(self) -> list[Any]:
        return []  # there are none: CuPy's arrays are their elements

    def same(self, a: Any, b: Any) -> bool:
        raise AssertionError("there are no kinds")

    def test_what_cannot_be_held_is_named(self) -> None:
        good = self.make(np.zeros(3, np.int32))
        for part, array in self.unholdable().items():
            assert self.adapter.is_tensor(array)
            with pytest.raises(TypeError, match=rf"layers\.3\.bad.*{part}"):
                self.adapter.describe([good, array], ["good", "layers.3.bad"])

    # -- what is CuPy's alone

    def test_batches_say_their_device(self) -> None:
        batch, _ = self.adapter.describe([self.make(np.zeros(3)), self.make(np.zeros(0))], ["", ""])
        assert batch.devices is not None and batch.devices.dtype == np.int32
        assert batch.devices.tolist() == [device_code(2, 0)] * 2

    def test_memory_of_the_host_is_copied(self) -> None:
        start = _engine.live_buffers()
        rows = [("int32", (2, 3)), ("bool", ()), ("float64", (0, 2)), ("complex64", (3,))]
        for apart in (False, True):
            batch = batch_of(rows, apart)
            want = [bytes(memoryview(batch.owners[0]))] if not apart else []
            made = self.adapter.wrap(batch, {0: "parameter"})
            del batch
            assert _engine.live_buffers() == start
            assert [(a.dtype.name, a.shape) for a in made] == rows
            assert not want or self.data(made[0]) == want[0][:24]

    def test_places(self) -> None:
        array = self.make(np.arange(3))
        for location in (None, "cuda", "cuda:0", "gpu:0", 0, self.cupy.cuda.Device(0)):
            assert self.adapter.place(array, location) is array, location
            assert self.adapter.destination(location) == device_code(2, 0), location
        for location in ("cuda:99", 99):
            with pytest.raises(RuntimeError, match=r"map_location=.*99.*CuPy has \d+ CUDA devices"):
                self.adapter.destination(location)
        for location in ("cpu", "cuda:x"):
            with pytest.raises(ValueError, match="framework='numpy'"):
                self.adapter.place(array, location)
        for location in ({}, -1, 1.5, True):
            with pytest.raises(TypeError, match="map_location"):
                self.adapter.place(array, location)

    def test_views_of_storages(self) -> None:
        batch = self.batch([("uint8", (256,))])
        stored = np.frombuffer(self.stored(batch, 0), np.int32)
        (handle,) = self.adapter.wrap_storages(batch, ["cpu"], [0], "cuda:0")
        int32 = BY_NAME["int32"]
        for offset, shape, strides in (
            (0, (64,), None),
            (4, (4, 3), (4, 16)),
            (0, (2**20, 2), (0, 8)),
            (2, (3, 2), None),
            (16, (0, 3), (12, 4)),
        ):
            got = self.adapter.view(handle, int32, offset, shape, strides, 0, "")
            want = np.ndarray(shape, np.int32, stored.tobytes(), offset, strides)
            assert np.array_equal(self.cupy.asnumpy(got), want), (offset, shape)
        for offset, shape, strides in ((4, (64,), None), (0, (2, 2), (256, 4)), (0, (2,), (-4,))):
            with pytest.raises(ValueError, match="outside"):
                self.adapter.view(handle, int32, offset, shape, strides, 0, "")
        one = self.adapter.storage(handle, int32.code)
        two = self.adapter.view(handle, int32, 8, (2,), None, 0, "")
        one[2:4] = 77
        assert self.cupy.asnumpy(two).tolist() == [77, 77]
        again = self.adapter.handle_of(two)
        assert self.cupy.asnumpy(self.adapter.storage(again, -1, (0, 5))).tolist() == [
            77,
            0,
            0,
            0,
            77,
        ]
        conjugated = self.adapter.view(handle, BY_NAME["complex64"], 8, (3, 2), (0, 8), 4 | 8, "")
        plain = np.frombuffer(self.stored(batch, 0), np.complex64)[1:3]
        assert np.array_equal(self.cupy.asnumpy(conjugated), np.array([-plain.conj()] * 3))


class TestStandIn(CupySuite):
    @pytest.fixture(autouse=True)
    def _adapter(self, cupy: Any) -> None:
        self.cupy = cupy
        self.adapter = sys.modules["holdfast.adapters.cupy"].ADAPTER

    def test_a_dtype_that_is_lacking_is_named(self) -> None:
        self.cupy.bfloat16, self.cupy.__version__ = False, "13.3.0"
        with pytest.raises(TypeError, match=r"bfloat16: CuPy 13.3.0 has no such.*'torch'"):
            self.adapter.wrap(batch_of([("bfloat16", (3,))]), {})
        super().test_a_dtype_that_is_lacking_is_named()

    def test_other_devices(self) -> None:
        array = self.make(np.arange(3))
        moved = self.adapter.place(array, 1)
        assert moved.device.id == 1 and moved._host.tolist() == [0, 1, 2]
        assert self.adapter.describe([moved], ["x"])[0][0].device == device_code(2, 1)
        assert self.adapter.destination("cuda:1") == device_code(2, 1)
        with self.cupy.cuda.Device(1):
            assert self.adapter.destination(None) == self.adapter.destination("cuda")
            assert self.adapter.destination(None) == device_code(2, 1)
            assert self.adapter.wrap(batch_of([("int8", (3,))]), {})[0].device.id == 1
        self.adapter.fill(moved, array[::-1])
        assert moved._host.tolist() == [2, 1, 0]
        with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
            self.adapter.place(array, "cuda:7")

    def test_no_device_and_rocm(self) -> None:
        with self.cupy.no_devices():
            for location in (None, "cuda:0"):
                with pytest.raises(RuntimeError, match=r"cannot load to.*cudaErrorNoDevice.*numpy"):
                    self.adapter.destination(location)
        self.cupy.cuda.runtime.is_hip = True
        assert self.adapter.destination(None) == 0
        batch, kinds = self.adapter.describe([self.make(np.arange(3.0))], ["x"])
        assert batch[0].device == 0
        assert not kinds
        assert batch.owners[0].tolist() == [0, 1, 2]  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="2:0"):
            self.adapter.wrap(self.batch([("int8", (3,))]), {})

    def test_files(self, tmp_path: Path) -> None:
        """Of arrays of the host, with the arrays of the stand-in asked for."""
        tree = {"w": np.arange(6.0).reshape(2, 3), "mask": [np.array([True, False])]}
        for name in ("x.safetensors", "x.pt", "x.npz"):
            saved = tree if name != "x.npz" else {"w": tree["w"]}
            holdfast.save(saved, tmp_path / name)
            for location in (None, "cuda:1"):
                back = holdfast.load(tmp_path / name, location, framework="cupy")
                assert type(back["w"]) is self.cupy.ndarray
                assert np.array_equal(back["w"].get(), tree["w"])
                assert back["w"].device.id == (1 if location else 0)

    def test_files_without_a_device(self, tmp_path: Path) -> None:
        """Refused before anything is read; what has no tensors needs no device."""
        holdfast.save({"w": np.ones(4)}, tmp_path / "x")
        holdfast.save({"step": 7}, tmp_path / "none")
        data = bytearray((tmp_path / "x").read_bytes())
        data[-1] ^= 1  # would be seen if it was read
        (tmp_path / "x").write_bytes(data)
        holdfast.save({"w": np.ones(4)}, tmp_path / "x.npz")
        holdfast.save({"w": np.ones(4)}, tmp_path / "x.pt")
        with self.cupy.no_devices():
            for name in ("x.npz", "x.pt"):
                with pytest.raises(RuntimeError, match=r"cudaErrorNoDevice.*framework='numpy'"):
                    holdfast.load(tmp_path / name, framework="cupy")
            for location in (None, "cuda:1"):
                with pytest.raises(RuntimeError, match="cudaErrorNoDevice"):
                    holdfast.load(tmp_path / "x", location, mmap=False, framework="cupy")
            assert holdfast.load(tmp_path / "none", framework="cupy") == {"step": 7}
            with holdfast.open(tmp_path / "x", framework="cupy") as f:
                assert f.keys() == {"w"}
                assert f.info("w").shape == (4,)
                with pytest.raises(RuntimeError, match="cudaErrorNoDevice"):
                    f["w"]

    def test_frameworks_do_not_mix_in_files_of_torch(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        for mixed in (
            {"a": torch.ones(2), "b": {"c": self.make(np.ones(2))}},
            [self.make(np.ones(2)), torch.nn.Parameter(torch.ones(2))],
        ):
            with pytest.raises(TypeError, match=r"torch.*cupy.*safetensors"):
                holdfast.save(mixed, tmp_path / "x.pt")
        assert not (tmp_path / "x.pt").exists()

    def test_pickled_around(self) -> None:
        from holdfast.pickling import pickle_object

        array = self.make(np.arange(6.0).reshape(2, 3).T.copy())
        found = pickle_object({"w": array, "again": array, "host": np.ones(2)})
        assert (found.framework, found.keys) == ("cupy", ["0"])
        assert found.batch[0].address == self.address(array)
        assert b"cupy" not in found.data


def test_what_saved_a_file_is_missing(tmp_path: Path) -> None:
    """A file that says cupy, where there is none."""
    if adapters.available("cupy"):
        pytest.skip("CuPy is installed")
    holdfast.save({"w": np.ones(3)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    assert data.count(b'"format":"np"') == 1
    at = data.index(b'"format":"np"')
    size = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + size].replace(b'"format":"np"', b'"format":"cupy"')
    spare = len(head) - size
    assert head.endswith(b" " * spare) and at
    (tmp_path / "x").write_bytes(data[:8] + head[:-spare] + data[8 + size :])
    back = holdfast.load(tmp_path / "x", verify=False)["w"]
    assert back.tolist() == [1, 1, 1]
    with pytest.raises(ImportError, match="pip install cupy"):
        holdfast.load(tmp_path / "x", framework="cupy")
