"""One measurement, and the files that keep them: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TextIO

#: What `Sample.unit` can be.
SECONDS, BYTES = "s", "B"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes
    ----------
    workload, operation, contender, role : str
    round : int
        Counted from 1; all contenders of an operation take one sample in each round.
    value : float
        What is compared: seconds, or bytes.
    unit : str
        ``"s"`` or ``"B"``.
    nbytes, tensors : int
        What the workload has.
    details : dict
        What else was seen: ``action`` and ``touch`` (the two parts of a load's seconds),
        ``resident`` (fraction of the file in the page cache just before), ``anon`` (bytes).
    """

    workload: str
    operation: str
    contender: str
    role: str
    round: int
    value: float
    unit: str
    nbytes: int
    tensors: int
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skip:
    """Why a contender has no sample. `failed` where it should have had."""

    workload: str
    operation: str
    contender: str
    reason: str
    failed: bool = False


@dataclass(slots=True)
class Run:
    """Everything of one run."""

    machine: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def values(self, workload: str, operation: str, contender: str) -> list[float]:
        return [
            s.value
            for s in self.samples
            if (s.workload, s.operation, s.contender) == (workload, operation, contender)
        ]

    def groups(self) -> Iterator[tuple[str, str, dict[str, list[Sample]]]]:
        """Samples by (workload, operation) and contender, in the order they were first seen."""
        found: dict[tuple[str, str], dict[str, list[Sample]]] = {}
        for sample in self.samples:
            group = found.setdefault((sample.workload, sample.operation), {})
            group.setdefault(sample.contender, []).append(sample)
        for (workload, operation), group in found.items():
            yield workload, operation, group


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and spread of a few values."""

    median: float
    low: float
    high: float
    quarter: float
    three_quarters: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        if not found:
            raise ValueError("no values")
        cuts = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        return cls(median(found), found[0], found[-1], cuts[0], cuts[2], len(found))


def write_line(out: TextIO, kind: str, record: Any) -> None:
    """Append one record, at once on disk for whoever reads along."""
    body = record if isinstance(record, dict) else asdict(record)
    out.write(json.dumps({"kind": kind, **body}) + "\n")
    out.flush()


def read(path: Path) -> Run:
    """A run from its file. `ValueError` names the line that is none."""
    run: Run | None = None
    with path.open() as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                kind = record.pop("kind")
                if kind == "machine":
                    run = Run(record)
                elif run is None:
                    raise ValueError("the machine has to come first")
                elif kind == "sample":
                    run.samples.append(Sample(**record))
                elif kind == "skip":
                    run.skips.append(Skip(**record))
                else:
                    raise ValueError(f"unknown kind {kind!r}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
    if run is None:
        raise ValueError(f"{path}: empty")
    return run
