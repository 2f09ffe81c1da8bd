"""The benchmarks of devices: their loop over torch's tensors of the host, and what they say."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import device_arrays
import holdfast
from holdfast import staging

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import device_contenders, devices, limits, machine, report, samples, targets
from benchmarks.__main__ import listing
from benchmarks.device_contenders import CONTENDERS, Accelerator, Contender

MIB = 1 << 20


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(devices, "SETTLE", 0)
    monkeypatch.setattr(devices, "WATCHED", 1)
    monkeypatch.setattr(devices.os, "sync", lambda: None)
    monkeypatch.setattr(devices.pagecache, "drop", lambda path: 0.0)
    monkeypatch.setattr(devices.limits, "level", lambda nbytes: None)
    monkeypatch.setattr(device_contenders, "BLOCK", 1 << 16)
    return monkeypatch


@pytest.fixture
def anywhere(quiet: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every folder is whatever it should be."""

    @contextlib.contextmanager
    def place(operation: str, directory: Path, needed: int) -> Iterator[Path]:
        assert needed > 0
        yield directory

    quiet.setattr(devices, "_place", place)
    return quiet


def run(
    operation: str, directory: Path, scale: float = 0.0001, **how: Any
) -> tuple[list[samples.Sample], list[samples.Skip]]:
    skips: list[samples.Skip] = []
    found = devices.measure(
        operation, 1, scale, directory, skips.append, accelerator=Accelerator("cpu"), **how
    )
    return list(found), skips


@pytest.mark.parametrize("operation", devices.NAMES)
def test_everybody_moves_the_right_bytes(
    operation: str, tmp_path: Path, anywhere: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("safetensors", minversion="0.8")
    found, skips = run(operation, tmp_path)
    reasons = {skip.reason for skip in skips if skip.failed}
    assert not reasons or all("Errno 22" in reason for reason in reasons), skips
    timed = {(s.workload, s.contender) for s in found if s.operation == operation}
    for workload in devices.WORKLOADS:
        names = {name for where, name in timed if where == workload.name}
        assert {"holdfast", "torch", "safetensors"} <= names
        assert ("safetensors, pread" in names) == ("load" in operation)
        assert any(name.startswith("raw") for name in names)
        assert any(name.startswith("pinned copy") for name in names) == ("disk" not in operation)
    assert all(s.value > 0 and s.unit == "s" for s in found if s.operation == operation)
    figures = {s.operation for s in found} - {operation}
    expected = {name for name in devices.FIGURES if name.startswith(f"{operation}-")}
    assert figures == expected and len(expected) in (0, 3)
    assert "load" in operation or not list(tmp_path.iterdir())


def test_where_there_is_no_device_cupy_has_nothing_to_save(
    tmp_path: Path, anywhere: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    anywhere.setattr(Contender, "missing", lambda self: "")
    found, skips = run("device-save", tmp_path, only=frozenset({"holdfast, cupy arrays"}))
    assert not found
    assert {(skip.reason, skip.failed) for skip in skips} == {
        ("CuPy has no arrays on the host", False)
    }


def test_the_sizes_are_those_that_were_asked_for() -> None:
    torch = pytest.importorskip("torch")
    llm, many = (workload.make(0.001, "cpu") for workload in devices.WORKLOADS)
    assert 7e6 < sum(tensor.nbytes for tensor in llm.values()) < 9e6
    assert len(llm) == 84 and {t.dtype for t in llm.values()} == {torch.float16}
    assert len(many) == 20 and {t.nbytes for t in many.values()} == {1024}
    assert len({t.untyped_storage().data_ptr() for t in many.values()}) == 20
    assert len(np.unique(many["layers.0.weight"].view(torch.uint8).numpy())) > 200


def chosen(change: Any, name: str) -> tuple[Contender, ...]:
    """The table with one row changed."""
    return tuple(change(c) if c.name == name else c for c in CONTENDERS)


def test_wrong_bytes_are_a_failure(tmp_path: Path, anywhere: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def bad(job: Any) -> Any:
        found = device_contenders.torch_load(mmap=False)(job)
        devices._bytes(next(iter(found.values())))[0] ^= 1
        return found

    changed = chosen(lambda c: replace(c, load=bad), "torch")
    anywhere.setattr(devices, "CONTENDERS", changed)
    only = frozenset({"torch", "torch, mmap"})
    found, skips = run("device-load", tmp_path, only=only)
    assert {s.contender for s in found} == {"torch, mmap"}
    assert [s.failed for s in skips] == [True, True]
    assert "bytes differ" in skips[0].reason


def test_the_limits_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    accelerator = Accelerator("cpu")
    for to_host in (True, False):
        pairs = accelerator.copy(100 * MIB + 17, to_host=to_host)
        assert len(pairs) == device_contenders.BLOCKS
        job: Any = None
        assert device_contenders.copied(job, pairs) == []
        pairs[1][0][0] ^= 1
        assert device_contenders.copied(job, pairs) != []
    assert device_contenders.copied(job, []) != []
    block = limits.Block.random(3 * limits.CHUNK + 17)
    limits.write(block, tmp_path / "raw", direct=False, durable=False, reserve=False)
    assert limits.read_over(tmp_path / "raw", direct=False, threads=3) == block.nbytes
    made = device_contenders.Job({}, tmp_path / "raw", accelerator, block, True)
    assert device_contenders.written(made, None) == []
    assert device_contenders.all_read(made, block.nbytes) == []
    assert device_contenders.all_read(made, block.nbytes - 1) != []


def test_without_a_device_all_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "absent", lambda: "torch finds no CUDA device")
    skips: list[samples.Skip] = []
    assert list(devices.measure("device-save", 1, 1.0, tmp_path, skips.append)) == []
    assert [(s.workload, s.reason, s.failed) for s in skips] == [
        (workload.name, "torch finds no CUDA device", False) for workload in devices.WORKLOADS
    ]
    assert devices.describe() == ""


def test_this_machine_says_what_it_lacks() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "CUDA" in devices.absent()
    assert devices.describe() == ""
    assert "holdfast, cupy arrays" in listing()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_the_place_is_of_the_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "filesystem", lambda path: {"type": kind})
    right, wrong = ("device-save", "device-save-disk")[:: 1 if kind == "tmpfs" else -1]
    with devices._place(right, tmp_path, 1) as place:
        assert place.parent == tmp_path
    assert not place.exists()
    why = "in memory: --dir names a disk" if kind == "tmpfs" else "no RAM file system"
    with pytest.raises(LookupError, match=why), devices._place(wrong, tmp_path, 1):
        pass
    with pytest.raises(LookupError, match="are needed"), devices._place(right, tmp_path, 1 << 60):
        pass


def test_memory_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    with device_arrays.installed(monkeypatch, delay=0.002) as (device, _):
        tensor = device_arrays.put(np.zeros(80 << 20, np.uint8))

        class Simulated(Accelerator):
            code = device_arrays.CODE  # type: ignore[assignment]

        settings = staging.Staging(block_size=4 * MIB, blocks=3)
        with devices.Watch(Simulated("cpu")) as watch:
            holdfast.save({"x": tensor}, tmp_path / "x", staging=settings)
        assert watch.pinned == 3 * 4 * MIB == sum(device.pinned.values())
        assert watch.host >= 2 * 4 * MIB  # of which the last block may be hardly used
        assert "pin" not in vars(device) and "unpin" not in vars(device)
        with devices.Watch(Simulated("cpu")) as watch:
            kept = limits.fresh(64 * MIB)
            kept[:] = 1
        assert watch.host >= 60 * MIB and watch.pinned == 0


def test_what_is_not_pinned_has_another_name(
    tmp_path: Path, anywhere: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")

    class Pretended(Accelerator):
        real = True  # type: ignore[assignment]

        def synchronize(self) -> None: ...

        def copies(self) -> Any:
            return None

        def free(self) -> None: ...

        def allocated(self, *, anew: bool = False) -> tuple[int, int]:
            return 0, 0

    anywhere.setattr(devices, "PINNED_FROM", 0)
    staging.release_pinned()
    found = list(
        devices.measure(
            "device-save",
            1,
            0.0001,
            tmp_path,
            lambda skip: pytest.fail(skip.reason),
            frozenset({"holdfast", "torch"}),
            Pretended("cpu"),
        )
    )
    names = {s.contender for s in found}
    assert names == {"holdfast" + devices.UNPINNED, "torch"}
    assert "NOT through pinned memory" in capsys.readouterr().err


def test_torch_copies_only_where_another_would() -> None:
    with (
        pytest.raises(LookupError, match="by torch already"),
        device_contenders.torch_copies(Accelerator("cpu")),
    ):
        pass


# ---- targets and report -----------------------------------------------------------------------


def made(operation: str, contender: str, value: float, unit: str = "s") -> samples.Sample:
    role = "ours" if contender.startswith("holdfast") else "rival"
    return samples.Sample("device-llm", operation, contender, role, 1, value, unit, 8 * 10**9, 84)


def test_the_slower_part_of_a_pipe_is_the_limit() -> None:
    run = samples.Run({})
    run.samples += [made("device-save", "holdfast", 1.0)]
    run.samples += [made("device-save", "pinned copy to the host", 0.5)]
    (target,) = [t for t in targets.TARGETS if t.operation == "device-save" and t.slowest]
    assert targets.judge(run, [target])[0].found is None  # the raw write is lacking
    run.samples += [made("device-save", "raw pwrite", 0.9)]
    (verdict,) = targets.judge(run, [target])
    assert verdict.found == pytest.approx(0.9) and verdict.met is True
    assert verdict.words()[:3] == (
        "device-llm save", "the slower of pinned copy to the host / raw pwrite", "≥ 85%",
    )  # fmt: skip
    best = replace(target, slowest=False)
    assert targets.judge(run, [best])[0].found == pytest.approx(0.5)


def test_targets_name_what_there_is() -> None:
    rows = [t for t in targets.TARGETS if t.workload.startswith("device-")]
    assert len(rows) == 16
    names = {c.name for c in CONTENDERS}
    for target in rows:
        assert target.workload in {w.name for w in devices.WORKLOADS}
        assert target.operation in {*devices.NAMES, *devices.FIGURES}
        assert {*target.against, target.ours} <= names


def test_the_report_says_what_copied() -> None:
    run = samples.Run({"accelerator": "NVIDIA H200; copies by cupy 14.0, through pinned memory"})
    for i, name in enumerate(["raw pwrite", "torch", "holdfast, cupy arrays", "holdfast"]):
        run.samples.append(made("device-save", name, 1.0 + i))
    run.samples.append(made("device-save-pinned", "holdfast", 64.0 * MIB, "B"))
    text = report.markdown(run)
    assert "- accelerator: NVIDIA H200; copies by cupy 14.0, through pinned memory" in text
    assert "### device-save: save from the device to a RAM file system" in text
    rows = text[text.index("### device-save:") :].splitlines()[4:8]
    assert [row.split("|")[1].strip() for row in rows] == [
        "holdfast", "holdfast, cupy arrays", "torch", "raw pwrite",
    ]  # fmt: skip
    assert "64.0 MiB" in text and "peak pinned memory of a save" in text


def test_the_path_is_named() -> None:
    class TorchDevice: ...

    torch = pytest.importorskip("torch")
    assert devices.path_of(TorchDevice()) == f"torch {torch.__version__}"
    assert devices.path_of(SimpleNamespace()) == "SimpleNamespace"
