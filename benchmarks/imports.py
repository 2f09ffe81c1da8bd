"""How long an import takes, in a process of its own that has done nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from .samples import SECONDS, Sample, Skip

NAME = "import"
TITLE = "import, in a new process (without the start of the interpreter)"
MODULES = {"holdfast": "ours", "numpy": "rival", "safetensors.numpy": "rival", "torch": "rival"}
_CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def measure(samples: int, skipped: Callable[[Skip], None]) -> Iterator[Sample]:
    """Yield `samples` samples of each module, in rounds; round 0 warms the disk's cache.

    Bytecode is kept, as it is for installed packages: otherwise what a checkout takes to compile
    would count.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for module in MODULES:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            skipped(Skip(NAME, NAME, module, f"{package} is not installed"))
        else:
            found.append(module)
    for number in range(samples + 1):
        start = number % max(1, len(found))
        for module in found[start:] + found[:start]:
            done = subprocess.run(
                [sys.executable, "-c", _CODE.format(module)],
                capture_output=True,
                text=True,
                env=environment,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                skipped(Skip(NAME, NAME, module, last, failed=True))
                found.remove(module)
            elif number:
                seconds = float(done.stdout)
                yield Sample(NAME, NAME, module, MODULES[module], number, seconds, SECONDS, 0, 0)
