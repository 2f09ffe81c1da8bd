"""For a conversion: tensors with attributes of Python's become entries of the file without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from .dtypes import BY_TORCH
from .references import Ref
from .safe import SafeResolver

__all__ = ["Omitting", "Storage"]

#: Attributes that say, by a bool, only that a tensor is a buffer of a module, as its name does.
_USUAL = frozenset({"persistent", "_is_buffer"})

#: The types of tensors that are no more than tensors, and those of them that are parameters.
_TENSORS = (("torch", "Tensor"), ("torch._tensor", "Tensor"))
_PARAMETERS = (("torch.nn", "Parameter"), ("torch.nn.parameter", "Parameter"))

#: Given the row of a storage, the code of the elements' type, offset, shape and strides.
Find = Callable[[int, int, tuple[Any, Any, Any]], Ref | None]


class Storage:
    """A storage of the file where no tensor is told that is a view of it."""

    __slots__ = ("code", "row")

    def __init__(self, row: int, code: int) -> None:
        self.row = row
        self.code = code

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"storage {self.row} is that of no plain tensor: load and save it instead of "
            "converting it"
        )


class Omitting(SafeResolver):
    """A resolver to which a tensor with attributes is an entry of the file.

    Parameters
    ----------
    find : callable
        The stand-in for a view of a storage, if there is one.

    Attributes
    ----------
    omitted : dict of str to None
        Names of the attributes that there were, in the order in which they came.
    """

    __slots__ = ("_find", "_seen", "omitted")

    def __init__(self, adapter: str, find: Find, *, name: str) -> None:
        super().__init__(adapter, name=name)
        self._find = find
        self._seen: dict[int, object] = {}  # states that were looked at, which tensors may share
        self.omitted: dict[str, None] = {}

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func`, which :meth:`find` returned, makes."""
        what = self._called(func)
        ref = None
        if what == "_rebuild_parameter_with_state" and len(args) == 4:
            first, grad, hooks, state = args  # a tensor, whether a gradient is wanted, ...
            if isinstance(first, Ref) and type(grad) is bool and not hooks:
                ref = type(first)(first.row, _parameter(grad))
        elif what == "_rebuild_from_type_v2" and len(args) == 4:
            inner, kind, given, state = args  # what makes it, its type, of what, ...
            if type(given) is tuple and self._is(kind, _TENSORS):
                ref = self._inner(inner, given)
            elif type(given) is tuple and self._is(kind, _PARAMETERS):
                ref = self._inner(inner, given)
                if ref is not None:
                    ref = type(ref)(ref.row, _parameter(bool(ref.kind)))
        if ref is None:
            return super().call(func, args)
        self._note(state)
        return ref

    def _called(self, func: object) -> str:
        rule = self._table.rules.get(id(func))
        return rule.name.rpartition(".")[2] if rule is not None else ""

    def _is(self, kind: object, names: tuple[tuple[str, str], ...]) -> bool:
        return any(kind is self._table.names.get(name) for name in names)

    def _inner(self, func: object, args: tuple[Any, ...]) -> Ref | None:
        """The entry that is a plain tensor, if that is what calling `func` would make."""
        what, count = self._called(func), len(args)
        if (what, count) not in _MAKERS or not isinstance(args[0], Storage):
            return None
        storage, offset, shape, strides, grad, hooks, *more = args
        code, lazy = storage.code, more[-1] if count > _MAKERS[what, count] else None
        if what == "_rebuild_tensor_v3":
            row = BY_TORCH.get(str(more[0]).removeprefix("torch."))
            code = -1 if row is None else row.code
        if type(grad) is not bool or hooks or lazy:
            return None
        found = self._find(storage.row, code, (offset, tuple(shape), tuple(strides)))
        return found if found is None else type(found)(found.row, "requires_grad" if grad else "")

    def _note(self, state: Any) -> None:
        """Keep the names of attributes."""
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict) and id(part) not in self._seen:
                self._seen[id(part)] = part
                for key, value in part.items():
                    usual = key in _USUAL and type(value) is bool
                    if not usual:
                        self.omitted[key if isinstance(key, str) else type(key).__name__] = None


#: What makes a plain tensor of so many arguments, and how many it takes without the last, which is
#: of tensors that are conjugated or negated lazily.
_MAKERS = {
    ("_rebuild_tensor_v2", 6): 6,
    ("_rebuild_tensor_v2", 7): 6,
    ("_rebuild_tensor_v3", 7): 7,
    ("_rebuild_tensor_v3", 8): 7,
}


def _parameter(grad: bool) -> str:
    return "parameter" if grad else "parameter,frozen"
