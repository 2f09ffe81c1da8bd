"""Bytes of a zip archive: read as they are, or inflated to the size that they should have."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from ..errors import FormatError

__all__ = ["EXPANSION", "exactly", "inflate"]

#: Bytes that deflate makes of one, at most: ``HOLD_ZIP_EXPANSION`` in csrc/zip.h.
EXPANSION = 1032


def exactly(
    read: Callable[[int, int], bytes | memoryview], offset: int, nbytes: int, name: str
) -> bytes:
    """Exactly these bytes of the file called `name`, which nobody else can change."""
    data = bytes(read(offset, nbytes))
    if len(data) != nbytes:
        raise FormatError(
            f"{name}: expected {nbytes} bytes at offset {offset}, found {len(data)}: the file is "
            "shorter than it was"
        )
    return data


def inflate(data: bytes | bytearray | memoryview, size: int, where: str) -> bytes:
    """The `size` bytes that `data` was deflated from.

    No more than these are ever made, whatever `data` says.

    Parameters
    ----------
    data : bytes or another buffer of bytes
    size : int
    where : str
        How a message begins, such as ``"model.pt: record 'archive/data/0'"``.

    Raises
    ------
    FormatError
        It is not deflated data, or that of fewer or more bytes.
    """
    given = len(data)
    if size // EXPANSION > given:
        raise FormatError(
            f"{where}: expected no more than what {given} deflated bytes can be inflated to, "
            f"found {size} bytes"
        )
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One more than there should be, to see whether there is.
        out = machine.decompress(data, size + 1)
    except zlib.error as error:
        raise FormatError(f"{where}: is no deflated data: {error}") from None
    made = len(out)
    if made > size:
        raise FormatError(f"{where}: expected {size} bytes once inflated, found more")
    if made < size or not machine.eof:
        raise FormatError(
            f"{where}: expected {size} bytes once inflated, found {made} before its data ended"
        )
    if machine.unused_data:
        raise FormatError(
            f"{where}: expected its deflated data to have {given} bytes, found "
            f"{given - len(machine.unused_data)}"
        )
    return out
