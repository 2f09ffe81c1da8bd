"""Making a file warm or cold in the page cache, and proving which of the two it is."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def resident(path: Path) -> float:
    """Fraction of the file's pages that are in the page cache, asked of ``mincore``.

    The pages are mapped for the question and not touched, so asking changes nothing.
    """
    size = path.stat().st_size
    if not size:
        return 0.0
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapping, np.uint8)
        failed = _libc.mincore(view.ctypes.data, size, pages.ctypes.data)
        del view  # the mapping cannot be closed while something looks at it
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
    return float((pages & 1).mean())


def files(path: Path) -> list[Path]:
    """The files of a folder, or the one file."""
    return [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]


def share_of_memory(paths: Iterable[Path]) -> float:
    """How much of the machine's memory some files, and all in some folders, would take up."""
    memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return sum(file.stat().st_size for path in paths for file in files(path)) / memory


def _mean(path: Path, of: Callable[[Path], float]) -> float:
    """What `of` says of each file of a folder that has content, weighted by their sizes."""
    sizes = {file: file.stat().st_size for file in files(path)}
    total = sum(sizes.values())
    return sum(of(file) * size for file, size in sizes.items() if size) / max(total, 1)


def warm(path: Path) -> float:
    """Read a file, or all of a folder, through the page cache; return what is resident.

    All of it, even what is resident already: what was not used for long is the first that a kernel
    which gives memory back to its host takes away.
    """
    return _mean(path, _warm)


def _warm(path: Path) -> float:
    block = bytearray(1 << 23)
    with path.open("rb", buffering=0) as f:
        while f.readinto(block):
            pass
    return resident(path)


def forget(path: Path) -> None:
    """Ask for a file, or all of a folder, to be dropped from the page cache."""
    for file in files(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def drop(path: Path) -> float:
    """Drop a file, or all of a folder, from the page cache; return what is still resident.

    Asks for this file by ``posix_fadvise``, and, where this process is root, for everything that
    the kernel can drop, so that the file system's own notes on the file are cold as well.
    """
    forget(path)
    with suppress(OSError):  # not root, or a container that may not
        Path("/proc/sys/vm/drop_caches").write_text("3")
    return _mean(path, resident)
