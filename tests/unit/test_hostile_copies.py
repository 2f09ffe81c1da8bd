"""Pickles in which a few bytes have something large copied, or walked, over and over."""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import FormatError
from patience import within
from pickle_files import (
    FALSE,
    NONE,
    ORDERED,
    PROTO,
    STOP,
    items,
    name,
    number,
    numbers,
    pairs,
    text,
)

NUMBERS = b"(" + b"".join(b"J" + struct.pack("<i", i) for i in range(100_000))
KEYS = b"(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))
ATTRIBUTES = b"}(" + b"".join(text(f"a{i}") + b"N" for i in range(20_000)) + b"u"
BYTES = b"B" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
RECORD = (
    name("numpy", "dtype") + b"(" + text("i1") + b"K\0K\1tRq\x050"
    + b"(K\3" + text("|") + b"N(" + b"".join(text(f"n{i}") for i in range(8000)) + b"t}("
    + b"".join(text(f"n{i}") + b"h\5M" + struct.pack("<H", i) + b"\x86" for i in range(8000))
    + b"uM\x40\x1fK\1K\0t"
)  # fmt: skip
MAKE = b"h\0h\1\x85R"
#: What is called, its arguments, and how it is called once more; the numbers are of the memo.
COPIES = {
    "set": (name("builtins", "set"), b"]" + NUMBERS + b"e", MAKE),
    "set of a set": (name("builtins", "set"), b"]" + NUMBERS + b"e", MAKE + b"q\1"),
    "frozenset": (name("builtins", "frozenset"), b"]" + NUMBERS + b"e", MAKE),
    "OrderedDict": (name("collections", "OrderedDict"), b"}" + KEYS + b"u", MAKE),
    "OrderedDict of one": (name("collections", "OrderedDict"), b"}" + KEYS + b"u", MAKE + b"q\1"),
    "attributes": (name("collections", "OrderedDict"), ATTRIBUTES, b"h\0)Rh\1b"),
    "bytearray of one": (name("builtins", "bytearray"), BYTES, MAKE + b"q\1"),
    "path": (name("pathlib", "PurePosixPath"), text("a/" * 50_000), MAKE),
    "scalar": (
        name("numpy.core.multiarray", "scalar"),
        b"(" + name("numpy", "dtype") + b"(" + text("S1048576") + b"K\0K\1tR" + BYTES + b"t",
        b"h\0h\1R",
    ),
    "record": (name("numpy", "dtype"), RECORD, b"h\0(" + text("V8000") + b"K\0K\1tRh\1b"),
    "array of nothing": (
        name("numpy.core.numeric", "_frombuffer"),
        b"(C\0" + name("numpy", "dtype") + b"(" + text("V16777216") + b"K\0K\1tRK\0\x85"
        + text("C") + b"t",
        b"h\0h\1R",
    ),
}  # fmt: skip


def archive(func: bytes, args: bytes, once: bytes, count: int) -> BytesIO:
    """An object of `count` equal things."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        data = b"\x80\3" + func + b"q\x000" + args + b"q\x010](" + once * count + b"e."
        made.writestr("a/data.pkl", data)
        made.writestr("a/version", b"3\n")
    file.seek(0)
    return file


@pytest.mark.parametrize("what", COPIES)
def test_copies_of_one_thing_are_bounded(what: str) -> None:
    assert len(holdfast.load(archive(*COPIES[what], 2), framework="numpy")) == 2
    with within(5), pytest.raises(FormatError, match="more than 268435456 bytes of copies"):
        holdfast.load(archive(*COPIES[what], 3000), framework="numpy")


def test_a_name_may_be_in_the_paths_of_very_many_files() -> None:
    file = archive(name("pathlib", "PurePosixPath"), text("n" * 255), MAKE, 40_000)
    assert len(holdfast.load(file, framework="numpy")) == 40_000


def test_arguments_that_many_records_share_are_walked_a_bounded_number_of_times() -> None:
    file = archive(name("mine", "Class"), b"(" + b"N" * 200_000 + b"t", b"h\0h\1R", 3000)
    with within(5), holdfast.open(file) as found:
        assert list(found) == []
    file = archive(name("mine", "Class"), ATTRIBUTES, b"h\0)Rh\1b", 3000)
    with within(5), holdfast.open(file) as found:
        assert list(found) == []


def test_a_scalar_of_a_record_can_be_written_to() -> None:
    import numpy as np

    file = BytesIO()
    value = np.zeros(1, [("a", "i4"), ("b", "f8")])[0]
    holdfast.save({"v": value}, file, format="torch")
    file.seek(0)
    found = holdfast.load(file)["v"]
    found["a"] = 5
    assert found["a"] == 5 and found.dtype == value.dtype


def test_attributes_that_all_tensors_share(tmp_path: Path) -> None:
    """What each tensor has, and very many are said to have the same of: it is walked but once."""
    pytest.importorskip("torch")
    count = 16_000
    storage = items(
        text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4)
    )
    given = items(storage + b"Q", number(0), numbers([2]), numbers([1]), FALSE, ORDERED)
    data = (
        PROTO + name("torch._tensor", "_rebuild_from_type_v2") + b"q\x000"
        + name("torch._utils", "_rebuild_tensor_v2") + b"q\x010" + name("torch", "Tensor")
        + b"q\x020" + given + b"q\x030" + pairs({f"k{i}": NONE for i in range(count)}) + b"q\x040"
        + b"](" + b"h\0(h\1h\2h\3h\4tR" * (2 * count) + b"e" + STOP
    )  # fmt: skip
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/data.pkl", data)
        made.writestr("a/version", b"3\n")
        made.writestr("a/data/0", bytes(16))
    with within(5), holdfast.open(path) as f:
        assert len(list(f)) == 2 * count
    with within(5), pytest.raises(FormatError, match="copies of the same"):
        holdfast.load(path)
    with within(5), pytest.warns(UserWarning, match="'k9', …"):
        holdfast.convert(path, tmp_path / "b.pt")
    assert len(holdfast.load(tmp_path / "b.pt")) == 2 * count
