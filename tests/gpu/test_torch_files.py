"""Files of torch.save with tensors of a CUDA device, both ways, beside torch itself; modules."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
import holdfast.torch
from cuda_tensors import Counts, made, raw, same, spread

pytestmark = pytest.mark.usefixtures("copies")


def checkpoint(torch: Any) -> dict[str, Any]:
    """Tensors here and there, views of one storage, ties, parameters, what is no tensor."""
    base = made("float32", (300, 41)).nan_to_num()
    return {
        "base": base,
        "row": base[3],
        "turned": base.T,
        "part": base[10:20, ::2],
        "tie": base,
        "parameter": torch.nn.Parameter(made("float16", (65,)).nan_to_num()),
        "frozen": torch.nn.Parameter(made("int64", (9,)), requires_grad=False),
        "host": made("float32", (33,), device="cpu"),
        "empty": torch.zeros(0, 3, device="cuda"),
        "scalar": torch.tensor(2.5, device="cuda", dtype=torch.bfloat16),
        "large": made("uint8", (700_001,)),
        "epoch": 3,
        "state": {"step": torch.tensor(7), "list": [made("int32", (5,)), "text"]},
    }


def tensors_of(obj: Any) -> dict[str, Any]:
    found = {key: value for key, value in obj.items() if hasattr(value, "data_ptr")}
    return found | {"step": obj["state"]["step"], "item": obj["state"]["list"][0]}


def alike(found: Any, expected: Any) -> None:
    """Assert equality to the bit, of devices, strides and shared storages, too."""
    assert list(found) == list(expected)
    assert found["epoch"] == 3 and found["state"]["list"][1] == "text"
    ours, theirs = tensors_of(found), tensors_of(expected)
    for name, tensor in theirs.items():
        other = ours[name]
        assert type(other) is type(tensor), name
        assert (other.device, other.dtype, other.shape) == (
            tensor.device, tensor.dtype, tensor.shape,
        ), name  # fmt: skip
        assert (other.stride(), other.storage_offset()) == (
            tensor.stride(), tensor.storage_offset(),
        ), name  # fmt: skip
        assert other.requires_grad == tensor.requires_grad, name
        assert raw(other) == raw(tensor), name
    storages = {ours[name].untyped_storage().data_ptr() for name in ("base", "row", "turned")}
    assert len(storages) == 1
    assert found["tie"].data_ptr() == found["base"].data_ptr()


LOCATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda torch: None,
    "cpu": lambda torch: "cpu",
    "cuda": lambda torch: "cuda",
    "cuda:0": lambda torch: "cuda:0",
    "device": lambda torch: torch.device("cuda", 0),
    "to the host": lambda torch: {"cuda:0": "cpu"},
    "to the device": lambda torch: {"cpu": "cuda:0"},
    "callable, as it is": lambda torch: lambda storage, where: storage,
    "callable, none": lambda torch: lambda storage, where: None,
    "callable, cuda": lambda torch: lambda storage, where: storage.cuda(),
}


@pytest.mark.parametrize("location", list(LOCATIONS))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("mmap", [None, False])
def test_loads_what_torch_saved_to_where_torch_would(
    torch: Any, tmp_path: Path, location: str, legacy: bool, mmap: bool | None
) -> None:
    path, where = tmp_path / "x.pt", LOCATIONS[location](torch)
    torch.save(checkpoint(torch), path, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, map_location=where, weights_only=True)
    alike(holdfast.load(path, where, mmap=mmap), expected)
    alike(holdfast.torch.load(path, map_location=where), expected)


@pytest.mark.parametrize("location", [None, "cuda", "cpu"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors(torch: Any, tmp_path: Path, location: str | None, layout: str) -> None:
    dense = torch.eye(40, device="cuda")
    obj = {"x": dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()}
    torch.save(obj, tmp_path / "theirs.pt")
    holdfast.save(obj, tmp_path / "ours.pt")
    for name in ("theirs.pt", "ours.pt"):
        expected = torch.load(tmp_path / name, map_location=location)["x"]
        found = holdfast.load(tmp_path / name, location)["x"]
        assert (found.device, found.layout) == (expected.device, expected.layout)
        assert layout == "csr" or found.is_coalesced()
        assert torch.equal(found.to_dense().cpu(), dense.cpu())


@pytest.mark.parametrize("format", ["torch", "torch_legacy"])
def test_torch_loads_what_is_saved(torch: Any, tmp_path: Path, format: str) -> None:
    path, obj = tmp_path / "x.pt", checkpoint(torch)
    holdfast.save(obj, path, format=format)
    alike(torch.load(path, weights_only=True), obj)
    alike(holdfast.load(path), obj)
    for location in ("cpu", "cuda:0", {"cuda:0": "cpu"}):
        expected = torch.load(path, map_location=location, weights_only=True)
        alike(holdfast.load(path, location), expected)


def test_many_small_tensors_are_few_transfers_and_pickled_as_torch_does(
    torch: Any, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{i}.weight": made("uint8", (1000 + i % 7,), i) for i in range(2000)}
    counts = Counts(copies, monkeypatch)
    holdfast.save(tensors, tmp_path / "ours.pt")
    assert 0 < counts.rows["to_host"] <= 64
    assert counts.rows["gather"] >= 1900
    torch.save(tensors, tmp_path / "theirs.pt")
    pickles = []
    for name in ("ours", "theirs"):
        with zipfile.ZipFile(tmp_path / f"{name}.pt") as archive:
            found = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            pickles.append(archive.read(found[0]))
    assert pickles[0] == pickles[1]
    same(torch.load(tmp_path / "ours.pt", weights_only=True), tensors)
    same(holdfast.load(tmp_path / "theirs.pt"), tensors)
    assert 0 < counts.rows["to_device"] <= 64
    assert counts.rows["scatter"] >= 1900


def test_the_drop_in_saves_as_torch_does(torch: Any, tmp_path: Path) -> None:
    obj = checkpoint(torch)
    holdfast.torch.save(obj, tmp_path / "ours.pt")
    torch.save(obj, tmp_path / "theirs.pt")
    alike(torch.load(tmp_path / "ours.pt"), torch.load(tmp_path / "theirs.pt"))


def test_a_file_saved_on_a_device_is_read_by_the_host(torch: Any, tmp_path: Path) -> None:
    tensors = spread()
    torch.save(tensors, tmp_path / "x.pt")
    found = holdfast.load(tmp_path / "x.pt", framework="numpy")
    assert {key: found[key].tobytes() for key in tensors} == {
        key: raw(tensor) for key, tensor in tensors.items()
    }
    with holdfast.open(tmp_path / "x.pt", framework="torch") as f:
        same({"x": f["f4"]}, {"x": tensors["f4"].cpu()}, "cpu")
    with holdfast.open(tmp_path / "x.pt", framework="torch", map_location="cuda:0") as f:
        same({"x": f["f4"]}, {"x": tensors["f4"]})


def network(torch: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    nn = torch.nn
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 700)
    )
    return made.cuda().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["x", "x.pt", "x.npz"])
def test_a_module_is_filled_in_place(torch: Any, tmp_path: Path, name: str) -> None:
    source, target = network(torch, 1), network(torch, 2)
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    holdfast.save(state, tmp_path / name)
    before = {key: value.data_ptr() for key, value in target.state_dict().items()}
    steps = {key: value.stride() for key, value in target.state_dict().items()}
    assert holdfast.load_into(target, tmp_path / name) == ([], [])
    after = target.state_dict()
    assert {key: value.data_ptr() for key, value in after.items()} == before
    assert {key: value.stride() for key, value in after.items()} == steps
    same(after, source.state_dict())
    assert all(parameter.requires_grad for parameter in target.parameters())
    batch = torch.ones(2, 3, 8, 8, device="cuda")
    assert torch.equal(source.eval()(batch), target.eval()(batch))


def test_filling_converts_and_strides(torch: Any, tmp_path: Path) -> None:
    value = torch.randn(301, 77, device="cuda")
    holdfast.save({"x": value, "y": value, "z": value, "host": value}, tmp_path / "x")
    target = {
        "x": torch.zeros(301, 77, dtype=torch.float16, device="cuda"),
        "y": torch.zeros(77, 301, device="cuda").T,
        "z": torch.zeros(602, 154, device="cuda")[::2, 1::2],
        "host": torch.zeros(301, 77),
    }
    holdfast.load_into(target, tmp_path / "x")
    assert torch.equal(target["x"], value.half())
    assert torch.equal(target["y"], value) and torch.equal(target["z"], value)
    assert torch.equal(target["host"], value.cpu())


def test_a_module_of_the_host_is_filled_from_a_device(torch: Any, tmp_path: Path) -> None:
    source = network(torch, 1)
    target = network(torch, 2).cpu()
    for name in ("x", "x.pt"):
        holdfast.save(source.state_dict(), tmp_path / name)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        holdfast.load_into(target, tmp_path / name)
        host = {key: value.cpu() for key, value in source.state_dict().items()}
        same(target.state_dict(), host, "cpu")
