"""Files of NumPy with any bytes changed: refused with FormatError, or read within bounds."""

from __future__ import annotations

import io
import tracemalloc
import warnings
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import holdfast
import numpy_files as files
from holdfast.errors import FormatError
from holdfast.formats import archive, npy
from patience import within
from zip_files import Record, build

common = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def member(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


ARRAYS = {
    "a": np.arange(12.0).reshape(3, 4),
    "b": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
    "dir/c": np.zeros(2, [("x", "<f4"), ("", "|V4"), ("y", "<U2", (2,))]),
    "d": np.array(["2020-01-01"], "M8[D]"),
    "e": np.array(True),
}
MEMBERS = {name: member(array) for name, array in ARRAYS.items()}

#: What a random byte seldom is.
WORDS = [
    *(b"'", b"(", b")", b"[", b"{", b"}", b",", b":", b"#", b"\\", b"0", b"L", b"-", b" ", b"\n"),
    *(b"<f4", b"|O", b"|V2", b">c16", b"<M8[ns]", b"True", b"False", b"'shape': ", b"(2, 3), "),
    *(b"9999999999999999999", b"# holdfast: bfloat16", b"\xff\xff\xff\x7f", b"\x93NUMPY\x03\x00"),
]


@st.composite
def mutated(draw: st.DrawFn, data: bytes, first: int = 200) -> bytes:
    """`data` with a few places among the first overwritten, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(changed), first)))
        how = draw(st.sampled_from(["write", "insert", "delete", "double", "cut", "flip"]))
        span = draw(st.integers(1, 40))
        if how in ("write", "insert"):
            new = draw(st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=4)))
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


def check(form: Any, data: bytes, size: int) -> bool:
    """Index `data` and load it: whether it was read. Nothing but FormatError."""
    found, text = None, ""
    with within(2):
        try:
            found = form.index(files.reader(data, "x"), size, "x", verify=True)
        except FormatError as error:
            text = str(error)
    if found is None:
        assert text.startswith("x: ")
        return False
    # Where a stream ends nobody knows before it has been read.
    files.check_index(found, len(data) if size >= 0 else found.end)
    try:
        got = holdfast.load(io.BytesIO(data), verify=False)
    except FormatError:
        return False
    except TypeError as error:  # a hint of a type that only another framework has
        text = str(error)
    if text:
        assert "NumPy has no such type" in text or "ml_dtypes" in text
        return False
    arrays = list(got.values()) if isinstance(got, dict) else [got]
    assert all(isinstance(array, np.ndarray) for array in arrays)
    for array in arrays:
        assert array.dtype.hasobject is False
        array.tobytes()
    return True


def test_the_samples_are_read() -> None:
    for name, data in MEMBERS.items():
        assert check(npy, data, len(data)), name
    whole = build([Record(f"{name}.npy", data) for name, data in MEMBERS.items()])
    assert check(archive, whole, len(whole))


@pytest.mark.parametrize("name", ARRAYS)
@common
@given(data=st.data(), known=st.booleans())
def test_arrays_with_a_few_bytes_changed(name: str, data: st.DataObject, known: bool) -> None:
    changed = data.draw(mutated(MEMBERS[name]))
    assume(changed.startswith(npy.MAGIC))
    check(npy, changed, len(changed) if known else -1)


@pytest.mark.parametrize("method", [0, 8])
@common
@given(data=st.data(), name=st.sampled_from(list(ARRAYS)))
def test_members_with_a_few_bytes_changed(method: int, data: st.DataObject, name: str) -> None:
    members = {**MEMBERS, name: data.draw(mutated(MEMBERS[name]))}
    whole = build([Record(f"{key}.npy", value, method=method) for key, value in members.items()])
    check(archive, whole, len(whole))


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed, holdfast.save])
@common
@given(data=st.data())
def test_archives_with_a_few_bytes_changed(savez: Any, data: st.DataObject) -> None:
    out = io.BytesIO()
    if savez is holdfast.save:
        savez(ARRAYS, out, format="npz")
    else:
        savez(out, **ARRAYS)
    changed = data.draw(mutated(out.getvalue(), len(out.getvalue())))
    assume(archive.sniff(changed, -1))
    check(archive, changed, len(changed))


@common
@given(text=st.text("{}()[]',:# LO<f4descrfortran_order shape0123TrueFals\n", max_size=200))
def test_any_header(text: str) -> None:
    check(npy, files.npy(text, bytes(64)), -1)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_memory_is_bounded(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(ARRAYS)))
    members = {**MEMBERS, name: data.draw(mutated(MEMBERS[name]))}
    whole = build([Record(f"{key}.npy", value, method=8) for key, value in members.items()])
    tracemalloc.start()
    try:
        check(archive, whole, len(whole))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_is_not_inflated() -> None:
    """One that says what it inflates to costs that; one that lies costs no more."""
    whole = member(np.zeros(1 << 20, "u1"))
    machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = machine.compress(whole + bytes(1 << 26)) + machine.flush()
    data = build([Record("a.npy", whole, method=8, payload=bomb)])
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="inflates to more"):
            holdfast.load(io.BytesIO(data))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.nested_dtypes(),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any dtype that has bytes, in any layout."""
    dtype = draw(DTYPES)
    assume(not dtype.hasobject and dtype.subdtype is None)
    try:
        dtype.descr  # noqa: B018 - there is none for fields that overlap, which no .npy can say
    except ValueError:
        assume(False)
    shape = draw(SHAPES)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size)) if size < 200 else bytes(size)
    if "b" in dtype.kind:
        raw = bytes(byte & 1 for byte in raw)
    array = np.ndarray(shape, dtype, bytearray(raw) if size else None)
    return draw(st.sampled_from([array, np.asfortranarray(array), array.T, array[..., ::-1]]
                                if shape else [array]))  # fmt: skip


def same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind in "biufc" and a.dtype.itemsize <= 16 and a.dtype.isnative is False:
        a = a.astype(a.dtype.newbyteorder("="))
    return a.shape == b.shape and a.tobytes() == b.astype(a.dtype).tobytes()


@common
@given(items=st.lists(arrays(), max_size=4), how=st.sampled_from(["ours", "plain", "deflated"]))
def test_what_is_written_is_read(items: list[np.ndarray], how: str) -> None:
    named = {f"k{i}": array for i, array in enumerate(items)}
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "ours":
            holdfast.save(named, out, format="npz")
        else:
            (np.savez if how == "plain" else np.savez_compressed)(out, **named)
        got = holdfast.load(io.BytesIO(out.getvalue()))
        theirs = np.load(io.BytesIO(out.getvalue()))
    assert list(got) == list(named) == theirs.files
    for name, array in named.items():
        assert same(array, got[name]), (array.dtype, array)
        assert same(theirs[name], got[name])
    with zipfile.ZipFile(io.BytesIO(out.getvalue())) as whole:
        assert whole.testzip() is None
    assert holdfast.verify(io.BytesIO(out.getvalue())).ok
