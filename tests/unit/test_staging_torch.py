"""CUDA through torch: its code, over a torch whose CUDA is the memory of the host."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fake_cupy import fake_cupy
from holdfast import staging
from holdfast.staging import registry, ring
from holdfast.staging import torch as real
from holdfast.staging.base import COPY
from staged import BLOCK, CODES, SMALL, Case, drain, fill

actual = pytest.importorskip("torch")


class OutOfMemoryError(RuntimeError):
    """torch's own."""


class FakeCuda:
    """``torch.cuda``, its streams numbers, its memory the host's."""

    OutOfMemoryError = OutOfMemoryError

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.registered: dict[int, int] = {}
        self.number, self.now = 0, 0
        self.code = 0
        self.broken = False
        cuda = self

        class Stream:
            def __init__(self, device: int = 0, cuda_stream: int | None = None) -> None:
                self.cuda_stream = 1000 + device if cuda_stream is None else cuda_stream

            def wait_stream(self, other: Any) -> None:
                cuda.log.append(("wait", other.cuda_stream, self.cuda_stream))

        class Event:
            def __init__(self, blocking: bool) -> None:
                assert blocking, "to wait is to sleep"

            def record(self, stream: Any) -> None:
                cuda.log.append(("record", stream.cuda_stream))

            def synchronize(self) -> None:
                if cuda.broken:
                    raise RuntimeError("CUDA error: an illegal memory access")

        self.Stream, self.Event = Stream, Event

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 1

    def current_stream(self, number: int) -> Any:
        return self.Stream(cuda_stream=50 + number)

    def default_stream(self, number: int) -> Any:
        return self.Stream(cuda_stream=0)

    def ExternalStream(self, pointer: int, device: int) -> Any:
        assert pointer
        return self.Stream(cuda_stream=pointer)

    @contextlib.contextmanager
    def device(self, number: int) -> Iterator[None]:
        before, self.number = self.number, number
        yield
        self.number = before

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.cuda_stream
        yield
        self.now = before

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return 600, 1000

    def cudart(self) -> Any:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        if not self.code:
            self.registered[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"error number {code}"


def fake_torch(foreach: bool = True) -> Any:
    """A module whose tensors on CUDA are ones of the host."""
    module: Any = types.ModuleType("torch")
    module.__version__ = "2.11"
    module.version = types.SimpleNamespace(hip=None, cuda="12.8")
    module.cuda = FakeCuda()
    module.uint8, module.no_grad, module.from_numpy = (
        actual.uint8,
        actual.no_grad,
        actual.from_numpy,
    )
    module.device = lambda kind, number: (kind, number)
    module.most = 1 << 30

    def as_tensor(memory: Any, device: tuple[str, int]) -> Any:
        assert device[0] == "cuda"
        told = dict(memory.__cuda_array_interface__, version=3)
        assert min(told["strides"] or (1,)) >= 0, "torch has no negative strides"
        holder = type("Memory", (), {"__array_interface__": told})()
        return actual.from_numpy(np.array(holder, copy=module.copies))

    def empty(nbytes: int, dtype: Any, device: tuple[str, int]) -> Any:
        if nbytes > module.most:
            raise OutOfMemoryError("CUDA out of memory")
        module.cuda.log.append(("empty", nbytes, module.cuda.now))
        return actual.empty(nbytes, dtype=dtype)

    def zeros(n: int, device: tuple[str, int]) -> Any:
        module.cuda.log.append(("zeros", n))
        raise RuntimeError("what the runtime remembered")

    module.copies = False
    module.as_tensor, module.empty, module.zeros = as_tensor, empty, zeros
    if foreach and hasattr(actual, "_foreach_copy_"):
        module._foreach_copy_ = actual._foreach_copy_
    return module


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    module = fake_torch(getattr(request, "param", True))
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(ring, "PIN_FROM", 0)
    before = dict(registry._found)
    registry._found.clear()
    yield module
    module.cuda.broken = False
    staging.release_pinned()
    registry._found.clear()
    registry._found.update(before)


def test_torch_is_what_is_left(torch: Any) -> None:
    found = staging.device(CODES[1])
    assert isinstance(found, real.TorchDevice)
    assert found.name == "cuda:1"
    assert staging.resolve("cuda") == CODES[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: setattr(t.version, "hip", "6.0"), "this torch was built for ROCm"),
        (lambda t: setattr(t.version, "cuda", None), r"this torch \(2.11\) was built without CUDA"),
        (lambda t: setattr(t.cuda, "is_available", lambda: False), "torch finds no CUDA device"),
        (lambda t: setattr(t.cuda, "device_count", lambda: 1), "there are 1 CUDA devices, no"),
    ],
)
def test_a_torch_that_is_of_no_use(torch: Any, change: Any, text: str) -> None:
    change(torch)
    with pytest.raises(RuntimeError, match=f"cuda:1: .*torch: {text}"):
        staging.device(CODES[1])


def test_a_torch_without_cuda_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if actual.version.cuda or actual.version.hip:
        pytest.skip("this torch knows devices")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match="was built without CUDA"):
        staging.device(CODES[0])


@pytest.mark.parametrize("torch", [True, False], ids=["foreach", "apart"], indirect=True)
def test_there_and_back(torch: Any) -> None:
    sizes = [2 * BLOCK + 7, *range(1, 2000, 97), 70_001, 70_002]
    case = Case([(n, 1 + i % 15 // 14, 0, 0) for i, n in enumerate(sizes)])
    assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
    case.check_crcs()
    assert len(torch.cuda.registered) == SMALL.blocks
    case.wipe()
    fill(case, case.to_device())
    case.check_memory()
    scratch = [entry for entry in torch.cuda.log if entry[:2] == ("empty", BLOCK)]
    assert len(scratch) == 2
    assert {entry[2] for entry in scratch} == {1000}, "in the stream that uses it"
    staging.release_pinned()
    assert not torch.cuda.registered


def test_copies_wait_for_what_was_computed(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(100, 2, 0, 0)])
    torch.cuda.log.clear()
    drain(case, case.to_host())
    assert torch.cuda.log == [("wait", 51, 1001), ("record", 1001)]
    cupy = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for pointer in (7, 0):
        torch.cuda.log.clear()
        cupy.cuda.get_current_stream = lambda ptr=pointer: types.SimpleNamespace(ptr=ptr)
        drain(case, case.to_host())
        assert torch.cuda.log[:2] == [("wait", 51, 1001), ("wait", pointer, 1001)]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4", "<f8", "<c16"])
@pytest.mark.parametrize("turned", [False, True])
def test_strided(torch: Any, dtype: str, turned: bool) -> None:
    array = np.random.default_rng(0).integers(0, 99, (30, 20, 10)).astype(dtype)
    case = Case([(array.nbytes, 1, 0, 0)])
    case.now(0)[:] = array.reshape(-1).view(np.uint8)
    view = (array[::-1, :, ::-1] if turned else array).transpose(2, 0, 1)
    away = view.__array_interface__["data"][0] - array.__array_interface__["data"][0]
    case.segments["address"][0] += np.uint64(away)
    case.content[0] = np.frombuffer(view.tobytes(), np.uint8)
    layouts = [(0, view.shape, view.strides, view.itemsize, 0)]
    assert drain(case, case.to_host(layouts=layouts)) == [view.tobytes()]


def test_a_full_device(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.most = 600
    with pytest.raises(MemoryError, match="cuda:0: cannot allocate 700 bytes, 600 of 1000 are"):
        staging.allocate(CODES[0], 700, "torch")
    # What CuPy keeps for itself is asked back before that is said.
    cupy = fake_cupy()
    pool = types.SimpleNamespace(free_all_blocks=lambda: setattr(torch, "most", 700))
    cupy.get_default_memory_pool = lambda: pool
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert len(staging.allocate(CODES[0], 700, "torch")) == 700


def test_memory_that_cannot_be_pinned(torch: Any) -> None:
    case = Case([(9 * BLOCK, 1, 0, 0)])
    torch.cuda.code = 2
    torch.cuda.log.clear()
    with pytest.warns(UserWarning, match=r"cuda:0: error number 2 \(CUDA error 2\)"):
        drain(case, case.to_host())
    assert ("zeros", 1) in torch.cuda.log, "the runtime forgets the error"
    case.check_crcs()


def test_memory_that_is_not_the_device_s(torch: Any) -> None:
    case = Case([(100, 1, 0, 0)])
    torch.copies = True
    with pytest.raises(RuntimeError, match="cuda:0: torch made a copy of the memory at 0x"):
        drain(case, case.to_host())


def test_a_broken_context_says_so(torch: Any) -> None:
    event = staging.device(CODES[0]).record()
    torch.cuda.broken = True
    with pytest.raises(staging.CopyLostError, match="cuda:0: copying failed: CUDA error"):
        event.wait()


def test_cupy_s_device_takes_memory_from_torch(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    buffer = staging.allocate(CODES[0], 100, "torch")
    assert ("empty", 100, 0) in torch.cuda.log
    assert not cupy.state.used
    assert len(buffer) == 100


@pytest.mark.parametrize("torch", [True, False], indirect=True, ids=["together", "one by one"])
@pytest.mark.parametrize("overlap", [False, True])
def test_pieces_anywhere_in_any_order(torch: Any, overlap: bool) -> None:
    device = real.TorchDevice(0)
    random = np.random.default_rng(1)
    memories = [random.integers(0, 256, 5000, np.uint8) for _ in range(4)]
    rows = [
        (which, int(start), int(random.integers(1, 90)))
        for which in range(4)
        for start in range(0, 4900, 100)
    ]
    if overlap:
        rows += [(0, 150, 100), (0, 100, 5), (2, 0, 5000)]
    random.shuffle(rows)
    copies = np.zeros(len(rows), COPY)
    at = 1 << 20
    for i, (which, start, n) in enumerate(rows):
        copies[i] = (memories[which].ctypes.data + start, at, n)
        at += n + i % 3
    size = at - (1 << 20)
    scratch = np.zeros(size, np.uint8)
    device.gather(copies, scratch.ctypes.data)
    expected = np.zeros(size, np.uint8)
    for (which, start, n), here in zip(rows, copies["host"].tolist(), strict=True):
        expected[here - (1 << 20) :][:n] = memories[which][start : start + n]
    assert scratch.tobytes() == expected.tobytes()
    before = [memory.copy() for memory in memories]
    for memory in memories:
        memory[:] = 0
    device.scatter(copies, scratch.ctypes.data)
    for which, start, n in rows:
        assert (memories[which][start : start + n] == before[which][start : start + n]).all()
