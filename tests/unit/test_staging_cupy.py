"""CUDA through CuPy: its code, over a CuPy that moves memory of the host."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fake_cupy import fake_cupy
from holdfast import staging
from holdfast.staging import cupy as real
from holdfast.staging import registry, ring
from holdfast.staging.pool import POOL
from staged import BLOCK, CODES, SMALL, Case, drain, fill


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Neither CuPy nor torch can be imported; what was found is forgotten."""
    for name in ("cupy", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(ring, "PIN_FROM", 0)
    before = dict(registry._found)
    registry._found.clear()
    yield monkeypatch
    staging.release_pinned()
    registry._found.clear()
    registry._found.update(before)


@pytest.fixture
def cupy(absent: pytest.MonkeyPatch) -> Any:
    module = fake_cupy()
    absent.setitem(sys.modules, "cupy", module)
    return module


def test_without_either_the_message_says_what_to_install(absent: object) -> None:
    with pytest.raises(RuntimeError, match=r"cuda:1: .*install cupy-cuda12x.*; cupy: .*; torch"):
        staging.device(CODES[1])


def test_other_devices_are_refused(cupy: Any) -> None:
    with pytest.raises(RuntimeError, match="device 3 of DLPack's kind 10"):
        staging.device(10 << 16 | 3)
    with pytest.raises(RuntimeError, match="cupy: there are 2 CUDA devices, no number 5"):
        staging.device((2 << 16) + 5)
    cupy.cuda.runtime.is_hip = True
    with pytest.raises(RuntimeError, match="cupy: this CuPy was built for ROCm"):
        staging.device(CODES[0])


def test_a_cupy_that_breaks_on_import_is_a_reason(absent: pytest.MonkeyPatch) -> None:
    def broken(name: str, package: str) -> object:
        raise ValueError(f"{name}: numpy.dtype size changed")

    absent.setattr(registry.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="numpy.dtype size changed"):
        staging.device(CODES[0])


def test_the_device_is_made_once(cupy: Any) -> None:
    found = staging.device(CODES[1])
    assert isinstance(found, real.CupyDevice)
    assert found.name == "cuda:1"
    assert staging.device(CODES[1]) is found


@pytest.mark.parametrize("nvrtc", [True, False])
def test_there_and_back(absent: pytest.MonkeyPatch, nvrtc: bool) -> None:
    cupy = fake_cupy(nvrtc=nvrtc)
    absent.setitem(sys.modules, "cupy", cupy)
    sizes = [2 * BLOCK + 7, *range(1, 2000, 97), 70_001, 70_002]
    case = cupy_case([(n, 1 + i % 15 // 14, 0, 0) for i, n in enumerate(sizes)])
    cupy.log.clear()
    assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
    case.check_crcs()
    assert len(cupy.state.registered) == SMALL.blocks
    case.wipe()
    fill(case, case.to_device())
    case.check_memory()
    names = [entry[0] for entry in cupy.log]
    assert ("kernel" in names) == nvrtc
    assert all(entry[3] == 1000 + entry[2] for entry in cupy.log if entry[0] == "kernel")
    assert cupy.state.used == case.nbytes, "scratch memory and tables are freed"
    staging.release_pinned()
    assert not cupy.state.registered


def cupy_case(rows: list[tuple[int, int, int, int]]) -> Case:
    """A case in CuPy's memory."""
    allocate = staging.allocate
    staging.allocate = lambda code, nbytes, _: allocate(code, nbytes, "cupy")
    try:
        return Case(rows)
    finally:
        staging.allocate = allocate


def test_copies_wait_for_what_was_computed(cupy: Any, absent: pytest.MonkeyPatch) -> None:
    case = cupy_case([(100, 2, 0, 0)])
    cupy.log.clear()
    drain(case, case.to_host())
    ours = 1001
    (_, event, stream), waited = cupy.log[:2]
    assert stream == 7, "CuPy's current stream"
    assert waited == ("wait", event, ours)
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True,
        current_stream=lambda number: types.SimpleNamespace(cuda_stream=50 + number),
    )
    absent.setitem(sys.modules, "torch", torch)
    cupy.log.clear()
    drain(case, case.to_host())
    assert [entry[2] for entry in cupy.log[:4]] == [7, ours, 51, ours]


def test_memory_of_the_ring_is_of_its_stream(cupy: Any) -> None:
    case = cupy_case([(100, 1, 0, 0)] * 20)
    assert {entry[3] for entry in cupy.log if entry[0] == "alloc"} == {0}, "the caller's stream"
    cupy.log.clear()
    drain(case, case.to_host())
    assert {entry[3] for entry in cupy.log if entry[0] == "alloc"} == {1000}


@pytest.mark.parametrize("raw", [False, True])
def test_a_device_without_room_for_the_table(
    cupy: Any, absent: pytest.MonkeyPatch, raw: bool
) -> None:
    case = cupy_case([(100, 1, 0, 0)] * 40)
    before, cupy.raw = cupy.cuda.alloc, raw

    def little(nbytes: int) -> object:
        if nbytes == 40 * 24:
            raise cupy.cuda.runtime.CUDARuntimeError(2) if raw else MemoryError("Out of memory")
        return before(nbytes)

    absent.setattr(cupy.cuda, "alloc", little)
    cupy.log.clear()
    assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
    assert [entry[1] for entry in cupy.log if entry[0] == "memcpy"] == [3] * 40 + [2]


@pytest.mark.parametrize("raw", [False, True])
def test_a_full_device(absent: pytest.MonkeyPatch, raw: bool) -> None:
    cupy = fake_cupy(capacity=1000)
    cupy.raw = raw
    absent.setitem(sys.modules, "cupy", cupy)
    kept = staging.allocate(CODES[0], 400, "jax")
    with pytest.raises(MemoryError, match="cuda:0: cannot allocate 700 bytes, 600 of 1000 are"):
        staging.allocate(CODES[0], 700, "cupy")
    # What torch keeps for itself is asked back before that is said.
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, empty_cache=lambda: owners.clear()
    )
    owners = [kept]
    del kept
    absent.setitem(sys.modules, "torch", torch)
    assert len(staging.allocate(CODES[0], 700, "cupy")) == 700
    assert not owners
    absent.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError):
        staging.allocate(CODES[0], 100, "torch")


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4", "<c16"])
def test_strided(cupy: Any, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 99, (30, 20, 10)).astype(dtype)
    case = cupy_case([(array.nbytes, 1, 0, 0)])
    case.now(0)[:] = array.reshape(-1).view(np.uint8)
    view = array.transpose(2, 0, 1)
    case.content[0] = np.frombuffer(view.tobytes(), np.uint8)
    layouts = [(0, view.shape, view.strides, view.itemsize, 0)]
    assert drain(case, case.to_host(layouts=layouts)) == [view.tobytes()]


def test_another_error_of_the_runtime_is_no_want_of_memory(cupy: Any) -> None:
    def broken(nbytes: int) -> object:
        raise cupy.cuda.runtime.CUDARuntimeError(700)

    cupy.cuda.alloc = broken
    with pytest.raises(RuntimeError, match="cudaError: 700"):
        staging.allocate(CODES[0], 10, "cupy")


def test_a_broken_context_keeps_the_memory(cupy: Any) -> None:
    case = cupy_case([(9 * BLOCK, 1, 0, 0)])
    before = len(POOL.leaked)
    cupy.broken = True
    with pytest.raises(staging.CopyLostError, match="cuda:0: copying failed: cudaError: 700"):
        drain(case, case.to_host())
    assert len(POOL.leaked) == before + SMALL.blocks + 1
    for owner in POOL.leaked[before:]:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(owner))
    del owner, POOL.leaked[before:]
    cupy.broken = False


def test_tables_have_rows_of_at_most_64_kib() -> None:
    nbytes = np.array([1, 1 << 16, (1 << 17) + 5], np.uint64)
    source = np.array([100, 1000, 1 << 30], np.uint64)
    table = real._chunks(source, source + np.uint64(1 << 40), nbytes)
    assert table[:, 2].tolist() == [1, 1 << 16, 1 << 16, 1 << 16, 5]
    assert table[:, 0].tolist() == [
        100,
        1000,
        1 << 30,
        (1 << 30) + (1 << 16),
        (1 << 30) + (1 << 17),
    ]
    assert ((table[:, 1] - table[:, 0]) == 1 << 40).all()


def test_names_of_devices(cupy: Any) -> None:
    assert staging.resolve("cuda") == CODES[0]
    cupy.state.device = 1
    assert staging.resolve("cuda") == CODES[1]
    assert staging.resolve(types.SimpleNamespace(type="cuda", index=1)) == CODES[1]
    assert staging.resolve(types.SimpleNamespace(type="cpu", index=None)) == 0
    assert staging.resolve(CODES[1]) == CODES[1]
    for wrong in ("cuda:x", "cuda:", "cuda:70000", "mps", -1):
        with pytest.raises(ValueError, match="device"):
            staging.resolve(wrong)
    with pytest.raises(TypeError, match="not float"):
        staging.resolve(1.0)
