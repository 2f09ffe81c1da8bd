"""GGUF: what is read, and what its header may not be."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_files as files
import holdfast
from gguf_files import Tensor, array, build, head, info, padded, pair
from holdfast.annotated import StateDict, annotate, as_texts
from holdfast.errors import FormatError
from holdfast.formats import _gguf, gguf
from holdfast.formats._gguf_metadata import Metadata
from holdfast.formats._gguf_types import REMOVED, TABLE, TYPES
from holdfast.layout import Index

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())

ONE = Tensor.random("w", (2, 3), "F32")
TWO = [ONE, Tensor.random("v", (4,), "F16")]


def parse(data: bytes, size: int | None = None) -> Index:
    found = gguf.index(files.reader(data), len(data) if size is None else size, "x")
    files.check_index(found, len(data))
    return found


def refused(data: bytes, match: str) -> None:
    for size in (len(data), -1):
        with pytest.raises(FormatError, match=r"^x: .*" + match):
            parse(data, size)


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 2, 8, 32, 64, 4096])
def test_tensors_of_every_type(alignment: int, version: int, tmp_path: Path) -> None:
    tensors = [
        Tensor.random(f"blk.{i}.{row.name}", (3, 2, 2 * row.elements), row.name, i)
        for i, row in enumerate(TYPES.values())
    ]
    assert len(tensors) == 35
    path = tmp_path / "x.gguf"
    path.write_bytes(build(tensors, alignment=alignment, version=version))
    index = parse(path.read_bytes())
    with holdfast.open(path, framework="numpy") as f:
        assert list(f) == [tensor.name for tensor in tensors]
        for i, tensor in enumerate(tensors):
            kind, got = TYPES[list(TYPES)[i]], f[tensor.name]
            assert got.tobytes() == tensor.data
            if kind.dtype is None:
                assert got.dtype == np.uint8 and got.shape == (3, 2, 2, kind.nbytes)
                assert index.encodings[i] == kind.name
            else:
                assert f.info(tensor.name).dtype == kind.dtype and got.shape == (3, 2, 2)
                assert i not in index.encodings
            assert alignment == 1 or f.info(tensor.name).offset % alignment == 0
    found = holdfast.load(path, mmap=False, framework="numpy")
    assert [found[tensor.name].tobytes() for tensor in tensors] == [x.data for x in tensors]
    assert holdfast.load(io.BytesIO(path.read_bytes()), framework="numpy").keys() == found.keys()


def test_a_tensor_is_mapped_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build([Tensor.random("w", (1024, 1024), "F32")]))
    got = holdfast.load(path, framework="numpy")["w"]
    assert got.flags.writeable and not got.flags.owndata
    page = path.read_bytes()
    got[:] = 0
    assert path.read_bytes() == page


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_golden(name: str) -> None:
    data = (GOLDEN / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == MANIFEST[name]["sha256"]
    with holdfast.open(GOLDEN / name, framework="numpy") as f:
        index = f._reader.index
        assert len(index) == len(MANIFEST[name]["tensors"]) == 14
        for row, tensor in enumerate(index.names.tolist()):
            kind, shape, digest = MANIFEST[name]["tensors"][tensor]
            if row not in index.encodings or kind == "Q4_K":
                assert index.encodings.get(row, "") in (kind, "")
                assert list(index.shape(row)) == shape or kind == "BF16"
                entry = index.entries[row]
                raw = data[int(entry["offset"]) :][: int(entry["nbytes"])]
                assert hashlib.sha256(raw).hexdigest() == digest
        check_values(index.metadata)
    assert sorted(MANIFEST) == sorted(path.name for path in GOLDEN.glob("*.gguf"))


def check_values(metadata: Any) -> None:
    expected = {
        "value.u8": 255, "value.i8": -128, "value.u16": 65535, "value.i16": -32768,
        "value.u32": 2**32 - 1, "value.i32": -(2**31), "value.u64": 2**64 - 1,
        "value.i64": -(2**63), "value.f32": 0.5, "value.f64": 1e-3, "value.bool": True,
        "value.text": "größe", "list.texts": ["<s>", "</s>", "ü"], "list.ints": [1, -2, 3],
        "list.floats": [0.5, -1.5], "list.bools": [True, False],
    }  # fmt: skip
    for key, value in expected.items():
        assert metadata[key] == value and type(metadata[key]) is type(value)
        if isinstance(value, list):
            assert [type(item) for item in metadata[key]] == [type(item) for item in value]


def test_extents() -> None:
    shapes: list[tuple[int, ...]] = [(), (5,), (1, 1, 1, 7), (0,), (3, 0, 2), (2, 3)]
    tensors = [Tensor.random(f"t{i}", shape, "F32", i) for i, shape in enumerate(shapes)]
    tensors.append(Tensor.random("none", (4, 0), "Q4_K"))
    found = parse(build(tensors))
    assert [found.shape(i) for i in range(len(shapes))] == shapes
    assert found.shape(len(shapes)) == (4, 0, 144)


def test_no_tensors_and_no_pairs() -> None:
    found = parse(head([], []))
    assert (len(found), dict(found.metadata), found.end) == (0, {}, 24)


def test_what_stands_behind_is_not_looked_at() -> None:
    data = build(TWO)
    assert parse(data + b"more").end == len(data)
    assert parse(padded(data)).end == len(data)


def test_a_header_of_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [array(f"k{i}", files.STRING, ["ab" * i, "c"]) for i in range(100)]
    tensors = [Tensor.random(f"t{i}", (i + 1,), "I8", i) for i in range(100)]
    data = build(tensors, pairs)
    for first in (24, 25, 100, 1000, len(data)):
        monkeypatch.setattr(gguf, "_FIRST", first)
        for size in (len(data), -1):
            found = parse(data, size)
            assert len(found) == 100 and found.metadata["k99"] == ["ab" * 99, "c"]


def test_a_file_cut_anywhere() -> None:
    pairs = [pair("a", files.U32, 1), array("b", files.STRING, ["x", "yz"])]
    data = build(TWO, pairs)
    for length in range(len(data)):
        with pytest.raises(FormatError, match=r"^x: .*" + f"ends at {length}"):
            parse(data[:length])
    start = int(parse(data).entries["offset"][0])
    for length in range(start - 31):
        with pytest.raises(FormatError, match=r"^x: .*(ends at|bytes at)"):
            parse(data[:length], -1)


# -- metadata ------------------------------------------------------------------------------------


def test_metadata_of_every_type() -> None:
    pairs, expected = [], {}
    for kind, what in (
        *((kind, 7) for kind in (*range(6), 10, 11)),
        (files.I64, -1), (files.F32, 1.5), (files.F64, -0.1), (files.BOOL, True),
        (files.BOOL, False), (files.STRING, "é"), (files.STRING, ""),
    ):  # fmt: skip
        key = f"k{len(pairs)}"
        pairs.append(pair(key, kind, what))
        expected[key] = what
        for items in ([what, what], []):
            key = f"k{len(pairs)}"
            pairs.append(array(key, kind, items))
            expected[key] = items
    found = parse(head(pairs, [])).metadata
    assert found == expected and list(found) == list(expected) and len(found) == len(pairs)
    for key, what in expected.items():
        assert type(found[key]) is type(what) and key in found
        assert found[key] is found[key]
    assert "none" not in found and found.get("none") is None
    with pytest.raises(KeyError):
        found["none"]


def test_text_that_is_no_utf_8_is_kept() -> None:
    pairs = [pair("a", files.STRING, b"a\xff\0"), array("b", files.STRING, [b"\x80", b"ok"])]
    found = parse(head(pairs, [])).metadata
    assert found["a"].encode("utf-8", "surrogateescape") == b"a\xff\0"
    assert found["b"][0].encode("utf-8", "surrogateescape") == b"\x80" and found["b"][1] == "ok"


def test_metadata_are_a_mapping() -> None:
    pairs = [pair("a", files.U32, 1), array("b", files.I32, range(100)), pair("c", 8, "x" * 200)]
    found = parse(head(pairs, [])).metadata
    assert isinstance(found, Metadata)
    assert repr(found).startswith("Metadata({'a': 1, 'b': <list of 100>, 'c': 'xxx")
    assert len(repr(found)) < 150
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is dict and again == dict(found) == copy.deepcopy(found)
    assert json.loads(json.dumps(dict(found)))["b"] == list(range(100))


def test_a_large_vocabulary_costs_nothing_before_it_is_asked_for() -> None:
    n = 100_000
    pairs = [
        array("tokens", files.STRING, [f"token{i}" for i in range(n)]),
        array("merges", files.STRING, [f"to ken{i}" for i in range(n)]),
        array("scores", files.F32, [0.5] * n),
    ]
    data = build(TWO, pairs)
    plain, asked = files.reader(data), []

    def read(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return bytes(plain(offset, nbytes))

    tracemalloc.start()
    try:
        began = time.process_time()
        found = gguf.index(read, len(data), "x").metadata
        opened = time.process_time() - began
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)  # no str has been made
        began = time.process_time()
        assert found["tokens"][99_999] == "token99999" and found["merges"][1] == "to ken1"
        assert opened < (time.process_time() - began) / 2
    finally:
        tracemalloc.stop()
    assert found["scores"] == [0.5] * n
    assert len(asked) < 6 and sum(asked) < 2 * len(data)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "match"),
    [
        (0, "big-endian"), (1, "counts of 32 bits"), (4, "found 4"), (3 << 24, "3 in big-endian"),
        (2 << 24, "big-endian"), (1 << 16, "big-endian"), (0xFFFFFFFF, "expected version 2 or 3"),
    ],
)  # fmt: skip
def test_versions(version: int, match: str) -> None:
    refused(head([], [], version=version), match)


HUGE = [-1, -(1 << 63), 1 << 62, (1 << 63) - 1, 1 << 31, 1 << 40]


@pytest.mark.parametrize("count", HUGE)
def test_counts_beyond_the_file(count: int) -> None:
    data = build(TWO, [pair("a", files.U32, 1)])
    tracemalloc.start()
    try:
        for at, what in ((8, "tensors"), (16, "key-value pairs")):
            wrong = data[:at] + (count % (1 << 64)).to_bytes(8, "little") + data[at + 8 :]
            refused(wrong, what if count > 0 else f"number of {what} at offset {at}, found")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_counts_that_are_too_large_by_little(count: int) -> None:
    pairs, infos = [pair("a", files.U32, 1)], [info("w", (2,), "F32", 0)]
    for options in ({"npairs": 1 + count}, {"ninfos": 1 + count}):
        refused(head(pairs, infos, **options), "(needs .* bytes at offset|an empty one)")  # type: ignore


@pytest.mark.parametrize("length", [1 << 20, 1 << 30, (1 << 30) + 1, 1 << 63, (1 << 64) - 1])
def test_lengths_beyond_the_file(length: int) -> None:
    match = "at most 1073741824" if length > 1 << 30 else "needs"
    text = files.string("x", length)
    refused(head([text + bytes(20)], []), match)
    refused(head([files.string("k") + b"\x08\0\0\0" + text], []), f"key 'k': .*{match}")
    for kind in (files.U8, files.F64, files.STRING, files.BOOL):
        refused(head([array("k", kind, [], length)], []), f"key 'k': .*{match}")
    inner = array("k", files.STRING, [b"a"])[:-9] + text
    refused(head([inner], []), f"key 'k': .*{match}")
    match = "at most 63 bytes"
    refused(head([], [info("w", (2,), "F32", 0, length=length)]), match)


@pytest.mark.parametrize("kind", [13, 14, 255, -1, 1 << 30, -(1 << 31)])
def test_types_of_values_that_are_unknown(kind: int) -> None:
    raw = kind.to_bytes(4, "little", signed=True)
    refused(head([files.string("k") + raw + bytes(8)], []), "'k': expected the type of a value")
    wrong = files.string("k") + b"\x09\0\0\0" + raw + bytes(8)
    refused(head([wrong], []), "'k': expected the type of a value")


def test_an_array_of_arrays() -> None:
    inner = b"\x09\0\0\0" + (1).to_bytes(8, "little") + bytes(12)
    refused(head([files.string("k") + b"\x09\0\0\0" + inner], []), "'k': an array of arrays")


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_bool_is_0_or_1(byte: int) -> None:
    refused(head([pair("k", files.BOOL, byte)], []), f"'k': expected a bool.* found {byte}")
    refused(head([array("k", files.BOOL, [1, 0, byte])], []), f"'k': .* found {byte}")


def test_keys() -> None:
    one = pair("k", files.U32, 1)
    refused(head([pair("", files.U32, 1)], []), "expected a key, found an empty one at offset 24")
    refused(head([one, pair("l", files.U8, 1), one], []), "key 'k' at offset 63 is there twice")
    refused(head([pair(b"\xff", files.U32, 1)], []), "key of UTF-8 at offset 32")


@pytest.mark.parametrize("value", [0, 3, 6, 31, 33, 48, (1 << 32) - 1])
def test_alignments_that_are_none(value: int) -> None:
    pairs = [pair("general.alignment", files.U32, value)]
    refused(head(pairs, []) + bytes(200), f"power of two at offset 53, found {value}")


@pytest.mark.parametrize("kind", [files.U8, files.I32, files.U64, files.F32])
def test_alignment_is_a_u32(kind: int) -> None:
    refused(head([pair("general.alignment", kind, 32)], []), "uint32")
    refused(head([array("general.alignment", files.U32, [32])], []), "uint32")
    refused(head([pair("general.alignment", files.STRING, "32")], []), "uint32")


def test_a_giant_alignment() -> None:
    pairs = [pair("general.alignment", files.U32, 1 << 31)]
    data = head(pairs, [info("w", (2,), "F32", 0)]) + bytes(100)
    with pytest.raises(FormatError, match=r"tensor 'w': needs 8 bytes at offset 2147483648"):
        parse(data)
    data = head(pairs, [info("w", (0,), "F32", 0)]) + bytes(100)
    with pytest.raises(FormatError, match="file ends at"):
        parse(data)
    assert len(parse(head(pairs, []))) == 0


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ((32, 0), "'w': expected the offset 0"),
        ((0, 0), "'v': expected the offset 32"),
        ((0, 64), "'v': expected the offset 32, .* found 64"),
        ((0, 24), "'v': expected an offset that is a multiple of 32, found 24"),
        ((0, 33), "'v': expected an offset that is a multiple of 32"),
        ((0, -32), "'v': expected the offset 32"),
        ((1 << 63, 0), "'w': expected the offset 0"),
        ((0, 1 << 40), "'v': expected the offset 32"),
    ],
)
def test_offsets(offsets: tuple[int, int], match: str) -> None:
    infos = [info("w", (2, 3), "F32", offsets[0]), info("v", (4,), "F16", offsets[1])]
    refused(padded(head([], infos)) + bytes(100), match)


@pytest.mark.parametrize("number", [-1, 43, 100, 1 << 30, -(1 << 31), *REMOVED])
def test_types_that_are_unknown_or_removed(number: int) -> None:
    data = padded(head([], [info("w", (256,), number, 0)])) + bytes(4096)
    match = f"'w': expected a type that is known, found {number}"
    refused(data, match + (f" \\({REMOVED[number]}, .*removed" if number in REMOVED else ""))


def test_the_table() -> None:
    assert len(REMOVED) == 8 and not set(REMOVED) & set(TYPES)
    assert set(TYPES) | set(REMOVED) == set(range(43)) and len(TABLE) == 43
    assert [TABLE["elements"][number] for number in REMOVED] == [0] * 8


@pytest.mark.parametrize("extent", [-1, -(1 << 63), -32])
def test_negative_extents(extent: int) -> None:
    for shape in ((extent,), (extent, 32), (32, extent), (0, extent)):
        data = padded(head([], [info("w", shape, "F32", 0)])) + bytes(4096)
        refused(data, f"'w': expected extents of 0 or more, found {extent}")


BIG = (1 << 63) - 1


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1 << 32, 1 << 32), "I8"), ((1 << 62,), "F32"), ((BIG,), "F16"), ((BIG, BIG), "I8"),
        ((1 << 16,) * 4, "I8"), ((1 << 32, 0, 1 << 32), "I8"), ((1 << 61,), "F64"),
        ((BIG - 255,), "Q8_K"), ((0, BIG, BIG), "F32"),
    ],
)  # fmt: skip
def test_sizes_that_overflow(shape: tuple[int, ...], kind: str) -> None:
    data = padded(head([], [info("w", shape, kind, 0)])) + bytes(4096)
    refused(data, r"'w': 2\*\*63 elements or bytes, or more: shape \[")


def test_the_sum_of_sizes_overflows() -> None:
    big = (1 << 62,)
    infos = [info("w", big, "I8", 0), info("v", big, "I8", 1 << 62), info("u", (1,), "I8", 1 << 63)]
    with pytest.raises(FormatError, match=r"'v': 2\*\*63"):
        parse_unsized(padded(head([], infos)))
    with pytest.raises(FormatError, match=r"'w': needs 4611686018427387904 bytes"):
        parse(padded(head([], infos)))


def parse_unsized(data: bytes) -> Index:
    return gguf.index(files.reader(data), -1, "x")


@pytest.mark.parametrize(("shape", "found"), [((), 1), ((1,), 1), ((31,), 31), ((32, 33), 33)])
def test_rows_that_are_no_whole_blocks(shape: tuple[int, ...], found: int) -> None:
    data = padded(head([], [info("w", shape, "Q4_0", 0)])) + bytes(4096)
    refused(data, f"'w': expected rows of a multiple of 32 elements, as Q4_0 .* found {found}")


@pytest.mark.parametrize("ndim", [5, 64, 1 << 31, (1 << 32) - 1])
def test_too_many_dimensions(ndim: int) -> None:
    data = head([], [info("w", (1,) * min(ndim, 64), "F32", 0, ndim=ndim)])
    refused(data + bytes(100), f"'w': expected at most 4 dimensions, found {ndim}")


def test_names_of_tensors() -> None:
    longest = "n" * 63
    data = build([Tensor.random(longest, (2,), "F32"), Tensor.random("", (2,), "F32")])
    assert parse(data).names.tolist() == [longest, ""]
    refused(build([Tensor.random("n" * 64, (2,), "F32")]), "name of at most 63 bytes, found 64")
    refused(build([ONE, ONE]), "'w': the name at offset .* is there twice")
    refused(build([Tensor.random("w\0x", (2,), "F32")]), "holds a NUL")
    data = padded(head([], [info(b"\xff\xfe", (2,), "F32", 0)])) + bytes(8)
    refused(data, "name of a tensor in UTF-8")


def test_other_magics() -> None:
    assert gguf.sniff(b"GGUF", 4) and not gguf.sniff(b"GGML....", 8)
    for data in (b"GGUF", b"GGUF\x03\0\0\0", b"FUGG\x03\0\0\0" + bytes(100)):
        with pytest.raises(FormatError):
            holdfast.load(io.BytesIO(data))


def test_the_scanner_takes_no_position_beyond_the_bytes() -> None:
    for call in (_gguf.pairs, _gguf.tensors, _gguf.strings):
        with pytest.raises(ValueError, match="expected a position"):
            call(b"abc", 4, 1)
        with pytest.raises(_gguf.Fault):
            call(b"abc", 1, 1)
    with pytest.raises(ValueError, match="expected a place"):
        _gguf.texts(b"abc", np.array([1], "u8"), np.array([(1 << 64) - 1], "u8"))


# -- what a load returns -------------------------------------------------------------------------


def test_a_state_dict_says_more_than_its_tensors() -> None:
    found = StateDict({"w": 1}, metadata={"a": 2}, encodings={"w": "Q4_K"})
    assert found == {"w": 1} and isinstance(found, dict)
    assert (found.metadata, found.encodings) == ({"a": 2}, {"w": "Q4_K"})
    for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert again == {"w": 1} and type(again).__name__ == "OrderedDict"


def test_what_a_load_returns_is_annotated_where_values_are_typed() -> None:
    index = parse(build([ONE, Tensor.random("q", (256,), "Q4_K")], [pair("k", files.U32, 1)]))
    names = {"w": 0, "renamed": 1}
    found = annotate({"w": 1, "renamed": 2}, index, names.items())
    assert type(found) is StateDict and found == {"w": 1, "renamed": 2}
    assert found.metadata["k"] == 1 and found.encodings == {"renamed": "Q4_K"}
    index.metadata = {"k": "1"}
    plain = {"w": 1}
    assert annotate(plain, index, names.items()) is plain


def test_metadata_as_texts() -> None:
    pairs = [
        pair("a", files.U32, 7), pair("b", files.STRING, b"x\xff"), pair("c", files.BOOL, 1),
        array("d", files.STRING, ["x", b"\xff"]), array("e", files.F32, [0.5]),
        pair("f", files.STRING, "é"),
    ]  # fmt: skip
    found = as_texts(parse(head(pairs, [])).metadata)
    assert found == {
        "a": "7", "b": "x\ufffd", "c": "true", "d": '["x", "\\udcff"]', "e": "[0.5]", "f": "é",
    }  # fmt: skip
    assert all(text.encode() for text in found.values())
