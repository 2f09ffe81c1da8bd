"""Micro-benchmarks of the parts of a save and a load: ``pytest benchmarks/micro``.

`COUNT` tensors of 1 KB each, so that a time in ms divided by ten is µs for each tensor.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import _engine, adapters, objects, tree
from holdfast.collect import collect
from holdfast.dtypes import BY_NAME
from holdfast.formats import safetensors
from holdfast.layout import Index, Plan
from holdfast.views import DENSE, VIEW, TensorBatch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

COUNT = 10_000
LENGTH = 256
Benchmark = Callable[..., Any]


@pytest.fixture(scope="module", params=["numpy", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name != "numpy":
        pytest.importorskip(name)
    return name


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {f"layers.{i}.weight": rng.standard_normal(LENGTH, np.float32) for i in range(COUNT)}


@pytest.fixture(scope="module")
def tensors(framework: str, arrays: dict[str, Any]) -> dict[str, Any]:
    if framework == "numpy":
        return arrays
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def batch(arrays: dict[str, Any]) -> TensorBatch:
    return collect(list(arrays), list(arrays.values())).batch


def plan_of(arrays: dict[str, Any], batch: TensorBatch) -> Plan:
    return safetensors.plan(
        list(arrays), batch, framework="numpy", metadata=None, structure=None, checksum=True
    )


@pytest.fixture(scope="module")
def head(arrays: dict[str, Any], batch: TensorBatch) -> bytes:
    return safetensors.seal(plan_of(arrays, batch), np.arange(COUNT, dtype=np.uint32))


def size_of(head: bytes) -> int:
    return len(head) + COUNT * LENGTH * 4


# ---- header -----------------------------------------------------------------------------------


def test_header_scan(benchmark: Benchmark, head: bytes) -> None:
    index: Index = benchmark(safetensors.parse, head, size_of(head), "benchmark")
    assert len(index) == COUNT


def test_header_scan_and_names(benchmark: Benchmark, head: bytes, arrays: dict[str, Any]) -> None:
    def scan() -> list[str]:
        return safetensors.parse(head, size_of(head), "benchmark").names.tolist()

    assert set(benchmark(scan)) == set(arrays)


def test_header_scan_by_json(benchmark: Benchmark, head: bytes) -> None:
    """The yardstick: what ``json.loads`` takes for the same header, without any check."""
    import json

    length = int.from_bytes(head[:8], "little")
    assert len(benchmark(json.loads, head[8 : 8 + length])) >= COUNT


def test_header_write(benchmark: Benchmark, arrays: dict[str, Any], batch: TensorBatch) -> None:
    crcs = np.arange(COUNT, dtype=np.uint32)

    def write() -> bytes:
        return safetensors.seal(plan_of(arrays, batch), crcs)

    made = benchmark(write)
    assert len(safetensors.parse(made, size_of(made), "benchmark")) == COUNT


# ---- checksums --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block() -> bytes:
    return np.random.default_rng(2).bytes(16 << 20)


def test_crc32_of_16_mib(benchmark: Benchmark, block: bytes) -> None:
    assert benchmark(_engine.crc32, block) == zlib.crc32(block)


def test_crc32_of_16_mib_by_zlib(benchmark: Benchmark, block: bytes) -> None:
    """The yardstick."""
    benchmark(zlib.crc32, block)


def test_crc32_of_1_kib(benchmark: Benchmark, block: bytes) -> None:
    part = block[:1024]
    assert benchmark(_engine.crc32, part) == zlib.crc32(part)


# ---- tensors and objects ----------------------------------------------------------------------


def test_describe(benchmark: Benchmark, framework: str, tensors: dict[str, Any]) -> None:
    adapter = adapters.by_name(framework)
    batch, kinds = benchmark(adapter.describe, list(tensors.values()), list(tensors))
    assert len(batch) == COUNT
    assert not kinds


def test_wrap(benchmark: Benchmark, framework: str) -> None:
    """Tensors over one block of memory, as a load makes them."""
    adapter = adapters.by_name(framework)
    buffer = _engine.allocate(COUNT * LENGTH * 4)
    views = np.zeros(COUNT, VIEW)
    views["nbytes"] = LENGTH * 4
    views["address"] = np.arange(COUNT, dtype=np.uint64) * (LENGTH * 4) + np.uint64(buffer.address)
    views["dims"] = np.arange(COUNT)
    views["ndim"] = 1
    views["dtype"] = BY_NAME["float32"].code
    views["flags"] = DENSE
    batch = TensorBatch(views, np.full(COUNT, LENGTH, np.int64), [buffer])
    made = benchmark(adapter.wrap, batch, {})
    assert len(made) == COUNT
    assert tuple(made[-1].shape) == (LENGTH,)


def test_flatten_a_flat_dict(benchmark: Benchmark, tensors: dict[str, Any]) -> None:
    flat, blobs = benchmark(objects.flatten, tensors)
    assert flat.names == list(tensors)
    assert not blobs


def test_flatten_a_training_checkpoint(benchmark: Benchmark, tensors: dict[str, Any]) -> None:
    """Half of the tensors a model, the rest the state of its optimizer under int keys."""
    items = list(tensors.items())
    half = len(items) // 2
    state = {
        i: {"step": float(i), "exp_avg": first, "exp_avg_sq": second}
        for i, ((_, first), (_, second)) in enumerate(
            zip(items[half::2], items[half + 1 :: 2], strict=True)
        )
    }
    checkpoint = {
        "model": dict(items[:half]),
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]},
        "epoch": 3,
    }
    flat, _ = benchmark(objects.flatten, checkpoint)
    assert len(flat.names) == COUNT


def test_decode_a_flat_dict(benchmark: Any, tensors: dict[str, Any]) -> None:
    """Of names that were never hashed, as those of a header are."""
    values = list(tensors.values())

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = [name.encode().decode() for name in tensors]
        return (None, values, names, ()), {"name": "x"}

    made = benchmark.pedantic(tree.decode_tree, setup=fresh, rounds=100)
    assert list(made) == list(tensors)
    assert made["layers.7.weight"] is values[7]


# ---- publishing -------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_publish(benchmark: Benchmark, durable: bool, tmp_path: Path) -> None:
    """A file of 4 KiB that replaces one: begin, write, commit."""
    target = tmp_path / "target"
    target.write_bytes(b"old")
    content = b"x" * 4096

    def publish() -> None:
        with _engine.Publication(target) as publication:
            os.write(publication.fd, content)
            publication.commit(durable)

    benchmark(publish)
    assert target.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
