"""docs/format.md is code: its writer and holdfast's give the same bytes, its reader reads them."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.dtypes import BY_NAME, BY_SAFETENSORS, DTYPES
from holdfast.formats import safetensors
from holdfast.views import TensorBatch, TensorView

PAGE = Path(__file__).parents[2] / "docs" / "format.md"

Tensors = dict[str, tuple[str, list[int], bytes]]


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


@pytest.fixture(scope="module")
def code(page: str) -> dict[str, Any]:
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return names


def holdfast_bytes(
    tensors: Tensors, format: str | None, metadata: Any, tree: object, checksum: bool
) -> bytes:
    """What the format makes of the tensors that the page's writer takes."""
    rows = {tag: row for tag, row in BY_SAFETENSORS.items() if row.pack == 1} | BY_NAME
    batch = TensorBatch.of(
        [TensorView(rows[kind], tuple(shape), 0, None) for kind, shape, _ in tensors.values()]
    )
    frameworks = {"pt": "torch", "np": "numpy", "flax": "jax", None: None}
    plan = safetensors.plan(
        list(tensors),
        batch,
        framework=frameworks[format],
        metadata=metadata,
        structure=tree,
        checksum=checksum,
    )
    crcs = np.array([zlib.crc32(data) for _, _, data in tensors.values()], np.uint32)
    out = bytearray(plan.size)
    head = safetensors.seal(plan, crcs if checksum else None).data
    out[: len(head)] = head
    for (_, _, data), offset in zip(tensors.values(), plan.offsets.tolist(), strict=True):
        out[offset : offset + len(data)] = data
    return bytes(out)


def content(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


CASES: dict[str, Tensors] = {
    "empty": {},
    "example": {"b": ("BOOL", [], b"\1"), "w": ("F32", [2], struct.pack("<2f", 1, 2))},
    "types": {
        row.safetensors: (row.safetensors, [3, 8], content(3 * row.bits))
        for row in DTYPES
        if row.safetensors and row.pack == 1
    },
    "others": {
        "a": ("complex128", [3, 2], content(96)),
        "U8": ("U8", [3, 16], content(48)),
        "b": ("complex128", [], content(16)),
        "c": ("complex32", [0, 2], b""),
        "d": ("float4_e2m1fn_x2", [], b"\x21"),
    },
    "sizes": {f"é{i}": ("U8", [i * i], content(i * i)) for i in range(30, -1, -1)},
    "names": {name: ("U8", [0], b"") for name in ("", '"', "\\", "\n\0", "x" * 4096)},
}


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("metadata", "tree"),
    [
        (None, None),
        ({"note": "hi"}, None),
        ({"z": "é", "format": "own", "a": ',"holdfast":"{\\"version\\":1'}, {"é": [1, "\\"]}),
    ],
)
@pytest.mark.parametrize("format", ["np", "pt", None])
def test_the_bytes_are_the_same(
    code: dict[str, Any], case: str, metadata: Any, tree: object, format: str, checksum: bool
) -> None:
    tensors = CASES[case]
    theirs = code["write"](tensors, format, metadata, tree, checksum)
    ours = holdfast_bytes(tensors, format, metadata, tree, checksum)
    assert theirs == ours
    found, strings, mark = code["read"](ours)
    assert list(found) == list(tensors)
    for name, (kind, shape, data) in tensors.items():
        assert found[name] == (kind, shape, data)
    assert mark.get("tree") == tree
    assert strings.items() >= (metadata or {}).items()


def test_the_reader_finds_flipped_bits(code: dict[str, Any]) -> None:
    data = holdfast_bytes(CASES["example"], "np", {"note": "hi"}, None, True)
    assert code["read"](data)
    used = len(data[:4096].rstrip()) + 8
    flipped = 0
    for at in [*range(used), *range(4080, len(data))]:
        for bit in range(8):
            wrong = bytearray(data)
            wrong[at] ^= 1 << bit
            with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
                code["read"](bytes(wrong))
            flipped += 1
    assert flipped > 2000


def test_the_dump_is_the_example(page: str) -> None:
    dump = re.findall(r"^```hexdump\n(.*?)^```", page, re.M | re.S)
    assert len(dump) == 1
    out = bytearray()
    repeat = False
    for line in dump[0].splitlines():
        if line == "*":
            repeat = True
            continue
        at, _, rest = line.partition("  ")
        row = bytes.fromhex(rest.partition("|")[0])
        while repeat and len(out) < int(at, 16):
            out += out[-16:]
        repeat = False
        assert len(out) == int(at, 16)
        out += row
    assert out == holdfast_bytes(CASES["example"], "np", {"note": "hi"}, None, True)


def test_the_table_of_types_is_the_library_s(page: str, code: dict[str, Any]) -> None:
    found = {
        tag: (int(bits), name)
        for tag, bits, name in re.findall(r"\| `(\w+)` \| (\d+) \| (\w+)", page)
    }
    expected = {
        tag: (row.bits, row.name.removesuffix("_x2")) for tag, row in BY_SAFETENSORS.items()
    }
    assert found == expected
    assert code["BITS"] == {tag: bits for tag, (bits, _) in expected.items()}
    others = {row.name: row.itemsize for row in DTYPES if row.safetensors is None or row.pack > 1}
    assert code["SIZES"] == others
