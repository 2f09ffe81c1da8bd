"""Checkpoints whose values only a pickle can hold, converted to formats that have none."""

from __future__ import annotations

import argparse
import datetime
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import holdfast
from pickle_files import (
    FALSE,
    NONE,
    ORDERED,
    PROTO,
    STOP,
    TRUE,
    call,
    items,
    name,
    number,
    numbers,
    pairs,
    text,
)

torch = pytest.importorskip("torch")

VALUES = {
    "namespace": argparse.Namespace(lr=1),
    "date": datetime.date(2020, 1, 1),
    "path": Path("x"),
    "simple": SimpleNamespace(a=1),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("shard", [None, 10_000])
def test_the_tensors_are_converted(value: Any, shard: int | None, tmp_path: Path) -> None:
    """As they are where a value would have to run code: with a warning that says which."""
    torch.save({"model": {"w": torch.ones(3000)}, "args": [value]}, tmp_path / "a.pth")
    to = tmp_path / ("shards" if shard else "a.safetensors")
    with pytest.warns(UserWarning, match=r"a flat dict of its tensors.*\['args'\]"):
        holdfast.convert(tmp_path / "a.pth", to, max_shard_size=shard)
    found = holdfast.load(to)
    assert list(found) == ["model.w"] and found["model.w"].sum() == 3000


class Megatron(torch.nn.Module):  # type: ignore[misc]
    """A module whose parameters say how they are split."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        for tensor in (self.w, self.frozen):
            tensor.tensor_model_parallel = True
            tensor.partition_dim = split


@pytest.mark.parametrize("to", ["safetensors", "pt", "legacy", "shards"])
def test_attributes_of_tensors_are_left_out(to: str, tmp_path: Path) -> None:
    net = Megatron(0)
    scaled = torch.arange(4.0)[1:3]  # a view, with a tensor in its attributes
    scaled.scale = torch.full((2,), 3.0)
    grad = torch.ones(3, requires_grad=True)
    grad.tag = "x" * 100
    state = {"model": net.state_dict(keep_vars=True), "epoch": 3, "more": [scaled, grad]}
    torch.save(state, tmp_path / "a.pth")

    target = tmp_path / {"shards": "folder", "safetensors": "a.st"}.get(to, "b.pt")
    shard = 10_000 if to == "shards" else None
    kind = "torch_legacy" if to == "legacy" else None
    with pytest.warns(UserWarning, match="attributes of tensors are left out") as caught:
        holdfast.convert(tmp_path / "a.pth", target, kind, max_shard_size=shard)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(
        "'tensor_model_parallel', 'partition_dim', 'scale', 'tag'"
    )

    found = holdfast.load(target)
    assert found["epoch"] == 3 and list(found["model"]) == ["w", "frozen"]
    assert type(found["model"]["w"]) is torch.nn.Parameter and found["model"]["w"].requires_grad
    assert type(found["model"]["frozen"]) is torch.nn.Parameter
    assert not found["model"]["frozen"].requires_grad
    assert torch.equal(found["model"]["w"], net.w)
    assert found["more"][0].tolist() == [1, 2] and found["more"][1].requires_grad
    assert not any(vars(tensor) for tensor in (*found["model"].values(), *found["more"]))


@pytest.mark.skipif(not hasattr(torch.nn, "Buffer"), reason="this torch has no nn.Buffer")
def test_a_buffer_is_a_tensor(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.save({"b": torch.nn.Buffer(torch.ones(2)), "n": 1}, tmp_path / "a.pth")
    holdfast.convert(tmp_path / "a.pth", tmp_path / "a.st")
    assert not recwarn.list
    found = holdfast.load(tmp_path / "a.st")
    assert found["n"] == 1 and found["b"].tolist() == [1, 1]


def test_tensors_with_attributes_that_lie_alike(tmp_path: Path) -> None:
    """Of views of one storage each is found by where it lies."""
    base = torch.arange(12.0)
    views = [base[:6], base[6:], base[:6].view(2, 3), base[0:6:2], base]
    for view in views:
        view.tag = 1
    torch.save(views, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="'tag'"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.pt")
    found = holdfast.load(tmp_path / "b.pt")
    assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1


def test_tensors_with_attributes_are_what_they_are(tmp_path: Path) -> None:
    """Not what another one is that lies alike: a parameter, or one with its signs to be turned."""
    p = torch.nn.Parameter(torch.ones(3))
    ema, z = p.data, torch.ones(2, dtype=torch.complex64)
    ema.tag = z.tag = 1
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    torch.save({"ema": ema, "p": p, "z": z, "frozen": [frozen, frozen.data]}, tmp_path / "a.pth")
    for to in ("b.st", "b.pt"):
        with pytest.warns(UserWarning, match="left out: 'tag'"):
            holdfast.convert(tmp_path / "a.pth", tmp_path / to)
        found = holdfast.load(tmp_path / to)
        assert type(found["ema"]) is torch.Tensor and not found["ema"].requires_grad
        assert type(found["p"]) is torch.nn.Parameter


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_one_that_lies_where_a_conjugated_one_does(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    z.tag = 1
    torch.save([z, z.detach().conj()], tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"conjugated or negated lazily") as caught:
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.pt")
    assert "$[1]" in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "bfloat16", "bool"])
def test_attributes_of_tensors_of_any_type(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype, None)
    if kind is None:
        pytest.skip(f"this torch has no {dtype}")
    tensor = torch.arange(2).to(kind)
    tensor.tag = 1
    torch.save({"x": [tensor], "n": 3}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="left out: 'tag'"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.pt")
    found = holdfast.load(tmp_path / "b.pt")
    assert found["n"] == 3 and found["x"][0].dtype is kind
    assert torch.equal(found["x"][0].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:.*a flat dict of its tensors")
def test_signs_that_are_to_be_turned_are_not_passed_over(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j]).conj()
    z.tag = 1
    torch.save({"z": z, "n": 1}, tmp_path / "a.pth")
    with pytest.raises(TypeError, match="conjugated or negated lazily"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.st")


def test_no_attribute_of_a_name_is_passed_over(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.persistent = "important"
    torch.save({"x": tensor}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="left out: 'persistent'"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.st")


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("to", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_sparse_tensors_are_their_parts(kind: str, to: str, tmp_path: Path) -> None:
    eye = torch.eye(3) * 5
    sparse = eye.to_sparse() if kind == "coo" else eye.to_sparse_csr()
    torch.save({"s": sparse, "w": torch.ones(2), "epoch": 3}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="a flat dict of its tensors"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / f"b.{to}")
    found = holdfast.load(tmp_path / f"b.{to}")
    assert "s.values" in found and found["s.values"].tolist() == [5, 5, 5]
    assert found["w"].tolist() == [1, 1] and "epoch" not in found


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_nothing_is_lost_without_a_name(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    for key, value in {"q": quantized, "s": torch.ones(2).untyped_storage()}.items():
        torch.save({key: value, "w": torch.ones(2)}, tmp_path / "a.pth")
        for to in ("b.st", "b.pt"):
            with pytest.raises(TypeError, match="of no plain tensor.*load and save it"):
                holdfast.convert(tmp_path / "a.pth", tmp_path / to)
            assert not (tmp_path / to).exists()


def test_hooks_are_not_passed_over(tmp_path: Path) -> None:
    storage = items(
        text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(2)
    )
    view = items(storage + b"Q", number(0), numbers([2]), numbers([1]), FALSE, ORDERED)
    tensor = name("torch._utils", "_rebuild_tensor_v2") + view + b"R"
    for hooks, warning in (
        (b"", "left out: 'a'"),
        (b"(" + text("k") + NONE + b"u", "backward hooks"),
    ):
        state = pairs({"a": NONE})
        made = call(
            "torch._utils", "_rebuild_parameter_with_state", tensor, TRUE, ORDERED + hooks, state
        )
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as out:
            out.writestr("a/data.pkl", PROTO + pairs({"x": made}) + STOP)
            out.writestr("a/version", b"3\n")
            out.writestr("a/data/0", bytes(8))
        with pytest.warns(UserWarning, match=warning):
            holdfast.convert(tmp_path / "a.pth", tmp_path / "b.st")
        assert holdfast.load(tmp_path / "b.st")["x"].tolist() == [0, 0]


class Traced(torch.nn.Module):  # type: ignore[misc]
    """What torch.fx makes a module of its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.register_buffer("table", torch.ones(2))

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.fc(x) + self.table  # torch.fx would take an annotation for a type


@pytest.mark.parametrize("nested", [False, True])
def test_modules_of_fx_have_the_names_of_their_state_dict(nested: bool, tmp_path: Path) -> None:
    module = torch.fx.symbolic_trace(Traced())
    torch.save({"net": module} if nested else module, tmp_path / "a.pth")
    names = [f"net.{key}" if nested else key for key in module.state_dict()]
    with holdfast.open(tmp_path / "a.pth") as f:
        assert list(f) == names
    with pytest.warns(UserWarning, match="a flat dict of its tensors"):
        holdfast.convert(tmp_path / "a.pth", tmp_path / "b.st")
    found = holdfast.load(tmp_path / "b.st")
    assert list(found) == names
    ours = Traced()
    holdfast.load_into(ours, tmp_path / "b.st", prefix="net." if nested else "")
    assert torch.equal(ours.fc.weight, module.fc.weight)
