"""The headers of a tar: where its members stand, or a refusal that says why."""

from __future__ import annotations

import tarfile

import pytest

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import _tar, _window
from holdfast.formats._pickle import Truncated
from holdfast.formats._window import FIRST, Window

DATA = {"storages": b"s" * 700, "tensors": b"", "pickle": b"p" * 512}


def members(data: bytes, size: int | None = None) -> dict[str, tuple[int, int]]:
    return _tar.members(Window(files.reader(data), len(data) if size is None else size, "x.tar"))


def found(data: bytes, size: int | None = None) -> dict[str, bytes]:
    return {name: data[at : at + n] for name, (at, n) in members(data, size).items()}


def entry(name: str = "storages", **fields: object) -> tarfile.TarInfo:
    head = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(head, key, value)
    return head


@pytest.mark.parametrize("size", [None, -1])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_found(form: int, size: int | None) -> None:
    data = files.tar(DATA, format=form)
    if form == tarfile.GNU_FORMAT:
        assert data[257:265] == b"ustar  \0"
    assert found(data, size) == DATA


def test_a_tar_as_python_3_wrote_it_has_pax_records() -> None:
    heads = [(entry(name, mtime=1.5), data) for name, data in DATA.items()]
    data = files.tar(heads, format=tarfile.PAX_FORMAT)
    assert data.count(b"mtime=1.5") == 3
    assert found(data) == DATA


def test_pax_records_override_name_and_size() -> None:
    long = "x" * 300
    data = files.tar({long: b"abc"}, format=tarfile.PAX_FORMAT)
    assert b"path=" in data
    assert found(data) == {long: b"abc"}
    size = files.tar([(entry(pax_headers={"size": "3"}), b"abc")], format=tarfile.PAX_FORMAT)
    assert b" size=3\n" in size
    at = size.index(b"storages", 1024)
    assert found(restate(size, at, b"00000000777\0")) == {"storages": b"abc"}


def restate(data: bytes, at: int, size: bytes) -> bytes:
    """The header at `at` with another size field, and a checksum that fits."""
    head = bytearray(data[at : at + 512])
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:at] + bytes(head) + data[at + 512 :]


def test_a_size_in_binary() -> None:
    data = restate(files.tar({"storages": b"abc"}), 0, b"\x80" + (3).to_bytes(11, "big"))
    assert found(data) == {"storages": b"abc"}


def test_a_checksum_of_signed_bytes() -> None:
    data = bytearray(files.tar({"\u00e9": b"abc"}))
    data[148:156] = b"%06o\0 " % (int(data[148:154], 8) - 2 * 256)
    assert found(bytes(data)) == {"\u00e9": b"abc"}


def test_directories_are_passed_over() -> None:
    heads = [(entry("d", type=tarfile.DIRTYPE), b""), *((entry(n), d) for n, d in DATA.items())]
    assert found(files.tar(heads)) == DATA


def test_a_tar_without_end_blocks() -> None:
    data = files.tar(DATA)
    last = members(data)["pickle"]
    assert found(data[: sum(last)]) == DATA


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (tarfile.SYMTYPE, "b'2'"),
        (tarfile.LNKTYPE, "b'1'"),
        (tarfile.FIFOTYPE, "b'6'"),
        (tarfile.CHRTYPE, "b'3'"),
        (tarfile.GNUTYPE_SPARSE, "b'S'"),
        (tarfile.GNUTYPE_LONGNAME, "b'L'"),
        (tarfile.CONTTYPE, "b'7'"),
    ],
)
def test_what_is_no_plain_file_is_refused(kind: bytes, text: str) -> None:
    data = bytearray(files.tar({"storages": b"abc"}))
    data[156:157] = kind
    with pytest.raises(FormatError, match=f"x.tar: tar header at offset 0: .*type {text}"):
        members(restate(bytes(data), 0, bytes(data[124:136])))


def test_a_name_twice() -> None:
    data = files.tar([(entry(), b"abc"), (entry(), b"def")])
    with pytest.raises(FormatError, match="'storages' stands at offset 512 and again at offset"):
        members(data)


def test_a_wrong_checksum() -> None:
    data = bytearray(files.tar(DATA))
    data[0] ^= 1
    with pytest.raises(FormatError, match="offset 0: expected checksum .*, found"):
        members(bytes(data))


@pytest.mark.parametrize("field", [b"-0000000001\0", b"\xff" * 12, b" " * 12, b"0000000x\0\0\0\0"])
def test_a_size_that_is_none(field: bytes) -> None:
    with pytest.raises(FormatError, match="offset 0: size: expected octal digits, found"):
        members(restate(files.tar(DATA), 0, field))


@pytest.mark.parametrize("field", [b"77777777777\0", b"\x80" + (1 << 62).to_bytes(11, "big")])
@pytest.mark.parametrize("size", [None, -1])
def test_a_member_behind_the_end(field: bytes, size: int | None) -> None:
    data = restate(files.tar({"storages": b"abc"}), 0, field)
    with pytest.raises(FormatError, match="needs [0-9]+ bytes at offset .* ends at"):
        members(data, size)


def test_too_many_headers() -> None:
    data = files.tar({f"m{i}": b"" for i in range(100)})
    with pytest.raises(FormatError, match="more than 64 headers"):
        members(data)


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"GNU.sparse.major": "1"}, "found b'GNU.sparse.major'"),
        ({"linkpath": "/etc/passwd"}, "found b'linkpath'"),
        ({"size": "-5"}, "expected a size, found '-5'"),
        ({"size": "9" * 19}, "expected a size"),
        ({"size": "\u0663"}, "expected a size"),
        ({"comment": "x" * 70_000}, "expected at most 65536 bytes of pax records"),
    ],
)
def test_pax_records_that_are_refused(headers: dict[str, str], text: str) -> None:
    data = files.tar([(entry(pax_headers=headers), b"abc")], format=tarfile.PAX_FORMAT)
    with pytest.raises(FormatError, match=text):
        members(data)


@pytest.mark.parametrize(
    "record", [b"9999 a=b\n", b"0 a=b\n", b"4 ab\n=", b"a=b\n", b"5 abc\n", b"7"]
)
def test_pax_records_of_a_wrong_form(record: bytes) -> None:
    head = entry(type=tarfile.XHDTYPE)
    head.size = len(record)
    data = head.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + files.tar(DATA)
    with pytest.raises(FormatError, match="pax record at offset 512: expected '<length>"):
        members(data)


def test_pax_records_for_all_members_do_not_name_one() -> None:
    head = entry(type=tarfile.XGLTYPE)
    record = b"12 path=abc\n"
    head.size = len(record)
    start = head.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    with pytest.raises(FormatError, match="expected b'path' once, of one member"):
        members(start + files.tar(DATA))
    assert set(members(start.replace(b"path", b"pith") + files.tar(DATA))) == set(DATA)


def test_two_pax_headers_of_one_member() -> None:
    head = entry(type=tarfile.XHDTYPE)
    record = b"12 path=abc\n"
    head.size = len(record)
    twice = 2 * (head.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0"))
    with pytest.raises(FormatError, match="offset 1024: two of one member"):
        members(twice + files.tar(DATA))


def test_another_magic() -> None:
    data = bytearray(files.tar(DATA))
    data[257:262] = b"vstar"
    with pytest.raises(FormatError, match="expected b'ustar' at its byte 257, found b'vstar'"):
        members(bytes(data))


@pytest.mark.parametrize("size", [None, -1])
def test_cut_anywhere(size: int | None) -> None:
    data = files.tar(DATA)
    ends = [0, *(at + n for at, n in members(data).values())]
    for length in range(sum(members(data)["pickle"]) + 1):
        cut = data[:length]
        try:
            names = list(members(cut, None if size is None else -1))
        except FormatError:
            continue
        # Not noticed only where a header is due: then the members before are whole.
        assert length >= ends[len(names)]
        assert size == -1 or len(names) < 3 or length >= ends[3]


@pytest.mark.parametrize("stop", [True, False])
def test_windows_find_the_end_of_a_stream(stop: bool) -> None:
    data = bytes(range(256)) * 3
    window = Window(files.reader(data), len(data) if stop else -1, "x")
    assert bytes(window.most(700, 100)) == data[700:]
    assert window.stop == len(data)
    assert bytes(window.most(5000, 100)) == b""
    assert bytes(window.take(10, 20, "it")) == data[10:30]
    with pytest.raises(
        FormatError, match="^x: it: needs 20 bytes at offset 760, file ends at 768$"
    ):
        window.take(760, 20, "it")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 255, 256, 257])
@pytest.mark.parametrize("offset", [0, 1, 100, 256, 1000])
def test_the_end_of_any_stream(length: int, offset: int) -> None:
    data = bytes(length)
    window = Window(files.reader(data), -1, "x")
    assert bytes(window.most(offset, 2000)) == data[offset:]
    assert window.stop == length


def test_a_window_grows_until_it_suffices() -> None:
    log: list[tuple[int, int]] = []
    data = bytes(10 * FIRST)
    window = Window(files.reader(data, log=log), len(data), "x")
    asked: list[int] = []

    def parse(part: memoryview) -> int:
        asked.append(len(part))
        if len(part) <= 2 * FIRST:
            raise Truncated("short", len(part) + 1)
        return len(part)

    assert window.grow(8, parse) == 4 * FIRST
    assert asked == [FIRST, 4 * FIRST]
    assert log == [(8, FIRST), (8, 4 * FIRST)]


@pytest.mark.parametrize("size", [10, -1])
def test_a_window_grows_to_the_end_and_no_further(size: int) -> None:
    asked: list[int] = []

    def parse(part: memoryview) -> None:
        asked.append(len(part))
        raise Truncated("short", len(part) + 1)

    window = Window(files.reader(bytes(10)), size, "x")
    with pytest.raises(Truncated, match="short"):
        window.grow(2, parse, 3)
    assert asked == [3, 8]


def test_a_window_grows_no_further_than_is_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_window, "MOST", 100)
    asked: list[int] = []

    def parse(part: memoryview) -> None:
        asked.append(len(part))
        raise Truncated("short", len(part) + 1)

    with pytest.raises(Truncated):
        Window(files.reader(bytes(1000)), 1000, "x").grow(0, parse, 3)
    assert asked == [3, 12, 48, 100]


@pytest.mark.parametrize(("needed", "expected"), [(998, [3, 998]), (999, [3]), (1 << 62, [3])])
def test_a_window_does_not_grow_where_it_cannot_suffice(needed: int, expected: list[int]) -> None:
    asked: list[int] = []

    def parse(part: memoryview) -> None:
        asked.append(len(part))
        raise Truncated("short", needed)

    with pytest.raises(Truncated):
        Window(files.reader(bytes(1000)), 1000, "x").grow(2, parse, 3)
    assert asked == expected


def test_reading_ahead() -> None:
    log: list[tuple[int, int]] = []
    data = bytes(range(100))
    for size in (100, -1):
        log.clear()
        window = Window(files.reader(data, log=log), size, "x", "file", 40)
        for at in range(0, 95, 5):
            assert bytes(window.take(at, 5, "it")) == data[at : at + 5]
        assert log[:2] == [(0, 40), (40, 40)]
        assert log[-1] == (80, 20)
