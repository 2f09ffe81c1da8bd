"""What a pickle of a stranger may name, call and change: SafeResolver, without a file."""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import datetime
import os
import pathlib
import pickle
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

import holdfast.safe
from holdfast.errors import FormatError, UnsafeError
from holdfast.safe import SafeResolver
from slow_machine import replay

UTC = datetime.timezone.utc
PLAIN = [
    np.float64(1.5),
    np.float32(-0.0),
    np.int64(7),
    np.uint8(255),
    np.bool_(True),
    np.complex64(1 + 2j),
    np.datetime64("2020-01-01T00:00:01", "s"),
    np.timedelta64(3, "25us"),
    np.str_("abc"),
    np.bytes_(b"ab"),
    np.longdouble(1) / 3,
    np.dtype("f4"),
    np.dtype(">i2"),
    np.dtype("U7"),
    np.dtype("M8[ns]"),
    np.dtype("O"),
    np.dtype([("a", "i4"), ("b", ">f8", (2,))]),
    np.dtype({"names": ["x", "y"], "formats": ["i1", "f8"], "titles": ["X", None]}, align=True),
    np.dtype([("outer", [("inner", "f4"), ("other", "S3")])]),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(3, dtype=">f4"),
    np.zeros((0, 3), np.float32),
    np.array(5),
    np.array(["a", None, 3, {"b": [1]}], dtype=object),
    np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    np.array([b"ab", b"c"]),
    np.array(["2020", "2021"], "M8[Y]"),
    np.array([True, False]),
    pathlib.PurePosixPath("/a/b"),
    pathlib.PureWindowsPath("c:/x"),
    pathlib.Path("runs/1"),
    datetime.datetime(2024, 2, 29, 23, 59, 58, 123456),
    datetime.datetime(2024, 2, 29, 1, fold=1, tzinfo=UTC),
    datetime.date(1, 1, 1),
    datetime.time(1, 2, 3, 4),
    datetime.time(1, fold=1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "X")),
    datetime.timedelta(-1, 2, 3),
    argparse.Namespace(lr=0.1, layers=[1, 2], nested=argparse.Namespace(x=None)),
    types.SimpleNamespace(a=1),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {1: 2}),
    collections.defaultdict(collections.Counter),
    collections.deque([1, 2, 3], maxlen=2),
    collections.deque("ab"),
    collections.Counter("abca"),
    collections.OrderedDict(b=1, a=2),
    {1, "a", (2, 3)},
    frozenset([1, 2]),
    bytearray(b"\x00\xff"),
    b"",
    b"\x80abc",
    complex(1, -0.0),
    slice(1, None, 2),
    range(3, 9, 2),
    Ellipsis,
    NotImplemented,
    {"dtype": np.float32, "kind": float, "any": [int, str, list, dict, tuple, bool]},
    np.dtypes.Float64DType if hasattr(np, "dtypes") else np.dtype,
    np.random.RandomState(0).get_state(),
]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and bool((left == right).all())
            and left.flags.f_contiguous == right.flags.f_contiguous
        )
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("obj", PLAIN, ids=lambda obj: f"{type(obj).__name__}")
def test_what_resumes_need_loads_without_asking(obj: Any, protocol: int) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    data = pickle.dumps([obj, obj], protocol)
    found = replay(data, resolver)
    assert type(found[0]) is type(obj) and same(found[0], pickle.loads(data)[0])
    if type(obj) not in (bytes, complex):  # which Python does not keep apart
        assert found[0] is found[1] or not isinstance(obj, np.ndarray)
    if isinstance(obj, collections.deque):
        assert found[0].maxlen == obj.maxlen
    if isinstance(obj, collections.defaultdict):
        assert found[0].default_factory is obj.default_factory


def test_states_of_ordered_dicts() -> None:
    obj = collections.OrderedDict(a=1)
    obj._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    found = replay(pickle.dumps(obj, 2), SafeResolver("numpy", name="a.pt"))
    assert found == obj and found._metadata == obj._metadata  # type: ignore[attr-defined]


def test_names_of_older_programs() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    for module, name, wanted in [
        ("__builtin__", "set", set),
        ("__builtin__", "xrange", range),
        ("__builtin__", "long", int),
        ("__builtin__", "unicode", str),
        ("pathlib._local", "PurePosixPath", pathlib.PurePosixPath),
        ("numpy", "bool_", np.bool_),
    ]:
        assert resolver.find(module, name) is wanted
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt\x8c\x01bt\x52"
    assert type(replay(b"\x80\x02" + array + b".", resolver)) is np.ndarray


def test_a_path_of_the_other_system_is_a_pure_one() -> None:
    name = "PosixPath" if os.name == "nt" else "WindowsPath"
    resolver = SafeResolver("numpy", name="a.pt")
    found = resolver.call(resolver.find("pathlib", name), ("c:/", "x"))
    assert isinstance(found, pathlib.PurePath) and not isinstance(found, pathlib.Path)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("builtins", "open"),
        ("builtins", "type"),
        ("builtins", "object"),
        ("__builtin__", "apply"),
        ("__builtin__", "reduce"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("subprocess", "Popen"),
        ("importlib", "import_module"),
        ("pip", "main"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.matrixlib.defmatrix", "matrix"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections.OrderedDict", "__init__"),
        ("pathlib", "Path.unlink"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.serialization", "load"),
        ("torch.utils.data.datapipes.utils.decoder", "basichandlers"),
        ("decimal", "Decimal"),
        ("zoneinfo", "ZoneInfo._unpickle"),
        ("_codecs", "decode"),
        ("", ""),
        ("builtins", "a\nb\x00" * 1000),
    ],
)
@pytest.mark.parametrize("adapter", ["numpy", "torch"])
def test_names_that_are_refused(adapter: str, module: str, name: str) -> None:
    if adapter == "torch":
        pytest.importorskip("torch")
    resolver = SafeResolver(adapter, name="a.pt")
    before = set(sys.modules)
    with pytest.raises(UnsafeError, match="Weights only load failed") as caught:
        resolver.find(module, name)
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert str(caught.value).startswith("a.pt: ") and len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()
    assert set(sys.modules) == before


def test_a_refusal_says_what_to_pass() -> None:
    with pytest.raises(
        UnsafeError,
        match=r"Unsupported global: GLOBAL fractions\.Fraction was not an allowed global by "
        r"default\..*safe_globals=\[fractions\.Fraction\]",
    ) as caught:
        SafeResolver("numpy", name="a.pt").find("fractions", "Fraction")
    assert "weights_only=False" in str(caught.value)
    with pytest.raises(UnsafeError, match=r"GLOBAL eval was not"):
        SafeResolver("numpy", name="a.pt").find("builtins", "eval")


@pytest.mark.parametrize("module", ["os", "sys", "posix", "nt"])
def test_blocked_modules_stay_blocked(module: str) -> None:
    said = f"Trying to load unsupported GLOBAL {module}.f whose module {module} is blocked"
    resolver = SafeResolver("numpy", safe_globals=[(print, f"{module}.f")], name="a.pt")
    with pytest.raises(UnsafeError, match=said):
        resolver.find(module, "f")
    resolver = SafeResolver("numpy", safe_globals=[(os.system, "mine.system")], name="a.pt")
    with pytest.raises(UnsafeError, match="is blocked"):
        resolver.find("mine", "system")


class Mine:
    """What a caller allows."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class MineWithState(Mine):
    """What a caller allows, and that sets its state by itself."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class MineWithSlots:
    """What a caller allows, without a dict."""

    __slots__ = ("x",)


class MineDict(dict):  # type: ignore[type-arg]
    """A dict that a caller allows."""


class MineList(list):  # type: ignore[type-arg]
    """A list that a caller allows."""


def mine(*args: Any) -> Any:
    """A function that a caller allows."""
    return args


@pytest.mark.parametrize(
    "obj",
    [Mine(1, 2), MineDict(a=1), MineList([1]), MineWithSlots(), datetime.timedelta(1)],
    ids=lambda obj: type(obj).__name__,
)
def test_what_the_caller_allows(obj: Any) -> None:
    if isinstance(obj, MineWithSlots):
        obj.x = [5]
    data = pickle.dumps(obj, 2)
    if type(obj).__module__ == __name__:
        with pytest.raises(UnsafeError, match=f"GLOBAL {__name__}.{type(obj).__name__} was not"):
            replay(data, SafeResolver("numpy", name="a.pt"))
    found = replay(data, SafeResolver("numpy", safe_globals=[type(obj)], name="a.pt"))
    assert type(found) is type(obj)
    assert getattr(found, "x", None) == getattr(obj, "x", None)
    assert getattr(found, "__dict__", None) == getattr(obj, "__dict__", None)
    if isinstance(obj, dict | list):
        assert found == obj


def test_functions_and_other_names_that_the_caller_allows() -> None:
    resolver = SafeResolver("numpy", safe_globals=[mine, (Mine, "old.place.Mine")], name="a.pt")
    assert resolver.call(resolver.find(__name__, "mine"), (1,)) == (1,)
    assert resolver.find("old.place", "Mine") is Mine
    with pytest.raises(UnsafeError):
        resolver.find(__name__, "Mine")
    made = resolver.call(resolver.find("old.place", "Mine"), (3,))
    assert isinstance(made, Mine) and made.args == (3,)
    state = SafeResolver("numpy", safe_globals=[MineWithState], name="a.pt")
    made = state.new(state.find(__name__, "MineWithState"), (), {})
    assert state.build(made, "anything").state == "anything"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "state",
    [
        {"__class__": Mine},
        (None, {"__class__": Mine}),
        (None, {"__dict__": {}}),
        {3: 4},
        ({}, ["x"]),
        "text",
    ],
)
def test_states_that_are_no_attributes(state: Any) -> None:
    resolver = SafeResolver("numpy", safe_globals=[Mine], name="a.pt")
    made = resolver.new(resolver.find(__name__, "Mine"), (), {})
    with pytest.raises(FormatError):
        resolver.build(made, state)
    assert made.__dict__ == {}


@pytest.mark.parametrize(
    ("allowed", "error", "said"),
    [
        ([(Mine,)], ValueError, "tuple of length 2"),
        ([(Mine, 3)], TypeError, "str of callable full path"),
        (["package.Class"], TypeError, "a str is no class or function"),
        ([os], TypeError, "a module is no class"),
    ],
)
def test_lists_that_allow_nothing(allowed: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SafeResolver("numpy", safe_globals=allowed, name="a.pt")


@pytest.mark.parametrize("func", [print, eval, os.system, Mine, len, [].append, 3, "x", None, type])
def test_only_what_was_found_is_called(func: Any) -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    with pytest.raises(UnsafeError, match="Trying to call reduce for unrecognized function"):
        resolver.call(func, ())
    with pytest.raises(UnsafeError, match="Can only create new object"):
        resolver.new(func, (), {})
    with pytest.raises(UnsafeError, match="Can only build"):
        resolver.build(func, {})
    with pytest.raises(UnsafeError, match="Can only append to lists"):
        resolver.extend(func, [1])
    with pytest.raises(UnsafeError, match="Can only SETITEM for dict"):
        resolver.update(func, [(1, 2)])


def test_values_are_not_called() -> None:
    resolver = SafeResolver("numpy", name="a.pt")
    for module, name in [("builtins", "int"), ("builtins", "str"), ("numpy", "float32")]:
        value = resolver.find(module, name)
        with pytest.raises(UnsafeError):
            resolver.call(value, (10**9,))
        with pytest.raises(UnsafeError):
            resolver.new(value, (), {})


def test_the_list_names_no_code() -> None:
    """What stands on the list can be called by its rules alone, or is inert."""
    for torch in (False, True):
        if torch:
            pytest.importorskip("torch")
        table = holdfast.safe._table(torch)
        assert len(table.names) > 100
        code = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
        for key, value in table.names.items():
            assert not isinstance(value, code), key
            assert value is not type and value is not object, key
            assert value not in (builtins.eval, builtins.exec, copyreg._reconstructor), key


def test_what_torch_registers_is_allowed() -> None:
    torch = pytest.importorskip("torch")
    data = pickle.dumps(Mine(1), 2)
    with torch.serialization.safe_globals([Mine]):
        found = replay(data, SafeResolver("torch", name="a.pt"))
        assert isinstance(found, Mine) and found.args == (1,)
        assert isinstance(replay(data, SafeResolver("numpy", name="a.pt")), Mine)
    with pytest.raises(UnsafeError, match=r"torch\.serialization\.add_safe_globals"):
        replay(data, SafeResolver("torch", name="a.pt"))


def test_without_torch_nothing_imports_it() -> None:
    code = """
import sys
sys.modules["torch"] = None
from holdfast.safe import SafeResolver
r = SafeResolver("numpy", name="a.pt")
assert r.call(r.find("torch", "Size"), ((2, 3),)) == (2, 3)
assert r.find("torch", "float32") == "torch.float32"
assert r.call(r.find("torch", "device"), ("cuda", 0)) == "cuda:0"
assert r.call(r.find("torch.serialization", "_get_layout"), ("torch.strided",)) == "torch.strided"
try:
    r.find("torch.nn", "Linear")
except Exception as error:
    assert "safe_globals=[torch.nn.Linear]" in str(error) and "add_safe" not in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
