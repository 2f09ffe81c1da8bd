"""What persistent ids and the strings of Python 2 stand for, beside plain tensors."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import legacy_files
import pickle_files as files
from holdfast.dtypes import BY_NAME
from holdfast.errors import FormatError, UnsafeError
from holdfast.formats._inert import Storage
from holdfast.formats._torch_pickle import read_object
from holdfast.layout import Persistent
from holdfast.pickled import Trust
from pickle_files import (
    FALSE,
    NONE,
    ORDERED,
    PROTO,
    STOP,
    TRUE,
    Book,
    items,
    name,
    number,
    numbers,
    pairs,
    read,
    replay,
    storage,
    text,
)

FLOAT = BY_NAME["float32"].code
DOUBLE = BY_NAME["float64"].code


def legacy(key: bytes, numel: int, view: bytes = NONE, kind: str = "FloatStorage") -> bytes:
    parts = text("storage"), name("torch", kind), key, text("cpu"), number(numel), view
    return items(*parts) + b"Q"


def state(place: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return items(place, number(offset), numbers(size), numbers(stride))


# -- what an id stands for -------------------------------------------------------------------------


def test_ids_of_an_archive() -> None:
    kinds = {"0": "FloatStorage", "1": "UntypedStorage", "2": "QInt8Storage"}
    found = read(items(*[storage(kind, key, 4) for key, kind in kinds.items()])).structure
    at = found.persistent
    assert at(("storage", "FloatStorage", "0", "cpu", 4)) == Persistent(-1, 0, FLOAT)
    assert at(("storage", "UntypedStorage", b"1", "cpu", 4)) == Persistent(-1, 1, -1)
    assert at(("storage", "QInt8Storage", "2", "cpu", 4)) == Persistent(-1, 2, -2)
    for wrong in (
        ("storage", "FloatStorage", "7", "cpu", 4),
        ("storage", "NoStorage", "0", "cpu", 4),
        ("storage", None, "0", "cpu", 4),
        ("tensor", "FloatStorage", "0", "cpu", 4),
        ("storage", "FloatStorage", "0"),
        ["storage", "FloatStorage", "0", "cpu", 4],
        (),
        0,
        True,
        "0",
    ):
        with pytest.raises(KeyError):
            at(wrong)


def test_ids_of_the_legacy_stream() -> None:
    view = items(text("v"), number(2), number(3))
    found = read(items(legacy(text("k"), 10, view), legacy(text("k"), 10)), legacy=True)
    given: list[Any] = []
    found.structure.replay([], lambda *what: given.append(what), Book())
    assert given == [(0, FLOAT, (2, 3)), (0, FLOAT)]
    pid = ("storage", "FloatStorage", "k", "cpu", 10)
    assert found.structure.persistent((*pid, None)) == Persistent(-1, 0, FLOAT)
    assert found.structure.persistent((*pid, ("v", 2, 3))) == Persistent(-1, 0, FLOAT, (2, 3))
    outline: Any = found.structure.outline(lambda i: i)
    assert [type(part) for part in outline] == [Storage, Storage]


def test_keys_are_text() -> None:
    with pytest.raises(FormatError, match="a storage's key 7 and location"):
        read(legacy(number(7), 10), legacy=True)
    data = legacy_files.stream({"t": legacy_files.tensor(legacy_files.storage(7, 6), (6,))}, {})
    with pytest.raises(FormatError, match="a storage's key 7"):
        holdfast.load(io.BytesIO(data), framework="numpy")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("trust", [Trust(), Trust(weights_only=False)], ids=["safe", "full"])
def test_ids_of_the_tar(trust: Trust) -> None:
    torch = pytest.importorskip("torch")
    values = np.arange(6, dtype="<f4")
    obj = [legacy_files.Persistent(key) for key in (9, 1, 2, 3, 9, 2)]
    data = legacy_files.tar(
        {
            "storages": legacy_files.tar_storages(
                [(1, "cpu", "FloatStorage", values)], [(2, 1, 1, 4), (3, 2, 1, 2)]
            ),
            "tensors": legacy_files.tar_tensors([(9, 3, (2,), (1,), 0)]),
            "pickle": legacy_files.dump(obj),
        }
    )
    tensor, whole, part, inner, again, same = load(data, trust)
    assert again is tensor and same is part
    assert type(part) is torch.storage.TypedStorage
    assert tensor.tolist() == inner.tolist() == [2, 3]
    assert part.tolist() == [1, 2, 3, 4] and whole.tolist() == list(range(6))
    tensor[0] = 7
    assert inner[0] == part[1] == whole[2] == 7


def load(data: bytes, trust: Trust, **more: Any) -> Any:
    from holdfast.loading import LoadOptions, load_file

    return load_file(io.BytesIO(data), LoadOptions(trust=trust, **more))


def test_what_a_tar_does_not_name() -> None:
    torch = pytest.importorskip("torch")
    del torch
    members = legacy_files.tar_members()
    for pid in (4, -1, 1 << 70, ("storage",), (1, 2, 3, 4)):
        data = legacy_files.tar({**members, "pickle": legacy_files.dump([pid, Asked(pid)])})
        for trust in (Trust(), Trust(weights_only=False)):
            with pytest.raises(FormatError):
                load(data, trust)


class Asked(legacy_files.Persistent):
    """A persistent id of any kind."""


@pytest.mark.parametrize(
    "way", ["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_from_type_v2", "state"]
)
def test_a_tar_has_its_tensors_in_a_table(way: str) -> None:
    """Else it would be one of the table that came in place of what the pickle says."""
    place = number(5) + b"Q"
    if way == "state":
        body = name("torch", "FloatTensor") + b")\x81" + state(place, 0, (0,), (1,)) + b"b"
    elif way == "_rebuild_from_type_v2":
        function = name("torch._utils", "_rebuild_tensor_v2")
        inner = items(place, number(0), numbers([0]), numbers([1]), FALSE, ORDERED)
        kind = name("torch", "FloatTensor")
        body = files.call("torch._tensor", way, function, kind, inner, b"}")
    else:
        body = files.tensor(place, 0, (0,), (1,), function=way)
    with pytest.raises(FormatError, match="where all have their place in a table"):
        read(body, tensors={9: 0}, storages={5: (0, FLOAT)})


# -- storages of no elements -----------------------------------------------------------------------


def test_storages_of_no_elements_are_of_any_type() -> None:
    kinds = ["FloatStorage", "DoubleStorage", "UntypedStorage", "QInt8Storage"]
    found = read(items(*[storage(kind, "0", 0) for kind in kinds]))
    assert replay(found) == tuple(("storage", 0, code) for code in (FLOAT, DOUBLE, -1, -2))
    assert found.storages["nbytes"].tolist() == [0]
    tensors = [files.tensor(storage(kind, "0", 0), 0, (0, 3), (3, 1)) for kind in kinds[:2]]
    assert read(items(*tensors)).entries["dtype"].tolist() == [FLOAT, DOUBLE]


@pytest.mark.parametrize("first", [("FloatStorage", 0), ("FloatStorage", 4), ("ByteStorage", 16)])
@pytest.mark.parametrize("second", [("DoubleStorage", 4), ("FloatStorage", 2), ("LongStorage", 1)])
def test_storages_of_elements_are_of_one(first: tuple[str, int], second: tuple[str, int]) -> None:
    """Else a few bytes of a file could be read as more of them."""
    one, other = (storage(kind, "0", numel) for kind, numel in (first, second))
    for body in (items(one, other), items(other, one)):
        with pytest.raises(FormatError, match="'0' was named before with another type or number"):
            read(body)
    empty = files.tensor(storage("DoubleStorage", "0", 0), 0, (1,), (1,))
    with pytest.raises(FormatError, match="of a storage of 0"):
        read(items(storage("FloatStorage", "0", 0), empty))


# -- tensors by call and state ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [("torch", "Tensor"), ("torch._tensor", "Tensor")])
@pytest.mark.parametrize("make", [b")R", b")\x81"])
def test_a_tensor_and_its_state(kind: tuple[str, str], make: bytes) -> None:
    place = storage("FloatStorage", "0", 30)
    body = name(*kind) + make + b"q\x09" + state(place, 2, (2, 3), (9, 3)) + b"b" + b"h\x09\x86"
    found, book = read(body), Book()
    assert found.entries["offset"].tolist() == [8] and found.strides.tolist() == [36, 12]
    assert replay(found, book) == ("T0", "T0") and not book.asked


def test_a_tensor_whose_state_never_comes_is_asked_for() -> None:
    book = Book()
    assert replay(read(name("torch", "Tensor") + b")R"), book) == ("call", "torch.Tensor", ())
    assert replay(read(name("torch", "Tensor") + items(number(3)) + b"R"), book)[2] == (3,)
    with pytest.raises(UnsafeError, match=r"torch\.Tensor"):
        resolved(name("torch", "Tensor") + b")R")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (state(storage("FloatStorage", "0", 4), 2, (3,), (1,)), "elements 2 to 4"),
        (state(storage("FloatStorage", "0", 4), 0, (1 << 40,), (1,)), "elements 0 to"),
        (state(storage("FloatStorage", "0", 4), 0, (2, 2), (1,)), "2 extents and 1 strides"),
        (state(NONE, 0, (1,), (1,)), "whose storage is None"),
        (items(storage("FloatStorage", "0", 4)), "a state of 1 items"),
        (NONE, "None as the state of a tensor"),
    ],
)
def test_states_that_are_none(given: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        read(name("torch", "Tensor") + b")R" + given + b"b")


def test_a_state_comes_once() -> None:
    given = state(storage("FloatStorage", "0", 4), 0, (4,), (1,)) + b"b"
    with pytest.raises(FormatError, match="a state of 4 items for a tensor"):
        read(name("torch", "Tensor") + b")R" + given + given)


def resolved(body: bytes) -> Any:
    from holdfast.safe import SafeResolver

    found = read_object(PROTO + body + STOP, name="a.pt")
    return found.structure.replay([], Storage, SafeResolver("numpy", name="a.pt"))


# -- strings of Python 2 ---------------------------------------------------------------------------


def short(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value


def long(value: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(value)) + value


@pytest.mark.parametrize("write", [short, long])
@pytest.mark.parametrize(
    ("raw", "encoding", "expected"),
    [
        ("ż".encode(), None, "ż"),
        (b"\xff", None, b"\xff"),
        ("ż".encode(), "utf-8", "ż"),
        ("ż".encode(), "latin1", "Å¼"),
        ("ż".encode(), "bytes", "ż".encode()),
        (b"abc", "ascii", "abc"),
    ],
)
def test_strings_of_python_2(
    write: Any, raw: bytes, encoding: str | None, expected: str | bytes
) -> None:
    found = read(b"}" + text("a") + write(raw) + b"s")
    made = found.structure.replay([], Storage, Book(), encoding=encoding)
    assert made == {"a": expected}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "utf-16"])
def test_strings_that_are_not_what_they_are_said_to_be(encoding: str) -> None:
    found = read(b"]" + short(b"\xff\xfe\xff") + b"a")
    with pytest.raises(UnicodeDecodeError, match=r"m\.pt: data\.pkl: offset 3 \(SHORT_BINSTRING\)"):
        found.structure.replay([], Storage, Book(), encoding=encoding)


def test_tensors_are_the_same_whatever_strings_are() -> None:
    """A persistent id of Python 2 is made of such strings, and so are the keys of a dict."""
    place = items(short(b"storage"), name("torch", "FloatStorage"), short(b"0"), short(b"cpu"))
    pid = place[:-1] + number(6) + b"tQ"
    body = b"}" + short(b"w") + files.tensor(pid, 0, (6,), (1,)) + b"s"
    found = read(body)
    assert found.names.tolist() == ["w"]
    for encoding, key in (("bytes", b"w"), ("latin1", "w")):
        made = found.structure.replay(["T0"], Storage, Book(), encoding=encoding)
        assert made == {key: "T0"}


def test_names_that_an_encoding_changes_are_looked_up_as_changed() -> None:
    """What the first run took for harmless is asked of the resolver by what it is in the second."""
    body = short(b"+AG8-s") + short(b"system") + b"\x93" + items(short(b"true")) + b"R"
    found = read(body)
    assert found.globals == ["+AG8-s.system"]
    book = Book()
    found.structure.replay([], Storage, book, encoding="utf-7")
    assert book.asked[0] == ("find", "os", "system")


# -- what is deep ----------------------------------------------------------------------------------


def test_records_of_records_are_freed() -> None:
    code = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from pickle_files import name, read
for step in (b")R", b")\\x81", b"Nb)R"):
    read(name("a", "B") + b")R" + step * 1_000_000)
read(name("a", "B") * 200_000 + b"N" + b"\\x85R" * 200_000)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == 0


ARRAY = (
    name("numpy._core.multiarray", "_reconstruct")
    + name("numpy", "ndarray")
    + numbers([0])
    + b"C\x01b\x87R"
)
OBJECTS = (
    name("numpy", "dtype")
    + items(text("O8"), FALSE, TRUE)
    + b"R"
    + items(number(3), text("|"), NONE, NONE, NONE, number(-1), number(-1), number(63))
    + b"b"
)
HEAD = ARRAY + b"(" + number(1) + numbers([1]) + OBJECTS + FALSE + b"]"
NESTS = {
    "deque": (name("collections", "deque") + b")R", b"a"),
    "defaultdict": (name("collections", "defaultdict") + b")R" + text("a"), b"s"),
    "array": (HEAD, b"atb"),
}
MIXED = [NESTS[kind] for kind in NESTS]


@pytest.mark.parametrize("kind", [*NESTS, "mixed"])
def test_what_python_frees_by_recursion_does_not_nest_deep(kind: str) -> None:
    def nested(levels: int) -> bytes:
        chosen = MIXED if kind == "mixed" else [NESTS[kind]]
        parts = [chosen[i % len(chosen)] for i in range(levels)]
        return b"".join(head for head, _ in parts) + NONE + b"".join(end for _, end in parts[::-1])

    assert resolved(nested(100)) is not None
    with pytest.raises(FormatError, match="more than 200 levels"):
        resolved(nested(250))


def test_levels_that_come_later_count_too() -> None:
    """From the outside in: each is in another before it has anything."""

    def nested(levels: int) -> bytes:
        made = name("collections", "deque") + b"q\x00)Rq\x01"
        for i in range(levels):
            made += b"h\x00)Rr" + struct.pack("<I", i + 2) + b"a"
            made += b"j" + struct.pack("<I", i + 2)
        return made + b"0" * levels

    assert resolved(nested(500)) is not None
    with pytest.raises(FormatError, match="more than 200 levels"):
        resolved(nested(1500))


def test_what_is_wide_is_not_deep() -> None:
    each = b"h\x01)R" + number(1) + b"a"
    wide = name("collections", "deque") + b"q\x01)R(" + each * 5000 + b"e"
    assert len(resolved(wide)) == 5000
    keyed = b"".join(number(i) + b"h\x01)R" for i in range(5000))
    body = name("collections", "deque") + b"q\x010" + name("collections", "defaultdict") + b")R("
    made: Any = resolved(body + keyed + b"u")
    assert len(made) == 5000 and pairs({}) == b"}(u"
