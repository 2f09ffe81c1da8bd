"""The DLPack exchange with a framework that misbehaves, which none that is installed does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from holdfast import _engine
from holdfast.adapters._dlpack import Exchange
from holdfast.dtypes import BY_NAME
from holdfast.views import DENSE, VIEW


class Managed(ctypes.Structure):
    """DLManagedTensorVersioned, as far as the deleter."""


DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = [
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("context", ctypes.c_void_p),
    ("deleter", DELETER),
]
IMPORT = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Managed), ctypes.POINTER(ctypes.c_void_p))
DESCRIBE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Api(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("export", ctypes.c_void_p),
        ("import_", IMPORT),
        ("describe", DESCRIBE),
        ("stream", ctypes.c_void_p),
    ]


def framework(
    import_: Callable[[Any], int] = lambda managed: -1, *, major: int = 1, describes: bool = True
) -> Any:
    """A tensor type whose exchange API describes nothing and makes tensors by `import_`."""
    api = Api(major=major, minor=3, import_=IMPORT(lambda managed, _: import_(managed)))
    if describes:
        api.describe = DESCRIBE(lambda _tensor, _out: -1)
    name = ctypes.c_char_p(b"dlpack_exchange_api")
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    fields = {"keep": (api, name), "is_neg": None, "is_conj": None}
    tensor: Any = type("Tensor", (), fields)
    type.__setattr__(tensor, "requires_grad", property(lambda self: False))
    tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(api), name, None)
    return tensor


def exchange(tensor: Any) -> Exchange:
    return Exchange(tensor, type("Parameter", (tensor,), {}), ())


def rows(n: int) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    buffer = _engine.allocate(4 * n)
    views = np.zeros(n, VIEW)
    views["address"] = np.uint64(buffer.address) + 4 * np.arange(n, dtype=np.uint64)
    views["nbytes"], views["dims"], views["ndim"], views["flags"] = 4, 0, 1, DENSE
    views["dtype"] = BY_NAME["int32"].code
    return views, np.ones(1, np.int64), [buffer]


def test_another_major_version_is_refused() -> None:
    with pytest.raises(ValueError, match="DLPack 2"):
        exchange(framework(major=2))


def test_an_api_without_describe_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks a function"):
        exchange(framework(describes=False))


def test_other_capsules_are_refused() -> None:
    tensor = framework()
    new = ctypes.pythonapi.PyCapsule_New
    tensor.__dlpack_c_exchange_api__ = new(1, b"something_else", None)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        exchange(tensor)


def test_what_cannot_be_described_is_for_the_caller_to_resolve() -> None:
    tensor = framework()
    asked: list[tuple[Any, int]] = []
    given = tensor()
    with pytest.raises(TypeError, match="DLPack cannot describe"):
        exchange(tensor).describe([given], lambda t, i: asked.append((t, i)) or t)
    assert asked == [(given, 0)]


@pytest.mark.parametrize("deletes", [False, True])
@pytest.mark.parametrize("n", [1, 64, 65])
def test_a_tensor_that_is_not_made_gives_its_memory_back(deletes: bool, n: int) -> None:
    start = _engine.live_buffers()
    calls = 0

    def refuse(managed: Any) -> int:
        nonlocal calls
        calls += 1
        if deletes:
            managed.contents.deleter(managed)
        return -1

    api = exchange(framework(refuse))
    views, dims, buffers = rows(n)
    with pytest.raises(BufferError, match="made no tensor"):
        api.wrap(views, dims, buffers, None)
    assert calls == 1
    assert _engine.live_buffers() == start + 1
    buffers.clear()
    assert _engine.live_buffers() == start


def test_rows_that_make_no_sense_are_refused() -> None:
    api = exchange(framework(lambda managed: pytest.fail("was asked for a tensor")))
    for field, value in (
        ("ndim", 65), ("ndim", -1), ("ndim", 2), ("dims", -1), ("dims", 1), ("dtype", -1),
        ("dtype", 99), ("dtype", BY_NAME["float6_e2m3fn"].code),
    ):  # fmt: skip
        views, dims, buffers = rows(3)
        views[field][2] = value
        with pytest.raises(ValueError, match="row 2 of the batch"):
            api.wrap(views, dims, buffers, None)
    with pytest.raises(TypeError):
        api.wrap(*rows(1)[:2], [b"no buffer"], None)
