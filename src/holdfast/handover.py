"""Modules with code of their own for being loaded: that is given the tensors of a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from . import fetch, objects
from .adapters import Adapter
from .errors import FormatError
from .loading import LoadOptions, bring
from .reader import Reader
from .renaming import Rules, apply

__all__ = ["hand_over"]

_EXTRA = "_extra_state"


def hand_over(
    adapter: Adapter,
    reader: Reader,
    stored: dict[str, int],
    prefix: str,
    rules: Rules,
    *,
    dequantize: bool,
    threads: int,
) -> OrderedDict[str, Any]:
    """What ``load_state_dict`` of a module is given: tensors that are a map of the file.

    Beside them, as far as the file has it, what the module's own code looks at: the versions that
    ``state_dict`` notes, and what ``get_extra_state`` returned.

    Parameters
    ----------
    adapter : Adapter
        Of the framework that the module is of.
    reader : Reader
    stored : dict of str to int
        The names that the module has for its tensors, and the entries.
    prefix : str
        What the names in the file begin with besides, after `rules`.
    rules : Rules
    dequantize, threads
        As for :func:`holdfast.load_into`.

    Raises
    ------
    ChecksumError
        The bytes are not those that were written.
    """
    source, index = reader.source, reader.index
    used = np.array(sorted(set(stored.values())), np.int64)
    mapped = source.mappable
    if mapped and fetch.checkable(index):
        fetch.verify_rows(source, index, used, threads=threads)
    rows = np.arange(len(index), dtype=np.int64) if mapped else used
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
    if len(rows) == len(index):
        with suppress(FormatError):  # of which the tensors are to be had, but not the object
            _add_notes(state, made.whole(), prefix, rules)
    return state


def _add_notes(state: OrderedDict[str, Any], obj: Any, prefix: str, rules: Rules) -> None:
    """Add versions and extra state, of what was saved for the module."""
    home = _under(obj, prefix)
    if home is None:
        return
    versions = getattr(home, "_metadata", None)
    if isinstance(versions, Mapping):
        # The module itself is called "", the one in it "name"; its tensors, "name.…".
        notes = {apply(f"{name}.", rules)[:-1] if name else "": v for name, v in versions.items()}
        state._metadata = OrderedDict(notes)  # type: ignore[attr-defined]
    for key, value in home.items():
        if isinstance(key, str) and key.rpartition(".")[2] == _EXTRA:
            name = apply(prefix + key, rules)[len(prefix) :]
            for inner in [each for each in state if each.startswith(f"{name}.")]:
                del state[inner]
            state[name] = value


def _under(obj: Any, prefix: str) -> Mapping[Any, Any] | None:
    """The dict whose tensors are called `prefix` and their key; None where there is none."""
    while prefix and isinstance(obj, Mapping):
        key = next((k for k in obj if isinstance(k, str) and prefix.startswith(f"{k}.")), None)
        if key is None:
            return None
        obj, prefix = obj[key], prefix[len(key) + 1 :]
    return obj if isinstance(obj, Mapping) else None
