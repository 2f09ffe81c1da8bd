"""Files of torch's formats put together from plan, pieces and storages, with no engine."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from holdfast.formats import _torch_legacy_write, torch_zip
from holdfast.layout import Pieces
from holdfast.pickling import Pickle, pickle_object
from holdfast.views import TensorView


def content(view: TensorView) -> bytes:
    """The elements of a tensor in memory, dense, in C order and in the machine's byte order."""
    if view.nbytes == 0:
        return b""
    layout = view.layout()
    if layout is None:
        return ctypes.string_at(view.address, view.nbytes)
    shape, strides, itemsize, swap = layout
    low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0) + itemsize
    memory = np.frombuffer(ctypes.string_at(view.address + low, high - low), np.uint8)
    elements = np.lib.stride_tricks.as_strided(
        memory[-low:], (*shape, itemsize), (*strides, 1), writeable=False
    )
    data = np.ascontiguousarray(elements).reshape(-1, swap or 1)
    return data[:, ::-1].tobytes() if swap else data.tobytes()


def put(out: bytearray, filled: np.ndarray, pieces: Pieces) -> None:
    """Put pieces where they belong; each byte twice at most."""
    rows = zip(pieces.offset.tolist(), pieces.nbytes.tolist(), pieces.start.tolist(), strict=True)
    for offset, nbytes, start in rows:
        out[offset : offset + nbytes] = pieces.data[start : start + nbytes]
        filled[offset : offset + nbytes] += 1


def assemble(
    obj: Any,
    *,
    legacy: bool = False,
    checksum: bool = True,
    stem: str = "archive",
    metadata: dict[str, str] | None = None,
    early: int | None = None,
    **options: Any,
) -> bytes:
    """The file of an object.

    Parameters
    ----------
    early : int, optional
        From which size on a storage's checksum is known late, in place of the format's own choice.
    """
    found = pickle_object(obj, legacy=legacy, **options)
    return write(found, legacy, checksum, stem, metadata, early)


def write(
    found: Pickle,
    legacy: bool = False,
    checksum: bool = True,
    stem: str = "archive",
    metadata: dict[str, str] | None = None,
    early: int | None = None,
) -> bytes:
    """The file of a pickle."""
    import zlib

    form: Any = _torch_legacy_write if legacy else torch_zip
    if early is not None:
        form._EARLY, before = early, form._EARLY
    try:
        plan = form.plan(
            found.keys,
            found.batch,
            framework=found.framework,
            metadata=metadata,
            structure=found.data,
            checksum=checksum,
            stem=stem,
        )
    finally:
        if early is not None:
            form._EARLY = before
    out = bytearray(plan.size)
    filled = np.zeros(plan.size, np.int8)
    crcs = np.zeros(len(found.batch), np.uint32)
    storages = [content(found.batch[i]) for i in range(len(found.batch))]
    for i, data in enumerate(storages):
        start = int(plan.offsets[i])
        out[start : start + len(data)] = data
        filled[start : start + len(data)] += 1
        if plan.early[i]:
            crcs[i] = zlib.crc32(data)
    put(out, filled, form.seal(plan, crcs if checksum else None, early=True))
    assert (filled == 1).all(), "bytes that nothing covers, or two things"
    for i, data in enumerate(storages):
        crcs[i] = zlib.crc32(data)
    again = np.zeros(plan.size, np.int8)
    put(out, again, form.seal(plan, crcs if checksum else None))
    return bytes(out)
