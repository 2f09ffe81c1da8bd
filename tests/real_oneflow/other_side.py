"""What runs in the interpreter that has the real OneFlow; its results go out as JSON.

Run as ``python other_side.py COMMAND FOLDER``. It knows holdfast only where the command says so.
"""

from __future__ import annotations

import hashlib
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


if __name__ == "__main__":
    _, command, place = sys.argv
    commands = {
        "load": load,
        "save": save,
        "here": here,
        "modules": modules,
        "foreign": foreign,
    }
    result = commands[command](Path(place))
    Path(place).with_suffix(".json").write_text(json.dumps(result))
