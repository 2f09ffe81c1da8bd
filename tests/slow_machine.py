"""A pickle machine over a Resolver, in Python: slow, plain, and another one than the library's.

It is what Python's own unpickler does, with every decision about the file given to the resolver.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

__all__ = ["replay"]


class _Machine(pickle._Unpickler):  # type: ignore[name-defined,misc]
    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, data: bytes, resolver: Any, **options: Any) -> None:
        super().__init__(io.BytesIO(data), **options)
        self.resolver = resolver
        self.calls = 0

    def find_class(self, module: str, name: str) -> Any:
        return self.resolver.find(module, name)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension {code}")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        func = self.stack.pop()
        self.append(self._made(func, args))

    def _made(self, func: Any, args: Any) -> Any:
        if type(args) is not tuple:
            raise pickle.UnpicklingError("arguments that are no tuple")
        if func == "_reconstructor":
            return self.resolver.new(args[0], (), {})
        return self.resolver.call(func, args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.append(self.resolver.new(self.stack.pop(), args, {}))

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.append(self.resolver.new(self.stack.pop(), args, kwargs))

    def load_obj(self) -> None:
        args = self.pop_mark()
        self.append(self._made(args[0], tuple(args[1:])))

    def load_inst(self) -> None:
        module = self.readline()[:-1].decode("ascii")
        name = self.readline()[:-1].decode("ascii")
        args = tuple(self.pop_mark())
        self.append(self._made(self.find_class(module, name), args))

    def load_global(self) -> None:
        module = self.readline()[:-1].decode("utf-8")
        name = self.readline()[:-1].decode("utf-8")
        if (module, name) in (("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")):
            self.append("_reconstructor")
        elif (module, name) in (("__builtin__", "object"), ("builtins", "object")):
            self.append(None)
        else:
            self.append(self.find_class(module, name))

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1] = self.resolver.build(self.stack[-1], state)

    def load_append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    load_additems = load_appends

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        else:
            self.resolver.extend(self.stack[-1], items)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._update([(self.stack.pop(), value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._update(list(zip(items[::2], items[1::2], strict=True)))

    def _update(self, pairs: list[tuple[Any, Any]]) -> None:
        if type(self.stack[-1]) is dict:
            for key, value in pairs:
                self.stack[-1][key] = value
        else:
            self.resolver.update(self.stack[-1], pairs)

    for _opcode, _method in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.OBJ, load_obj),
        (pickle.INST, load_inst),
        (pickle.GLOBAL, load_global),
        (pickle.BUILD, load_build),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.ADDITEMS, load_additems),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
    ):
        dispatch[_opcode[0]] = _method


def replay(data: bytes, resolver: Any, **options: Any) -> Any:
    """The object of a pickle, with `resolver` asked for every global and call."""
    return _Machine(data, resolver, **options).load()
