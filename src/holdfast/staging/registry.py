"""Which implementation moves the bytes of which device."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any

from .. import _engine
from .._buffer import Buffer
from ..views import device_code, device_of
from .base import Device

__all__ = ["allocate", "device", "register", "resolve", "unregister"]

#: DLPack's number for CUDA, the only kind of device that there is an implementation for.
CUDA = 2
#: In the order in which they are tried: module, class.
_IMPLEMENTATIONS = (("cupy", "CupyDevice"), ("torch", "TorchDevice"))

_found: dict[int, Device] = {}
_given: set[int] = set()  # by register
_lock = threading.Lock()
_forked = False


def device(code: int) -> Device:
    """What moves the bytes of a device; the same object each time.

    CuPy, or torch where there is no CuPy that works.

    Parameters
    ----------
    code : int
        See :func:`holdfast.views.device_code`.

    Raises
    ------
    RuntimeError
        The device cannot be used from here: the message says why, and what helps.
    """
    found = _found.get(code)
    if found is not None:
        return found
    kind, number = device_of(code)
    if kind != CUDA:
        raise RuntimeError(
            f"device {number} of DLPack's kind {kind}: only the memory of the host and of CUDA "
            "devices (kind 2) can be saved and loaded"
        )
    name = f"cuda:{number}"
    if _forked:
        raise RuntimeError(
            f"{name}: this process was forked from one that uses CUDA, which cannot be used "
            "after a fork: start processes with the method 'spawn' (or 'forkserver')"
        )
    with _lock:
        if code in _found:
            return _found[code]
        reasons = []
        for module, made in _IMPLEMENTATIONS:
            try:
                chosen: Device = getattr(importlib.import_module(f".{module}", __package__), made)(
                    number
                )
            except Exception as error:  # imports break in many ways
                reasons.append(f"{module}: {error}")
            else:
                _found[code] = chosen
                return chosen
    raise RuntimeError(
        f"{name}: its memory can be saved and loaded through CuPy (pip install cupy-cuda12x, or "
        "cupy-cuda13x for CUDA 13) or a torch that was built for CUDA (pip install torch); "
        + "; ".join(reasons)
    )


def register(code: int, device: Device) -> None:
    """Put an implementation behind a code: a simulated device, in tests."""
    with _lock:
        _found[code] = device
        _given.add(code)


def unregister(code: int) -> None:
    """Undo :func:`register`."""
    with _lock:
        del _found[code]
        _given.discard(code)


def allocate(code: int, nbytes: int, framework: str) -> Buffer:
    """Fresh memory of a device, from the pool of the framework that it is for.

    Parameters
    ----------
    code : int
        See :func:`holdfast.views.device_code`.
    nbytes : int
    framework : str
        ``"torch"``: the caching allocator of torch, even where CuPy does the copies. Others, such
        as ``"cupy"`` and ``"jax"``: the pool of what does the copies, which is CuPy's if it is
        there.

    Returns
    -------
    Buffer
        Not initialised. What was computed on the framework's current stream may still write to
        it: only :func:`holdfast.staging.to_device` knows how to fill it.

    Raises
    ------
    MemoryError
        The device has no room: the message names it, what was asked for and what is free.
    RuntimeError
        The device cannot be used, or the framework is not there.
    """
    address, owner = device(code).allocate(nbytes, framework)
    return _engine.lend(address, nbytes, owner, code)


def resolve(where: Any) -> int:
    """The code of a device that a caller names.

    Parameters
    ----------
    where : str, int or object
        ``"cpu"``, ``"cuda"`` (the current one, of the libraries that are imported) or
        ``"cuda:1"``; a ``torch.device``, a ``cupy.cuda.Device``; or a code.

    Raises
    ------
    TypeError, ValueError
        It names none.

    Examples
    --------
    >>> resolve("cpu"), resolve("cuda:1") == device_code(2, 1)
    (0, True)
    """
    if isinstance(where, int) and not isinstance(where, bool):
        if where < 0:
            raise ValueError(f"device {where}: a code is not negative")
        return where
    if isinstance(where, str):
        kind, colon, number = where.partition(":")
        if colon and not (number.isascii() and number.isdigit() and int(number) <= 0xFFFF):
            raise ValueError(f"device {where!r}: {number!r} is not the number of a device")
        index = int(number) if colon else None
    elif hasattr(where, "type") and hasattr(where, "index"):
        kind, index = where.type, where.index
    elif type(where).__module__.partition(".")[0] == "cupy" and hasattr(where, "id"):
        kind, index = "cuda", where.id
    else:
        raise TypeError(
            f"a device is a text such as 'cuda:0', a torch.device or a cupy.cuda.Device, "
            f"not {type(where).__name__}"
        )
    if kind == "cpu":
        return 0
    if kind != "cuda":
        raise ValueError(f"device {where!s}: only 'cpu' and 'cuda' are known")
    return device_code(CUDA, _current() if index is None else index)


def _current() -> int:
    """The number of the current CUDA device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_device())
    cupy = sys.modules.get("cupy")
    return 0 if cupy is None else int(cupy.cuda.runtime.getDevice())


def _after_fork() -> None:
    """In the child: the devices that the parent used are of no use here."""
    global _lock, _forked
    _lock = threading.Lock()
    for code in [code for code in _found if code not in _given]:
        del _found[code]
        _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
