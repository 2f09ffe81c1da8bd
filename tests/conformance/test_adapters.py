"""What every adapter promises, checked by one suite that each of them subclasses."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conformance.leaks import Leaks
from holdfast import _engine
from holdfast.adapters.base import Adapter
from holdfast.adapters.numpy import NumpyAdapter
from holdfast.dtypes import BY_NAME, DTYPES, DType
from holdfast.views import DENSE, VIEW, TensorBatch

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (0,), (3, 0, 2), (2, 3), (1, 5, 1), (2, 1, 3, 2, 4),
]  # fmt: skip


def batch_of(
    rows: Sequence[tuple[str, tuple[int, ...]]], apart: bool = False, align: int = 16
) -> TensorBatch:
    """Random bytes as a batch: of one buffer, or of one for each row, in reverse order."""
    views, dims = np.zeros(len(rows), VIEW), []
    offset = 0
    for i, (name, shape) in enumerate(rows):
        nbytes = BY_NAME[name].nbytes(shape)
        views[i] = (offset, nbytes, len(dims), BY_NAME[name].code, len(shape), DENSE)
        dims.extend(shape)
        offset += -(-nbytes // align) * align
    owner = None
    if apart:
        buffers = [_engine.allocate(int(n)) for n in views["nbytes"]][::-1]
        owner = np.arange(len(rows), dtype=np.int64)[::-1].copy()
        views["address"] = [buffer.address for buffer in buffers[::-1]]
    else:
        buffers = [_engine.allocate(offset)]
        views["address"] += np.uint64(buffers[0].address)
    rng = np.random.default_rng(7)
    for buffer in buffers:
        # Bytes of 0 and 1 are values of every type, bool among them.
        memoryview(buffer)[:] = rng.integers(0, 2, len(buffer), np.uint8).tobytes()
    return TensorBatch(views, np.array(dims, np.int64), buffers, owner=owner)


def stored_bytes(batch: TensorBatch, i: int) -> bytes:
    """What the buffer of a row holds there."""
    view = batch[i]
    buffer: Any = view.owner
    start = view.address - buffer.address if view.nbytes else 0
    return bytes(memoryview(buffer)[start : start + view.nbytes])


class AdapterSuite(Leaks):
    """Subclassed with `adapter` and a few words of its framework."""

    adapter: Adapter
    column: str  # of the dtype table
    fewest: int = 14  # element types that it has at least
    fewest_kinds: int = 3  # that `kinds` gives at least

    # -- in the framework's own terms

    def make(self, array: np.ndarray) -> Any:
        """A tensor with the values of an array of a plain dtype, laid out densely."""
        raise NotImplementedError

    def has(self, row: DType) -> bool:
        """Whether the framework, as installed, has an element type."""
        raise NotImplementedError

    def layouts(self) -> dict[str, Any]:
        """Tensors of int32 that are not dense, of at least two dimensions."""
        raise NotImplementedError

    def data(self, tensor: Any) -> bytes:
        """The bytes of its elements in C order."""
        raise NotImplementedError

    def zero(self, tensor: Any) -> None:
        """Write zeros to all of its elements."""
        raise NotImplementedError

    def address(self, tensor: Any) -> int:
        raise NotImplementedError

    def unholdable(self) -> dict[str, Any]:
        """Objects that is_tensor knows and describe refuses, by a part of the message."""
        raise NotImplementedError

    def kinds(self) -> list[Any]:
        """Tensors with a kind, one of every sort."""
        raise NotImplementedError

    def same(self, a: Any, b: Any) -> bool:
        """Whether two tensors are equal in every respect."""
        raise NotImplementedError

    # -- where its memory is

    def batch(self, rows: Sequence[tuple[str, tuple[int, ...]]], apart: bool = False) -> Any:
        """What `batch_of` gives, in memory that tensors can be made over."""
        return batch_of(rows, apart)

    def stored(self, batch: TensorBatch, i: int) -> bytes:
        """What the buffer of a row holds there."""
        return stored_bytes(batch, i)

    def peek(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def live(self) -> int:
        """How many buffers there are, after the framework has let go of what nobody has."""
        return _engine.live_buffers()

    # -- describe

    def described(self, tensor: Any) -> tuple[Any, dict[int, str]]:
        batch, kinds = self.adapter.describe([tensor], ["t"])
        assert len(batch) == 1
        return batch[0], kinds

    def have(self) -> list[DType]:
        """Rows of the table that this framework, as installed, can have."""
        return [row for row in DTYPES if self.has(row)]

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_dense_tensors_are_described_where_they_lie(self, shape: tuple[int, ...]) -> None:
        tensor = self.make(np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape))
        assert self.adapter.is_tensor(tensor)
        assert type(tensor) in self.adapter.plain_types
        view, kinds = self.described(tensor)
        assert (view.shape, view.strides, view.dtype.name) == (shape, None, "int32")
        assert view.nbytes == 4 * int(np.prod(shape, dtype=int))
        assert view.nbytes == 0 or view.address == self.address(tensor)
        assert view.owner is tensor
        assert not kinds

    def test_every_layout_is_described_by_strides(self) -> None:
        layouts = self.layouts()
        assert len(layouts) >= 4
        for name, tensor in layouts.items():
            view, kinds = self.described(tensor)
            assert view.strides is not None, name
            assert view.owner is tensor, name
            got = bytearray()
            for index in itertools.product(*map(range, view.shape)):
                at = view.address + sum(i * s for i, s in zip(index, view.strides, strict=True))
                got += self.peek(at, 4)
            assert bytes(got) == self.data(tensor), name
            assert not kinds

    def test_strides_stand_beside_the_dims_of_their_row(self) -> None:
        layouts = [*self.layouts().values(), self.make(np.zeros((2, 3), np.int32))]
        batch, _ = self.adapter.describe(layouts, [str(i) for i in range(len(layouts))])
        for i, tensor in enumerate(layouts):
            alone, _ = self.described(tensor)
            assert batch[i] == alone

    def test_empty_tensors_are_dense_whatever_their_strides(self) -> None:
        tensor = self.make(np.zeros((4, 0), np.int32)).T
        view, _ = self.described(tensor)
        assert (view.shape, view.strides, view.nbytes) == ((0, 4), None, 0)

    def test_an_empty_list(self) -> None:
        batch, kinds = self.adapter.describe([], [])
        assert (len(batch), len(batch.dims), batch.strides, kinds) == (0, 0, None, {})
        assert self.adapter.wrap(self.batch([]), {}) == []

    def test_more_dimensions_than_a_guess_holds(self) -> None:
        tensors = [self.make(np.zeros((1,) * 20, np.int32)) for _ in range(300)]
        batch, _ = self.adapter.describe(tensors, ["t"] * 300)
        assert len(batch.dims) == 6000
        assert all(batch[i].shape == (1,) * 20 for i in (0, 150, 299))

    def test_what_cannot_be_held_is_named(self) -> None:
        bad = self.unholdable()
        assert len(bad) >= 2
        good = self.make(np.zeros(3, np.int32))
        for part, tensor in bad.items():
            assert self.adapter.is_tensor(tensor), part
            with pytest.raises(TypeError, match=r"layers\.3\.bad") as caught:
                self.adapter.describe([good, tensor], ["good", "layers.3.bad"])
            assert part in str(caught.value), (part, str(caught.value))

    def test_is_tensor_says_no(self) -> None:
        assert not any(map(self.adapter.is_tensor, (None, 1, "x", b"x", [1], object())))

    # -- wrap

    def test_every_dtype_and_shape_comes_back(self) -> None:
        have = self.have()
        assert len(have) >= self.fewest
        rows = [(row.name, shape) for row in have for shape in SHAPES]
        for apart in (False, True):
            batch = self.batch(rows, apart)
            tensors = self.adapter.wrap(batch, {})
            again, kinds = self.adapter.describe(tensors, [str(row) for row in rows])
            assert not kinds
            for i, (name, shape) in enumerate(rows):
                view = again[i]
                assert (view.dtype.name, view.shape, view.strides) == (name, shape, None)
                assert view.nbytes == 0 or view.address == batch[i].address
                assert self.data(tensors[i]) == self.stored(batch, i)
            del tensors, again, view

    def test_tensors_are_writable_and_share_the_memory(self) -> None:
        batch = self.batch([("int32", (5, 3)), ("int32", (4,))])
        first, second = self.adapter.wrap(batch, {})
        before = self.stored(batch, 1)
        self.zero(first)
        assert self.stored(batch, 0) == bytes(60)
        assert self.stored(batch, 1) == before == self.data(second)
        assert self.adapter.writable(first)

    def test_a_dtype_that_is_lacking_is_named(self) -> None:
        lacking = [row for row in DTYPES if getattr(row, self.column) is None and row.itemsize]
        lacking.append(BY_NAME["float6_e2m3fn"])
        for row in lacking:
            with pytest.raises(TypeError, match=row.name):
                self.adapter.wrap(self.batch([("uint8", (2,)), (row.name, (4,))]), {})

    def test_rows_outside_of_their_buffer_are_refused(self) -> None:
        for shift in (15, 17):
            batch = self.batch([("int8", (64,))])
            batch.views["address"] += np.uint64(shift)
            batch.views["address"] -= np.uint64(16)
            with pytest.raises(ValueError, match="outside"):
                self.adapter.wrap(batch, {})

    def test_unknown_kinds_make_plain_tensors(self) -> None:
        batch = self.batch([("int32", (2,))])
        (tensor,) = self.adapter.wrap(batch, {0: "what:ever"})
        assert type(tensor) in self.adapter.plain_types
        assert not self.described(tensor)[1]

    def test_kinds_come_back(self) -> None:
        tensors = self.kinds()
        assert len(tensors) >= self.fewest_kinds
        described, kinds = self.adapter.describe(tensors, [str(i) for i in range(len(tensors))])
        assert sorted(kinds) == list(range(len(tensors)))
        batch = self.batch([(described[i].dtype.name, described[i].shape) for i in kinds])
        for i, tensor in enumerate(tensors):
            view, buffer = batch[i], batch.owners[0]
            start = view.address - buffer.address  # type: ignore[attr-defined]
            memoryview(buffer)[start : start + view.nbytes] = self.data(tensor)  # type: ignore[arg-type]
        back = self.adapter.wrap(batch, kinds)
        assert all(map(self.same, back, tensors))
        assert self.adapter.describe(back, [str(i) for i in kinds])[1] == kinds

    # -- lifetime

    @pytest.mark.parametrize("apart", [False, True])
    def test_a_tensor_alone_keeps_its_memory(self, apart: bool) -> None:
        start = self.live()
        batch = self.batch([("int32", (100,)), ("int32", ()), ("int32", (200,))], apart)
        want = [self.stored(batch, i) for i in range(3)]
        tensors = self.adapter.wrap(batch, {})
        del batch
        gc.collect()
        for order in (1, 0, 0):
            assert self.live() == start + (len(tensors) if apart else 1)
            assert [self.data(t) for t in tensors] == want
            del tensors[order], want[order]
        assert self.live() == start

    def test_memory_of_empty_tensors_is_not_needed(self) -> None:
        start = self.live()
        tensors = self.adapter.wrap(self.batch([("int32", (0,)), ("int32", (3, 0))], True), {})
        assert [self.data(t) for t in tensors] == [b"", b""]
        del tensors
        assert self.live() == start

    def test_tensors_dropped_by_other_threads(self) -> None:
        start = self.live()
        tensors = self.adapter.wrap(self.batch([("int32", (9,))] * 1000), {})
        shares = [tensors[k::4] for k in range(4)]
        del tensors
        threads = [threading.Thread(target=share.clear) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shares == [[]] * 4
        assert self.live() == start

    def test_a_failing_wrap_leaves_nothing(self) -> None:
        start = self.live()
        batch = self.batch([("int8", (8,))] * 100)
        batch.views["address"][70] = 16
        with pytest.raises(ValueError, match="outside"):
            self.adapter.wrap(batch, {})
        del batch
        assert self.live() == start

    # -- where tensors go

    def test_what_names_no_device_has_no_destination(self) -> None:
        for location in ("cpu", "meta", "nothing", {"cpu": "cuda:0"}, lambda t, where: t, 1.5):
            assert self.adapter.destination(location) == 0, location

    # -- fill

    def test_fill_converts(self) -> None:
        target = self.make(np.zeros((2, 3), np.float64))
        self.adapter.fill(target, self.make(np.arange(6, dtype=np.int32).reshape(2, 3)))
        assert self.data(target) == np.arange(6, dtype=np.float64).tobytes()


class TestNumpy(AdapterSuite):
    adapter = NumpyAdapter()
    column = "numpy"

    def has(self, row: DType) -> bool:
        if row.ml_dtypes:
            return hasattr(pytest.importorskip("ml_dtypes"), str(row.numpy))
        return row.numpy is not None

    def make(self, array: np.ndarray) -> Any:
        return array.copy()

    def layouts(self) -> dict[str, Any]:
        base = np.arange(60, dtype=np.int32).reshape(5, 12)
        return {
            "fortran": np.asfortranarray(base),
            "transposed": base.T,
            "step": base[::2, 1::3],
            "negative": base[::-1, ::-2],
            "expanded": np.broadcast_to(base[:, :1], (5, 4)),
            "unaligned": np.frombuffer(b"x" * 81, np.uint8)[1:].view(np.int32).reshape(4, 5)[:, :3],
        }

    def data(self, tensor: Any) -> bytes:
        return bytes(tensor.tobytes())

    def zero(self, tensor: Any) -> None:
        tensor[...] = 0

    def address(self, tensor: Any) -> int:
        return int(tensor.ctypes.data)

    def unholdable(self) -> dict[str, Any]:
        return {
            "object": np.array([1, None], object),
            "x.tolist()": np.zeros(2, [("a", "i4"), ("b", object)]),
            "masked": np.ma.masked_array([1, 2], [0, 1]),
            "numpy.asarray": np.zeros(2).view(type("Unit", (np.ndarray,), {})),
        }

    def kinds(self) -> list[Any]:
        return [
            np.array(["2020-01-01", "NaT"], "datetime64[D]"),
            np.array([[1, 2], [3, 4]], ">m8[25s]"),
            np.array(["ab", "", "xyz"], "U3"),
            np.array([b"ab", b"\0c"], "S4"),
            np.array([(1, 2.5), (3, -0.0)], [("a", "<i2"), ("b", ">f8")]),
            np.array(1.5, np.longdouble),
            np.zeros((2, 0), np.clongdouble),
            np.array([b"1234"], "V4"),
        ]

    def same(self, a: Any, b: Any) -> bool:
        return (type(a), a.dtype, a.shape, a.tobytes()) == (type(b), b.dtype, b.shape, b.tobytes())


class TorchSuite(AdapterSuite):
    column = "torch"

    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        self.torch = pytest.importorskip("torch")

    def has(self, row: DType) -> bool:
        return row.torch is not None and hasattr(self.torch, row.torch)

    def make(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array.copy())

    def layouts(self) -> dict[str, Any]:
        base = self.torch.arange(60, dtype=self.torch.int32).reshape(5, 12)
        return {
            "transposed": base.T,
            "step": base[::2, 1::3],
            "expanded": base[:, :1].expand(5, 4),
            "channels last": self.torch.zeros(2, 3, 4, 5, dtype=self.torch.int32).contiguous(
                memory_format=self.torch.channels_last
            ),
            "diagonal": base.as_strided((4, 2), (13, 1)),
        }

    def data(self, tensor: Any) -> bytes:
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel() == 0:
            return b""
        return bytes(flat.view(self.torch.uint8).numpy().tobytes())

    def zero(self, tensor: Any) -> None:
        tensor.zero_()

    def address(self, tensor: Any) -> int:
        return int(tensor.data_ptr())

    def unholdable(self) -> dict[str, Any]:
        torch = self.torch
        freed = torch.zeros(3)
        freed.untyped_storage().resize_(0)
        return {
            "to_dense": torch.eye(3).to_sparse(),
            "mkldnn": torch.zeros(2, 3).to_mkldnn(),
            "meta": torch.zeros(2, 3, device="meta"),
            "no memory": freed,
            "as_subclass": torch.zeros(2).as_subclass(type("Unit", (torch.Tensor,), {})),
            "no shape yet": torch.nn.parameter.UninitializedParameter(),
            "no memory of its own": torch._efficientzerotensor(2, 3),
            "torch.int4": torch.empty(3, dtype=torch.int4),
            "torch.bits8": torch.empty(3, dtype=torch.bits8),
        }

    def kinds(self) -> list[Any]:
        torch = self.torch
        return [
            torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
            torch.nn.Parameter(torch.arange(4), requires_grad=False),
            torch.ones(3, requires_grad=True),
            torch.nn.Parameter(torch.zeros(0, 2, dtype=torch.complex64)),
        ]

    def same(self, a: Any, b: Any) -> bool:
        return bool(
            type(a) is type(b)
            and a.requires_grad == b.requires_grad
            and a.is_leaf == b.is_leaf
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and self.torch.equal(a.detach(), b.detach())
        )


class TestTorchExchange(TorchSuite):
    @pytest.fixture(autouse=True)
    def _adapter(self, _torch: None) -> None:
        from holdfast.adapters.torch import TorchAdapter

        self.adapter = TorchAdapter()
        if not hasattr(self.torch.Tensor, "__dlpack_c_exchange_api__"):
            pytest.skip("this PyTorch has no exchange API")
        assert self.adapter._exchange is not None, "the exchange API of this PyTorch is not used"


class TestTorchPortable(TorchSuite):
    @pytest.fixture(autouse=True)
    def _adapter(self, _torch: None) -> None:
        from holdfast.adapters.torch import TorchAdapter

        self.adapter = TorchAdapter(exchange=False)
        assert self.adapter._exchange is None
