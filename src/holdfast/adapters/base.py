"""What an adapter is: the one place where a framework's tensors become columns, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..dtypes import DTYPES, DType
from ..tree import Codec
from ..views import TensorBatch

__all__ = ["Adapter", "Codec", "dtypes_of", "refusal"]


class Adapter(Protocol):
    """A framework, as the rest of the library sees it.

    A tensor is described by its memory and, where that does not say all, by a *kind*: a short
    text that only adapters understand, which travels with the tensor in the file.
    """

    @property
    def name(self) -> str:
        """What ``framework=`` calls it, and files that it saved."""
        ...

    @property
    def plain_types(self) -> frozenset[type]:
        """Types whose instances are tensors at a glance; matched exactly."""
        ...

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """How values of the framework that are not tensors are held."""
        ...

    def is_tensor(self, obj: object) -> bool:
        """Whether `obj` is a tensor of the framework, of a type that it may refuse to describe."""
        ...

    def describe(
        self, tensors: list[Any], names: Sequence[str]
    ) -> tuple[TensorBatch, dict[int, str]]:
        """Columns of tensors in host memory. Nothing is copied that strides can say.

        Parameters
        ----------
        tensors : list
            For which ``is_tensor`` holds.
        names : sequence of str
            For messages.

        Returns
        -------
        batch : TensorBatch
            ``batch.owners[i]`` is ``tensors[i]`` itself, or the copy that had to be made of it.
        kinds : dict of int to str
            Of the rows that a plain tensor of the framework does not say all of.

        Raises
        ------
        TypeError
            For a tensor that cannot be held, with its name and what to do.
        """
        ...

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Tensors over the memory of a batch; nothing is copied.

        Parameters
        ----------
        batch : TensorBatch
            Of dense rows in native byte order, owned by :class:`holdfast._buffer.Buffer` objects.
        kinds : mapping of int to str
            As ``describe`` returned them; those that mean nothing here make plain tensors.

        Returns
        -------
        list
            Writable, one for each row, each keeping its buffer alive.

        Raises
        ------
        TypeError
            Where the framework, as it is installed, has no such element type.
        ValueError
            Where a kind cannot be that of its row.
        """
        ...

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` where ``map_location`` wants it; the same object where it is there already."""
        ...

    def named_tensors(self, obj: object) -> dict[str, Any] | None:
        """The tensors of a module by name, for ``load_into``; None where `obj` is no module."""
        ...

    def writable(self, tensor: Any) -> bool:
        """Whether the memory of `tensor` may be written to."""
        ...

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy `source` into `tensor`, of the same shape, with its dtype converted."""
        ...


def dtypes_of(batch: TensorBatch) -> list[DType]:
    """The element types that occur in a batch."""
    return [DTYPES[code] for code in np.flatnonzero(np.bincount(batch.views["dtype"])).tolist()]


def refusal(name: str, why: str) -> TypeError:
    """The error for a tensor that cannot be held."""
    return TypeError(f"tensor {name!r}: {why}")
