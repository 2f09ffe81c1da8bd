"""What comes back: plain values, tensors of every kind, modules, optimizers."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

Again = Callable[..., Any]
BOTH = pytest.mark.parametrize("weights_only", [True, False])
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
NEWER = [
    torch.float8_e5m2, torch.float8_e4m3fn, torch.complex32,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]


def values(dtype: Any, count: int) -> Any:
    """Random bits of any dtype, of which none is a NaN."""
    raw = torch.randint(0, 2, (count,), dtype=torch.int64) + torch.arange(count) % 3
    return raw.to(dtype) if dtype != torch.bool else raw % 2 == 0


@BOTH
def test_plain_values(again: Again, weights_only: bool) -> None:
    obj = {
        "int": 123,
        "negative": -(2**40),
        "large": 2**200,
        "float": 3.14,
        "nan": [math.inf, -0.0],
        "bool": [True, False, None],
        "str": "wörld \u2603 \U0001f600",
        "empty": ["", (), [], {}],
        "tuple": (1, (2, 3), [4]),
        5: "int key",
        ("a", 1): "tuple key",
        "complex": 1 + 2j,
        "set": {1, 2, 3},
        "long": "x" * 70_000,
    }
    got = again(obj, weights_only=weights_only)
    assert got == obj
    assert list(got) == list(obj)
    assert str(got["nan"][1]) == "-0.0"
    assert type(got["set"]) is set


@BOTH
@pytest.mark.parametrize("obj", [{1, 2, 3}, b"byte", bytearray(b"bytearray"), b"\x00\xff" * 300])
def test_bare_values_as_the_whole_file(again: Again, obj: Any, weights_only: bool) -> None:
    got = again(obj, weights_only=weights_only)
    assert got == obj
    assert type(got) is type(obj)


def test_values_that_torch_defines(again: Again, zipped: bool) -> None:
    obj = [torch.Size([2, 3]), torch.float32, torch.device("cuda:1"), torch.device("cpu")]
    got = again(obj, zipped=zipped)
    assert got == obj
    assert type(got[0]) is torch.Size


def test_one_object_twice_is_one_object_still(again: Again, zipped: bool) -> None:
    shared = [1, 2]
    tensor = torch.ones(3)
    cycle: list[Any] = []
    cycle.append(cycle)
    got = again([shared, {"again": shared}, tensor, tensor, cycle], zipped=zipped)
    assert got[0] is got[1]["again"]
    assert got[2] is got[3]
    assert got[4][0] is got[4]


def test_ordered_dict_with_its_attributes(again: Again) -> None:
    state = nn.LSTM(3, 3).state_dict()
    got = again(state)
    assert type(got) is OrderedDict
    assert got._metadata == state._metadata
    assert list(got) == list(state)
    assert again(Counter("aab")) == Counter("aab")


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(again: Again, zipped: bool, dtype: Any, weights_only: bool) -> None:
    tensor = values(dtype, 10)
    learns = dtype.is_floating_point or dtype.is_complex
    holder = nn.Module()
    holder.weight = nn.Parameter(tensor, requires_grad=learns)
    obj = {"t": tensor, "sd": holder.state_dict(), "item": tensor[0].item()}
    got = again(obj, zipped=zipped, weights_only=weights_only)
    assert got["t"].dtype == dtype and torch.equal(got["t"], tensor)
    assert torch.equal(got["sd"]["weight"], tensor)
    assert got["item"] == obj["item"]


@BOTH
@pytest.mark.parametrize("dtype", NEWER, ids=str)
def test_newer_dtypes_and_their_views(again: Again, dtype: Any, weights_only: bool) -> None:
    x = torch.arange(0.0, 100.0).to(dtype)
    got = again({"x": x, "even": x[0::2], "odd": x[1::2]}, weights_only=weights_only)
    raw = torch.view_as_real if dtype.is_complex else (lambda t: t.view(torch.uint8))
    assert got["x"].dtype == dtype
    if not dtype.is_complex:
        assert torch.equal(raw(got["x"]), raw(x))
    else:
        assert got["x"].tolist() == x.tolist()
    got["odd"][0] = torch.tensor(1, dtype=torch.uint8).to(dtype)
    got["even"][0] = torch.tensor(2, dtype=torch.uint8).to(dtype)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    assert got["x"][:2].to(wide).tolist() == [2, 1]


def test_views_share_one_storage(again: Again, zipped: bool) -> None:
    base = torch.randn(5, 5)
    other = torch.randn(5, 5)
    obj = [base, other, base, other, base[1], base.t(), base[1:4, ::2], other.flatten()[3:5]]
    got = again(obj, zipped=zipped)
    for a, b in zip(got, obj, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.storage_offset() == b.storage_offset()
    first = got[0].untyped_storage()
    for i in (2, 4, 5, 6):
        assert got[i].untyped_storage()._cdata == first._cdata
    assert got[1].untyped_storage()._cdata != first._cdata
    got[0].fill_(10)
    assert (got[2] == 10).all() and (got[4] == 10).all() and (got[6] == 10).all()
    assert not (got[1] == 10).all()


def test_a_slice_keeps_its_whole_storage(again: Again, zipped: bool) -> None:
    got = again(torch.arange(100.0)[3:5], zipped=zipped)
    assert got.tolist() == [3, 4]
    assert got.storage_offset() == 3
    assert got.untyped_storage().nbytes() == 400
    assert got.untyped_storage() is got.view(2, 1).untyped_storage()


@BOTH
def test_storages_are_objects_too(again: Again, zipped: bool, weights_only: bool) -> None:
    a = torch.randn(5, 5)
    part = a.reshape(-1)[1:4].clone()
    obj = [a, a.storage(), a.untyped_storage()] if zipped else [a, a.storage()]
    if zipped:
        # An untyped storage has another element type than the tensor: a file of its own.
        del obj[2]
        obj.append(torch.arange(4, dtype=torch.uint8).untyped_storage())
    obj.append((part.storage(), part.storage(), part.clone().storage()))
    got = again(obj, zipped=zipped, weights_only=weights_only)
    assert type(got[1]) is torch.storage.TypedStorage
    assert got[1].dtype == torch.float32
    got[0].fill_(7)
    assert set(got[1].tolist()) == {7.0}
    assert got[1].data_ptr() == got[0].data_ptr()
    if zipped:
        assert got[2].tolist() == [0, 1, 2, 3]
    one, same, other = got[-1]
    assert one._cdata == same._cdata
    assert one._cdata != other._cdata
    assert one.tolist() == other.tolist() == part.tolist()


def test_scalars_and_empty_tensors(again: Again, zipped: bool) -> None:
    obj = {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.ones(4, 4)[:, :0],
        "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 5),
    }
    got = again(obj, zipped=zipped)
    for name, tensor in obj.items():
        assert got[name].shape == tensor.shape and got[name].stride() == tensor.stride(), name
        assert torch.equal(got[name], tensor), name


def test_dtypes_of_empty_tensors_may_share_nothing(again: Again, zipped: bool) -> None:
    for dtype in DTYPES:
        empty = torch.tensor([], dtype=dtype)
        for other in DTYPES[::3]:
            alias = torch.TypedStorage(wrap_storage=empty.untyped_storage(), dtype=other)
            got, got_alias = again([empty, alias], zipped=zipped)
            assert got.dtype == dtype and got.numel() == 0
            assert len(got_alias) == 0


@pytest.mark.parametrize("case", ["tensors", "storage first", "storage second", "bytes"])
def test_one_storage_as_two_types_is_refused(impl: Any, zipped: bool, case: str) -> None:
    a = torch.randn(10, dtype=torch.complex128)
    alias = torch.TypedStorage(wrap_storage=a.untyped_storage(), dtype=torch.uint8)
    obj = {
        "tensors": [a, a.imag],
        "storage first": [a.storage(), a.imag],
        "storage second": [a, a.imag.storage()],
        "bytes": [a, alias],
    }[case]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        impl.save(obj, io.BytesIO(), _use_new_zipfile_serialization=zipped)


@BOTH
def test_python_attributes_of_tensors(again: Again, weights_only: bool) -> None:
    for tensor in (torch.zeros(3, 3), nn.Parameter(torch.zeros(3, 3))):
        tensor.note = "text"
        tensor.pi = 3.14
        got = again({"x": tensor}, weights_only=weights_only)["x"]
        assert type(got) is type(tensor)
        assert torch.equal(got, tensor)
        assert (got.note, got.pi) == ("text", 3.14)


@BOTH
def test_conjugate_and_negative_views(again: Again, weights_only: bool) -> None:
    t = torch.randn(4, dtype=torch.cfloat)
    for made in (t.conj(), torch._neg_view(t), torch._neg_view(t.conj()), t.conj().imag):
        got = again(made, weights_only=weights_only)
        assert torch.equal(got, made)
        assert got.is_conj() == made.is_conj()
        assert got.is_neg() == made.is_neg()


def test_zero_tensors_are_refused(impl: Any, zipped: bool) -> None:
    with pytest.raises(RuntimeError, match="ZeroTensor is not serializable"):
        impl.save(
            torch._efficientzerotensor((4, 5)),
            io.BytesIO(),
            _use_new_zipfile_serialization=zipped,
        )


@BOTH
@pytest.mark.filterwarnings("ignore")  # of torch, that sparse layouts are in beta
@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse().coalesce(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_sparse_csc(),
        lambda x: x.to_sparse_bsr((1, 1)),
        lambda x: x.to_sparse_bsc((1, 1)),
    ],
    ids=["coo", "coalesced", "csr", "csc", "bsr", "bsc"],
)
def test_sparse(again: Again, zipped: bool, weights_only: bool, convert: Any) -> None:
    x = torch.zeros(3, 3)
    x[1][1] = 1
    x[2][0] = -4
    sparse = convert(x)
    got = again({"tensor": sparse}, zipped=zipped, weights_only=weights_only)["tensor"]
    assert got.layout == sparse.layout
    assert torch.equal(got.to_dense(), x)
    if sparse.layout == torch.sparse_coo:
        assert got.is_coalesced() == sparse.is_coalesced()


@pytest.mark.filterwarnings("ignore")
def test_quantized(again: Again) -> None:
    x = torch.randn(4, 6)
    whole = torch.quantize_per_tensor(x, 0.1, 10, torch.qint8)
    scales, zeros = torch.rand(4).double() + 0.1, torch.zeros(4, dtype=torch.int64)
    rows = torch.quantize_per_channel(x, scales, zeros, 0, torch.quint8)
    got = again({"whole": whole, "rows": rows}, weights_only=False)
    assert torch.equal(got["whole"].int_repr(), whole.int_repr())
    assert got["whole"].q_scale() == whole.q_scale()
    assert got["whole"].q_zero_point() == whole.q_zero_point()
    assert torch.equal(got["rows"].int_repr(), rows.int_repr())
    assert torch.equal(got["rows"].q_per_channel_scales(), scales)
    assert torch.equal(again(whole).int_repr(), whole.int_repr())


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors(again: Again) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    got = again(nested)
    assert got.is_nested
    for a, b in zip(got.unbind(), nested.unbind(), strict=True):
        assert torch.equal(a, b)


@BOTH
def test_meta_tensors(again: Again, weights_only: bool) -> None:
    model = nn.Conv2d(20000, 320000, kernel_size=3, device="meta")  # 230 GB, had it data
    got = again(model.state_dict(), weights_only=weights_only)
    assert got["weight"].shape == model.weight.shape
    assert got["weight"].device.type == "meta"


@BOTH
def test_requires_grad_and_parameters(again: Again, zipped: bool, weights_only: bool) -> None:
    leaf = torch.randn(3, requires_grad=True)
    obj = {
        "leaf": leaf,
        "made": leaf * 2,
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "plain": torch.ones(2),
    }
    got = again(obj, zipped=zipped, weights_only=weights_only)
    for name, tensor in obj.items():
        assert type(got[name]) is type(tensor), name
        assert got[name].requires_grad == tensor.requires_grad, name
        assert got[name].is_leaf, name
        assert torch.equal(got[name], tensor), name


def test_saving_a_module_warns_of_nothing(impl: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impl.save(nn.Linear(2, 3), io.BytesIO())


def test_backward_hooks_are_warned_of(impl: Any) -> None:
    tensor = torch.ones(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="backward hook"):
        impl.save(tensor, io.BytesIO())


def test_whole_modules(again: Again, zipped: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    net[0].bias.requires_grad_(False)
    net.eval()
    got = again(net, zipped=zipped, weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(got(x), net(x))
    assert not got.training
    assert not got[0].bias.requires_grad
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    got = again(tied, zipped=zipped, weights_only=False)
    assert got["a"].weight is got["b"].weight


def test_optimizers_and_schedulers(again: Again) -> None:
    net = nn.Linear(100, 2000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.randn(1, 100)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6.0, total_steps=10)
    got = again({"o": optimizer.state_dict(), "s": scheduler.state_dict()})
    other = torch.optim.AdamW(net.parameters(), lr=0.5)
    other.load_state_dict(got["o"])
    assert torch.equal(
        other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert got["s"]["base_lrs"] == scheduler.base_lrs
    assert not hasattr(got["s"].get("anneal_func"), "__self__")
    whole = again(optimizer, weights_only=False)
    assert whole.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_scheduler_does_not_save_the_optimizer(impl: Any) -> None:
    optimizer = torch.optim.SGD([torch.randn(100, 100, 200, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6.0, total_steps=10)
    file = io.BytesIO()
    impl.save(scheduler.state_dict(), file)
    assert file.tell() < 1 << 20


def test_numpy_arrays_come_back_as_arrays(again: Again, zipped: bool) -> None:
    obj = {
        "array": np.arange(6.0).reshape(2, 3).T,
        "scalar": np.float32(1.5),
        "object": np.array([{"a": 1}, None], object),
        "text": np.array(["a", "bc"]),
        "tensor": torch.ones(2),
    }
    got = again(obj, zipped=zipped, weights_only=False)
    assert type(got["array"]) is np.ndarray
    assert np.array_equal(got["array"], obj["array"])
    assert type(got["scalar"]) is np.float32
    assert got["object"].tolist() == obj["object"].tolist()
    assert got["text"].tolist() == ["a", "bc"]
    alone = again({"only": np.arange(3)}, zipped=zipped, weights_only=False)
    assert type(alone["only"]) is np.ndarray


def test_what_is_loaded_behaves_as_torch_made_it(again: Again, zipped: bool) -> None:
    got = again({"x": torch.arange(12.0)}, zipped=zipped)["x"]
    got.share_memory_()
    assert got.is_shared() and got[11] == 11
    got = again(torch.arange(12.0), zipped=zipped)
    got.numpy()[3] = 40
    assert got[3] == 40
    got.requires_grad_()
    (got * 2).sum().backward()
    assert got.grad.tolist() == [2.0] * 12


def test_what_is_loaded_is_not_the_file(pair: Any, tmp_path: Any) -> None:
    path = tmp_path / "x.pt"
    pair.save(torch.zeros(1000), path)
    before = path.read_bytes()
    got = pair.load(path)
    got.fill_(1)
    path.unlink()
    assert got.sum() == 1000
    path.write_bytes(before)
    assert not pair.load(path).any()
