"""The pinned blocks of the process, and who may use them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
from dataclasses import dataclass

from .._buffer import Buffer
from .base import Device

__all__ = ["POOL", "Block", "Pool", "release_pinned"]


@dataclass(slots=True, eq=False)
class Block:
    """Memory of the host that copies go through; `pinned` is the device that it was pinned by."""

    buffer: Buffer
    pinned: Device | None = None


class Pool:
    """Pinned blocks that wait for the next call. One call at a time takes any.

    To pin is slow, so blocks stay pinned until :meth:`release`.
    """

    def __init__(self) -> None:
        self.leaked: list[object] = []
        self._idle: dict[int, list[Block]] = {}
        self._watched = False
        self._renew()

    def _renew(self) -> None:
        self._turn = threading.Lock()
        # Re-entrant: a forgotten transfer is closed wherever the collector finds it.
        self._guard = threading.RLock()
        self._owner: int | None = None

    def enter(self) -> None:
        """Wait for the call of another thread to end.

        Raises
        ------
        RuntimeError
            The call to be waited for is one of the same thread.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError(
                "memory of a device is being saved or loaded by this thread already: a progress "
                "callback, or whatever else runs meanwhile, cannot save or load such memory "
                "itself, and a transfer that was given up has to be closed first"
            )
        self._turn.acquire()
        self._owner = me

    def leave(self) -> None:
        """Let the next one in."""
        self._owner = None
        self._turn.release()

    def waiting(self, nbytes: int) -> int:
        """How many blocks of this size there are."""
        with self._guard:
            return len(self._idle.get(nbytes, ()))

    def take(self, nbytes: int) -> Block | None:
        """A block of this size, if there is one."""
        with self._guard:
            idle = self._idle.get(nbytes)
            return idle.pop() if idle else None

    def give(self, block: Block, most: int) -> None:
        """Keep a pinned block for the next call; there are at most `most` of its size."""
        with self._guard:
            if not self._watched:
                # Before the libraries of the device take leave themselves.
                atexit.register(self.at_exit)
                self._watched = True
            idle = self._idle.setdefault(len(block.buffer), [])
            idle.append(block)
            surplus = idle[most:]
            del idle[most:]
        for block in surplus:
            self.discard(block)

    def trim(self, nbytes: int, most: int) -> None:
        """Keep at most `most` blocks of this size."""
        with self._guard:
            idle = self._idle.get(nbytes, [])
            surplus = idle[most:]
            del idle[most:]
        for block in surplus:
            self.discard(block)

    def only(self, nbytes: int) -> None:
        """Keep no blocks of other sizes than this: what is pinned is one call's at most."""
        with self._guard:
            others = [size for size in self._idle if size != nbytes]
            surplus = [block for size in others for block in self._idle.pop(size)]
        for block in surplus:
            self.discard(block)

    def discard(self, block: Block) -> Exception | None:
        """Unpin a block that no copy needs; what went wrong, if anything did."""
        if block.pinned is None:
            return None
        try:
            block.pinned.unpin(block.buffer)
        except Exception as error:
            self.leak(block.buffer)  # memory that the driver knows must not become another's
            return error
        block.pinned = None
        return None

    def release(self) -> None:
        """Unpin and free all blocks that no call is using; the first error, once all are done."""
        with self._guard:
            blocks = [block for idle in self._idle.values() for block in idle]
            self._idle.clear()
        errors = [error for block in blocks if (error := self.discard(block)) is not None]
        if errors:
            raise errors[0]

    def leak(self, owner: object) -> None:
        """Never free the memory of `owner`, for somebody may still write to it."""
        self.leaked.append(owner)
        # Not even when the interpreter takes the modules apart.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))

    def at_exit(self) -> None:
        """Give everything back while the driver is still there."""
        with contextlib.suppress(Exception):  # the process ends, and the driver with it
            self.release()

    def forget(self) -> None:
        """In the child of a fork: the blocks are the parent's.

        They are not even freed, for the driver may have kept their pages from the child, and
        other memory may have their addresses.
        """
        for idle in self._idle.values():
            for block in idle:
                self.leak(block.buffer)
        self._idle = {}
        self._renew()


POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget)


def release_pinned() -> None:
    """Free the pinned memory that transfers from and to devices keep for the next one.

    What a transfer is using now stays. The next transfer pins memory again.
    """
    POOL.release()
