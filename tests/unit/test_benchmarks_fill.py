"""The benchmark of filling tensors that exist: whoever fills nothing is found out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import operations
from benchmarks.actions import Job
from benchmarks.contenders import CONTENDERS
from benchmarks.objects import raw_bytes, tensors
from benchmarks.workloads import WORKLOADS, Material

import holdfast

MIB = 1 << 20


@pytest.mark.parametrize("lazy", [False, True])
def test_what_fills_nothing_is_found_out(lazy: bool, tmp_path: Path) -> None:
    """What is to be filled holds nothing of it before."""
    workload = next(each for each in WORKLOADS if each.name == "llm")
    material = Material.of(workload, MIB / workload.nbytes)
    before = [raw_bytes(tensor).copy() for tensor in tensors(material.numpy)]
    operation = next(each for each in operations.OPERATIONS if each.name == "fill")
    skips: list[Any] = []

    def fill(job: Job) -> None:
        if not lazy:
            holdfast.load_into(job.obj, job.path)

    ours = next(each for each in CONTENDERS if each.name == "holdfast, numpy")
    entrant = dataclasses.replace(ours, actions={**ours.actions, "fill": fill})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "CONTENDERS", (entrant,))
        found = list(operations.measure(material, operation, 2, tmp_path, skips.append))
    assert len(found) == (0 if lazy else 2)
    assert bool(skips) == lazy
    assert all((raw_bytes(a) == b).all() for a, b in zip(
        tensors(material.numpy), before, strict=True))  # fmt: skip
