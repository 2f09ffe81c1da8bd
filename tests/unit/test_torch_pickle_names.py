"""Objects as torch.save pickles them: names, the older containers, and the quick way."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import pickle_files as files
from holdfast.dtypes import BY_NAME
from holdfast.errors import FormatError
from holdfast.formats._torch_pickle import Pickled, read_object
from patience import within
from pickle_files import (
    FALSE,
    NONE,
    ORDERED,
    TRUE,
    Book,
    call,
    items,
    number,
    pairs,
    parameter,
    read,
    replay,
    simple,
    text,
)

# -- names ---------------------------------------------------------------------------------------


def module(**parts: dict[str, bytes] | bytes) -> bytes:
    state = {"_parameters": pairs({}), "_buffers": pairs({}), "_modules": pairs({})}
    for key, value in parts.items():
        state[key] = pairs(value) if isinstance(value, dict) else value
    return files.name("mine", "Module") + b")\x81" + pairs(state) + b"b"


def test_modules_have_the_names_of_their_state_dict() -> None:
    hidden = call("__builtin__", "set", b"]" + text("cache") + b"a")
    inner = module(
        _parameters={"w": parameter(simple("1")) + b"q\x01", "none": NONE},
        _buffers={"mean": simple("2"), "cache": simple("3")},
        _non_persistent_buffers_set=hidden,
        _flat=b"](h\x01e",
        note=simple("4"),
    )
    body = module(extra=parameter(simple("0")), _modules={"a": inner + b"q\x02", "b": b"h\x02"})
    found = read(pairs({"model": body, "x": simple("5")}))
    paths = dict(found.structure.paths())
    assert list(paths) == ["model.a.w", "model.a.mean", "model.b.w", "model.b.mean", "x"]
    names = found.names.tolist()
    assert [names[i] for i in paths.values()] == [
        "model.a.w", "model.a.mean", "model.a.w", "model.a.mean", "x",
    ]  # fmt: skip
    assert set(names) - set(paths) == {"model.a.cache", "model.a.note", "model.extra"}
    assert found.names.find("model.b.w") == -1 and paths["model.b.w"] == paths["model.a.w"]


def test_what_is_long_and_stands_once_is_walked_whatever_it_belongs_to() -> None:
    """A state that is no dict, and arguments: of one object each, with 20,000 members."""
    state = b"](" + simple("0") + b"N" * 20_000 + b"e"
    args = b"(" + simple("1") + b"N" * 20_000 + b"t"
    body = {
        "a": files.name("mine", "Class") + b")\x81" + state + b"b",
        "b": files.name("mine", "Class") + args + b"R",
    }
    assert read(pairs(body)).names.tolist() == ["a.state.0", "b.0"]


def test_names_are_unique_and_plain() -> None:
    keys = {
        "a.b": simple("0"),
        "a": pairs({"b": simple("1")}),
        "": simple("2"),
        "\ud800": simple("3"),
    }
    more = [number(3), TRUE, NONE, items(number(1), text("x"))]
    body = b"".join(key + simple(str(4 + i)) for i, key in enumerate(more))
    found = read(pairs(keys)[:-1] + body + b"u")
    assert found.names.tolist() == ["a.b", "a.b#2", "tensor", "\ufffd", "3", "true", "null",
                                    '[1, "x"]']  # fmt: skip
    assert read(simple()).names.tolist() == ["tensor"]
    assert read(simple("0") + b"0" + simple("1")).names.tolist() == ["#0", "tensor"]


def test_names_of_hostile_objects_take_bounded_time_and_memory() -> None:
    loop = b"]q\x00h\x00a" + simple() + b"a"
    assert read(loop).names.tolist() == ["1"]
    laughs = (
        simple()
        + b"q\x00"
        + b"".join(
            b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(80)
        )
    )
    found = read(laughs)
    assert found.names.tolist() == [".".join(["0"] * 80)]
    assert len(found.structure.paths()) < 20_000
    deep = b"]" * 5000 + simple() + b"a" * 5000
    assert read(deep).names.tolist() == ["#0"]
    long = (
        text("k" * 60_000)
        + b"q\x00"
        + b"0"
        + b"}("
        + b"".join(
            b"h\x00" + number(0) + b"0" + pairs({str(i): simple(str(i), ())}) for i in range(1)
        )
        + b"u"
    )
    assert read(long).names.tolist() == ["k" * 60_000 + ".0"]
    key = items(number(1), items(text('"' * 500_000))) + b"q\x00"
    many = read(b"](" + key + b"0" + b"}h\x00Ns" * 5000 + b"}h\x00" + simple() + b"s" + b"e")
    with within(3):
        assert many.names.tolist() == ["5000." + r'[1, ["' + r"\"" * 97]


# -- the older containers ------------------------------------------------------------------------


def legacy(key: bytes, numel: int, view: bytes = NONE) -> bytes:
    kind = files.name("torch", "FloatStorage")
    return items(text("storage"), kind, key, text("cpu"), number(numel), view) + b"Q"


def test_the_legacy_stream_has_views_and_modules() -> None:
    view = items(text("v"), number(2), number(3))
    body = items(
        files.tensor(legacy(text("k"), 10), 0, (10,), (1,)),
        files.tensor(legacy(text("k"), 10, view), 1, (2,), (1,)),
        items(text("module"), files.name("mine", "Net"), text("net.py"), text("class Net"))
        + b"Q)\x81",
    )
    found, book = read(body, legacy=True), Book()
    assert found.entries["offset"].tolist() == [0, 12] and found.storage.tolist() == [0, 0]
    assert replay(found, book) == ("T0", "T1", ("new", "mine.Net", (), {}))
    for wrong, why in (
        (items(text("v"), number(2), number(9)), "elements 2 to 11"),
        (items(text("v"), number(2)), "expected three items"),
        (items(text("v"), number(-1), number(2)), "offset of a view"),
    ):
        with pytest.raises(FormatError, match=why):
            read(legacy(text("k"), 10, wrong), legacy=True)
    other = items(text("v"), number(1), number(3))
    with pytest.raises(FormatError, match="'v' was named before with another extent"):
        read(legacy(text("k"), 10, view) + legacy(text("k"), 10, other) + b"\x86", legacy=True)
    with pytest.raises(FormatError, match="elements 1 to 3 of a storage of 3"):
        read(files.tensor(legacy(text("k"), 10, view), 1, (3,), (1,)), legacy=True)
    alone = read(legacy(text("k"), 10, view), legacy=True)
    given: list[object] = []
    alone.structure.replay([], lambda *what: given.append(what), Book())
    assert given == [(0, BY_NAME["float32"].code, (2, 3))]


def test_the_tar_names_tensors_by_number() -> None:
    inner = number(7) + b"Q"
    param = files.name("torch.nn.parameter", "Parameter") + b")\x81"
    param += items(number(8) + b"Q", NONE, ORDERED, TRUE, FALSE) + b"b"
    body = pairs({"a": inner, "p": param, "s": number(9) + b"Q"})
    found = read(body, tensors={7: 0, 8: 1}, storages={9: (0, 10)})
    assert dict(found.structure.paths()) == {"a": 0, "p": 1} and found.kinds == {1: "parameter"}
    assert replay(found) == {"a": "T0", "p": "T1", "s": ("storage", 0, 10)}
    with pytest.raises(FormatError, match="a persistent id 3 that names nothing"):
        read(number(3) + b"Q", tensors={})


# -- the quick way -------------------------------------------------------------------------------


def written(count: int, *, tail: bytes = b"") -> bytes:
    """A dict of tensors with every item put into the memo, as pickle does."""
    body, at = b"}(", 5
    first = [
        files.name("torch._utils", "_rebuild_tensor_v2") + b"q\x00",
        files.name("torch", "FloatStorage") + b"q\x01",
        text("storage") + b"q\x02",
        text("cpu") + b"q\x03",
        files.name("collections", "OrderedDict") + b"q\x04",
    ]
    for i in range(count):
        rebuild, kind, word, cpu, ordered = first
        first = [b"h" + bytes([j]) for j in range(5)]
        puts = [b"r" + (at + j).to_bytes(4, "little") for j in range(7)]
        at += 7
        body += text(f"t{i}") + rebuild + b"((" + word + kind + text(str(i)) + puts[0] + cpu
        body += b"K\x06t" + puts[1] + b"QK\x00K\x02K\x03\x86" + puts[2] + b"K\x03K\x01\x86"
        body += puts[3] + b"\x89" + ordered + b")R" + puts[4] + b"t" + puts[5] + b"R" + puts[6]
    return body + tail + b"u"


def same(one: Pickled, other: Pickled) -> None:
    for field in ("keys", "locations", "kinds", "dense", "globals"):
        assert getattr(one, field) == getattr(other, field)
    for field in ("entries", "dims", "strides", "storage", "storages"):
        assert np.array_equal(getattr(one, field), getattr(other, field))
    assert one.names.tolist() == other.names.tolist()
    assert one.structure.paths() == other.structure.paths()


def test_tensors_written_as_usual_are_taken_in_one_step() -> None:
    plain = read(pairs({f"t{i}": simple(str(i)) for i in range(50)}))
    quick = read(written(50))
    assert len(quick.structure._passages) == 3 * 49 and len(plain.structure._passages) == 0
    same(quick, plain)
    book = Book()
    assert replay(quick, book) == replay(plain) == {f"t{i}": f"T{i}" for i in range(50)}
    assert not book.asked


@pytest.mark.parametrize("place", range(12, 19))
def test_what_was_passed_over_can_be_asked_for(place: int) -> None:
    """All but the tensor itself: a key, the tuples, the hooks and the arguments."""
    tail = text("x") + b"h" + bytes([place])
    found = read(written(3, tail=tail))
    assert len(found.structure._passages) == (6 if place == 18 else 0)
    made = replay(found)
    expected: dict[int, Any] = {12: "1", 14: (2, 3), 15: (3, 1), 16: OrderedDict(), 18: "T1"}
    if place in expected:
        assert made["x"] == expected[place]
    assert {key: made[key] for key in ("t0", "t1", "t2")} == {"t0": "T0", "t1": "T1", "t2": "T2"}


def test_a_count_of_the_memo_sees_what_was_passed_over() -> None:
    tail = text("x") + NONE + text("y") + b"\x94" + b"0" + text("y") + b"h\x1a"
    found = read(written(3, tail=tail))
    assert replay(found)["y"] == "y" and len(found.structure._passages) == 0


def test_the_usual_bytes_with_wrong_numbers_are_refused_as_well() -> None:
    good = written(2)
    for old, new in (
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86"),
        (b"K\x03K\x01\x86", b"K\x03K\x01\x87"),
        (b"QK\x00", b"QK\x01"),
        (text("1"), text("0").replace(b"0", b"/")),
        (b"K\x06t", b"K\x05t"),
        (b"QK\x00", b"QJ\xff\xff\xff\xff"),
    ):
        assert old in good
        with pytest.raises(FormatError):
            read(good.replace(old, new))
    for i in range(len(good)):
        with pytest.raises(FormatError):
            read_object(files.PROTO + good[:i], name="m.pt")
