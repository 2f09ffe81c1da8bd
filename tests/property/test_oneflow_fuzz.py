"""Pickles and texts of OneFlow of any bytes: read as they are meant, or refused."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oneflow_states as files
from holdfast.errors import FormatError
from holdfast.formats._inert import Record
from holdfast.formats._oneflow_meta import NUMBERS, meta_text, parse
from holdfast.formats._oneflow_pickle_scan import Scanner
from holdfast.layout import Index
from pickle_files import items, number, pairs, text

ERAS = Path(__file__).parents[1] / "golden" / "oneflow" / "eras"
common = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

FLOATS = np.arange(6, dtype="<f4").reshape(2, 3)
SEEDS = [
    (ERAS / "training_v4").read_bytes(),
    files.saved(items(files.inside(files.of(FLOATS), 11), files.binary(b"x" * 300), b"]\x94",
                      files.inside(files.of(FLOATS, fortran=True), 2), b"\x8f", b"h\0")),
]  # fmt: skip
TOKENS = [bytes([code]) for code in range(256)] + [
    b"h\x00", b"h\x05", b"q\x00", b"j\x05\x00\x00\x00", b"K\x00", b"K\xff", b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"C\x04abcd", b"B\x04\0\0\0abcd", b"\x8e" + b"\xff" * 8,
    b"\x95" + bytes(8), b"\x95" + b"\xff" * 8, b"0", b"2", b"1", b")", b"N", b"}", b"]", b"(",
    pairs({"path": text("tensor_0")}), files.dtype(2), files.dtype(11), files.of(FLOATS),
    files.inside(files.of(FLOATS), 2), files.beside("a"), b"R", b"\x81", b"b", b"t", b"\x94",
]  # fmt: skip


class Nobody:
    """A resolver that is told everything, and makes records of it."""

    def find(self, module: str, name: str) -> object:
        return Record

    def call(self, func: object, args: tuple[object, ...]) -> object:
        return Record(func, args, called=True)

    def new(self, cls: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return Record(cls, args, kwargs)

    def build(self, obj: object, state: object) -> object:
        return obj

    def extend(self, obj: object, items: list[object]) -> None:
        pass

    def update(self, obj: object, pairs: list[tuple[object, object]]) -> None:
        pass


def check(data: bytes, found: Index) -> None:
    """Whatever was found lies in the file, has a name, and stands in an object."""
    assert 0 < found.end <= len(data)
    assert found.storages is not None
    assert found.storage is not None
    names = found.names.tolist()
    assert len(names) == len(set(names)) == len(found)
    ends = found.storages["offset"] + found.storages["nbytes"]
    assert (ends <= found.end).all()
    values = files.values(found, lambda _: data)
    assert list(values) == names
    assert found.structure is not None
    with contextlib.suppress(FormatError):
        found.structure.replay(list(range(len(found))), lambda *_: None, Nobody())
    found.structure.outline(lambda row: row)


def attempt(data: bytes, size: int) -> None:
    if not files.oneflow_file.sniff(data[:512], len(data)):
        return
    try:
        found = files.index_file(data, size)
    except FormatError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        check(data, found)


@common
@given(st.data())
def test_changed_files(data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(seed)))
        token = data.draw(st.sampled_from(TOKENS))
        seed[at : at + data.draw(st.sampled_from((0, 1, len(token))))] = token
    attempt(bytes(seed), data.draw(st.sampled_from((len(seed), -1))))


@common
@given(st.lists(st.sampled_from(TOKENS), max_size=30))
def test_objects_of_any_opcodes(tokens: list[bytes]) -> None:
    data = files.saved(b"".join(tokens))
    attempt(data, len(data))


@common
@given(st.binary(max_size=200), st.integers(1, 9))
def test_windows_do_not_matter(data: bytes, step: int) -> None:
    def scan(step: int) -> object:
        scanner, least = Scanner("x", "", -1, 1 << 20), 1
        try:
            while not scanner.done:
                window = data[scanner.pos : scanner.pos + max(step, least)]
                if len(window) < least:
                    return "too short"
                least = max(scanner.feed(window), 1)
        except FormatError as error:
            return str(error)
        return scanner.pos, scanner.condensed, scanner.blocks.tolist()

    assert scan(step) == scan(1000)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@common
@given(nested)
def test_objects_come_back(obj: object) -> None:
    data = b"".join([files.saved(b"N")[:-3], pickle.dumps(obj, 2)[2:-1], b"u."])
    structure = files.index_file(data).structure
    assert structure is not None
    assert structure.replay([], lambda *_: None, Nobody()) == obj
    assert pickle.loads(structure.data) == obj


@common
@given(st.lists(st.integers(0, 2**63 - 1), max_size=64), st.sampled_from(sorted(NUMBERS)))
def test_texts_come_back(shape: list[int], code: int) -> None:
    dtype, found = parse(meta_text(shape, code), "x")
    assert (dtype.code, found) == (code, tuple(shape))


@common
@given(st.lists(st.sampled_from(
    ["shape", "dim", "data_type", "kFloat", "{", "}", "<", ">", ":", "[", "]", ",", ";", "3", "-1",
     "0x1f", "017", "09", "#", "\n", " ", '"', "'", "\\", "1e9", "x"]), max_size=40).map("".join)
)  # fmt: skip
def test_texts_of_any_tokens(text: str) -> None:
    try:
        dtype, shape = parse(text.encode(), "x")
    except FormatError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
    else:
        assert parse(meta_text(shape, dtype.code), "x") == (dtype, shape)


def test_the_seeds_are_sound() -> None:
    assert [len(files.index_file(seed)) for seed in SEEDS] == [6, 2]
    assert number(3) in SEEDS[0]
