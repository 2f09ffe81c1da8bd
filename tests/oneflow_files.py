"""OneFlow's checkpoints written by hand: plans laid out on a disk in the simplest way there is."""

from __future__ import annotations

import ctypes
import io
from collections import OrderedDict
from pathlib import Path

import numpy as np

from holdfast.formats import _oneflow_write
from holdfast.layout import FolderPlan
from holdfast.oneflow_saving import PlannedFile, PlannedFolder, plan_oneflow
from holdfast.publish import write_out
from holdfast.views import TensorBatch


def contents(batch: TensorBatch) -> list[bytes]:
    """The elements of each tensor in C order."""
    found = []
    for i in range(len(batch)):
        view = batch[i]
        if view.nbytes == 0:
            found.append(b"")
            continue
        strides = view.strides
        if strides is None:
            found.append(ctypes.string_at(view.address, view.nbytes))
            continue
        assert min(strides, default=0) >= 0
        size = view.dtype.itemsize
        reach = sum((n - 1) * step for n, step in zip(view.shape, strides, strict=True)) + size
        memory = ctypes.string_at(view.address, reach)
        array: np.ndarray = np.ndarray(view.shape, f"V{size}", memory, 0, strides)
        found.append(array.tobytes())
    return found


def write_folder(path: Path, plan: FolderPlan, batch: TensorBatch) -> None:
    """Write a folder, its last text after all else."""
    assert len(plan.paths) == len(batch)
    texts = dict(plan.texts)
    last = None if plan.last is None else texts.pop(plan.last)
    files = [*zip(plan.paths, contents(batch), strict=True), *texts.items()]
    for name, data in files:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(data)
    path.mkdir(exist_ok=True)
    if plan.last is not None and last is not None:
        (path / plan.last).write_bytes(last)


def save(obj: object, path: Path, layout: str = "snapshot") -> None:
    """Save an object as it is planned."""
    planned = plan_oneflow(obj, layout)
    if isinstance(planned, PlannedFolder):
        write_folder(path, planned.plan, planned.batch)
    else:
        path.write_bytes(single(planned))


def single(planned: PlannedFile) -> bytes:
    """A single file as a stream gets it."""
    out = io.BytesIO()
    write_out(
        out, planned.plan, planned.batch, _oneflow_write.seal,
        durable=False, checksum=False, threads=0, progress=None,
    )  # fmt: skip
    return out.getvalue()


def samples() -> dict[str, tuple[object, str]]:
    """Objects of NumPy's arrays that stand for what is saved, and the layout of each."""
    dtypes = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")
    every = {name: np.arange(6).reshape(2, 3).astype(name) for name in dtypes}
    every.update(scalar=np.array(7), empty=np.zeros((0, 3), "f4"), turned=every["float32"].T)
    state = OrderedDict((f"l{i}.weight", np.full((2, i), i, "f4")) for i in (1, 2, 3))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    training = {
        "model": state,
        "optimizer": {"state": {0: {"step": np.array(3)}}, "param_groups": [{"lr": 0.1}]},
        "again": state["l1.weight"],
        "values": [None, True, -1, 1 << 40, 2.5, "ü", b"\x00\xff", (1, {2})],
    }
    return {
        "every-snapshot": (every, "snapshot"),
        "state-snapshot": (state, "snapshot"),
        "every-pickle": (every, "pickle"),
        "training-pickle": (training, "pickle"),
        "every.file": (every, "file"),
        "training.file": (training, "file"),
    }
