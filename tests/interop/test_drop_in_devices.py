"""map_location, meta and fake tensors, byte orders, and loading without data."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import holdfast

torch = pytest.importorskip("torch")
nn = torch.nn
serialization = torch.serialization

Again = Callable[..., Any]
BOTH = pytest.mark.parametrize("weights_only", [True, False])

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def saved(impl: Any, obj: Any, **arguments: Any) -> io.BytesIO:
    file = io.BytesIO()
    impl.save(obj, file, **arguments)
    file.seek(0)
    return file


def from_device(impl: Any, obj: Any, device: str, zipped: bool) -> io.BytesIO:
    """A file that says that its storages were on `device`."""

    def tagger(storage: Any) -> str:
        return device

    queue = serialization._package_registry
    before = list(queue)
    serialization.register_package(1, tagger, lambda storage, location: None)
    try:
        return saved(impl, obj, _use_new_zipfile_serialization=zipped)
    finally:
        queue[:] = before


@pytest.fixture
def registry() -> Iterator[Any]:
    """Torch's table of devices, which is as it was afterwards."""
    queue = serialization._package_registry
    before = list(queue)
    yield serialization.register_package
    queue[:] = before


@BOTH
def test_a_device_that_is_not_there(impl: Any, zipped: bool, weights_only: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    file = from_device(impl, torch.ones(3), "cuda:0", zipped)
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        impl.load(file, weights_only=weights_only)
    file.seek(0)
    with pytest.raises(RuntimeError, match="don't know how to restore data location"):
        impl.load(file, map_location="nowhere", weights_only=weights_only)


@BOTH
@pytest.mark.parametrize(
    "location",
    [
        "cpu",
        torch.device("cpu"),
        {"cuda:0": "cpu"},
        lambda storage, location: storage,
        lambda storage, location: storage if location == "cuda:0" else None,
    ],
    ids=["str", "device", "dict", "callable", "choosing"],
)
def test_from_another_device(pair: Any, zipped: bool, location: Any, weights_only: bool) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    file = from_device(pair, {"a": base, "b": base[1:, ::2]}, "cuda:0", zipped)
    got = pair.load(file, location, weights_only=weights_only)
    assert got["a"].device.type == "cpu"
    assert torch.equal(got["a"], base) and torch.equal(got["b"], base[1:, ::2])
    got["a"].zero_()
    assert not got["b"].any()


def test_a_callable_gets_every_storage_once(pair: Any, zipped: bool) -> None:
    base, other = torch.arange(12.0), torch.ones(2, dtype=torch.int16)
    obj = [base, base[2:5], other, nn.Parameter(base.clone()), base.reshape(3, 4).t()]
    file = saved(pair, obj, _use_new_zipfile_serialization=zipped)
    calls = []

    def place(storage: Any, location: str) -> Any:
        calls.append((type(storage), storage.nbytes(), storage.device.type, location))
        return None if len(calls) == 1 else storage

    got = pair.load(file, map_location=place)
    untyped = torch.UntypedStorage
    assert sorted(calls, key=str) == sorted(
        [(untyped, 48, "cpu", "cpu"), (untyped, 4, "cpu", "cpu"), (untyped, 48, "cpu", "cpu")],
        key=str,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, obj, strict=True))
    assert got[0].untyped_storage()._cdata == got[1].untyped_storage()._cdata


def test_what_a_callable_returns_is_used(pair: Any) -> None:
    file = saved(pair, [torch.ones(3), torch.ones(3)[1:]])
    mine: list[Any] = []

    def place(storage: Any, location: str) -> Any:
        mine.append(storage.clone())
        return mine[-1]

    got = pair.load(file, map_location=place)
    assert [t.untyped_storage().data_ptr() for t in got] == [s.data_ptr() for s in mine]


@pytest.mark.parametrize("kind", [ArithmeticError, ValueError, TypeError, RuntimeError])
def test_errors_of_a_callable_come_through(impl: Any, zipped: bool, kind: type[Exception]) -> None:
    mine = kind("mine")

    def place(storage: Any, location: str) -> Any:
        raise mine

    file = saved(impl, torch.ones(3), _use_new_zipfile_serialization=zipped)
    with pytest.raises(kind, match="mine") as caught:
        impl.load(file, map_location=place)
    assert caught.value is mine


@pytest.mark.parametrize("wrong", [5, "cpu", torch.ones(3)])
def test_a_callable_gives_a_storage(wrong: Any, zipped: bool, impl: Any) -> None:
    file = saved(impl, torch.ones(3), _use_new_zipfile_serialization=zipped)
    with pytest.raises((TypeError, AttributeError)) as caught:
        impl.load(file, map_location=lambda storage, tag: wrong)
    if impl.name == "holdfast":
        text = f"map_location returned a {type(wrong).__name__} for a storage on 'cpu'"
        assert text in str(caught.value)


def test_a_device_that_is_not_there_names_the_file(zipped: bool, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    path = tmp_path / "cuda.pt"
    impl = SimpleNamespace(save=torch.save, name="torch")
    path.write_bytes(from_device(impl, torch.ones(3), "cuda:0", zipped).getvalue())
    with pytest.raises(RuntimeError, match=r"cuda\.pt: Attempting to deserialize object on a CUDA"):
        holdfast.load(path)


def test_packages_are_asked_for_their_devices(impl: Any, registry: Any, zipped: bool) -> None:
    """A registered device takes storages by its tag; with a low priority, those of the CPU too."""
    restored = []

    def tagger(storage: Any) -> str | None:
        return "mine:3" if storage.nbytes() == 12 else None

    def restore(storage: Any, location: str) -> Any:
        if location == "mine:3":
            restored.append(location)
            return storage
        return None

    registry(5, tagger, restore)
    file = saved(impl, [torch.ones(3), torch.ones(5)], _use_new_zipfile_serialization=zipped)
    got = impl.load(file)
    assert got[0].tolist() == [1, 1, 1] and len(got[1]) == 5
    assert restored == ["mine:3"]

    def double(storage: Any, location: str) -> Any:
        restored.append(location)
        return torch.full((5,), 2.0).untyped_storage()

    registry(1, lambda storage: None, double)
    file = saved(impl, torch.ones(5), _use_new_zipfile_serialization=zipped)
    got = impl.load(file)
    assert restored == ["mine:3", "cpu"]
    if zipped:  # of the older format, torch reads the data into what was returned
        assert got.tolist() == [2] * 5


@BOTH
@pytest.mark.parametrize("location", ["meta", torch.device("meta")], ids=["str", "device"])
def test_to_the_meta_device(pair: Any, location: Any, weights_only: bool) -> None:
    obj = {"a": torch.ones(3, 4).t(), "p": nn.Parameter(torch.ones(2)), "n": 3}
    file = saved(pair, obj)
    got = pair.load(file, map_location=location, weights_only=weights_only)
    assert got["n"] == 3
    assert got["a"].device.type == got["p"].device.type == "meta"
    assert got["a"].shape == (4, 3) and got["a"].stride() == (1, 4)
    assert type(got["p"]) is nn.Parameter
    reader = torch._C.PyTorchFileReader(io.BytesIO(file.getvalue()))
    assert got["a"].untyped_storage()._checkpoint_offset == reader.get_record_offset("data/0")


def test_under_a_fake_mode(pair: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    state = nn.Linear(10, 10).state_dict()
    file = saved(pair, state)
    with FakeTensorMode():
        got = pair.load(file)
    for name, offset in (("weight", 832), ("bias", 1344)):
        assert type(got[name]) is FakeTensor
        assert got[name].shape == state[name].shape
        assert got[name].untyped_storage()._checkpoint_offset == offset
        if hasattr(torch._utils, "_restore_device_fake_mode"):  # from 2.5 on
            assert got[name].device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc"])
def test_sparse_tensors_without_data(pair: Any, layout: str, zipped: bool) -> None:
    made = torch.eye(3).to_sparse(layout=getattr(torch, layout))
    file = saved(pair, {"s": made, "w": torch.ones(2)}, _use_new_zipfile_serialization=zipped)
    got = pair.load(file, map_location="meta")
    assert got["s"].device.type == "meta" and got["s"].layout is made.layout
    assert got["s"].shape == made.shape and got["s"].values().shape == (3,)


def test_loading_without_data(pair: Any, zipped: bool) -> None:
    base = torch.randn(100, 3)
    file = saved(pair, {"a": base, "b": base[3]}, _use_new_zipfile_serialization=zipped)
    with serialization.skip_data():
        got = pair.load(file)
    assert got["a"].shape == (100, 3) and got["a"].dtype == torch.float32
    got["a"].fill_(7)
    assert (got["b"] == 7).all()


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:Sparse invariant")
def test_saving_without_data(pair: Any) -> None:
    t = torch.randn(2, 3)
    obj = {
        "t": t,
        "half": torch.randn(2, 3, dtype=torch.complex32),
        "sparse": torch.sparse_coo_tensor([[0, 1], [2, 0]], [1.0, 2.0], (2, 3)),
        "view": t.view(-1),
        "row": t[1],
        "wide": torch.ones(5000, 3),
    }
    file = io.BytesIO()
    with serialization.skip_data():
        pair.save(obj, file)
    file.seek(0)
    got = pair.load(file, weights_only=True)
    for name, tensor in obj.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype, name
    for name in ("t", "view", "row", "wide"):
        assert not got[name].any(), name
    for name in ("view", "row"):
        assert got[name].untyped_storage() is got["t"].untyped_storage()
    offset = torch._C.PyTorchFileReader(io.BytesIO(file.getvalue())).get_record_offset("data/0")
    data = bytearray(file.getvalue())
    data[offset : offset + 24] = t.numpy().tobytes()  # the room is there to be filled
    assert torch.equal(pair.load(io.BytesIO(data))["t"], t)


def test_more_than_four_gigabytes(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets and sizes beyond 32 bits, in a file that is a hole where the data would be."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch checks its offsets then
    big = torch.empty((1 << 30) + 12)  # never touched: no memory
    obj = {"big": big, "one": torch.ones(1, dtype=torch.uint8), "two": torch.ones(2)}
    path = tmp_path / "x.pt"
    with serialization.skip_data():
        pair.save(obj, path)
    assert path.stat().st_size > 1 << 32
    assert path.stat().st_blocks < 1 << 12
    config = torch.utils.serialization.config
    config.load.calculate_storage_offsets = True
    try:
        got = pair.load(path, mmap=True)
    finally:
        config.load.calculate_storage_offsets = False
    assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in obj.items()}
    assert got["big"][-1] == 0 and got["two"].tolist() == [0, 0]
    offset = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/2")
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<2f", 5, 6))
    assert pair.load(path, mmap=True)["two"].tolist() == [5, 6]


def test_fake_tensors_are_saved_without_data(pair: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        t = torch.randn(2, 3)
        obj = {"t": t, "view": t.view(-1), "row": t[1]}
    file = io.BytesIO()
    with serialization.skip_data(materialize_fake_tensors=True):
        pair.save(obj, file)
    file.seek(0)
    got = pair.load(file, weights_only=True)
    assert got["t"].shape == (2, 3) and not got["t"].any()
    assert got["view"].untyped_storage() is got["t"].untyped_storage()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_saved_without_data(impl: Any) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])
    with serialization.skip_data():
        with pytest.raises(RuntimeError, match="nested tensor under skip_data"):
            impl.save(nested, io.BytesIO())
        with pytest.warns(UserWarning, match="meta device under skip_data"):
            impl.save(torch.randn(2, device="meta"), io.BytesIO())
        with pytest.raises(RuntimeError, match="skip_data"):
            impl.save(torch.ones(2), io.BytesIO(), _use_new_zipfile_serialization=False)
    assert not serialization._serialization_tls.skip_data


# Byte orders.


def archive(impl: Any, values: np.ndarray, order: str | None) -> io.BytesIO:
    """A file with these values as they stand in memory, and this record, or none."""
    file = io.BytesIO()
    raw = values.tobytes()
    kinds = {"f4": "FloatStorage", "f8": "DoubleStorage", "i4": "IntStorage", "i2": "ShortStorage"}
    kinds |= {"c8": "ComplexFloatStorage", "c16": "ComplexDoubleStorage", "u1": "ByteStorage"}
    kind = kinds[values.dtype.str[1:]]
    writer = torch._C.PyTorchFileWriter(file)
    pickled = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if obj == "the storage":
                return ("storage", getattr(torch, kind), "0", "cpu", values.size)
            return None

    class Made:
        def __reduce__(self) -> Any:
            shape, order = values.shape, ()
            strides = torch.empty(shape).stride()
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, ("the storage", 0, shape, strides, False, dict(order))

    Pickler(pickled, 2).dump(Made())
    data = pickled.getvalue()
    writer.write_record("data.pkl", data, len(data))
    if order is not None:
        writer.write_record("byteorder", order, len(order))
    writer.write_record("data/0", raw, len(raw))
    writer.write_end_of_file()
    content = file.getvalue()
    if order is None:
        # The writer adds the record when it closes. Under another name of the same length it is
        # one that nobody looks for.
        assert content.count(b"/byteorder") == 2
        content = content.replace(b"/byteorder", b"/byteorde_")
    return io.BytesIO(content)


@BOTH
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i2", "c8", "c16", "u1"])
def test_byte_orders(impl: Any, dtype: str, weights_only: bool) -> None:
    values = (np.arange(6) * 1.5).astype(dtype).reshape(2, 3)
    wide = values.dtype.newbyteorder(">")
    little, big = values.astype(values.dtype.newbyteorder("<")), values.astype(wide)

    def load(array: np.ndarray, order: str | None) -> Any:
        return impl.load(archive(impl, array, order), weights_only=weights_only).numpy()

    assert np.array_equal(load(little, "little"), values)
    assert np.array_equal(load(big, "big"), values)
    assert np.array_equal(load(little, None), values)
    order = serialization.LoadEndianness
    before = serialization.get_default_load_endianness()
    same = dtype == "u1"
    try:
        for setting, right in ((order.LITTLE, little), (order.BIG, big), (order.NATIVE, little)):
            serialization.set_default_load_endianness(setting)
            wrong = big if right is little else little
            assert np.array_equal(load(right, None), values)
            assert np.array_equal(load(wrong, None), values) == same
            assert np.array_equal(load(big, "big"), values)  # the record says it, not the setting
            assert np.array_equal(load(little, "little"), values)
    finally:
        serialization.set_default_load_endianness(before)
    with pytest.raises(ValueError, match="middle"):
        load(little, "middle")
