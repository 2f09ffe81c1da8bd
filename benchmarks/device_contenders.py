"""Who saves from a device and loads to it: a table, as that of :mod:`benchmarks.contenders`.

Limits stand in it too: what a copy through pinned memory takes, and what the raw file does.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import limits

#: Through how many blocks of which size the limits copy: as many as holdfast has.
BLOCK, BLOCKS = 16 << 20, 4
#: Memory of the device that the limits copy from and to, again and again.
SOURCE = 1 << 30
#: With how many threads a load reads: as many as there are cores, from two to eight.
READERS = min(8, max(2, limits.CPU_THREADS))


@dataclass(slots=True)
class Accelerator:
    """A device that torch has tensors on; ``"cpu"`` where the loop itself is tried."""

    name: str = "cuda:0"
    _blocks: list[Any] = field(default_factory=list)
    _memory: Any = None

    @property
    def real(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def number(self) -> int:
        return int(self.name.partition(":")[2] or 0)

    @property
    def code(self) -> int:
        """What :mod:`holdfast.staging` calls it."""
        from holdfast import staging

        return staging.resolve(self.name)

    def synchronize(self) -> None:
        """Wait until everything that was asked of it has been done."""
        import torch

        if self.real:
            torch.cuda.synchronize(self.name)

    def copies(self) -> Any:
        """What moves its bytes for holdfast; None for the host."""
        from holdfast import staging

        return staging.device(self.code) if self.code else None

    def free(self) -> None:
        """Give back what the allocators of the host and of the device keep for later."""
        import torch

        from holdfast import staging

        staging.release_pinned()
        if not self.real:
            return
        torch.cuda.empty_cache()
        if (pool := _cupy_pool()) is not None:
            pool.free_all_blocks()

    def allocated(self, *, anew: bool = False) -> tuple[int, int]:
        """Bytes of the device that are allocated, and that were at most since the last `anew`."""
        import torch

        if not self.real:
            return 0, 0
        if anew:
            torch.cuda.reset_peak_memory_stats(self.name)
        pool = _cupy_pool()
        beside = 0 if pool is None else int(pool.total_bytes())
        now = torch.cuda.memory_allocated(self.name)
        return now + beside, torch.cuda.max_memory_allocated(self.name) + beside

    def copy(self, nbytes: int, *, to_host: bool) -> list[tuple[Any, Any]]:
        """Copy so many bytes through blocks of pinned memory; the pairs that should be equal."""
        import torch

        size = min(SOURCE, max(nbytes, 1))
        if self._memory is None or len(self._memory) < size:
            self._memory = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.name)
        if not self._blocks:
            self._blocks = [
                torch.randint(0, 256, (BLOCK,), dtype=torch.uint8) for _ in range(BLOCKS)
            ]
            if self.real:
                self._blocks = [block.pin_memory() for block in self._blocks]
        last: dict[int, tuple[Any, Any]] = {}
        for i, offset in enumerate(range(0, nbytes, BLOCK)):
            length = min(BLOCK, nbytes - offset)
            start = offset % size
            there = self._memory[start : min(start + length, size)]
            here = self._blocks[i % BLOCKS][: len(there)]
            source, target = (there, here) if to_host else (here, there)
            target.copy_(source, non_blocking=True)
            last[i % BLOCKS] = (here, there)
        self.synchronize()
        return list(last.values())


def _cupy_pool() -> Any:
    """The memory pool of CuPy, if it is in use."""
    import sys

    cupy: Any = sys.modules.get("cupy")
    return None if cupy is None else cupy.get_default_memory_pool()


@dataclass(slots=True)
class Job:
    """What an action gets: tensors by name, all of them on the device; a path."""

    obj: dict[str, Any]
    path: Path
    accelerator: Accelerator
    block: limits.Block
    ram: bool


Around = Callable[[Accelerator], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of the table.

    Attributes
    ----------
    name, role : str
        As of :class:`benchmarks.contenders.Contender`.
    file : str
        Ending of its file. Those with the same one load the same file, saved by the first of them.
    save : callable, optional
        ``save(job, durable)``.
    load : callable, optional
        Returns the tensors by name; of a limit, what `check` asks for.
    check : callable, optional
        Of a limit: what is wrong with what it returned.
    needs : tuple of str
        Packages that have to be installed.
    cupy : bool
        Whether it saves arrays of CuPy, over the same memory.
    around : callable, optional
        A context manager for its samples, outside of the time.
    only : str
        ``"ram"`` or ``"disk"`` for one that belongs to that alone.
    """

    name: str
    role: str
    file: str
    save: Callable[[Job, bool], Any] | None = None
    load: Callable[[Job], Any] | None = None
    check: Callable[[Job, Any], list[str]] | None = None
    needs: tuple[str, ...] = ()
    cupy: bool = False
    around: Around | None = None
    only: str = ""

    def missing(self) -> str:
        """The first package it needs that is not installed, or ``""``."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), "")


# ---- holdfast ---------------------------------------------------------------------------------


def hold_save(job: Job, durable: bool) -> None:
    import holdfast

    holdfast.save(job.obj, job.path, durable=durable)


def hold_load(framework: str) -> Callable[[Job], Any]:
    def load(job: Job) -> Any:
        import holdfast

        where = job.accelerator.name
        return holdfast.load(job.path, map_location=where, mmap=False, framework=framework)

    return load


@contextlib.contextmanager
def torch_copies(accelerator: Accelerator) -> Iterator[None]:
    """Have torch do the copies, where CuPy would; LookupError where torch does them anyway."""
    from holdfast import staging

    usual = accelerator.copies()
    if type(usual).__name__ != "CupyDevice":
        raise LookupError("what stands as 'holdfast' is copied by torch already")
    from holdfast.staging.torch import TorchDevice

    staging.register(accelerator.code, TorchDevice(accelerator.number))
    try:
        yield
    finally:
        # What is pinned stays so, whoever pinned it: all contenders begin with the same.
        staging.register(accelerator.code, usual)


# ---- rivals -----------------------------------------------------------------------------------


def durably(save: Callable[[Job], None]) -> Callable[[Job, bool], None]:
    """What a careful user does after a save that does not sync."""

    def action(job: Job, durable: bool) -> None:
        save(job)
        if durable:
            limits.sync_file(job.path)
            limits.sync_directory(job.path)

    return action


def torch_save(job: Job) -> None:
    import torch

    torch.save(job.obj, job.path)


def torch_load(mmap: bool) -> Callable[[Job], Any]:
    def load(job: Job) -> Any:
        import torch

        where = job.accelerator.name
        return torch.load(job.path, map_location=where, weights_only=True, mmap=mmap)

    return load


def st_save(job: Job) -> None:
    from safetensors.torch import save_file

    save_file(job.obj, job.path)


def st_load(backend: str) -> Callable[[Job], Any]:
    def load(job: Job) -> Any:
        from safetensors.torch import load_file

        return load_file(job.path, device=job.accelerator.name, backend=backend)

    return load


# ---- limits -----------------------------------------------------------------------------------


def raw_save(direct: bool) -> Callable[[Job, bool], None]:
    def save(job: Job, durable: bool) -> None:
        # To reserve room on a file system of memory is to fill all of it twice.
        limits.write(job.block, job.path, direct=direct, durable=durable, reserve=not job.ram)

    return save


def raw_load(direct: bool) -> Callable[[Job], Any]:
    return lambda job: limits.read_over(job.path, direct=direct, threads=READERS)


def written(job: Job, result: Any) -> list[str]:
    return job.block.differences(limits.read(job.path, direct=False))


def all_read(job: Job, result: Any) -> list[str]:
    size = job.path.stat().st_size
    return [] if result == size else [f"expected {size} bytes, found {result}"]


def copied(job: Job, result: Any) -> list[str]:
    right = result and all(bool((here == there.cpu()).all()) for here, there in result)
    return [] if right else ["bytes differ in a block that was copied"]


def copy_to_host(job: Job, durable: bool) -> Any:
    return job.accelerator.copy(job.block.nbytes, to_host=True)


def copy_to_device(job: Job) -> Any:
    return job.accelerator.copy(job.block.nbytes, to_host=False)


# ---- the table --------------------------------------------------------------------------------

_TORCH = ("torch",)
_HOLD = ("holdfast", "torch")
_ST = ("safetensors", "torch")

CONTENDERS: tuple[Contender, ...] = (
    Contender("holdfast", "ours", "hold", hold_save, hold_load("torch"), needs=_HOLD),
    Contender(
        "holdfast, cupy arrays",
        "ours",
        "hold",
        hold_save,
        hold_load("cupy"),
        needs=(*_HOLD, "cupy"),
        cupy=True,
    ),
    Contender(
        "holdfast, copies by torch",
        "ours",
        "hold",
        hold_save,
        hold_load("torch"),
        needs=(*_HOLD, "cupy"),
        around=torch_copies,
    ),
    Contender("torch", "rival", "pt", durably(torch_save), torch_load(mmap=False), needs=_TORCH),
    Contender("torch, mmap", "rival", "pt", None, torch_load(mmap=True), needs=_TORCH),
    Contender("safetensors", "rival", "safetensors", durably(st_save), st_load("mmap"), needs=_ST),
    Contender("safetensors, pread", "rival", "safetensors", None, st_load("pread"), needs=_ST),
    Contender("pinned copy to the host", "limit", "", copy_to_host, check=copied, only="ram"),
    Contender(
        "pinned copy to the device", "limit", "", load=copy_to_device, check=copied, only="ram"
    ),
    Contender("raw pwrite", "limit", "raw", raw_save(direct=False), check=written),
    Contender(
        "raw O_DIRECT pwrite", "limit", "raw", raw_save(direct=True), check=written, only="disk"
    ),
    Contender("raw read", "limit", "raw", load=raw_load(direct=False), check=all_read),
    Contender(
        "raw O_DIRECT read", "limit", "raw", load=raw_load(direct=True), check=all_read, only="disk"
    ),
)
NAMES = tuple(contender.name for contender in CONTENDERS)


def writer(file: str) -> Contender:
    """Who saves the file that all contenders with this ending load."""
    return next(c for c in CONTENDERS if c.file == file and c.save and not c.missing())
