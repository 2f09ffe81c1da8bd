"""Pickles of any bytes: read as pickle reads them, or refused, in bounded time and memory."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pickle_files as files
from holdfast.errors import FormatError
from holdfast.formats._inert import Global, Record, Storage
from holdfast.formats._pickle import read_plain
from holdfast.formats._pickle_stack import PassedOver
from holdfast.formats._torch_outline import Outline
from holdfast.formats._torch_pickle import Pickled, read_object
from patience import within
from pickle_files import call, items, number, pairs, simple, text

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
common = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


def seeds() -> list[bytes]:
    """Pickles of real files of every kind, and one with every special tensor."""
    found = []
    for path in sorted(GOLDEN.glob("*.pt")):
        if path.read_bytes()[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                found += [archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl")]
    place = files.storage("QInt8Storage", "9", 6)
    args = (place, number(0), files.numbers((6,)), files.numbers((1,)))
    quantized = call("torch._utils", "_rebuild_qtensor", *args, items(number(1)), files.FALSE)
    subclass = call(
        "torch._tensor", "_rebuild_from_type_v2", files.name("torch._utils", "_rebuild_tensor_v2"),
        files.name("mine", "Sub"), items(files.storage("FloatStorage", "1", 6), *args[1:],
        files.FALSE, files.ORDERED), pairs({"more": simple("2")}),
    )  # fmt: skip
    old = files.name("torch", "FloatTensor") + b")\x81q\x01"
    old += items(files.storage("FloatStorage", "3", 6), *args[1:]) + b"b"
    parts = [quantized, subclass, old, files.parameter(simple("4")), place]
    found.append(files.whole(items(*parts, pairs({"h": b"h\x01"}))))
    return found


SEEDS = seeds()
TOKENS = [bytes([code]) for code in range(256)] + [
    b"h\x00", b"h\x01", b"q\x00", b"q\x05", b"j\x05\x00\x00\x00", b"r\xff\xff\x00\x00",
    b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"X\x01\x00\x00\x00a", text("storage"), text("0"), text("__class__"), b"\x85", b"\x86", b"\x87",
    files.name("torch._utils", "_rebuild_tensor_v2"), files.name("torch", "LongStorage"),
    files.name("builtins", "set"), files.name("copyreg", "_reconstructor"), files.ORDERED,
    files.name("torch.nn.parameter", "Parameter"), files.name("os", "system"), b")\x81", b"b",
    simple("0"), files.storage("UntypedStorage", "0", 24), b"G" + b"\x7f\xf8" + b"\0" * 6,
]  # fmt: skip


@st.composite
def mutated(draw: Callable[[Any], Any]) -> bytes:
    """A real pickle, changed here and there."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        kind = draw(st.integers(0, 4))
        if kind == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 1:
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == 2:
            del data[at : at + draw(st.integers(1, 12))]
        elif kind == 3:
            start = draw(st.integers(0, max(len(data) - 1, 0)))
            data[at:at] = data[start : start + draw(st.integers(1, 60))]
        else:
            token = draw(st.sampled_from(TOKENS))
            data[at : at + len(token)] = token
    return bytes(data)


class Anything:
    """A resolver that makes something of all that it is asked for."""

    def find(self, module: str, name: str) -> object:
        return Global(module, name)

    def call(self, func: object, args: tuple[Any, ...]) -> object:
        return Record(func, args)

    def new(self, cls: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return Record(cls, args, kwargs)

    def build(self, obj: object, state: object) -> object:
        return obj

    def extend(self, obj: object, items: list[Any]) -> None: ...

    def update(self, obj: object, pairs: list[tuple[Any, Any]]) -> None: ...


def check(found: Pickled) -> None:
    """What is true of whatever was read."""
    entries, spans = found.entries, found.storages
    assert len(found.names) == len(entries) == len(found.storage) == len(found.names.tolist())
    assert len(set(found.names.tolist())) == len(entries)
    assert sorted(set(found.structure.paths().values())) == list(range(len(entries)))
    for i, entry in enumerate(entries):
        first, ndim = int(entry["dims"]), int(entry["ndim"])
        dims = found.dims[first : first + ndim].tolist()
        strides = found.strides[first : first + ndim].tolist()
        assert all(extent >= 0 for extent in dims) and all(step >= 0 for step in strides)
        size = int(spans["nbytes"][found.storage[i]])
        if 0 not in dims:
            last = sum((extent - 1) * step for extent, step in zip(dims, strides, strict=True))
            count = int(np.prod(dims, dtype=object))
            assert int(entry["nbytes"]) % count == 0
            assert int(entry["offset"]) + last + int(entry["nbytes"]) // count <= size
        else:
            assert int(entry["nbytes"]) == 0 and int(entry["offset"]) <= size
    found.structure.replay([object() for _ in range(len(entries))], Storage, Anything())
    found.structure.outline(lambda i: i)


def attempt(data: bytes, legacy: bool) -> None:
    """Read what may be anything."""
    try:
        found = read_object(data, name="m.pt", legacy=legacy)
    except FormatError as error:
        message = str(error)
    else:
        message = "m.pt: offset "
        check(found)
    assert message.startswith("m.pt: offset ")


@common
@given(mutated(), st.booleans())
def test_objects(data: bytes, legacy: bool) -> None:
    with within(10):
        attempt(data, legacy)


@common
@given(mutated())
def test_the_quick_way_sees_what_the_slow_way_sees(data: bytes) -> None:
    slow = Outline(data, 0, "m.pt", "", 0, quick=False)
    quick = Outline(data, 0, "m.pt", "", 0)
    wrong = None
    try:
        slow.outline()
    except FormatError as error:
        wrong = error
    try:
        quick.outline()
    except PassedOver:
        return
    except FormatError:
        assert wrong is not None
        return
    assert wrong is None
    assert quick.keys == slow.keys and quick.kinds == slow.kinds and quick.gives() == slow.gives()
    assert quick.locations == slow.locations and quick.globals == slow.globals
    assert quick.event_bytes() == slow.event_bytes() and quick.late == slow.late
    assert quick.storages().tobytes() == slow.storages().tobytes()
    for one, other in zip(quick.columns(), slow.columns(), strict=True):
        assert (one is other is None) or np.array_equal(np.asarray(one), np.asarray(other))


@common
@given(st.lists(st.sampled_from(TOKENS), max_size=60).map(b"".join))
def test_any_opcodes(data: bytes) -> None:
    for legacy in (False, True):
        attempt(files.PROTO + data + b".", legacy)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9)
)
keys = st.integers() | st.text() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner)
        | st.sets(keys)
        | st.frozensets(keys)
    ),
    max_leaves=30,
)


@common
@given(values, st.sampled_from([4, 5]))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found, end = read_plain(data, name="m.pt")
    assert found == value and type(found) is type(value) and end == len(data)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_there_are_seeds(cut: int) -> None:
    assert len(SEEDS) >= 2
    for data in SEEDS:
        check(read_object(data, name="m.pt"))
        with pytest.raises(FormatError):
            read_object(data[: -1 - cut % len(data)], name="m.pt")
