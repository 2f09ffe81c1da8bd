"""What the ring asks of a device, whichever library moves its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .._buffer import Buffer

__all__ = [
    "COPY",
    "PAGE",
    "CopyLostError",
    "Device",
    "Event",
    "host_bytes",
    "out_of_memory",
    "word",
]

#: A piece to be copied: its address on the device, its address in the host's memory, its size.
COPY = np.dtype([("device", np.uint64), ("host", np.uint64), ("nbytes", np.uint64)])

#: What addresses and file offsets are congruent modulo.
PAGE = 4096


class CopyLostError(RuntimeError):
    """The device cannot say whether a copy is done: its memory must not be given to others."""


class Event(Protocol):
    """A point among the copies of one device: everything submitted before it."""

    def wait(self) -> None:
        """Wait until it has been reached.

        Raises
        ------
        CopyLostError
            It may never be: the copies before it may still be running.
        RuntimeError
            A copy before it failed, and none is running any more.
        """


class Device(Protocol):
    """Memory that the processor does not reach, and copies from and to it.

    What is submitted to one device is done in the order in which it was submitted, while the
    caller goes on. Memory named in a call has to stay as it is until an event after it is done.
    One call of the ring at a time uses a device.

    Attributes
    ----------
    name : str
        What messages call it, such as ``"cuda:0"``.
    """

    name: str

    def allocate(self, nbytes: int, framework: str | None) -> tuple[int, object]:
        """Address and owner of fresh memory, from the pool of `framework`.

        None: for the ring itself, to be used by what is submitted here and by nothing else.

        Raises
        ------
        MemoryError
            With the name of the device, what was asked for and what is free.
        """

    def pin(self, buffer: Buffer) -> None:
        """Make copies from and to a buffer of the host run beside other work."""

    def unpin(self, buffer: Buffer) -> None:
        """Undo :meth:`pin`."""

    def begin(self) -> None:
        """Make what is submitted from here on wait for everything computed so far."""

    def to_host(self, copies: np.ndarray) -> None:
        """Submit copies (rows of COPY) to the host, one by one."""

    def to_device(self, copies: np.ndarray) -> None:
        """Submit copies (rows of COPY) from the host, one by one."""

    def gather(self, copies: np.ndarray, scratch: int) -> None:
        """Submit copies to `scratch`, memory of the device that is the image of the host's:
        what is for the address ``host[0] + x`` goes to ``scratch + x``.
        """

    def scatter(self, copies: np.ndarray, scratch: int) -> None:
        """Submit copies from `scratch`, where :meth:`gather` would have put them."""

    def strided(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        itemsize: int,
        scratch: int,
    ) -> None:
        """Submit a dense copy of a box of elements; `strides` are in bytes, `address` is that of
        the first element. At least one element.
        """

    def record(self) -> Event:
        """The point after everything submitted so far."""


def out_of_memory(name: str, nbytes: int, free: int | None, total: int | None) -> MemoryError:
    """The error that says what a device has no room for."""
    known = "" if free is None else f", {free} of {total} are free"
    return MemoryError(f"{name}: cannot allocate {nbytes} bytes{known}")


def word(*numbers: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all: what elements can be moved in at a time."""
    return math.gcd(8, *numbers)


class _Memory:
    """Memory that NumPy is told of."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def host_bytes(address: int, nbytes: int) -> np.ndarray:
    """Memory of the host as an array of bytes, which does not own it."""
    return np.asarray(_Memory(address, nbytes)) if nbytes else np.empty(0, np.uint8)
