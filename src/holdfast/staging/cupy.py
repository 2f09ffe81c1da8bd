# ruff: noqa: D102 (the protocol says what its methods do)
"""CUDA devices through CuPy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._buffer import Buffer
from .base import CopyLostError, Device, Event, out_of_memory, word

__all__ = ["CupyDevice"]

#: ``cudaHostRegisterPortable``: pinned for all devices, not the current one alone.
PORTABLE = 1
#: What one block of threads moves, at most.
CHUNK = 64 << 10
THREADS = 256
#: ``cudaErrorMemoryAllocation``
NO_MEMORY = 2

#: Rows of (from, to, bytes), one for each block of threads. Words as wide as both addresses allow.
_MOVE = r"""
#define MOVE(word)                                                                             \
    do {                                                                                       \
        const size_t width = sizeof(word);                                                     \
        size_t lead = (width - (size_t)to % width) % width;                                    \
        lead = lead < nbytes ? lead : nbytes;                                                  \
        const size_t words = (nbytes - lead) / width;                                          \
        const word *source = (const word *)(from + lead);                                      \
        word *target = (word *)(to + lead);                                                    \
        for (size_t i = threadIdx.x; i < lead; i += blockDim.x)                                \
            to[i] = from[i];                                                                   \
        for (size_t i = threadIdx.x; i < words; i += blockDim.x)                               \
            target[i] = source[i];                                                             \
        for (size_t i = lead + words * width + threadIdx.x; i < nbytes; i += blockDim.x)       \
            to[i] = from[i];                                                                   \
    } while (0)

extern "C" __global__ void holdfast_move(const unsigned long long *table)
{
    const unsigned long long *row = table + 3 * (size_t)blockIdx.x;
    const unsigned char *from = (const unsigned char *)row[0];
    unsigned char *to = (unsigned char *)row[1];
    const size_t nbytes = (size_t)row[2];
    const size_t apart = (size_t)(row[0] ^ row[1]);
    if (apart % 16 == 0)
        MOVE(uint4);
    else if (apart % 4 == 0)
        MOVE(unsigned int);
    else
        MOVE(unsigned char);
}
"""


class _CupyEvent:
    """A CUDA event, and what the copies before it need."""

    def __init__(self, name: str, event: Any, kept: list[object]) -> None:
        self._name, self._event, self._kept = name, event, kept

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            # An error of the context says nothing about what was under way.
            raise CopyLostError(f"{self._name}: copying failed: {error}") from error
        self._kept.clear()


class CupyDevice(Device):
    """A CUDA device, its copies in a stream of their own.

    Raises
    ------
    ImportError, RuntimeError
        CuPy is not there, or cannot use the device.
    """

    def __init__(self, number: int) -> None:
        import cupy

        self.name = f"cuda:{number}"
        self._number = number
        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        if self._runtime.is_hip:
            raise RuntimeError("this CuPy was built for ROCm, not for CUDA")
        count = self._runtime.getDeviceCount()
        if number >= count:
            raise RuntimeError(f"there are {count} CUDA devices, no number {number}")
        self._device: Any = cupy.cuda.Device(number)
        with self._device:
            self._stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._kernel: Any = None
        self._kept: list[object] = []

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Device and stream are the current ones inside the block."""
        with self._device, self._stream:
            yield

    # ---- memory --------------------------------------------------------------------------------

    def allocate(self, nbytes: int, framework: str | None) -> tuple[int, object]:
        if framework == "torch":
            from .torch import allocate

            return allocate(self._number, nbytes)
        # The pool keeps memory by stream: that of the ring must not be another stream's before.
        with self._current() if framework is None else self._device:
            memory = self._take(nbytes)
            if memory is None:
                torch: Any = sys.modules.get("torch")
                if torch is not None and torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # what it keeps for itself may be all there is
                    memory = self._take(nbytes)
            if memory is None:
                raise self._no_room(nbytes)
        return int(memory.ptr), memory

    def _take(self, nbytes: int) -> Any:
        """Memory from CuPy's pool; None where there is no room."""
        try:
            return self._cupy.cuda.alloc(nbytes)
        except MemoryError:
            return None
        except self._runtime.CUDARuntimeError as error:
            if error.status != NO_MEMORY:
                raise
            return None

    def _no_room(self, nbytes: int) -> MemoryError:
        try:
            free, total = self._runtime.memGetInfo()
        except RuntimeError:
            free = total = None
        return out_of_memory(self.name, nbytes, free, total)

    def pin(self, buffer: Buffer) -> None:
        with self._device:
            self._runtime.hostRegister(buffer.address, len(buffer), PORTABLE)

    def unpin(self, buffer: Buffer) -> None:
        with self._device:
            self._runtime.hostUnregister(buffer.address)

    # ---- order ---------------------------------------------------------------------------------

    def begin(self) -> None:
        with self._device:
            self._after(self._cupy.cuda.get_current_stream().ptr)
            torch: Any = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                self._after(torch.cuda.current_stream(self._number).cuda_stream)

    def _after(self, stream: int) -> None:
        """Make our stream wait for what is in another one now."""
        event = self._cupy.cuda.Event(disable_timing=True)
        self._runtime.eventRecord(event.ptr, stream)
        self._stream.wait_event(event)

    def record(self) -> Event:
        with self._device:
            # One that sleeps rather than spins: the processor has the engine's work to do.
            event = self._cupy.cuda.Event(block=True, disable_timing=True)
            self._stream.record(event)
        kept, self._kept = self._kept, []
        return _CupyEvent(self.name, event, kept)

    # ---- copies --------------------------------------------------------------------------------

    def to_host(self, copies: np.ndarray) -> None:
        move, kind = self._runtime.memcpyAsync, self._runtime.memcpyDeviceToHost
        with self._device:
            for there, here, nbytes in copies.tolist():
                move(here, there, nbytes, kind, self._stream.ptr)

    def to_device(self, copies: np.ndarray) -> None:
        move, kind = self._runtime.memcpyAsync, self._runtime.memcpyHostToDevice
        with self._device:
            for there, here, nbytes in copies.tolist():
                move(there, here, nbytes, kind, self._stream.ptr)

    def gather(self, copies: np.ndarray, scratch: int) -> None:
        self._move(copies["device"], _image(copies, scratch), copies["nbytes"])

    def scatter(self, copies: np.ndarray, scratch: int) -> None:
        self._move(_image(copies, scratch), copies["device"], copies["nbytes"])

    def _move(self, source: np.ndarray, target: np.ndarray, nbytes: np.ndarray) -> None:
        """Submit copies within the device: one kernel for all."""
        with self._current():
            kernel = self._compiled()
            table = _chunks(source, target, nbytes)
            memory = None if kernel is None else self._take(table.nbytes)
            if memory is None:  # one by one they need nothing
                move, kind = self._runtime.memcpyAsync, self._runtime.memcpyDeviceToDevice
                for row in zip(target.tolist(), source.tolist(), nbytes.tolist(), strict=True):
                    move(*row, kind, self._stream.ptr)
                return
            self._kept.append((table, memory))
            self._runtime.memcpyAsync(
                memory.ptr,
                table.ctypes.data,
                table.nbytes,
                self._runtime.memcpyHostToDevice,
                self._stream.ptr,
            )
            kernel((len(table),), (THREADS,), (np.uint64(memory.ptr),))

    def _compiled(self) -> Any:
        """The kernel; None where it cannot be compiled, for want of NVRTC or of headers."""
        if self._kernel is None:
            try:
                kernel = self._cupy.RawKernel(_MOVE, "holdfast_move")
                kernel.compile()
                self._kernel = kernel
            except Exception:
                self._kernel = False  # one copy for each piece does the same, but slower
        return self._kernel or None

    def strided(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        itemsize: int,
        scratch: int,
    ) -> None:
        unit = word(itemsize, address, scratch, *strides)
        extents = (*shape, itemsize // unit)
        with self._current():
            source = self._array(address, extents, (*strides, unit), unit)
            self._array(scratch, extents, None, unit)[...] = source

    def _array(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, unit: int
    ) -> Any:
        """Memory of the device as an array of words."""
        cuda = self._cupy.cuda
        # The size is only said: an array is made with the strides it is given, either way.
        memory = cuda.UnownedMemory(address, unit * int(np.prod(shape)), None, self._number)
        pointer = cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray(shape, np.dtype(f"u{unit}"), pointer, strides)


def _image(copies: np.ndarray, scratch: int) -> np.ndarray:
    """Where in scratch memory each piece has its place."""
    places: np.ndarray = copies["host"] - copies["host"][0] + np.uint64(scratch)
    return places


def _chunks(source: np.ndarray, target: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Rows of the kernel's table: pieces of at most CHUNK bytes."""
    counts = (nbytes.astype(np.int64) + CHUNK - 1) // CHUNK
    piece = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    into = ((np.arange(len(piece)) - first[piece]) * CHUNK).astype(np.uint64)
    table = np.empty((len(piece), 3), np.uint64)
    table[:, 0] = source[piece] + into
    table[:, 1] = target[piece] + into
    table[:, 2] = np.minimum(nbytes[piece] - into, np.uint64(CHUNK))
    return table
