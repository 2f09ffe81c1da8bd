"""Frameworks: how their tensors are described and made.

Adding one is a module with an ``ADAPTER`` that satisfies :class:`holdfast.adapters.base.Adapter`,
a row here, and a column in :mod:`holdfast.dtypes`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, cast

from ..tree import Codec
from .base import Adapter, Loader, Storages

__all__ = [
    "Adapter",
    "Loader",
    "Storages",
    "available",
    "by_name",
    "choose",
    "codecs",
    "loaded",
    "program_kind",
]

#: Name of the adapter -> the package that has to be imported, and what to type to get it.
#: In the order in which they are tried where nothing else decides. NumPy is always there: those
#: behind it are used where they were asked for, or saved the file, since not every machine has
#: their device, nor every process the settings that they need.
_TABLE = {
    "torch": ("torch", "pip install torch"),
    "oneflow": ("oneflow", "pip install oneflow"),
    "numpy": ("numpy", "pip install numpy"),
    "jax": ("jax", "pip install jax"),
    "cupy": ("cupy", "pip install cupy-cuda12x"),
}


@cache
def _adapter(name: str) -> Adapter:
    return cast("Adapter", importlib.import_module(f".{name}", __name__).ADAPTER)


def available(name: str) -> bool:
    """Whether there is an adapter `name` and its framework can be imported."""
    if name not in _TABLE:
        return False
    package = _TABLE[name][0]
    if _imported(package):
        return True
    spec = importlib.util.find_spec(package)
    # A folder that is called so, a checkpoint say, is found too: as a package without a file.
    return spec is not None and spec.origin is not None


def _imported(package: str) -> bool:
    # None stands in the table of modules for one whose import is forbidden.
    return sys.modules.get(package) is not None


def by_name(name: str) -> Adapter:
    """The adapter called `name`; imports its framework.

    Raises
    ------
    ValueError
        There is no such adapter.
    ImportError
        The framework is not installed; the message says what to type.
    """
    if name not in _TABLE:
        raise ValueError(f"framework {name!r} is unknown; known are {', '.join(_TABLE)}")
    if not available(name):
        raise ImportError(
            f"framework {name!r} was asked for and is not installed: {_TABLE[name][1]}"
        )
    return _adapter(name)


def loaded() -> list[Adapter]:
    """Adapters of the frameworks that this process has imported: only their tensors can occur."""
    return [_adapter(name) for name, (package, _) in _TABLE.items() if _imported(package)]


def program_kind(obj: object) -> str | None:
    """What kind of program `obj` is, of whichever framework in use; None for all else."""
    kinds = (adapter.program(obj) for adapter in loaded())
    return next((kind for kind in kinds if kind), None)


def choose(asked: str | None, saved: str | None) -> Adapter:
    """The adapter that a load returns tensors of.

    What was `asked` for; else the one that `saved` the file; where that is not installed, or the
    file does not say, the first of the table already imported, NumPy at the latest.
    """
    if asked is not None:
        return by_name(asked)
    if saved is not None and available(saved):
        return by_name(saved)
    return loaded()[0]


#: What a value of a framework comes back as where that framework is not to be had.
_STAND_INS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "torch": {
        "torch.Size": lambda value: tuple(value),
        "torch.dtype": lambda value: f"torch.{value}",
        "torch.device": str,
        "torch.layout": lambda value: f"torch.{value}",
        "torch.memory_format": lambda value: f"torch.{value}",
    },
    "oneflow": {
        "oneflow.Size": lambda value: tuple(value),
        "oneflow.dtype": lambda value: f"oneflow.{value}",
        "oneflow.device": str,
    },
}


def codecs(only: str | None) -> tuple[Codec, ...]:
    """Codecs for every tag that a tree may have.

    Those of a framework that is installed import it when the first of its values is met; those of
    one that is not, or (with `only`) that the caller does not want, make plain Python values.
    """
    _have.cache_clear()  # what was not there for the last load may be by now
    return _codecs(only, tuple(loaded()))


@cache
def _have(name: str) -> bool:
    """Whether a framework is available; to look for a package takes long."""
    return available(name)


@lru_cache(16)
def _codecs(only: str | None, known: tuple[Adapter, ...]) -> tuple[Codec, ...]:
    found = [codec for adapter in known for codec in adapter.codecs]
    seen = {codec.tag for codec in found}
    for name, tags in _STAND_INS.items():
        for tag, plain in tags.items():
            if tag not in seen:
                decode = _late(name, tag, plain) if only in (None, name) else plain
                found.append(Codec(tag, (), _never, decode))
    return tuple(found)


def _late(name: str, tag: str, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if not _have(name):
            return plain(value)
        return next(codec for codec in by_name(name).codecs if codec.tag == tag).decode(value)

    return decode


def _never(_: Any) -> Any:
    raise AssertionError("a codec without types is never asked to encode")
