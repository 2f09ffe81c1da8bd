"""How the kernel maps the pages of a file that it has in memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from holdfast import _engine

HUGE = 2 << 20
#: File systems of which the engine asks for a lease: ext4, XFS, btrfs.
LEASED = (0xEF53, 0x58465342, 0x9123683E)


def mapped_huge(path: Path) -> int:
    """Bytes of a file that is in memory which entries of 2 MiB map, as the kernel tells."""
    fd = os.open(path, os.O_RDONLY)
    nbytes = os.fstat(fd).st_size
    buffer = _engine.map_file(fd, 0, nbytes)
    os.close(fd)
    _engine.prefetch(buffer, 0, nbytes, 1)
    found = re.search(
        rf"^{buffer.address:x}-.*?^FilePmdMapped: *(\d+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return int(found.group(1)) << 10 if found else 0


def need_huge(path: Path, nbytes: int) -> None:
    """Skip the test unless `nbytes` of the file, whose content is in memory, are mapped so."""
    fd = os.open(path, os.O_RDONLY)
    kind = _engine.filesystem(fd)
    os.close(fd)
    if kind not in LEASED:
        pytest.skip(f"no leases are asked for on file systems of the kind {kind:#x}")
    release = [int(part) for part in re.findall(r"\d+", os.uname().release)[:2]]
    if release < [6, 7]:
        pytest.skip("the kernel does not tell how pages are mapped")
    if (found := mapped_huge(path)) < nbytes:
        pytest.skip(f"{found} bytes of the file are mapped by 2 MiB, not {nbytes}")
