# ruff: noqa: D102 (the protocol says what its methods do)
"""CUDA devices through torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._buffer import Buffer
from .base import CopyLostError, Device, Event, host_bytes, out_of_memory, word

__all__ = ["TorchDevice", "allocate"]

#: ``cudaHostRegisterPortable``: pinned for all devices, not the current one alone.
PORTABLE = 1


class _CudaMemory:
    """Memory of a device that torch is told of."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, typestr: str
    ) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 2,
        }


class _TorchEvent:
    """A CUDA event."""

    def __init__(self, name: str, event: Any) -> None:
        self._name, self._event = name, event

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            # An error of the context says nothing about what was under way.
            raise CopyLostError(f"{self._name}: copying failed: {error}") from error


class TorchDevice(Device):
    """A CUDA device, its copies in a stream of their own.

    Raises
    ------
    ImportError, RuntimeError
        torch is not there, or cannot use the device.
    """

    def __init__(self, number: int) -> None:
        self._torch = _usable(number)
        self.name = f"cuda:{number}"
        self._number = number
        self._device = self._torch.device("cuda", number)
        self._stream = self._torch.cuda.Stream(device=number)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Device and stream are the current ones inside the block."""
        torch = self._torch
        with torch.cuda.device(self._number), torch.cuda.stream(self._stream), torch.no_grad():
            yield

    # ---- memory --------------------------------------------------------------------------------

    def allocate(self, nbytes: int, framework: str | None) -> tuple[int, object]:
        if framework is not None:
            return allocate(self._number, nbytes)
        # torch keeps memory by stream: that of the ring must not be another stream's before.
        with self._current():
            return allocate(self._number, nbytes)

    def pin(self, buffer: Buffer) -> None:
        cudart = self._torch.cuda.cudart()
        with self._torch.cuda.device(self._number):
            self._check(cudart.cudaHostRegister(buffer.address, len(buffer), PORTABLE))

    def unpin(self, buffer: Buffer) -> None:
        cudart = self._torch.cuda.cudart()
        with self._torch.cuda.device(self._number):
            self._check(cudart.cudaHostUnregister(buffer.address))

    def _check(self, code: Any) -> None:
        """Raise what a call of the runtime returned, unless that is success."""
        if int(code) == 0:
            return
        text = self._torch.cuda.cudart().cudaGetErrorString(code)
        # The runtime remembers the error, and torch would raise it after the next kernel of
        # the program's own: a kernel of ours takes it.
        with contextlib.suppress(RuntimeError):
            self._torch.zeros(1, device=self._device)
        raise RuntimeError(f"{self.name}: {text} (CUDA error {int(code)})")

    # ---- order ---------------------------------------------------------------------------------

    def begin(self) -> None:
        cuda = self._torch.cuda
        with cuda.device(self._number):
            self._stream.wait_stream(cuda.current_stream(self._number))
            cupy: Any = sys.modules.get("cupy")
            if cupy is None:
                return
            with cupy.cuda.Device(self._number):
                pointer = int(cupy.cuda.get_current_stream().ptr)
            # The null stream is no external one: torch would make a new stream of it.
            other = (
                cuda.ExternalStream(pointer, device=self._number)
                if pointer
                else cuda.default_stream(self._number)
            )
            self._stream.wait_stream(other)

    def record(self) -> Event:
        with self._torch.cuda.device(self._number):
            # One that sleeps rather than spins: the processor has the engine's work to do.
            event = self._torch.cuda.Event(blocking=True)
            event.record(self._stream)
        return _TorchEvent(self.name, event)

    # ---- copies --------------------------------------------------------------------------------

    def to_host(self, copies: np.ndarray) -> None:
        with self._current():
            for there, here, nbytes in copies.tolist():
                self._host(here, nbytes).copy_(self._bytes(there, nbytes), non_blocking=True)

    def to_device(self, copies: np.ndarray) -> None:
        with self._current():
            for there, here, nbytes in copies.tolist():
                self._bytes(there, nbytes).copy_(self._host(here, nbytes), non_blocking=True)

    def gather(self, copies: np.ndarray, scratch: int) -> None:
        with self._current():
            self._move(self._images(copies, scratch), self._pieces(copies))

    def scatter(self, copies: np.ndarray, scratch: int) -> None:
        with self._current():
            self._move(self._pieces(copies), self._images(copies, scratch))

    def _move(self, targets: list[Any], sources: list[Any]) -> None:
        """Submit copies within the device: few kernels for all."""
        together = getattr(self._torch, "_foreach_copy_", None)
        if together is not None:
            together(targets, sources)
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)

    def _pieces(self, copies: np.ndarray) -> list[Any]:
        return self._parts(copies["device"].astype(np.int64), copies["nbytes"].astype(np.int64))

    def _images(self, copies: np.ndarray, scratch: int) -> list[Any]:
        places = (copies["host"] - copies["host"][0]).astype(np.int64) + scratch
        return self._parts(places, copies["nbytes"].astype(np.int64))

    def _parts(self, places: np.ndarray, nbytes: np.ndarray) -> list[Any]:
        """Pieces of the device's memory as tensors of bytes.

        They are parts of one tensor from the first to the last, whatever is between: to ask torch
        for each would take ten times as long.
        """
        order = np.argsort(places, kind="stable")
        starts, sizes = places[order], nbytes[order]
        gaps = starts.copy()
        gaps[1:] -= starts[:-1] + sizes[:-1]
        gaps[0] = 0
        if (gaps < 0).any():  # views of the same memory
            rows = zip(places.tolist(), nbytes.tolist(), strict=True)
            return [self._bytes(place, n) for place, n in rows]
        lengths = np.empty(2 * len(order), np.int64)
        lengths[0::2], lengths[1::2] = gaps, sizes
        whole = self._bytes(int(starts[0]), int(lengths.sum()))
        parts = whole.split_with_sizes(lengths.tolist())[1::2]
        found: list[Any] = [None] * len(parts)
        for i, part in zip(order.tolist(), parts, strict=True):
            found[i] = part
        return found

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
        # torch has no negative strides: such an axis is walked from its end, and flipped.
        flipped = [axis for axis, stride in enumerate(strides) if stride < 0]
        address += sum((shape[axis] - 1) * strides[axis] for axis in flipped)
        steps = (*(abs(stride) for stride in strides), unit)
        with self._current():
            source = self._array(address, extents, steps, unit)
            if flipped:
                source = source.flip(flipped)
            self._array(scratch, extents, None, unit).copy_(source, non_blocking=True)

    def _host(self, address: int, nbytes: int) -> Any:
        """Memory of the host as a tensor of bytes."""
        return self._torch.from_numpy(host_bytes(address, nbytes))

    def _bytes(self, address: int, nbytes: int) -> Any:
        """Memory of the device as a tensor of bytes."""
        return self._array(address, (nbytes,), None, 1)

    def _array(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, unit: int
    ) -> Any:
        """Memory of the device as a tensor of words."""
        memory = _CudaMemory(address, shape, strides, "|u1" if unit == 1 else f"<i{unit}")
        tensor = self._torch.as_tensor(memory, device=self._device)
        if tensor.data_ptr() != address:
            raise RuntimeError(
                f"{self.name}: torch made a copy of the memory at {address:#x}, which is not "
                "this device's"
            )
        return tensor


def _usable(number: int) -> Any:
    """The module torch, if it can use the device."""
    import torch

    if torch.version.hip:
        raise RuntimeError("this torch was built for ROCm, not for CUDA")
    if not torch.version.cuda:
        raise RuntimeError(f"this torch ({torch.__version__}) was built without CUDA")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device, or no driver for it")
    count = torch.cuda.device_count()
    if number >= count:
        raise RuntimeError(f"there are {count} CUDA devices, no number {number}")
    return torch


def allocate(number: int, nbytes: int) -> tuple[int, object]:
    """Address and owner of memory from torch's caching allocator."""
    torch = _usable(number)
    tensor = _take(torch, number, nbytes)
    cupy: Any = sys.modules.get("cupy")
    if tensor is None and cupy is not None:
        with cupy.cuda.Device(number):
            cupy.get_default_memory_pool().free_all_blocks()  # which it keeps for itself
        tensor = _take(torch, number, nbytes)
    if tensor is None:
        raise out_of_memory(f"cuda:{number}", nbytes, *torch.cuda.mem_get_info(number))
    return int(tensor.data_ptr()), tensor


def _take(torch: Any, number: int, nbytes: int) -> Any:
    """A tensor of bytes; None where there is no room."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", number))
    except torch.cuda.OutOfMemoryError:
        return None
