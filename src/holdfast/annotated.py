"""What a load returns of a file that says more than its tensors."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from .layout import Index

__all__ = ["StateDict", "annotate", "as_texts"]


class StateDict(dict[str, Any]):
    """A dict of tensors, with what the file said besides.

    A copy of it, shallow, deep or pickled, is an ``OrderedDict`` of the tensors alone.

    Attributes
    ----------
    metadata : mapping of str to object
        As ``Checkpoint.metadata``.
    encodings : mapping of str to str
        For the tensors that are blocks of quantized numbers, the type of the blocks.
    """

    __slots__ = ("encodings", "metadata")

    def __init__(
        self,
        tensors: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        *,
        metadata: Mapping[str, Any],
        encodings: Mapping[str, str],
    ) -> None:
        super().__init__(tensors)
        self.metadata = metadata
        self.encodings = encodings

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


def annotate(found: Any, index: Index, names: Iterable[tuple[str, int]]) -> Any:
    """`found`, what a load made of `index`; a StateDict where the format has values of its own.

    Parameters
    ----------
    found : object
    index : Index
        Its `encodings` are those that the tensors still have.
    names : iterable of (str, int)
        Names in `found`, and their entries.
    """
    if type(found) is not dict or isinstance(index.metadata, dict):
        return found
    encodings = {name: index.encodings[row] for name, row in names if row in index.encodings}
    return StateDict(found, metadata=index.metadata, encodings=encodings)


def as_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for a place that holds texts: what is none as JSON, and no lone surrogates."""
    return {
        key: value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if isinstance(value, str)
        else json.dumps(value)
        for key, value in metadata.items()
    }
