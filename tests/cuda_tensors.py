"""Tensors of torch on a CUDA device, what they should be, and what a call took: for tests/gpu."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import staging
from holdfast.dtypes import BY_TORCH

__all__ = [
    "RING",
    "Counts",
    "Taken",
    "made",
    "occupied",
    "raw",
    "same",
    "small_ring",
    "spread",
    "taken",
]

MIB = 1 << 20
#: A ring that a few hundred kilobytes go round in.
RING = staging.Staging(block_size=1 << 16, blocks=3)


def made(name: str, shape: tuple[int, ...], seed: int = 0, device: str = "cuda") -> Any:
    """A tensor of random bytes; `name` is an attribute of torch."""
    import torch

    row = BY_TORCH[name]
    rng = np.random.default_rng([seed, *map(ord, name), *shape])
    nbytes = row.nbytes(shape)
    data = torch.empty(nbytes, dtype=torch.uint8, device=device)
    data[:] = torch.from_numpy(rng.integers(0, 2 if name == "bool" else 256, nbytes, np.uint8))
    return data.view(getattr(torch, name)).view(shape)


def raw(tensor: Any) -> bytes:
    """The bytes of its elements in C order."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).cpu().numpy().tobytes()) if flat.numel() else b""


def same(found: Any, expected: Any, device: str = "cuda:0") -> None:
    """Assert that two dicts of tensors are equal to the bit, the first of them on `device`."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        other = found[name]
        assert type(other) is type(tensor), name
        assert str(other.device) == device, name
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert other.requires_grad == tensor.requires_grad, name
        assert raw(other) == raw(tensor), name


def spread(device: str = "cuda") -> dict[str, Any]:
    """Tensors of odd and even sizes: larger than the small ring, many that are tiny, empty ones."""
    import torch

    sizes = [700_001, 65_536, 65_537, 4096, 4095, 1, 0]
    found = {f"u{n}": made("uint8", (n,), device=device) for n in sizes}
    rng = np.random.default_rng(0)
    found |= {
        f"s{i}": made("uint8", (int(n),), i, device)
        for i, n in enumerate(rng.integers(1, 3000, 60))
    }
    found["f4"] = made("float32", (123, 77), device=device)
    found["f2"] = made("float16", (999,), device=device)
    found["i8"] = made("int64", (7, 0, 3), device=device)
    found["scalar"] = torch.tensor(3.5, device=device)
    found["bool"] = made("bool", (77,), device=device)
    return found


@contextmanager
def small_ring(pinned: bool) -> Iterator[staging.Staging]:
    """The small ring, of memory that is pinned however little goes through it, or never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.staging.ring.PIN_FROM", 0 if pinned else 1 << 60)
        yield RING


class Counts:
    """What a device was asked for: calls and rows of each kind of copy, and memory pinned."""

    def __init__(self, device: Any, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.pinned = self.most = 0
        for name in ("to_host", "to_device", "gather", "scatter", "strided"):
            patch.setattr(device, name, self._counting(name, getattr(device, name)))
        pin, unpin = device.pin, device.unpin

        def count(buffer: Any, nbytes: int) -> None:
            self.pinned += nbytes
            self.most = max(self.most, self.pinned)

        patch.setattr(device, "pin", lambda b: (pin(b), count(b, len(b)))[0])
        patch.setattr(device, "unpin", lambda b: (unpin(b), count(b, -len(b)))[0])

    def _counting(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any) -> None:
            self.calls[name] += 1
            self.rows[name] += len(arguments[0]) if name != "strided" else 1
            call(*arguments)

        return counted


def occupied() -> int:
    """Bytes of the device that torch's tensors have and that CuPy keeps."""
    import torch

    gc.collect()
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None:
        cupy.get_default_memory_pool().free_all_blocks()
    pool = 0 if cupy is None else int(cupy.get_default_memory_pool().total_bytes())
    return int(torch.cuda.memory_allocated()) + pool


class Taken:
    """What a block took at most, beside what was there before: of the host, of the device."""

    host = device = 0


@contextmanager
def taken() -> Iterator[Taken]:
    """Watch memory inside the block: the host's is sampled, the device's is what torch counts."""
    import torch

    found, stop = Taken(), threading.Event()
    before = occupied()
    torch.cuda.reset_peak_memory_stats()
    start = highest = _resident()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(0.001):
            highest = max(highest, _resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
        highest = max(highest, _resident())
    finally:
        stop.set()
        thread.join()
    cupy: Any = sys.modules.get("cupy")
    pool = 0 if cupy is None else int(cupy.get_default_memory_pool().total_bytes())
    found.host = highest - start
    found.device = int(torch.cuda.max_memory_allocated()) + pool - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
