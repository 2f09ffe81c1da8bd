"""The benchmarks at 1 MiB: everybody saves and loads the right bytes, and the tables say so."""

from __future__ import annotations

import dataclasses
import errno
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import limits, operations, pagecache, report, samples, targets
from benchmarks.__main__ import listing, main
from benchmarks.actions import Job
from benchmarks.contenders import CONTENDERS, Contender, check, writer
from benchmarks.objects import differences, leaves, raw_bytes, tensors, touch
from benchmarks.workloads import WORKLOADS, Material, Workload, select

from holdfast import _bench

MIB = 1 << 20
BY_NAME = {workload.name: workload for workload in WORKLOADS}
PAIRS = [
    pytest.param(workload, contender, id=f"{workload.name}-{contender.name}")
    for workload in WORKLOADS
    for contender in CONTENDERS
    if {"save", "save-durable"} & set(contender.actions) and operations.wanted(workload, contender)
]


def at_one_mib(workload: Workload) -> Material:
    return Material.of(workload, min(1.0, MIB / workload.nbytes))


@pytest.fixture(scope="module")
def materials() -> dict[str, Material]:
    return {}


# ---- workloads --------------------------------------------------------------------------------


def test_workloads_have_the_size_they_claim() -> None:
    assert {"llm", "many", "vgg16", "train", "scaling-1000000"} <= set(BY_NAME)
    assert BY_NAME["vgg16"].nbytes == 4 * 138_357_544
    assert 2.0e9 < BY_NAME["llm"].nbytes < 2.3e9
    assert 4.5e8 < BY_NAME["train"].nbytes < 5.5e8
    assert BY_NAME["many"].nbytes == 20_000 * 1024


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_workload_scales_and_is_random(workload: Workload) -> None:
    material = at_one_mib(workload)
    assert 0.7 * min(MIB, workload.nbytes) < material.nbytes < 1.4 * MIB
    everything = np.concatenate([raw_bytes(t) for t in tensors(material.numpy)])
    assert len(everything) == material.nbytes
    counts = np.bincount(everything, minlength=256)
    assert counts.min() > 0.5 * counts.mean(), "some byte is rare: this is not random"


def test_train_has_int_keys_scalars_and_no_flat_form() -> None:
    obj = at_one_mib(BY_NAME["train"]).numpy
    assert all(isinstance(key, int) for key in obj["optimizer"]["state"])
    assert BY_NAME["train"].nested
    assert {bool, int, float} <= {type(leaf) for _, leaf in leaves(obj)}


def test_select_takes_families_and_refuses_the_unknown() -> None:
    assert select("scaling,llm")[0] is BY_NAME["llm"]
    assert len(select("scaling")) == 4
    with pytest.raises(ValueError, match="nonsense"):
        select("llm,nonsense")


# ---- contenders -------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "contender"), PAIRS)
def test_everybody_saves_and_loads_the_right_bytes(
    workload: Workload, contender: Contender, tmp_path: Path, materials: dict[str, Material]
) -> None:
    if reason := operations.unfit(workload, contender):
        pytest.skip(reason)
    material = materials.setdefault(workload.name, at_one_mib(workload))
    job = Job(material.view(contender.framework), tmp_path / f"x.{contender.file}", material.one)
    loads = [
        other.actions[action]
        for other in CONTENDERS
        if (other.file, other.framework) == (contender.file, contender.framework)
        for action in ("load", "load-mapped", "load-uncached")
        if action in other.actions
    ]
    assert loads
    saves = [contender.actions[a] for a in ("save", "save-durable") if a in contender.actions]
    try:
        for save in saves:
            operations.remove(job.path)
            save(job)
            size = sum(file.stat().st_size for file in pagecache.files(job.path))
            assert size >= material.nbytes
            for load in loads:
                found = load(job)
                touch(found)
                assert check(job, found) == []
    except OSError as error:
        if contender.role == "limit" and error.errno == errno.EINVAL:
            pytest.skip("no O_DIRECT on this file system")
        raise
    if job.one and "one" in contender.actions:
        assert differences(job.obj[job.one], contender.actions["one"](job)) == []


@pytest.mark.parametrize(
    "contender", [c for c in CONTENDERS if "fill" in c.actions], ids=lambda c: c.name
)
@pytest.mark.parametrize("name", ["llm", "train"])
def test_everybody_fills_in_place(name: str, contender: Contender, tmp_path: Path) -> None:
    if reason := operations.unfit(BY_NAME[name], contender):
        pytest.skip(reason)
    expected, material = at_one_mib(BY_NAME[name]), at_one_mib(BY_NAME[name])
    job = Job(material.view(contender.framework), tmp_path / f"x.{contender.file}", "")
    author = writer(contender.file)
    author.actions["save"](Job(expected.view(author.framework), job.path, ""))
    targets_before = tensors(job.obj)
    for tensor in targets_before:
        raw_bytes(tensor)[:] = 0
    contender.actions["fill"](job)
    assert differences(expected.numpy, material.numpy) == []
    assert all(a is b for a, b in zip(targets_before, tensors(job.obj), strict=True))


@pytest.mark.parametrize("name", ["memcpy, fresh memory", "memcpy, warm memory"])
def test_copies_copy(name: str, tmp_path: Path) -> None:
    contender = next(c for c in CONTENDERS if c.name == name)
    block = limits.Block.random(3 * limits.CHUNK + 17)
    job = Job(block, tmp_path, "")
    found = contender.actions["copy"](job)
    assert check(job, found) == []
    found[2 * limits.CHUNK + 5] ^= 1
    assert check(job, found) == [f"bytes differ in the chunk at {2 * limits.CHUNK}"]


def test_differences_sees_every_kind() -> None:
    a = {"w": np.arange(6, dtype="f4"), "n": 3, "x": [1.5, "s"]}
    assert differences(a, {"w": a["w"].copy(), "n": 3, "x": [1.5, "s"]}) == []
    for other in (
        {**a, "w": a["w"].reshape(2, 3)},
        {**a, "w": a["w"].view("i4")},
        {**a, "w": np.arange(1, 7, dtype="f4")},
        {**a, "n": 3.0},
        {**a, "n": 4},
        {**a, "x": [1.5]},
        {**a, "more": 1},
    ):
        assert differences(a, other), other


# ---- the loop ---------------------------------------------------------------------------------


def tiny(save: Any, load: Any, name: str = "tiny") -> Contender:
    return Contender(name, "rival", "numpy", name, {"save": save, "load": load})


def good_save(job: Job) -> None:
    with job.path.open("wb") as f:
        np.savez(f, **job.obj)


def good_load(job: Job) -> Any:
    with np.load(job.path) as archive:
        return dict(archive.items())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(operations, "SETTLE", 0)
    monkeypatch.setattr(operations.os, "sync", lambda: None)
    return monkeypatch


def run_loop(
    contenders: list[Contender], operation: str, directory: Path, rounds: int, mp: Any
) -> tuple[list[samples.Sample], list[samples.Skip]]:
    mp.setattr(operations, "CONTENDERS", tuple(contenders))
    mp.setattr(operations, "writer", lambda file: next(c for c in contenders if c.file == file))
    chosen = next(o for o in operations.OPERATIONS if o.name == operation)
    skips: list[samples.Skip] = []
    material = at_one_mib(BY_NAME["vgg16"])
    found = operations.measure(material, chosen, rounds, directory, skips.append)
    return list(found), skips


def test_rounds_are_interleaved_in_changing_order(
    tmp_path: Path, quiet: pytest.MonkeyPatch
) -> None:
    field = [tiny(good_save, good_load, name) for name in "abc"]
    found, skips = run_loop(field, "load-eager", tmp_path, 12, quiet)
    assert not skips
    order = ["".join(s.contender for s in found if s.round == n) for n in range(1, 13)]
    assert {"".join(sorted(names)) for names in order} == {"abc"}
    after = {names[i : i + 2] for names in order for i in (0, 1)}
    assert after == {"ab", "ac", "ba", "bc", "ca", "cb"}  # each comes after each other one
    assert all(s.value >= s.details["action"] > 0 for s in found)
    assert all(s.details["touch"] > 0 and s.details["resident"] == 1.0 for s in found)


@pytest.mark.parametrize("operation", ["save", "load-eager"])
def test_wrong_bytes_are_a_failure(
    operation: str, tmp_path: Path, quiet: pytest.MonkeyPatch
) -> None:
    def bad_save(job: Job) -> None:
        name = next(iter(job.obj))
        good_save(dataclasses.replace(job, obj={**job.obj, name: np.zeros_like(job.obj[name])}))

    field = [tiny(bad_save, good_load, "bad"), tiny(good_save, good_load, "good")]
    found, skips = run_loop(field, operation, tmp_path, 2, quiet)
    assert {s.contender for s in found} == {"good"}
    assert len(found) == 2
    assert [(s.contender, s.failed) for s in skips] == [("bad", True)]
    assert "wrong bytes" in skips[0].reason


def test_saves_leave_no_file(tmp_path: Path, quiet: pytest.MonkeyPatch) -> None:
    found, skips = run_loop([tiny(good_save, good_load)], "save", tmp_path, 1, quiet)
    assert (len(found), skips, list(tmp_path.iterdir())) == (1, [], [])


def test_what_is_saved_over_is_there(tmp_path: Path, quiet: pytest.MonkeyPatch) -> None:
    there: list[bool] = []

    def save(job: Job) -> None:
        there.append(job.path.exists())
        good_save(job)

    found, skips = run_loop([tiny(save, good_load)], "save-over", tmp_path, 2, quiet)
    assert (len(found), skips) == (2, [])
    assert there == [False, True, True, True]


def test_loaded_again_is_loaded_after_a_cold_one(tmp_path: Path, quiet: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def load(job: Job) -> Any:
        calls.append("load")
        return good_load(job)

    quiet.setattr(operations.pagecache, "drop", lambda path: calls.append("drop") or 0.0)
    field = [Contender("tiny", "rival", "numpy", "f", {"save": good_save, "load-mapped": load})]
    found, skips = run_loop(field, "load-mapped-again", tmp_path, 2, quiet)
    assert (len(found), skips) == (2, [])
    assert calls == ["drop", "load", "load"] * 3


def test_not_cold_is_said_and_not_measured(tmp_path: Path, quiet: pytest.MonkeyPatch) -> None:
    quiet.setattr(operations.pagecache, "drop", lambda path: 0.5)
    found, skips = run_loop([tiny(good_save, good_load)], "load-cold", tmp_path, 1, quiet)
    assert not found
    assert [s.failed for s in skips] == [False]
    assert "50.0%" in skips[0].reason


def test_residency_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (4 * MIB))
    assert pagecache.resident(path) == 1.0
    if pagecache.drop(path) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    with path.open("rb", buffering=0) as f:
        f.read(1)
    assert 0 < pagecache.resident(path) < 1
    assert pagecache.warm(path) == 1.0


# ---- results ----------------------------------------------------------------------------------


def sample(operation: str, contender: str, value: float, number: int = 1, **kw: Any) -> Any:
    role = "ours" if contender == "holdfast" else "rival"
    record = {"workload": "llm", "unit": "s", "nbytes": 2 * 10**9, "tensors": 84, **kw}
    return samples.Sample(
        operation=operation, contender=contender, role=role, round=number, value=value, **record
    )


@pytest.fixture
def run() -> samples.Run:
    made = samples.Run({"cpu": "A|B 3000", "cores": 2, "date": "2026-01-31T00:00:00+00:00"})
    for number, factor in enumerate((1.0, 1.1, 0.9, 5.0, 1.0), 1):
        made.samples.append(sample("save-durable", "holdfast", factor, number))
        made.samples.append(sample("save-durable", "torch", 3.2 * factor, number))
        made.samples.append(sample("save-durable", "safetensors.torch", 1.5 * factor, number))
    made.samples.append(sample("memory-save", "holdfast", 30.0 * MIB, unit="B"))
    made.samples.append(sample("load-cold", "holdfast", 2.0))
    made.samples.append(sample("load-cold", "raw read", 1.99))
    made.samples.append(sample("load-cold", "raw O_DIRECT read", 1.0))
    made.samples.append(sample("import", "holdfast", 0.14, workload="import", tensors=0))
    made.samples.append(sample("import", "numpy", 0.1, workload="import", tensors=0))
    made.skips.append(samples.Skip("llm", "save", "torch", "torch is not installed"))
    return made


def write(run: samples.Run, path: Path) -> None:
    with path.open("w") as f:
        samples.write_line(f, "machine", run.machine)
        for one in run.samples:
            samples.write_line(f, "sample", one)
        for skip in run.skips:
            samples.write_line(f, "skip", skip)


def test_results_read_back_as_written(run: samples.Run, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(run, path)
    assert len(path.read_text().splitlines()) == 1 + len(run.samples) + 1
    assert samples.read(path) == run


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2"),
        ('{"kind": "sample", "value": 1}', "line 2"),
        ('{"kind": "what"}', "unknown kind 'what'"),
        ("[]", "line 2"),
    ],
)
def test_a_broken_results_file_is_refused(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"kind": "machine"}}\n{line}\n')
    with pytest.raises(ValueError, match=reason):
        samples.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="empty"):
        samples.read(path)


def test_spread_is_of_the_values() -> None:
    spread = samples.Spread.of([5, 1, 2, 3, 4])
    assert (spread.median, spread.low, spread.high) == (3, 1, 5)
    assert (spread.quarter, spread.three_quarters, spread.count) == (2, 4, 5)
    assert samples.Spread.of([7]).median == 7


def test_targets_are_judged_by_medians(run: samples.Run) -> None:
    by_key = {
        (v.target.operation, v.target.against): v
        for v in targets.judge(run)
        if v.target.workload in ("llm", "import") and v.target.ours == "holdfast"
    }
    durable = by_key["save-durable", ("torch",)]
    assert durable.found == pytest.approx(3.2)
    assert durable.met is True
    assert by_key["save-durable", ("safetensors.torch",)].met is False
    assert by_key["save-durable", ("raw O_DIRECT pwrite",)].met is None
    assert by_key["load-cold", targets.RAW_READ].found == pytest.approx(0.5)  # the best of both
    assert by_key["load-cold", targets.RAW_READ].met is False
    assert by_key["memory-save", ()].met is True
    assert by_key["import", ("numpy",)].found == pytest.approx(1.4)
    assert by_key["import", ("numpy",)].met is True


def test_the_report_has_every_figure(run: samples.Run) -> None:
    text = report.markdown(run)
    row = next(line for line in text.splitlines() if line.startswith("| torch "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "torch",
        "3.2000",
        "2.8800 … 16.0000",
        "3.2000 … 3.5200",
        "0.62 GB/s",
        "3.20",
        "5",
    ]
    assert "torch is not installed" in text
    assert "NOT met" in text
    assert "not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    assert all(line.endswith("|") for line in rows)


def test_the_report_begins_with_ours_whoever_was_first(run: samples.Run) -> None:
    run.samples.reverse()
    text = report.markdown(run)
    rows = text[text.index("### save-durable") :].splitlines()[4:7]
    assert [row.split("|")[1].strip() for row in rows] == ["holdfast", "torch", "safetensors.torch"]
    assert rows[0].split("|")[-3].strip() == "1.00"


def test_the_report_has_the_cost_of_each_tensor(run: samples.Run) -> None:
    assert "Cost of each tensor" not in report.markdown(run)
    for operation, value in (("save", 0.002), ("load-mapped", 0.0015)):
        more = {"workload": "scaling-1000", "tensors": 1000}
        run.samples.append(sample(operation, "holdfast", value, **more))
    text = report.markdown(run)
    row = text[text.index("Cost of each tensor") :].splitlines()[4]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["1,000", "2.000", "1.500"]


# ---- the commands -----------------------------------------------------------------------------


def test_the_command_writes_results_and_a_table(
    tmp_path: Path, quiet: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "run.jsonl"
    arguments = "--workloads many --ops save,load-mapped,open-one --samples 2 --scale 0.01"
    status = main([*arguments.split(), "--dir", str(tmp_path), "--out", str(out)])
    run = samples.read(out)
    assert status == 0, run.skips
    assert {s.operation for s in run.samples} == {"save", "load-mapped", "open-one"}
    assert len(run.values("many", "save", "numpy.savez")) == 2
    assert len(run.values("many", "save", "holdfast, numpy")) == 2
    assert run.machine["cores"] >= 1
    assert run.machine["filesystem"]["type"]
    assert run.machine["arguments"]["scale"] == 0.01
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]


def test_memory_is_measured_in_a_process_of_its_own(
    tmp_path: Path, quiet: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.jsonl"
    quiet.setattr("benchmarks.memory.CONTENDERS", [c for c in CONTENDERS if c.framework == "numpy"])
    arguments = "--workloads llm --ops memory-save --samples 2 --scale 0.0005"
    assert main([*arguments.split(), "--dir", str(tmp_path), "--out", str(out)]) == 0
    run = samples.read(out)
    assert len(run.values("llm", "memory-save", "holdfast, numpy")) == 2
    assert all(s.unit == "B" and 0 <= s.value < 512 * MIB for s in run.samples)


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--ops", "fly"], ["--workloads", "x"], ["--samples", "0"], ["--scale", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "unknown operation 'fly'" in capsys.readouterr().err


def test_the_listing_names_everything() -> None:
    text = listing()
    assert all(workload.name in text for workload in WORKLOADS)
    assert all(contender.name in text for contender in CONTENDERS)


def test_holdfast_bench_says_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench.os, "sync", lambda: None)
    monkeypatch.setattr(_bench, "SETTLE", 0)
    monkeypatch.setattr(_bench, "ROUNDS", 1)
    out = io.StringIO()
    assert _bench.run(tmp_path, MIB, out) == 0
    text = out.getvalue()
    assert "equal." in text
    assert [line for line in text.splitlines() if line.startswith("holdfast ")]
    assert "numpy.savez" in text
    assert not list(tmp_path.iterdir())


def test_holdfast_bench_notices_wrong_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench, "ROUNDS", 0)
    load = _bench.holdfast.load

    def wrong(path: Any, **options: Any) -> Any:
        found = load(path, **options)
        found["model"]["layers.0.bias"][0] = 0.5
        return found

    monkeypatch.setattr(_bench.holdfast, "load", wrong)
    out = io.StringIO()
    assert _bench.run(tmp_path, MIB, out) == 1
    assert "WRONG: loaded with mmap=False, $['model']['layers.0.bias']" in out.getvalue()


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.jsonl"))


@pytest.mark.skipif(not RESULTS, reason="no run is kept in the repository")
def test_results_kept_in_the_repository_can_be_read() -> None:
    for path in RESULTS:
        run = samples.read(path)
        assert run.samples
        assert report.markdown(run) == path.with_suffix(".md").read_text()
