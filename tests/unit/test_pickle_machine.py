"""The pickle machine: what it reads is what pickle reads, and nothing hostile gets far."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

import pickle_files as files
from holdfast.errors import FormatError
from holdfast.formats._inert import Global, Record, brief, shorten
from holdfast.formats._pickle import Truncated, read_plain
from patience import within


def read(data: bytes) -> Any:
    return read_plain(data, name="m.pt", where="data.pkl")[0]


VALUES = [
    None,
    True,
    False,
    0,
    255,
    256,
    65535,
    65536,
    -1,
    2**31 - 1,
    -(2**31),
    2**31,
    2**63,
    -(2**63) - 1,
    2**2000,
    1.5,
    -0.0,
    float("inf"),
    "",
    "é\ud800",
    "x" * 70000,
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [1, [2, [3]]],
    list(range(3000)),
    {},
    {"a": 1, 2: "b", (1, "c"): None, 1.5: 2, True: 3},
    {str(i): i for i in range(3000)},
]
NEWER = [b"", b"x" * 300, {b"k": 1}]
NEWEST = [{1, "a"}, frozenset({1, (2, 3)}), set(range(3000)), "short", b"y"]


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_values_come_back(protocol: int) -> None:
    values = VALUES + (NEWER if protocol > 2 else []) + (NEWEST if protocol > 3 else [])
    if protocol == 5:
        values = [*values, bytearray(b"z" * 300)]
    for value in values:
        data = pickle.dumps(value, protocol)
        found, end = read_plain(b"ab" + data + b"more", 2, name="m.pt")
        assert found == value and type(found) is type(value)
        assert end == 2 + len(data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_shared_stays_shared(protocol: int) -> None:
    part = [1]
    loop: list[Any] = [part, (part, "text" * 10), "text" * 10]
    loop.append(loop)
    found = read(pickle.dumps(loop, protocol))
    assert found[3] is found and found[1][0] is found[0] and found[1][1] == found[2]


def test_ordered_dicts_and_their_attributes_are_not_plain() -> None:
    with pytest.raises(FormatError, match=r"m.pt: data.pkl: offset 2 \(GLOBAL\): collections"):
        read(pickle.dumps(OrderedDict(a=1), 2))


def test_storage_classes_are_named_and_not_imported() -> None:
    found = read(files.whole(files.name("torch.cuda", "FloatStorage")))
    assert type(found) is Global and found.path == "torch.cuda.FloatStorage"


def test_strings_of_python_2() -> None:
    assert read(b"\x80\x02U\x03abc.") == "abc"
    assert read(b"\x80\x02T\x03\x00\x00\x00\xff\x00\x01.") == b"\xff\x00\x01"


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the pickle has no end"),
    "no stop": (b"\x80\x02N", "the pickle has no end"),
    "two left": (b"\x80\x02NN.", "2 items are left"),
    "mark left": (b"\x80\x02(N.", "items are left"),
    "none left": (b"\x80\x02.", "0 items are left"),
    "protocol 0": (b"\x80\x00N.", "pickle protocol 0"),
    "protocol 6": (b"\x80\x06N.", "pickle protocol 6"),
    "text cut": (b"X\x05\x00\x00\x00abc.", "needs 5 more bytes, 4 are left"),
    "text huge": (b"\x8d" + b"\xff" * 8 + b".", "needs 18446744073709551615 more bytes"),
    "bytes huge": (b"\x8e" + b"\x00" * 7 + b"\x7f.", "more bytes"),
    "bytearray huge": (b"\x96" + b"\x00" * 7 + b"\x7f.", "more bytes"),
    "frame huge": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "more bytes"),
    "long": (b"\x8b\x01\x04\0\0" + b"\x7f" * 1025 + b".", "an integer of 1025 bytes"),
    "long huge": (b"\x8b\xff\xff\xff\x7f.", "an integer of 2147483647 bytes"),
    "long negative": (b"\x8b\xff\xff\xff\xff.", "an integer of 4294967295 bytes"),
    "long line": (b"L" + b"9" * 3000 + b"L\n.", "not a decimal number"),
    "long text": (b"Labc\n.", "not a decimal number"),
    "int text": (b"I1_0\n.", "not a decimal number"),
    "line endless": (b"c" + b"a" * 5000, "no end within 4096 bytes"),
    "line not text": (b"c\xff\n\xff\n.", "not UTF-8"),
    "text not UTF-8": (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
    "memo unset": (b"h\x07.", "memo index 7 was never set"),
    "memo giant": (b"Nr\xff\xff\xff\xff.", "memo index 4294967295 is too large"),
    "memo of nothing": (b"q\x00N.", "nothing is left"),
    "pop of nothing": (b"0.", "nothing is left"),
    "pop below a mark": (b"N(\x85.", "nothing is left"),
    "tuple of nothing": (b"N\x86.", "nothing is left"),
    "no mark": (b"Nt.", "there is no mark"),
    "append to nothing": (b"Na.", "nothing is left"),
    "append to a tuple": (b")Na.", "appends to a tuple"),
    "append to a dict": (b"}Na.", "appends to a dict"),
    "append below a mark": (b"](Na.", "nothing is left"),
    "items of a list": (b"](NNu.", "sets items of a list"),
    "items of a str": (b"X\x01\x00\x00\x00aNNs.", "sets items of 'a'"),
    "items odd": (b"}(Nu.", "a key without a value"),
    "dict odd": (b"(Nd.", "a key without a value"),
    "key unhashable": (b"}]Ns.", "a list cannot be a key"),
    "key in a tuple unhashable": (b"}]\x85Ns.", "a tuple cannot be a key"),
    "members of a list": (b"](N\x90.", "adds members to a list"),
    "persistent": (b"NQ.", "a persistent id"),
    "call": (b"N)R.", "a call of None"),
    "call of text args": (b"NNR.", "arguments that are None"),
    "new": (b"N)\x81.", "an instance of None"),
    "new keywords": (b"N))\x92.", "keyword arguments"),
    "obj": (b"(o.", "a class is missing"),
    "build": (b"NNb.", "a state for None"),
    "stack global": (b"NN\x93.", "a global named by None and None"),
    "global": (b"cos\nsystem\n.", "os.system"),
    **{
        f"opcode {code:#04x}": (bytes([code]) + b"0\n0\n.", "not one that can be read")
        for code in b"PSVFgpi\x82\x83\x84\x97\x98\x99\x00\xff"
    },
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED)
def test_refused(data: bytes, why: str) -> None:
    with pytest.raises(FormatError) as found:
        read(data)
    assert why in str(found.value)
    assert str(found.value).startswith("m.pt: data.pkl: offset ")


def test_an_error_names_offset_and_opcode() -> None:
    with pytest.raises(FormatError, match=r"^m.pt: offset 103 \(TUPLE\): there is no mark$"):
        read_plain(b"xNt.", 1, name="m.pt", base=101)


def test_an_end_too_early_says_how_much_there_must_be() -> None:
    with pytest.raises(Truncated) as found:
        read_plain(b"__X\x40\x00\x00\x00ab", 2, name="m.pt")
    assert found.value.needed == 2 + 5 + 64


def nested(opener: bytes, closer: bytes, depth: int) -> bytes:
    return opener * depth + b"N" + closer * depth + b"."


def tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def laughs() -> bytes:
    return b")q\x00" + b"".join(
        b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )


def same_hash(count: int, after: bytes) -> bytes:
    prime = 2**61 - 1
    return b"".join(files.number(prime * (2**70 + i)) + after for i in range(count))


def again(after: bytes) -> bytes:
    """One long tuple, put on the stack very often by two bytes each time."""
    return b"(" + b"N" * 9999 + b"tq\x000" + after.replace(b"*", b"h\x00N" * 50_000, 1)


BOMBS: dict[str, Callable[[], bytes]] = {
    "deep key": lambda: b"}" + tuples(200_000) + b"Ns.",
    "deep member": lambda: b"\x8f(" + tuples(200_000) + b"\x90.",
    "deep frozen member": lambda: b"(" + tuples(200_000) + b"\x91.",
    "wide key": lambda: b"}" + laughs() + b"Ns.",
    "keys of one hash": lambda: b"}(" + same_hash(100_000, b"N") + b"u.",
    "one key again": lambda: again(b"}(*u."),
    "one member again": lambda: again(b"\x8f(*\x90."),
    "members of one hash": lambda: b"\x8f(" + same_hash(100_000, b"") + b"\x90.",
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_keys_that_would_hang_or_crash(make: Callable[[], bytes]) -> None:
    data = make()
    with within(5), pytest.raises(FormatError, match=r"key of too many|one hash|many members"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        tuples(500_000) + b".",
        nested(b"]", b"a", 300_000),
        b"(" * 300_000 + b"N" + b"l" * 300_000 + b".",
        laughs() + b".",
    ],
    ids=["tuples", "lists", "marks", "laughs"],
)
def test_depth_takes_no_stack(data: bytes) -> None:
    found = read(data)
    assert type(found) in (tuple, list)
    del found


def test_memory_is_in_proportion_to_the_bytes() -> None:
    tracemalloc.start()
    try:
        for data in (
            b"(" * 100_000,
            b"N" + b"r\x00\x00\x01\x00" * 1000,
            b"\x8d" + struct.pack("<Q", 1 << 40) + b"x" * 1000,
            b"N0" * 50_000 + b"\x8b\xff\xff\xff\x0f",
        ):
            with pytest.raises(FormatError):
                read(data)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_collection_is_switched_on_again() -> None:
    import gc

    assert gc.isenabled()
    with pytest.raises(FormatError):
        read(b"t")
    assert gc.isenabled()
    gc.disable()
    try:
        read(b"N.")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_records_hold_what_a_file_says_apart_from_themselves() -> None:
    record = Record(Global("os\n", "system"), (1,), called=True, offset=7)
    assert record.with_state({"__class__": int, "cls": 3}) is record
    assert record.state == {"__class__": int, "cls": 3} and type(record) is Record
    assert repr(record) == "<result of os\\n.system>" and record.cls.name == "system"
    with pytest.raises(AttributeError):
        record.more = 1  # type: ignore[attr-defined]
    chain = None
    for _ in range(300_000):  # taken apart without using up the stack
        chain = Record("cls", ()).with_state(chain)
    del chain


def test_names_from_files_are_fit_for_messages() -> None:
    assert shorten("a\x1b[31m", 60) == "a\\x1b[31m" and len(shorten("a" * 99)) == 60
    assert brief("a" * 99) == repr("a" * 37 + "...") and brief(1 << 500) == "an int"
    assert brief([]) == "a list" and brief(Global("a", "b")) == "a.b"
