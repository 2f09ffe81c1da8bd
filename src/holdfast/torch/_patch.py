"""holdfast's save and load in the place of torch's, for code that is not to be changed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["Patch", "durable", "patch", "patch_when_imported"]

_lock = threading.RLock()
#: The patches in force, the newest last. Replaced, never changed: reading it needs no lock.
_active: tuple[Patch, ...] = ()
#: What the patches replaced.
_originals: dict[tuple[str, str], Any] = {}


class Patch:
    """A replacement in force, as :func:`patch` returns it: a context manager.

    Attributes
    ----------
    durable : bool
        Whether what is saved meanwhile is on the device when ``torch.save`` returns.
    """

    __slots__ = ("_depth", "durable")

    def __init__(self, durable: bool) -> None:
        self.durable = durable
        self._depth = 0

    def undo(self) -> None:
        """End it. With the last of several that are in force, torch's own functions return.

        A function that other code has put in their place meanwhile stays there. Once undone, it
        does nothing.
        """
        global _active
        with _lock:
            _active = tuple(other for other in _active if other is not self)
            if not _active:
                _restore()

    def __enter__(self) -> Patch:
        with _lock:
            self._depth += 1
            if not any(other is self for other in _active):
                _install(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._depth -= 1
            if self._depth == 0:
                self.undo()

    def __repr__(self) -> str:
        state = "in force" if any(other is self for other in _active) else "undone"
        return f"<holdfast.torch.patch(durable={self.durable}), {state}>"


def patch(*, durable: bool = False) -> Patch:
    """Replace ``torch.save`` and ``torch.load`` with those of :mod:`holdfast.torch`.

    A call replaces them for good, and a ``with`` block for as long as it lasts::

        holdfast.torch.patch()
        trainer.fit(model)                      # saves and loads with holdfast

        with holdfast.torch.patch(durable=True):
            trainer.save_checkpoint("last.ckpt")

    Parameters
    ----------
    durable : bool
        Whether ``torch.save`` to a path returns only when the data are on the device. By default it
        does not, as torch does not; replacing the file is atomic either way. Of several patches in
        force, the newest says.

    Returns
    -------
    Patch
        A context manager, whose ``undo()`` ends it as well.

    Notes
    -----
    Replaced are the attributes ``save`` and ``load`` of the modules ``torch`` and
    ``torch.serialization``. Code that took the functions themselves before
    (``from torch import load``) keeps those it has: call this first.

    Patches may be nested and may end in any order.

    It holds for the whole process: what one thread patches, all threads see, and the block of one
    thread ends while others may still be in theirs; torch's functions return with the last. A call
    that has begun ends as it began. A forked child has what its parent had; a child that starts
    anew (``spawn``, ``torchrun``) has torch's own.

    Examples
    --------
    >>> import holdfast.torch
    >>> import torch, tempfile                                          # doctest: +SKIP
    >>> with holdfast.torch.patch():                                    # doctest: +SKIP
    ...     torch.save({"w": torch.ones(3)}, tempfile.mkdtemp() + "/model.pt")
    """
    if not isinstance(durable, bool):
        raise TypeError(f"durable must be a bool, not {type(durable).__name__}")
    made = Patch(durable)
    with _lock:
        _install(made)
    return made


def durable() -> bool:
    """What the newest patch in force says; False where there is none."""
    active = _active
    return bool(active) and active[-1].durable


def _targets() -> list[tuple[ModuleType, str, Any]]:
    """Where the functions are replaced, and with what."""
    import torch
    import torch.serialization

    from . import load, save

    modules: tuple[ModuleType, ...] = (torch, torch.serialization)
    ours = {"save": save, "load": load}
    return [(module, name, function) for module in modules for name, function in ours.items()]


def _install(made: Patch) -> None:
    global _active
    for module, name, ours in _targets():
        there = getattr(module, name)
        if there is not ours:
            _originals[module.__name__, name] = there
            setattr(module, name, ours)
    _active = (*_active, made)


def _restore() -> None:
    if not _originals:
        return
    for module, name, ours in _targets():
        if getattr(module, name) is ours:
            setattr(module, name, _originals[module.__name__, name])
    _originals.clear()


def patch_when_imported(durable: bool) -> None:
    """As :func:`patch`, but torch is imported when the program imports it, and not before.

    What a program sets before its first ``import torch`` (environment variables that torch reads
    while it is imported) then counts as it does without this.
    """
    if "torch" in sys.modules:
        patch(durable=durable)
    else:
        sys.meta_path.insert(0, _Waiting(durable))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds torch where the other finders do, and patches it once it has been executed."""

    def __init__(self, durable: bool) -> None:
        self._durable = durable

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        # Not while others look: the next finder would be this one again.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                patch(durable=self._durable)

        loader.exec_module = exec_module  # of this one instance
