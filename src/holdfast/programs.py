"""Whole programs: TorchScript modules and exported programs, loaded and saved with PyTorch.

PyTorch writes them, into a file that is published as every other. How they are loaded is in
:mod:`holdfast.program_loading`. A program is code: load one only from a file that you trust.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, cast

from . import _engine, adapters
from .errors import FormatError
from .formats import _zip
from .program_loading import load_program
from .source import FileLike, is_path, open_source, path_text

__all__ = ["check_format", "load_program", "save_program"]

#: Extensions that a file with a program may have, and the format that says the same.
_EXTENSIONS = {
    "torchscript": ("torch", (".pt", ".pth", ".bin", ".ckpt", ".ptl", ".ts")),
    "pt2": ("pt2", (".pt2",)),
}


def check_format(kind: str, format: str | None, extension: str) -> None:
    """Raise TypeError where `format`, or without one `extension`, means none for such a program."""
    name, extensions = _EXTENSIONS[kind]
    if format == name or (format is None and extension in extensions):
        return
    what = "a TorchScript module" if kind == "torchscript" else "an exported program"
    means = f"format={format!r}" if format is not None else f"the extension {extension!r}"
    raise TypeError(
        f"{means} means no format that holds {what}: save it to a path that ends in "
        f"{extensions[0]!r}, or with format={name!r}, or save its state_dict()"
    )


def save_program(
    obj: Any,
    f: FileLike,
    *,
    kind: str | None = None,
    durable: bool = True,
    extra_files: Mapping[str, Any] | None = None,
    opset_version: dict[str, int] | None = None,
    pickle_protocol: int = 2,
) -> None:
    """Save a program as PyTorch writes it, replacing a file of that name whole or not at all.

    Parameters
    ----------
    obj : torch.jit.ScriptModule, torch.jit.ScriptFunction or torch.export.ExportedProgram
    f : str, bytes, os.PathLike or binary file object
        PyTorch writes into the new file directly; only of a TorchScript module that goes to a file
        object is there one more copy in memory.
    kind : {"torchscript", "pt2"}, optional
        What :func:`holdfast.adapters.program_kind` says of `obj`.
    durable : bool
        Whether to return only when the data are on the device.
    extra_files : mapping of str to str or bytes, optional
        Files to be stored with it.
    opset_version, pickle_protocol
        As for ``torch.export.save``.

    Raises
    ------
    TypeError
        `obj` is no program.
    OSError
        Of the system; the file of that name is what it was.
    """
    kind = kind or adapters.program_kind(obj)
    if kind is None:
        raise TypeError(f"not a program that PyTorch can save: {type(obj).__name__}")
    extra = dict(extra_files or {})

    def write(target: Any) -> None:
        if kind == "pt2":
            importlib.import_module("torch.export").save(
                obj,
                target,
                extra_files=extra,
                opset_version=opset_version,
                pickle_protocol=pickle_protocol,
            )
        elif isinstance(target, str):
            obj.save(target, _extra_files=extra)
        else:
            target.write(obj.save_to_buffer(_extra_files=extra))

    if not is_path(f):
        write(f)
        return
    path = os.fsdecode(cast("str | bytes | os.PathLike[str]", f))
    try:
        publication = _engine.Publication(path)
    except OSError as error:
        # A pipe or a device under this name: there is nothing to replace.
        if error.errno != errno.ESPIPE:
            raise
        _write_stream(path, write)
        return
    with publication:
        _write_through(publication.fd, path, write)
        publication.commit(durable)


def _write_through(fd: int, path: str, write: Callable[[Any], None]) -> None:
    """Have PyTorch write the file that `fd` is open on, which has no name yet.

    It wants a name, and calls what is in the archive after it: it gets one elsewhere that leads to
    the descriptor.
    """
    name = os.path.basename(path)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        # What is no UTF-8 cannot be said to PyTorch.
        link = os.path.join(folder, name.encode("utf-8", "replace").decode())
        os.symlink(f"/proc/{os.getpid()}/fd/{fd}", link)
        write(link)
        # PyTorch does not notice a write that fails when its stream is closed: the archive's end
        # would be missing then.
        with closing(open_source(link)) as source:
            try:
                _zip.scan(source.read, source.size, path)
            except FormatError as error:
                raise OSError(errno.EIO, f"PyTorch wrote only a part: {error}", path) from None


def _write_stream(path: str, write: Callable[[Any], None]) -> None:
    """To what cannot be replaced."""
    data = io.BytesIO()
    write(data)
    try:
        with open(path, "wb") as stream:
            stream.write(data.getbuffer())
    except OSError as error:
        error.filename = path_text(path)
        raise
