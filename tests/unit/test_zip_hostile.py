"""Archives that are refused, each with a message that says where and why."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from typing import Any

import pytest

import zip_files as files
from holdfast.errors import FormatError
from holdfast.formats import _zip
from zip_files import Record, build, described

A, B = Record("r/a", b"first"), Record("r/b", b"second")
GOOD = build([A, B])
START = len(GOOD) - 22 - 2 * (46 + 3)
NAME_AT = START + 46
BAD_NAME = "expected a relative name without NUL"


def test_what_the_refused_ones_differ_from_is_taken() -> None:
    found = files.scan(GOOD)
    assert found.names == ["r/a", "r/b"]
    assert (found.root, found.start, found.end) == ("r", START, len(GOOD))
    wide = files.scan(build([A, B], end64={}))
    assert wide.names == found.names
    assert files.scan(build([described("r/a"), described("r/b")])).names == found.names


ENDS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "expected an end of central directory in the last 65557 bytes, found none"),
    "no end record": (GOOD[:-22], "expected an end of central directory"),
    "cut off in the end record": (GOOD[:-1], "expected an end of central directory"),
    "only an end record's signature": (b"PK\x05\x06", "expected an end of central directory"),
    "bytes behind the end": (
        GOOD + b"#!/bin/sh",
        rf"to end with the file, at {len(GOOD) + 9}, found {len(GOOD)}",
    ),
    "a comment longer than the file": (
        build([A, B], end={"comment_length": 5}),
        rf"to end with the file, at {len(GOOD)}, found {len(GOOD) + 5}",
    ),
    "a comment with an end record that has no comment": (
        build([A, B], comment=files.fields(files.END, here=0, count=0, size=0, start=0,
                                           comment_length=0)),
        rf"expected one end of central directory, found another at offset {len(GOOD) - 22}",
    ),
    "an end record in the last bytes of the comment": (
        build([A, B], comment=b"PK\x05\x06"),
        rf"expected one end of central directory, found another at offset {len(GOOD)}",
    ),
    "a comment with a whole archive": (
        build([A, B], comment=GOOD + b"x"),
        "to end with the file",
    ),
    "disk 1": (build([A, B], end={"disk": 1}), "expected all on one disk, 0, found 1"),
    "directory on disk 2": (build([A, B], end={"first_disk": 2}), "on one disk, 0, found 2"),
    "entries on other disks": (build([A, B], end={"here": 1}), "on one disk, 2, found 1"),
    "disk mark without zip64": (build([A], end={"disk": 0xFFFF}), "on one disk, 0, found 65535"),
    "a count above": (
        build([A, B], end={"here": 3, "count": 3}),
        "expected a central directory of 98 bytes to have room for its entries, found 3",
    ),
    "a huge count": (
        build([A, B], end={"here": 65535, "count": 65535}),
        "to have room for its entries, found 65535 of them",
    ),
    "a count below": (
        build([A, B], end={"here": 1, "count": 1}),
        rf"expected no more entries .*, found 49 bytes \(at offset {START + 49}",
    ),
    "a count of none": (build([A, B], end={"here": 0, "count": 0}), "no more entries .* 98 bytes"),
    "a size above": (
        build([A, B], end={"size": 99}),
        rf"directory to end at offset {START + 98}, .* begins, found {START + 99}",
    ),
    "a size below": (build([A, B], end={"size": 49}), "directory to end at offset"),
    "a start above": (build([A, B], end={"start": START + 1}), "directory to end at offset"),
    "a start behind the end": (build([A, B], end={"start": 1 << 31}), "directory to end at offset"),
    "bytes behind the directory": (build([A, B], before_end=b"12"), "directory to end at offset"),
    "bytes in the directory": (build([A, B], in_directory=b"12"), "no more entries .* 2 bytes"),
    "bytes before all": (b"MZ" + GOOD, "directory to end at offset"),
    "bytes before all, accounted for": (
        build([Record("r/a", before=b"#!/bin/sh\n"), B]),
        "at the start of the file, found 10 bytes before",
    ),
    "bytes and no record": (
        bytes(5) + files.fields(files.END, here=0, count=0, size=0, start=5, comment_length=0),
        "at the start of the file, found 5 bytes before",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "text"), ENDS.values(), ids=ENDS)
def test_an_archive_whose_end_is_wrong(data: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=r"^x\.zip: .*" + text):
        files.scan(data)


ZIP64: dict[str, tuple[dict[str, Any], str]] = {
    "count": ({"end64": {"here": 3, "count": 3}}, "expected 3 as the zip64 end .*, found 2"),
    "size": ({"end64": {"size": 99}}, "expected 99 as the zip64 end .*, found 98"),
    "start": ({"end64": {"start": 1}}, f"expected 1 as the zip64 end .*, found {START}"),
    "32-bit count": ({"end64": {}, "end": {"here": 1, "count": 1}}, "expected 2 as .* found 1"),
    "32-bit size": ({"end64": {}, "end": {"size": 1}}, "expected 98 as the zip64 .* found 1"),
    "count here": ({"end64": {"here": 1}}, "expected all on one disk, 2, found 1"),
    "disk": ({"end64": {"disk": 1}}, "expected all on one disk, 0, found 1"),
    "directory's disk": ({"end64": {"first_disk": 1}}, "on one disk, 0, found 1"),
    "locator's disk": ({"locator": {"disk": 4}}, "on one disk, 0, found 4"),
    "disks": ({"locator": {"disks": 2}}, "on one disk, 1, found 2"),
    "locator": (
        {"locator": {"offset": START}},
        f"expected the zip64 locator to point at offset {START + 98}, found {START}",
    ),
    "length": ({"end64": {"length": 45}}, "zip64 end .* with 44 bytes, found none, or .* 45"),
    "signature": ({"end64": {"signature": 7}}, "expected a zip64 end of central directory"),
    "hidden count": (
        {"end64": {"here": 1, "count": 1}, "end": {"here": 0xFFFF, "count": 0xFFFF}},
        "expected no more entries",
    ),
    "giant count": (
        {"end64": {"here": 1 << 62, "count": 1 << 62}, "end": {"here": 0xFFFF, "count": 0xFFFF}},
        "to have room for its entries",
    ),
    "giant size": (
        {"end64": {"size": 2**64 - 1}, "end": {"size": 0xFFFFFFFF}},
        "directory to end at offset",
    ),
    "giant start": (
        {"end64": {"start": 2**64 - 98}, "end": {"start": 0xFFFFFFFF}},
        "directory to end at offset",
    ),
}


@pytest.mark.parametrize(("change", "text"), ZIP64.values(), ids=ZIP64)
def test_an_archive_whose_zip64_end_is_wrong(change: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=r"^x\.zip: zip archive: .*" + text):
        files.scan(build([A, B], **change))


def test_a_locator_without_room_for_its_record() -> None:
    data = files.fields(files.LOCATOR, offset=0)
    data += files.fields(files.END, here=0, count=0, size=0, start=0, comment_length=0)
    with pytest.raises(FormatError, match="expected a zip64 end of central directory"):
        files.scan(data)


def test_a_directory_is_not_read_that_is_too_large() -> None:
    size = 1 << 40
    tail = files.fields(files.END64, here=1, count=1, size=size - 98, start=0)
    tail += files.fields(files.LOCATOR, offset=size - 98)
    tail += files.fields(files.END, here=1, count=1, size=0xFFFFFFFF, start=0, comment_length=0)
    asked = []

    def read(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return (bytes(nbytes) + tail)[-nbytes:]

    text = f"expected a central directory of at most {1 << 29} bytes, found {size - 98}"
    with pytest.raises(FormatError, match=text):
        _zip.scan(read, size, "x.zip")
    assert asked == [1 << 17]


def entry(**change: Any) -> bytes:
    """An archive of `A` and a record that has this about it."""
    return build([A, Record(**{"name": "r/x", "data": b"payload"} | change)])


WIDE = struct.pack("<HHQ", 1, 8, 7)
SECOND = struct.pack("<HHBI", 0x7075, 5 + 3, 1, zlib.crc32(b"r/x"))
FB = struct.pack("<HH", 0x4246, 3) + b"ZZZ"
RECORDS: dict[str, tuple[bytes, str]] = {
    "signature": (entry(central={"signature": 1}), "expected an entry of the central directory"),
    "longer than the directory": (
        entry(central={"comment_length": 100}),
        r"expected an entry of 149 bytes, found the end of the central directory after 49",
    ),
    "version": (entry(central={"needed": 64}), "expected version 63 .*, found 64"),
    "encrypted": (entry(flags=0x801), "expected no flags but .*, found 0x0001"),
    "strongly encrypted": (entry(flags=0x840), "expected no flags but .*, found 0x0040"),
    "masked": (entry(flags=0x2800), "expected no flags but .*, found 0x2000"),
    "patched": (entry(flags=0x820), "expected no flags but .*, found 0x0020"),
    "enhanced deflating": (entry(flags=0x810), "expected no flags but .*, found 0x0010"),
    "reserved flags": (entry(flags=0xD780), "expected no flags but .*, found 0xd780"),
    "flags, central only": (entry(central={"flags": 0x801}), "found 0x0001"),
    "flags, local only": (
        entry(local={"flags": 0x801}),
        "expected flags 0x0800, as in the central directory, found 0x0801 in its local header",
    ),
    "bzip2": (entry(method=12), "expected method 0 .stored. or 8 .deflated., found 12"),
    "AES": (entry(method=99), "found 99"),
    "method, local only": (entry(local={"method": 8}), "expected method 0, as .* found 8 in"),
    "method, central only": (entry(central={"method": 8}), "expected method 8, as .* found 0 in"),
    "stored, sizes differ": (
        entry(central={"size": 8}),
        "expected a stored payload of 8 bytes, found 7 bytes in the file",
    ),
    "deflated, out of proportion": (
        entry(data=bytes(40_000), method=8, central={"size": 1 << 30}),
        f"deflated bytes can be inflated to, found {1 << 30} bytes",
    ),
    "size, local only": (
        entry(local={"size": 8}),
        "expected a size of 7 bytes, as in the central directory, found 8 in its local header",
    ),
    "packed, local only": (entry(local={"packed": 6}), "expected 7 bytes in the file, .* found 6"),
    "CRC-32, local only": (entry(local={"crc": 1}), "expected the CRC-32 .*, found 00000001"),
    "no CRC-32, local only": (entry(local={"crc": 0}), "expected the CRC-32 .*, found 00000000"),
    "another name": (entry(local_name=b"r/y"), "expected the same name in its local header"),
    "another case": (entry(local_name=b"r/X"), "expected the same name in its local header"),
    "a longer name": (entry(local_name=b"r/xy"), "expected the same name in its local header"),
    "a shorter name": (entry(local={"name_length": 2}), "the same name in its local header"),
    "local signature": (entry(local={"signature": 0x04034B51}), "expected its local header, found"),
    "header in the directory": (
        entry(central={"header": START}),
        "expected its local header before the central directory",
    ),
    "header behind the file": (
        entry(central={"header": 0xFFFFFFF0}),
        "expected its local header before the central directory",
    ),
    "header in the record before": (
        entry(central={"header": 3}),
        r"expected its local header at offset 38 or later, where the record before ends, found 3",
    ),
    "the header of another": (entry(central={"header": 0}), "expected its local header at offset"),
    "payload over the directory": (
        entry(local={"size": 60, "packed": 60}, central={"size": 60, "packed": 60}),
        "expected its payload to end before the central directory",
    ),
    "a giant payload": (
        entry(central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF},
              central_extra=struct.pack("<HHQQ", 1, 16, 2**64 - 40, 2**64 - 40)),
        "expected its payload to end before the central directory",
    ),
    "a giant local extra field": (
        entry(local={"extra_length": 65535}),
        "expected its payload to end before the central directory",
    ),
    "quoted overlap": (
        build([Record("r/a", b"x" * 60), Record("r/b", b"", central={"header": 40})]),
        "expected its local header at offset 93 or later, where the record before ends, found 40",
    ),
    "a gap": (
        entry(before=b"hidden"),
        "record 'r/a': expected at most a descriptor of 0 bytes behind its payload, found 6 bytes",
    ),
    "a gap before the directory": (
        build([A, Record("r/x", descriptor=b"hidden")]),
        "record 'r/x': expected at most a descriptor of 0 bytes behind its payload, found 6 bytes",
    ),
    "a central extra field cut off": (
        entry(central_extra=FB[:-1]), "expected an extra field whose parts fill it"),
    "a local extra field cut off": (entry(extra=FB[:-1]), "expected an extra field whose parts"),
    "two zip64 fields": (entry(central_extra=WIDE + WIDE), "one of them for zip64 at most"),
    "a zip64 field for nothing": (
        entry(central_extra=WIDE), "expected a zip64 extra field of 0 bytes, found 8"),
    "a short zip64 field": (
        entry(central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}, central_extra=WIDE),
        "expected a zip64 extra field of 16 bytes, found 8",
    ),
    "a short local zip64 field": (
        entry(local={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}, extra=WIDE),
        "expected a zip64 extra field of 16 bytes, found 8",
    ),
    "local zip64 field differs": (
        entry(local={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF},
              extra=struct.pack("<HHQQ", 1, 16, 8, 7)),
        "expected a size of 7 bytes, .* found 8",
    ),
    "mark without zip64 field": (
        entry(local={"size": 0xFFFFFFFF}), "expected a size of 7 bytes, .* found 4294967295"),
    "central: another name in the extra field": (
        entry(central_extra=SECOND + b"r/y"), "expected one name, found another in the extra"),
    "local: another name in the extra field": (
        entry(extra=SECOND + b"r/y"), "expected one name, found another in the extra field"),
    "disk": (entry(central={"disk": 1}), "expected all on one disk, 0, found 1"),
    "disk in zip64": (
        entry(central={"disk": 0xFFFF}, central_extra=struct.pack("<HHI", 1, 4, 2)),
        "expected all on one disk, 0, found 2",
    ),
    "not UTF-8": (entry(name=b"r/\xff"), r"record 'r/\\\\xff': expected a name in UTF-8"),
    "a surrogate": (entry(name=b"r/\xed\xa0\x80"), "expected a name in UTF-8, as its flag says"),
    "a folder with bytes": (entry(name="r/x/"), "expected a folder without bytes, found 7 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "text"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_wrong(data: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=r"^x\.zip: .*" + text) as caught:
        files.scan(data)
    assert re.search(r"\(at offset \d+\)$", str(caught.value))


NAMES = ["", "/etc/passwd", "r/../x", "..", "r/..", "../x", "r\\x", "r/a\0b", "r//x", ".", "r/./x"]
NAMES += ["//host/x", "/", "r/..\\x", "C:\\x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_lead_elsewhere(name: str) -> None:
    with pytest.raises(FormatError, match=BAD_NAME):
        files.scan(build([A, Record(name, b"")]))
    with pytest.raises(ValueError, match="a relative name without NUL") as caught:
        _zip.emit("r", [name], [0], {})
    assert not isinstance(caught.value, FormatError)


@pytest.mark.parametrize("name", ["a", "r/.data/x", "r/...", "r/..a", "r/ x", "C:/x", "r/", "ü/ß"])
def test_a_name_that_looks_like_those_but_is_none(name: str) -> None:
    assert files.scan(build([Record(name, b"")])).names == [name]


TWINS = {
    "the same": ("r/x", "r/x", "expected one record of this name, found two"),
    "case": ("r/x", "r/X", "expected names that differ in more than case, found 'r/x' too"),
    "case of the root": ("r/x", "R/x", "expected names that differ in more than case"),
}


@pytest.mark.parametrize(("one", "two", "text"), TWINS.values(), ids=TWINS)
def test_names_that_some_reader_takes_for_one(one: str, two: str, text: str) -> None:
    with pytest.raises(FormatError, match=rf"record '{two}': " + text):
        files.scan(build([A, Record(one), B, Record(two, b"other")]))


def test_names_that_two_encodings_make_one() -> None:
    code = "ü".encode("cp437")
    with pytest.raises(FormatError, match="record 'ü': expected one record of this name"):
        files.scan(build([Record("ü"), Record(code, flags=0)]))


def test_ten_thousand_equal_names_are_found_at_once() -> None:
    with pytest.raises(FormatError, match="expected one record of this name"):
        files.scan(build([Record("r/x", b"")] * 10_000))


def wrong(size: int = 7, packed: int = 7, crc: int | None = None, form: str = "III") -> bytes:
    number = zlib.crc32(b"payload") if crc is None else crc
    return struct.pack("<" + form, number, packed, size)


MARK = b"PK\x07\x08"
DESCRIPTORS = {
    "no signature": (b"PK\x07\x09" + wrong(), "expected a data descriptor, found something else"),
    "CRC-32": (MARK + wrong(crc=5), "expected the CRC-32 .*, found 00000005 in its descriptor"),
    "no CRC-32": (MARK + wrong(crc=0), "expected the CRC-32 .*, found 00000000"),
    "size": (MARK + wrong(size=8), "expected a size of 7 bytes, .*, found 8 in its descriptor"),
    "packed": (MARK + wrong(packed=6), "expected 7 bytes in the file, .*, found 6 in its desc"),
    "wide size": (MARK + wrong(size=8, form="IQQ"), "expected a size of 7 bytes, .*, found 8"),
    "bare size": (wrong(size=8), "expected a size of 7 bytes, .*, found 8"),
    "bare wide packed": (wrong(packed=1 << 40, form="IQQ"), "expected 7 bytes in the file"),
    "none": (b"", None),
    "cut off": (MARK + wrong()[:-1], "at most a descriptor of 24 bytes .*, found 15 bytes"),
    "too long": (MARK + wrong(form="IQQ") + b"x", "descriptor of 24 bytes .*, found 25 bytes"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("descriptor", "text"), DESCRIPTORS.values(), ids=DESCRIPTORS)
def test_a_descriptor_that_is_wrong(descriptor: bytes, text: str | None, last: bool) -> None:
    record = described("r/x")
    record.descriptor = descriptor
    records = [A, record] if last else [A, record, B]
    text = text or "at most a descriptor of 24 bytes behind its payload, found 0 bytes"
    with pytest.raises(FormatError, match=r"^x\.zip: record 'r/x': .*" + text):
        files.scan(build(records))


@pytest.mark.parametrize("form", ["III", "IQQ"])
@pytest.mark.parametrize("mark", [MARK, b""])
@pytest.mark.parametrize("last", [False, True])
def test_every_descriptor_that_there_is_is_taken(form: str, mark: bytes, last: bool) -> None:
    record = described("r/x")
    record.descriptor = mark + wrong(form=form)
    assert len(files.scan(build([A, record] if last else [record, A]))) == 2


def test_a_file_that_became_shorter() -> None:
    def read(offset: int, nbytes: int) -> bytes:
        return GOOD[offset : offset + nbytes][:-1]

    with pytest.raises(
        FormatError, match=rf"x\.zip: expected {len(GOOD)} bytes at offset 0, found"
    ):
        _zip.scan(read, len(GOOD), "x.zip")


def test_a_reader_that_fails_is_heard() -> None:
    def read(offset: int, nbytes: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        _zip.scan(read, 100, "x.zip")


UNSEEN = ["flags, local only", "size, local only", "CRC-32, local only", "method, local only"]
UNSEEN += ["a gap", "a zip64 field for nothing"]


@pytest.mark.parametrize("key", UNSEEN)
def test_what_others_do_not_look_at_is_looked_at(key: str) -> None:
    with zipfile.ZipFile(io.BytesIO(RECORDS[key][0])) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 2
