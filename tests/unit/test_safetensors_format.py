"""The container: every rule of safetensors, the mark, and every flipped bit of a header."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.dtypes import BY_NAME
from holdfast.errors import ChecksumError, FormatError
from holdfast.formats import safetensors as form
from holdfast.layout import Index
from holdfast.views import TensorBatch, TensorView


def seal(text: str | bytes, data: bytes = b"") -> bytes:
    """A file of this header and this data."""
    header = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(header)) + header + data


def read(data: bytes, size: int | None = None, **options: Any) -> Index:
    return form.index(
        lambda offset, nbytes: data[offset : offset + nbytes],
        len(data) if size is None else size,
        "ckpt",
        **options,
    )


def file(
    tensors: dict[str, np.ndarray], types: dict[str, str] | None = None, **options: Any
) -> bytes:
    """What holdfast writes; `types` overrides the types of some."""
    arrays = [np.asarray(array, order="C") for array in tensors.values()]
    names = [(types or {}).get(name, array.dtype.name) for name, array in tensors.items()]
    batch = TensorBatch.of(
        [
            TensorView(BY_NAME[kind], array.shape, array.ctypes.data, array)
            for kind, array in zip(names, arrays, strict=True)
        ]
    )
    settings = {"framework": "numpy", "metadata": None, "structure": None, "checksum": True}
    settings.update(options)
    plan = form.plan(list(tensors), batch, **settings)
    crcs = np.array([zlib.crc32(array.tobytes()) for array in arrays], np.uint32)
    out = bytearray(plan.size)
    head = form.seal(plan, crcs if settings["checksum"] else None).data
    out[: len(head)] = head
    for array, offset in zip(arrays, plan.offsets.tolist(), strict=True):
        out[offset : offset + array.nbytes] = array.tobytes()
    return bytes(out)


def row(kind: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


F = '{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}'
TEST = '{"test":' + F + "}"
REFUSED = {
    # The vectors of the safetensors package's own tests.
    "json attack": (
        seal(json.dumps({f"weight_{i}": row("F32", [2, 2], 0, 16) for i in range(10)}), b"\0" * 16),
        r"ckpt: tensor 'weight_1': expected to begin at offset \d+, found \d+: 16 bytes are an",
    ),
    "incomplete buffer": (
        seal(TEST, b"\0" * 16 + b"extra_bogus_data_for_polyglot_file"),
        r"ckpt: the tensors end at offset 84, the file at 118",
    ),
    "file cut short": (seal(TEST, b"\0" * 15), r"ckpt: the tensors end at .*84.* 83"),
    "header too large": (
        b"<\x00\x00\x00\x00\xff\xff\xff" + TEST.encode() + b"       ",
        "ckpt: expected a header of at most 100000000 bytes, found a length of 1844674297419792",
    ),
    "just too large": (struct.pack("<Q", 100_000_001) + b"{}", "found a length of 100000001"),
    "header too small": (b"", r"ckpt: expected the length .* found a file of 0 bytes"),
    "invalid header length": (
        b"<\x00\x00\x00\x00\x00\x00\x00",
        "needs 60 bytes at offset 8, .* 8$",
    ),
    "one byte short": (seal("{}")[:-1], "needs 2 bytes at offset 8, file ends at 9"),
    "not utf-8": (seal(b"\xff"), r"ckpt: header: expected an object at offset 8, found b'\\xff'"),
    "not json": (seal("{"), "expected more JSON at offset 9, found the end"),
    "trailing nul": (seal("{}\0"), r"nothing but white space after the object at offset 10"),
    "invalid info": (
        seal('{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,4]}}', b"\0" * 4),
        r"ckpt: tensor 'test': I32 of shape \(2, 2\) needs 16 bytes, "
        r"its data_offsets \[0, 4\] span 4",
    ),
    "validation overflow": (
        seal(
            '{"test":{"dtype":"I32","shape":[2,18446744073709551614],"data_offsets":[0,16]}}',
            b"\0" * 16,
        ),
        r"ckpt: tensor 'test': expected an integer below 2\*\*63",
    ),
    "validation overflow 2": (
        seal(json.dumps({"test": row("I32", [2, 2**63 - 1, 8], 0, 16)}), b"\0" * 16),
        r"tensor 'test': I32 of shape \(2, 9223372036854775807, 8\) needs 2\*\*64 bits or more",
    ),
    "overflow before a zero": (
        seal(json.dumps({"test": row("U8", [2**62, 4, 0], 0, 0)})),
        r"tensor 'test': U8 of shape .* needs 2\*\*64 bits",
    ),
    "half a byte": (
        seal(json.dumps({"t": row("F4", [1], 0, 1)}), b"\0"),
        r"ckpt: tensor 't': F4 of shape \(1,\) is not a whole number of bytes",
    ),
    "odd fp4": (
        seal(json.dumps({"t": row("F4", [2, 1], 0, 1)}), b"\0"),
        r"F4 of shape \(2, 1\) has a last dimension that is not a multiple of 2",
    ),
    # formats.md, 3.2 and 5.6.
    "hole": (
        seal(json.dumps({"a": row("U8", [2], 0, 2), "b": row("U8", [2], 3, 5)}), b"\0" * 5),
        r"tensor 'b': expected to begin at offset \d+, found \d+: 1 bytes before it are nobody's",
    ),
    "hole at the start": (
        seal(json.dumps({"a": row("U8", [1], 1, 2)}), b"12"),
        "tensor 'a'.*nobody",
    ),
    "backward": (
        seal(json.dumps({"a": row("U8", [0], 2, 1)})),
        r"'a': its data_offsets \[2, 1\] end before they begin \(header, offset 14\)",
    ),
    "duplicate name": (
        seal('{"a":' + F + ',"a":' + F + "}", b"\0" * 16),
        "tensor 'a': the name is there",
    ),
    "duplicate metadata": (
        seal('{"__metadata__":{},"__metadata__":{}}'),
        "ckpt: header: expected '__metadata__' once at offset 27",
    ),
    "duplicate metadata key": (
        seal('{"__metadata__":{"k":"","k":""}}'),
        "ckpt: metadata 'k': expected each key of '__metadata__' once at offset 33",
    ),
    "bool": (seal('{"a":{"shape":[true]}}'), r"integer of 0 or more at offset 23, found b'true\]"),
    "negative": (seal('{"a":{"shape":[-1]}}'), r"tensor 'a': .* found b'-1\]"),
    "unknown dtype": (seal('{"a":{"dtype":"F31"}}'), "tensor 'a': expected a known dtype .*F31"),
    "no dtype": (seal('{"a":{}}'), "tensor 'a': expected an object with the key 'dtype'"),
    "too deep": (seal('{"a":{"x":' + "[" * 200), "tensor 'a': expected at most 128 levels"),
    "far too deep": (seal('{"a":{"x":' + "[" * 100_000), "tensor 'a': expected at most 128 levels"),
    "too many dimensions": (
        seal(json.dumps({"a": row("U8", [1] * 65, 0, 1)}), b"\0"),
        "tensor 'a': expected at most 64 dimensions",
    ),
    "long name": (seal(json.dumps({"n" * 9999: {}})), r"tensor 'n{50}\.\.\.n{50}': expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, message = REFUSED[case]
    for verify in (True, False):
        with pytest.raises(FormatError, match=message) as caught:
            read(data, verify=verify)
        assert str(caught.value).startswith("ckpt: ")
        assert len(str(caught.value)) < 600


ACCEPTED = {
    "nothing": seal("{}"),
    "empty": seal(json.dumps({"test": row("I32", [], 0, 4)}), b"\0" * 4),
    "zero-sized": seal(json.dumps({"test": row("I32", [2, 0], 0, 0)})),
    "padded": seal(TEST + "     \n\r\t", b"\0" * 16),
    "padded in front": seal("\t\n " + TEST, b"\0" * 16),
    "fp4": seal(json.dumps({"test": row("F4", [2, 2], 0, 2)}), b"\0" * 2),
    "fp6": seal(json.dumps({"test": row("F6_E3M2", [4, 2], 0, 6)}), b"\0" * 6),
    "null in what is skipped": seal('{"a":{"x":null,' + F[1:] + "}", b"\0" * 16),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str) -> None:
    data = ACCEPTED[case]
    assert form.sniff(data[:64], len(data))
    assert read(data).end == len(data)
    assert read(data).crcs is None


def test_stream_of_unknown_length() -> None:
    data = ACCEPTED["empty"]
    assert form.header_size(data[:8], -1, "-") == len(data) - 4
    assert read(data + b"more", -1).end == len(data)
    with pytest.raises(FormatError, match="expected 60 bytes of header, found 12"):
        form.parse(struct.pack("<Q", 52) + b"{}  ", -1, "-")
    with pytest.raises(FormatError, match="bytes of header, found 3"):
        form.parse(b"abc", -1, "-")


def test_sniff() -> None:
    assert form.sniff(b"\xff" * 8 + b" {", 10)
    assert not form.sniff(b"PK\3\4" + b"\0" * 20, 24)
    assert not form.sniff(b"\2\0\0\0\0\0\0\0", 8)
    assert not form.sniff(b"", 0)


# -- every flipped bit -----------------------------------------------------------------------------

W = np.arange(6, dtype=np.float32)
SPACES = np.full(12288, 0x20, np.uint8)
FLIPPED = {
    "plain": file({"w": W}),
    "no checksums": file({"w": W}, checksum=False, framework=None),
    "no tensors": file({}),
    "all of it": file(
        {"a": W, "z": W.astype(complex), "é\n": W[:0]},
        metadata={"format": "own", "k\\": "\\X", "X": ",", ",": ":"},
        structure={"x": [1, {"y": None}]},
    ),
    "near keys": file({"w": W}, metadata={"Holdfast": '{"version":1,"crc32":"00000000"}'}),
    "spaces as data": file({"w": SPACES}, checksum=False),
}


def flips(data: bytes, end: int) -> Iterator[tuple[int, bytes]]:
    wrong = bytearray(data)
    for at in range(end):
        for bit in range(8):
            wrong[at] ^= 1 << bit
            yield at, bytes(wrong)
            wrong[at] ^= 1 << bit


@pytest.mark.parametrize("case", FLIPPED)
def test_every_flipped_bit_of_a_header_is_found(case: str) -> None:
    data = FLIPPED[case]
    end = 8 + int.from_bytes(data[:8], "little")
    assert len(read(data)) == len(read(data, -1))
    assert end == 4096
    head, tried = bytearray(data[:end]), 0
    for at in range(8, end):
        for bit in range(8):
            head[at] ^= 1 << bit
            with pytest.raises(FormatError):
                form.parse(head, len(data), "ckpt")
            head[at] ^= 1 << bit
            tried += 1
    assert tried == 8 * 4088


@pytest.mark.parametrize("case", FLIPPED)
@pytest.mark.parametrize("known", [True, False])
def test_every_flipped_bit_of_the_length_is_found(case: str, known: bool) -> None:
    data = FLIPPED[case]
    for _, wrong in flips(data, 8):
        with pytest.raises(FormatError):
            read(wrong, None if known else -1)


@pytest.mark.parametrize("case", FLIPPED)
def test_unverified_flips_read_the_tensors_or_are_refused(case: str) -> None:
    data = FLIPPED[case]
    used = len(data[:4096].rstrip(b" ")) + 1
    same = refused = 0
    for _, wrong in flips(data, used):
        try:
            index = read(wrong, verify=False)
        except FormatError:
            refused += 1
        else:
            same += 1
            assert index.crcs is None
            assert index.tree is None
            assert index.end == len(data)
    assert same > 100
    assert refused > 100


def test_a_bit_in_the_own_key() -> None:
    data = FLIPPED["no checksums"]
    with pytest.raises(FormatError, match="metadata has the key 'hoddfast', but not 'holdfast'"):
        read(data.replace(b'"holdfast"', b'"hoddfast"'))
    data = FLIPPED["plain"]
    for wrong in (b'"hoddfast"', b'"xxxxxxxx"'):
        with pytest.raises(FormatError, match=r"the key 'h\w*(\.crc32)?', but not 'holdfast'"):
            read(data.replace(b'"holdfast"', wrong))
    other = seal('{"__metadata__":{"Holdfast":"ours","hold":"","holdfast2":"x"}}')
    assert read(other).metadata == {"Holdfast": "ours", "hold": "", "holdfast2": "x"}


# -- the mark --------------------------------------------------------------------------------------


def remark(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with `old` in its header made `new`, and a CRC-32 that says it is right."""
    assert data.count(old) == 1
    assert len(data) > 4096
    text = data[:4096].replace(old, new).rstrip(b" ")
    text = text.ljust(4096, b" ")
    at = text.index(b'crc32\\":\\"') + 10
    text = text[:at] + b"00000000" + text[at + 8 :]
    return text[:at] + b"%08x" % zlib.crc32(text) + text[at + 8 :] + data[4096:]


BYTES = np.zeros((2, 16), np.uint8)
SUM = b'"%08x"' % zlib.crc32(BYTES.tobytes())
BAD_MARKS = {
    "newer": (b'version\\":1', b'version\\":2', "expected version 1, found 2: a newer holdfast"),
    "no json": (b'\\"tree\\":1', b'\\"tree\\":[', "'holdfast' is not JSON"),
    "nan": (b'\\"tree\\":1', b'\\"tree\\":NaN', "NaN is not JSON"),
    "deep": (b'\\"tree\\":1', b'\\"tree\\":' + b"[" * 3000, "is not JSON"),
    "no sums": (b',"holdfast.crc32":' + SUM, b"", "'holdfast.crc32': .* found none"),
    "short sums": (SUM, b'"0000000"', "8 lower-case .* 1 tensors, .* found 7"),
    "long sums": (SUM, b'"0000000000000000"', "found 16 characters"),
    "upper sums": (SUM, b'"0000000A"', "found 8 characters"),
    "spaced sums": (SUM, b'"00 00 00"', "found 8 characters"),
    "odd sums": (SUM, b'"0000x000"', "found 8 characters"),
    "sums although not": (b'\\"tree\\"', b'\\"checksum\\":false,\\"tree\\"', "and checksum false"),
    "types a list": (b'\\"tree\\":1', b'\\"dtypes\\":[]', "expected dtypes as an object"),
    "types of nothing": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"1\\":\\"complex128\\"}', "found '1'"),
    "types by name": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"b\\":\\"complex128\\"}', "found 'b'"),
    "types by 00": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"00\\":\\"complex128\\"}', "found '00'"),
    "unknown type": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"0\\":\\"int128\\"}', "'0': 'int128'"),
    "type no str": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"0\\":[]}', r"found '0': '\[\]'"),
    "wrong size": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"0\\":\\"complex32\\"}', "'complex32'"),
    "type with a tag": (b'\\"tree\\":1', b'\\"dtypes\\":{\\"0\\":\\"float32\\"}', "'float32'"),
}


@pytest.mark.parametrize("case", BAD_MARKS)
def test_bad_marks(case: str) -> None:
    old, new, message = BAD_MARKS[case]
    data = file({"b": BYTES}, structure=1)
    assert read(data).tree == 1
    wrong = remark(data, old, new)
    with pytest.raises(FormatError, match=message) as caught:
        read(wrong)
    assert not isinstance(caught.value, ChecksumError)
    index = read(wrong, verify=False)
    assert (index.tree, index.crcs, index.shape(0)) == (None, None, (2, 16))
    assert index.metadata == {"format": "np"}


def test_good_types() -> None:
    data = file({"b": BYTES}, structure=1)
    data = remark(data, b'\\"tree\\":1', b'\\"dtypes\\":{\\"0\\":\\"complex128\\"}')
    assert (read(data).dtype(0).name, read(data).shape(0)) == ("complex128", (2,))


def test_a_header_that_another_tool_rewrote() -> None:
    package = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    data = file({"w": W, "z": W.astype(complex)}, structure=[0], metadata={"note": "x"})
    assert package.deserialize(data)
    copied = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    again = numpy.save(numpy.load(data), metadata=copied)
    with pytest.raises(ChecksumError, match=r"rewritten by a tool.*verify=False reads"):
        read(again)
    index = read(again, verify=False)
    assert sorted(index.names.tolist()) == ["w", "z"]
    assert (index.tree, index.crcs) == (None, None)
    assert index.metadata == {"note": "x", "format": "np"}
    assert index.framework == "numpy"


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"holdfast": ""}, ValueError, "'holdfast': what begins with 'holdfast' is reserved"),
        ({"holdfast.x": ""}, ValueError, "reserved"),
        ({"a": 1}, TypeError, "of str, found 'a': 1"),
        ({1: "a"}, TypeError, "of str, found 1: 'a'"),
        ({"a": "\ud800"}, ValueError, "lone surrogate at index 0"),
        ({"\udfff": ""}, ValueError, "lone surrogate"),
    ],
)
def test_metadata_that_is_refused(metadata: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        file({"w": W}, metadata=metadata)


def test_a_tree_that_is_no_json() -> None:
    for tree in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError), match="JSON"):
            file({"w": W}, structure=tree)


def test_a_header_too_long_says_to_shard() -> None:
    names = ["x" * 99_000 + str(i) for i in range(1100)]
    batch = TensorBatch.of([TensorView(BY_NAME["uint8"], (0,), 0, None)] * len(names))
    with pytest.raises(
        ValueError, match=r"takes 1\d{8} bytes for 1100 tensors, .*100000000.*shards"
    ):
        form.plan(names, batch, framework=None, metadata=None, structure=None, checksum=False)


@pytest.mark.parametrize(
    ("text", "framework"),
    [("pt", "torch"), ("np", "numpy"), ("flax", "jax"), ("mlx", None), ("", None)],
)
def test_format_of_foreign_files(text: str, framework: str | None) -> None:
    index = read(seal(json.dumps({"__metadata__": {"format": text}})))
    assert (index.framework, index.metadata) == (framework, {"format": text})


# -- beside the safetensors package ----------------------------------------------------------------

SHAPES = [(), (3,), (2, 5), (0,), (4, 0, 2), (1, 1, 1), (16, 64)]


def arrays(names: list[str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        f"{name} {shape}": rng.integers(0, 2, shape).astype(name)
        for name in names
        for shape in SHAPES
    }


NUMPY = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64 complex64"


def test_the_package_reads_ours() -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = arrays(NUMPY.split())
    found = numpy.load(file(tensors, metadata={"a": "é"}))
    assert set(found) == set(tensors)
    assert len(found) == 13 * len(SHAPES)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("metadata", [None, {"format": "np", "x": "\n"}])
def test_we_read_the_package_s(metadata: dict[str, str] | None) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = arrays(NUMPY.split())
    data = numpy.save(tensors, metadata=metadata)
    index = read(data)
    assert len(index) == len(tensors)
    assert index.metadata == (metadata or {})
    for name, array in tensors.items():
        i = index.names.find(name)
        start, nbytes = int(index.entries["offset"][i]), int(index.entries["nbytes"][i])
        assert (index.dtype(i).name, index.shape(i)) == (array.dtype.name, array.shape)
        assert data[start : start + nbytes] == array.tobytes()


TORCH = (
    "bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz "
    "float4_e2m1fn_x2"
)


def test_types_of_torch_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    names = [name for name in TORCH.split() if hasattr(torch, name)]
    assert names
    made = {}
    for name in names:
        carrier = torch.int16 if name == "bfloat16" else torch.uint8
        for shape in [(3, 2), (8,), (1,)]:
            value = torch.full(shape, 0x21, dtype=carrier).view(getattr(torch, name))
            made[f"{name} {shape}"] = value
    data = package.save(made)
    index = read(data)
    for name, value in made.items():
        i = index.names.find(name)
        assert f"{index.dtype(i).name} {index.shape(i)}" == name
        start = int(index.entries["offset"][i])
        expected = value.view(torch.uint8).numpy().tobytes()
        assert data[start : start + len(expected)] == expected
    raw = {name: value.view(torch.uint8).numpy() for name, value in made.items()}
    raw = {name: array.view(np.uint16) if "bf" in name else array for name, array in raw.items()}
    kinds = {name: name.split()[0] for name in made}
    (tmp_path / "x").write_bytes(file(raw, kinds, framework="torch"))
    back = package.load_file(tmp_path / "x")
    assert set(back) == set(made)
    for name, value in made.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8))


def test_what_the_package_lacks_it_reads_as_bytes() -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    value = np.arange(6).reshape(3, 2) * (1 + 2j)
    data = file({"z": value, "s": np.array(1j)})
    found = numpy.load(data)
    assert found["z"].shape == (3, 2, 16)
    assert found["z"].tobytes() == value.tobytes()
    index = read(data)
    assert [index.shape(i) for i in range(2)] == [(3, 2), ()]
    assert {index.dtype(i).name for i in range(2)} == {"complex128"}
    assert re.search(rb'dtypes\\":\{\\"0\\":\\"complex128\\",\\"1\\"', data)
