"""For a conversion: tensors with attributes of Python's become entries of the file without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from .references import Ref
from .safe import SafeResolver

__all__ = ["Omitting", "UntoldStorage"]

#: Attributes that say only that a tensor is a buffer of a module, which its name does as well.
_USUAL = frozenset({"persistent", "_is_buffer"})

#: The types of tensors that are no more than tensors.
_PLAIN = (
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn", "Parameter"),
    ("torch.nn.parameter", "Parameter"),
)

#: Given the row of a storage, the code of the elements' type, offset, shape and strides.
Find = Callable[[int, int, tuple[Any, Any, Any]], Ref | None]


class UntoldStorage:
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

    __slots__ = ("_find", "omitted")

    def __init__(self, adapter: str, find: Find, *, name: str) -> None:
        super().__init__(adapter, name=name)
        self._find = find
        self.omitted: dict[str, None] = {}

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func`, which :meth:`find` returned, makes."""
        what = self._called(func)
        ref = None
        if what == "_rebuild_parameter_with_state" and len(args) == 4:
            first, grad, hooks, state = args  # a tensor, whether a gradient is wanted, ...
            if isinstance(first, Ref) and type(grad) is bool and not hooks:
                ref = type(first)(first.row, "parameter" if grad else "parameter,frozen")
        elif what == "_rebuild_from_type_v2" and len(args) == 4:
            inner, kind, given, state = args  # what makes it, its type, of what, ...
            if type(given) is tuple and any(kind is self._table.names.get(key) for key in _PLAIN):
                ref = self._inner(inner, given)
        if ref is None:
            return super().call(func, args)
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict):
                names = (key for key in part if isinstance(key, str) and key not in _USUAL)
                self.omitted.update(dict.fromkeys(names))
        return ref

    def _called(self, func: object) -> str:
        rule = self._table.rules.get(id(func))
        return rule.name.rpartition(".")[2] if rule is not None else ""

    def _inner(self, func: object, args: tuple[Any, ...]) -> Ref | None:
        """The entry that is a plain tensor, if that is what calling `func` would make."""
        if isinstance(func, Ref):
            return func
        if self._called(func) == "_rebuild_tensor_v2" and 4 <= len(args) <= 7:
            storage, offset, shape, strides, *more = args
            grad = more[0] if more else False
            lazy = len(more) > 2 and more[2]
            if isinstance(storage, UntoldStorage) and type(grad) is bool and not lazy:
                view = offset, tuple(shape), tuple(strides)
                found = self._find(storage.row, storage.code, view)
                if found is not None and grad:
                    return type(found)(found.row, "requires_grad")
                return found
        return None
