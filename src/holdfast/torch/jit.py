"""``torch.jit.load`` and ``torch.jit.save``, with torch's own signatures.

A loaded module's weights are read by several threads, or mapped; a saved module replaces a file of
that name whole or not at all.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import MutableMapping
from contextlib import closing
from typing import IO, Any, cast

from .. import adapters, programs
from ..errors import FormatError
from ..formats import _zip, torchscript
from ..source import FileLike, Source, open_source
from . import _errors, _patch

__all__ = ["load", "save"]


def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    _extra_files: MutableMapping[str, Any] | None = None,
    _restore_shapes: bool = False,
    *,
    mmap: bool | None = None,
) -> Any:
    """Load a module that ``torch.jit.save`` or :func:`save` saved, as ``torch.jit.load`` does.

    Parameters
    ----------
    f : str, os.PathLike or binary file object
        A file object is read from its position on.
    map_location : str or torch.device, optional
        Where all weights go; by default the devices that they were on.
    _extra_files : dict, optional
        For each name in it, what the archive has under that name is put there, as bytes; none
        where it has nothing.
    _restore_shapes : bool
        Whether to trace the module anew with the inputs in the file. The file is then loaded by
        torch itself, and cannot be mapped.
    mmap : bool, optional
        True makes the weights views of a private, writable map of the file, not copies. None takes
        ``torch.utils.serialization.config.load.mmap``: False.

    Returns
    -------
    torch.jit.ScriptModule

    Raises
    ------
    ValueError
        There is no such file, or `map_location` is neither of those.
    RuntimeError
        The file is not sound (the exception is a :class:`holdfast.errors.FormatError` as well).

    Warnings
    --------
    A module is code. Load one only from a file that you trust; :func:`holdfast.load` gives the
    weights of any.
    """
    if isinstance(f, str | os.PathLike):
        if not os.path.exists(f):
            raise ValueError(f"The provided filename {os.fspath(f)} does not exist")
        if os.path.isdir(f):
            raise ValueError(f"The provided filename {os.fspath(f)} is a directory")
    mapped = _configured() if mmap is None else mmap
    with closing(open_source(cast(FileLike, f))) as source:
        try:
            if _restore_shapes or _is_older(source):
                if mapped and mmap is not None:
                    raise ValueError(f"{source.name}: cannot be mapped: torch itself loads it")
                return _torch_load(source, map_location, _extra_files, _restore_shapes)
            return programs.load_program(
                source,
                "torchscript",
                map_location=map_location,
                mmap=mapped and (mmap is not None or source.mappable),
                extra_files=_extra_files,
            )
        except FormatError as error:
            raise _errors.corrupt(error, empty=source.size == 0) from error


def save(
    m: Any,
    f: str | os.PathLike[str] | IO[bytes],
    _extra_files: MutableMapping[str, Any] | None = None,
) -> None:
    """Save a module, as ``torch.jit.save`` does.

    Parameters
    ----------
    m : torch.jit.ScriptModule or torch.jit.ScriptFunction
    f : str, os.PathLike or binary file object
    _extra_files : dict of str to str or bytes, optional
        Files to be stored with it.

    Raises
    ------
    RuntimeError
        The system refuses (the exception is its OSError as well).

    Notes
    -----
    Unlike ``torch.jit.save``, a file of that name is what it was until the new one is complete, and
    after any error. Like it, this does not wait for the device; :func:`holdfast.save` does.
    """
    if adapters.program_kind(m) != "torchscript":
        raise TypeError(f"m must be a ScriptModule or a ScriptFunction, not {type(m).__name__}")
    try:
        programs.save_program(
            m, cast(FileLike, f), durable=_patch.durable(), extra_files=_extra_files
        )
    except OSError as error:
        if isinstance(error, RuntimeError) or not isinstance(f, str | os.PathLike):
            raise
        raise _errors.unwritable(error) from error


def _configured() -> bool:
    config: Any = importlib.import_module("torch.utils.serialization.config")
    return bool(config.load.mmap)


def _is_older(source: Source) -> bool:
    """Whether this is an archive of torch before 1.4, or a flatbuffer: what torch alone reads."""
    if source.peek(4) != b"PK\x03\x04":
        if source.peek(8)[4:] == b"PTMF":
            return True
        raise FormatError(
            f"{source.name}: expected an archive of torch.jit.save, found {source.peek(8)!r} at "
            "offset 0"
        )
    directory = _zip.scan(source.read, source.size, source.name)
    if torchscript.claims(directory):
        return False
    if directory.find(f"{directory.root}/model.json") >= 0:
        return True
    raise FormatError(
        f"{source.name}: expected an archive of torch.jit.save, found no record 'constants.pkl'"
    )


def _torch_load(
    source: Source,
    map_location: Any,
    extra_files: MutableMapping[str, Any] | None,
    restore_shapes: bool,
) -> Any:
    serialization: Any = importlib.import_module("torch.jit._serialization")
    data = io.BytesIO(source.read(0, source.size))
    return serialization.load(data, map_location, extra_files, restore_shapes)
