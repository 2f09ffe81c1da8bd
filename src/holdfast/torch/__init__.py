"""``torch.save`` and ``torch.load`` with torch's own signatures, defaults and errors.

>>> import holdfast.torch
>>> import io, torch                                                    # doctest: +SKIP
>>> file = io.BytesIO()                                                 # doctest: +SKIP
>>> holdfast.torch.save({"w": torch.ones(3), "step": 7}, file)          # doctest: +SKIP
>>> file.seek(0)                                                        # doctest: +SKIP
>>> holdfast.torch.load(file)                                           # doctest: +SKIP
{'w': tensor([1., 1., 1.]), 'step': 7}

Code that is not to be changed gets them by :func:`patch`, or by running it with
``python -m holdfast.torch script.py``. ``holdfast.torch.jit`` and ``holdfast.torch.export`` do the
same for programs. Whatever differs from torch on purpose stands in the notes of :func:`save` and
:func:`load`.
"""

from __future__ import annotations

import errno
import importlib
import os
import pickle
from typing import IO, Any

from ..errors import FormatError
from ..loading import LoadOptions, load_file
from ..pickled import Trust
from ..saving import SaveOptions, save_file
from . import _arguments, _errors, _patch
from ._patch import Patch, patch

__all__ = ["Patch", "export", "jit", "load", "patch", "save"]


def save(
    obj: object,
    f: str | os.PathLike[str] | IO[bytes],
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
) -> None:
    """Save an object to a file, as ``torch.save`` does.

    Parameters
    ----------
    obj : object
        Anything that can be pickled. Tensors that are views of one storage stay that: the storage
        is written once, whole.
    f : str, os.PathLike or binary file object
        Where to. A file object needs ``write`` and ``flush``, and is written from its position on.
    pickle_module : module
        Whose ``Pickler`` pickles.
    pickle_protocol : int
        Of the pickle.
    _use_new_zipfile_serialization : bool
        False writes the format of torch before 1.6.
    _disable_byteorder_record : bool
        True leaves out the record that says which byte order the data have.

    Raises
    ------
    AttributeError, TypeError
        `f` is nothing that can be written to, or `obj` holds what cannot be pickled.
    RuntimeError
        The system refuses (the exception is its OSError as well), or tensors of different types
        share a storage.

    Notes
    -----
    Unlike ``torch.save``, a file of that name is replaced whole or not at all: it is what it was
    until the new one is complete, and after any error.

    Like ``torch.save``, this does not wait for the device: after a power cut the new content may
    not be there. ``patch(durable=True)`` changes that; :func:`holdfast.save` waits by default.
    """
    _arguments.check_pickle_module(pickle_module)
    is_path = _arguments.check_target(f, zipped=_use_new_zipfile_serialization)
    config = _arguments.saving(_use_new_zipfile_serialization)
    options = SaveOptions(
        format="torch" if _use_new_zipfile_serialization else "torch_legacy",
        durable=_patch.durable(),
        checksum=config.checksum,
        framework="torch",
        pickle_module=pickle_module,
        pickle_protocol=pickle_protocol,
        settings=config.settings(byteorder_record=not _disable_byteorder_record),
    )
    try:
        save_file(obj, os.fspath(f) if is_path else f, options)  # type: ignore[arg-type]
    except OSError as error:
        if not is_path or isinstance(error, RuntimeError):
            raise
        raise _errors.unwritable(error) from error
    if not is_path and hasattr(f, "flush"):
        f.flush()


def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    **pickle_load_args: Any,
) -> Any:
    """Load what ``torch.save`` or :func:`save` saved, as ``torch.load`` does.

    Parameters
    ----------
    f : str, os.PathLike or binary file object
        A file object is read from its position on. Of a file in the format of torch before 1.6 it
        is left behind the object, so that several can follow each other.
    map_location : str, torch.device, dict or callable, optional
        Where storages go: all to one device, or by the device that each was on, or each where
        ``map_location(storage, location)`` puts it.
    pickle_module : module, optional
        Whose ``Unpickler`` unpickles; only with ``weights_only=False``.
    weights_only : bool, optional
        Whether nothing but tensors and plain values is allowed, which is the default unless
        `pickle_module` is given. The environment variables ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` and
        ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` count as for torch.
    mmap : bool, optional
        True maps the file. None takes ``torch.utils.serialization.config.load.mmap``: False.
    **pickle_load_args
        For the ``Unpickler``: ``encoding``, ``errors`` and the like. With ``weights_only``, only
        ``encoding``.

    Returns
    -------
    object
        What was saved. Tensors that share a storage in the file share one in memory.

    Raises
    ------
    pickle.UnpicklingError
        With ``weights_only``, the file needs what is not allowed; the message says what to pass.
    RuntimeError
        The file is not sound (the exception is a :class:`holdfast.errors.FormatError` as well), or
        it needs a device that is not there.
    OSError
        Of the system.

    Notes
    -----
    Where torch gives an error, this may give the object: it reads pickles of protocols 1 to 5, and
    files of torch before 0.2 (tar) with ``weights_only`` too, and whatever else
    :func:`holdfast.load` reads. A TorchScript archive is refused with ``weights_only`` as torch
    refuses it, since the program that it holds is code.
    """
    call = _arguments.loading(f, pickle_module, weights_only, mmap, pickle_load_args)
    if call.is_path and os.path.isdir(f):  # type: ignore[arg-type]
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(f))  # type: ignore[arg-type]
    options = LoadOptions(
        map_location=map_location,
        mmap=call.mmap,
        framework="torch",
        trust=Trust(
            weights_only=call.weights_only,
            pickle_module=call.pickle_module,
            pickle_args=call.pickle_load_args,
        ),
        gate=call.gate,
        byteorder=call.byteorder,
        data=call.data,
        shared=call.shared,
    )
    try:
        return load_file(os.fspath(f) if call.is_path else f, options)  # type: ignore[arg-type]
    except FormatError as error:
        made = _errors.corrupt(error, empty=call.is_empty())
        if made is error:
            raise
        raise made.with_traceback(error.__traceback__) from error.__cause__


def __getattr__(name: str) -> Any:
    if name in ("export", "jit"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
