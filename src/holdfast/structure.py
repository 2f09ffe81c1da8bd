"""Objects that were pickled around their tensors, as formats hand them out to be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["QUANTIZED", "Persistent", "Resolver", "Structure"]

#: Quantized element types of PyTorch, whose integers mean nothing without scale and zero point.
#: Where a storage is asked for by the code of a dtype, position i stands here as code ``-2 - i``.
QUANTIZED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")


class Resolver(Protocol):
    """Who decides what a pickle may name and call. Every method raises where it may not."""

    def find(self, module: str, name: str) -> object:
        """What a pickle means by ``module.name``."""

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func`, which :meth:`find` returned, makes."""

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """An instance of `cls`, which :meth:`find` returned."""

    def build(self, obj: object, state: object) -> object:
        """`obj` with `state` set; it may be another object."""

    def extend(self, obj: object, items: list[Any]) -> None:
        """Append `items` to `obj`, which is no list."""

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        """Set items of `obj`, which is no dict."""


@dataclass(frozen=True, slots=True)
class Persistent:
    """What a persistent id of a pickle stands for: a tensor, or a storage that is none's alone.

    Attributes
    ----------
    entry : int
        Of the index; -1 for a storage.
    row : int
        Of ``Index.storages``; -1 for a tensor.
    code : int
        Of the storage's dtype: -1 for untyped bytes, and below that for :data:`QUANTIZED`.
    part : tuple of int or None
        First element and number of elements, where it is a view of a part of the row.
    """

    entry: int = -1
    row: int = -1
    code: int = -1
    part: tuple[int, int] | None = None


class Structure(Protocol):
    """An object that was pickled around its tensors: read without running any of it.

    Attributes
    ----------
    data : bytes-like
        The pickle of the object, which a program that trusts it may unpickle.
    globals : sequence of str
        The ``module.name`` that it needs, in order, but for those of tensors and storages.
    """

    @property
    def data(self) -> bytes | memoryview: ...  # noqa: D102
    @property
    def globals(self) -> Sequence[str]: ...  # noqa: D102

    def paths(self) -> Mapping[str, int]:
        """Every name a tensor can be asked for, and its entry."""

    def replay(
        self,
        tensors: Sequence[Any],
        storages: Callable[..., object],
        resolver: Resolver,
        *,
        encoding: str | None = None,
    ) -> object:
        """The object, with `tensors` in the order of the entries for its tensors.

        Parameters
        ----------
        tensors : sequence
            One for each entry.
        storages : callable
            The storage of a row of ``Index.storages`` as one of a dtype's code (-1: untyped), for
            where the object holds a storage that is no tensor's, or a tensor of a special kind
            needs it. For one that is a view of a part of the row, a third argument says which:
            first element and number of elements.
        resolver : Resolver
            Asked for every other global and call.
        encoding : str, optional
            What a ``str`` of Python 2 is decoded by, strictly; ``"bytes"`` leaves it bytes. By
            default it is text where it is UTF-8, else bytes.

        Raises
        ------
        UnicodeDecodeError
            A ``str`` of Python 2 is not what `encoding` says.
        """

    def outline(self, leaf: Callable[[int], object]) -> object:
        """The object with ``leaf(entry)`` for its tensors, and inert records for all classes."""

    def persistent(self, pid: object) -> Persistent:
        """What a persistent id stands for.

        Parameters
        ----------
        pid : object
            As the pickle has it, but for the class of a storage, which is the name of the class.

        Raises
        ------
        KeyError
            It names nothing.
        """
