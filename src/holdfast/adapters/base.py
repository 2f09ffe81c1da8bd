"""What an adapter is: the one place where a framework's tensors become columns, and back."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..dtypes import DTYPES, DType
from ..tree import Codec
from ..views import TensorBatch, TensorView

__all__ = [
    "PARAMETER",
    "REQUIRES_GRAD",
    "Adapter",
    "Codec",
    "Loader",
    "Placed",
    "Storages",
    "dtypes_of",
    "refusal",
    "vet_row",
]

#: Flag of :data:`Placed`: gradients of the tensor are recorded.
REQUIRES_GRAD = 1
#: Flag of :data:`Placed`: it is a parameter.
PARAMETER = 2

#: A tensor as a view of a storage: key of the storage, code of the dtype, bytes of the whole
#: storage, offset in elements, shape, strides in elements, flags.
Placed = tuple[str, int, int, int, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Loader:
    """What loads a module that has code of its own for it.

    Attributes
    ----------
    names : frozenset of str
        What the module's own state has, whether that is a tensor or not.
    load : callable
        Takes what there is for the module, by name, and whether names have to match; returns
        missing and unexpected ones.
    """

    names: frozenset[str]
    load: Callable[[Mapping[str, Any], bool], tuple[list[str], list[str]]]


class Storages(Protocol):
    """The storages of an object's tensors, gathered while it is being pickled around them.

    An attribute ``placer``, where there is one, does in C what :meth:`add` does, and of storages on
    other devices than the host says where they are, as the attribute ``places`` calls it: see
    ``holdfast/_placed.pxd``.
    """

    @property
    def name(self) -> str:
        """Name of the adapter."""
        ...

    @property
    def keys(self) -> list[str]:
        """Their keys, in the order in which they were first seen."""
        ...

    def add(self, tensor: Any) -> Placed | None:
        """Where a tensor of one of the adapter's plain types lies.

        None where that does not say all of it, so that it has to be pickled in its own way.

        Raises
        ------
        RuntimeError
            Its storage holds elements of another type already.
        """
        ...

    def persistent(self, obj: Any) -> tuple[Any, ...] | None:
        """What stands in a pickle for `obj`, which is kept outside of it; None for all others.

        It begins with ``"storage"`` where that is what `obj` is.
        """
        ...

    def batch(self) -> TensorBatch:
        """The storages in host memory, in the order of `keys`; dtypes are those first seen."""
        ...


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
        """Columns of tensors, wherever their memory is. Nothing is copied that strides can say.

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
            ``batch.devices`` says of memory that is not the host's where it is; nothing waits for
            what its device may still be computing, unless the framework has no stream to wait for.
        kinds : dict of int to str
            Of the rows that a plain tensor of the framework does not say all of.

        Raises
        ------
        TypeError
            For a tensor that cannot be held, with its name and what to do.
        """
        ...

    def storages(self, *, legacy: bool = False) -> Storages:
        """A new, empty collection of storages.

        Parameters
        ----------
        legacy : bool
            Whether persistent ids are those of the stream that torch wrote up to 1.5.
        """
        ...

    def wrap(self, batch: TensorBatch, kinds: Mapping[int, str]) -> list[Any]:
        """Tensors over the memory of a batch; nothing is copied that the framework can share.

        Parameters
        ----------
        batch : TensorBatch
            Of dense rows in native byte order, owned by :class:`holdfast._buffer.Buffer` objects,
            each of which says on which device it is.
        kinds : mapping of int to str
            As ``describe`` returned them; those that mean nothing here make plain tensors.

        Returns
        -------
        list
            One for each row, each keeping its buffer alive; writable where the framework has such
            tensors.

        Raises
        ------
        TypeError
            Where the framework, as it is installed, has no such element type.
        ValueError
            Where a kind cannot be that of its row.
        """
        ...

    def relocates(self, locations: Sequence[str], location: Any) -> bool:
        """Whether storages saved at `locations` have to be moved for ``map_location``."""
        ...

    def dataless(self, location: Any) -> bool:
        """Whether ``map_location`` wants tensors that have no elements, so that none are read."""
        ...

    def wrap_storages(
        self,
        batch: TensorBatch,
        locations: Sequence[str],
        offsets: Sequence[int],
        location: Any,
    ) -> list[Any]:
        """Handles of the rows of `batch`, runs of bytes, for :meth:`view` and :meth:`storage`.

        Parameters
        ----------
        batch : TensorBatch
            Of dense rows of uint8, owned by :class:`holdfast._buffer.Buffer` objects.
        locations : sequence of str
            For each row, the device that it was saved from.
        offsets : sequence of int
            Where in the file each begins.
        location : object
            ``map_location``.
        """
        ...

    def handle_of(self, tensor: Any) -> Any:
        """The handle of the storage of a tensor that :meth:`wrap` made."""
        ...

    def view(
        self,
        handle: Any,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        flags: int,
        kind: str,
    ) -> Any:
        """A tensor over a part of a storage; nothing is copied but what `flags` asks for.

        Parameters
        ----------
        handle : object
            One that :meth:`wrap_storages` made.
        offset : int
            Of the first element, in bytes.
        strides : tuple of int or None
            In bytes; None for C order.
        flags : int
            ``CONJUGATE`` and ``NEGATIVE`` of :mod:`holdfast.views`.
        kind : str
            As :meth:`describe` has it; empty for a plain tensor.
        """
        ...

    def storage(self, handle: Any, code: int, part: tuple[int, int] | None = None) -> Any:
        """What a bare storage comes back as.

        Parameters
        ----------
        handle : object
            One that :meth:`wrap_storages` made.
        code : int
            Of the dtype that it was saved as; -1: of none; below that: ``-2 - code`` is a
            position in :data:`holdfast.layout.QUANTIZED`.
        part : tuple of int, optional
            Offset and size, in elements, of the part that it is.
        """
        ...

    def destination(self, location: Any) -> int:
        """The device whose memory a load should bring the bytes to, before they are wrapped.

        Parameters
        ----------
        location : object
            ``map_location``. Only one that plainly names a device has a destination: its name, an
            object of the framework or, where the framework takes it, a number; and None where the
            framework has a device of its own choice.

        Returns
        -------
        int
            A code of :func:`holdfast.views.device_code`, of a device that is there and whose memory
            :meth:`wrap` makes tensors of. 0 for the host, and for all that :meth:`place` has to see
            to: other devices, dicts, functions, and what is wrong.

        Raises
        ------
        RuntimeError
            There is no such device, where the framework has no other place for its tensors.
        """
        ...

    def place(self, tensor: Any, location: Any) -> Any:
        """`tensor` where ``map_location`` wants it; the same object where it is there already."""
        ...

    def program(self, obj: object) -> str | None:
        """``"torchscript"`` or ``"pt2"`` where `obj` is a program of the framework, else None."""
        ...

    def named_tensors(self, obj: object) -> dict[str, Any] | None:
        """The tensors of a module by name, for ``load_into``; None where `obj` is no module."""
        ...

    def own_loader(self, obj: object, stored: Container[str]) -> Loader | None:
        """What loads a module, where it has code of its own for that.

        Parameters
        ----------
        obj : object
        stored : container of str
            Names of the tensors that there are for it.

        Returns
        -------
        Loader or None
            None for what is no module, or one to which its tensors are all.
        """
        ...

    def writable(self, tensor: Any) -> bool:
        """Whether the memory of `tensor` may be written to."""
        ...

    def mismatch(self, tensor: Any, name: str) -> str | None:
        """Why no tensor of a file fits `tensor`, in the words of the framework; None if one may."""
        ...

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """What messages of the framework have for a shape."""
        ...

    def fill(self, tensor: Any, source: Any) -> None:
        """Copy `source` into `tensor`, of the same shape, with its dtype converted."""
        ...

    def changing(self, tensors: Sequence[Any]) -> None:
        """Be told that the memory of these is about to be written to, by others than `fill`."""
        ...


def dtypes_of(batch: TensorBatch) -> list[DType]:
    """The element types that occur in a batch."""
    if len(batch) == 1:
        return [DTYPES[int(batch.views["dtype"][0])]]
    return [DTYPES[code] for code in np.flatnonzero(np.bincount(batch.views["dtype"])).tolist()]


def vet_row(view: TensorView, nbytes: int) -> None:
    """Raise ValueError unless `nbytes` are those of a row, and lie in its Buffer."""
    buffer: Any = view.owner
    if nbytes != view.nbytes:
        raise ValueError(f"{nbytes} bytes were given for a tensor of {view.nbytes}")
    start = view.address - buffer.address
    if nbytes and not 0 <= start <= len(buffer) - nbytes:
        raise ValueError(f"{nbytes} bytes at {view.address:#x} lie outside of their buffer")


def refusal(name: str, why: str) -> TypeError:
    """The error for a tensor that cannot be held."""
    return TypeError(f"tensor {name!r}: {why}")
