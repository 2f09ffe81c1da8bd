"""``torch.export.load`` and ``torch.export.save``, with torch's own signatures.

A loaded program's weights are read by several threads, or mapped; a saved program replaces a file
of that name whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import closing
from typing import IO, Any, cast

from .. import adapters, programs
from ..errors import FormatError
from ..source import FileLike, open_source
from . import _errors, _patch
from .jit import _configured

__all__ = ["load", "save"]


def load(
    f: str | os.PathLike[str] | IO[bytes],
    *,
    extra_files: MutableMapping[str, Any] | None = None,
    expected_opset_version: dict[str, int] | None = None,
    mmap: bool | None = None,
) -> Any:
    """Load what ``torch.export.save`` or :func:`save` saved, as ``torch.export.load`` does.

    Parameters
    ----------
    f : str, os.PathLike or binary file object
        Any extension will do. A file object is read from its position on.
    extra_files : dict, optional
        Filled with all files that were stored with it, as str.
    expected_opset_version : dict, optional
        Versions of the operator sets that are wanted.
    mmap : bool, optional
        True makes the weights views of a private, writable map of the file, not copies. None takes
        ``torch.utils.serialization.config.load.mmap``: False.

    Returns
    -------
    torch.export.ExportedProgram
        The one called ``"model"`` where there are several.

    Raises
    ------
    RuntimeError
        The file is not sound (the exception is a :class:`holdfast.errors.FormatError` as well).

    Warnings
    --------
    A program is code. Load one only from a file that you trust; :func:`holdfast.load` gives the
    weights of any.
    """
    mapped = _configured() if mmap is None else mmap
    with closing(open_source(cast(FileLike, f))) as source:
        try:
            return programs.load_program(
                source,
                "pt2",
                mmap=mapped and (mmap is not None or source.mappable),
                extra_files=extra_files,
                expected_opset_version=expected_opset_version,
            )
        except FormatError as error:
            raise _errors.corrupt(error, empty=source.size == 0) from error


def save(
    ep: Any,
    f: str | os.PathLike[str] | IO[bytes],
    *,
    extra_files: MutableMapping[str, Any] | None = None,
    opset_version: dict[str, int] | None = None,
    pickle_protocol: int = 2,
) -> None:
    """Save a program, as ``torch.export.save`` does.

    Parameters
    ----------
    ep : torch.export.ExportedProgram
    f : str, os.PathLike or binary file object
    extra_files : dict of str to str, optional
        Files to be stored with it.
    opset_version : dict, optional
        Versions of the operator sets.
    pickle_protocol : int
        Of what is pickled in the archive.

    Raises
    ------
    TypeError
        `ep` is no exported program.
    RuntimeError
        The system refuses (the exception is its OSError as well).

    Notes
    -----
    Unlike ``torch.export.save``, a file of that name is what it was until the new one is complete,
    and after any error. Like it, this does not wait for the device; :func:`holdfast.save` does.
    """
    if adapters.program_kind(ep) != "pt2":
        raise TypeError(
            "The 'ep' parameter must be an instance of 'ExportedProgram', got "
            f"'{type(ep).__name__}' instead."
        )
    try:
        programs.save_program(
            ep,
            cast(FileLike, f),
            durable=_patch.durable(),
            extra_files=extra_files,
            opset_version=opset_version,
            pickle_protocol=pickle_protocol,
        )
    except OSError as error:
        if isinstance(error, RuntimeError) or not isinstance(f, str | os.PathLike):
            raise
        raise _errors.unwritable(error) from error
