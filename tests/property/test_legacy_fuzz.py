"""Old files of torch with any bytes changed: refused with FormatError, or read within bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import torch_legacy, torch_tar
from patience import within

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
MEMBERS = files.tar_members()
TAR = files.tar(MEMBERS)
STREAMS = [files.sample(protocol) for protocol in (1, 2, 4, 5)] + [
    (GOLDEN / name).read_bytes() for name in ("module-torch1.0.0.pt", "training-torch1.5.1.pt")
]

common = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

#: Opcodes and lengths that a random byte seldom is.
BYTES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(
        [b"(", b"R", b"b", b"\x81", b"\x85", b"Q", b"c", b"h\x00", b"q\xff", b"\x93", b"0", b"2"]
    ),
    st.sampled_from(
        [
            b"\xff\xff\xff\x7f",
            b"\xff" * 8,
            b"\x00" * 8,
            b"\x8b\xff\xff\xff\x7f",
            b"r\xff\xff\xff\xff",
        ]
    ),
)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few places overwritten, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        how = draw(st.sampled_from(["write", "insert", "delete", "double", "cut", "flip"]))
        length = draw(st.integers(1, 40))
        if how == "write":
            new = draw(BYTES)
            changed[at : at + len(new)] = new
        elif how == "insert":
            changed[at:at] = draw(BYTES)
        elif how == "delete":
            del changed[at : at + length]
        elif how == "double":
            changed[at:at] = changed[at : at + length]
        elif how == "cut":
            del changed[at:]
        elif at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def check(form: Any, data: bytes, size: int) -> bool:
    """Index `data`: whether it was read. Nothing but FormatError, nothing out of bounds."""
    text = ""
    with within(5):
        try:
            found = form.index(files.reader(data), size, "x.pt", verify=True)
        except FormatError as error:
            text = str(error)
    if text:
        assert text.startswith("x.pt: ")
        return False
    assert 0 < found.end <= len(data)
    starts, nbytes = found.storages["offset"], found.storages["nbytes"]
    assert (starts.astype(object) + nbytes.astype(object) <= len(data)).all()
    names = found.names.tolist()
    assert len(names) == len(found) == len(set(names))
    for i in range(len(found)):
        entry = found.entries[i]
        shape = found.shape(i)
        dtype = found.dtype(i)
        assert min(shape, default=0) >= 0
        assert dtype.nbytes(shape) == entry["nbytes"]
        if entry["nbytes"] == 0:
            continue
        at = int(entry["dims"])
        strides = (
            [int(np.prod(shape[k + 1 :], dtype=object)) * dtype.itemsize for k in range(len(shape))]
            if found.strides is None
            else found.strides[at : at + len(shape)].tolist()
        )
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        row = found.storages[found.storage[i]]
        assert min(strides, default=0) >= 0
        assert row["offset"] <= entry["offset"]
        assert int(entry["offset"]) + last + dtype.itemsize <= int(row["offset"]) + int(
            row["nbytes"]
        )
    assert set(found.structure.paths().values()) <= set(range(len(found)))
    return True


@pytest.mark.parametrize("which", range(len(STREAMS)))
def test_the_samples_are_read(which: int) -> None:
    assert check(torch_legacy, STREAMS[which], len(STREAMS[which]))
    assert check(torch_tar, TAR, len(TAR))


@pytest.mark.parametrize("which", range(len(STREAMS)))
@common
@given(data=st.data(), known=st.booleans())
def test_streams_with_a_few_bytes_changed(which: int, data: st.DataObject, known: bool) -> None:
    changed = data.draw(mutated(STREAMS[which]))
    check(torch_legacy, changed, len(changed) if known else -1)


@pytest.mark.parametrize("member", list(MEMBERS))
@common
@given(data=st.data(), known=st.booleans())
def test_members_with_a_few_bytes_changed(member: str, data: st.DataObject, known: bool) -> None:
    changed = files.tar({**MEMBERS, member: data.draw(mutated(MEMBERS[member]))})
    check(torch_tar, changed, len(changed) if known else -1)


@common
@given(data=st.data(), known=st.booleans())
def test_tars_with_a_few_bytes_changed(data: st.DataObject, known: bool) -> None:
    changed = data.draw(mutated(TAR))
    check(torch_tar, changed, len(changed) if known else -1)


@pytest.mark.parametrize("form", [torch_legacy, torch_tar], ids=["stream", "tar"])
@common
@given(data=st.binary(max_size=2000))
def test_any_bytes(form: Any, data: bytes) -> None:
    magic = files.dump(files.MAGIC)
    assert not check(form, data, len(data))
    check(form, magic + files.dump(files.VERSION) + data, -1)


@pytest.mark.parametrize("which", range(2))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_memory_is_bounded(which: int, data: st.DataObject) -> None:
    form, whole = (torch_tar, TAR) if which else (torch_legacy, STREAMS[1])
    changed = data.draw(mutated(whole))
    tracemalloc.start()
    try:
        check(form, changed, len(changed))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@common
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 5), st.booleans()),
        max_size=6,
    ),
    protocol=st.integers(1, 5),
    kind=st.sampled_from(sorted(files.KINDS)),
    little=st.booleans(),
)
def test_what_is_written_is_read(shapes: Any, protocol: int, kind: str, little: bool) -> None:
    dtype = np.dtype(files.KINDS[kind])
    obj: dict[str, object] = {}
    arrays: dict[object, np.ndarray] = {}
    expected = {}
    for i, (shape, offset, turned) in enumerate(shapes):
        count = int(np.prod(shape, dtype="i8")) + offset
        array = (np.arange(count) % 2 if kind == "BoolStorage" else np.arange(count)).astype(dtype)
        view = array[offset:].reshape(shape)
        if turned:
            view = view.T
        strides = tuple(step // dtype.itemsize for step in view.strides)
        key = str(1000 - i * 37)
        obj[f"t{i}"] = files.tensor(files.storage(key, count, kind), view.shape, strides, offset)
        arrays[key] = array
        expected[f"t{i}"] = view
    info = {**files.INFO, "little_endian": little}
    data = files.stream(obj, arrays, protocol=protocol, info=info, big=not little)
    assert check(torch_legacy, data, len(data))
    found = torch_legacy.index(files.reader(data), len(data), "x.pt", verify=True)
    values = files.values(data, found)
    assert list(values) == list(expected)
    for name, value in expected.items():
        assert values[name].shape == value.shape
        np.testing.assert_array_equal(values[name], value)
