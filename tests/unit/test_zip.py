"""The zip container: what is written is read back, and stands where PyTorch would put it."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import zip_files as files
from holdfast.formats import _zip
from zip_files import Record, build

GOLDEN = Path(__file__).parents[1] / "golden"


def written(
    root: str, payloads: dict[str, bytes], external: set[str], alignment: int = 64
) -> tuple[_zip.Skeleton, bytes]:
    names = list(payloads)
    inline = {i: payloads[n] for i, n in enumerate(names) if n not in external}
    rest = {i: payloads[n] for i, n in enumerate(names) if n in external}
    sizes = np.array([len(data) for data in payloads.values()], np.uint64)
    skeleton = _zip.emit(root, names, sizes, inline, alignment)
    skeleton.stamp(
        np.array(list(rest), np.int64), np.array([zlib.crc32(d) for d in rest.values()], np.uint32)
    )
    return skeleton, files.assemble(skeleton, rest)


PAYLOADS = {
    "data.pkl": b"\x80\x02.",
    "byteorder": b"little",
    "data/0": bytes(range(256)) * 3,
    "data/1": b"",
    "data/2": b"x",
    "version": b"3\n",
}


@pytest.mark.parametrize("external", [set(), {"data/0", "data/1", "data/2"}, set(PAYLOADS)])
@pytest.mark.parametrize("alignment", [1, 7, 64, 4096, 32768])
def test_what_is_written_is_read(external: set[str], alignment: int) -> None:
    skeleton, data = written("model", PAYLOADS, external, alignment)
    assert len(data) == skeleton.size
    found = files.scan(data)
    assert found.root == "model"
    assert found.names == [f"model/{name}" for name in PAYLOADS]
    assert len(found) == len(PAYLOADS)
    assert (found.rows["offset"] == skeleton.offsets).all()
    assert not (found.rows["offset"] % alignment).any()
    for name, payload in PAYLOADS.items():
        assert files.extract(data, f"model/{name}") == payload
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {n: archive.read(f"model/{n}") for n in PAYLOADS} == PAYLOADS


def test_the_bytes_of_a_record() -> None:
    """As formats.md 2.1 has them: `a/data.pkl` at 0, its payload at 64."""
    _, data = written("a", {"data.pkl": b"\x80\x02.", "data/0": b""}, set())
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x808, 0, 0, 0, 0, 0, 0, 10, 24)
    crc = zlib.crc32(b"\x80\x02.")
    first = head + b"a/data.pkl" + b"FB\x14\x00" + b"Z" * 20 + b"\x80\x02."
    first += struct.pack("<IIII", 0x08074B50, crc, 3, 3)
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x800, 0, 0, 0, 0, 0, 0, 8, 7)
    second = head + b"a/data/0" + b"FB\x03\x00ZZZ"
    central = files.fields(files.CENTRAL, made=0, needed=0, flags=0x808, method=0, crc=crc,
                           packed=3, size=3, name_length=10, extra_length=0, comment_length=0,
                           header=0) + b"a/data.pkl"  # fmt: skip
    central += files.fields(files.CENTRAL, made=0, needed=0, flags=0x800, method=0, crc=0,
                            packed=0, size=0, name_length=8, extra_length=0, comment_length=0,
                            header=83) + b"a/data/0"  # fmt: skip
    place = {"here": 2, "count": 2, "size": len(central), "start": 128}
    tail = files.fields(files.END64, made=0x031E, **place)
    tail += files.fields(files.LOCATOR, offset=128 + len(central))
    tail += files.fields(files.END, comment_length=0, **place)
    assert data == first + second + central + tail
    assert len(tail) == 98


def sparse(sizes: list[int]) -> tuple[_zip.Skeleton, Callable[[int, int], bytes], list[int]]:
    """An archive with holes for its payloads, and a record at its end."""
    names = [f"data/{i}" for i in range(len(sizes))] + ["version"]
    skeleton = _zip.emit("big", names, np.array([*sizes, 2], np.uint64), {len(sizes): b"3\n"})
    asked = []

    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert offset + nbytes <= skeleton.size
        asked.append(nbytes)
        out = bytearray(nbytes)
        for at, length, start in zip(
            skeleton.piece_offset.tolist(),
            skeleton.piece_nbytes.tolist(),
            skeleton.piece_start.tolist(),
            strict=True,
        ):
            low, high = max(at, offset), min(at + length, offset + nbytes)
            if low < high:
                out[low - offset : high - offset] = skeleton.data[
                    start + low - at : start + high - at
                ]
        return bytes(out)

    return skeleton, read, asked


G4 = 1 << 32
LARGE = {
    "a large record": ([G4 + 64, 16, 0], [True, True, True]),
    "at the limit": ([G4 - 1, 3], [True, True]),
    "below the limit": ([G4 - 2, 3], [False, True]),
    "below, and together": ([G4 - 200, 100, 100], [False, False, True]),
    "petabytes": ([1 << 50, 1 << 50], [True, True]),
}


@pytest.mark.parametrize(("sizes", "wide"), LARGE.values(), ids=LARGE)
def test_records_beyond_32_bits(sizes: list[int], wide: list[bool]) -> None:
    skeleton, read, asked = sparse(sizes)
    skeleton.stamp(np.arange(len(sizes)), np.arange(1, len(sizes) + 1))
    found = _zip.scan(read, skeleton.size, "big.pt")
    assert found.rows["size"].tolist() == [*sizes, 2]
    assert (found.rows["offset"] == skeleton.offsets).all()
    assert not (skeleton.offsets % np.uint64(64)).any()
    crcs = [0 if size == 0 else i + 1 for i, size in enumerate(sizes)]
    assert found.rows["crc"].tolist() == [*crcs, zlib.crc32(b"3\n")]
    assert _zip.extract(read, found, len(sizes), "big.pt", limit=10) == b"3\n"
    assert sum(asked) < (1 << 18), "payloads were read"
    for i, expected in enumerate(wide):
        header = read(int(found.rows["header"][i]), 30)
        length, extra = struct.unpack("<HH", header[26:])
        field = read(int(found.rows["header"][i]) + 30 + length, extra)
        assert field.startswith(b"\x01\x00") == expected


def test_the_zip64_field_of_a_record_is_that_of_pytorch() -> None:
    """Size, a packed size that is not known yet, and where the header stands, each if it must."""
    skeleton, read, _ = sparse([G4 - 1, G4 - 1])
    field = struct.pack("<HHQQ", 1, 16, G4 - 1, 0)
    assert read(30 + 10, 24)[:20] == field
    at = int(_zip.scan(read, skeleton.size, "big.pt").rows["header"][1])
    assert read(at + 40, 28) == struct.pack("<HHQQQ", 1, 24, G4 - 1, 0, at)
    assert read(int(skeleton.offsets[0]) + G4 - 1, 24) == struct.pack(
        "<IIQQ", 0x08074B50, 0, G4 - 1, G4 - 1
    )
    at = int(_zip.scan(read, skeleton.size, "big.pt").rows["header"][2])
    # A descriptor is wide where the header is, be the record as small as it may.
    assert read(int(skeleton.offsets[2]) + 2, 24)[8:] == struct.pack("<QQ", 2, 2)
    assert at > G4


def test_more_records_than_16_bits_count() -> None:
    n = 70_000
    skeleton = _zip.emit("r", [str(i) for i in range(n)], np.zeros(n, np.uint64), {})
    found = files.scan(files.assemble(skeleton, {}))
    assert len(found) == n
    assert found.names[-1] == f"r/{n - 1}"
    assert found.find("r/65535") == 65535
    end = struct.unpack("<IHHHHIIH", skeleton.data[-22:])
    assert end[3] == 0xFFFF


def test_pieces_and_the_late_ones() -> None:
    names = ["data.pkl", "data/0", "data/1", "data/2", "empty", "version"]
    sizes = np.array([3, 10, 20, 30, 0, 2], np.uint64)
    skeleton = _zip.emit("m", names, sizes, {0: b"abc", 5: b"3\n"})
    assert len(skeleton.piece_offset) == 4
    ends = skeleton.piece_offset + skeleton.piece_nbytes
    assert ends[:-1].tolist() == skeleton.offsets[1:4].tolist()
    assert (ends[:-1] + sizes[1:4]).tolist() == skeleton.piece_offset[1:].tolist()
    assert int(ends[-1]) == skeleton.size
    assert int(skeleton.piece_nbytes.sum()) == len(skeleton.data)

    def late(*rows: int) -> list[int]:
        mask = np.zeros(6, bool)
        mask[list(rows)] = True
        found = skeleton.late(mask)
        assert found.dtype == np.int64
        return found.tolist()

    assert late() == [3]
    assert late(0, 4, 5) == [3]
    assert late(1) == [1, 3]
    assert late(1, 2) == [1, 2, 3]
    assert late(3) == [3]
    assert late(0, 1, 2, 3, 4, 5) == [1, 2, 3]
    before = bytes(skeleton.data)
    skeleton.stamp(np.array([2]), np.array([0xAABBCCDD], np.uint32))
    changed = [i for i, (a, b) in enumerate(zip(before, skeleton.data, strict=True)) if a != b]
    assert len(changed) == 8
    pieces = np.searchsorted(skeleton.piece_start, changed, side="right") - 1
    assert pieces.tolist() == [2] * 4 + [3] * 4


def test_an_archive_of_nothing() -> None:
    skeleton = _zip.emit("r", [], np.zeros(0, np.uint64), {})
    assert skeleton.size == 98
    assert skeleton.late(np.zeros(0, bool)).tolist() == [0]
    found = files.scan(bytes(skeleton.data))
    assert (len(found), found.names, found.root, found.find("x")) == (0, [], None, -1)
    with zipfile.ZipFile(io.BytesIO(bytes(skeleton.data))) as archive:
        assert archive.namelist() == []


def test_what_cannot_be_written() -> None:
    one = np.array([1], np.uint64)
    for root in ("", "a/b", "..", "a\\b", "a\0"):
        with pytest.raises(ValueError, match="one part of a path, without NUL and backslash"):
            _zip.emit(root, ["x"], one, {})
    with pytest.raises(ValueError, match=r"record 'A': another record has the same name but for"):
        _zip.emit("r", ["a", "A"], np.zeros(2, np.uint64), {})
    with pytest.raises(ValueError, match="its name has 65536 bytes with the root, at most 65535"):
        _zip.emit("r", ["x" * 65534], one, {})
    assert _zip.emit("r", ["x" * 65533], one, {}).size > 2 * 65533
    with pytest.raises(ValueError, match="are more than a file can have"):
        _zip.emit("r", ["x", "y"], np.array([1 << 62, 1 << 62], np.uint64), {})
    with pytest.raises(ValueError, match="are more than a file can have"):
        _zip.emit("r", ["x"], np.array([2**64 - 1], np.uint64), {})
    with pytest.raises(ValueError, match="a folder cannot have 1 bytes"):
        _zip.emit("r", ["x/"], one, {})
    with pytest.raises(ValueError, match="its size is 1, its bytes are 2"):
        _zip.emit("r", ["x"], one, {0: b"ab"})
    with pytest.raises(ValueError, match="1 names, 2 sizes"):
        _zip.emit("r", ["x"], np.zeros(2, np.uint64), {})
    with pytest.raises(ValueError, match="expected 1 to 32768, found 0"):
        _zip.emit("r", ["x"], one, {}, 0)
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        _zip.emit("r", ["\udc80"], one, {})
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        _zip.emit("\udc80", ["x"], one, {})
    with pytest.raises(IndexError, match="row 1 of 1"):
        _zip.emit("r", ["x"], one, {1: b"a"})
    with pytest.raises(TypeError, match="expected bytes, found bytearray"):
        _zip.emit("r", ["x"], one, {0: bytearray(b"a")})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="expected a str, found bytes"):
        _zip.emit("r", [b"x"], one, {})  # type: ignore[list-item]


def test_stamps_that_have_no_place() -> None:
    skeleton = _zip.emit("r", ["x"], np.array([1], np.uint64), {})
    with pytest.raises(IndexError, match="row 1 of 1"):
        skeleton.stamp(np.array([1]), np.array([1]))
    with pytest.raises(IndexError, match="row -1 of 1"):
        skeleton.stamp(np.array([-1]), np.array([1]))
    with pytest.raises(ValueError, match="2 rows, 1 checksums"):
        skeleton.stamp(np.array([0, 0]), np.array([1]))
    with pytest.raises(ValueError, match="a mask of shape"):
        skeleton.late(np.zeros(2, bool))
    del skeleton.data[10:]
    with pytest.raises(ValueError, match="now it has 10"):
        skeleton.stamp(np.array([0]), np.array([1]))


@pytest.mark.parametrize("kind", [_zip.Directory, _zip.Skeleton])
def test_they_are_made_by_functions_alone(kind: type) -> None:
    with pytest.raises(TypeError, match="is what .* returns"):
        kind()


# ---- reading --------------------------------------------------------------------------------


def test_names_are_found_exactly() -> None:
    records = [Record("r/Data"), Record("r/ü"), Record("é".encode("cp437"), flags=0)]
    found = files.scan(build(records))
    assert found.names == ["r/Data", "r/ü", "é"]
    assert found.root is None
    assert [found.find(name) for name in found.names] == [0, 1, 2]
    for name in ("r/data", "Data", "r/Ü", "", "r/Data\0", "\udc80", "r/Dat"):
        assert found.find(name) == -1
    plain = files.scan(build([Record("r/Data")]))
    assert (plain.find("r/Data"), plain.find("r/data"), plain.find("ü")) == (0, -1, -1)
    with pytest.raises(TypeError):
        plain.find(None)  # type: ignore[arg-type]


ROOTS = [
    (["a/x", "a/y/z", "a/"], "a"),
    (["a/x", "ab/x"], None),
    (["a/x", "b"], None),
    (["b", "a/x"], None),
    (["b"], None),
    (["a b/x"], "a b"),
    (["ü/x", "ü/y"], "ü"),
    (["a/x", "a/y", "b/z"], None),
]


@pytest.mark.parametrize(("names", "root"), ROOTS)
def test_the_folder_that_all_are_in(names: list[str], root: str | None) -> None:
    assert files.scan(build([Record(name, b"") for name in names])).root == root


def test_rows_cannot_be_changed() -> None:
    found = files.scan(build([Record("r/x")]))
    assert found.rows.dtype == _zip.RECORD
    with pytest.raises(ValueError, match="read-only"):
        found.rows["offset"][0] = 5


def test_a_directory_in_another_order_than_the_records() -> None:
    first, second = Record("r/a", b"first"), Record("r/b", b"second")
    swapped = [
        Record("r/a", b"first", central={"header": 0}),
        Record("r/b", b"second", central={"header": 30 + 3 + 5}),
    ]
    data = build([first, second])
    start = files.scan(data).start
    entries = build(swapped)[start : start + 98]
    data = data[:start] + entries[49:] + entries[:49] + data[start + 98 :]
    found = files.scan(data)
    assert found.names == ["r/b", "r/a"]
    assert files.extract(data, "r/a") == b"first"
    assert files.extract(data, "r/b") == b"second"


def test_extra_fields_and_comments_that_say_nothing_new() -> None:
    unicode = struct.pack("<HHBI", 0x7075, 5 + 3, 1, zlib.crc32(b"r/x")) + b"r/x"
    data = build(
        [
            Record("r/a", comment=b"a comment", central_extra=b"\x01\x02"),
            Record("r/x", extra=unicode + b"\0\0\0", central_extra=unicode),
        ],
        comment=b"PK of the archive",
    )
    assert files.scan(data).names == ["r/a", "r/x"]
    assert files.extract(data, "r/x") == b"payload"


@pytest.mark.parametrize("length", [0, 90, 5000, 65535 - 4])
@pytest.mark.parametrize("distance", [0, 20_000, 1_200_000])
def test_extra_fields_of_any_length_at_any_distance(length: int, distance: int) -> None:
    """The headers are read by windows, which an extra field may not fit into."""
    extra = struct.pack("<HH", 0x4246, length) + b"Z" * length
    records = [Record(f"r/{i}", bytes(distance), extra=extra) for i in range(3)]
    data = build(records)
    found = files.scan(data)
    expected = [i * (30 + 3 + len(extra) + distance) + 33 + len(extra) for i in range(3)]
    assert found.rows["offset"].tolist() == expected
    # What is behind the window is compared too.
    wrong = bytearray(data)
    wrong[expected[2] - len(extra) - 1] ^= 1
    with pytest.raises(ValueError, match="record 'r/2': expected the same name in its local"):
        files.scan(bytes(wrong))


def reads(n: int, size: int) -> tuple[list[int], int]:
    names = [f"data/{i}" for i in range(n)]
    skeleton = _zip.emit("r", names, np.full(n, size, np.uint64), {})
    payload = bytes(size)
    data = files.assemble(skeleton, dict.fromkeys(range(n), payload))
    asked = []

    def read(offset: int, nbytes: int) -> memoryview:
        assert offset + nbytes <= len(data)
        asked.append(nbytes)
        return memoryview(data)[offset : offset + nbytes]

    assert len(_zip.scan(read, len(data), "x.zip")) == n
    return asked, len(data)


def test_headers_near_each_other_are_read_together() -> None:
    asked, size = reads(5000, 1024)
    assert len(asked) <= size // (1 << 20) + 3
    assert max(asked) <= (1 << 20) + (32 << 10)
    asked, size = reads(10, 1024)
    assert asked == [size]


def test_payloads_are_not_read_that_are_large() -> None:
    asked, size = reads(50, 100_000)
    assert size > 5_000_000
    assert sum(asked) < (1 << 17) + 50 * 512
    assert len(asked) == 50, "the last record is in what was read to find the directory"


@pytest.mark.parametrize("compressed", [False, True])
def test_archives_of_numpy(compressed: bool) -> None:
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, weight=np.arange(5000.0), **{"layer/bias": np.zeros(3)})
    data = file.getvalue()
    found = files.scan(data)
    assert found.root is None
    assert found.names == ["weight.npy", "layer/bias.npy"]
    assert set(found.rows["method"].tolist()) == {8 if compressed else 0}
    loaded = np.load(io.BytesIO(files.extract(data, "weight.npy")))
    assert (loaded == np.arange(5000.0)).all()


class Pipe(io.RawIOBase):
    """A file that cannot seek."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += data
        return len(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seekable", [False, True])
def test_archives_of_python(method: int, wide: bool, seekable: bool) -> None:
    target = io.BytesIO() if seekable else Pipe()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name in ("r/a", "r/ü", "r/empty"):
            with archive.open(name, "w", force_zip64=wide) as file:
                file.write(name.encode() * 1000 if name != "r/empty" else b"")
        archive.writestr("r/folder/", b"")
        archive.comment = b"by Python"
    data = target.getvalue() if isinstance(target, io.BytesIO) else bytes(target.data)
    found = files.scan(data)
    assert found.names == ["r/a", "r/ü", "r/empty", "r/folder/"]
    for name in ("r/a", "r/ü"):
        assert files.extract(data, name) == name.encode() * 1000
    assert files.extract(data, "r/empty") == b""


def test_archives_of_pytorch() -> None:
    paths = [*sorted((GOLDEN / "torch").glob("*.pt")), *sorted((GOLDEN / "programs").glob("*.pt*"))]
    paths = [path for path in paths if path.read_bytes()[:4] == b"PK\x03\x04"]
    assert len(paths) >= 10
    again = 0
    for path in paths:
        data = path.read_bytes()
        found = files.scan(data, path.name)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.namelist() == found.names
            payloads = {name: archive.read(name) for name in found.names}
        for name, payload in payloads.items():
            assert files.extract(data, name) == payload
        if "torch2" in path.name and (found.rows["method"] == 0).all():
            root = f"{found.root}/"
            inner = {name.removeprefix(root): payload for name, payload in payloads.items()}
            storages = {name for name in inner if name.startswith("data/")}
            assert written(root[:-1], inner, storages)[1] == data
            again += 1
    assert again >= 5
