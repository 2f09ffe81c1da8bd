"""``holdfast bench``: a real nested checkpoint saved, verified and loaded on this machine.

Measures holdfast beside whatever rivals are installed, in interleaved rounds, and prints one
table. A quick look: the full benchmarks stand in ``benchmarks/`` of the repository.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np

import holdfast

__all__ = ["run"]

ROUNDS = 3
#: Seconds of quiet after a sync, before a save is timed.
SETTLE = 0.1
PAGE = 4096

#: Columns of the table: what each row may have done.
SAVE_DURABLE, SAVE, LOAD, LOAD_MAPPED = "save + fsync", "save", "load", "load, mapped"
COLUMNS = (SAVE_DURABLE, SAVE, LOAD, LOAD_MAPPED)

Save = Callable[[Any, Path], object]
Load = Callable[[Path], Any]


@dataclass(frozen=True, slots=True)
class _Row:
    """Somebody who saves and loads. `flat`: takes only a dict of tensors, so it gets just those."""

    name: str
    ending: str
    save: Save
    load: Load | None = None
    load_mapped: Load | None = None
    save_durable: Save | None = None
    needs: str = ""
    flat: bool = False


@dataclass(slots=True)
class _Measured:
    row: _Row
    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, column: str) -> float | None:
        found = self.seconds.get(column)
        return median(found) if found else None


def run(
    directory: str | os.PathLike[str] | None = None,
    size_bytes: int = 256 << 20,
    out: TextIO | None = None,
) -> int:
    """Save, verify and load a nested checkpoint, and say how long that took.

    Parameters
    ----------
    directory : path-like, optional
        Where to write, in a folder that is removed afterwards; the temporary directory by default.
    size_bytes : int
        About how many bytes the tensors have together.
    out : text file, optional
        Where the table goes; standard output by default.

    Returns
    -------
    int
        0, or 1 where something read back was not what had been saved.
    """
    out = sys.stdout if out is None else out
    checkpoint = _checkpoint(size_bytes)
    found = list(_tensors(checkpoint))
    nbytes = sum(tensor.nbytes for tensor in found)
    kind = "torch tensors" if _installed("torch") else "NumPy arrays"
    print(f"A training checkpoint: {len(found)} {kind}, {nbytes / 1e6:.1f} MB", file=out)
    rows = [row for row in _rows() if _installed(row.needs)]
    measured = [_Measured(row) for row in rows]
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=directory) as folder:
        problems = _check(checkpoint, Path(folder), out)
        for number in range(ROUNDS + 1):  # the first warms up what has to be, and is not kept
            start = number % len(measured)
            for column in COLUMNS:
                for one in measured[start:] + measured[:start]:
                    _sample(one, column, checkpoint, Path(folder) / f"checkpoint{one.row.ending}")
            if number == 0:
                for one in measured:
                    one.seconds.clear()
    print(_table(measured, nbytes), file=out)
    for one in measured:
        if one.failure:
            print(f"{one.row.name}: {one.failure}", file=out)
    missing = sorted({row.needs for row in _rows()} - {row.needs for row in rows})
    if missing:
        print(f"Not measured, because not installed: {', '.join(missing)}", file=out)
    return 1 if problems else 0


# ---- the checkpoint ---------------------------------------------------------------------------


def _checkpoint(size_bytes: int) -> dict[str, Any]:
    """A model of square layers, the state of Adam, scalars, and the states of two generators."""
    width = 1024 if size_bytes >= 48 << 20 else 64
    layers = max(1, size_bytes // (12 * width * (width + 1)))
    rng = np.random.Generator(np.random.SFC64(3))
    make = _tensor_maker()

    def weights() -> dict[str, Any]:
        made: dict[str, Any] = {}
        for i in range(layers):
            made[f"layers.{i}.weight"] = make(_random(rng, (width, width)))
            made[f"layers.{i}.bias"] = make(_random(rng, (width,)))
        return made

    model, first, second = weights(), weights(), weights()
    state = {
        i: {
            "step": make(np.array(1000.0, np.float32)),
            "exp_avg": first[name],
            "exp_avg_sq": second[name],
        }
        for i, name in enumerate(model)
    }
    words = np.random.get_state(legacy=False)["state"]["key"]
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(state)}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [group]},
        "epoch": 3,
        "loss": 2.125,
        "rng": {
            "python": random.getstate(),
            "numpy": make(words.astype(np.int64)),
        },
    }


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    words = rng.integers(0, 2**32, shape, dtype=np.uint32)
    return words.view(np.float32)


def _tensor_maker() -> Callable[[np.ndarray], Any]:
    if not _installed("torch"):
        return lambda array: array
    import torch

    return lambda array: torch.from_numpy(array)


# ---- who is measured --------------------------------------------------------------------------


def _rows() -> tuple[_Row, ...]:
    return (
        _Row(
            "holdfast",
            "",
            lambda obj, path: holdfast.save(obj, path, durable=False),
            lambda path: holdfast.load(path, mmap=False),
            lambda path: holdfast.load(path, mmap=True),
            holdfast.save,
        ),
        _Row("torch", ".pt", _torch_save, _torch_load, _torch_load_mapped, needs="torch"),
        _Row("pickle", ".pickle", _pickle_save, _pickle_load),
        _Row(
            "safetensors (tensors alone)",
            ".safetensors",
            _safetensors_save,
            load_mapped=_safetensors_load if _installed("torch") else None,
            load=None if _installed("torch") else _safetensors_load,
            needs="safetensors",
            flat=True,
        ),
        _Row("numpy.savez (tensors alone)", ".npz", _savez, _load_npz, flat=True),
    )


def _torch_save(obj: Any, path: Path) -> None:
    import torch

    torch.save(obj, path)


def _torch_load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def _torch_load_mapped(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True, mmap=True)


def _pickle_save(obj: Any, path: Path) -> None:
    with path.open("wb") as f:
        pickle.dump(obj, f, protocol=5)


def _pickle_load(path: Path) -> Any:
    with path.open("rb") as f:
        return pickle.load(f)  # noqa: S301 - this process wrote the file


def _safetensors() -> Any:
    """The module of safetensors for the tensors of this run."""
    return importlib.import_module(f"safetensors.{'torch' if _installed('torch') else 'numpy'}")


def _safetensors_save(obj: Any, path: Path) -> None:
    _safetensors().save_file(obj, path)


def _safetensors_load(path: Path) -> Any:
    return _safetensors().load_file(path)


def _savez(obj: dict[str, Any], path: Path) -> None:
    arrays: dict[str, Any] = {name: np.asarray(tensor) for name, tensor in obj.items()}
    np.savez(path, **arrays)


def _load_npz(path: Path) -> Any:
    with np.load(path) as archive:
        return dict(archive.items())


def _installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


# ---- measuring --------------------------------------------------------------------------------


def _sample(one: _Measured, column: str, checkpoint: dict[str, Any], path: Path) -> None:
    """One sample of a column of a row. Loads are warm: the file has just been read.

    All rows take their turn at a column before the next one: nobody saves into the memory that a
    save of its own has just freed, while others have to find theirs.
    """
    row = one.row
    obj = _flatten(checkpoint) if row.flat else checkpoint
    actions: dict[str, Callable[[], object] | None] = {
        SAVE_DURABLE: lambda: _durable(row, obj, path),
        SAVE: lambda: row.save(obj, path),
        LOAD: row.load and partial(row.load, path),
        LOAD_MAPPED: row.load_mapped and partial(row.load_mapped, path),
    }
    if one.failure or (action := actions[column]) is None:
        return
    _quiet(path)
    try:
        if column in (LOAD, LOAD_MAPPED):
            row.save(obj, path)
            _warm(path)
        gc.collect()
        began = time.perf_counter()
        _touch(action())
        one.seconds.setdefault(column, []).append(time.perf_counter() - began)
    except Exception as error:
        if row.name == "holdfast":
            raise
        one.failure = f"{column}: {type(error).__name__}: {error}"  # an old version, perhaps
    finally:
        path.unlink(missing_ok=True)


def _warm(path: Path) -> None:
    """Bring the whole file into the page cache."""
    block = bytearray(1 << 23)
    with path.open("rb", buffering=0) as f:
        while f.readinto(block):
            pass


def _durable(row: _Row, obj: Any, path: Path) -> None:
    """A save that has reached the device, directory and all."""
    if row.save_durable is not None:
        row.save_durable(obj, path)
        return
    row.save(obj, path)
    for place in (path, path.parent):
        fd = os.open(place, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _quiet(path: Path) -> None:
    """No file of an earlier round, and none of its bytes still on their way to the device."""
    path.unlink(missing_ok=True)
    os.sync()
    time.sleep(SETTLE)


def _check(checkpoint: dict[str, Any], folder: Path, out: TextIO) -> list[str]:
    """Save once, verify, load both ways, compare; say so, and return what was wrong."""
    path = folder / "checked"
    holdfast.save(checkpoint, path)
    report = holdfast.verify(path)
    problems = [str(problem) for problem in report.problems]
    for mmap in (False, True):
        found = holdfast.load(path, mmap=mmap)
        if (where := _difference(checkpoint, found)) is not None:
            problems.append(f"loaded with mmap={mmap}, {where} is not what was saved")
    path.unlink()
    for problem in problems:
        print(f"WRONG: {problem}", file=out)
    if not problems:
        print(
            f"Saved, verified ({report.checked} checksums), loaded eagerly and mapped: equal.",
            file=out,
        )
    return problems


def _difference(expected: Any, found: Any, path: str = "$") -> str | None:
    """Path of the first difference, or None. Tensors are compared by their bytes."""
    if type(expected) is not type(found):
        return path
    if isinstance(expected, dict):
        if list(expected) != list(found):
            return path
        pairs = [(f"{path}[{key!r}]", expected[key], found[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return path
        both = enumerate(zip(expected, found, strict=True))
        pairs = [(f"{path}[{i}]", one, two) for i, (one, two) in both]
    elif _is_tensor(expected):
        same = expected.dtype == found.dtype and expected.shape == found.shape
        return None if same and np.array_equal(_bytes(expected), _bytes(found)) else path
    else:
        return None if expected == found else path
    return next((where for p, a, b in pairs if (where := _difference(a, b, p))), None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def _bytes(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(tensor)).reshape(-1).view(np.uint8)


def _tensors(obj: Any) -> Iterator[Any]:
    return iter(_flatten(obj).values())


def _flatten(obj: Any) -> dict[str, Any]:
    """The distinct tensors of an object under dotted names: what the flat formats can hold."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{path}.{i}")
        elif _is_tensor(value) and id(value) not in seen:
            seen.add(id(value))
            found[path] = value

    walk(obj, "")
    return found


def _touch(obj: Any) -> None:
    """Read a byte of every page, so that a mapped load has no page left to fetch."""
    for tensor in _tensors(obj):
        flat = _bytes(tensor)
        if len(flat):
            flat[::PAGE].max()


# ---- the table --------------------------------------------------------------------------------


def _table(measured: list[_Measured], nbytes: int) -> str:
    ours = measured[0]
    lines = [
        f"Medians of {ROUNDS} in seconds (GB/s); times as long as holdfast in brackets.",
        "Loads are warm, and a byte of every page is read.",
        "",
        f"{'':<29}" + "".join(f"{column:>26}" for column in COLUMNS),
    ]
    for one in measured:
        cells = []
        for column in COLUMNS:
            seconds, base = one.median(column), ours.median(column)
            if seconds is None or base is None:
                cells.append("—")
                continue
            cell = f"{seconds:.3f} ({nbytes / seconds / 1e9:.2f})"
            cells.append(cell if one is ours else f"{cell} [{seconds / base:.1f}x]")
        lines.append(f"{one.row.name:<29}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
