"""What the arguments and the settings of ``torch.save`` and ``torch.load`` mean."""

from __future__ import annotations

import io
import mmap as mmap_module
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["Loading", "Saving", "check_pickle_module", "check_target", "loading", "saving"]

_TRUE = ("1", "y", "yes", "true")
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_DILL = (0, 3, 1)


@dataclass(frozen=True, slots=True)
class Saving:
    """What torch's settings say of a save.

    Attributes
    ----------
    zipped : bool
        Whether the format is the zip.
    checksum : bool
        Whether records get their CRC-32 (``torch.serialization.set_crc32_options``).
    alignment : int
        Of storages in the file, in bytes.
    data : bool
        Whether storages are written at all: not under ``torch.serialization.skip_data``.
    """

    zipped: bool
    checksum: bool
    alignment: int
    data: bool

    def settings(self, *, byteorder_record: bool) -> dict[str, Any]:
        """What the format is to do otherwise than it does by itself."""
        if not self.zipped:
            return {}
        given = {
            "alignment": self.alignment,
            "byteorder_record": byteorder_record,
            "data": self.data,
        }
        usual = {"alignment": 64, "byteorder_record": True, "data": True}
        return {name: value for name, value in given.items() if value != usual[name]}


@dataclass(frozen=True, slots=True)
class Loading:
    """What the arguments and torch's settings say of a load.

    Attributes
    ----------
    f : object
        The file.
    is_path : bool
    weights_only, mmap : bool
    pickle_module : object
        None stands for :mod:`pickle`.
    pickle_load_args : dict
    byteorder : {"little", "big"}
        That of a file which does not say it.
    shared : bool
        Whether writes to a mapped tensor reach the file.
    data : bool
        Whether storages are read at all.
    """

    f: Any
    is_path: bool
    weights_only: bool
    mmap: bool
    pickle_module: Any
    pickle_load_args: dict[str, Any]
    byteorder: str
    shared: bool
    data: bool

    def gate(self, form: str) -> None:
        """Raise where torch refuses a file of this format, whatever is in it.

        Raises
        ------
        RuntimeError
            A TorchScript archive with ``weights_only``; mmap of a file that is no zip.
        ValueError
            mmap of a file object.
        """
        if form == "torchscript":
            _warn(
                "'torch.load' received a zip file that looks like a TorchScript archive; it is "
                "handed to 'torch.jit.load': call that one to be rid of this warning"
            )
            if self.weights_only:
                raise RuntimeError(
                    "Cannot use ``weights_only=True`` with TorchScript archives passed to "
                    "``torch.load``: the archive is a program. Pass weights_only=False if the file "
                    "is trusted, or load its parameters alone with holdfast.load."
                )
            return
        if not self.mmap:
            return
        if form in ("torch_legacy", "torch_tar"):
            name = f"{self.f}, " if isinstance(self.f, str) else ""
            raise RuntimeError(
                "mmap can only be used with files saved with "
                f"`torch.save({name}_use_new_zipfile_serialization=True)`; this one is older, or "
                "was saved without it"
            )
        if not self.is_path:
            raise ValueError("f must be a file path in order to use the mmap argument")

    def is_empty(self) -> bool:
        """Whether the file has no bytes, as far as can be told now."""
        try:
            if self.is_path:
                return os.path.getsize(self.f) == 0
            here = self.f.tell()
            self.f.seek(0, os.SEEK_END)
            empty = self.f.tell() == here == 0
            self.f.seek(here)
        except (AttributeError, OSError, ValueError):
            return False
        return bool(empty)


def check_pickle_module(module: Any) -> None:
    """Raise ValueError for a version of dill that cannot pickle tensors."""
    if module is None or getattr(module, "__name__", "") != "dill":
        return
    from torch import serialization

    supported: Any = serialization.check_module_version_greater_or_equal
    if not supported(module, _DILL, False):
        wanted = ".".join(map(str, _DILL))
        raise ValueError(
            f"'torch' supports dill >= {wanted}, but this is dill {module.__version__}; "
            "upgrade it, or use 'pickle'"
        )


def check_target(f: Any, *, zipped: bool) -> bool:
    """Whether `f` is a path, having made sure that it can be written to.

    Raises
    ------
    AttributeError
        It is neither a path nor has it ``write``.
    TypeError
        Its ``write`` cannot be called.
    """
    if _is_path(f):
        return True
    if not hasattr(f, "write"):
        raise AttributeError(
            "expected 'f' to be string, path, or a file-like object with a 'write' attribute, "
            f"not {type(f).__name__}"
        )
    if zipped and not callable(f.write):
        raise TypeError(f"Buffer of {type(f).__name__} has no callable attribute 'write'")
    return False


def saving(zipped: bool) -> Saving:
    """What torch's settings say now.

    Raises
    ------
    RuntimeError
        Storages are to be skipped in a format that has no room for that.
    """
    from torch import serialization
    from torch.utils.serialization import config

    data = not _skips_data()
    if not data and not zipped:
        raise RuntimeError("Cannot use skip_data=True with _use_new_zipfile_serialization=False")
    return Saving(
        zipped=zipped,
        checksum=serialization.get_crc32_options(),
        alignment=config.save.storage_alignment,
        data=data,
    )


def loading(
    f: Any, pickle_module: Any, weights_only: bool | None, mmap: bool | None, args: dict[str, Any]
) -> Loading:
    """What a call of ``torch.load`` with these arguments means.

    Raises
    ------
    RuntimeError
        Arguments or environment variables contradict each other.
    AttributeError, io.UnsupportedOperation
        `f` is neither a path nor a file that can seek.
    TypeError
        There are arguments that the unpickler does not take.
    """
    from torch import serialization
    from torch.utils.serialization import config

    only = _weights_only(weights_only, pickle_module)
    if only and pickle_module is not None:
        raise RuntimeError("Can not safely load weights when explicit pickle_module is specified")
    if only and args:
        _warn("pickle_load_args only works if `weights_only=False`.")
        unknown = next((name for name in args if name != "encoding"), None)
        if unknown is not None:
            raise TypeError(f"load() got an unexpected keyword argument {unknown!r}")
    check_pickle_module(pickle_module)
    is_path = _is_path(f)
    if not is_path:
        _check_seekable(f)
    order = serialization.get_default_load_endianness()
    native = order == serialization.LoadEndianness.NATIVE
    big = sys.byteorder == "big" if native else order == serialization.LoadEndianness.BIG
    return Loading(
        f=f,
        is_path=is_path,
        weights_only=only,
        mmap=bool(config.load.mmap if mmap is None else mmap),
        pickle_module=pickle if pickle_module is None else pickle_module,
        pickle_load_args={"encoding": "utf-8", **args},
        byteorder="big" if big else "little",
        shared=serialization.get_default_mmap_options() == mmap_module.MAP_SHARED,
        data=not _skips_data(),
    )


def _is_path(f: object) -> bool:
    """What torch takes for a path; bytes are none."""
    return isinstance(f, str | os.PathLike)


def _skips_data() -> bool:
    """Whether ``torch.serialization.skip_data`` is in force: there is no public way to ask."""
    from torch import serialization

    local = getattr(serialization, "_serialization_tls", None)
    return bool(getattr(local, "skip_data", False))


def _weights_only(asked: bool | None, pickle_module: Any) -> bool:
    force = os.getenv(_FORCE, "0").lower() in _TRUE
    force_not = os.getenv(_FORCE_NOT, "0").lower() in _TRUE
    if force and force_not:
        raise RuntimeError(
            f"Only one of `{_FORCE}` or `{_FORCE_NOT}` should be set, but both were set."
        )
    if force:
        return True
    if asked is not None:
        return bool(asked)
    if force_not:
        _warn(
            f"Environment variable {_FORCE_NOT} detected, and `weights_only` was not passed to "
            "`torch.load`: forcing weights_only=False."
        )
        return False
    return pickle_module is None


def _check_seekable(f: Any) -> None:
    try:
        f.seek(f.tell())
    except (AttributeError, io.UnsupportedOperation) as error:
        text = str(error)
        if "seek" in text or "tell" in text:
            raise type(error)(
                f"{text}. You can only torch.load from a file that is seekable. Please pre-load "
                "the data into a buffer like io.BytesIO and try to load from it instead."
            ) from None
        raise


def _warn(message: str) -> None:
    """Warn of what the caller of the package did."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("holdfast."):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)
