"""What runs in the interpreter that has the real OneFlow; its results go out as JSON.

Run as ``python other_side.py COMMAND FOLDER``. It knows holdfast only where the command says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import oneflow as flow


def flat(obj: Any, name: str = "") -> dict[str, Any]:
    """Every tensor in an object, by its path."""
    if isinstance(obj, flow.Tensor):
        return {name: obj}
    if isinstance(obj, flow.nn.Module):
        obj = obj.state_dict()
    pairs: Any = ()
    if isinstance(obj, dict):
        pairs = obj.items()
    elif isinstance(obj, list | tuple):
        pairs = enumerate(obj)
    found = {}
    for key, value in pairs:
        found.update(flat(value, f"{name}.{key}" if name else str(key)))
    return found


def digests(obj: Any) -> dict[str, list[Any]]:
    """Of every tensor what it is: type, element type, shape and a digest of its elements."""
    found = {}
    for name, tensor in flat(obj).items():
        array = np.ascontiguousarray(tensor.numpy()).reshape(tuple(tensor.shape))
        found[name] = [
            type(tensor).__name__,
            str(tensor.dtype).replace("oneflow.", ""),
            list(tensor.shape),
            hashlib.sha256(array.tobytes()).hexdigest(),
        ]
    return found


def network() -> Any:
    """A module with parameters and buffers, the same ones each time."""
    flow.manual_seed(7)
    layers = (flow.nn.Linear(4, 8), flow.nn.BatchNorm1d(8), flow.nn.ReLU(), flow.nn.Linear(8, 2))
    model = flow.nn.Sequential(*layers)
    optimizer = flow.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        flow.nn.functional.relu(model(flow.randn(6, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.optimizer_state = optimizer.state_dict()
    return model.eval()


def objects() -> dict[str, Any]:
    """What is saved, by the name of the file or folder."""
    model = network()
    optimizer = model.__dict__.pop("optimizer_state")
    dtypes = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")
    every = {name: flow.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(flow, name)) for name in dtypes}
    every.update(scalar=flow.tensor(3.5), empty=flow.zeros(0, 3), strided=flow.randn(4, 6).T[1:])
    state = model.state_dict()
    return {
        "state": state,
        "every": every,
        "training": {"model": state, "optimizer": optimizer, "step": 3, "ids": [flow.arange(4)]},
        "alone": flow.arange(5),
        "shared": OrderedDict(a=every["float32"], b=[every["float32"], None, ("x", 2.5)]),
    }


def load(folder: Path) -> dict[str, Any]:
    """What OneFlow finds in the folders, and Python's unpickler in the single files."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found[path.name] = digests(flow.load(str(path)))
        else:
            with path.open("rb") as file:
                content = pickle.load(file)
            assert content["protocol_version"] == 1
            assert content["__oneflow__"] is None
            found[path.name] = digests(content["data"])
    return found


def save(folder: Path) -> dict[str, Any]:
    """What OneFlow itself saves."""
    every = objects()
    for name, obj in every.items():
        flow.save(obj, str(folder / name))
    return {name: digests(obj) for name, obj in every.items()}


def here(folder: Path) -> dict[str, Any]:
    """Both ways with holdfast in this interpreter, with OneFlow's own tensors."""
    import holdfast.oneflow

    found = {}
    for name, obj in objects().items():
        for layout in ("snapshot", "pickle", "file"):
            path = folder / f"{name}-{layout}"
            holdfast.oneflow.save(obj, str(path), layout=layout)
            made = holdfast.oneflow.load(str(path))
            found[path.name] = digests(obj)
            if layout == "snapshot" and (path / "snapshot_done").exists():
                # A snapshot does not say which tensors are parameters.
                found[path.name] = digests({key: flow.Tensor(obj[key]) for key in obj})
            assert digests(made) == found[path.name], path
    return found


def modules(folder: Path) -> dict[str, Any]:
    """Whole modules, load_into, and weights of OneFlow's for others."""
    import holdfast
    import holdfast.oneflow

    model = network()
    model.__dict__.pop("optimizer_state")
    data = flow.randn(3, 4)
    expected = model(data).numpy()
    for layout in ("pickle", "file"):
        path = folder / f"module-{layout}"
        holdfast.oneflow.save(model, str(path), layout=layout)
        if layout == "pickle":
            made = flow.load(str(path))
        else:
            made = pickle.loads(path.read_bytes())["data"]
        assert type(made) is type(model)
        assert np.array_equal(made(data).numpy(), expected)
    flow.save(model.state_dict(), str(folder / "theirs"))
    holdfast.oneflow.save(model.state_dict(), str(folder / "ours"))
    for name in ("theirs", "ours"):
        target = network()
        for tensor in target.state_dict(keep_vars=True).values():
            tensor.data.zero_()
        keys = holdfast.load_into(target, folder / name)
        assert not keys.missing_keys
        assert not keys.unexpected_keys
        assert np.array_equal(target(data).numpy(), expected)
    wrong = flow.nn.Sequential(flow.nn.Linear(4, 9), flow.nn.BatchNorm1d(8))
    try:
        holdfast.load_into(wrong, folder / "ours")
    except RuntimeError as error:
        text = str(error)
    else:
        raise AssertionError("a shape that differs went through")
    holdfast.save(model.state_dict(), folder / "weights.safetensors")
    again = holdfast.load(folder / "weights.safetensors")
    assert digests(again) == digests(model.state_dict())
    return {"error": text}


def foreign(folder: Path) -> dict[str, Any]:
    """Files of torch's as OneFlow's tensors; torch is not installed here."""
    import holdfast.oneflow

    found = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = digests(holdfast.oneflow.load(str(path)))
    assert "torch" not in sys.modules
    return found


def global_tensors() -> dict[str, Any]:
    """Global ones on the only process there is, by how they are spread, and a local one."""
    place, sbp = flow.placement("cpu", ranks=[0]), flow.sbp
    values = flow.arange(12, dtype=flow.float32).reshape(4, 3)
    made = {
        "copied": values.to_global(placement=place, sbp=sbp.broadcast),
        "rows": (values + 1).to_global(placement=place, sbp=sbp.split(0)),
        "columns": (values + 2).to_global(placement=place, sbp=sbp.split(1)),
        "summed": (values + 3).to_global(placement=place, sbp=sbp.partial_sum),
    }
    assert all(tensor.is_global for tensor in made.values())
    return made


def error_of(call: Any) -> str:
    """What it raises, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def ranks(folder: Path) -> dict[str, Any]:
    """Global tensors: saved by process 0 of 1, loaded by it, in the one and the other library."""
    import holdfast
    import holdfast.oneflow

    tensors = global_tensors()
    expected = digests(tensors)
    flow.save(tensors, str(folder / "theirs"), global_dst_rank=0)
    for layout in ("snapshot", "pickle", "file"):
        holdfast.oneflow.save(tensors, str(folder / layout), 0, layout=layout)
    holdfast.oneflow.save(tensors, str(folder / "external"), 0, True)
    found: dict[str, Any] = {"tensors": expected, "places": {}}
    for path in sorted(folder.iterdir()):
        whole = holdfast.oneflow.load(str(path))
        assert not any(tensor.is_global for tensor in whole.values()), path
        assert digests(whole) == expected, path
        spread = {"ours": holdfast.oneflow.load(str(path), 0)}
        if path.is_dir() and not (path / "snapshot_done").exists():
            spread["theirs"] = flow.load(str(path), global_src_rank=0)
        for who, made in spread.items():
            assert digests(made) == expected, path
            kinds = {(str(t.placement), str(t.sbp)) for t in made.values() if t.is_global}
            found["places"][f"{path.name} {who}"] = [list(kind) for kind in sorted(kinds)]
    place = flow.placement("cpu", ranks=[0])
    moved = holdfast.oneflow.load(str(folder / "pickle"), map_location=place)
    assert all(tensor.is_global and tensor.placement == place for tensor in moved.values())
    assert digests(moved) == expected
    # A file has local ones, which a tensor of a module that is global does not take.
    module = flow.nn.Linear(3, 2).to_global(placement=place, sbp=flow.sbp.broadcast)
    state = {"weight": flow.zeros(2, 3), "bias": flow.zeros(2), "more": flow.zeros(1)}
    holdfast.oneflow.save(state, str(folder / "state"))
    partly = flow.nn.Linear(3, 2)
    partly.register_parameter("weight", module.weight)
    found["errors"] = {
        "theirs": error_of(lambda: module.load_state_dict(state)),
        "ours": error_of(lambda: holdfast.load_into(module, folder / "state")),
        "theirs, partly": error_of(lambda: partly.load_state_dict(state, strict=False)),
        "ours, partly": error_of(
            lambda: holdfast.load_into(partly, folder / "state", strict=False)
        ),
        "missing": error_of(lambda: holdfast.load_into({"x": module.weight}, folder / "state")),
        "rank 1": error_of(lambda: holdfast.oneflow.load(str(folder / "state"), 1)),
        "no rank": error_of(lambda: holdfast.oneflow.save(tensors, str(folder / "none"))),
        "text": error_of(lambda: holdfast.oneflow.save(tensors, str(folder / "none"), "x")),
    }
    assert not (folder / "none").exists()
    return found


class Doubled(flow.nn.Graph):
    """A graph around a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = flow.nn.Sequential(flow.nn.Linear(3, 4), flow.nn.BatchNorm1d(4)).eval()

    def build(self, data: Any) -> Any:
        return self.inner(data) * 2


def graphs(folder: Path) -> dict[str, Any]:
    """Graphs themselves, which OneFlow saves, and what their ``state_dict`` returns."""
    import holdfast
    import holdfast.oneflow

    data = flow.randn(5, 3)
    graph = Doubled()
    early = error_of(lambda: holdfast.oneflow.save(graph, str(folder / "early")))
    expected = graph(data).numpy()
    holdfast.oneflow.save(graph, str(folder / "graph"))
    assert (folder / "graph" / "model.mlir").is_file()
    buffer = error_of(lambda: holdfast.oneflow.save(graph, io.BytesIO()))
    state = graph.state_dict()
    values = digests(state)
    # A graph's folder does not say which tensors are parameters.
    plain = {name: flow.Tensor(tensor) for name, tensor in flat(state).items()}
    assert digests(holdfast.oneflow.load(str(folder / "graph"))) == digests(plain)
    saves: dict[str, Any] = {
        "snapshot": lambda path: holdfast.oneflow.save(state, str(path)),
        "file": lambda path: holdfast.oneflow.save(state, str(path), layout="file"),
        "state.safetensors": lambda path: holdfast.save(state, path),
        "oneflow": lambda path: holdfast.save(state, path, format="oneflow"),
        "theirs": lambda path: flow.save(state, str(path)),
    }
    for name, save in saves.items():
        save(folder / name)
        loads = [holdfast.load, holdfast.oneflow.load]
        if (folder / name / "pickled_data").exists():
            loads.append(lambda path: flow.load(str(path)))
        for load in loads:
            made = load(folder / name)
            assert type(made) is type(state) and list(made) == list(state), name
            assert digests(made) == values, name
            target = Doubled()
            target.load_state_dict(made)
            assert np.array_equal(target(data).numpy(), expected), name
    return {"values": values, "errors": [early, buffer]}


def oldest(folder: Path) -> dict[str, Any]:
    """A module filled from variables of which nothing is said."""
    import holdfast

    state = network().state_dict()
    for name, tensor in state.items():
        (folder / "old" / name).mkdir(parents=True)
        (folder / "old" / name / "out").write_bytes(tensor.numpy().tobytes())
    (folder / "old" / "snapshot_done").touch()
    target = network()
    for tensor in target.state_dict(keep_vars=True).values():
        tensor.data.zero_()
    assert holdfast.load_into(target, folder / "old") == ([], [])
    assert digests(target) == digests(state)
    wrong = flow.nn.Sequential(flow.nn.Linear(4, 9))
    text = error_of(lambda: holdfast.load_into(wrong, folder / "old", strict=False))
    return {"values": digests(target), "error": text}


def narrow(folder: Path) -> dict[str, Any]:
    """bfloat16, in the only way in which OneFlow reads it: in a pickle, as float32."""
    import holdfast.oneflow

    tensor = flow.tensor([[1.5, -2.25, 3.0], [0.0, 1e30, 7.0]]).to(flow.bfloat16)
    expected = digests({"x": tensor})
    assert expected["x"][1] == "bfloat16"
    holdfast.oneflow.save({"x": tensor}, str(folder / "ours"), layout="file")
    with (folder / "theirs").open("wb") as file:
        content = {"protocol_version": 1, "__oneflow__": None, "data": {"x": tensor}}
        pickle.dump(content, file)
    for name in ("ours", "theirs"):
        assert digests(holdfast.oneflow.load(str(folder / name))) == expected
        assert digests(pickle.loads((folder / name).read_bytes())["data"]) == expected
    (folder / "ours").unlink()
    (folder / "theirs").unlink()
    return load(folder)


if __name__ == "__main__":
    _, command, place = sys.argv
    commands = {
        "load": load,
        "save": save,
        "here": here,
        "modules": modules,
        "foreign": foreign,
        "ranks": ranks,
        "graphs": graphs,
        "narrow": narrow,
        "oldest": oldest,
    }
    result = commands[command](Path(place))
    Path(place).with_suffix(".json").write_text(json.dumps(result))
