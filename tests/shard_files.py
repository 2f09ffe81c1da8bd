"""Checkpoints in several files that tests save, and ways to look at them and to change them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"


def tensors(seed: int = 0, n: int = 9) -> dict[str, np.ndarray]:
    made = np.random.default_rng(seed)
    return {f"layer.{i}.w": made.standard_normal((50, 20)).astype(np.float32) for i in range(n)}


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[key], b[key]) for key in b)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def shards(base: str, n: int) -> list[str]:
    return [f"{base}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return found


def rewrite(folder: Path, change: Any) -> None:
    """Change the index as another program would: without our checksum."""
    found = index_of(folder)
    found["metadata"].pop("holdfast", None)
    change(found)
    (folder / INDEX).write_text(json.dumps(found, indent=2))
