"""Command line of the benchmarks; ``benchmarks/README.md`` says how they measure."""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from . import (
    device_contenders,
    devices,
    imports,
    machine,
    memory,
    operations,
    programs,
    real_oneflow,
    report,
    workloads,
)
from .contenders import CONTENDERS
from .samples import Run, Sample, Skip, read, write_line
from .workloads import Material, Workload

RESULTS = Path(__file__).resolve().parent / "results"
OPERATIONS = (
    *operations.NAMES,
    *memory.NAMES,
    programs.NAME,
    *real_oneflow.NAMES,
    *devices.NAMES,
    imports.NAME,
)


def parser() -> argparse.ArgumentParser:
    names = ",".join(dict.fromkeys(w.name.partition("-")[0] for w in workloads.WORKLOADS))
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--workloads", default=names, help=f"comma-separated; default {names}")
    made.add_argument("--ops", default=",".join(OPERATIONS), help="comma-separated; default all")
    made.add_argument(
        "--contenders", default="", help="whole names, separated by semicolons; default all"
    )
    made.add_argument("--samples", type=int, default=5, help="of each figure; default 5")
    made.add_argument("--scale", type=float, default=1.0, help="of every workload; default 1")
    made.add_argument("--dir", type=Path, help="where the files are written; default: a temporary")
    made.add_argument("--out", type=Path, help="results (.jsonl, with a .md beside it)")
    made.add_argument("--list", action="store_true", help="say what there is, measure nothing")
    made.add_argument("--report", type=Path, metavar="FILE", help="show an earlier run's tables")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it all; 0 where everybody who took part saved and loaded the right bytes."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.list:
        print(listing())
        return 0
    if arguments.report:
        print(report.markdown(read(arguments.report)))
        return 0
    ops = arguments.ops.split(",")
    if unknown := [name for name in ops if name not in OPERATIONS]:
        made.error(f"unknown operation {unknown[0]!r}; there are {', '.join(OPERATIONS)}")
    only = frozenset(filter(None, arguments.contenders.split(";")))
    known = {contender.name for contender in CONTENDERS} | set(device_contenders.NAMES)
    if unknown := sorted(only - known):
        made.error(f"unknown contender {unknown[0]!r}; --list says which there are")
    if arguments.samples < 1 or arguments.scale <= 0:
        made.error("--samples has to be at least 1, --scale above 0")
    try:
        chosen = workloads.select(arguments.workloads)
    except ValueError as error:
        made.error(str(error))
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.dir))
    try:
        run = Run(machine.describe(directory, _asked(arguments)))
        if set(ops) & set(devices.NAMES) and (found := devices.describe()):
            run.machine["accelerator"] = found
            print(found, file=sys.stderr, flush=True)
        out = arguments.out or RESULTS / f"{machine.slug(run.machine)}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w") as f:
            write_line(f, "machine", run.machine)
            record(run, chosen, ops, only, arguments.samples, arguments.scale, directory, f)
    finally:
        shutil.rmtree(directory)
    text = report.markdown(run)
    out.with_suffix(".md").write_text(text)
    print(text)
    print(f"Samples: {out}", file=sys.stderr)
    return 1 if any(skip.failed for skip in run.skips) else 0


def _asked(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "workloads": arguments.workloads,
        "ops": arguments.ops,
        "contenders": arguments.contenders,
        "samples": arguments.samples,
        "scale": arguments.scale,
    }


def record(
    run: Run,
    chosen: list[Workload],
    ops: list[str],
    only: frozenset[str],
    samples: int,
    scale: float,
    directory: Path,
    out: TextIO,
) -> None:
    """Measure, keeping each sample in `run` and at once in `out`; all, or `only` some."""

    def skipped(skip: Skip) -> None:
        run.skips.append(skip)
        write_line(out, "skip", skip)
        print(f"  {skip.contender}: skipped: {skip.reason}", file=sys.stderr)

    def keep(title: str, found: Iterator[Sample]) -> None:
        began = time.monotonic()
        print(title, file=sys.stderr, flush=True)
        for sample in found:
            run.samples.append(sample)
            write_line(out, "sample", sample)
        print(f"  {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    for workload in chosen:
        material = Material.of(workload, scale)
        for operation in operations.OPERATIONS:
            if operation.name in ops and operation.name in workload.operations:
                found = operations.measure(material, operation, samples, directory, skipped, only)
                keep(f"{workload.name} {operation.name}", found)
        for path in directory.iterdir():
            operations.remove(path)
        # The processes that are measured build their own copy: one at a time is enough.
        nbytes, count = material.nbytes, material.count
        del material
        gc.collect()
        empty = Material(workload, None, nbytes, count, "")
        for name in memory.NAMES:
            if name in ops and name in workload.operations:
                found = memory.measure(empty, name, scale, samples, directory, skipped, only)
                keep(f"{workload.name} {name}", found)
    if programs.NAME in ops:
        keep(programs.NAME, programs.measure(samples, scale, directory, skipped))
    for name in real_oneflow.NAMES:
        if name in ops:
            keep(name, real_oneflow.measure(name, samples, scale, directory, skipped))
    for name in devices.NAMES:
        if name in ops:
            keep(name, devices.measure(name, samples, scale, directory, skipped, only))
    if imports.NAME in ops:
        keep(imports.NAME, imports.measure(samples, skipped))


def listing() -> str:
    """Workloads, operations and contenders, and who of them is missing here."""
    lines = ["workloads"]
    lines += [f"  {w.name:<17}{w.nbytes / 1e6:>8.1f} MB  {w.about}" for w in workloads.WORKLOADS]
    lines.append("operations")
    lines += [f"  {name:<17}{report.TITLES[name]}" for name in OPERATIONS]
    lines.append("contenders")
    for contender in CONTENDERS:
        missing = contender.missing()
        state = f"missing: {missing}" if missing else ", ".join(contender.actions)
        lines.append(f"  {contender.name:<22}{contender.role:<7}{state}")
    lines.append("contenders on devices")
    without = devices.absent()
    for each in device_contenders.CONTENDERS:
        missing = each.missing()
        state = f"missing: {missing}" if missing else without or "can be measured"
        lines.append(f"  {each.name:<28}{each.role:<7}{state}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
