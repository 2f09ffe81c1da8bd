"""What the tensors of a pickled object are called: their paths in it, joined by dots."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ._inert import Global, Record, Tensor, brief

__all__ = ["ROOT", "Paths"]

#: What a tensor is called that is the whole object.
ROOT = "tensor"
#: Deeper than this, and longer, no path goes: what is there is called by its number. Pickles that
#: a program wrote do not nest so deep, as it would have needed the stack for it.
MAX_LEVELS = 1000
MAX_TEXT = 1 << 16
#: Characters of a key that is no str.
_MAX_KEY = 200

_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, Record)
_ATTRIBUTES = ("_parameters", "_buffers", "_modules")
#: What the arguments of a call are called that makes a tensor of others.
_PARTS = {
    "_rebuild_nested_tensor": ("buffer", "sizes", "strides", "storage_offsets"),
    "_rebuild_device_tensor_from_cpu_tensor": ("data",),
    "_rebuild_xla_tensor": ("data",),
}
#: What the members of a sparse tensor are called, by layout.
_SPARSE = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
#: Calls that make the same tensor something more; the tensor has the name of the result.
_WRAPPERS = ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_from_type_v2")

_Child = tuple[str | None, Any]


class Paths:
    """The paths to the tensors of an object, found by one walk that takes bounded time.

    A key of a dict is its text, a position is decimal. Modules, which are known by their
    ``_parameters``, ``_buffers`` and ``_modules``, give their tensors the names of a state_dict;
    those that a state_dict does not have get names too, by which nobody can ask for them.

    Parameters
    ----------
    root : object
        With a :class:`Tensor` for each tensor, and a :class:`Record` for what is not known.
    count : int
        Of entries.
    nbytes : int
        Of the pickle: in proportion to it is what a walk may take.

    Attributes
    ----------
    names : list of str
        The name of each entry.
    entries : dict of str to int
        The entry of each path that a tensor can be asked for by.
    records : dict of int to str
        The path of each record, by the offset of its opcode.
    """

    __slots__ = (
        "_again",
        "_apart",
        "_attributes",
        "_later",
        "_room",
        "_seen",
        "_shared",
        "entries",
        "names",
        "records",
    )

    def __init__(self, root: object, count: int, nbytes: int) -> None:
        self.names: list[str] = [""] * count
        self.entries: dict[str, int] = {}
        self.records: dict[int, str] = {}
        self._seen: set[int] = set()
        self._shared: set[int] = set()  # arguments and states of records
        self._later: list[tuple[str, Any]] = [("", root)]
        self._again = 10_000 + 4 * count  # nodes to be visited on further ways to them
        self._room = (1 << 20) + 64 * nbytes  # characters
        self._apart: list[str] = []
        self._attributes = False  # of modules: only what is not in the state_dict has such a name
        for path, obj in self._later:  # grows meanwhile
            self._walk(path, obj)
            self._attributes = True
        # A module's other tensors are nothing that its state_dict has, and are not asked for.
        for path in self._apart:
            del self.entries[path]
        for i in range(count):
            if not self.names[i]:
                self._name(f"#{i}", i)

    def _walk(self, path: str, obj: Any) -> None:
        if type(obj) is Tensor:
            self._take(path, obj)
            return
        stack: list[tuple[str, int, Iterator[_Child]]] = []
        above: set[int] = set()
        self._enter(stack, above, path, obj)
        while stack:
            path, key, children = stack[-1]
            for text, child in children:
                kind = type(child)
                if kind is not Tensor and kind not in _CONTAINERS:
                    continue
                if text is None:
                    full = path
                else:
                    full = f"{path}.{text}" if path else text
                if len(full) > MAX_TEXT or self._room < 0:
                    continue
                self._room -= len(full)
                if kind is Tensor:
                    self._take(full, child)
                elif self._enter(stack, above, full, child):
                    break
            else:
                stack.pop()
                above.discard(key)

    def _enter(
        self, stack: list[tuple[str, int, Iterator[_Child]]], above: set[int], path: str, obj: Any
    ) -> bool:
        """Go down into `obj`, unless that would take no end, or too long."""
        key = id(obj)
        if key in above or len(stack) >= MAX_LEVELS or type(obj) not in _CONTAINERS:
            return False
        if key in self._seen:
            self._again -= 1 + len(obj) if type(obj) is not Record else 1
            if self._again < 0:
                return False
        if type(obj) is Record and not self._share(obj):
            return False
        self._seen.add(key)
        above.add(key)
        if type(obj) is Record:
            self.records.setdefault(obj.offset, path)
        stack.append((path, key, self._children(path, obj)))
        return True

    def _share(self, record: Record) -> bool:
        """Whether there is time for what `record` has, which very many others may have, too."""
        state = record.state
        parts: list[Any] = [record.args]
        # The state of a tensor is an argument.
        for each in (state, *record.args) if len(record.args) <= 8 else (state,):
            parts += each if type(each) is tuple and len(each) == 2 else (each,)
        for part in parts:
            if type(part) in _CONTAINERS and type(part) is not Record and len(part) > 8:
                if id(part) in self._shared:
                    self._again -= len(part)
                self._shared.add(id(part))
        return self._again >= 0

    def _take(self, path: str, tensor: Tensor) -> None:
        entry = tensor.entry
        if 0 <= entry < len(self.names) and not (self._attributes and self.names[entry]):
            self._name(path or ROOT, entry)

    def _name(self, path: str, entry: int) -> None:
        """Let `path` be a path to `entry`, or where another entry has it, a text like it."""
        if not path.isascii():
            path = path.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if path in self.entries:
            if self.entries[path] == entry:
                return
            number = 2
            while self.entries.get(f"{path}#{number}", entry) != entry:
                number += 1
            path = f"{path}#{number}"
        self.entries[path] = entry
        if self._attributes:
            self._apart.append(path)
        if not self.names[entry]:
            self.names[entry] = path

    # -- what is in what -------------------------------------------------------------------------

    def _children(self, path: str, obj: Any) -> Iterator[_Child]:
        if isinstance(obj, dict):
            return _items(obj)
        if isinstance(obj, Record):
            return self._record(path, obj)
        return ((str(i), child) for i, child in enumerate(obj))

    def _record(self, path: str, obj: Record) -> Iterator[_Child]:
        state = obj.state
        # Modules of torch.fx are made anew, by a call of what they consist of.
        for each in (state, *(obj.args[:1] if obj.called else ())):
            if type(each) is dict and all(isinstance(each.get(k), dict) for k in _ATTRIBUTES):
                yield from self._module(path, each)
                return
        if obj.called and type(obj.cls) is Global and obj.cls.name.startswith("_rebuild_"):
            yield from _rebuilt(obj)
        else:
            yield from ((str(i), child) for i, child in enumerate(obj.args))
        yield from ((key, child) for key, child in _items(obj.kwargs))
        yield from ((str(i), child) for i, child in enumerate(obj.items))
        yield from ((_text(key), child) for key, child in obj.pairs)
        yield from _state(state)

    def _module(self, path: str, state: dict[Any, Any]) -> Iterator[_Child]:
        """What the state_dict of a module has, in its order; the rest is walked at the end."""
        hidden = state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, set | frozenset | list | tuple) else ()
        buffers = state["_buffers"]
        yield from _items(state["_parameters"])
        yield from _items({key: child for key, child in buffers.items() if key not in hidden})
        yield from _items(state["_modules"])
        rest = {key: child for key, child in buffers.items() if key in hidden}
        rest |= {key: child for key, child in state.items() if key not in _ATTRIBUTES}
        for text, child in _items(rest):
            if type(child) is Tensor or (type(child) in _CONTAINERS and child):
                full = f"{path}.{text}" if path else str(text)
                self._room -= len(full)
                if self._room >= 0 and len(full) <= MAX_TEXT:
                    self._later.append((full, child))


def _items(mapping: dict[Any, Any]) -> Iterator[_Child]:
    return ((key if type(key) is str else _text(key), child) for key, child in mapping.items())


def _start(key: Any, room: list[int]) -> Any:
    """What of a key the first characters of its JSON show; `room` of them are left.

    One key of any length can stand in very many dicts.
    """
    room[0] -= 1
    if type(key) is str:
        return key[:_MAX_KEY]
    if type(key) is not tuple:
        return key
    return [_start(item, room) for item in key[:_MAX_KEY] if room[0] > 0]


def _text(key: Any) -> str:
    """A key as it stands in a path."""
    if type(key) is str:
        return key
    if key is None or type(key) in (bool, int, float, tuple):
        try:
            return json.dumps(_start(key, [_MAX_KEY]))[:_MAX_KEY]
        except (TypeError, ValueError, RecursionError):
            pass
    return brief(key)


def _state(state: Any) -> Iterator[_Child]:
    """What is in the state of an object: attributes as a rule, in one dict or two."""
    if isinstance(state, dict):
        yield from _items(state)
    elif (
        isinstance(state, tuple)
        and len(state) == 2
        and all(part is None or isinstance(part, dict) for part in state)
    ):
        for part in state:
            yield from _items(part or {})
    else:
        yield "state", state


def _rebuilt(obj: Record) -> Iterator[_Child]:
    """The tensors that a tensor of a special kind is made of."""
    name, args = obj.cls.name, obj.args
    if name in _WRAPPERS:
        inner, more = args[: len(args) - 1], args[len(args) - 1 :]
        if name == "_rebuild_from_type_v2" and len(inner) == 3:
            yield from _inner(inner[2])
        else:
            yield from ((None, child) for child in inner)
        for state in more:
            yield from _state(state)
    elif name == "_rebuild_sparse_tensor" and len(args) == 2 and isinstance(args[1], tuple):
        layout = args[0].args[0] if isinstance(args[0], Record) and args[0].args else None
        parts = _SPARSE.get(layout, ()) if isinstance(layout, str) else ()
        yield from _named(parts, args[1])
    elif name == "_rebuild_sparse_tensor" and len(args) >= 5:  # as TorchScript has it
        yield from _named(("indices", "values"), args[3:5])
    elif name == "_rebuild_qtensor" and len(args) > 4 and isinstance(args[4], tuple):
        yield from _named(("scales", "zero_points"), args[4][1:3])
    else:
        yield from _named(_PARTS.get(name, ()), args)


def _inner(made: Any) -> Iterator[_Child]:
    """The tensor that a subclass has its elements in, or those in the arguments it is made of."""
    if isinstance(made, tuple):
        for child in made:
            if isinstance(child, dict):
                yield from _items(child)
            else:
                yield None, child
    else:
        yield None, made


def _named(parts: tuple[str, ...], children: tuple[Any, ...]) -> Iterator[_Child]:
    for i, child in enumerate(children):
        yield parts[i] if i < len(parts) else str(i), child
