"""Payloads of records: taken out exactly, inflated no further than they may be, checked."""

from __future__ import annotations

import tracemalloc

import pytest

import zip_files as files
from holdfast.errors import ChecksumError, FormatError
from holdfast.formats import _zip
from zip_files import Record, build

A = Record("r/a", b"first")
GOOD = build([A, Record("r/b", b"second")])


def test_a_stored_payload_that_was_changed() -> None:
    data = build([A, Record("r/x", b"payload")]).replace(b"payload", b"paYload")
    with pytest.raises(ChecksumError, match=r"record 'r/x': its bytes at offset 71 have the CRC"):
        files.extract(data, "r/x")
    assert files.extract(data, "r/x", verify=False) == b"paYload"


def test_a_checksum_of_zero_is_none() -> None:
    none = {"crc": 0}
    data = build([A, Record("r/x", b"payload", local=none, central=none)])
    assert files.extract(data, "r/x") == b"payload"


@pytest.mark.parametrize("method", [0, 8])
def test_a_payload_above_the_limit(method: int) -> None:
    data = build([A, Record("r/x", bytes(1001), method=method)])
    with pytest.raises(FormatError, match="record 'r/x': expected at most 1000 bytes, found 1001"):
        files.extract(data, "r/x", limit=1000)
    assert files.extract(data, "r/x", limit=1001) == bytes(1001)


def test_packed_bytes_above_the_limit() -> None:
    size = {"packed": 2000}
    data = build([A, Record("r/x", b"", 8, payload=bytes(2000), local=size, central=size)])
    with pytest.raises(FormatError, match="expected at most 1000 bytes, found 2000"):
        files.extract(data, "r/x", limit=1000)


def deflated(payload: bytes, size: int, crc: int = 0) -> bytes:
    change = {"size": size, "crc": crc}
    return build([A, Record("r/x", b"", 8, payload=payload, local=change, central=change)])


SOME = bytes(range(200)) * 5
FLATS = {
    "more than it says": (files.deflate(SOME), 999, "expected 999 bytes once inflated, found more"),
    "none, though it has": (files.deflate(SOME), 0, "expected 0 bytes once inflated, found more"),
    "less than it says": (
        files.deflate(SOME), 1001, "expected 1001 bytes once inflated, found 1000 before"),
    "cut off": (files.deflate(SOME)[:-1], 1000, "expected 1000 bytes once inflated, found"),
    "not ended": (
        files.deflate(SOME)[:-4], 1000, "expected 1000 bytes once inflated, found .* data ended"),
    "bytes behind": (
        files.deflate(SOME) + b"more", 1000, "expected its deflated data to have .* bytes"),
    "no deflated data": (b"\xff" * 50, 1000, "is no deflated data"),
    "nothing": (b"", 0, "expected 0 bytes once inflated, found 0 before its data ended"),
}  # fmt: skip


@pytest.mark.parametrize(("payload", "size", "text"), FLATS.values(), ids=FLATS)
def test_deflated_data_that_is_wrong(payload: bytes, size: int, text: str) -> None:
    with pytest.raises(FormatError, match=r"^x\.zip: record 'r/x': " + text):
        files.extract(deflated(payload, size), "r/x")
    with pytest.raises(FormatError, match=r"^here: " + text):
        _zip.inflate(payload, size, "here")


def test_inflated_bytes_that_were_changed() -> None:
    with pytest.raises(ChecksumError, match="have the CRC-32 .*, expected 00000005"):
        files.extract(deflated(files.deflate(SOME), 1000, 5), "r/x")


def test_a_bomb_is_not_inflated_beyond_its_size() -> None:
    bomb = files.deflate(bytes(100 << 20))
    for size in (1000, 1 << 20):
        tracemalloc.start()
        with pytest.raises(FormatError, match="bytes once inflated, found more"):
            files.extract(deflated(bomb, size), "r/x", limit=1 << 20)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20


@pytest.mark.parametrize("size", [1 << 40, 2**63 - 1, 2**64, 2**70])
def test_a_size_out_of_all_proportion(size: int) -> None:
    with pytest.raises(FormatError, match=f"found {size} bytes"):
        _zip.inflate(files.deflate(b"abc"), size, "here")


@pytest.mark.parametrize("row", [-1, 2, 1 << 40])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of 2"):
        _zip.extract(files.reader(GOOD), files.scan(GOOD), row, "x.zip", limit=100)
