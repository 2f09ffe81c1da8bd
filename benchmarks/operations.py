"""What is measured, as a table, and the loop that measures it in interleaved rounds."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import limits, pagecache
from .actions import Job
from .contenders import CONTENDERS, Contender, check, writer
from .objects import map_tensors, raw_bytes, touch
from .samples import SECONDS, Sample, Skip
from .workloads import Material, Workload

#: Files of a workload stay in the page cache while they take up no more than this of the memory;
#: where they would take more, only the one that is loaded: memory that is free goes back to the
#: host of a virtual machine, and to get it again can take longer than what is measured.
KEPT = 0.5
#: Seconds of quiet after a sync, before a save is timed.
SETTLE = 0.2
#: More of a file than this in the page cache and a load is not cold.
COLD = 0.001


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to measure.

    Attributes
    ----------
    name, title : str
    actions : tuple of str
        Keys of ``Contender.actions``; a contender takes part with the first that it has.
    state : str
        What holds before it is timed: ``"saved"``: no file, nothing waiting to be written;
        ``"replaced"``: its file, nothing waiting to be written; ``"warm"``: the file wholly in the
        page cache; ``"cold"``: none of it; ``"again"``: what is there since the same was done to
        it cold.
    touched : bool
        Whether a byte of every page is read within the time, where the workload agrees.
    one : bool
        Whether it returns one tensor and not all.
    fills : bool
        Whether it fills memory: in the process, or in the page cache without an fsync.
    into : bool
        Whether it fills tensors that exist, which are all zeros before.
    """

    name: str
    title: str
    actions: tuple[str, ...]
    state: str
    touched: bool = False
    one: bool = False
    fills: bool = False
    into: bool = False


OPERATIONS: tuple[Operation, ...] = (
    Operation("save-durable", "save, fsync of file and directory", ("save-durable",), "saved"),
    Operation("save", "save, no fsync", ("save",), "saved", fills=True),
    Operation("save-over", "save over its file, no fsync", ("save",), "replaced", fills=True),
    Operation("fill", "fill tensors that exist, warm", ("fill",), "warm", fills=True, into=True),
    Operation("load-eager", "load into memory, warm", ("load", "copy"), "warm", True, fills=True),
    Operation("load-mapped", "load mapped, warm", ("load-mapped",), "warm", True),
    Operation(
        "load-cold", "load into memory, cold", ("load", "load-uncached"), "cold", True, fills=True
    ),
    Operation("load-cold-mapped", "load mapped, cold", ("load-mapped",), "cold", True, fills=True),
    Operation(
        "load-mapped-again", "load mapped, after a cold one", ("load-mapped",), "again", True
    ),
    Operation("open-one", "open and read one tensor, warm", ("one",), "warm", one=True),
    Operation("open-each", "open and take each tensor by its name, warm", ("each",), "warm", True),
)
NAMES = tuple(operation.name for operation in OPERATIONS)


class NotColdError(RuntimeError):
    """The page cache could not be made to forget a file."""


@dataclass(slots=True)
class Entrant:
    """A contender in one operation."""

    contender: Contender
    action: str
    job: Job


def entrants(
    material: Material,
    operation: Operation,
    directory: Path,
    skipped: Callable[[Skip], None],
    only: frozenset[str] = frozenset(),
) -> list[Entrant]:
    """Who takes part; the reasons of those who do not go to `skipped`."""
    workload = material.workload
    found: list[Entrant] = []
    for contender in CONTENDERS:
        action = next((a for a in operation.actions if a in contender.actions), None)
        if action is None or not wanted(workload, contender):
            continue
        if only and contender.name not in only:
            continue
        if reason := unfit(workload, contender):
            skipped(Skip(workload.name, operation.name, contender.name, reason))
            continue
        path = directory / f"{workload.name}.{contender.file}"
        found.append(
            Entrant(contender, action, Job(material.view(contender.framework), path, material.one))
        )
    return found


def unfit(workload: Workload, contender: Contender) -> str:
    """Why this contender cannot save that workload here, or ``""``."""
    if package := contender.missing():
        return f"{package} is not installed"
    if workload.nested and not contender.nested and contender.role != "limit":
        return "holds only a flat dict of tensors"
    return ""


def wanted(workload: Workload, contender: Contender) -> bool:
    """Whether the workload asks for contenders of that role."""
    return {"ours": True, "rival": workload.rivals, "limit": workload.limits}[contender.role]


def measure(
    material: Material,
    operation: Operation,
    samples: int,
    directory: Path,
    skipped: Callable[[Skip], None],
    only: frozenset[str] = frozenset(),
) -> Iterator[Sample]:
    """Yield `samples` samples of each contender, in rounds.

    Each round runs every contender once, in an order of its own (the same in every run), so that
    none always comes after the same other one. Round 0 is not recorded: it warms up what has to
    be, and there everything saved and loaded is compared, byte for byte, with what it should be.
    A contender that fails is skipped with its reason from then on.
    """
    field = entrants(material, operation, directory, skipped, only)
    for number in range(samples + 1):
        for entrant in random.Random(number).sample(field, len(field)):
            try:
                sample = _once(material, operation, entrant, number)
            except Exception as error:  # whatever a rival raises: say so and go on with the others
                skipped(_failure(material.workload, operation, entrant.contender, error))
                field.remove(entrant)
                continue
            finally:
                if operation.state == "saved":
                    remove(entrant.job.path)
            if sample is not None:
                yield sample


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _failure(
    workload: Workload, operation: Operation, contender: Contender, error: Exception
) -> Skip:
    """A skip; not a failure where the machine is the reason: no O_DIRECT, no way to be cold."""
    machine = isinstance(error, NotColdError) or (
        isinstance(error, OSError) and contender.role == "limit"
    )
    reason = f"{type(error).__name__}: {error}"
    return Skip(workload.name, operation.name, contender.name, reason, failed=not machine)


def _once(material: Material, operation: Operation, entrant: Entrant, number: int) -> Sample | None:
    job, act = entrant.job, entrant.contender.actions[entrant.action]
    if operation.into:
        job = dataclasses.replace(job, obj=map_tensors(job.obj, _blank))
    touched = operation.touched and material.workload.touched
    details = _prepare(operation, entrant, material)
    if operation.state == "again":
        touch(act(job))
    gc.collect()
    if operation.fills:
        limits.level(material.nbytes)
    began = time.perf_counter()
    result = act(job)
    acted = time.perf_counter()
    if touched:
        touch(result)
    ended = time.perf_counter()
    if number == 0:
        if problems := _problems(operation, entrant, job.obj if operation.into else result):
            raise AssertionError(f"wrong bytes: {'; '.join(problems)}")
        return None
    if touched:
        details |= {"action": acted - began, "touch": ended - acted}
    return Sample(
        material.workload.name,
        operation.name,
        entrant.contender.name,
        entrant.contender.role,
        number,
        ended - began,
        SECONDS,
        material.nbytes,
        material.count,
        details,
    )


def _blank(tensor: Any) -> Any:
    """A tensor like this one, of zeros that are in memory."""
    made = copy.deepcopy(tensor)
    raw_bytes(made)[:] = 0
    return made


def _prepare(operation: Operation, entrant: Entrant, material: Material) -> dict[str, float]:
    path = entrant.job.path
    if operation.state == "saved":
        remove(path)
        os.sync()
        time.sleep(SETTLE)
        return {}
    if not entrant.contender.file:
        return {}
    if operation.state == "replaced":
        if not path.exists():
            entrant.contender.actions[entrant.action](entrant.job)
        os.sync()
        time.sleep(SETTLE)
        return {}
    if not path.exists():
        author = writer(entrant.contender.file)
        author.actions["save"](Job(material.view(author.framework), path, material.one))
    if operation.state == "warm":
        others = [other for other in path.parent.iterdir() if other != path]
        if pagecache.share_of_memory([path, *others]) > KEPT:
            for other in others:
                pagecache.forget(other)
        return {"resident": pagecache.warm(path)}
    if (left := pagecache.drop(path)) > COLD:
        raise NotColdError(f"{left:.1%} of {path.name} stay in the page cache")
    return {"resident": left}


def _problems(operation: Operation, entrant: Entrant, result: Any) -> list[str]:
    job = entrant.job
    if operation.one:
        return check(Job(job.obj[job.one], job.path, job.one), result)
    if operation.state in ("saved", "replaced"):
        result = _read_back(entrant)
    return check(job, result)


def _read_back(entrant: Entrant) -> Any:
    """What the file of a save holds, by any contender that reads such files alike."""
    same = [entrant.contender, *(c for c in CONTENDERS if c.file == entrant.contender.file)]
    for contender in same:
        if contender.framework != entrant.contender.framework or contender.missing():
            continue
        for action in ("load", "load-mapped"):
            if action in contender.actions:
                return contender.actions[action](entrant.job)
    raise LookupError(f"nobody loads what {entrant.contender.name} saves")
