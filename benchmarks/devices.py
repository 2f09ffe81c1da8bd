"""Saving from a CUDA device and loading to one, to and from a RAM file system and a disk.

As :mod:`benchmarks.operations` measures what is in the memory of the host: rounds of which each
runs every contender once, the first of them to compare bytes. Times end when the device has done
everything. After the timed rounds come a few in which memory is watched instead. Which library
copies, and whether through pinned memory, is said before it begins and stands in the results.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import limits, machine, pagecache
from .device_contenders import CONTENDERS, Accelerator, Contender, Job, writer
from .operations import COLD, SETTLE, NotColdError, remove
from .samples import BYTES, SECONDS, Sample, Skip
from .workloads import llm_shapes

#: Operation -> title.
TITLES = {
    "device-save": "save from the device to a RAM file system",
    "device-load": "load to the device from a RAM file system",
    "device-save-disk": "save from the device to a disk, fsync of file and directory",
    "device-load-disk": "load to the device from a disk, cold",
}
NAMES = tuple(TITLES)
#: What is seen in the rounds in which memory is watched: operation -> title.
FIGURES = {
    f"device-{action}-{what}": f"{title} of a {action}, RAM file system"
    for action in ("save", "load")
    for what, title in (
        ("host", "peak memory of the host, pinned memory included,"),
        ("pinned", "peak pinned memory"),
        ("extra", "peak memory of the device beside the tensors"),
    )
}
#: How many rounds those are.
WATCHED = 3
PERIOD = 0.002
#: Of fewer bytes than that nothing is pinned, as holdfast has it.
PINNED_FROM = 64 << 20
UNPINNED = ", NOT PINNED"


@dataclass(frozen=True, slots=True)
class Workload:
    """What lies on the device: `make` returns tensors by name, of about `scale` * `nbytes`."""

    name: str
    nbytes: int
    make: Callable[[float, str], dict[str, Any]]


def _random(nbytes: int, device: str) -> Any:
    import torch

    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)


def _llm(scale: float, device: str) -> dict[str, Any]:
    import torch

    shapes = llm_shapes(scale * LLM / _LLM_1)
    return {
        name: _random(2 * math.prod(shape), device).view(torch.float16).view(shape)
        for name, shape in shapes.items()
    }


def _many(scale: float, device: str) -> dict[str, Any]:
    import torch

    count = max(1, round(20_000 * scale))
    rows = _random(count * 1024, device).view(torch.float32).view(count, 256)
    return {f"layers.{i}.weight": row.clone() for i, row in enumerate(rows)}


LLM = 8_000_000_000
_LLM_1 = 2 * sum(math.prod(shape) for shape in llm_shapes(1).values())
WORKLOADS = (
    Workload("device-llm", LLM, _llm),
    Workload("device-many", 20_000 * 1024, _many),
)


# ---- the device -------------------------------------------------------------------------------


def absent() -> str:
    """Why nothing can be measured here, or ``""``."""
    for package in ("holdfast", "torch"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch

    if torch.version.hip or not torch.version.cuda:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        Accelerator().copies()
    except RuntimeError as error:
        return str(error)
    return ""


def describe() -> str:
    """The device and what copies from and to it, for the record; ``""`` where there is none."""
    if absent():
        return ""
    import torch

    from holdfast import _engine

    accelerator = Accelerator()
    copies = accelerator.copies()
    buffer = _engine.allocate(16 << 20)
    try:
        copies.pin(buffer)
        copies.unpin(buffer)
        pinning = "through pinned memory"
    except Exception as error:
        pinning = f"NOT through pinned memory: {error}"
    memory = torch.cuda.get_device_properties(accelerator.name).total_memory / 2**30
    return (
        f"{torch.cuda.get_device_name(accelerator.name)}, {memory:.1f} GiB, CUDA "
        f"{torch.version.cuda}; copies by {path_of(copies)}, {pinning}"
    )


def path_of(copies: Any) -> str:
    """Which library does the copies."""
    made = type(copies).__name__
    library = {"CupyDevice": "cupy", "TorchDevice": "torch"}.get(made)
    return made if library is None else f"{library} {sys.modules[library].__version__}"


class Watch:
    """The memory that is taken inside a ``with`` block: of the host, pinned, of the device.

    The host's is sampled; pinning is counted where it is asked for.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.host = self.pinned = self.extra = 0

    def __enter__(self) -> Watch:
        gc.collect()
        self.accelerator.free()
        self._copies = self.accelerator.copies()
        self._now = 0
        if self._copies is not None:
            pin, unpin = self._copies.pin, self._copies.unpin
            self._copies.pin = lambda buffer: (pin(buffer), self._count(len(buffer)))[0]
            self._copies.unpin = lambda buffer: (unpin(buffer), self._count(-len(buffer)))[0]
        self._before = self.accelerator.allocated(anew=True)[0]
        self._resident = self._most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._most = max(self._most, resident())
        self._stop.set()
        self._thread.join()
        self.host = self._most - self._resident
        self.extra = max(0, self.accelerator.allocated()[1] - self._before)
        if self._copies is not None:
            del self._copies.pin, self._copies.unpin

    def _count(self, nbytes: int) -> None:
        self._now += nbytes
        self.pinned = max(self.pinned, self._now)

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD):
            self._most = max(self._most, resident())


def resident() -> int:
    """Bytes of the host's memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the loop ---------------------------------------------------------------------------------


def measure(
    operation: str,
    samples: int,
    scale: float,
    directory: Path,
    skipped: Callable[[Skip], None],
    only: frozenset[str] = frozenset(),
    accelerator: Accelerator | None = None,
) -> Iterator[Sample]:
    """Yield `samples` samples of each contender and workload, in rounds, and then of memory.

    Parameters
    ----------
    operation : str
        One of `NAMES`.
    accelerator : Accelerator, optional
        By default the first CUDA device; where there is none, all is skipped with the reason.
    """
    if accelerator is None:
        if reason := absent():
            for workload in WORKLOADS:
                skipped(Skip(workload.name, operation, "all", reason))
            return
        accelerator = Accelerator()
    if (copies := accelerator.copies()) is not None:
        print(f"  {accelerator.name}: copies by {path_of(copies)}", file=sys.stderr, flush=True)
    for workload in WORKLOADS:
        # Of a load, three files of the workload's size are there at a time, and one that is raw.
        needed = int(workload.nbytes * scale * (4.5 if "load" in operation else 1.5)) + (64 << 20)
        try:
            with _place(operation, directory, needed) as place:
                bench = _Bench(operation, workload, scale, place, skipped, only, accelerator)
                yield from bench.run(samples)
        except LookupError as error:
            skipped(Skip(workload.name, operation, "all", str(error)))


@contextlib.contextmanager
def _place(operation: str, directory: Path, needed: int) -> Iterator[Path]:
    """A folder on a file system of the kind, with room; LookupError where there is none."""
    disk = operation.endswith("-disk")
    why = f"{directory} is in memory: --dir names a disk" if disk else "no RAM file system"
    for folder in [directory] if disk else [directory, Path("/dev/shm")]:
        if not folder.is_dir() or _in_memory(folder) == disk:
            continue
        if (free := shutil.disk_usage(folder).free) < needed:
            why = f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
            continue
        made = Path(tempfile.mkdtemp(prefix="device-", dir=folder))
        try:
            yield made
        finally:
            shutil.rmtree(made)
        return
    raise LookupError(why)


def _in_memory(folder: Path) -> bool:
    return machine.filesystem(folder)["type"] in ("tmpfs", "ramfs")


@dataclass(slots=True)
class _Entrant:
    contender: Contender
    job: Job


class _Bench:
    """One operation on one workload."""

    def __init__(
        self,
        operation: str,
        workload: Workload,
        scale: float,
        place: Path,
        skipped: Callable[[Skip], None],
        only: frozenset[str],
        accelerator: Accelerator,
    ) -> None:
        self.operation, self.workload, self.skipped = operation, workload, skipped
        self.accelerator = accelerator
        self.saves = operation.startswith("device-save")
        self.disk = operation.endswith("-disk")
        tensors = workload.make(scale, accelerator.name)
        self.count = len(tensors)
        self.unpinned: set[str] = set()
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        block = limits.Block.random(self.nbytes)
        self.job = Job(tensors, place, accelerator, block, not self.disk)
        self.field = list(self._entrants(place, only))

    def _entrants(self, place: Path, only: frozenset[str]) -> Iterator[_Entrant]:
        for contender in CONTENDERS:
            if (contender.save if self.saves else contender.load) is None:
                continue
            if contender.only == ("ram" if self.disk else "disk"):
                continue
            if only and contender.name not in only:
                continue
            if package := contender.missing():
                self._skip(contender.name, f"{package} is not installed")
                continue
            if contender.cupy and not self.accelerator.real:
                self._skip(contender.name, "CuPy has no arrays on the host")
                continue
            path = place / f"{self.workload.name}.{contender.file or 'none'}"
            yield _Entrant(contender, replace(self.job, obj=self._seen(contender), path=path))

    def _seen(self, contender: Contender) -> dict[str, Any]:
        """The tensors as the contender has them, over the same memory."""
        if not contender.cupy:
            return self.job.obj
        import cupy

        return {name: cupy.from_dlpack(tensor) for name, tensor in self.job.obj.items()}

    def _skip(self, name: str, reason: str, *, failed: bool = False) -> None:
        self.skipped(Skip(self.workload.name, self.operation, name, reason, failed=failed))

    def run(self, samples: int) -> Iterator[Sample]:
        watched = 0 if self.disk else WATCHED
        for number in range(samples + 1 + watched):
            start = number % len(self.field) if self.field else 0
            for entrant in self.field[start:] + self.field[:start]:
                contender = entrant.contender
                try:
                    with (contender.around or _plainly)(self.accelerator):
                        if number <= samples:
                            yield from self._timed(entrant, number)
                        elif contender.role != "limit":
                            yield from self._watched(entrant, number - samples)
                except Exception as error:  # whatever a rival raises: go on with the others
                    here = isinstance(error, (NotColdError, LookupError)) or (
                        isinstance(error, OSError) and contender.role == "limit"
                    )
                    self._skip(contender.name, f"{type(error).__name__}: {error}", failed=not here)
                    self.field.remove(entrant)
                finally:
                    if self.saves:
                        remove(entrant.job.path)

    def _timed(self, entrant: _Entrant, number: int) -> Iterator[Sample]:
        details = self._prepare(entrant)
        gc.collect()
        if not (self.saves and self.disk):
            limits.level(self.nbytes)
        self.accelerator.synchronize()
        began = time.perf_counter()
        result = self._act(entrant)
        self.accelerator.synchronize()
        taken = time.perf_counter() - began
        self._note_path(entrant.contender)
        if number:
            yield self._sample(entrant.contender, self.operation, number, taken, SECONDS, details)
        elif wrong := self._problems(entrant, result):
            raise AssertionError(f"wrong bytes: {'; '.join(wrong[:5])}")

    def _note_path(self, contender: Contender) -> None:
        """Say loudly that a figure is not that of pinned memory; no target is judged by it."""
        if contender.role != "ours" or not self.accelerator.real or self.nbytes < PINNED_FROM:
            return
        from holdfast.staging import Staging
        from holdfast.staging.pool import POOL

        name = contender.name
        if not POOL.waiting(Staging().block_size) and name not in self.unpinned:
            self.unpinned.add(name)
            print(f"  {name}: NOT through pinned memory", file=sys.stderr, flush=True)

    def _watched(self, entrant: _Entrant, number: int) -> Iterator[Sample]:
        self._prepare(entrant)
        with Watch(self.accelerator) as watch:
            result = self._act(entrant)
            self.accelerator.synchronize()
        extra = watch.extra - (0 if self.saves or not self.accelerator.real else self.nbytes)
        del result
        found = {"host": watch.host, "pinned": watch.pinned, "extra": max(0, extra)}
        for what, value in found.items():
            if what == "pinned" and entrant.contender.role != "ours":
                continue  # what others pin is not seen
            key = f"{self.operation}-{what}"
            yield self._sample(entrant.contender, key, number, value, BYTES, {})

    def _act(self, entrant: _Entrant) -> Any:
        contender, job = entrant.contender, entrant.job
        if self.saves:
            assert contender.save is not None
            return contender.save(job, self.disk)
        assert contender.load is not None
        return contender.load(job)

    def _prepare(self, entrant: _Entrant) -> dict[str, float]:
        path = entrant.job.path
        if self.saves:
            remove(path)
            if self.disk:
                os.sync()
                time.sleep(SETTLE)
            return {}
        if not entrant.contender.file:
            return {}
        if not path.exists():
            author = writer(entrant.contender.file)
            assert author.save is not None
            author.save(replace(entrant.job, obj=self.job.obj), False)
        if not self.disk:
            return {"resident": pagecache.warm(path)}
        if (left := pagecache.drop(path)) > COLD:
            raise NotColdError(f"{left:.1%} of {path.name} stay in the page cache")
        return {"resident": left}

    def _problems(self, entrant: _Entrant, result: Any) -> list[str]:
        contender, job = entrant.contender, entrant.job
        if contender.check is not None:
            return contender.check(job, result)
        if self.saves:
            assert contender.load is not None
            result = contender.load(job)
        return differences(self.job.obj, result, self.accelerator.name)

    def _sample(
        self,
        contender: Contender,
        operation: str,
        number: int,
        value: float,
        unit: str,
        details: dict[str, float],
    ) -> Sample:
        return Sample(
            self.workload.name,
            operation,
            contender.name + (UNPINNED if contender.name in self.unpinned else ""),
            contender.role,
            number,
            value,
            unit,
            self.nbytes,
            self.count,
            details,
        )


@contextlib.contextmanager
def _plainly(accelerator: Accelerator) -> Iterator[None]:
    yield


def differences(expected: dict[str, Any], found: dict[str, Any], device: str) -> list[str]:
    """Where `found`, tensors of torch or arrays of CuPy, is not `expected`: on the device."""
    import torch

    wrong = [f"{name}: missing" for name in expected if name not in found]
    wrong += [f"{name}: unexpected" for name in found if name not in expected]
    for name, mine in expected.items():
        if name not in found:
            continue
        other = found[name]
        if not isinstance(other, torch.Tensor):
            other = torch.from_dlpack(other)
        if (mine.dtype, mine.shape, mine.device) != (other.dtype, other.shape, other.device):
            wrong.append(
                f"{name}: expected {mine.dtype}{tuple(mine.shape)} on {mine.device}, found "
                f"{other.dtype}{tuple(other.shape)} on {other.device}"
            )
        elif not torch.equal(_bytes(mine), _bytes(other)):
            wrong.append(f"{name}: bytes differ")
    return wrong


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)
