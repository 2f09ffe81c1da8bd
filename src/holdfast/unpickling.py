"""Unpickling whole objects of files that are trusted: here the file's own code is run.

Nothing of this module is reached unless the caller passed ``weights_only=False``.
"""

from __future__ import annotations

import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["StorageType", "unpickle"]

#: Modules that files know by another name than they have now.
_MOVED = {"torch.tensor": "torch._tensor"}

#: Classes of storages -> what PyTorch calls the type of their elements.
_ELEMENTS = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}


class StorageType:
    """A class of storages that a persistent id names; the class itself is never made.

    Parameters
    ----------
    name : str
        Such as ``"FloatStorage"``.

    Attributes
    ----------
    name : str
    module : str
        Where a pickle finds it.

    Examples
    --------
    >>> StorageType("FloatStorage").name
    'FloatStorage'
    """

    __slots__ = ("module", "name")

    def __init__(self, name: str) -> None:
        if name not in _ELEMENTS:
            raise KeyError(name)
        self.name = name
        self.module = "torch.storage" if name == "UntypedStorage" else "torch"

    @property
    def dtype(self) -> Any:
        """The ``torch.dtype`` of its elements."""
        import torch

        return getattr(torch, _ELEMENTS[self.name])

    def __repr__(self) -> str:
        return f"StorageType({self.name!r})"


def unpickle(
    data: bytes | bytearray | memoryview,
    pickle_module: Any,
    persistent_load: Callable[[Any], object],
    *,
    name: str,
    map_location: Any = None,
    stand_in: Callable[[str, str], Any] | None = None,
    **pickle_load_args: Any,
) -> Any:
    """The object of a pickle, whatever code that takes.

    Parameters
    ----------
    data : bytes-like
        The pickle; what stands behind it is not read.
    pickle_module : module or None
        Whose ``Unpickler`` is used; None for ``pickle``.
    persistent_load : callable
        Given a persistent id ``("storage", StorageType, key, location, numel[, view])``, or an
        integer in files of the oldest kind, returns what it stands for.
    name : str
        What messages call the file.
    map_location : object
        As ``load`` got it; PyTorch asks for it where a tensor has a device of its own.
    stand_in : callable, optional
        Given the module and the name of something of PyTorch's, returns what is used in its place,
        or raises; None where PyTorch itself is.
    **pickle_load_args
        Keywords for the ``Unpickler``; ``encoding`` is ``"utf-8"`` unless given.

    Returns
    -------
    object

    Raises
    ------
    ImportError
        Where a module that the file names cannot be imported.
    Exception
        Whatever the code that the file names raises.

    Examples
    --------
    >>> unpickle(pickle.dumps({"epoch": 3}), None, lambda pid: None, name="a.pt")
    {'epoch': 3}
    """
    base: Any = (pickle if pickle_module is None else pickle_module).Unpickler

    class Unpickler(base):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            if type(name) is str and "Storage" in name:
                try:
                    return StorageType(name)
                except KeyError:
                    pass
            module = _MOVED.get(module, module)
            if stand_in is not None and module.partition(".")[0] == "torch":
                return stand_in(module, name)
            return super().find_class(module, name)

        def persistent_load(self, pid: Any) -> object:
            return _persistent(pid, persistent_load)

    arguments = {"encoding": "utf-8", **pickle_load_args}
    with _Torch(map_location) as torch:
        unpickler = Unpickler(io.BytesIO(data), **arguments)
        try:
            made = unpickler.load()
        except ModuleNotFoundError as error:
            if error.name == "torch" or (error.name or "").startswith("torch."):
                hint = "" if torch.loaded() else ": pip install torch"
                raise ImportError(
                    f"{name}: to unpickle this file needs {error.name}{hint}", name=error.name
                ) from error
            raise
        torch.validate()
    return made


def _persistent(pid: Any, load: Callable[[Any], object]) -> object:
    """What a persistent id stands for: a class with its source, or what `load` makes of it."""
    if type(pid) is not tuple or not pid:
        return load(pid)
    kind = pid[0].decode("ascii") if type(pid[0]) is bytes else pid[0]
    if kind == "module" and len(pid) == 4:
        return _container(*pid[1:])
    if isinstance(kind, type) and len(pid) == 3:  # in files of the oldest kind
        return _container(*pid)
    return load((kind, *pid[1:]))


def _container(kind: Any, file: Any, source: Any) -> object:
    """A class that was saved with its source; a warning where that is no longer its source."""
    if file and source:
        try:
            current = inspect.getsource(kind)
        except (OSError, TypeError) as error:
            _warn(f"couldn't retrieve source code of {kind!r}, which the file has: {error}")
        else:
            if current != source:
                _warn(f"source code of class '{kind!r}' has changed since the file was saved")
    return kind


def _warn(text: str) -> None:
    serialization = sys.modules.get("torch.serialization")
    category = getattr(serialization, "SourceChangeWarning", UserWarning)
    warnings.warn(text, category, stacklevel=2)


class _Torch:
    """What PyTorch keeps for the time of a load, where it is imported or gets to be."""

    __slots__ = ("_before", "_location")

    def __init__(self, location: Any) -> None:
        self._location = location
        self._before: Any = None

    @staticmethod
    def loaded() -> bool:
        return sys.modules.get("torch") is not None

    @staticmethod
    def _state() -> Any:
        serialization = sys.modules.get("torch.serialization")
        return getattr(serialization, "_serialization_tls", None)

    def __enter__(self) -> _Torch:
        state = self._state()
        self._before = getattr(state, "map_location", None)
        if state is not None:
            state.map_location = self._location
        return self

    def validate(self) -> None:
        """Check the sparse tensors that were made, if the program wants that."""
        utils = sys.modules.get("torch._utils")
        check = getattr(utils, "_validate_loaded_sparse_tensors", None)
        if check is not None:
            check()

    def __exit__(self, *error: object) -> None:
        state = self._state()
        if state is not None:
            state.map_location = self._before
        # Tensors of a load that failed would wait there for the next one, and stay alive.
        waiting = getattr(sys.modules.get("torch._utils"), "_sparse_tensors_to_validate", None)
        if waiting is not None:
            waiting.clear()
