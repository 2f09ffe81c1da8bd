"""How long it takes from the file of a TorchScript program to its first output, mapped and not.

Each sample is taken in a process of its own, which has imported what it needs and not loaded
anything before, as a server that starts.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from . import pagecache
from .samples import SECONDS, Sample, Skip

NAME = "program-first"
WORKLOAD = "program"
TITLE = "load a TorchScript program of 500 MB and get its first output, warm, in a new process"
NEEDS = ("torch", "holdfast")
#: Square float32 matrices that the program multiplies a vector with, one after the other.
LAYERS, WIDTH = 30, 2048

#: Name, role and the call that loads.
LOADERS = (
    ("holdfast", "ours", "holdfast.torch.jit.load(path, mmap=True)"),
    ("holdfast, read", "ours", "holdfast.torch.jit.load(path, mmap=False)"),
    ("torch.jit.load", "rival", "torch.jit.load(path)"),
)
_CODE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, holdfast.torch.jit
path, width = sys.argv[1], int(sys.argv[2])
vector = torch.ones(1, width)
vector @ torch.ones(width, 8)
with torch.no_grad():
    began = time.perf_counter()
    program = {}
    loaded = time.perf_counter()
    found = program(vector)
    ended = time.perf_counter()
print(json.dumps([ended - began, loaded - began, found.double().sum().item()]))
"""


def measure(
    samples: int, scale: float, directory: Path, skipped: Callable[[Skip], None]
) -> Iterator[Sample]:
    """Yield `samples` samples of each loader, in rounds; in round 0 the outputs are compared."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        for name, _, _ in LOADERS:
            skipped(Skip(WORKLOAD, NAME, name, f"{missing[0]} is not installed"))
        return
    path = directory / "program.pt"
    width = max(1, round(WIDTH * math.sqrt(scale)))
    expected = _write(path, width)
    size = LAYERS * width * width * 4
    field = list(LOADERS)
    for number in range(samples + 1):
        start = number % max(1, len(field))
        for row in field[start:] + field[:start]:
            name, role, call = row
            details = {"resident": pagecache.warm(path)}
            done = subprocess.run(
                [sys.executable, "-c", _CODE.format(call), str(path), str(width)],
                capture_output=True,
                text=True,
            )
            wrong = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
            if not wrong:
                seconds, details["action"], output = json.loads(done.stdout)
                wrong = "" if output == expected else f"output {output}, expected {expected}"
            if wrong:
                skipped(Skip(WORKLOAD, NAME, name, wrong, failed=True))
                field.remove(row)
            elif number:
                yield Sample(
                    WORKLOAD, NAME, name, role, number, seconds, SECONDS, size, LAYERS, details
                )
    path.unlink()


def _write(path: Path, width: int) -> float:
    """Save a program with torch itself; returns the sum of its output for a vector of ones."""
    import torch

    torch.manual_seed(3)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
    vector = torch.ones(1, width)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.jit.trace(torch.nn.Sequential(*layers).eval(), vector)
        torch.jit.save(program, path)
        return float(program(vector).double().sum().item())
