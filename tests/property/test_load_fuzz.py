"""Whatever stands in a file, load answers with an object or with FormatError."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast

OBJECT = {
    "model": {"w": np.arange(12.0).reshape(3, 4), "b": np.ones(3, "f4")},
    "when": np.array(["2026-01-01"], "M8[D]"),
    "scalars": [1, 2.5, None, "x", np.float32(2), (3, {4})],
    "long": b"\x00\xff" * 700,
    "z": np.array([1j]),
}


def reseal(head: bytes) -> bytes:
    """The same header with its checksum put right, as one who means harm would."""
    mark = head.find(rb"\"crc32\":\"")
    if mark < 0:
        return head
    place = mark + len(rb"\"crc32\":\"")
    zeroed = head[:place] + b"0" * 8 + head[place + 8 :]
    return zeroed[:place] + b"%08x" % zlib.crc32(zeroed) + zeroed[place + 8 :]


@pytest.fixture(scope="module")
def saved() -> bytes:
    stream = io.BytesIO()
    holdfast.save(OBJECT, stream)
    return stream.getvalue()


def attempt(data: bytes, **options: Any) -> None:
    for verify in (None, False):
        with contextlib.suppress(holdfast.FormatError):
            holdfast.load(io.BytesIO(data), verify=verify, **options)
    report = holdfast.verify(io.BytesIO(data))
    assert report.ok == (not report.problems)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 4200), st.integers(0, 255)), min_size=1, max_size=6),
    sealed=st.booleans(),
)
def test_mutated_bytes(saved: bytes, edits: list[tuple[int, int]], sealed: bool) -> None:
    data = bytearray(saved)
    for place, value in edits:
        data[place % len(data)] = value
    n = 8 + struct.unpack("<Q", saved[:8])[0]
    attempt((reseal(bytes(data[:n])) if sealed else bytes(data[:n])) + bytes(data[n:]))


def mutate(draw: Any, node: Any) -> Any:
    """A JSON value with one thing in it changed."""
    kinds = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 1 << 70), st.text(max_size=6),
        st.lists(st.integers(-2, 9), max_size=4),
        st.sampled_from([
            "dict", "list", "tuple", "set", "bytes", "numpy.scalar", "numpy.dtype", "torch.Size",
            "int", "float", "blob", "numpy:dtype:<M8[ns]", "torch:parameter",
        ]),
    )  # fmt: skip
    if not isinstance(node, list) or not node or draw(st.integers(0, 5)) == 0:
        return draw(kinds)
    i = draw(st.integers(0, len(node) - 1))
    choice = draw(st.integers(0, 4))
    if choice == 0:
        return node[:i] + node[i + 1 :]
    if choice == 1:
        return node[:i] + [node[i]] + node[i:]
    return node[:i] + [mutate(draw, node[i])] + node[i + 1 :]


def with_tree(saved: bytes, change: Any) -> bytes:
    """The file with its tree changed and its checksum right."""
    n = struct.unpack("<Q", saved[:8])[0]
    header = json.loads(saved[8 : 8 + n])
    mark = json.loads(header["__metadata__"]["holdfast"])
    mark["tree"] = change(mark["tree"])
    header["__metadata__"]["holdfast"] = json.dumps(mark, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(n)
    return reseal(struct.pack("<Q", len(text)) + text) + saved[8 + n :]


def test_a_resealed_file_is_read(saved: bytes) -> None:
    """Or else the tests around this one would test the checksum alone."""
    got = holdfast.load(io.BytesIO(with_tree(saved, lambda tree: tree)))
    assert got["scalars"] == OBJECT["scalars"] and got["long"] == OBJECT["long"]
    assert holdfast.load(io.BytesIO(with_tree(saved, lambda tree: ["list", [0], 5])))[1] == 5


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_trees(saved: bytes, data: st.DataObject) -> None:
    """Well-formed headers with trees that lie, their checksum right."""

    def change(tree: Any) -> Any:
        for _ in range(data.draw(st.integers(1, 3))):
            tree = mutate(data.draw, tree)
        return tree

    changed = with_tree(saved, change)
    for framework in (None, "numpy"):
        attempt(changed, framework=framework)
