"""Where and with what a run was made: the first line of its results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "holdfast", "numpy", "torch", "safetensors", "ml_dtypes", "Cython",
    "cupy-cuda12x", "cupy-cuda13x", "cupy",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def describe(directory: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The machine, the versions, the commit, and how the run was asked for."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory() / 2**30, 1),
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "load_average": round(os.getloadavg()[0], 2),
        "arguments": arguments,
    }


def slug(machine: dict[str, Any]) -> str:
    """``2026-01-31-amd-epyc-2-cores``: the name of a run's files."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(machine["cpu"]).lower()).strip("-")
    return f"{str(machine['date'])[:10]}-{cpu}-{machine['cores']}-cores"


def filesystem(path: Path) -> dict[str, str]:
    """Type, device and options of the file system that holds `path`."""
    place = str(path.resolve())
    best = ""
    found = {"type": "", "device": "", "options": ""}
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split()
        mount = fields[4].encode().decode("unicode_escape")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            rest = fields[fields.index("-") + 1 :]
            best = mount
            found = {"type": rest[0], "device": rest[1], "options": fields[5]}
    return found


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", _read(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _dirty() -> bool | None:
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return None if status is None else bool(status)
