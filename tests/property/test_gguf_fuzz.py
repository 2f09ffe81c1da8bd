"""GGUF files with any bytes changed: refused with FormatError, or read within bounds."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf_files as files
import holdfast
from gguf_files import Tensor, array, build, pair
from holdfast.errors import FormatError
from holdfast.formats import gguf
from holdfast.formats._gguf_types import TYPES
from patience import within

common = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PAIRS = [
    pair("general.alignment", files.U32, 16),
    pair("s", files.STRING, "text"),
    array("a", files.STRING, ["x", "", "yz"]),
    array("f", files.F32, [1.0, 2.0]),
    pair("b", files.BOOL, 1),
    array("bb", files.BOOL, [1, 0]),
    pair("i", files.I64, -1),
]
TENSORS = [
    Tensor.random("w", (2, 3), "F32"),
    Tensor.random("q", (2, 64), "Q4_0"),
    Tensor.random("k", (256,), "Q6_K"),
    Tensor.random("z", (0, 5), "I8"),
    Tensor.random("v", (1, 2, 3, 4), "BF16"),
]
SAMPLE = build(TENSORS, PAIRS, alignment=16, said=False)

#: What a random byte seldom is.
WORDS = [
    *(struct.pack("<Q", n) for n in (0, 1, 2, 63, 64, 1 << 30, 1 << 31, 1 << 32, 1 << 62, 1 << 63)),
    *(struct.pack("<q", n) for n in (-1, -32, (1 << 63) - 1)),
    *(struct.pack("<I", n) for n in (*range(14), 31, 32, 39, 42, 43, 1 << 16, 1 << 31)),
    *(b"\xff" * 4, b"\xff" * 8, b"GGUF", b"general.alignment"),
]


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few places overwritten, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(4, max(4, len(changed))))
        how = draw(st.sampled_from(["write", "insert", "delete", "double", "cut", "flip"]))
        span = draw(st.integers(1, 40))
        if how in ("write", "insert"):
            new = draw(st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=8)))
            changed[at : at + (len(new) if how == "write" else 0)] = new
        elif how == "delete":
            del changed[at : at + span]
        elif how == "double":
            changed[at:at] = changed[at : at + span]
        elif how == "cut" and draw(st.integers(0, 9)) == 0:
            del changed[at:]
        elif at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def check(data: bytes, size: int) -> bool:
    """Index `data` and load it: whether it was read. Nothing but FormatError."""
    found, text = None, ""
    with within(2):
        try:
            found = gguf.index(files.reader(data), size, "x", verify=True)
        except FormatError as error:
            text = str(error)
    if found is None:
        assert text.startswith("x: ")
        return False
    files.check_index(found, len(data) if size >= 0 else found.end)
    assert len(dict(found.metadata)) == len(found.metadata)
    repr(found.metadata)
    try:
        got = holdfast.load(io.BytesIO(data), framework="numpy")
    except FormatError:
        assert size < 0
        return False
    assert list(got) == found.names.tolist()
    for value in got.values():
        assert isinstance(value, np.ndarray)
        value.tobytes()
    return True


def test_the_sample_is_read() -> None:
    assert check(SAMPLE, len(SAMPLE)) and check(SAMPLE, -1)


@common
@given(data=mutated(SAMPLE), known=st.booleans())
def test_a_few_bytes_changed(data: bytes, known: bool) -> None:
    check(data, len(data) if known else -1)


@common
@given(rest=st.binary(max_size=300), version=st.sampled_from([2, 3]), counts=st.tuples(
    st.integers(0, 5), st.integers(0, 5)))  # fmt: skip
def test_any_bytes_behind_the_counts(rest: bytes, version: int, counts: tuple[int, int]) -> None:
    data = b"GGUF" + struct.pack("<IQQ", version, *counts) + rest
    check(data, len(data))


@settings(max_examples=200, deadline=None)
@given(data=mutated(SAMPLE))
def test_memory_is_bounded(data: bytes) -> None:
    tracemalloc.start()
    try:
        check(data, len(data))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


SCALARS = {
    **{kind: st.integers(0, 100) for kind in (files.U8, files.I8, files.U32, files.I32)},
    files.U64: st.integers(0, 2**64 - 1),
    files.I64: st.integers(-(2**63), 2**63 - 1),
    files.F32: st.floats(width=32, allow_nan=False),
    files.F64: st.floats(allow_nan=False),
    files.BOOL: st.booleans(),
    files.STRING: st.text(max_size=8),
}


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, object], list[bytes]]:
    """Any sound content: tensors, and values with the bytes of their pairs."""
    names = draw(st.lists(st.text("abc.é", max_size=6), max_size=5, unique=True))
    tensors = []
    for name in names:
        block = draw(st.sampled_from(list(TYPES.values())))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        row = draw(st.integers(0, 2)) * block.elements
        tensors.append(Tensor.random(name, (*shape, row), block.name))
    values: dict[str, object] = {}
    pairs = []
    for key in draw(st.lists(st.text(min_size=1, max_size=6), max_size=5, unique=True)):
        kind = draw(st.sampled_from(sorted(SCALARS)))
        if draw(st.booleans()):
            values[key] = draw(SCALARS[kind])
            pairs.append(pair(key, kind, values[key]))
        else:
            items = draw(st.lists(SCALARS[kind], max_size=4))
            values[key] = items
            pairs.append(array(key, kind, items))
    return tensors, values, pairs


@common
@given(content=contents(), alignment=st.sampled_from([1, 4, 32, 64]))
def test_what_is_sound_is_read(
    content: tuple[list[Tensor], dict[str, object], list[bytes]], alignment: int
) -> None:
    tensors, values, pairs = content
    data = build(tensors, pairs, alignment=alignment)
    assert check(data, len(data))
    found = gguf.index(files.reader(data), len(data), "x")
    metadata = dict(found.metadata)
    assert metadata.pop("general.alignment", 32) == alignment
    assert metadata == values
    got = holdfast.load(io.BytesIO(data), framework="numpy")
    assert [got[tensor.name].tobytes() for tensor in tensors] == [x.data for x in tensors]
