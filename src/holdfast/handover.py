"""Modules with code of their own for being loaded: that is given the tensors of a file."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import fetch, objects
from .adapters import Adapter, Loader
from .errors import FormatError
from .loading import LoadOptions, bring
from .reader import Reader
from .renaming import Rules, apply

__all__ = ["hand_over"]

#: Items of an object that are looked at: what stands at many places is, at each of them.
_MOST_ITEMS = 1 << 20
_MOST_LEVELS = 64

_Dicts = Iterator[tuple[str, Mapping[Any, Any]]]


def hand_over(
    loader: Loader,
    adapter: Adapter,
    reader: Reader,
    stored: dict[str, int],
    twins: Mapping[str, str],
    prefix: str,
    rules: Rules,
    *,
    strict: bool,
    dequantize: bool,
    threads: int,
) -> tuple[list[str], list[str]]:
    """Call ``load_state_dict`` of a module with tensors that are a map of the file.

    Beside them it is given what of its own ``state_dict`` is no tensor (what ``get_extra_state``
    returned, say), and the versions that ``state_dict`` noted, as far as the file has them.

    Parameters
    ----------
    loader : Loader
        Of the module.
    adapter : Adapter
        Of the framework that the module is of.
    reader : Reader
    stored : dict of str to int
        The names that the module has for the tensors that there are, and the entries.
    twins : mapping of str to str
        Of names of tensors that there are not, those that are the same tensor.
    prefix : str
        What the names in the file begin with besides, after `rules`.
    rules : Rules
    strict, dequantize, threads
        As for :func:`holdfast.load_into`.

    Returns
    -------
    missing, unexpected : list of str

    Raises
    ------
    RuntimeError
        As the framework has it; part of the module may have been filled.
    ChecksumError
        The bytes are not those that were written; the module is what it was.
    """
    source, index = reader.source, reader.index
    mapped = source.mappable
    if mapped and fetch.checkable(index):
        used = np.array(sorted(set(stored.values())), np.int64)
        fetch.verify_rows(source, index, used, threads=threads)
    rows = np.arange(len(index), dtype=np.int64)
    options = LoadOptions(mmap=mapped, dequantize=dequantize, threads=threads)
    made = objects.assembler(
        index,
        bring(source, index, rows, adapter, options, None),
        rows,
        adapter,
        name=source.name,
        forced=True,
        kinds=reader.kinds,
        location="cpu",
    )
    state: OrderedDict[str, Any] = OrderedDict(made.named(stored))
    state.update((name, state[twin]) for name, twin in twins.items())
    notes = _versions(reader, prefix, rules)
    if notes:
        state._metadata = notes  # type: ignore[attr-defined]
    lacking = ""
    wanted = loader.names - state.keys()
    if wanted and (index.tree is not None or index.structure is not None):
        try:
            _add_values(state, wanted, made.whole(), prefix, rules)
        except FormatError as error:  # not every module asks for what is not there
            lacking = f"\n\t{error}"
    try:
        return loader.load(state, strict)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise RuntimeError(f"{source.name}: {error}{lacking}") from error


def _versions(reader: Reader, prefix: str, rules: Rules) -> OrderedDict[str, Any]:
    """What the ``_metadata`` of state dicts in the file say of each module in the target."""
    index = reader.index
    if index.tree is None and index.structure is None:
        return OrderedDict()
    outline = objects.rebuild(index, _nothing, reader.source.name)
    found: dict[str, Any] = {}  # what is said of a module, by what names of its tensors begin with
    for path, each in _dicts(outline):
        notes = getattr(each, "_metadata", None)
        for name, note in notes.items() if isinstance(notes, Mapping) else ():
            if isinstance(name, str) and isinstance(note, Mapping):
                found[f"{path}{name}." if name else path] = note
    if not found:
        return OrderedDict()
    named = {apply(path, rules): note for path, note in found.items()}
    if rules:  # which may be about tensors, not about what they are in
        for old in reader.paths():
            note = found.get(_above(old))
            if note is not None:
                named[_above(apply(old, rules))] = note
    return OrderedDict(
        (path[len(prefix) :].removesuffix("."), note)
        for path, note in named.items()
        if path.startswith(prefix)
    )


def _nothing(row: int, kind: str | None) -> None:
    """What stands for a tensor where only what is around them counts."""


def _above(name: str) -> str:
    """What the names of all tensors begin with that are in the same module."""
    return name[: name.rfind(".") + 1]


def _add_values(
    state: OrderedDict[str, Any], wanted: frozenset[str], obj: Any, prefix: str, rules: Rules
) -> None:
    """Add what is no tensor, in place of the tensors in it."""
    added = []
    for path, each in _dicts(obj):
        for key, value in each.items():
            name = apply(f"{path}{key}", rules) if isinstance(key, str) else ""
            if name.startswith(prefix) and name[len(prefix) :] in wanted:
                state[name[len(prefix) :]] = value
                added.append(name[len(prefix) :])
    names = sorted(state)
    for name in added:
        for inner in names[bisect_left(names, f"{name}.") : bisect_left(names, f"{name}/")]:
            state.pop(inner, None)  # "/" comes after "."


def _dicts(obj: Any) -> _Dicts:
    """All dicts in an object, and what the names of tensors in each begin with."""
    left = _MOST_ITEMS
    stack: list[tuple[str, Any, int]] = [("", obj, 0)]
    while stack:
        path, each, level = stack.pop()
        if isinstance(each, Mapping):
            yield path, each
            items: Iterator[tuple[Any, Any]] = iter(each.items())
        else:
            items = iter(enumerate(each))
        for key, value in items:
            left -= 1
            if left < 0:
                raise FormatError(f"more than {_MOST_ITEMS} items around the tensors")
            inner = isinstance(value, Mapping | list | tuple) and level < _MOST_LEVELS
            if inner and isinstance(key, str | int):
                stack.append((f"{path}{key}.", value, level + 1))
