"""The little of CuPy that staging calls, over the memory of the host.

Streams do what they are told at once; who should have waited for whom is written down.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from holdfast import _engine
from holdfast.staging.base import host_bytes

__all__ = ["fake_cupy"]


class _Strided:
    def __init__(self, address: int, shape: tuple, strides: tuple | None, dtype: np.dtype) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": dtype.str,
            "version": 3,
        }


def fake_cupy(devices: int = 2, *, nvrtc: bool = True, capacity: int = 1 << 30) -> Any:
    """A module; ``module.log`` is the list of what was called, as tuples."""
    module: Any = types.ModuleType("cupy")
    module.__version__ = "14.0"
    log: list[tuple] = []
    state = types.SimpleNamespace(device=0, stream=None, registered={}, used=0, events=0)
    module.log, module.state = log, state

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status: int) -> None:
            self.status = status
            super().__init__(f"cudaError: {status}")

    class Device:
        def __init__(self, number: int) -> None:
            self.id, self.before = number, []

        def __enter__(self) -> Any:
            self.before.append(state.device)
            state.device = self.id

        def __exit__(self, *_: object) -> None:
            state.device = self.before.pop()

    class Stream:
        def __init__(self, non_blocking: bool = False, ptr: int | None = None) -> None:
            self.ptr = ptr if ptr is not None else 1000 + state.device
            self.device, self.before = state.device, []

        def __enter__(self) -> Any:
            assert state.device == self.device, "the stream is another device's"
            self.before.append(state.stream)
            state.stream = self

        def __exit__(self, *_: object) -> None:
            state.stream = self.before.pop()

        def record(self, event: Any) -> None:
            log.append(("record", event.ptr, self.ptr))

        def wait_event(self, event: Any) -> None:
            log.append(("wait", event.ptr, self.ptr))

    class Event:
        def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
            assert disable_timing
            state.events += 1
            self.ptr, self.block = state.events, block

        def synchronize(self) -> None:
            assert self.block, "to wait is to sleep"
            log.append(("synchronize", self.ptr))
            if module.broken:
                raise CUDARuntimeError(700)

    class Memory:
        def __init__(self, nbytes: int) -> None:
            if state.used + nbytes > capacity:
                raise CUDARuntimeError(2) if module.raw else MemoryError("Out of memory")
            self.buffer = _engine.allocate(nbytes)
            self.ptr = self.buffer.address
            state.used += nbytes
            log.append(("alloc", nbytes, state.device, getattr(state.stream, "ptr", 0)))

        def __del__(self) -> None:
            if hasattr(self, "buffer"):
                state.used -= len(self.buffer)

    def memcpy_async(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        assert stream == 1000 + state.device
        log.append(("memcpy", kind, nbytes))
        host_bytes(target, nbytes)[:] = host_bytes(source, nbytes)

    def register(address: int, nbytes: int, flags: int) -> None:
        assert flags == 1
        assert address not in state.registered
        state.registered[address] = nbytes

    class RawKernel:
        def __init__(self, code: str, name: str) -> None:
            assert name in code

        def compile(self) -> None:
            if not nvrtc:
                raise RuntimeError("no NVRTC")

        def __call__(self, grid: tuple, block: tuple, arguments: tuple) -> None:
            log.append(("kernel", grid, state.device, state.stream.ptr))
            table = host_bytes(int(arguments[0]), 24 * grid[0]).view(np.uint64).reshape(-1, 3)
            for source, target, nbytes in table.tolist():
                assert 0 < nbytes <= 1 << 16
                host_bytes(target, nbytes)[:] = host_bytes(source, nbytes)

    def make(shape: tuple, dtype: np.dtype, pointer: int, strides: tuple | None) -> np.ndarray:
        assert state.stream is not None
        return np.asarray(_Strided(pointer, shape, strides, np.dtype(dtype)))

    module.broken = module.raw = False
    module.RawKernel, module.ndarray = RawKernel, make
    module.cuda = types.SimpleNamespace(
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc=Memory,
        get_current_stream=lambda: Stream(ptr=7),
        UnownedMemory=lambda address, size, owner, device: (address, size, device),
        MemoryPointer=lambda memory, offset: memory[0] + offset,
        runtime=types.SimpleNamespace(
            is_hip=False,
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: devices,
            getDevice=lambda: state.device,
            memGetInfo=lambda: (capacity - state.used, capacity),
            memcpyAsync=memcpy_async,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
            hostRegister=register,
            hostUnregister=lambda address: state.registered.pop(address),
            eventRecord=lambda event, stream: log.append(("record", event, stream)),
        ),
    )
    return module
