"""What was promised, as a table, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from .samples import Run

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach: medians of `ours` against the best median of `against`.

    Attributes
    ----------
    workload, operation : str
    against : tuple of str
        Names of contenders; the best of them counts. Empty: the figure itself is bounded.
    required : float
        At least this many times as fast as `against`; with `at_most`, at most this many times as
        long; without `against`, at most this many bytes.
    slowest : bool
        Not the best but the slowest of `against` counts, and there is a verdict only where all of
        them were measured: parts of a pipe, which is as fast as the slowest.
    """

    workload: str
    operation: str
    against: tuple[str, ...]
    required: float
    at_most: bool = False
    ours: str = "holdfast"
    slowest: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what a run says of it; `found` is None where the run did not measure it."""

    target: Target
    found: float | None

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        if self.target.at_most or not self.target.against:
            return self.found <= self.target.required
        return self.found >= self.target.required

    def words(self) -> tuple[str, str, str, str]:
        """What, against what, required and found, as a reader wants them."""
        target = self.target
        what = f"{target.workload} {target.operation}".replace("import import", "import")
        what = what.replace("device-llm device-", "device-llm ")
        what = what.replace("device-many device-", "device-many ")
        what += target.ours.removeprefix("holdfast")
        show = _SHOW["bytes" if not target.against else "limit" if target.required < 1 else "times"]
        found = "not measured" if self.found is None else show(self.found)
        sign = "≤" if target.at_most or not target.against else "≥"
        against = " / ".join(target.against) or "—"
        if target.slowest:
            against = f"the slower of {against}"
        return what, against, f"{sign} {show(target.required)}", found


_SHOW: dict[str, Callable[[float], str]] = {
    "bytes": lambda value: f"{value / MIB:.1f} MiB",
    "limit": lambda value: f"{value:.0%}",
    "times": lambda value: f"{value:.2f} x" if value < 10 else f"{value:.0f} x",
}

#: holdfast on the files of torch.save.
PT = "holdfast, .pt"
SNAPSHOT = "holdfast, snapshot"
NPZ = "holdfast, .npz"
SHARDS = "holdfast, 8 shards"
RAW_READ = ("raw read", "raw O_DIRECT read")
#: What torch.load and safetensors' load_file can be asked for.
TORCH_LOADS = ("torch", "torch, mmap")
SAFETENSORS_LOADS = ("safetensors", "safetensors, pread")
SAVE_LIMITS = ("pinned copy to the host", "raw pwrite")
LOAD_LIMITS = ("pinned copy to the device", "raw read")

TARGETS: tuple[Target, ...] = (
    Target("llm", "save-durable", ("torch",), 3),
    Target("llm", "save-durable", ("safetensors.torch",), 1.8),
    Target("llm", "save-durable", ("raw O_DIRECT pwrite",), 0.85),
    Target("llm", "save", ("torch",), 1.8),
    Target("llm", "save", ("safetensors.torch",), 1.3),
    Target("many", "save", ("torch",), 30),
    Target("many", "save", ("safetensors.torch",), 30),
    Target("llm", "load-eager", ("torch",), 3.5),
    Target("llm", "load-eager", ("memcpy, fresh memory",), 0.8),
    Target("llm", "load-mapped", ("safetensors.torch",), 1),
    Target("many", "load-mapped", ("safetensors.torch",), 30),
    Target("many", "load-mapped", ("torch",), 80),
    Target("many", "open-one", ("safetensors.torch",), 10),
    Target("llm", "load-cold", RAW_READ, 0.95),
    Target("llm", "memory-save", (), 64 * MIB),
    Target("llm", "memory-fill", (), 64 * MIB),
    Target("train", "memory-save", (), 64 * MIB),
    Target("train", "memory-fill", (), 64 * MIB),
    Target("import", "import", ("numpy",), 1.5, at_most=True),
    Target("llm", "save-durable", ("torch",), 2.5, ours=PT),
    Target("llm", "save", ("torch",), 1.5, ours=PT),
    Target("many", "save", ("torch",), 10, ours=PT),
    Target("llm", "load-eager", ("torch",), 3.5, ours=PT),
    Target("many", "load-mapped", ("torch",), 20, ours=PT),
    Target("many", "load-eager", ("torch",), 20, ours=f"{PT}, numpy"),
    Target("program", "program-first", ("torch.jit.load",), 3),
    Target("llm", "save-durable", ("holdfast",), 0.8, ours=SNAPSHOT),
    Target("llm", "load-eager", ("holdfast",), 0.8, ours=SNAPSHOT),
    Target("many", "save", ("bare files",), 1.3, at_most=True, ours=SNAPSHOT),
    Target("llm", "save", ("numpy.savez",), 3, ours=NPZ),
    Target("llm", "load-eager", ("numpy.savez",), 3, ours=NPZ),
    Target("llm", "load-eager", ("holdfast",), 0.95, ours=SHARDS),
    Target("oneflow", "oneflow-save", ("oneflow",), 3),
    Target("oneflow", "oneflow-load", ("oneflow",), 3),
    Target("device-llm", "device-save", SAVE_LIMITS, 0.85, slowest=True),
    Target("device-llm", "device-save", ("torch",), 4),
    Target("device-llm", "device-save", ("safetensors",), 3),
    Target("device-llm", "device-load", LOAD_LIMITS, 0.85, slowest=True),
    Target("device-llm", "device-load", TORCH_LOADS, 4),
    Target("device-llm", "device-load", SAFETENSORS_LOADS, 2),
    Target("device-many", "device-save", ("torch",), 20),
    Target("device-many", "device-save", ("safetensors",), 10),
    Target("device-many", "device-load", TORCH_LOADS, 20),
    Target("device-many", "device-load", SAFETENSORS_LOADS, 10),
    Target("device-llm", "device-save-pinned", (), 64 * MIB),
    Target("device-llm", "device-load-pinned", (), 64 * MIB),
    Target("device-llm", "device-save-host", (), 96 * MIB),
    Target("device-llm", "device-load-host", (), 96 * MIB),
    Target("device-llm", "device-save-extra", (), 64 * MIB),
    # The tensors alone: what allocators round sizes up to is not held against it.
    Target("device-llm", "device-load-extra", (), 1 * MIB),
)


def judge(run: Run, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target with what the run found."""
    return [Verdict(target, _found(run, target)) for target in targets]


def _found(run: Run, target: Target) -> float | None:
    ours = run.values(target.workload, target.operation, target.ours)
    if not ours:
        return None
    if not target.against:
        return median(ours)
    theirs = [
        median(values)
        for name in target.against
        if (values := run.values(target.workload, target.operation, name))
    ]
    if not theirs or (target.slowest and len(theirs) < len(target.against)):
        return None
    ratio = (max if target.slowest else min)(theirs) / median(ours)
    return 1 / ratio if target.at_most else ratio
