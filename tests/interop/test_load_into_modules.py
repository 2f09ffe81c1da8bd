"""Modules that have code of their own for being loaded: it runs, as under ``load_state_dict``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import fill

torch = pytest.importorskip("torch")
nn = torch.nn

Make = Callable[[], Any]


class Hooked(nn.Module):  # type: ignore[misc]
    """One whose older versions called a weight otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self._register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(state: Any, prefix: str, *_: Any) -> None:
        if f"{prefix}old.weight" in state:
            state[f"{prefix}fc.weight"] = state.pop(f"{prefix}old.weight") * 2


class Versioned(nn.Module):  # type: ignore[misc]
    """One that looks at which version saved it."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.seen: list[Any] = []

    def _load_from_state_dict(self, state: Any, prefix: str, note: Any, *rest: Any) -> None:
        self.seen.append(note.get("version"))
        if note.get("version") == 1:
            state[f"{prefix}scale"] = state[f"{prefix}scale"] + 100
        super()._load_from_state_dict(state, prefix, note, *rest)


class Extra(nn.Module):  # type: ignore[misc]
    """One with state that is no parameter."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def filled(module: Any) -> Any:
    for i, tensor in enumerate(module.state_dict().values()):
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + i)
    return module


def saved(obj: Any, kind: str, folder: Path) -> Any:
    """`obj` in a file of some kind: what to load it from."""
    path = folder / f"x.{kind.removeprefix('stream ')}"
    holdfast.save(obj, path)
    return io.BytesIO(path.read_bytes()) if kind.startswith("stream") else path


@pytest.mark.parametrize("kind", ["safetensors", "pt", "stream safetensors", "stream pt"])
@pytest.mark.parametrize("prefix", ["", "model.", "outer.model."])
def test_hooks_run(kind: str, prefix: str, tmp_path: Path) -> None:
    state = filled(Hooked()).state_dict()
    state["old.weight"] = state.pop("fc.weight")
    obj: Any = state
    for key in reversed(prefix.split(".")[:-1]):
        obj = {"epoch": 3, key: obj}
    file = saved(obj, kind, tmp_path)
    theirs, ours = Hooked(), Hooked()
    weight = ours.fc.weight

    theirs.load_state_dict(state)
    keys = holdfast.load_into(ours, file, prefix=prefix)

    assert keys == ([], [])
    assert ours.fc.weight is weight and torch.equal(weight, theirs.fc.weight)
    assert torch.equal(ours.fc.bias, theirs.fc.bias)


class Odd:
    """What no file may name unasked."""


@pytest.mark.parametrize("kind", ["safetensors", "pt", "stream safetensors", "stream pt"])
@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda state: {"m": state, "other": torch.ones(9)}, {"prefix": "m."}),
        (lambda state: {"m": state}, {"rename": {r"^m\.": ""}}),
        (lambda state: {"m": state}, {"rename": {r"^m\.": "model."}, "prefix": "model."}),
        (lambda state: {"m": {"n.o": state}, "m.n": 3}, {"prefix": "m.n.o."}),
        (lambda state: [torch.ones(2), {"m": state}], {"prefix": "1.m."}),
        (lambda state: {"m": state}, {"rename": {r"^m\.1\.scale$": "1.scale"}}),
    ],
)
def test_versions_are_found(kind: str, wrap: Any, options: Any, tmp_path: Path) -> None:
    """Where they are lost, what is up to date would be taken for old."""
    ours = nn.Sequential(nn.ReLU(), Versioned())
    state = nn.Sequential(nn.ReLU(), filled(Versioned())).state_dict()

    holdfast.load_into(ours, saved(wrap(state), kind, tmp_path), **options)

    assert ours[1].seen == [2] and ours[1].scale.tolist() == [0, 1, 2, 3]


def test_versions_of_a_module_that_was_wrapped(tmp_path: Path) -> None:
    net = nn.ModuleDict({"module": nn.Sequential(nn.ReLU(), filled(Versioned()))})
    path = saved({"model": net.state_dict()}, "pt", tmp_path)
    for options in (
        {"prefix": "model.module."},
        {"prefix": "model.", "rename": {r"^model\.module\.": "model."}},
    ):
        ours = nn.Sequential(nn.ReLU(), Versioned())
        holdfast.load_into(ours, path, **options)  # type: ignore[arg-type]
        assert ours[1].seen == [2]


def test_versions_beside_what_may_not_be_named(tmp_path: Path) -> None:
    state = nn.Sequential(nn.ReLU(), filled(Versioned())).state_dict()
    torch.save({"m": state, "odd": Odd()}, tmp_path / "x.pt")
    ours = nn.Sequential(nn.ReLU(), Versioned())
    holdfast.load_into(ours, tmp_path / "x.pt", prefix="m.")
    assert ours[1].seen == [2]


@pytest.mark.parametrize("notes", [5, [1], {0: 1}, {(1, 2): {}}, {"1": 7}, {"1": {}}])
def test_notes_that_are_none(notes: Any, tmp_path: Path) -> None:
    state = nn.Sequential(nn.ReLU(), filled(Versioned())).state_dict()
    state._metadata = notes
    torch.save(state, tmp_path / "x.pt")
    ours = nn.Sequential(nn.ReLU(), Versioned())
    holdfast.load_into(ours, tmp_path / "x.pt")
    assert ours[1].seen == [None]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "stream safetensors"])
@pytest.mark.parametrize("version", [1, 2, None])
def test_versions(kind: str, version: int | None, tmp_path: Path) -> None:
    net = nn.Sequential(nn.ReLU(), filled(Versioned()))
    state = net.state_dict()
    if version is None:
        state = dict(state)
    else:
        state._metadata["1"]["version"] = version
    theirs, ours = (nn.Sequential(nn.ReLU(), Versioned()) for _ in range(2))

    theirs.load_state_dict(state)
    holdfast.load_into(ours, saved({"m": state}, kind, tmp_path), prefix="m.")

    assert torch.equal(ours[1].scale, theirs[1].scale)
    assert ours[1].seen == theirs[1].seen == [version]


def test_versions_under_other_names(tmp_path: Path) -> None:
    state = nn.Sequential(nn.ReLU(), filled(Versioned())).state_dict()
    state._metadata["1"]["version"] = 1
    ours = nn.ModuleDict({"last": Versioned()})

    holdfast.load_into(ours, saved(state, "safetensors", tmp_path), rename={r"^1\.": "last."})

    assert ours["last"].scale.tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize(
    "extra", [{"step": 3, "history": [1.5]}, torch.arange(3), {"amax": torch.ones(2)}, b"bytes"]
)
def test_extra_state(kind: str, extra: Any, tmp_path: Path) -> None:
    state = nn.Sequential(filled(Extra(extra))).state_dict()
    ours = nn.Sequential(Extra(None))

    keys = holdfast.load_into(ours, saved({"m": state}, kind, tmp_path), prefix="m.")

    assert keys == ([], []) and ours[0].w.tolist() == [0, 1]
    assert repr(ours[0].state) == repr(extra)


class Counting(nn.Module):  # type: ignore[misc]
    """One that saves values that are no tensors, and lists of tensors."""

    def __init__(self, step: int = 0, preds: Any = ()) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.step, self.preds = step, list(preds)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}step"] = self.step
        destination[f"{prefix}preds"] = self.preds

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.step = state.pop(f"{prefix}step")
        self.preds = state.pop(f"{prefix}preds")
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "stream pt"])
@pytest.mark.parametrize("options", [{"prefix": "m."}, {"rename": {"^m.0": "0"}}])
def test_values_that_are_no_tensors(kind: str, options: Any, tmp_path: Path) -> None:
    net = nn.Sequential(filled(Counting(7, [torch.ones(2), torch.zeros(3)])))
    ours = nn.Sequential(Counting())
    file = saved({"m": net.state_dict(), "more": 1, "0.step": [3]}, kind, tmp_path)

    keys = holdfast.load_into(ours, file, **options)

    assert keys == ([], []) and ours[0].w.tolist() == [0, 1]
    assert ours[0].step == 7 and [len(tensor) for tensor in ours[0].preds] == [2, 3]


def test_values_that_may_not_be_named_are_told(tmp_path: Path) -> None:
    torch.save({"m": nn.Sequential(Extra(Odd())).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*_extra_state.*Odd"):
        holdfast.load_into(nn.Sequential(Extra(None)), tmp_path / "x.pt", prefix="m.")


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_module(tmp_path: Path) -> None:
    nets = [
        torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), dtype=torch.qint8)
        for _ in range(2)
    ]
    torch.save(nets[0].state_dict(), tmp_path / "x.pt")
    x = torch.randn(2, 4)
    assert not torch.equal(nets[0](x), nets[1](x))
    assert holdfast.load_into(nets[1], tmp_path / "x.pt") == ([], [])
    assert torch.equal(nets[0](x), nets[1](x))


class Wrapper(nn.Module):  # type: ignore[misc]
    """One whose state is that of another, and a count; it takes nothing else, and returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.step = nn.Linear(3, 2), 0

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {"model": self.net.state_dict(*args, **options), "step": self.step}

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        self.net.load_state_dict(state["model"])
        self.step = state["step"]


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_load_state_dict_of_its_own(kind: str, tmp_path: Path) -> None:
    net, ours = Wrapper(), Wrapper()
    filled(net.net)
    net.step = 3
    assert holdfast.load_into(ours, saved(net.state_dict(), kind, tmp_path)) == ([], [])
    assert ours.step == 3 and torch.equal(ours.net.weight, net.net.weight)


def test_a_load_state_dict_that_passes_on(tmp_path: Path) -> None:
    class Passing(nn.Linear):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **options: Any) -> Any:
            return super().load_state_dict(*args, **options)

    path = saved({"weight": torch.ones(2, 3), "more": torch.ones(1)}, "pt", tmp_path)
    assert holdfast.load_into(Passing(3, 2), path, strict=False) == (["bias"], ["more"])
    with pytest.raises(RuntimeError, match="Missing key"):
        holdfast.load_into(Passing(3, 2), path)


def test_one_that_an_instance_has(tmp_path: Path) -> None:
    ours, seen = nn.Linear(3, 2), []
    own = ours._load_from_state_dict
    ours._load_from_state_dict = lambda *args: seen.append(args[1]) or own(*args)
    holdfast.load_into(ours, saved(nn.Linear(3, 2).state_dict(), "pt", tmp_path))
    assert seen == [""]


@pytest.mark.parametrize("hook", [False, True])
def test_ties(hook: bool, tmp_path: Path) -> None:
    """A name is not missing that is another one of a tensor that there is."""
    ours = nn.ModuleDict({"e": nn.Embedding(3, 2), "h": nn.Linear(2, 3, bias=False)})
    ours["h"].weight = ours["e"].weight
    if hook:
        ours.register_load_state_dict_post_hook(lambda module, keys: None)
    path = saved({"e.weight": torch.ones(3, 2)}, "safetensors", tmp_path)
    assert holdfast.load_into(ours, path) == ([], [])
    assert ours["h"].weight.sum() == 6


@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_read_is_refused(strict: bool, tmp_path: Path) -> None:
    odd = np.array([{}, None], object)
    np.savez(tmp_path / "x.npz", **{"fc.weight": np.ones((2, 3), "f4"), "fc.bias": odd})
    with pytest.raises(holdfast.FormatError, match="Python objects"):
        holdfast.load_into(Hooked(), tmp_path / "x.npz", strict=strict)


def test_errors_of_hooks_are_what_they_are(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("mine")  # which is a RuntimeError

    ours = nn.Linear(3, 2)
    ours._register_load_state_dict_pre_hook(fail)
    with pytest.raises(NotImplementedError, match="^mine$"):
        holdfast.load_into(ours, saved(nn.Linear(3, 2).state_dict(), "pt", tmp_path))


def test_lazy_modules_get_their_shape(tmp_path: Path) -> None:
    net = nn.Sequential(filled(nn.Linear(3, 2)))
    ours = nn.Sequential(nn.LazyLinear(2))

    holdfast.load_into(ours, saved(net.state_dict(), "safetensors", tmp_path))

    assert torch.equal(ours[0].weight, net[0].weight) and torch.equal(ours[0].bias, net[0].bias)


@pytest.mark.parametrize("counted", [True, False])
def test_batch_normalization(
    counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files older than its counter are read; others straight into place."""
    calls: list[int] = []
    own = fill.hand_over
    monkeypatch.setattr(fill, "hand_over", lambda *a, **k: calls.append(1) or own(*a, **k))
    state = dict(filled(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))).state_dict())
    if not counted:
        del state["1.num_batches_tracked"]
    theirs, ours = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))

    theirs.load_state_dict(state)
    keys = holdfast.load_into(ours, saved(state, "safetensors", tmp_path))

    assert keys == ([], [])
    assert bool(calls) != counted
    assert all(torch.equal(a, b) for a, b in zip(
        ours.state_dict().values(), theirs.state_dict().values(), strict=True))  # fmt: skip


def test_names_that_do_not_match(tmp_path: Path) -> None:
    state = filled(Hooked()).state_dict()
    state["more"] = state.pop("fc.bias")
    path = saved(state, "safetensors", tmp_path)
    theirs, ours = Hooked(), Hooked()

    assert holdfast.load_into(ours, path, strict=False) == (["fc.bias"], ["more"])
    assert torch.equal(ours.fc.weight, state["fc.weight"])
    with pytest.raises(RuntimeError) as wanted:
        theirs.load_state_dict(state)
    with pytest.raises(RuntimeError) as caught:
        holdfast.load_into(ours, path)
    assert str(caught.value) == f"{path}: {wanted.value}"


def test_hooks_after_loading(tmp_path: Path) -> None:
    ours, calls = nn.Linear(3, 2), []

    def forgive(module: Any, keys: Any) -> None:
        calls.append(module)
        keys.missing_keys.clear()

    ours.register_load_state_dict_post_hook(forgive)
    path = saved({"weight": torch.ones(2, 3)}, "safetensors", tmp_path)

    assert holdfast.load_into(ours, path) == ([], [])
    assert calls == [ours] and ours.weight.sum() == 6


def test_damage_is_told_before_the_module_is_touched(tmp_path: Path) -> None:
    path = saved(filled(Hooked()).state_dict(), "safetensors", tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ours = Hooked()
    before = ours.fc.weight.clone()

    with pytest.raises(holdfast.FormatError, match="CRC-32"):
        holdfast.load_into(ours, path)
    assert torch.equal(ours.fc.weight, before)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_scalars_of_old_versions(kind: str, tmp_path: Path) -> None:
    """Before 0.4 a scalar had one dimension."""
    net = nn.Module()
    net.same, net.other = (nn.Parameter(torch.zeros(())) for _ in range(2))
    state = {"same": torch.ones(1), "other": torch.full((1,), 2.0, dtype=torch.float64)}

    holdfast.load_into(net, saved(state, kind, tmp_path))

    assert (net.same.item(), net.other.item()) == (1, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        holdfast.load_into(net, saved(state | {"same": torch.ones(2)}, kind, tmp_path))
    with pytest.raises(RuntimeError, match="size mismatch"):
        holdfast.load_into(nn.ParameterList([torch.zeros(1)]), saved(
            {"0": torch.ones(())}, kind, tmp_path))  # fmt: skip


def test_a_compiled_program_is_filled(tmp_path: Path) -> None:
    net = filled(nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        ours = torch.jit.script(nn.Linear(3, 2))

    holdfast.load_into(ours, saved(net.state_dict(), "safetensors", tmp_path))

    assert torch.equal(ours.weight, net.weight)


def test_no_copy_of_the_model_is_made(tmp_path: Path) -> None:
    """What is handed over is a map of the file."""
    path = tmp_path / "x.safetensors"
    holdfast.save({"fc.weight": np.ones((2, 3), "f4"), "fc.bias": np.ones(2, "f4")}, path)
    ours, seen = Hooked(), []

    def look(state: Any, *_: Any) -> None:
        seen.extend(tensor.data_ptr() for tensor in state.values())

    ours._register_load_state_dict_pre_hook(look)
    maps: list[str] = []
    ours.register_load_state_dict_post_hook(
        lambda *_: maps.extend(Path("/proc/self/maps").read_text().splitlines())
    )
    holdfast.load_into(ours, path)

    own = [line.split()[0].split("-") for line in maps if line.endswith("x.safetensors")]
    spans = [(int(a, 16), int(b, 16)) for a, b in own]
    weight = ours.fc.weight.data_ptr()
    assert not any(a <= weight < b for a, b in spans)
    assert len(seen) == 2 and all(any(a <= at < b for a, b in spans) for at in seen)
