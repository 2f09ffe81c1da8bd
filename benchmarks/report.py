"""The tables of a run: text for the terminal and Markdown for the results folder."""

from __future__ import annotations

from typing import Any

from . import device_contenders, devices, imports, memory, programs, real_oneflow
from .contenders import CONTENDERS
from .operations import OPERATIONS
from .samples import SECONDS, Run, Sample, Spread
from .targets import judge

TITLES = {operation.name: operation.title for operation in OPERATIONS}
TITLES |= memory.TITLES
TITLES[programs.NAME] = programs.TITLE
TITLES |= real_oneflow.TITLES
TITLES |= devices.TITLES | devices.FIGURES
TITLES[imports.NAME] = imports.TITLE

_ORDER = {contender.name: i for i, contender in enumerate(CONTENDERS)}
_ON_DEVICES = {name: i for i, name in enumerate(device_contenders.NAMES)}

Row = tuple[str, ...]


def markdown(run: Run) -> str:
    """The whole report."""
    parts = ["# Benchmark run", _machine(run.machine), "## Targets", _targets(run)]
    workload = ""
    for name, operation, group in run.groups():
        if name != workload:
            workload = name
            first = next(iter(group.values()))[0]
            size = f": {first.nbytes / 1e6:,.1f} MB in {first.tensors:,} tensors"
            parts.append(f"## {name}{size if first.tensors else ''}")
        parts += [f"### {operation}: {TITLES.get(operation, operation)}", _group(group)]
    scaling = _scaling(run)
    if scaling:
        parts += ["## Cost of each tensor, µs (medians)", scaling]
    if run.skips:
        parts += ["## Not measured", _skips(run)]
    return "\n\n".join(parts) + "\n"


def table(head: Row, rows: list[Row]) -> str:
    """A Markdown table with its columns lined up; all but the first to the right."""
    cells = [head, *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]

    def line(row: Row) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), "| " + " | ".join(rule) + " |", *map(line, cells[1:])])


def _machine(machine: dict[str, Any]) -> str:
    packages = [f"{k} {v}" for k, v in (machine.get("packages") or {}).items() if v]
    disk = machine.get("filesystem") or {}
    commit = str(machine.get("commit") or "unknown")[:12]
    lines = [
        f"{machine.get('date')}, commit {commit}{' with changes' if machine.get('dirty') else ''}",
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, "
        f"Linux {machine.get('kernel')}, {disk.get('type')} on {disk.get('device')}",
        f"Python {machine.get('python')}, {', '.join(packages)}",
        *([f"accelerator: {machine['accelerator']}"] if machine.get("accelerator") else []),
        f"arguments: {machine.get('arguments')}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _targets(run: Run) -> str:
    rows: list[Row] = []
    for verdict in judge(run):
        met = {True: "met", False: "NOT met", None: "—"}[verdict.met]
        rows.append((*verdict.words(), met))
    return table(("holdfast", "against", "required", "found", ""), rows)


def _group(group: dict[str, list[Sample]]) -> str:
    operation = next(iter(group.values()))[0].operation
    order = _ON_DEVICES if operation.startswith("device-") else _ORDER
    # Rows stand in the order of the table of contenders.
    names = sorted(group, key=lambda name: order.get(name, len(order)))
    ours = group[names[0]] if group[names[0]][0].role == "ours" else []
    base = Spread.of(s.value for s in ours).median if ours else 0.0
    rows: list[Row] = []
    for name in names:
        samples = group[name]
        spread = Spread.of(s.value for s in samples)
        rows.append(
            (
                f"{name} (limit)" if samples[0].role == "limit" else name,
                *_spread(spread, samples[0].unit),
                _rate(spread.median, samples[0]),
                f"{spread.median / base:.2f}" if base else "",
                str(spread.count),
            )
        )
    unit = next(iter(group.values()))[0].unit
    head = "s" if unit == SECONDS else "MiB"
    return table(
        ("contender", f"median {head}", "min … max", "quartiles", "rate", "÷ holdfast", "n"), rows
    )


def _spread(spread: Spread, unit: str) -> tuple[str, str, str]:
    def show(value: float) -> str:
        return f"{value:.4f}" if unit == SECONDS else f"{value / 2**20:.1f}"

    return (
        show(spread.median),
        f"{show(spread.low)} … {show(spread.high)}",
        f"{show(spread.quarter)} … {show(spread.three_quarters)}",
    )


def _rate(value: float, sample: Sample) -> str:
    """GB/s where bytes are what costs, µs for each tensor where tensors are.

    Of memory, the part that the kernel could not take back.
    """
    if "anon" in sample.details:
        return f"{sample.details['anon'] / 2**20:.1f} MiB anon"
    if sample.unit != SECONDS or not sample.tensors or not value or sample.operation == "open-one":
        return ""
    if sample.nbytes / sample.tensors < 65536:
        return f"{value / sample.tensors * 1e6:.2f} µs/tensor"
    return f"{sample.nbytes / value / 1e9:.2f} GB/s"


def _skips(run: Run) -> str:
    """One line for each contender and reason, with all that it was skipped in."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for skip in run.skips:
        reason = f"FAILED: {skip.reason}" if skip.failed else skip.reason
        found.setdefault((skip.contender, reason), {})[skip.workload] = None
    rows: list[Row] = [(*key, ", ".join(places)) for key, places in found.items()]
    return table(("contender", "reason", "of"), rows)


def _scaling(run: Run) -> str:
    """One line for each number of tensors, one column for each operation."""
    cells: dict[int, dict[str, str]] = {}
    for name, operation, group in run.groups():
        if not name.startswith("scaling-") or "holdfast" not in group:
            continue
        samples = group["holdfast"]
        cost = Spread.of(s.value for s in samples).median / samples[0].tensors * 1e6
        cells.setdefault(samples[0].tensors, {})[operation] = f"{cost:.3f}"
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [
        (f"{count:,}", *(row.get(column, "") for column in columns))
        for count, row in sorted(cells.items())
    ]
    return table(("tensors", *columns), rows) if rows else ""
