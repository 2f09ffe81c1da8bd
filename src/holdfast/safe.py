"""What a pickle may name and call where its file is not trusted.

:class:`SafeResolver` answers every global with an exact list: a name that is not on it is refused,
and nothing is ever imported or looked up because a file says so. What is on the list gets its
arguments checked before it is called (:mod:`holdfast.adapters._rules`).
"""

from __future__ import annotations

import _compat_pickle
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NoReturn

from . import _safe_python
from ._safe_allowed import BLOCKED, Allowed, full_name, origin
from .adapters import _numpy_globals, _stand_ins
from .adapters._rules import LackingError, Making, Rule, Table, UnsafeRequestError, is_dunder
from .errors import FormatError, UnsafeError

__all__ = ["SafeResolver", "StandIn", "unsafe"]

#: What a rule may raise of arguments that cannot be right.
_WRONG = (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AttributeError)

_NESTED = (
    "``torch.nested`` and ``torch._dynamo`` must be imported to load nested jagged tensors (NJTs)"
)
_DISTRIBUTED = "``torch.distributed.tensor`` must be imported to load DTensors"

#: Globals that PyTorch allows by itself as soon as the part of it that has them is imported.
_UNTIL_IMPORTED = {
    "torch.nested._internal.nested_tensor.NestedTensor": _NESTED,
    "torch.nested._internal.nested_tensor._rebuild_njt": _NESTED,
    "torch._dynamo.decorators._DimRange": _NESTED,
    "torch.distributed.device_mesh.DeviceMesh": _DISTRIBUTED,
    "torch.distributed.tensor._dtensor_spec.DTensorSpec": _DISTRIBUTED,
    "torch.distributed.tensor._dtensor_spec.TensorMeta": _DISTRIBUTED,
    "torch.distributed.tensor.DTensor": _DISTRIBUTED,
    "torch.distributed.tensor.placement_types.Partial": _DISTRIBUTED,
    "torch.distributed.tensor.placement_types.Replicate": _DISTRIBUTED,
    "torch.distributed.tensor.placement_types.Shard": _DISTRIBUTED,
}


def unsafe(name: str, reason: str) -> UnsafeError:
    """The error for a file that asks for more than it may, without being trusted.

    Parameters
    ----------
    name : str
        The file.
    reason : str
        What it asks for.

    Examples
    --------
    >>> print(unsafe("a.pt", "It is a program."))
    a.pt: Weights only load failed. It is a program.
    """
    return UnsafeError(f"{name}: Weights only load failed. {reason}")


class SafeResolver:
    """Resolves the globals of one pickle (:class:`holdfast.layout.Resolver`).

    Parameters
    ----------
    adapter : str
        Name of the adapter whose tensors are wanted: ``"torch"`` makes PyTorch's own values, any
        other one makes plain ones in their place.
    safe_globals : iterable
        What else is allowed: classes and functions, each alone, or in a tuple with the
        ``module.name`` that files know it by. What was registered with
        ``torch.serialization.add_safe_globals`` is allowed, too.
    name : str
        The file, for messages.
    map_location : object
        As ``load`` got it; for tensors whose device is not that of a storage.

    Raises
    ------
    TypeError
        From every method, where what the file asks for can only be had with PyTorch.
    UnsafeError
        From every method, where what the file asks for is not allowed.
    FormatError
        From every method, where it is allowed, and its arguments cannot be right.

    Notes
    -----
    Only an ``UnsafeError`` names the file: whoever runs the pickle knows where in it the others
    arose, and for which tensor. What the caller allowed raises whatever it raises.

    Examples
    --------
    >>> resolver = SafeResolver("numpy", name="a.pt")
    >>> resolver.call(resolver.find("builtins", "complex"), (1.0, 2.0))
    (1+2j)
    >>> try:
    ...     resolver.find("builtins", "eval")
    ... except UnsafeError as error:
    ...     print("GLOBAL eval was not an allowed global by default" in str(error))
    True
    """

    __slots__ = ("_allowed", "_making", "_name", "_table")

    def __init__(
        self,
        adapter: str,
        *,
        safe_globals: Iterable[Any] = (),
        name: str,
        map_location: Any = None,
    ) -> None:
        self._table = _table(adapter == "torch")
        self._allowed = Allowed(safe_globals, _ruled(adapter == "torch"))
        self._name = name
        self._making = Making(
            map_location=map_location, call=self.call, trusted=lambda obj: obj in self._allowed
        )

    def find(self, module: str, name: str) -> object:
        """What a pickle means by ``module.name``."""
        key = (module, name)
        names = self._table.names
        if key in names and module not in BLOCKED:
            return names[key]
        if key in _compat_pickle.NAME_MAPPING:
            key = _compat_pickle.NAME_MAPPING[key]
        elif module in _compat_pickle.IMPORT_MAPPING:
            key = (_compat_pickle.IMPORT_MAPPING[module], name)
        full = f"{key[0]}.{key[1]}"
        if key[0] in BLOCKED or module in BLOCKED:
            self._blocked(full, key[0])
        if key in names:
            return names[key]
        found = self._allowed.find(full)
        if found is None:
            self._refuse_global(full)
        home = origin(found[0])
        if home in BLOCKED:
            self._blocked(full, str(home))
        self._allowed.name(found[0])
        return found[0]

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        """What calling `func`, which :meth:`find` returned, makes."""
        rule = self._table.rules.get(id(func))
        if rule is not None and rule.call is not None:
            return self._run(rule.name, rule.call, args, self._making)
        if func not in self._allowed:
            self._refuse(f"Trying to call reduce for unrecognized function {_shown(func)}")
        if func is getattr:
            return self._attribute(args)
        return func(*args)  # type: ignore[operator]

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """An instance of `cls`, which :meth:`find` returned."""
        rule = self._table.rules.get(id(cls))
        if rule is not None and rule.new is not None and not kwargs:
            return self._run(rule.name, rule.new, args, self._making)
        if not (isinstance(cls, type) and cls in self._allowed):
            self._refuse(
                "Can only create new object for nn.Parameter or classes allowlisted via "
                f"`add_safe_globals` but got {_shown(cls)}"
            )
        return cls.__new__(cls, *args, **kwargs)

    def build(self, obj: object, state: object) -> object:
        """`obj` with `state` set; always `obj` itself."""
        manner = self._table.manners.get(type(obj))
        if manner is not None and manner.build is not None:
            kind = type(obj)
            text = f"{kind.__module__}.{kind.__qualname__}"
            self._run(text, manner.build, obj, state, self._making)
        elif type(obj) in self._allowed:
            self._set_state(obj, state)
        else:
            self._refuse(
                "Can only build Tensor, Parameter, OrderedDict or types allowlisted via "
                f"`add_safe_globals`, but got {_shown(type(obj))}"
            )
        return obj

    def extend(self, obj: object, items: list[Any]) -> None:
        """Append `items` to `obj`, which is no list."""
        manner = self._table.manners.get(type(obj))
        if manner is not None and manner.extend is not None:
            self._run(type(obj).__name__, self._making.nest, obj, items)
            self._run(type(obj).__name__, manner.extend, obj, items)
        elif isinstance(obj, list) and type(obj) in self._allowed:
            obj.extend(items)
        else:
            self._refuse(f"Can only append to lists, but got {_shown(type(obj))}")

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None:
        """Set items of `obj`, which is no dict."""
        manner = self._table.manners.get(type(obj))
        if manner is not None and manner.update is not None:
            self._run(type(obj).__name__, self._making.nest, obj, [pair[1] for pair in pairs])
            self._run(type(obj).__name__, manner.update, obj, pairs)
        elif isinstance(obj, dict) and type(obj) in self._allowed:
            for key, value in pairs:
                obj[key] = value
        else:
            self._refuse(
                "Can only SETITEM for dict, collections.OrderedDict, collections.Counter, "
                f"but got {_shown(type(obj))}"
            )

    # -- inside --------------------------------------------------------------------------------

    def _attribute(self, args: tuple[Any, ...]) -> object:
        """``getattr(owner, name)``, as classes and methods in a class are pickled.

        Both have to be what the caller allowed, or instances of it: from anything else a few
        attributes lead to everything.
        """
        if len(args) != 2 or type(args[1]) is not str:
            raise FormatError("builtins.getattr: expected an object and the name of an attribute")
        owner, name = args
        kind = owner if isinstance(owner, type) else type(owner)
        full = f"{full_name(kind)}.{name}"
        if is_dunder(name) or not (owner in self._allowed or type(owner) in self._allowed):
            self._refuse(f"Trying to get the attribute {_text(full)}")
        try:
            found = getattr(owner, name)
        except AttributeError:
            raise FormatError(f"builtins.getattr: there is no {_text(full)}") from None
        if origin(found) in BLOCKED:
            self._blocked(full, str(origin(found)))
        if found not in self._allowed and type(found) not in self._allowed:
            self._refuse_global(full)
        return found

    def _set_state(self, obj: Any, state: Any) -> None:
        """What pickle does with a state, but for names to which Python gives a meaning."""
        if hasattr(obj, "__setstate__"):
            obj.__setstate__(state)
            return
        parts = state if type(state) is tuple and len(state) == 2 else (state, None)
        for part in parts:
            if not part:
                continue
            if type(part) is not dict:
                raise FormatError(
                    f"the state of a {_shown(type(obj))} is a "
                    f"{type(part).__name__}, expected a dict"
                )
            for key in part:
                if type(key) is not str or is_dunder(key):
                    self._refuse(f"Attribute {_short(key)} of a {_shown(type(obj))} would be set")
        if parts[0]:
            obj.__dict__.update(parts[0])
        for key, value in (parts[1] or {}).items():
            setattr(obj, key, value)

    def _run(self, what: str, func: Callable[..., Any], *given: Any) -> Any:
        """Call a rule, with whatever it raises as an error of this file."""
        try:
            return func(*given)
        except FormatError:
            raise
        except UnsafeRequestError as error:
            self._refuse(f"{what}: {error}")
        except LackingError as error:
            raise TypeError(str(error)) from None
        except _WRONG as error:
            text = str(error).partition("\n")[0]
            raise FormatError(f"{what}: {text}") from None

    def _refuse(self, reason: str) -> NoReturn:
        raise unsafe(
            self._name,
            f"{reason}. Pass weights_only=False only if you trust the source of the file: it then "
            "runs whatever code the file names.",
        )

    def _blocked(self, full: str, module: str) -> NoReturn:
        full, module = _text(full), _text(module)
        self._refuse(f"Trying to load unsupported GLOBAL {full} whose module {module} is blocked")

    def _refuse_global(self, full: str) -> NoReturn:
        if full in _UNTIL_IMPORTED and "torch" in sys.modules:
            raise unsafe(self._name, _UNTIL_IMPORTED[full])
        shown = _text(full).removeprefix("builtins.") or full
        ways = f"Pass safe_globals=[{shown}] if you trust this class/function"
        if sys.modules.get("torch") is not None:
            ways = (
                f"Please use `torch.serialization.add_safe_globals([{shown}])` or the "
                f"`torch.serialization.safe_globals([{shown}])` context manager to allowlist this "
                f"global if you trust this class/function, or pass safe_globals=[{shown}]"
            )
        raise unsafe(
            self._name,
            "This file can still be loaded, to do so you have two options, do those steps only if "
            "you trust the source of the checkpoint: pass weights_only=False, and whatever code "
            f"the file names is run; or allow what it names. Unsupported global: GLOBAL {shown} "
            f"was not an allowed global by default. {ways}.",
        )


class StandIn:
    """A function that a resolver allows, for an unpickler, which calls what it finds itself."""

    __slots__ = ("_resolver", "_rule")

    def __init__(self, resolver: SafeResolver, rule: Rule) -> None:
        self._resolver = resolver
        self._rule = rule

    @staticmethod
    def of(resolver: SafeResolver, module: str, name: str) -> Any:
        """What `resolver` finds, as an unpickler can use it."""
        found = resolver.find(module, name)
        return StandIn(resolver, found) if isinstance(found, Rule) else found

    def __call__(self, *args: Any) -> Any:
        """What the resolver makes of `args`; its errors name the file."""
        # One may be an argument of another, as the class of a tensor is.
        rules = tuple(arg._rule if isinstance(arg, StandIn) else arg for arg in args)
        try:
            return self._resolver.call(self._rule, rules)
        except UnsafeError:
            raise
        except (FormatError, TypeError) as error:
            raise type(error)(f"{self._resolver._name}: {error}") from error


@cache
def _table(torch: bool) -> Table:
    """Everything that is allowed by default; the caller's own comes after it."""
    made = Table()
    made.join(_safe_python.table())
    made.join(_numpy_globals.table())
    if torch:
        from .adapters import _torch_globals

        made.join(_torch_globals.table())
    else:
        made.join(_stand_ins.table())
    assert not {module for module, _ in made.names} & BLOCKED
    return made


@cache
def _ruled(torch: bool) -> frozenset[int]:
    """The ``id`` of all that is allowed by default, which the table keeps."""
    return frozenset(id(value) for value in _table(torch).names.values())


def _shown(obj: object) -> str:
    """What something is called in a message; never what it says of itself."""
    if isinstance(obj, Rule):
        return obj.name
    if isinstance(obj, type):
        return _text(full_name(obj))
    if isinstance(obj, BuiltinFunctionType | FunctionType):
        return _text(f"{origin(obj)}.{obj.__qualname__}")
    if isinstance(obj, MethodType):
        return f"a method of {_shown(obj.__self__)}, {_shown(obj.__func__)}"
    return f"a {type(obj).__name__}"


def _text(value: str) -> str:
    """Text of a file, fit for a message."""
    shown = value if len(value) <= 120 else f"{value[:117]}..."
    return shown if shown.isprintable() else ascii(shown)[1:-1]


def _short(value: object) -> str:
    return repr(value[:80]) if type(value) is str else f"of type {type(value).__name__}"
