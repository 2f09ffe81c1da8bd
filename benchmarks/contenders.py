"""Who is measured: a table. A row is data; nothing elsewhere asks for a contender by its name.

To add a rival, add a row. Its actions take a :class:`Job`; the keys are those of
:data:`benchmarks.operations.OPERATIONS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import actions as do
from . import limits
from .actions import Action, Job
from .objects import differences


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of the table.

    Attributes
    ----------
    name : str
    role : str
        ``"ours"``, ``"rival"`` or ``"limit"``.
    framework : str
        What it saves: ``"torch"``, ``"numpy"``, or ``"bytes"`` for the limits.
    file : str
        Ending of its file. Contenders with the same one read the same file, written by the first
        of them that has a ``save``; ``""`` for one that needs no file.
    actions : mapping of str to callable
        What it can do. An action that loads returns what it loaded.
    needs : tuple of str
        Packages that have to be installed.
    nested : bool
        Whether it holds more than a flat dict of tensors.
    """

    name: str
    role: str
    framework: str
    file: str
    actions: Mapping[str, Action]
    needs: tuple[str, ...] = ()
    nested: bool = False

    def missing(self) -> str:
        """The first package it needs that is not installed, or ``""``."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), "")


# ---- the table --------------------------------------------------------------------------------

CONTENDERS: tuple[Contender, ...] = (
    Contender("holdfast", "ours", "torch", "hold", do.hold("torch"), ("holdfast", "torch"), True),
    Contender("holdfast, numpy", "ours", "numpy", "hold", do.hold("numpy"), ("holdfast",), True),
    Contender(
        "torch",
        "rival",
        "torch",
        "pt",
        {
            "save": do.torch_save,
            "save-durable": do.durably(do.torch_save),
            "load": do.torch_load(mmap=False),
            "load-mapped": do.torch_load(mmap=True),
            "one": do.torch_one,
            "fill": do.fill_from(do.torch_load(mmap=False)),
        },
        ("torch",),
        True,
    ),
    Contender(
        "torch, mmap",
        "rival",
        "torch",
        "pt",
        {"fill": do.fill_from(do.torch_load(mmap=True))},
        ("torch",),
        True,
    ),
    Contender(
        "holdfast, .pt", "ours", "torch", "pt", do.hold_torch("torch"), ("holdfast", "torch"), True
    ),
    Contender(
        "holdfast, .pt, numpy",
        "ours",
        "numpy",
        "pt",
        do.hold_torch("numpy"),
        ("holdfast", "torch"),
        True,
    ),
    Contender(
        "safetensors.torch",
        "rival",
        "torch",
        "safetensors",
        {
            "save": do.st_torch_save,
            "save-durable": do.durably(do.st_torch_save),
            "load-mapped": do.st_torch_load,
            "one": do.st_one("pt"),
            "each": do.st_each("pt"),
            "fill": do.fill_from(do.st_torch_load),
        },
        ("safetensors", "torch"),
    ),
    Contender(
        "safetensors.numpy",
        "rival",
        "numpy",
        "safetensors",
        {
            "save": do.st_numpy_save,
            "save-durable": do.durably(do.st_numpy_save),
            "load": do.st_numpy_load,
            "one": do.st_one("np"),
            "each": do.st_each("np"),
        },
        ("safetensors",),
    ),
    Contender(
        "numpy.savez",
        "rival",
        "numpy",
        "npz",
        {
            "save": do.npz_save,
            "save-durable": do.durably(do.npz_save),
            "load": do.npz_load,
            "one": do.npz_one,
        },
    ),
    Contender(
        "holdfast, .npz", "ours", "numpy", "npz", do.hold_format("npz", "numpy"), ("holdfast",)
    ),
    Contender(
        "holdfast, snapshot",
        "ours",
        "torch",
        "snapshot",
        do.hold_format("oneflow", "torch"),
        ("holdfast", "torch"),
    ),
    Contender(
        "bare files",
        "limit",
        "torch",
        "snapshot",
        {"save": lambda job: limits.write_files(job.obj, job.path)},
        ("torch",),
    ),
    Contender(
        "holdfast, 8 shards",
        "ours",
        "torch",
        "shards",
        do.hold_shards(8, "torch"),
        ("holdfast", "torch"),
    ),
    Contender(
        "raw O_DIRECT pwrite",
        "limit",
        "bytes",
        "raw",
        {"save-durable": lambda job: limits.write(job.obj, job.path, direct=True, durable=True)},
    ),
    Contender(
        "raw pwrite",
        "limit",
        "bytes",
        "raw",
        {
            "save": lambda job: limits.write(job.obj, job.path, direct=False, durable=False),
            "save-durable": lambda job: limits.write(job.obj, job.path, direct=False, durable=True),
        },
    ),
    Contender(
        "raw read",
        "limit",
        "bytes",
        "raw",
        {"load": lambda job: limits.read(job.path, direct=False)},
    ),
    Contender(
        "memcpy out of a map",
        "limit",
        "bytes",
        "raw",
        {"load": lambda job: limits.read_mapped(job.path)},
    ),
    Contender(
        "raw O_DIRECT read",
        "limit",
        "bytes",
        "raw",
        {"load-uncached": lambda job: limits.read(job.path, direct=True)},
    ),
    Contender(
        "memcpy, fresh memory",
        "limit",
        "bytes",
        "",
        {"copy": lambda job: limits.copy_fresh(job.obj)},
    ),
    Contender(
        "memcpy, warm memory",
        "limit",
        "bytes",
        "",
        {"copy": lambda job: limits.copy_warm(job.obj)},
    ),
)


def check(job: Job, result: Any) -> list[str]:
    """Where what was loaded differs from what was saved."""
    if isinstance(job.obj, limits.Block):
        return job.obj.differences(result)
    return differences(job.obj, result)


def writer(file: str) -> Contender:
    """Who writes the file that all contenders with this ending read."""
    return next(c for c in CONTENDERS if c.file == file and "save" in c.actions and not c.missing())
