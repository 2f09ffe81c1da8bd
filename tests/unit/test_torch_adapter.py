"""What is PyTorch's own: gradients, lazy bits, strange tensors, devices, modules."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import holdfast  # noqa: E402
from holdfast import _engine  # noqa: E402
from holdfast.adapters.torch import TorchAdapter  # noqa: E402
from holdfast.dtypes import BY_NAME  # noqa: E402
from holdfast.views import DENSE, VIEW, TensorBatch, TensorView  # noqa: E402

ADAPTERS = [TorchAdapter(), TorchAdapter(exchange=False)]
both = pytest.mark.parametrize("adapter", ADAPTERS, ids=["exchange", "portable"])


def describe(adapter: TorchAdapter, *tensors: Any) -> tuple[TensorBatch, dict[int, str]]:
    return adapter.describe(list(tensors), [f"t{i}" for i in range(len(tensors))])


def filled(n: int, dtype: str = "float32", count: int = 4) -> TensorBatch:
    """`n` vectors over one buffer, whose elements count up."""
    values = np.arange(n * count, dtype=dtype)
    buffer = _engine.allocate(values.nbytes)
    memoryview(buffer)[:] = values.tobytes()  # type: ignore[arg-type]
    views = np.zeros(n, VIEW)
    size = values.itemsize * count
    views["address"] = np.uint64(buffer.address) + np.arange(n, dtype=np.uint64) * np.uint64(size)
    views["nbytes"], views["dims"], views["ndim"] = size, np.arange(n), 1
    views["dtype"], views["flags"] = BY_NAME[dtype].code, DENSE
    return TensorBatch(views, np.full(n, count, np.int64), [buffer])


def test_the_fast_way_is_taken_where_there_is_one() -> None:
    assert ADAPTERS[1]._exchange is None
    assert (ADAPTERS[0]._exchange is not None) == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def test_both_ways_describe_alike() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = [
        base, base.T.mT if base.dim() == 2 else base.permute(2, 0, 1), base[:, :1], base[:, :, 0],
        base[1, 2, 3], base[:0], base[:, None].expand(2, 5, 3, 4), base[::2], torch.empty(3, 0, 2),
        torch.nn.Parameter(base), base.to(torch.bfloat16)[..., 1:], base.to(torch.complex128),
        torch.tensor(True), base.clone().requires_grad_() * 2, base.as_strided((3, 3), (1, 1)),
        torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ]  # fmt: skip
    (fast, fast_kinds), (slow, slow_kinds) = (describe(a, *tensors) for a in ADAPTERS)
    assert fast_kinds == slow_kinds == {9: "parameter", 13: "requires_grad"}
    assert len(fast) == len(tensors)
    for i in range(len(tensors)):
        assert fast[i] == slow[i]
        assert fast[i].owner is slow[i].owner is tensors[i]


@both
def test_only_the_view_of_a_big_storage_counts(adapter: TorchAdapter) -> None:
    big = torch.arange(1000)
    batch, _ = describe(adapter, big[990:])
    assert (batch[0].nbytes, batch[0].address) == (80, big.data_ptr() + 7920)
    assert batch[0].strides is None


# -- lazy bits


@both
@pytest.mark.parametrize("inference", [False, True])
def test_lazy_conjugates_and_negatives_are_resolved(adapter: TorchAdapter, inference: bool) -> None:
    with torch.inference_mode(inference):
        z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
        conj, neg = z.conj(), z.conj().imag
        one = z[:1].conj().imag  # a lazy negative that is dense
        assert conj.is_conj()
        assert neg.is_neg()
        assert one.is_neg()
        assert one.is_contiguous()
        batch, kinds = describe(adapter, conj, neg, one, z, torch._neg_view(torch.arange(3)))
    assert not kinds
    owners: list[Any] = list(batch.owners)
    assert owners[3] is z
    wanted: list[Any] = [[1 - 2j, 3 + 4j], [-2.0, 4.0], [-2.0], [1 + 2j, 3 - 4j], [0, -1, -2]]
    for i, want in enumerate(wanted):
        assert batch[i].address == owners[i].data_ptr()
        assert not owners[i].is_neg()
        assert not owners[i].is_conj()
        assert owners[i].tolist() == want


@both
def test_the_kind_of_a_lazy_tensor_is_kept(adapter: TorchAdapter) -> None:
    leaf = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    batch, kinds = describe(adapter, leaf.conj(), parameter)
    assert kinds == {0: "requires_grad", 1: "parameter"}
    assert not batch.owners[0].requires_grad  # type: ignore[attr-defined]


# -- what cannot be held


def strange() -> dict[str, Any]:
    class Wrapper(torch.Tensor):  # type: ignore[misc]
        """What FakeTensor and DTensor are: a shape, and memory elsewhere or nowhere."""

        @classmethod
        def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a tensor that is refused was asked for something")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes warn that they are ones
        return {
            "Wrapper": torch.Tensor._make_wrapper_subclass(Wrapper, (2,)),
            "no memory of its own": torch._to_functional_tensor(torch.zeros(2)),
            "a nested tensor; save x.unbind()": torch.nested.nested_tensor(
                [torch.zeros(2), torch.zeros(3)]
            ),
            "a quantized tensor": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
            "torch.sparse_csr": torch.eye(2).to_sparse_csr(),
            "MaskedTensor": torch.masked.masked_tensor(torch.zeros(2), torch.ones(2).bool()),
        }


@both
def test_strange_tensors_are_refused_by_name(adapter: TorchAdapter) -> None:
    found = strange()
    assert len(found) == 6
    for part, tensor in found.items():
        with pytest.raises(TypeError, match="tensor 't1'") as caught:
            describe(adapter, torch.zeros(1), tensor)
        assert part in str(caught.value)


@both
def test_tensors_inside_a_transform_are_refused(adapter: TorchAdapter) -> None:
    def save(x: Any) -> Any:
        with pytest.raises(TypeError, match="inside a function transform"):
            describe(adapter, x)
        return x

    torch.vmap(save)(torch.zeros(2, 3))


@both
def test_other_objects_are_refused(adapter: TorchAdapter) -> None:
    with pytest.raises(TypeError, match="tensor 't0'"):
        describe(adapter, np.zeros(3))


# -- tensors made


@both
def test_a_made_tensor_is_one_like_any_other(adapter: TorchAdapter, tmp_path: Path) -> None:
    a, b = adapter.wrap(filled(2), {0: "requires_grad", 1: "parameter"})
    assert (type(a), type(b)) == (torch.Tensor, torch.nn.Parameter)
    assert a.is_leaf
    (a * b).sum().backward()
    assert a.grad.tolist() == [4.0, 5.0, 6.0, 7.0]
    assert b.grad.tolist() == [0.0, 1.0, 2.0, 3.0]
    torch.save([a, b], tmp_path / "x")
    again = torch.load(tmp_path / "x")
    assert all(map(torch.equal, again, [a, b]))
    assert [t.untyped_storage().nbytes() for t in (a, b)] == [16, 16]
    del again


@both
def test_a_gradient_of_integers_is_refused(adapter: TorchAdapter) -> None:
    for kind in ("parameter", "requires_grad"):
        with pytest.raises(ValueError, match="int32 has no gradient"):
            adapter.wrap(filled(1, "int32"), {0: kind})
    (frozen,) = adapter.wrap(filled(1, "int32"), {0: "parameter,frozen"})
    assert type(frozen) is torch.nn.Parameter
    assert not frozen.requires_grad


def test_shapes_that_do_not_fit_their_bytes_are_refused() -> None:
    batch = filled(2)
    batch.dims[1] = 5
    for adapter in ADAPTERS:
        with pytest.raises((ValueError, RuntimeError)):
            adapter.wrap(batch, {})


@both
def test_made_and_dropped_in_many_threads_at_once(adapter: TorchAdapter) -> None:
    batch = filled(500)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                tensors = adapter.wrap(batch, {})
                described, _ = describe(adapter, *tensors)
                assert described.views["address"].tolist() == batch.views["address"].tolist()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_structures_of_dropped_tensors_are_given_back() -> None:
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("the address sanitizer holds on to memory that was freed")
    batch = filled(640)
    adapter = ADAPTERS[0]
    for _ in range(20):
        adapter.wrap(batch, {})
    before = resident()
    for _ in range(300):
        adapter.wrap(batch, {})
    assert resident() - before < 8 << 20  # the structures alone are 30 MB


def test_a_surviving_tensor_holds_few_others_structures() -> None:
    start = _engine.live_buffers()
    kept = ADAPTERS[0].wrap(filled(1000), {})[::100]
    assert _engine.live_buffers() == start + 1
    assert [t[0].item() for t in kept] == [400.0 * i for i in range(10)]
    del kept


# -- map_location


@both
def test_place(adapter: TorchAdapter) -> None:
    tensor = torch.nn.Parameter(torch.zeros(2))
    for same in (None, "cpu", torch.device("cpu"), {}, {"cuda:0": "cpu"}, {"cpu": "cpu"}):
        assert adapter.place(tensor, same) is tensor
    assert adapter.place(tensor, lambda t, where: None) is tensor
    seen = []
    half = adapter.place(tensor, lambda t, where: seen.append(where) or t.half())
    assert half.dtype == torch.half
    assert seen == ["cpu"]
    for meta in ("meta", torch.device("meta"), {"cpu": "meta"}):
        moved = adapter.place(tensor, meta)
        assert moved.device.type == "meta"
        assert type(moved) is torch.nn.Parameter
        assert moved.requires_grad
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    assert not adapter.place(frozen, "meta").requires_grad
    leaf = torch.zeros(2, requires_grad=True)
    moved = adapter.place(leaf, "meta")
    assert (type(moved), moved.requires_grad, moved.is_leaf) == (torch.Tensor, True, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_torch_has_not_got(tmp_path: Path) -> None:
    """PyTorch that was not built for it fails an assertion, which is no error of the caller's."""
    holdfast.save({"w": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(RuntimeError, match="CUDA"):
        holdfast.load(tmp_path / "x", map_location="cuda")
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match="map_location='cuda:1': .*'cpu' loads to the host"):
            holdfast.load(tmp_path / "x", map_location=torch.device("cuda:1"))


# -- modules


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 3)
        self.b = torch.nn.Linear(2, 3)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("lost", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> Any:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


def test_the_tensors_of_a_module() -> None:
    net = Net()
    named = ADAPTERS[0].named_tensors(net)
    assert named is not None
    assert list(named) == [
        "a.weight", "a.bias", "b.weight", "b.bias", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert named["a.weight"] is named["b.weight"] is net.a.weight
    assert ADAPTERS[0].named_tensors({"a": 1}) is None


@both
def test_fill_is_unseen_by_autograd(adapter: TorchAdapter) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    adapter.fill(parameter, torch.tensor([1, 2, 3]))
    adapter.fill(parameter[1:], torch.tensor([7.0, 8.0], dtype=torch.float64))
    assert parameter.tolist() == [1.0, 7.0, 8.0]
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    lazy = torch.zeros(1, dtype=torch.complex64).conj()
    adapter.fill(lazy, torch.tensor([1 + 2j], dtype=torch.complex128))
    assert lazy.tolist() == [1 + 2j]


# -- values that are not tensors

VALUES = [
    torch.Size([2, 0, 3]), torch.Size([]), torch.float32, torch.float8_e4m3fn, torch.complex32,
    torch.device("cpu"), torch.device("cuda:1"), torch.device("meta"), torch.strided,
    torch.sparse_coo, torch.channels_last, torch.contiguous_format,
]  # fmt: skip
CODECS = {codec.tag: codec for codec in ADAPTERS[0].codecs}


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value: Any) -> None:
    (codec,) = [codec for codec in CODECS.values() if type(value) in codec.types]
    assert codec.tag == f"torch.{type(value).__name__}"
    back = codec.decode(json.loads(json.dumps(codec.encode(value))))
    assert type(back) is type(value)
    assert back == value


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("torch.Size", None), ("torch.Size", "23"), ("torch.Size", [1.5]), ("torch.Size", [True]),
        ("torch.Size", [2**63]), ("torch.Size", {"a": 1}), ("torch.dtype", "load"),
        ("torch.dtype", "strided"), ("torch.dtype", "nn.Module"), ("torch.dtype", "__class__"),
        ("torch.dtype", 3), ("torch.dtype", "float33"), ("torch.device", "nonsense"),
        ("torch.device", "cuda:-1"), ("torch.device", 0), ("torch.device", "cpu\n"),
        ("torch.layout", "float32"), ("torch.memory_format", "strided"),
    ],
)  # fmt: skip
def test_hostile_values_are_refused(tag: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        CODECS[tag].decode(value)


class TestDestination:
    """Which device a load brings the bytes to, where PyTorch has two of CUDA."""

    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def test_devices_of_cuda(self) -> None:
        adapter = TorchAdapter()
        if adapter._exchange is None:
            pytest.skip("this PyTorch has no exchange API")
        for location, number in (
            ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1), (torch.device("cuda"), 1),
            (torch.device("cuda", 0), 0), (0, 0),
        ):  # fmt: skip
            assert adapter.destination(location) == (2 << 16) + number, location
        for location in ("cuda:2", 2, None, "cpu", "meta", "cuda:x", {"cpu": "cuda"}, True):
            assert adapter.destination(location) == 0, location

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert TorchAdapter(exchange=False).destination("cuda:0") == 0
        adapter = TorchAdapter()
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.0")
            assert adapter.destination("cuda:0") == 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert adapter.destination("cuda:0") == 0


@both
@pytest.mark.parametrize("dtype", ["float32", "bool", "bfloat16", "complex64", "float8_e4m3fn"])
def test_what_torch_has_lent_is_its_own_again(adapter: TorchAdapter, dtype: str) -> None:
    """Of what stands for a whole allocation the storage is that of the allocator, no stranger."""
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    row = BY_NAME[dtype]
    n = row.nbytes((3, 4))
    whole, shared = torch.ones(n, dtype=torch.uint8), torch.ones(2 * n, dtype=torch.uint8)
    views = [
        TensorView(row, (3, 4), whole.data_ptr(), None),
        TensorView(row, (12,), shared.data_ptr(), None),
        TensorView(row, (4, 3), shared.data_ptr() + n, None),
        TensorView(row, (0, 3), 0, None),
    ]
    batch = TensorBatch.of(views)
    lent = [_engine.lend(t.data_ptr(), t.nbytes, t, 0) for t in (whole, shared)]
    batch.owners, batch.owner = lent, np.array([0, 1, 1, 1])
    kinds = {0: "parameter"} if row.name in ("float32", "bfloat16", "complex64") else {}
    first, second, third, empty = adapter.wrap(batch, kinds)
    assert first.untyped_storage()._cdata == whole.untyped_storage()._cdata
    assert type(first) is (torch.nn.Parameter if kinds else torch.Tensor)
    assert not first._is_view() and first.is_leaf
    for made, shape in ((first, (3, 4)), (second, (12,)), (third, (4, 3)), (empty, (0, 3))):
        assert (made.dtype, tuple(made.shape)) == (getattr(torch, dtype), shape)
    assert {second.untyped_storage().nbytes(), third.untyped_storage().nbytes()} == {n}
    assert second.data_ptr() == shared.data_ptr()
    before = _engine.live_buffers()
    del lent, batch, first, second, third, empty, made
    assert _engine.live_buffers() == before - 2
