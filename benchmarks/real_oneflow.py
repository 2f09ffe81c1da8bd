"""OneFlow itself as a rival: 553 MB saved and loaded in the interpreter that has it.

OneFlow runs on older Pythons than most of the rest here, so all of it happens in a process of the
interpreter that ``HOLDFAST_ONEFLOW_PYTHON`` names, in which holdfast is installed too. Tensors are
OneFlow's for both; what is loaded is a folder that OneFlow saved.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from .samples import SECONDS, Sample, Skip
from .workloads import vgg16_shapes

VARIABLE = "HOLDFAST_ONEFLOW_PYTHON"
WORKLOAD = "oneflow"
#: Operation -> title.
TITLES = {
    "oneflow-save": "save a state dict of OneFlow's of 553 MB, no fsync, as a folder",
    "oneflow-load": "load a folder that OneFlow saved, of 553 MB, warm, to OneFlow tensors",
}
NAMES = tuple(TITLES)
OURS, RIVAL = "holdfast", "oneflow"

_CODE = """
import gc, json, pathlib, shutil, sys, time
import numpy as np, oneflow as flow, holdfast.oneflow as hold
operation, folder, samples = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
rng = np.random.Generator(np.random.SFC64(5))
shapes = json.load(sys.stdin)
state = {name: flow.from_numpy(rng.random(shape, np.float32)) for name, shape in shapes}
saves = {"holdfast": hold.save, "oneflow": flow.save}
loads = {"holdfast": hold.load, "oneflow": flow.load}

def check(found):
    for name, tensor in state.items():
        assert np.array_equal(found[name].numpy(), tensor.numpy()), name

def once(name, number):
    path = folder / f"{operation}-{name}"
    if operation == "oneflow-save":
        began = time.perf_counter()
        saves[name](state, str(path))
        taken = time.perf_counter() - began
        if number == 0:
            check(flow.load(str(path)))
        shutil.rmtree(path)
        return taken
    for file in (folder / "saved").rglob("*"):
        if file.is_file():
            file.read_bytes()
    gc.collect()
    began = time.perf_counter()
    found = loads[name](str(folder / "saved"))
    taken = time.perf_counter() - began
    if number == 0:
        check(found)
    return taken

if operation == "oneflow-load":
    flow.save(state, str(folder / "saved"))
names = list(saves)
for number in range(samples + 1):
    for name in names[number % 2:] + names[:number % 2]:
        taken = once(name, number)
        if number:
            print(json.dumps([name, number, taken]), flush=True)
"""


def measure(
    operation: str, samples: int, scale: float, directory: Path, skipped: Callable[[Skip], None]
) -> Iterator[Sample]:
    """Yield `samples` samples of both, in turn; what round 0 saves and loads is compared."""
    python = os.environ.get(VARIABLE)
    if not python:
        for name in (OURS, RIVAL):
            skipped(Skip(WORKLOAD, operation, name, f"{VARIABLE} names no interpreter"))
        return
    shapes = list(vgg16_shapes(scale).items())
    done = subprocess.run(
        [python, "-c", _CODE, operation, str(directory), str(samples)],
        input=json.dumps(shapes),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        skipped(Skip(WORKLOAD, operation, OURS, reason, failed=True))
    nbytes = 4 * sum(math.prod(shape) for _, shape in shapes)
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, number, taken = json.loads(line)
            role = "ours" if name == OURS else "rival"
            yield Sample(
                WORKLOAD, operation, name, role, number, taken, SECONDS, nbytes, len(shapes)
            )
