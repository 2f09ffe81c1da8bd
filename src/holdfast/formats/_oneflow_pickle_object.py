"""The object in a pickle of OneFlow: found without running anything, then made when asked for.

The pickle is run once, inertly and without the elements of its tensors. The object that was saved
is a part of what comes of it: that is pickled anew (:mod:`._oneflow_pickle_text`), and from there
on all is as with the pickles in files of torch (:mod:`._torch_pickle`).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from . import Read
from ._inert import Record, brief
from ._oneflow_pickle_scan import Scanner
from ._oneflow_pickle_state import is_tensor
from ._oneflow_pickle_text import Writer
from ._torch_outline import Outline
from ._torch_pickle import Pickled, read_object
from ._window import MOST, Window

__all__ = ["Found", "read_pickle"]

#: What says in a single file that OneFlow wrote it, now and in a version between two releases.
_KEYS = ("__oneflow__", "oneflow")
_VERSION = 1

#: Bytes read at once: at first and behind elements that were passed over, and at most.
_NEAR = 4 << 10
_FAR = 1 << 20
_OFFSET = re.compile(r"offset (\d+)(?= \()")


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a pickle.

    Attributes
    ----------
    pickled : Pickled
        The object, its entries still to be filled in.
    tensors : list of Record
        The record of each entry.
    blocks : ndarray of BLOCK
        The runs of bytes that were passed over.
    end : int
        Where the pickle ends in its file.
    """

    pickled: Pickled
    tensors: list[Record]
    blocks: np.ndarray
    end: int


def read_pickle(
    read: Read, size: int, name: str, *, where: str = "", single: bool = False
) -> Found | None:
    """Find the object in a pickle of OneFlow.

    Parameters
    ----------
    read : callable
        ``read(offset, nbytes)``: exactly those bytes of the file, or FormatError.
    size : int
        Of the file, or -1 where nobody knows.
    name : str
        Of the file, for messages.
    where : str
        What the pickle is called in messages.
    single : bool
        Whether it is a file of its own: one that does not say that it is OneFlow's is then None.

    Raises
    ------
    FormatError
        The pickle is malformed, of another version, or not OneFlow's.
    """
    text = f"{where}: " if where else ""
    scanner = Scanner(name, text, size, MOST)
    _scan(scanner, Window(read, size, name), f"{name}: {text}")
    condensed, blocks = scanner.condensed, scanner.blocks
    root = _outlined(condensed, blocks, name, where)
    if single and not (type(root) is dict and any(key in root for key in _KEYS)):
        return None
    inliner = _Inliner(Window(read, size, name, ahead=_NEAR), blocks)
    writer = Writer(is_tensor, inliner.opcodes, name, (1 << 20) + 4 * len(condensed))
    data = writer.write(_saved(root, f"{name}: {text}"))
    entries = {i: i for i in range(len(writer.tensors))}
    pickled = read_object(data, name=name, where="object", tensors=entries)
    return Found(pickled, writer.tensors, blocks, scanner.pos)


def _scan(scanner: Scanner, window: Window, what: str) -> None:
    """Pass over the pickle at the start of a file."""
    room, least = _NEAR, 1
    while not scanner.done:
        start = scanner.pos
        data = window.most(start, max(room, least))
        if len(data) < least:
            raise FormatError(
                f"{what}offset {start}: the pickle has no end: needs {least} more bytes, "
                f"{len(data)} are left"
            )
        least = max(scanner.feed(data), 1)
        # Behind elements that are longer than the window, as long ones may follow.
        room = _NEAR if scanner.pos - start > 2 * len(data) else min(4 * room, _FAR)


def _outlined(condensed: bytes, blocks: np.ndarray, name: str, where: str) -> Any:
    """The graph of what the pickle would make, in which runs of bytes are storages."""
    try:
        return Outline(condensed, 0, name, where, 0, False, None, _Each()).outline()
    except FormatError as error:
        text = _OFFSET.sub(lambda found: f"offset {_placed(blocks, int(found[1]))}", str(error))
        raise FormatError(text) from None


def _placed(blocks: np.ndarray, at: int) -> int:
    """Where in the file is what stands at `at` in the condensed pickle."""
    before = int(np.searchsorted(blocks["end"], at, "right")) - 1
    if before < 0:
        return at
    last = blocks[before]
    return int(last["offset"]) + int(last["nbytes"]) + at - int(last["end"])


def _saved(root: Any, what: str) -> Any:
    """The object that was saved, of what OneFlow puts around it."""
    if type(root) is not dict or "protocol_version" not in root or "data" not in root:
        raise FormatError(
            f"{what}expected a dict with 'protocol_version' and 'data', as OneFlow saves it, "
            f"found {brief(root)}"
        )
    version = root["protocol_version"]
    if type(version) is not int or version != _VERSION:
        raise FormatError(f"{what}expected protocol_version {_VERSION}, found {brief(version)}")
    return root["data"]


class _Each:
    """For every run of bytes a storage of its own: what a persistent id names, and what it is."""

    __slots__ = ()

    def __contains__(self, number: int) -> bool:
        return True

    def __getitem__(self, number: int) -> tuple[int, int]:
        return number, -1


class _Inliner:
    """Puts bytes that are no tensor's back into a pickle.

    Parameters
    ----------
    window : Window
        Of the file that they are in.
    blocks : ndarray of BLOCK
    """

    __slots__ = ("_blocks", "_room", "_window")

    def __init__(self, window: Window, blocks: np.ndarray) -> None:
        self._window = window
        self._blocks = blocks
        self._room = MOST

    def opcodes(self, row: int) -> bytes:
        """The opcodes of a run."""
        block = self._blocks[row]
        offset, nbytes = int(block["offset"]), int(block["nbytes"])
        self._room -= nbytes
        if self._room < 0:
            raise FormatError(
                f"{self._window.name}: {nbytes} bytes at offset {offset}: expected at most {MOST} "
                "of bytes that are not those of tensors"
            )
        data = self._window.take(offset, nbytes, "bytes") if nbytes else b""
        return (b"\x96" if block["array"] else b"\x8e") + struct.pack("<Q", nbytes) + data
