"""Peak memory of a save and of filling tensors in place, above the tensors themselves.

Each contender runs in a process of its own (``python -m benchmarks.memory``), which builds the
workload, notes what it occupies, resets the kernel's high-water mark before each action and
reads it after. The figure, ``value``, is the growth of the whole resident set, so pages of a
mapped file count although the kernel could take them back; ``anon`` is the part that it could
not, sampled every few milliseconds by the process that waits.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .actions import Job
from .contenders import CONTENDERS, writer
from .objects import raw_bytes, tensors
from .operations import remove, unfit
from .samples import BYTES, Sample, Skip
from .workloads import WORKLOADS, Material

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "memory-save": "peak memory of a save, above the tensors",
    "memory-fill": "peak memory of filling tensors in place, above the tensors",
}
NAMES = tuple(TITLES)
PERIOD = 0.004


def measure(
    material: Material,
    operation: str,
    scale: float,
    samples: int,
    directory: Path,
    skipped: Callable[[Skip], None],
    only: frozenset[str] = frozenset(),
) -> Iterator[Sample]:
    """Yield `samples` samples of each contender, or `only` of some; `operation` is in `NAMES`."""
    workload = material.workload
    action = operation.removeprefix("memory-")
    for contender in CONTENDERS:
        if action not in contender.actions or contender.role == "limit":
            continue
        if only and contender.name not in only:
            continue
        if reason := unfit(workload, contender):
            skipped(Skip(workload.name, operation, contender.name, reason))
            continue
        request = {
            "workload": workload.name,
            "scale": scale,
            "contender": contender.name,
            "action": action,
            "samples": samples,
            "path": str(directory / f"{workload.name}-memory.{contender.file}"),
        }
        try:
            results = _run(request)
        except RuntimeError as error:
            skipped(Skip(workload.name, operation, contender.name, str(error), failed=True))
            continue
        for number, result in enumerate(results, 1):
            yield Sample(
                workload.name,
                operation,
                contender.name,
                contender.role,
                number,
                result["peak"],
                BYTES,
                material.nbytes,
                material.count,
                {"anon": result["anon"], "seconds": result["seconds"]},
            )


def _run(request: dict[str, Any]) -> list[dict[str, float]]:
    """Run a request in a process of its own and watch its memory from this one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(request)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: list[tuple[float, int]] = []
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, seen, stop))
    watcher.start()
    try:
        out, err = process.communicate()
    finally:
        stop.set()
        watcher.join()
        remove(Path(request["path"]))
    if process.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit status {process.returncode}: {last}")
    results: list[dict[str, float]] = json.loads(out)
    for result in results:
        inside = [anon for at, anon in seen if result["begin"] <= at <= result["end"]]
        result["anon"] = max(0.0, max(inside, default=0) - result["anon_before"])
    return results


def _watch(pid: int, seen: list[tuple[float, int]], stop: threading.Event) -> None:
    while not stop.wait(PERIOD):
        try:
            fields = _status(pid)
        except OSError:
            return
        if "RssAnon" in fields:  # not so once the process is a zombie
            seen.append((time.monotonic(), fields["RssAnon"] + fields["RssShmem"]))


def _status(pid: int | str) -> dict[str, int]:
    """The fields of ``/proc/<pid>/status`` that are sizes, in bytes."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


# ---- in the process that is measured ----------------------------------------------------------


def _digest(obj: Any) -> list[int]:
    return [zlib.crc32(raw_bytes(tensor).data) for tensor in tensors(obj)]


def _serve(request: dict[str, Any]) -> list[dict[str, float]]:
    workload = next(w for w in WORKLOADS if w.name == request["workload"])
    contender = next(c for c in CONTENDERS if c.name == request["contender"])
    material = Material.of(workload, request["scale"])
    job = Job(material.view(contender.framework), Path(request["path"]), material.one)
    digest: list[int] = []
    if request["action"] == "fill":
        author = writer(contender.file)
        author.actions["save"](Job(material.view(author.framework), job.path, job.one))
        digest = _digest(job.obj)
    else:
        _warm_imports(contender.needs)
    act = contender.actions[request["action"]]
    results = []
    for _ in range(request["samples"]):
        if request["action"] == "fill":
            for tensor in tensors(job.obj):
                raw_bytes(tensor)[:] = 0
        else:
            job.path.unlink(missing_ok=True)
        results.append(_peak(act, job))
        if request["action"] == "fill" and _digest(job.obj) != digest:
            raise AssertionError("the tensors were not filled with what was saved")
    return results


def _warm_imports(packages: tuple[str, ...]) -> None:
    """Import what the action would import, so that code does not count as memory of the action."""
    for package in packages:
        part = "torch" if "torch" in packages else "numpy"
        __import__(f"safetensors.{part}" if package == "safetensors" else package)


def _peak(act: Callable[[Job], Any], job: Job) -> dict[str, float]:
    gc.collect()
    if ours := sys.modules.get("holdfast"):
        ours.release_kept()  # what an earlier action left would be none of this one's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is there now
    before = _status("self")
    begin = time.monotonic()
    act(job)
    end = time.monotonic()
    after = _status("self")
    return {
        "peak": max(0, after["VmHWM"] - before["VmRSS"]),
        "anon_before": before["RssAnon"] + before["RssShmem"],
        "begin": begin,
        "end": end,
        "seconds": end - begin,
    }


if __name__ == "__main__":
    print(json.dumps(_serve(json.loads(sys.argv[1]))))
