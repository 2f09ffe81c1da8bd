"""Tensors that are more than strided memory, through SafeResolver and real PyTorch."""

from __future__ import annotations

import collections
import io
import zipfile
from typing import Any

import numpy as np
import pytest

from holdfast.errors import FormatError, UnsafeError
from holdfast.safe import SafeResolver
from slow_machine import _Machine

torch = pytest.importorskip("torch")

from holdfast.adapters import _torch_special  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning"),
]

#: What the machine makes by itself, for rows.
ROWS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}


class Torch(_Machine):  # type: ignore[misc]
    """The slow machine, with dense tensors made by PyTorch, from the records of a file."""

    def __init__(self, archive: zipfile.ZipFile, resolver: Any) -> None:
        names = archive.namelist()
        self.archive = archive
        self.root = names[0].partition("/")[0]
        super().__init__(archive.read(f"{self.root}/data.pkl"), resolver)

    def find_class(self, module: str, name: str) -> Any:
        if name in ROWS:
            return getattr(torch._utils, name)
        if "Storage" in name:
            return torch.serialization.StorageType(name) if name != "UntypedStorage" else name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, _ = pid
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        storage = torch.frombuffer(data or bytearray(1), dtype=torch.uint8).untyped_storage()
        dtype = torch.uint8 if kind == "UntypedStorage" else kind.dtype
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _made(self, func: Any, args: Any) -> Any:
        if getattr(func, "__name__", "") in ROWS:
            return func(*args)
        if repr(func) == "<torch._tensor._rebuild_from_type_v2>" and args[0] in [
            getattr(torch._utils, name) for name in ROWS
        ]:
            args = (args[0](*args[2]), args[1], (), args[3])
        return super()._made(func, args)


def load(obj: Any, **options: Any) -> Any:
    """`obj`, saved by PyTorch and made again by the resolver."""
    file = io.BytesIO()
    torch.save(obj, file)
    resolver = SafeResolver("torch", name="a.pt", **options)
    with zipfile.ZipFile(file) as archive:
        return Torch(archive, resolver).load()


def quantized() -> list[Any]:
    data = torch.arange(12.0).reshape(3, 4)
    per_channel = torch.quantize_per_channel(
        data, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.qint8
    )
    return [
        torch.quantize_per_tensor(data, 0.5, 3, torch.quint8),
        torch.quantize_per_tensor(data, 0.5, 3, torch.qint32)[1:, ::2],
        per_channel,
        per_channel[:, 1:],
    ]


def sparse() -> list[Any]:
    dense = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4], [5, 6, 0, 0]])
    return [
        dense.to_sparse(),
        torch.sparse_coo_tensor([[1, 0, 1], [0, 2, 0]], [1.0, 2, 3], (2, 3)),
        torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (5, 3)),
        dense.to_sparse_csr(),
        dense.to_sparse_csc(),
        dense.to_sparse_bsr((2, 2)),
        dense.to_sparse_bsc((2, 2)),
        dense.flatten().to_sparse(),
        torch.arange(120.0).reshape(2, 3, 4, 5).to_sparse(),
        torch.arange(120.0).reshape(5, 4, 6).to_sparse(2),
        torch.arange(120.0).reshape(5, 4, 6).to_sparse(1),
    ]


@pytest.mark.parametrize("which", range(11))
def test_sparse(which: int) -> None:
    tensor = sparse()[which]
    found = load({"w": tensor})["w"]
    assert found.layout is tensor.layout and found.dtype is tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.to_dense(), tensor.to_dense())
    if tensor.layout is torch.sparse_coo:
        assert found.is_coalesced() == tensor.is_coalesced()


@pytest.mark.parametrize("which", range(4))
def test_quantized(which: int) -> None:
    tensor = quantized()[which]
    found = load([tensor])[0]
    assert found.qscheme() is tensor.qscheme() and found.dtype is tensor.dtype
    assert torch.equal(found.int_repr(), tensor.int_repr())
    assert torch.equal(found.dequantize(), tensor.dequantize())


def test_nested() -> None:
    tensor = torch.nested.nested_tensor([torch.ones(2, 3), torch.arange(8.0).reshape(4, 2)])
    found = load(tensor)
    assert found.is_nested
    assert all(map(torch.equal, found.unbind(), tensor.unbind()))


def test_jagged() -> None:
    import torch._dynamo  # registers what jagged tensors are made of

    parts = [torch.ones(2, 3), torch.arange(12.0).reshape(4, 3)]
    tensor = torch.nested.nested_tensor(parts, layout=torch.jagged)
    found = load(tensor)
    assert found.layout is torch.jagged
    assert all(map(torch.equal, found.unbind(), parts))


def test_parameters_and_attributes() -> None:
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    marked = torch.nn.Parameter(torch.zeros(3))
    marked.tensor_model_parallel = True
    plain = torch.arange(3)
    plain.note = {"a": [1]}
    found = load({"p": parameter, "m": marked, "t": plain})
    assert type(found["p"]) is torch.nn.Parameter and not found["p"].requires_grad
    assert type(found["m"]) is torch.nn.Parameter and found["m"].requires_grad
    assert found["m"].tensor_model_parallel is True
    assert type(found["t"]) is torch.Tensor and found["t"].note == {"a": [1]}
    assert torch.equal(found["t"], plain)


class Marked(torch.Tensor):  # type: ignore[misc]
    """A subclass that has an attribute."""


class Wrapped(torch.Tensor):  # type: ignore[misc]
    """A subclass without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Any) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_subclasses() -> None:
    tensor = torch.ones(2).as_subclass(Marked)
    tensor.note = "x"
    with pytest.raises(UnsafeError, match=r"GLOBAL .*Marked was not an allowed global"):
        load(tensor)
    found = load(tensor, safe_globals=[Marked])
    assert type(found) is Marked and found.note == "x"
    assert torch.equal(found.as_subclass(torch.Tensor), torch.ones(2))


def test_wrapper_subclasses() -> None:
    tensor = Wrapped(torch.arange(6.0).reshape(2, 3))
    with pytest.raises(UnsafeError, match="Wrapped was not an allowed global"):
        load(tensor)
    found = load(tensor, safe_globals=[Wrapped])
    assert type(found) is Wrapped and found.shape == (2, 3)
    assert torch.equal(found.inner, tensor.inner)
    found = load(tensor, safe_globals=[Wrapped], map_location="meta")
    assert found.device.type == "meta"
    with pytest.raises(FormatError, match="callable map_location"):
        load(tensor, safe_globals=[Wrapped], map_location=lambda storage, _: storage)


def test_meta_and_device_tensors() -> None:
    found = load(torch.empty(10**6, 10**6, device="meta", dtype=torch.float16))
    assert found.is_meta and found.shape == (10**6, 10**6)
    resolver = SafeResolver("torch", name="a.pt")
    data = np.arange(3.0)
    for name, value in [
        ("_rebuild_device_tensor_from_numpy", data),
        ("_rebuild_xla_tensor", data),
        ("_rebuild_device_tensor_from_cpu_tensor", torch.from_numpy(data)),
    ]:
        made = resolver.call(
            resolver.find("torch._utils", name), (value, torch.bfloat16, "cpu", True)
        )
        assert made.dtype is torch.bfloat16 and made.requires_grad  # type: ignore[attr-defined]
        assert made.tolist() == [0, 1, 2]  # type: ignore[attr-defined]


def test_values() -> None:
    obj = {
        "size": torch.Size([2, 3]),
        "dtype": [torch.float8_e4m3fn, torch.quint8, torch.float32],
        "device": [torch.device("cpu"), torch.device("cuda", 3)],
        "layout": torch.sparse_csr,
        "scheme": torch.per_channel_affine,
        "class": [torch.Tensor, torch.nn.Parameter],
    }
    found = load(obj)
    assert found == obj and type(found["size"]) is torch.Size
    resolver = SafeResolver("numpy", name="a.pt")
    call = resolver.call
    assert call(resolver.find("torch", "Size"), ([2, 3],)) == (2, 3)
    assert resolver.find("torch", "quint8") == "torch.quint8"


def spans(count: int) -> Any:
    return torch.arange(count)


STORAGE = (torch.zeros(16, dtype=torch.uint8).untyped_storage(), "QInt8Storage")
AFFINE = (torch.per_tensor_affine, 0.5, 0)
CHANNELS = (torch.per_channel_affine, [1.0, 2.0], [0, 0])
INDICES = torch.tensor([[0, 5], [0, 0]])
LATE = torch.tensor([[0, 1, 2, 2], [5, 5, 5, 4]])  # out of order only at the end
HUGE = torch.zeros(1).expand(1 << 20, 1 << 20)
FLOATS = torch.zeros(8)._typed_storage() if hasattr(torch.Tensor, "_typed_storage") else None
WILD: list[tuple[str, tuple[Any, ...]]] = [
    ("_rebuild_tensor", (FLOATS, 0, (9,), (1,))),
    ("_rebuild_tensor", (FLOATS, 8, (1,), (1,))),
    ("_rebuild_tensor", (FLOATS, -1, (1,), (1,))),
    ("_rebuild_tensor", (FLOATS, 0, (1 << 62, 1 << 62), (0, 0))),
    ("_rebuild_tensor", (FLOATS, 0, (2, 2), (1,))),
    ("_rebuild_tensor", ("storage", 0, (2,), (1,))),
    ("_rebuild_tensor_v2", (FLOATS, 0, (2,), (1,), False, {"hook": 1})),
    ("_rebuild_tensor_v2", (FLOATS, 0, (2,), (1,), False, None, {"conj": 1})),
    ("_rebuild_tensor_v3", (FLOATS, 0, (9,), (1,), False, None, torch.float32)),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(2), (2, 2)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (-INDICES, torch.ones(2), (9, 9)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(3), (9, 9)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(2), (9,)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(2, 2), (9, 9, 3)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(2), (1 << 40, 1 << 40)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES.flip(1), torch.ones(2), (9, 9), True))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES * 0, torch.ones(2), (9, 9), True))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (LATE, torch.ones(4), (9, 9), True))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (LATE[:1], torch.ones(4), (9,), True))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES, torch.ones(2), (9, 9), 1))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES.float(), torch.ones(2), (9, 9)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, ("indices", "values", (9, 9)))),
    ("_rebuild_sparse_tensor", (torch.sparse_coo, (INDICES.expand(2, 2), HUGE, (9, 1 << 20)))),
    ("_rebuild_sparse_tensor", (torch.sparse_csr, (spans(3), spans(2), torch.ones(2), (2, 1)))),
    ("_rebuild_sparse_tensor", (torch.sparse_csr, (spans(9), spans(2), torch.ones(2), (2, 2)))),
    ("_rebuild_sparse_tensor", (torch.sparse_csr, (spans(3), spans(2), torch.ones(2)))),
    ("_rebuild_sparse_tensor", (torch.sparse_bsr, (spans(3), spans(2), torch.ones(2), (2, 2)))),
    ("_rebuild_sparse_tensor", (torch.strided, (spans(3), spans(2), torch.ones(2), (2, 2)))),
    ("_rebuild_sparse_tensor", ("torch.sparse_coo", ())),
    ("_rebuild_qtensor", (STORAGE, 0, (17,), (1,), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 8, (9,), (1,), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, -1, (2,), (1,), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (1 << 20, 1 << 20), (0, 0), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (1 << 62, 1 << 62), (0, 0), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (-1,), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2, 2), (2,), AFFINE, False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), (*CHANNELS, 1), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (3,), (1,), (*CHANNELS, 0), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), (*CHANNELS, -1), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), (*CHANNELS[:2], ["a", "b"], 0), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), (torch.per_tensor_affine, "1", 0), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), ("x", 1.0, 0), False, None)),
    ("_rebuild_qtensor", (STORAGE, 0, (2,), (1,), AFFINE, False, {"hook": 1})),
    ("_rebuild_qtensor", (STORAGE[0], 0, (2,), (1,), AFFINE, False, None)),
    ("_rebuild_qtensor", ((STORAGE[0], []), 0, (2,), (1,), AFFINE, False, None)),
    ("_rebuild_nested_tensor", (torch.ones(4), spans(2)[None] + 2, spans(2)[None], spans(1) + 4)),
    ("_rebuild_nested_tensor", (torch.ones(4), spans(2)[None] + 9, spans(2)[None] + 1, spans(1))),
    ("_rebuild_nested_tensor", (torch.ones(4), spans(2)[None], spans(2)[None] - 9, spans(1))),
    ("_rebuild_nested_tensor", (torch.ones(4), -spans(2)[None], spans(2)[None], spans(1))),
    ("_rebuild_nested_tensor", (torch.ones(4), spans(2)[None], spans(2)[None], spans(3))),
    ("_rebuild_nested_tensor", (torch.ones(4), spans(2), spans(2), spans(3))),
    ("_rebuild_nested_tensor", (torch.ones(4)[::2], spans(1)[None], spans(1)[None], spans(1))),
    ("_rebuild_nested_tensor", ("buffer", (), (), ())),
    ("_rebuild_meta_tensor_no_storage", (torch.float32, (1 << 62, 4), (1, 1), False)),
    ("_rebuild_meta_tensor_no_storage", (torch.float32, (2,), (1 << 62,), False)),
    ("_rebuild_meta_tensor_no_storage", (torch.float32, (2,), (-1,), False)),
    ("_rebuild_meta_tensor_no_storage", ("float32", (2,), (1,), False)),
    ("_rebuild_meta_tensor_no_storage", (torch.int32, (2,), (1,), True)),
    (
        "_rebuild_wrapper_subclass",
        (torch.Tensor, torch.int8, (2,), (1,), 0, torch.strided, "cpu", False),
    ),
    ("_rebuild_wrapper_subclass", (print, torch.int8, (2,), (1,), 0, torch.strided, "cpu", False)),
    ("_rebuild_device_tensor_from_numpy", (HUGE, torch.float64, "cpu", False)),
    ("_rebuild_device_tensor_from_numpy", (np.array([None]), torch.float64, "cpu", False)),
    ("_rebuild_device_tensor_from_numpy", (np.ones(2), torch.float64, "nowhere", False)),
    ("_rebuild_device_tensor_from_cpu_tensor", (HUGE, torch.float64, "cpu", False)),
    ("_rebuild_device_tensor_from_cpu_tensor", (torch.ones(2), torch.int8, "cpu", True)),
    ("_rebuild_parameter", (torch.ones(2), 1, None)),
    ("_rebuild_parameter", (spans(2), True, None)),
    ("_rebuild_parameter", (np.ones(2), True, None)),
    ("_rebuild_parameter", (torch.ones(2), True, collections.OrderedDict(a=print))),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, {"__class__": dict})),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, {"data": torch.ones(1)})),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, {"backward": 1})),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, ({}, {"__dict__": {}}))),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, ({}, {}, {}))),
    ("_rebuild_parameter_with_state", (torch.ones(2), True, None, "state")),
]


@pytest.mark.parametrize(("name", "args"), WILD, ids=[f"{n}{i}" for i, (n, _) in enumerate(WILD)])
def test_wild_arguments(name: str, args: tuple[Any, ...]) -> None:
    resolver = SafeResolver("torch", name="a.pt")
    with pytest.raises(FormatError, match=rf"torch\._utils\.{name}: "):
        resolver.call(resolver.find("torch._utils", name), args)


@pytest.mark.parametrize(
    "args",
    [
        (print, torch.Tensor, ("x",), {}),
        (torch.ones(2), dict, (), {}),
        (torch.ones(2), Marked, (), {}),
        (torch.ones(2), "type", (), {}),
        (torch.ones(2), torch.Tensor, (), {"requires_grad": True}),
        (torch.ones(2), torch.Tensor, (), {"__class__": dict}),
        ("func", torch.Tensor, [], {}),
        (torch.ones(2),),
    ],
)
def test_wild_types(args: tuple[Any, ...]) -> None:
    resolver = SafeResolver("torch", name="a.pt")
    with pytest.raises(FormatError):
        resolver.call(resolver.find("torch._tensor", "_rebuild_from_type_v2"), args)


def test_torch_functions_are_not_reached_by_value() -> None:
    """A class or a constant of PyTorch stands in an object, and makes nothing."""
    resolver = SafeResolver("torch", name="a.pt")
    for name in ("Tensor", "FloatTensor", "float32", "sparse_csr"):
        with pytest.raises(UnsafeError, match="unrecognized function"):
            resolver.call(resolver.find("torch", name), (1 << 40,))


LACKING = [
    ("_rebuild_sparse_tensor", ("torch.sparse_coo", (np.ones((2, 1)), np.ones(1), (2, 2)))),
    ("_rebuild_nested_tensor", (np.ones(4), np.ones((1, 1)), np.ones((1, 1)), np.ones(1))),
    ("_rebuild_qtensor", (np.ones(4), 0, (4,), (1,), ("torch.per_tensor_affine", 1.0, 0), False)),
    ("_rebuild_meta_tensor_no_storage", ("torch.float32", (2,), (1,), False)),
    ("_rebuild_device_tensor_from_numpy", (np.ones(2), "torch.float8_e5m2", "cpu", False)),
]


@pytest.mark.parametrize(("name", "args"), LACKING)
def test_without_torch_what_no_array_can_hold_is_refused(name: str, args: Any) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    with pytest.raises(TypeError, match="only PyTorch can hold it"):
        resolver.call(resolver.find("torch._utils", name), args)


def test_dense_tensors_that_are_asked_for() -> None:
    parts = torch.arange(8.0)
    torch_args = (parts._typed_storage(), 2, (2, 2), (3, 1))
    numpy_args = (np.arange(8, dtype=np.float32), *torch_args[1:])
    for adapter, args in (("torch", torch_args), ("numpy", numpy_args)):
        resolver = SafeResolver(adapter, name="a.pt")
        for name, more in (
            ("_rebuild_tensor", ()),
            ("_rebuild_tensor_v2", (False, collections.OrderedDict())),
        ):
            find = resolver.find("torch._utils", name)
            made: Any = resolver.call(find, (*args, *more))
            assert made.tolist() == [[2, 3], [5, 6]]
            with pytest.raises(FormatError, match="outside of its storage"):
                resolver.call(find, (args[0], 4, *args[2:], *more))
        kind = resolver.find("torch", "Tensor")
        make = resolver.find("torch._tensor", "_rebuild_from_type_v2")
        inner = resolver.find("torch._utils", "_rebuild_tensor")
        found: Any = resolver.call(make, (inner, kind, args, {"note": 1}))
        assert found.tolist() == [[2, 3], [5, 6]]


def test_without_torch_parameters_and_attributes_are_arrays() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    array = np.ones(2)
    utils, tensor = "torch._utils", "torch._tensor"
    for name, args in [
        ("_rebuild_parameter", (array, True, None)),
        ("_rebuild_parameter_with_state", (array, True, None, {"a": 1})),
    ]:
        assert resolver.call(resolver.find(utils, name), args) is array
    kind = resolver.find("torch", "Tensor")
    args = (array, kind, (), {"note": 1})
    assert resolver.call(resolver.find(tensor, "_rebuild_from_type_v2"), args) is array
    call = resolver.find(utils, "_rebuild_device_tensor_from_numpy")
    made = resolver.call(call, (array, "torch.int16", "cuda:0", False))
    assert made.dtype == np.int16 and made.tolist() == [1, 1]  # type: ignore[attr-defined]
    wide = np.broadcast_to(np.ones(1), (1 << 20, 1 << 20))
    with pytest.raises(FormatError, match="more elements than are stored"):
        resolver.call(call, (wide, "torch.int16", "cuda:0", False))


def test_what_needs_an_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "get_safe_globals", list)  # as before the import
    resolver = SafeResolver("torch", name="a.pt")
    with pytest.raises(UnsafeError, match=r"``torch\.distributed\.tensor`` must be imported"):
        resolver.find("torch.distributed.tensor", "DTensor")


def test_indices_are_checked_on_the_device_that_they_are_on() -> None:
    """The default one stands here for the host, where the indices are elsewhere."""
    if not hasattr(torch.device, "__enter__"):
        pytest.skip(f"torch {torch.__version__} has no default device")
    right, wrong = torch.tensor([[0, 0, 2], [1, 3, 0]]), torch.tensor([[0, 0, 2], [3, 1, 0]])
    with torch.device("meta"):
        _torch_special._ascending(right)
        with pytest.raises(ValueError, match="do not ascend"):
            _torch_special._ascending(wrong)
