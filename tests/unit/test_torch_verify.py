"""A flipped bit of a file of torch's is reported, or changes nothing that was saved."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast

PROGRAMS = Path(__file__).parents[1] / "golden" / "programs"
NUMPY: dict[str, Any] = {"framework": "numpy"}


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "m": {"a": rng.random((3, 5), "f4"), "e": np.zeros((0, 2))},
        "n": [1, b"x", "y"],
        "b": np.array([True, False]),
    }


def saved(**options: Any) -> bytes:
    out = io.BytesIO()
    holdfast.save(sample(), out, format="torch", metadata={"k": "v"}, **options)
    return out.getvalue()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def payloads(data: bytes) -> dict[str, tuple[int, int]]:
    """Where the content of each record stands."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            lengths = data[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(np.frombuffer(lengths, "<u2").tolist())
            found[info.filename] = (start, start + info.file_size)
    return found


def idle(data: bytes) -> set[int]:
    """Places whose bits say nothing: what readers of zip archives skip, by their own names."""
    places: set[int] = set()

    def add(start: int, *fields: tuple[int, int]) -> None:
        for offset, nbytes in fields:
            places.update(range(start + offset, start + offset + nbytes))

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
    for info, (start, _) in zip(infos, payloads(data).values(), strict=True):
        local = info.header_offset
        # Version needed, time and date; sizes and checksum that stand behind the content, of which
        # the bit that makes them the right ones; the padding.
        add(local, (4, 2), (10, 4), (14, 12))
        begin = local + 30 + len(info.filename)
        add(begin, (0, start - begin))
    entry = data.index(b"PK\x01\x02")
    for info in infos:
        add(entry, (4, 4), (12, 4), (34, 8))  # made by, needed; time, date; disk, attributes
        entry += 46 + len(info.filename)
    end64 = data.index(b"PK\x06\x06")
    add(end64, (12, 4))  # made by, needed
    add(data.index(b"PK\x06\x07"), (16, 4))  # the number of disks
    return places


def test_every_flipped_bit() -> None:
    whole = bytearray(saved())
    skipped = idle(bytes(whole))
    inside = {
        place for start, stop in payloads(bytes(whole)).values() for place in range(start, stop)
    }
    assert not skipped & inside
    seen = unseen = 0
    for place in range(len(whole)):
        for bit in range(8):
            whole[place] ^= 1 << bit
            data = bytes(whole)
            whole[place] ^= 1 << bit
            report = holdfast.verify(io.BytesIO(data))
            seen += not report.ok
            unseen += report.ok
            assert not report.ok or place in skipped, (place, bit)
            try:
                found = holdfast.load(io.BytesIO(data), **NUMPY)
                with holdfast.open(io.BytesIO(data), **NUMPY) as f:
                    metadata = f.metadata
            except holdfast.FormatError:
                assert not report.ok, (place, bit)
            else:
                assert same(found, sample()), (place, bit)
                assert metadata == {"k": "v"}, (place, bit)
    assert seen + unseen == 8 * len(whole)
    assert seen > 8 * len(inside) and unseen > 0


@pytest.mark.parametrize("record", ["version", ".format_version", ".storage_alignment"])
def test_records_that_nothing_here_reads(tmp_path: Path, record: str) -> None:
    """But torch may: what they say decides whether it opens the file, and where it looks."""
    data = bytearray(saved())
    start, _ = payloads(bytes(data))[f"archive/{record}"]
    data[start] ^= 2
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    report = holdfast.verify(path)
    assert len(report.problems) == 1 and (report.checked, report.unchecked) == (3, 0)
    assert re.search(rf"x\.pt: record 'archive/{record}'.*offset {start} .*expected CRC-32 .*found",
                     report.problems[0])  # fmt: skip
    assert same(holdfast.load(path, **NUMPY), sample())


@pytest.mark.parametrize("name", ["script-torch1.9.1.pt", "export-torch2.13.0.pt2"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_record_of_a_program(tmp_path: Path, name: str, method: int) -> None:
    """Of a program all is checked: its code too, although no tensor is made of it."""
    original = (PROGRAMS / name).read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(out, "w", method) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    data = out.getvalue()
    assert holdfast.verify(io.BytesIO(data)).ok
    damaged = 0
    for record, (start, _) in payloads(data).items():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = archive.getinfo(record)
        if info.compress_size == 0:
            continue
        wrong = bytearray(data)
        wrong[start + info.compress_size // 2] ^= 8
        report = holdfast.verify(io.BytesIO(wrong))
        assert not report.ok, record
        assert "BytesIO" in report.problems[0]
        damaged += 1
    assert damaged > 8


def test_without_checksums() -> None:
    data = bytearray(saved(checksum=False))
    report = holdfast.verify(io.BytesIO(data))
    assert report.ok and (report.checked, report.unchecked) == (1, 2)  # that of no bytes has one
    start, _ = payloads(bytes(data))["archive/data/0"]
    data[start] ^= 1
    assert holdfast.verify(io.BytesIO(data)).ok
    # The pickle has its checksum all the same.
    start, _ = payloads(bytes(data))["archive/data.pkl"]
    data[start + 40] ^= 1
    assert not holdfast.verify(io.BytesIO(data)).ok


def test_legacy_files_have_no_checksums() -> None:
    out = io.BytesIO()
    holdfast.save(sample(), out, format="torch_legacy")
    report = holdfast.verify(io.BytesIO(out.getvalue()))
    assert report.ok and (report.checked, report.unchecked) == (0, 3)
    for cut in (1, 40, len(out.getvalue()) - 1):
        assert not holdfast.verify(io.BytesIO(out.getvalue()[:cut])).ok
