"""Objects pickled around their tensors, for the formats of torch: what ``torch.save`` pickles."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import adapters
from ._tree_json import short
from .adapters import Storages
from .formats._garbage import uncollected
from .formats._pickle_emit import Emitter
from .formats._pickle_reduce import MixedError
from .views import VIEW, TensorBatch

__all__ = ["Pickle", "pickle_around", "pickle_object", "telling"]

#: Errors that get the path of what could not be pickled. Matched exactly: the constructors of
#: others may want other arguments.
_TOLD = (
    TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, OverflowError,
    pickle.PicklingError,
)  # fmt: skip

#: Subclasses of arrays that are written as the arrays that they are.
#: Frameworks whose arrays become tensors of torch's files where there are no tensors.
_ARRAYS_TOO = ("jax", "cupy")
_ARRAYS: frozenset[type] = frozenset({np.ndarray, np.memmap, np.matrix})


@dataclass(frozen=True, slots=True)
class Pickle:
    """An object and its storages.

    Attributes
    ----------
    data : bytes
        The pickle, with a persistent id for each storage.
    keys : list of str
        What the persistent ids call the storages.
    batch : TensorBatch
        The storages; its owners keep their memory alive.
    framework : str or None
        Name of the adapter whose tensors these are; None where there are none.
    """

    data: bytes
    keys: list[str]
    batch: TensorBatch
    framework: str | None


class _StrangerError(Exception):
    """An array of a framework, named by the message, whose tensors are not looked for."""


def pickle_object(
    obj: Any,
    *,
    legacy: bool = False,
    pickle_module: ModuleType | Any = None,
    protocol: int = 2,
    framework: str | None = None,
) -> Pickle:
    """Pickle any object, with the storages of its tensors beside it.

    By itself, the pickle is that which ``torch.save`` makes, byte for byte, and takes a twentieth
    of the time. Where an object has NumPy arrays and no torch tensors, they are written as tensors
    too, so that torch need not even be installed; an object that has both keeps its arrays, pickled
    as NumPy does it.

    Parameters
    ----------
    obj : object
        Whatever can be pickled.
    legacy : bool
        Whether for the stream that torch wrote up to 1.5 rather than for the zip.
    pickle_module : module, optional
        Whose ``Pickler`` to use in place of this one. Arrays are then pickled as it does it.
    protocol : int
        Of the pickle. All others than 2 are left to Python's pickler.
    framework : {"torch"}, optional
        ``"torch"``: arrays are pickled as NumPy does it even where there are no tensors, which is
        what ``torch.save`` does.

    Raises
    ------
    TypeError, AttributeError, pickle.PicklingError
        Something in `obj` cannot be pickled; the message has its path.
    RuntimeError
        Two tensors of different types lie in one storage.
    RecursionError
        `obj` is nested too deeply.
    ValueError
        Another `framework`.

    Examples
    --------
    >>> found = pickle_object({"w": np.zeros((2, 3), np.float32), "epoch": 3})
    >>> found.keys, found.framework, found.batch[0].nbytes
    (['0'], 'numpy', 24)
    """
    if framework not in (None, "torch"):
        raise ValueError(f"framework={framework!r}: expected 'torch' or None")
    known = adapters.loaded() if framework is None else [adapters.by_name(framework)]
    names = {adapter.name for adapter in known}
    first = next((name for name in ("torch", "oneflow", *_ARRAYS_TOO) if name in names), None)
    if pickle_module not in (None, pickle) or protocol != 2:
        module = pickle if pickle_module is None else pickle_module
        return _with_module(obj, module, protocol, "torch" in names, legacy)
    strangers = {kind: adapter.name for adapter in known for kind in adapter.plain_types
                 if adapter.name in _ARRAYS_TOO and adapter.name != first}  # fmt: skip
    if not strangers:
        return _emit_mixed(obj, first, "numpy" in names, legacy)
    try:
        return _emit_mixed(obj, first, "numpy" in names, legacy, strangers)
    except _StrangerError as error:
        # Its tensors are those of the other framework then; together they are refused.
        first = str(error)
    strangers = {kind: adapter.name for adapter in known for kind in adapter.plain_types
                 if adapter.name not in ("numpy", first)}  # fmt: skip
    return _emit_mixed(obj, first, "numpy" in names, legacy, strangers, last=True)


def pickle_around(
    obj: Any,
    make: Callable[[bool], Storages],
    types: frozenset[type],
    arrays: frozenset[type],
    *,
    legacy: bool = False,
) -> tuple[Pickle, Storages]:
    """Pickle an object whose tensors stand-ins are for.

    Parameters
    ----------
    make : callable
        Makes new storages: of tensors, or given True of arrays.
    types, arrays : frozenset of type
        Of stand-ins for tensors, and for NumPy's arrays; those are pickled as arrays where there
        are others.

    Returns
    -------
    Pickle, Storages
        And what has put the storages in their order.

    Raises
    ------
    TypeError, AttributeError, pickle.PicklingError, RuntimeError
        As :func:`pickle_object` does.
    """
    first, second = make(False), make(True)
    emitter = Emitter(first, types, second, arrays, legacy)
    try:
        data = _dump(emitter, obj)
    except MixedError:
        first = make(False)
        emitter = Emitter(first, types, None, frozenset(), legacy)
        data = _dump(emitter, obj)
    used = second if emitter.source is second else first
    return _joined(data, used), used


def _emit_mixed(
    obj: Any,
    framework: str | None,
    numpy: bool,
    legacy: bool,
    strangers: Mapping[type, str] | None = None,
    last: bool = False,
) -> Pickle:
    """Pickle, with NumPy's arrays as tensors only where there are no others."""
    try:
        return _emit(obj, framework, numpy, legacy, strangers, last)
    except MixedError:
        return _emit(obj, framework, False, legacy, strangers, last)


def _emit(
    obj: Any,
    framework: str | None,
    numpy: bool,
    legacy: bool,
    strangers: Mapping[type, str] | None,
    last: bool,
) -> Pickle:
    """Pickle with the emitter, looking for these tensors.

    Arrays of `strangers`, types by the names of their frameworks, are refused, the `last` time for
    good: what their own pickles would say of them no safe reader takes.
    """
    first, types = _storages(framework, legacy)
    if first is not None and strangers:
        _guard(first, strangers, last)
    second, _ = _storages("numpy" if numpy else None, legacy)
    emitter = Emitter(first, types, second, _ARRAYS if numpy else frozenset(), legacy)
    with uncollected():
        return _joined(_dump(emitter, obj), emitter.source)


def _dump(emitter: Emitter, obj: Any) -> bytes:
    """The pickle; errors get the path of what could not be pickled."""
    with telling(emitter.steps):
        return emitter.dump(obj)


@contextmanager
def telling(steps: list[Any], first: int = 0) -> Iterator[None]:
    """Give errors of an emitter the path of what could not be pickled.

    Parameters
    ----------
    steps : list
        The emitter's own.
    first : int
        How many of them surround the object that is the user's.
    """
    try:
        yield
    except _TOLD as error:
        if type(error) not in _TOLD:
            raise
        raise type(error)(f"{_path(steps[first:])}: {error}") from error


def _guard(storages: Storages, strangers: Mapping[type, str], last: bool) -> None:
    """Have `storages` refuse objects of these types, which nobody else looks at."""
    persistent = storages.persistent

    def guarded(obj: Any) -> tuple[Any, ...] | None:
        name = strangers.get(type(obj))
        if name is None:
            return persistent(obj)
        if last:
            raise TypeError(
                f"a tensor of {name} beside those of {storages.name}: a file of torch holds those "
                "of one framework; save them to a .safetensors file"
            )
        raise _StrangerError(name)

    storages.persistent = guarded  # type: ignore[method-assign]


def _storages(framework: str | None, legacy: bool) -> tuple[Storages | None, frozenset[type]]:
    if framework is None:
        return None, frozenset()
    adapter = adapters.by_name(framework)
    return adapter.storages(legacy=legacy), adapter.plain_types


def _with_module(obj: Any, module: Any, protocol: int, torch: bool, legacy: bool) -> Pickle:
    """Pickle with the Pickler of a module."""
    storages = adapters.by_name("torch").storages(legacy=legacy) if torch else None
    seen = False

    class Pickler(module.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            nonlocal seen
            found = None if storages is None else storages.persistent(obj)
            seen = seen or (found is not None and found[0] == "storage")
            return found

    out = io.BytesIO()
    Pickler(out, protocol=protocol).dump(obj)
    return _joined(out.getvalue(), storages if seen else None)


def _joined(data: bytes, storages: Storages | None) -> Pickle:
    if storages is None:
        nothing = TensorBatch(np.zeros(0, VIEW), np.zeros(0, np.int64), [])
        return Pickle(data, [], nothing, None)
    return Pickle(data, storages.keys, storages.batch(), storages.name)


def _path(steps: list[Any]) -> str:
    """Where in an object its emitter stopped."""
    where = "$" + "".join([f"[{short(step)}]" for step in steps])
    return where if len(where) <= 500 else f"{where[:250]}...{where[-240:]}"
