"""``oneflow.save`` and ``oneflow.load`` with OneFlow's own signatures, with OneFlow or without it.

>>> import tempfile, numpy, holdfast.oneflow
>>> path = tempfile.mkdtemp() + "/model"
>>> holdfast.oneflow.save({"fc.weight": numpy.eye(2, dtype="f4")}, path)
>>> sorted(holdfast.oneflow.load(path))
['fc.weight']

Without OneFlow, tensors are those of torch or of NumPy. Whatever differs from OneFlow on purpose
stands in the notes of :func:`save` and :func:`load`.
"""

from __future__ import annotations

import io
import os
from typing import IO, Any

from .. import adapters
from ..loading import LoadOptions, load_file
from ..oneflow_saving import LAYOUTS, save_apart
from ..saving import SaveOptions
from ..source import is_path, path_text
from . import _ranks

__all__ = ["load", "save"]

#: Formats of torch's, which are not read with ``support_pytorch_format=False``.
_TORCH = frozenset({"torch", "torch_legacy", "torch_tar", "torchscript", "pt2"})

_SEEKABLE = (
    "You can only oneflow.load from a file that is seekable. Please pre-load the data into a "
    "buffer like io.BytesIO and try to load from it instead."
)


def save(
    obj: Any,
    path_or_buffer: str | os.PathLike[str] | IO[bytes],
    global_dst_rank: int | None = None,
    save_as_external_data: bool = False,
    *,
    layout: str = "snapshot",
) -> None:
    """Save an object for OneFlow, as ``oneflow.save`` does.

    Parameters
    ----------
    obj : object
        Anything that can be pickled. Tensors may be OneFlow's, torch's or, where there are no
        others, NumPy's; in the file all are OneFlow's. A compiled ``nn.Graph`` is left to OneFlow.
    path_or_buffer : str, os.PathLike or binary file object
        The folder to make, or the file. What is written to a file object is always a single file.
    global_dst_rank : int, optional
        The process that writes global tensors; the others only take part in gathering them.
    save_as_external_data : bool
        The same as ``layout="pickle"``.
    layout : {"snapshot", "pickle", "file"}
        ``"snapshot"``: a folder for each tensor and ``snapshot_done``, for a flat dict of tensors;
        for any other object it means ``"pickle"``. ``"pickle"``: a folder for each tensor and
        ``pickled_data``, as OneFlow 0.6 to 0.9 make it. ``"file"``: a single file, as newer builds
        make it, and which those releases cannot read.

    Raises
    ------
    TypeError
        A tensor of a type that OneFlow cannot load, or that cannot be held; nothing was written.
    ValueError
        A name that cannot be that of a folder, an unknown layout, a rank out of range.
    pickle.PicklingError, AttributeError
        Something in `obj` cannot be pickled.
    FileExistsError
        The folder holds what is no part of a checkpoint.
    OSError
        Of the system; what was there before is as it was.

    Notes
    -----
    Unlike ``oneflow.save``, a folder is replaced whole or not at all: no tensor of an older save
    stays in it, and until the new one is complete the old one is what it was.

    Like ``oneflow.save``, this does not wait for the device: after a power cut the new content may
    not be there. :func:`holdfast.save` with ``format="oneflow"`` waits by default.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    if _ranks.save_graph(obj, path_or_buffer):
        return
    if save_as_external_data:
        if not is_path(path_or_buffer):
            raise ValueError("save_as_external_data=True makes a folder: it needs a path")
        layout = "pickle"
    localize = _ranks.gathering(global_dst_rank)
    target: Any = path_or_buffer if _ranks.writes(global_dst_rank) else io.BytesIO()
    options = SaveOptions(format="oneflow", durable=False)
    save_apart(obj, target, options, layout=layout, localize=localize)


def load(
    path_or_buffer: str | os.PathLike[str] | IO[bytes],
    global_src_rank: int | None = None,
    map_location: Any = None,
    *,
    support_pytorch_format: bool = True,
) -> Any:
    """Load what ``oneflow.save`` or :func:`save` saved, or a file of torch's.

    Parameters
    ----------
    path_or_buffer : str, os.PathLike or binary file object
        A folder of any release of OneFlow, a single variable's, a saved graph's, or a file.
    global_src_rank : int, optional
        The process that reads; tensors are global ones on it. Without OneFlow, 0 or None.
    map_location : str, oneflow.device, oneflow.placement or callable, optional
        Where tensors go. A function is given a tensor and None; where it returns None, the tensor
        stays where it is, in the memory of the host.
    support_pytorch_format : bool
        Whether a file of ``torch.save`` is loaded too; for that torch need not be installed.

    Returns
    -------
    object
        What was saved, with tensors of OneFlow where it is installed; else of torch where that is
        imported, and of NumPy.

    Raises
    ------
    FormatError
        The bytes are not those of a sound checkpoint. A ``ValueError``, as OneFlow raises.
    OSError
        Of the system.
    ValueError
        A file of torch's that is not wanted; a rank out of range.

    Notes
    -----
    Unlike ``oneflow.load``, no code from the file is run: of a module that was saved whole, what
    comes back holds its tensors and says what it was. A snapshot whose ``snapshot_done`` is missing
    is loaded with a warning.
    """
    if not is_path(path_or_buffer):
        _check_seekable(path_or_buffer)
    reads = _ranks.reads(global_src_rank)

    def gate(form: str) -> None:
        if form in _TORCH and not support_pytorch_format:
            raise ValueError(f'Cannot load file "{path_text(path_or_buffer)}"')

    installed = adapters.available("oneflow")
    options = LoadOptions(
        map_location=map_location if global_src_rank is None else None,
        # OneFlow itself writes over a file that is there: a map of it would change, or end.
        mmap=False,
        framework="oneflow" if installed else adapters.loaded()[0].name,
        gate=gate,
    )
    found = load_file(path_or_buffer, options) if reads else None  # type: ignore[arg-type]
    if global_src_rank is None or not installed:
        return found
    return _ranks.spread(found, global_src_rank, map_location)


def _check_seekable(f: Any) -> None:
    """Raise what seeking raises, with OneFlow's advice."""
    try:
        f.seek(f.tell())
    except (AttributeError, io.UnsupportedOperation) as error:
        raise type(error)(f"{error}. {_SEEKABLE}") from error
