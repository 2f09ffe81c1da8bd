"""Filling tensors in place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine, fill
from holdfast.layout import ENTRY


def test_numpy_dict(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    obj = {"a": {"w": rng.random((30, 40)), "b": rng.random(7, "f4")}, "n": 5}
    holdfast.save(obj, tmp_path / "x")
    target = {
        "a": {"w": np.zeros((40, 30)).T, "b": np.zeros(7)},  # strided, and of another dtype
    }
    strided = target["a"]["w"]
    keys = holdfast.load_into(target, tmp_path / "x")
    assert keys.missing_keys == [] and keys.unexpected_keys == []
    assert target["a"]["w"] is strided
    assert (strided == obj["a"]["w"]).all() and (target["a"]["b"] == obj["a"]["b"]).all()
    swapped = {"a": {"w": np.zeros((30, 40), ">f8"), "b": np.zeros(7, "f4")[::-1]}}
    holdfast.load_into(swapped, tmp_path / "x")
    assert (swapped["a"]["w"] == obj["a"]["w"]).all()
    assert (swapped["a"]["b"] == obj["a"]["b"]).all()


def test_names_that_do_not_match(tmp_path: Path) -> None:
    holdfast.save({"a": np.ones(2), "b": np.ones(3)}, tmp_path / "x")
    target = {"a": np.zeros(2), "c": np.zeros(1)}
    with pytest.raises(RuntimeError, match='Missing key.*"c"(.|\n)*Unexpected key.*"b"'):
        holdfast.load_into(target, tmp_path / "x")
    assert not target["a"].any()
    keys = holdfast.load_into(target, tmp_path / "x", strict=False)
    assert keys == (["c"], ["b"])
    assert target["a"].all()
    with pytest.raises(RuntimeError, match="size mismatch for a"):
        holdfast.load_into({"a": np.zeros(5)}, tmp_path / "x", strict=False)


@pytest.mark.parametrize("order", ["C", "F"])
def test_dtypes_that_the_table_lacks(order: str, tmp_path: Path) -> None:
    days = np.arange(6).astype("M8[D]").reshape(2, 3)
    np.savez(tmp_path / "x.npz", w=np.array(days, order=order))  # type: ignore[call-overload]
    target = {"w": np.zeros((2, 3), "M8[D]")}
    holdfast.load_into(target, tmp_path / "x.npz")
    assert (target["w"] == days).all()


def test_targets_that_cannot_be_filled(tmp_path: Path) -> None:
    holdfast.save({"a": np.ones((2, 2))}, tmp_path / "x")
    frozen = np.zeros((2, 2))
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        holdfast.load_into({"a": frozen}, tmp_path / "x")
    with pytest.raises(TypeError, match="module or a dict"):
        holdfast.load_into(7, tmp_path / "x")
    with pytest.raises(TypeError, match="prefix must be a str, not tuple"):
        holdfast.load_into({"a": np.zeros((2, 2))}, tmp_path / "x", prefix=("a.", "b."))  # type: ignore[arg-type]


def test_views_of_one_memory_that_begin_at_one_place(tmp_path: Path) -> None:
    """They were taken for one tensor, of which only the last name was filled."""
    holdfast.save({"a": np.arange(4.0), "b": np.arange(10.0, 14.0)}, tmp_path / "x")
    memory = np.full(8, -1.0)
    holdfast.load_into({"a": memory[:4], "b": memory[::2]}, tmp_path / "x")
    assert memory.tolist() == [10, 1, 11, 3, 12, -1, 13, -1]
    holdfast.save({"a": np.arange(4.0)}, tmp_path / "x")
    with pytest.raises(RuntimeError, match='Missing key.*"b"'):
        holdfast.load_into({"a": memory[:4], "b": memory[::2]}, tmp_path / "x")
    square = np.zeros((2, 2))  # but these are one, whatever way round they are looked at
    holdfast.save({"a": np.arange(4.0).reshape(2, 2)}, tmp_path / "x")
    target = {"a": square, "turned": square.T, "flat": square.reshape(4), "back": square[::-1]}
    assert holdfast.load_into(target, tmp_path / "x") == ([], [])
    assert square.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("names", [("whole", "part"), ("part", "whole")])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_targets_that_overlap_are_filled_in_their_order(
    tmp_path: Path, names: tuple[str, str], dtype: str
) -> None:
    """As torch does. Filled at once, elements were now of the one and now of the other, and the
    checksum of an undamaged tensor was found to be wrong."""
    n = 1 << 19
    obj = {"whole": np.full(n, 1, "f4"), "part": np.full(n - 1, 2, "f4")}
    holdfast.save(obj, tmp_path / "x")
    memory = np.zeros(n, dtype)
    views = {"whole": memory, "part": memory[1:]}
    for _ in range(10):
        memory[:] = 0
        holdfast.load_into({name: views[name] for name in names}, tmp_path / "x", threads=2)
        assert memory[0] == 1 and (memory[1:] == (2 if names[1] == "part" else 1)).all()


def test_shapes_of_all_names_of_one_memory_are_looked_at(tmp_path: Path) -> None:
    holdfast.save({"a": np.ones(5), "b": np.ones(4)}, tmp_path / "x")
    memory = np.zeros(4)
    with pytest.raises(RuntimeError, match="size mismatch for a"):
        holdfast.load_into({"a": memory, "b": memory}, tmp_path / "x")
    assert not memory.any()


def test_damage_is_seen(tmp_path: Path) -> None:
    holdfast.save({"a": np.ones(2000), "b": np.ones(2000)}, tmp_path / "x")
    whole = bytearray((tmp_path / "x").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "x").write_bytes(whole)
    for dtype in ("f8", "f4"):
        with pytest.raises(holdfast.ChecksumError, match="'b'"):
            holdfast.load_into({"a": np.zeros(2000), "b": np.zeros(2000, dtype)}, tmp_path / "x")


def network() -> Any:
    """A network with parameters, buffers and an integer among them."""
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))


def test_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    image = torch.rand(2, 3, 8, 8)
    net = network()
    net(image)
    holdfast.save({"model": net.state_dict(), "epoch": 1}, tmp_path / "x")
    other = network().to(memory_format=torch.channels_last)
    pointers = [p.data_ptr() for p in other.parameters()]
    keys = holdfast.load_into(other, tmp_path / "x", prefix="model.")
    assert keys == ([], [])
    assert [p.data_ptr() for p in other.parameters()] == pointers
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(net.eval()(image), other.eval()(image))

    half = network().half()
    holdfast.load_into(half, tmp_path / "x", prefix="model.")
    assert torch.equal(half[3].weight, net[3].weight.half())
    assert half[3].weight.requires_grad
    with pytest.raises(RuntimeError, match="Missing key"):
        holdfast.load_into(other, tmp_path / "x")


def test_tied_modules(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    holdfast.save({"embed.weight": net["embed"].weight.detach()}, tmp_path / "one")
    holdfast.save(net.state_dict(), tmp_path / "both")
    for name in ("one", "both"):
        other = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        other["head"].weight = other["embed"].weight
        assert holdfast.load_into(other, tmp_path / name) == ([], [])
        assert torch.equal(other["head"].weight, net["embed"].weight)


def test_conversion_takes_parts_of_any_shape(tmp_path: Path) -> None:
    """A first axis of one must not make the whole tensor one part."""
    asked: list[int] = []
    allocate = _engine.allocate

    def counting(nbytes: int) -> Any:
        asked.append(nbytes)
        return allocate(nbytes)

    values = np.arange(6 << 20, dtype="f4").reshape(1, 2, 3 << 20)
    holdfast.save({"w": values, "s": np.array(5, "i4"), "z": np.ones((0, 3))}, tmp_path / "x")
    target = {
        "w": np.zeros(values.shape, "f8"), "s": np.zeros(()), "z": np.zeros((0, 3), "f4"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "allocate", counting)
        holdfast.load_into(target, tmp_path / "x")
    assert (target["w"] == values).all() and target["s"] == 5
    assert 0 < max(asked) <= fill.PART
    assert list(fill._parts((2, 3), 4)) == [((...,), 0, (2, 3))]


def test_opaque_dtypes_are_never_mixed(tmp_path: Path) -> None:
    """Seconds read as milliseconds would be wrong without a word."""
    holdfast.save({"t": np.ones(2, "M8[s]")}, tmp_path / "x")
    for wrong in (np.zeros(2, "M8[ms]"), np.zeros((2, 8), "u1")):
        with pytest.raises(RuntimeError, match=r"dtype mismatch for t: .*M8\[s\] in the check"):
            holdfast.load_into({"t": wrong}, tmp_path / "x")
    target = {"t": np.zeros(2, "M8[s]")}
    holdfast.load_into(target, tmp_path / "x")
    assert (target["t"] == np.ones(2, "M8[s]")).all()


def test_a_larger_tensor_is_not_filled_by_a_part_of_it(tmp_path: Path) -> None:
    holdfast.save({"part": np.ones(2)}, tmp_path / "x")
    whole = np.zeros(5)
    keys = holdfast.load_into({"whole": whole, "part": whole[:2]}, tmp_path / "x", strict=False)
    assert keys == (["whole"], []) and whole.tolist() == [1, 1, 0, 0, 0]


def test_a_dtype_that_cannot_be_made_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    holdfast.save({"a": np.ones(2), "b": np.ones(2, ml_dtypes.bfloat16)}, tmp_path / "x")
    target = {"a": np.zeros(2), "b": np.zeros(2)}
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="x: bfloat16.*pip install ml_dtypes"):
        holdfast.load_into(target, tmp_path / "x")
    assert not target["a"].any()


def test_part_of_a_network_under_other_names(tmp_path: Path) -> None:
    stored = {"module.backbone.w": np.ones(2), "module.head.w": np.full(3, 2.0)}
    holdfast.save(stored, tmp_path / "x")
    target = {"w": np.zeros(2)}

    keys = holdfast.load_into(target, tmp_path / "x", prefix="backbone.", rename={r"^module\.": ""})

    assert keys == ([], [])
    assert target["w"].tolist() == [1.0, 1.0]
    other = {"neck.w": np.zeros(3), "v": np.zeros(2)}
    rules = {r"^module\.": "", r"^head\.(\w+)$": r"neck.\1", r"^backbone\.w$": "v"}
    holdfast.load_into(other, tmp_path / "x", rename=rules)
    assert other["neck.w"].tolist() == [2.0] * 3 and other["v"].tolist() == [1.0] * 2


@pytest.mark.parametrize("form", ["oneflow", "shards"])
def test_files_of_a_folder_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    obj = {f"w{i}": np.full(100 + i, i, "f4") for i in range(30)}
    if form == "oneflow":
        holdfast.save(obj, tmp_path / "x", format="oneflow")
    else:
        holdfast.save(obj, tmp_path / "x", max_shard_size=2000)
    passes: list[int] = []
    read = fill._read_into

    def counted(reader: Any, matches: list[Any], *rest: Any) -> None:
        passes.append(len(matches))
        read(reader, matches, *rest)

    monkeypatch.setattr(fill, "_read_into", counted)
    monkeypatch.setattr(fill, "fill_straight", lambda *_: False)  # one by one
    target = {name: np.zeros_like(array) for name, array in obj.items()}
    holdfast.load_into(target, tmp_path / "x")
    assert passes == [30]
    assert all((target[name] == array).all() for name, array in obj.items())


def test_passes_over_several_files() -> None:
    def spread(*places: tuple[int, int, int]) -> list[list[int]]:
        entries = np.zeros(len(places), ENTRY)
        for i, (file, offset, nbytes) in enumerate(places):
            entries[i]["file"], entries[i]["offset"], entries[i]["nbytes"] = file, offset, nbytes
        index: Any = SimpleNamespace(entries=entries)
        matches: list[Any] = [SimpleNamespace(row=i) for i in range(len(places))]
        return [[match.row for match in one] for one in fill._passes(index, matches)]

    assert spread((1, 0, 8), (0, 0, 8), (0, 8, 8), (1, 8, 8)) == [[1, 2, 0, 3]]
    assert spread((0, 0, 8), (0, 4, 8), (1, 4, 8), (1, 4, 8)) == [[0, 2], [1, 3]]


def test_renaming_that_cannot_be(tmp_path: Path) -> None:
    holdfast.save({"a.w": np.ones(2), "b.w": np.ones(2)}, tmp_path / "x")
    target = {"w": np.zeros(2)}
    for rename, error, text in (
        ({"(": ""}, ValueError, "no regular expression"),
        ({"^(.)": r"\2"}, ValueError, "group"),
        ({"^[ab]\\.": ""}, ValueError, "'w' of both 'a.w' and 'b.w'"),
        ({"a": 3}, TypeError, "str to str"),
    ):
        with pytest.raises(error, match=text):
            holdfast.load_into(target, tmp_path / "x", rename=rename)  # type: ignore[arg-type]
    assert not target["w"].any()


def test_sizes_that_differ_are_told_as_torch_tells_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    saved = {"weight": torch.zeros(4, 3), "bias": torch.zeros(2)}
    with pytest.raises(RuntimeError) as theirs:
        module.load_state_dict(saved)
    holdfast.save(saved, tmp_path / "x")
    with pytest.raises(RuntimeError) as ours:
        holdfast.load_into(module, tmp_path / "x")
    assert str(ours.value) == f"{tmp_path / 'x'}: {theirs.value}"
