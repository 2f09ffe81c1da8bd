"""load_into where nothing has to be converted: all tensors are looked at together."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device_arrays
import holdfast
from holdfast import fill

RNG = np.random.default_rng(5)


def values() -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {f"w{i}": RNG.random((3, i + 1), "f4") for i in range(50)}
    return found | {
        "double": RNG.random((2, 3, 4)), "ids": RNG.integers(-9, 9, 7), "scalar": np.array(2.5),
        "none": np.zeros((0, 3), "f2"), "complex": RNG.random(5).astype("c8"),
    }  # fmt: skip


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was of nothing but such tensors."""
    found: list[bool] = []
    own = fill.fill_straight

    def record(*args: Any) -> bool:
        found.append(own(*args))
        return found[-1]

    monkeypatch.setattr(fill, "fill_straight", record)
    return found


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_arrays(name: str, shuffled: bool, tmp_path: Path, straight: list[bool]) -> None:
    expected = values()
    shard = 500 if name == "folder" else None
    holdfast.save(expected, tmp_path / name, max_shard_size=shard)
    keys = sorted(expected) if shuffled else list(expected)
    target = {key: np.full_like(expected[key], 1) for key in keys}
    before = dict(target)
    assert holdfast.load_into(target, tmp_path / name, threads=2) == ([], [])
    assert straight == [True]
    for key, value in expected.items():
        assert target[key] is before[key]
        assert target[key].tobytes() == value.tobytes(), key


def test_a_module_of_torch(tmp_path: Path, straight: list[bool]) -> None:
    torch = pytest.importorskip("torch")
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    holdfast.save({"m": nets[0].state_dict(), "epoch": 1}, tmp_path / "x")
    weight, version = nets[1][0].weight, nets[1][0].weight._version
    kept = weight * weight  # for a gradient
    assert holdfast.load_into(nets[1], tmp_path / "x", prefix="m.") == ([], [])
    assert straight == [True]
    assert nets[1][0].weight is weight and weight._version == version + 1
    assert torch.equal(weight, nets[0][0].weight) and weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


SQUARE = np.arange(12.0).reshape(3, 4)
FLAT = np.zeros(9)
LOCKED = np.zeros((3, 4))
LOCKED.flags.writeable = False
#: What is in the file, what is filled, and what of that is not plain.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype": ({"a": SQUARE}, {"a": np.zeros((3, 4), "f4")}),
    "width alike": ({"a": np.arange(3)}, {"a": np.zeros(3)}),
    "strided": ({"a": SQUARE}, {"a": np.zeros((4, 3)).T}),
    "swapped": ({"a": SQUARE}, {"a": np.zeros((3, 4), ">f8")}),
    "bool": ({"a": np.array([True, False])}, {"a": np.zeros(2, bool)}),
    "overlapping": ({"a": np.ones(5), "b": np.arange(5.0)}, {"a": FLAT[:5], "b": FLAT[4:]}),
    "dates": ({"a": np.arange(3).astype("M8[D]")}, {"a": np.zeros(3, "M8[D]")}),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_plain_is_looked_at_one_by_one(
    what: str, tmp_path: Path, straight: list[bool]
) -> None:
    stored, target = OTHERS[what]
    holdfast.save(stored, tmp_path / "x.safetensors")
    assert holdfast.load_into(target, tmp_path / "x.safetensors") == ([], [])
    assert straight == [False]
    last = list(target)[-1]  # of what overlaps the last one counts
    assert (target[last] == stored[last]).all()


def test_checksums_of_more_than_a_tensor(tmp_path: Path, straight: list[bool]) -> None:
    """Those of NumPy's files are of a record, which is read for them by itself."""
    np.savez(tmp_path / "x.npz", a=SQUARE)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    target = {"a": np.zeros((3, 4))}
    assert holdfast.load_into(target, tmp_path / "x.npz") == ([], [])
    assert straight == [False] and (target["a"] == SQUARE).all()
    data[data.index(SQUARE.tobytes()) + 9] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(holdfast.ChecksumError):
        holdfast.load_into(target, tmp_path / "x.npz")


def test_two_names_of_one_tensor(tmp_path: Path, straight: list[bool]) -> None:
    value = np.arange(6.0)
    holdfast.save({"a": value, "b": value}, tmp_path / "x")
    target = {"a": np.zeros(6), "b": np.zeros(6)}
    assert holdfast.load_into(target, tmp_path / "x") == ([], [])
    assert straight == [False]
    assert (target["a"] == value).all() and (target["b"] == value).all()


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ({"a": np.zeros((4, 3))}, RuntimeError, "size mismatch for a"),
        ({"a": np.zeros(12)}, RuntimeError, "size mismatch for a"),
        ({"a": LOCKED}, ValueError, "read-only"),
        ({"b": np.zeros((3, 4))}, RuntimeError, "Missing key"),
        ({"a": np.zeros((3, 4)), "b": np.zeros(1)}, RuntimeError, "Missing key"),
        ({}, RuntimeError, "Unexpected key"),
    ],
)
def test_what_does_not_fit_is_refused(
    target: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    holdfast.save({"a": SQUARE}, tmp_path / "x")
    with pytest.raises(error, match=words):
        holdfast.load_into(target, tmp_path / "x")
    assert not any(value.any() for value in target.values())


@pytest.mark.parametrize("stream", [False, True])
def test_damage_is_seen(stream: bool, tmp_path: Path, straight: list[bool]) -> None:
    holdfast.save(values(), tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    data[-3] ^= 4
    (tmp_path / "x").write_bytes(data)
    target = {key: np.zeros_like(value) for key, value in values().items()}
    file: Any = io.BytesIO(data) if stream else tmp_path / "x"
    with pytest.raises(holdfast.ChecksumError, match="expected CRC-32"):
        holdfast.load_into(target, file)
    assert straight == []  # it was on its way


def test_memory_of_a_device_is_filled_through_blocks(
    tmp_path: Path, straight: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    holdfast.save({"a": SQUARE}, tmp_path / "x")
    with device_arrays.installed(monkeypatch) as (device, _):
        target = {"a": device_arrays.put(np.zeros((3, 4)))}
        before = device.calls["begin"]
        assert holdfast.load_into(target, tmp_path / "x") == ([], [])
        assert straight == [False] and device.calls["begin"] > before
        assert (target["a"].get() == SQUARE).all()


def test_arrays_beside_tensors(tmp_path: Path, straight: list[bool]) -> None:
    torch = pytest.importorskip("torch")
    holdfast.save({"a": SQUARE, "b": torch.ones(3)}, tmp_path / "x")
    target = {"a": np.zeros((3, 4)), "b": torch.zeros(3)}
    holdfast.load_into(target, tmp_path / "x")
    assert straight == [False]
    assert (target["a"] == SQUARE).all() and target["b"].sum() == 3
