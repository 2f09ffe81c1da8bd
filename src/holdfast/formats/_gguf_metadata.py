"""The key-value pairs of a GGUF file as a mapping; arrays become lists when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._gguf import strings

__all__ = ["Metadata", "decode"]

_BOOL, _STRING, _ARRAY = 7, 8, 9

#: Types of values, by number, as NumPy has them; bool is checked by the scanner.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

_Row = tuple[int, int, int, int]


class Metadata(Mapping[str, Any]):
    """Keys and typed values: int, float, bool, str, and lists of one of these.

    Read-only, in the order of the file. A list is made of the bytes of the header when it is first
    asked for, and kept: the vocabulary of a tokenizer, 100,000 strings, costs nothing before.

    Parameters
    ----------
    head : bytes
        The header, or as much of it as the values take.
    rows : dict of str to tuple of int
        For each key the columns value, count, kind and element of ``_gguf.PAIR``.

    Notes
    -----
    Strings are UTF-8. What is none, as the pieces of some tokenizers are, comes with a surrogate
    for each such byte: ``text.encode("utf-8", "surrogateescape")`` gives the bytes of the file.
    """

    __slots__ = ("_head", "_made", "_rows")

    def __init__(self, head: bytes, rows: dict[str, _Row]) -> None:
        self._head = head
        self._rows = rows
        self._made: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._made:
            self._made[key] = decode(self._head, *self._rows[key])
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        shown = []
        for key, (_, count, kind, _) in self._rows.items():
            text = f"<list of {count}>" if kind == _ARRAY else repr(self[key])
            shown.append(f"{key!r}: {text if len(text) <= 80 else text[:77] + '...'}")
        return f"Metadata({{{', '.join(shown)}}})"

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def decode(head: bytes, value: int, count: int, kind: int, element: int) -> Any:
    """One value: the arguments are those columns of its pair."""
    if kind == _STRING:
        return head[value : value + count].decode("utf-8", "surrogateescape")
    if kind != _ARRAY:
        return np.frombuffer(head, _SCALARS[kind], 1, value)[0].item()
    if element == _STRING:
        return strings(head, value, count)
    if count == 0:  # of an empty buffer NumPy wants no part
        return []
    return np.frombuffer(head, _SCALARS[element], count, value).tolist()
