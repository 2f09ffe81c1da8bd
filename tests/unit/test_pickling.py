"""What is pickled around tensors: exactly what Python's pickler and torch's would write."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import gc
import io
import pathlib
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from holdfast.formats._pickle_emit import Emitter
from holdfast.formats._pickle_reduce import batches
from holdfast.pickling import pickle_object


def emitted(obj: Any) -> bytes:
    """The pickle of an object without tensors."""
    return Emitter(None, frozenset(), None, frozenset(), False).dump(obj)


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.a, self.b) == (other.a, other.b)


class Outer:
    class Inner:
        pass


class Keyword:
    def __new__(cls, *, size: int) -> Any:
        self = object.__new__(cls)
        self.size = size
        return self

    def __getnewargs_ex__(self) -> Any:
        return (), {"size": self.size}


class Items(list):  # type: ignore[type-arg]
    pass


class Setter:
    def __reduce__(self) -> Any:
        return Setter, (), {"a": 1}, None, None, set_state


def set_state(obj: Any, state: Any) -> None:
    obj.state = state


class SelfArgument:
    """Reduces to a call whose arguments lead back to it."""

    def __init__(self, holder: Any = None) -> None:
        self.holder = holder

    def __reduce__(self) -> Any:
        return SelfArgument, (self.holder,)


def cyclic() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    table: dict[str, Any] = {}
    table["self"] = table
    short: tuple[Any, ...] = ([],)
    short[0].append(short)
    long: tuple[Any, ...] = ([], 1, 2, 3)
    long[0].append(long)
    return [ring, table, short, long]


SHARED = ["x"]
OBJECTS = {
    "atoms": [None, True, False, 0, 1.5, -0.0, float("inf"), "", "a", "é\u20ac", "\ud800"],
    "integers": [
        *(0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -1, -(2**31), -(2**31) - 1),
        *(2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, -128, -32768, -(2**39), 2**39),
        *(2**2039 - 1, 2**2039, -(2**2039), -(2**2039) - 1, 10**700, -(10**700)),
    ],
    "shared": [SHARED, SHARED, (SHARED, SHARED), "x", "x"],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "dicts": [{}, {1: 2}, {1: 2, 3: 4}, {(1, 2): {"k": []}}],
    "sets": [set(), {1}, frozenset(), frozenset({2})],
    "bytes": [b"abc", b"\xff\x00", b"abc" * 100, bytearray(), bytearray(b"xy\xff")],
    "numbers": [1j, decimal.Decimal("1.50"), np.float32(3), np.int64(4), np.dtype("f4")],
    "collections": [
        collections.OrderedDict(a=1),
        collections.OrderedDict(),
        collections.defaultdict(list, {1: [2]}),
        collections.deque([1, 2], 5),
        collections.Counter("aab"),
    ],
    "values": [
        pathlib.PurePosixPath("/x"),
        datetime.datetime(2020, 1, 2),
        argparse.Namespace(a=1),
        range(3),
        slice(1, 2),
    ],
    "globals": [int, len, set_state, Outer, Outer.Inner, str.join, collections.OrderedDict],
    "singletons": [type(None), type(NotImplemented), type(...), ..., NotImplemented],
    "classes": [Colour.RED, Colour.RED, Slotted(), Outer.Inner(), Keyword(size=3), Items([1, 2])],
    "state setter": [Setter()],
    "arrays": [np.arange(3), np.array(["a", None], object), np.zeros(2, "M8[s]")],
    "cycles": cyclic(),
    "list of 1": [[1]],
    **{f"list of {n}": list(range(n)) for n in (999, 1000, 1001, 2000, 2001)},
    **{f"dict of {n}": dict.fromkeys(range(n)) for n in (999, 1000, 1001, 2000, 2001)},
    **{
        f"OrderedDict of {n}": collections.OrderedDict.fromkeys(range(n))
        for n in (999, 1000, 1001, 2000, 2001)
    },
    **{f"deque of {n}": collections.deque(range(n)) for n in (1, 2, 1000, 1001)},
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_same_bytes_as_pythons_pickler(name: str) -> None:
    expected = pickle.dumps(OBJECTS[name], protocol=2)
    if name in ("globals", "classes") and sys.version_info >= (3, 12):
        # Its pickler goes another way to classes in classes from some release of these on.
        assert pickle.dumps(pickle.loads(emitted(OBJECTS[name])), protocol=2) == expected
        return
    assert emitted(OBJECTS[name]) == expected


def test_many_numbers_in_the_memo() -> None:
    obj = [[i] for i in range(70_000)]
    obj += obj  # type: ignore[operator]
    assert emitted(obj) == pickle.dumps(obj, protocol=2)


def test_an_object_in_its_own_arguments() -> None:
    holder: list[Any] = []
    obj = SelfArgument(holder)
    holder.append(obj)
    assert emitted(obj) == pickle.dumps(obj, protocol=2)
    assert type(pickle.loads(emitted(obj)).holder[0]) is SelfArgument


def test_no_bytes_are_pickled_with_a_global_that_torch_allows() -> None:
    data = emitted([b"", b""])
    assert pickle.loads(data) == [b"", b""]
    assert b"c_codecs\nencode\n" in data and b"bytes" not in data


def test_attributes_of_an_ordered_dict_are_kept() -> None:
    obj = collections.OrderedDict(a=1)
    obj._metadata = {"v": 2}  # type: ignore[attr-defined]
    back = pickle.loads(emitted(obj))
    assert back == obj and back._metadata == {"v": 2}


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 2500])
def test_batches(n: int) -> None:
    found = list(batches(iter(range(n))))
    assert [item for batch in found for item in batch] == list(range(n))
    assert all(0 < len(batch) <= 1000 for batch in found)


# -- what cannot be pickled ----------------------------------------------------------------------


def bad(reduction: Any) -> Any:
    class Bad:
        def __reduce_ex__(self, protocol: int) -> Any:
            return reduction

    return Bad()


def local() -> Any:
    def function() -> None: ...

    return function


@pytest.mark.parametrize(
    ("obj", "error"),
    [
        (threading.Lock(), TypeError),
        (local(), AttributeError),
        (lambda: 0, pickle.PicklingError),
        ((i for i in range(2)), TypeError),
        (bad(3), pickle.PicklingError),
        (bad((len,)), pickle.PicklingError),
        (bad((len, (), 0, 0, 0, 0, 0)), pickle.PicklingError),
        (bad((len, [])), pickle.PicklingError),
        (bad((3, ())), pickle.PicklingError),
        (bad((dict, (), None, None, [1])), pickle.PicklingError),
        (bad("no.such.name"), pickle.PicklingError),
    ],
)
def test_the_path_of_what_cannot_be_pickled(obj: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^\$\['a'\]\[1\]\['b'\]: "):
        pickle_object({"a": [0, {"b": obj}], "c": 1})


def test_errors_of_ones_own_are_left_alone() -> None:
    class OwnError(Exception):
        pass

    class Raises:
        def __reduce__(self) -> Any:
            raise OwnError("mine")

    with pytest.raises(OwnError, match="^mine$"):
        pickle_object([Raises()])


def test_a_name_that_now_means_something_else() -> None:
    class Fake:
        pass

    Fake.__qualname__ = "Colour"
    with pytest.raises(pickle.PicklingError, match="it's not the same object as"):
        emitted(Fake)


def test_too_deep() -> None:
    obj: Any = []
    for _ in range(200_000):
        obj = [obj]
    with pytest.raises(RecursionError):
        pickle_object(obj)
    while obj:  # taking it apart level by level: freeing it whole would be as deep
        obj = obj.pop()


class Grows:
    def __init__(self, holder: Any) -> None:
        self.holder = holder

    def __reduce__(self) -> Any:
        if isinstance(self.holder, dict):
            self.holder[len(self.holder)] = 0
        else:
            self.holder.append(0)
        return Grows, ((),)


@pytest.mark.parametrize("holder", [{}, []])
def test_what_changes_while_it_is_pickled(holder: Any) -> None:
    grows = Grows(holder)
    if isinstance(holder, dict):
        holder.update({"a": grows, "b": 1})
    else:
        holder.extend([grows, 1])
    with pytest.raises(RuntimeError, match="changed size"):
        pickle_object(holder)


def test_nothing_leaks() -> None:
    thing = object()
    before = sys.getrefcount(thing)
    for _ in range(20):
        with pytest.raises(TypeError):
            pickle_object([Slotted(), (threading.Lock(), thing)])
    holder = [thing] * 3  # cannot be pickled either: a bare object can
    pickle_object(holder)
    del holder
    gc.collect()  # of frames that an error has kept
    assert sys.getrefcount(thing) == before


# -- arrays --------------------------------------------------------------------------------------


def test_arrays_are_storages() -> None:
    base = np.arange(6, dtype=np.int16)
    obj = {"a": base, "again": base, "view": base[:], "part": base[2:], "none": np.zeros((0, 3))}
    found = pickle_object(obj)
    assert found.framework == "numpy"
    assert found.keys == ["0", "1", "2"]
    assert [view.nbytes for view in (found.batch[i] for i in range(3))] == [12, 8, 0]
    assert b"ctorch\nShortStorage\n" in found.data and b"numpy" not in found.data


def test_two_empty_arrays_are_two() -> None:
    found = pickle_object([np.zeros(0), np.zeros(0)])
    assert found.keys == ["0", "1"]


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">c16"])
def test_foreign_byte_orders_are_described(dtype: str) -> None:
    found = pickle_object(np.arange(3).astype(dtype))
    assert found.framework == "numpy" and found.batch[0].swapped


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([None], object),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, np.longdouble),
        np.ma.masked_array([1, 2], [True, False]),
        np.array([(1, 2)], [("a", "i1"), ("b", "i1")]).view(np.recarray),
    ],
)
def test_arrays_that_torch_has_no_dtype_for(array: Any) -> None:
    found = pickle_object([array])
    assert found.framework is None and not found.keys
    back = pickle.loads(found.data)[0]
    assert type(back) is type(array) and back.dtype == array.dtype
    assert back.tolist() == array.tolist()


def test_memory_maps_are_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3,))
    assert pickle_object(mapped).keys == ["0"]


def test_arrays_that_a_class_holds_are_its_own() -> None:
    state = np.random.RandomState(3)
    found = pickle_object({"rng": state, "w": np.zeros(2)})
    assert found.keys == ["0"] and b"randomstate_ctor" in found.data
    # What a mapping or a list of a class of its own holds is the user's.
    assert pickle_object(collections.defaultdict(list, {"a": np.zeros(2)})).keys == ["0"]


def test_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, pickle
from holdfast.pickling import pickle_object
found = pickle_object({"w": np.ones((2, 3)), "n": [1, {"x"}], "s": np.float64(2)})
assert found.framework == "numpy" and found.keys == ["0"]
other = pickle_object({"w": np.ones(2), "k": 1}, protocol=4)
assert other.framework is None and pickle.loads(other.data)["k"] == 1
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_another_pickler() -> None:
    class Module:
        class Pickler(pickle.Pickler):
            def reducer_override(self, obj: Any) -> Any:
                return (str, ("seen",)) if isinstance(obj, Outer.Inner) else NotImplemented

    found = pickle_object([Outer.Inner(), np.arange(2)], pickle_module=Module)
    back = pickle.loads(found.data)
    assert back[0] == "seen" and back[1].tolist() == [0, 1]
    assert pickle_object(1, pickle_module=pickle).data == pickle.dumps(1, protocol=2)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols(protocol: int) -> None:
    found = pickle_object({"a": (1, "b")}, protocol=protocol)
    assert found.data == pickle.dumps({"a": (1, "b")}, protocol=protocol)


def test_pickle_is_read_by_the_standard_library() -> None:
    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return pid

        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("torch"):
                return lambda *args: (name, args)
            return super().find_class(module, name)

    found = pickle_object({"w": np.ones((2, 3), np.float32)})
    name, args = Reader(io.BytesIO(found.data)).load()["w"]
    assert name == "_rebuild_tensor_v2"
    assert args[0][2:] == ("0", "cpu", 6) and args[1:5] == (0, (2, 3), (3, 1), False)


def test_an_unknown_framework() -> None:
    with pytest.raises(ValueError, match="framework='numpy'"):
        pickle_object(1, framework="numpy")


def test_collections_go_on_afterwards() -> None:
    assert gc.isenabled()
    with pytest.raises(TypeError):
        pickle_object(threading.Lock())
    assert gc.isenabled()
    gc.disable()
    try:
        pickle_object(1)
        assert not gc.isenabled()
    finally:
        gc.enable()
