"""Objects that torch.save pickled, made again from their outline with PyTorch's own functions."""

from __future__ import annotations

import importlib
import io
import zipfile
from collections import OrderedDict
from typing import Any

import pytest

from holdfast.dtypes import DTYPES
from holdfast.formats._inert import Record, Storage
from holdfast.formats._torch_pickle import Pickled, read_object
from holdfast.layout import CONJUGATE, NEGATIVE, QUANTIZED

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Trusting:
    """A resolver that does all that it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def find(self, module: str, name: str) -> Any:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def call(self, func: Any, args: tuple[Any, ...]) -> Any:
        self.calls.append(func.__name__)
        return func(*args)

    def new(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cls.__new__(cls, *args, **kwargs)

    def build(self, obj: Any, state: Any) -> Any:
        if hasattr(obj, "__setstate__"):
            obj.__setstate__(state)
        elif isinstance(state, dict):
            vars(obj).update(state)
        else:
            for key, value in (state[1] or {}).items() if isinstance(state, tuple) else ():
                setattr(obj, key, value)
        return obj

    def extend(self, obj: Any, items: list[Any]) -> None:
        obj.extend(items)

    def update(self, obj: Any, pairs: list[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            obj[key] = value


class Made:
    """An object saved by torch, its outline, and the object made again."""

    def __init__(self, obj: Any, **how: Any) -> None:
        file = io.BytesIO()
        torch.save(obj, file, **how)
        with zipfile.ZipFile(file) as archive:
            self.found = read_object(archive.read("archive/data.pkl"), name="m.pt")
            self.raw = [self._storage(archive.read(f"archive/data/{k}")) for k in self.found.keys]
        self.resolver = Trusting()
        self.object = self.found.structure.replay(self.tensors(), self.storage, self.resolver)

    def _storage(self, data: bytes) -> Any:
        if not data:
            return torch.UntypedStorage(0)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()

    def storage(self, row: int, code: int) -> Any:
        name = QUANTIZED[-2 - code] if code < -1 else DTYPES[max(code, 0)].torch
        dtype = torch.uint8 if code == -1 else getattr(torch, str(name))
        return torch.storage.TypedStorage(wrap_storage=self.raw[row], dtype=dtype, _internal=True)

    def tensors(self) -> list[Any]:
        return [self.tensor(self.found, i) for i in range(len(self.found.entries))]

    def tensor(self, found: Pickled, i: int) -> Any:
        entry = found.entries[i]
        dtype = DTYPES[int(entry["dtype"])]
        part = slice(int(entry["dims"]), int(entry["dims"]) + int(entry["ndim"]))
        size = found.dims[part].tolist()
        stride = [step // dtype.itemsize for step in found.strides[part].tolist()]
        first = int(entry["offset"]) // dtype.itemsize
        tensor = torch.empty(0, dtype=torch.uint8).view(getattr(torch, str(dtype.torch)))
        tensor.set_(self.raw[found.storage[i]], first, size, stride)
        flags = 0 if found.flags is None else int(found.flags[i])
        tensor = tensor.conj() if flags & CONJUGATE else tensor
        tensor = torch._neg_view(tensor) if flags & NEGATIVE else tensor
        kind = found.kinds.get(i, "")
        if kind.startswith("parameter"):
            return torch.nn.Parameter(tensor, requires_grad=kind == "parameter")
        return tensor.requires_grad_() if kind else tensor


class Sub(torch.Tensor):
    pass


def parameter_with_state() -> Any:
    made = torch.nn.Parameter(torch.rand(2))
    made.extra = torch.rand(3)
    return made


def with_attribute() -> Any:
    made = torch.rand(3)
    made.note = "x"
    return made


def per_channel() -> Any:
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2, 3])
    return torch.quantize_per_channel(torch.rand(3, 5), scales, zeros, 0, torch.quint4x2)


#: What is saved, and the names of the plain tensors in it.
SPECIAL: dict[str, tuple[Any, list[str]]] = {
    "per tensor": (lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 10, torch.quint8), []),
    "per channel": (per_channel, ["w.scales", "w.zero_points"]),
    "coo": (lambda: torch.eye(3).to_sparse(), ["w.indices", "w.values"]),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), ["w.crow_indices", "w.col_indices", "w.values"]),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), ["w.ccol_indices", "w.row_indices", "w.values"]),
    "bsr": (
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        ["w.crow_indices", "w.col_indices", "w.values"],
    ),
    "subclass": (lambda: torch.rand(2, 2).as_subclass(Sub), ["w"]),
    "parameter with state": (parameter_with_state, ["w", "w.extra"]),
    "attribute": (with_attribute, ["w"]),
    "parameter": (lambda: torch.nn.Parameter(torch.rand(3)), ["w"]),
    "frozen": (lambda: torch.nn.Parameter(torch.arange(3), requires_grad=False), ["w"]),
    "gradient": (lambda: torch.rand(2, requires_grad=True), ["w"]),
    "conjugate": (lambda: torch.rand(2, dtype=torch.complex64).conj(), ["w"]),
    "negative": (lambda: torch._neg_view(torch.rand(2)), ["w"]),
    "float8": (lambda: torch.rand(3).to(torch.float8_e4m3fn), ["w"]),
    "transposed": (lambda: torch.rand(3, 4).t()[1:], ["w"]),
    "expanded": (lambda: torch.rand(3).expand(5, 3), ["w"]),
    "no elements": (lambda: torch.empty(0, 3)[0:], ["w"]),
    "scalar": (lambda: torch.tensor(3), ["w"]),
}


def plain(tensor: Any) -> Any:
    """Its values, fit to be compared."""
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


@pytest.mark.parametrize("kind", SPECIAL)
def test_tensors_of_every_kind(kind: str) -> None:
    make, names = SPECIAL[kind]
    tensor = make()
    made = Made({"w": tensor})
    found = made.object["w"]  # type: ignore[index]
    assert sorted(made.found.names.tolist()) == sorted(names)
    assert type(found) is type(tensor) and found.dtype == tensor.dtype
    assert found.requires_grad == tensor.requires_grad and found.layout == tensor.layout
    assert torch.equal(plain(found), plain(tensor))
    assert (found.is_conj(), found.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    if tensor.layout is torch.strided:
        assert found.stride() == tensor.stride()
    for name, value in vars(tensor).items():
        assert torch.equal(torch.as_tensor(getattr(found, name) == value).all(), torch.tensor(True))


@pytest.mark.parametrize("layout", ["strided", "jagged"])
def test_nested_tensors(layout: str) -> None:
    parts = [torch.rand(2), torch.rand(3)]
    nested = torch.nested.nested_tensor(parts, layout=getattr(torch, layout))
    made = Made({"w": nested})
    found = made.object["w"].unbind()  # type: ignore[index]
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    assert {"strided": "w.buffer", "jagged": "w.values"}[layout] in made.found.names.tolist()


def test_tensors_without_values() -> None:
    made = Made({"w": torch.rand(2, 3, device="meta")})
    assert made.object["w"].shape == (2, 3) and len(made.found.names) == 0  # type: ignore[index]


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_module_and_its_optimizer(protocol: int) -> None:
    module = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.BatchNorm1d(4))
    module[1].register_buffer("hidden", torch.rand(2), persistent=False)
    made = Made({"module": module, "again": module[1]}, pickle_protocol=protocol)
    names = [f"module.{name}" for name in module.state_dict()]
    paths = made.found.structure.paths()
    assert list(paths)[: len(names)] == names
    assert "module.1.hidden" in made.found.names.tolist()
    assert set(paths) - set(names) == {f"again.{name}" for name in module[1].state_dict()}
    found = made.object["module"].state_dict()  # type: ignore[index]
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert made.object["again"] is made.object["module"][1]  # type: ignore[index]
    outline = made.found.structure.outline(lambda i: i)
    assert type(outline["module"]) is Record  # type: ignore[index]


def test_other_values_beside_tensors() -> None:
    base = torch.arange(24.0).view(4, 6)
    value = OrderedDict(
        base=base,
        row=base[1],
        dtype=torch.float32,
        size=torch.Size([1, 2]),
        device=torch.device("cpu"),
        members={1, "a"},
        frozen=frozenset([(1, 2)]),
        number=3j,
        data=b"abc",
        long=2**70,
        tensor=torch.FloatTensor,
        storage_class=torch.FloatStorage,
        other=torch.Tensor,
        ordered=OrderedDict,
        storage=torch.arange(9, dtype=torch.uint8).untyped_storage(),
        typed=torch.rand(4).storage(),
    )
    made = Made(value)
    found: Any = made.object
    assert torch.equal(found.pop("base"), base) and torch.equal(found.pop("row"), base[1])
    for name in ("storage", "typed"):
        assert list(found.pop(name)) == list(value.pop(name))
    del value["base"], value["row"]
    assert found == value and list(map(type, found.values())) == list(map(type, value.values()))
    outline: Any = made.found.structure.outline(lambda i: i)
    assert type(outline["storage"]) is Storage and outline["storage"].row == 1


def test_many_tensors_are_taken_in_one_step_each() -> None:
    state = OrderedDict((f"w{i}", torch.full((2, 3), float(i))) for i in range(500))
    made = Made(state)
    assert len(made.found.structure._passages) == 3 * 499
    assert made.found.names.tolist() == list(state)
    found: Any = made.object
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not made.resolver.calls
