"""Archives of any bytes: refused with FormatError, or read as Python's own reader reads them."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import zip_files as files
from holdfast.errors import ChecksumError, FormatError
from holdfast.formats import _zip
from zip_files import Record, build, described

common = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

part = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0"), min_size=1, max_size=8
).filter(lambda text: text not in (".", ".."))


def fold(name: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in name)


names = st.lists(
    st.lists(part, min_size=1, max_size=3).map("/".join),
    max_size=12,
    unique_by=fold,
)


@common
@given(part, names, st.data(), st.sampled_from([1, 3, 64, 64, 4096]))
def test_what_is_written_is_read(root: str, names: list[str], data: Any, alignment: int) -> None:
    payloads = [data.draw(st.binary(max_size=100)) for _ in names]
    rows = st.sets(st.integers(0, len(names) - 1)) if names else st.just(set())
    inline = {row: payloads[row] for row in data.draw(rows)}
    sizes = np.array([len(payload) for payload in payloads], np.uint64)
    skeleton = _zip.emit(root, names, sizes, inline, alignment)
    rest = [row for row in range(len(names)) if row not in inline]
    crcs = np.array([zlib.crc32(payloads[row]) for row in rest], np.uint32)
    skeleton.stamp(np.array(rest, np.int64), crcs)
    made = files.assemble(skeleton, {row: payloads[row] for row in rest})
    found = files.scan(made)
    assert found.names == [f"{root}/{name}" for name in names]
    assert (found.rows["offset"] == skeleton.offsets).all()
    assert not (found.rows["offset"] % np.uint64(alignment)).any()
    for row, payload in enumerate(payloads):
        name = found.names[row]
        assert found.find(name) == row
        assert _zip.extract(files.reader(made), found, row, "x", limit=100) == payload
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.namelist() == found.names
        assert archive.testzip() is None


def samples() -> list[bytes]:
    """Archives of every shape, to be made wrong."""
    wide = struct.pack("<HHQQ", 1, 16, 7, 7)
    mark = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
    skeleton = _zip.emit("model", ["data.pkl", "data/0", "version"], np.array([3, 8, 2]), {})
    skeleton.stamp(np.arange(3), np.array([zlib.crc32(d) for d in (b"abc", b"8" * 8, b"3\n")]))
    python = io.BytesIO()
    with zipfile.ZipFile(python, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("r/a", b"some text " * 20)
        archive.writestr("r/ü", b"")
    return [
        build([Record("r/a", b"first"), Record("r/b", b"second")]),
        build([described("r/a"), described("r/b")], end64={}),
        build([Record("r/x", local=mark, extra=wide, central=mark, central_extra=wide)], end64={}),
        build([Record("r/a", b"text " * 50, 8), Record("r/folder/", b"")], comment=b"hello"),
        files.assemble(skeleton, {0: b"abc", 1: b"8" * 8, 2: b"3\n"}),
        python.getvalue(),
        build([]),
    ]


SAMPLES = samples()
WORDS = [b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"]
WORDS += [b"\xff" * 4, b"\0" * 8, b"\xff" * 8, struct.pack("<HHQ", 1, 8, 5), b"../", b"\x75\x70"]


def check(data: bytes) -> bool:
    """Whether `data` is taken; if it is, that nothing of it is in doubt."""
    found = None
    with contextlib.suppress(FormatError):
        found = files.scan(data)
    if found is None:
        return False
    rows = found.rows
    ends = rows["offset"] + rows["packed"]
    order = np.argsort(rows["header"])
    assert (ends[order][:-1] <= rows["header"][order][1:]).all()
    assert (ends <= found.start).all()
    assert len(set(map(fold, found.names))) == len(found)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        theirs = [(i.filename, i.header_offset, i.compress_size, i.file_size, i.CRC) for i in infos]
        columns = (rows[key].tolist() for key in ("header", "packed", "size", "crc"))
        assert theirs == list(zip(found.names, *columns, strict=True))
        for row, info in enumerate(infos):
            try:
                got = _zip.extract(files.reader(data), found, row, "x.zip", limit=1 << 20)
            except ChecksumError:
                with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
                    archive.read(info)
            except FormatError:
                assert rows["method"][row] == 8 or rows["size"][row] > 1 << 20
            else:
                assert len(got) == rows["size"][row]
                if rows["crc"][row] == zlib.crc32(got):
                    assert archive.read(info) == got
    return True


def test_the_samples_are_taken() -> None:
    assert [check(sample) for sample in SAMPLES] == [True] * 7


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice([0, 1, 8, 0x7F, 0xFF, rng.randrange(256)])
        elif kind == 2:
            del out[at : at + rng.choice([1, 2, 22, 46])]
        elif kind == 3:
            word = rng.choice(WORDS)
            out[at : at + len(word)] = word
        elif kind == 4:
            out[at:at] = rng.choice(WORDS)
        elif kind == 5:
            start = rng.randrange(len(out) + 1)
            piece = out[start : start + rng.choice([4, 22, 30, 46, 60])]
            out[at : at + len(piece)] = piece
        else:
            number = rng.choice(
                [0, 1, 7, len(out), len(out) // 2, 2**32 - 1, rng.randrange(1 << 16)]
            )
            out[at : at + 4] = struct.pack("<I", number)
    return bytes(out)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_archives(seed: int) -> None:
    rng = random.Random(seed)
    taken = sum(check(mutate(rng.choice(SAMPLES), rng)) for _ in range(2500))
    # Dates, comments and payloads may change; headers may not.
    assert 50 < taken < 2000


@pytest.mark.parametrize("sample", range(7))
def test_every_bit_of_an_archive(sample: int) -> None:
    """Whatever a single bit makes of it, it is refused or read as it is."""
    data = SAMPLES[sample]
    taken = 0
    for at in range(len(data)):
        for bit in range(8):
            taken += check(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    assert taken < len(data) * 8
    for end in range(len(data)):
        assert not check(data[:end])


@common
@given(st.binary(max_size=300))
@example(b"PK\x05\x06" + bytes(18))
@example(b"PK\x05\x06" * 40)
@example((b"PK\x05\x06" + bytes(18)) * 4)
def test_any_bytes(data: bytes) -> None:
    check(data)


@common
@given(st.binary(max_size=100), st.data())
def test_any_directory(junk: bytes, data: Any) -> None:
    """What comes between the records and the end, the end being right about it."""
    sample = SAMPLES[0]
    start = files.scan(sample).start
    middle = sample[start:-22]
    at = data.draw(st.integers(0, len(middle)))
    middle = middle[:at] + junk + middle[at + data.draw(st.integers(0, 60)) :]
    count = data.draw(st.integers(0, 4))
    place = {"here": count, "count": count, "size": len(middle), "start": start}
    check(sample[:start] + middle + files.fields(files.END, comment_length=0, **place))


@common
@given(st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 40_000)), max_size=40))
def test_windows_of_any_size(parts: list[tuple[int, int]]) -> None:
    """Payloads and extra fields of any length: each header is found where it is."""
    records = [
        Record(f"r/{i}", bytes(size), extra=struct.pack("<HH", 0x4246, more) + bytes(more))
        for i, (size, more) in enumerate(parts)
    ]
    data = build(records)
    found = files.scan(data)
    assert len(found) == len(parts)
    for row, record in zip(found.rows, records, strict=True):
        at = int(row["header"])
        assert int(row["offset"]) == at + 30 + len(record.raw) + len(record.extra)


@common
@given(st.binary(max_size=400), st.integers(0, 3000))
def test_inflate_of_any_bytes(data: bytes, size: int) -> None:
    """As zlib does it, if it makes as many bytes as it is to make of all of them."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        whole = machine.decompress(data) + machine.flush()
        good = machine.eof and not machine.unused_data and len(whole) == size
    except zlib.error:
        good = False
    if good:
        assert _zip.inflate(data, size, "here") == whole
    else:
        with pytest.raises(FormatError, match=r"^here: "):
            _zip.inflate(data, size, "here")


@common
@given(st.binary(max_size=3000), st.integers(0, 9))
def test_inflate_of_what_was_deflated(data: bytes, level: int) -> None:
    machine = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = machine.compress(data) + machine.flush()
    assert _zip.inflate(packed, len(data), "here") == data
    assert _zip.inflate(memoryview(packed), len(data), "here") == data
    for wrong in {len(data) - 1, len(data) + 1} - {-1}:
        with pytest.raises(FormatError, match="once inflated, found"):
            _zip.inflate(packed, wrong, "here")
