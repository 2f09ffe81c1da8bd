"""The limits of the machine, measured as if they were contenders: copies, raw writes and reads.

Each moves as many bytes as the workload has, with threads over chunks of 8 MiB. NumPy's copies
and ``os.pwrite`` / ``os.preadv`` release the GIL, so Python threads are as good as any here.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .objects import Bytes

CHUNK = 8 << 20
ALIGN = 4096
HUGE = 2 << 20
#: ``MADV_POPULATE_READ`` of Linux 5.14, which Python's mmap does not name.
POPULATE_READ = 22
#: Bytes of random data that writes and copies take turns through, where they move more: to copy the
#: same 256 MiB again and again is faster than to copy as much that is all different.
SOURCE = 4 << 30
IO_THREADS = 4
CPU_THREADS = len(os.sched_getaffinity(0))


def fresh(nbytes: int) -> Bytes:
    """Anonymous memory that nothing has touched, 2 MiB aligned, with huge pages asked for."""
    mapping = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % HUGE
    return whole[start : start + nbytes]


@dataclass(slots=True)
class Block:
    """`nbytes` random bytes: `source` over and over. `warm` is memory that was written before."""

    nbytes: int
    source: Bytes
    warm: Bytes | None = field(default=None)

    @classmethod
    def random(cls, nbytes: int) -> Block:
        source = fresh(min(SOURCE, -(-max(nbytes, 1) // CHUNK) * CHUNK))
        rng = np.random.Generator(np.random.SFC64(11))
        for start in range(0, len(source), CHUNK):
            words = rng.integers(0, 2**64, CHUNK // 8, dtype=np.uint64)
            source[start : start + CHUNK] = words.view(np.uint8)
        return cls(nbytes, source)

    def chunk(self, offset: int, length: int) -> Bytes:
        start = offset % len(self.source)
        return self.source[start : start + length]

    def differences(self, found: Bytes) -> list[str]:
        """Where `found` has not the bytes of this block."""
        if len(found) != self.nbytes:
            return [f"expected {self.nbytes} bytes, found {len(found)}"]
        for offset in range(0, self.nbytes, CHUNK):
            length = min(CHUNK, self.nbytes - offset)
            if not np.array_equal(found[offset : offset + length], self.chunk(offset, length)):
                return [f"bytes differ in the chunk at {offset}"]
        return []


def in_chunks(nbytes: int, threads: int, work: Callable[[int, int], Any]) -> None:
    """``work(offset, length)`` for every chunk, by threads that take the next one each time."""
    counter = itertools.count()
    failures: list[BaseException] = []

    def worker() -> None:
        try:
            while not failures and (offset := next(counter) * CHUNK) < nbytes:
                work(offset, min(CHUNK, nbytes - offset))
        except BaseException as error:
            failures.append(error)

    team = [threading.Thread(target=worker) for _ in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    if failures:
        raise failures[0]


def level(nbytes: int) -> None:
    """Leave as much free memory that was just in use as a load needs, whoever came before.

    A virtual machine gives free memory back to its host, and to get it again takes longer than to
    fill it. Without this, a contender would be as fast as what the one before it left behind.
    """
    memory = fresh(nbytes)
    in_chunks(nbytes, CPU_THREADS, lambda offset, length: memory[offset : offset + length].fill(1))


def copy_fresh(block: Block) -> Bytes:
    """Copy into memory that has to be faulted in: what an eager load cannot avoid."""
    target = fresh(block.nbytes)
    _copy(block, target)
    return target


def copy_warm(block: Block) -> Bytes:
    """Copy into memory that is already there."""
    if block.warm is None:
        block.warm = fresh(block.nbytes)
        block.warm[:] = 1
    _copy(block, block.warm)
    return block.warm


def _copy(block: Block, target: Bytes) -> None:
    def work(offset: int, length: int) -> None:
        np.copyto(target[offset : offset + length], block.chunk(offset, length))

    in_chunks(block.nbytes, CPU_THREADS, work)


def write(block: Block, path: Path, *, direct: bool, durable: bool, reserve: bool = True) -> None:
    """Write the block from aligned memory by four threads; the room is reserved first or not."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags, 0o644)
    try:
        if reserve:
            os.posix_fallocate(fd, 0, block.nbytes)

        def work(offset: int, length: int) -> None:
            padded = -(-length // ALIGN) * ALIGN if direct else length
            _all(os.pwrite(fd, block.chunk(offset, padded).data, offset), padded, path)

        in_chunks(block.nbytes, IO_THREADS, work)
        os.ftruncate(fd, block.nbytes)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    if durable:
        sync_directory(path)


def write_files(tensors: Mapping[str, Any], path: Path) -> None:
    """A folder for each tensor, and in it its elements and a text: what a snapshot is made of.

    By as many threads as there are cores, each with folders of its own.
    """
    path.mkdir()
    names = list(tensors)
    dirfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL

    def put(name: str, data: Any) -> None:
        fd = os.open(name, flags, 0o666, dir_fd=dirfd)
        _all(os.write(fd, data), memoryview(data).nbytes, path / name)
        os.close(fd)

    def work(offset: int, length: int) -> None:
        for name in names[offset // CHUNK :: CPU_THREADS]:
            array = tensors[name].numpy()
            dims = "".join(f"  dim: {extent}\n" for extent in array.shape)
            kind = {"float16": "kFloat16", "float32": "kFloat"}[array.dtype.name]
            os.mkdir(name, dir_fd=dirfd)
            put(f"{name}/meta", f"shape {{\n{dims}}}\ndata_type: {kind}\n".encode())
            put(f"{name}/out", array.data)

    try:
        in_chunks(CPU_THREADS * CHUNK, CPU_THREADS, work)
        os.close(os.open("snapshot_done", flags, 0o666, dir_fd=dirfd))
    finally:
        os.close(dirfd)


def read(path: Path, *, direct: bool) -> Bytes:
    """Read the whole file into fresh memory by four threads."""
    size = path.stat().st_size
    memory = fresh(-(-size // ALIGN) * ALIGN)
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:

        def work(offset: int, length: int) -> None:
            padded = -(-length // ALIGN) * ALIGN if direct else length
            got = os.preadv(fd, [memory[offset : offset + padded].data], offset)
            _all(got, length, path)

        in_chunks(size, IO_THREADS, work)
    finally:
        os.close(fd)
    return memory[:size]


def read_mapped(path: Path) -> Bytes:
    """Copy the whole file out of a map into fresh memory, as is safe while nobody may cut it.

    Page tables are made for 8 MiB at a time (``MADV_POPULATE_READ``); undoing them is timed, too.
    """
    size = path.stat().st_size
    memory = fresh(size)
    with path.open("rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ) as mapping:
        _copy_out(mapping, memory)
    return memory


def _copy_out(mapping: mmap.mmap, memory: Bytes) -> None:
    view = np.frombuffer(mapping, np.uint8)

    def work(offset: int, length: int) -> None:
        mapping.madvise(POPULATE_READ, offset, length)
        np.copyto(memory[offset : offset + length], view[offset : offset + length])

    in_chunks(len(memory), CPU_THREADS, work)


def read_over(path: Path, *, direct: bool, threads: int = IO_THREADS) -> int:
    """Read the whole file, each thread into 8 MiB of its own again and again; the bytes read.

    What a load to a device cannot avoid: it needs memory of the host only to pass through.
    """
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    mine = threading.local()
    moved: list[int] = []

    def work(offset: int, length: int) -> None:
        if not hasattr(mine, "memory"):
            mine.memory = fresh(CHUNK)
        padded = -(-length // ALIGN) * ALIGN if direct else length
        got = os.preadv(fd, [mine.memory[:padded].data], offset)
        _all(got, length, path)
        moved.append(got)

    try:
        in_chunks(size, threads, work)
    finally:
        os.close(fd)
    return sum(moved)


def _all(moved: int, wanted: int, path: Path) -> None:
    if moved < wanted:
        raise OSError(f"{path}: moved {moved} of {wanted} bytes in one call")


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    sync_file(path.parent)
