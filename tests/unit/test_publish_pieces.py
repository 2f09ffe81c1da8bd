"""Bytes of a format's own between the tensors: to paths and streams, early and late checksums."""

from __future__ import annotations

import io
import os
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine
from holdfast.dtypes import BY_NAME
from holdfast.formats import torch_zip
from holdfast.layout import Pieces, Plan
from holdfast.publish import segments_of, write_out
from holdfast.views import TensorBatch, TensorView

FORMATS = ["torch", "torch_legacy", "safetensors"]


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(4)
    return {
        "big": rng.random(700_000),  # above what is summed early
        "T": rng.random((600, 700), "f4").T,
        "swapped": np.arange(9, dtype=">i4"),
        "empty": np.zeros((3, 0)),
        "small": [rng.random(i) for i in range(30)],
        "n": {"step": 7},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b) and a.shape == b.shape
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Meagre:
    """Nothing but write(), which takes little at a time and says how much."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")[:300_007]
        self.data += part
        return len(part)


def to_pipe(obj: Any, tmp_path: Path, **options: Any) -> bytes:
    path = tmp_path / "pipe" / "archive"
    path.parent.mkdir()
    os.mkfifo(path)
    found: list[bytes] = []

    def drain() -> None:
        with open(path, "rb") as end:
            found.append(end.read())

    thread = threading.Thread(target=drain)
    thread.start()
    holdfast.save(obj, path, **options)
    thread.join()
    assert path.is_fifo()
    return found[0]


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_streams_get_what_files_get(tmp_path: Path, format: str, checksum: bool) -> None:
    """A pipe, memory, a file that is not at 0, and a bare write() all get the same bytes."""
    options: dict[str, Any] = {"format": format, "checksum": checksum}
    path = tmp_path / "archive"
    holdfast.save(sample(), path, **options)
    expected = path.read_bytes()
    memory = io.BytesIO(b"before")
    memory.seek(6)
    holdfast.save(sample(), memory, **options)
    assert memory.getvalue() == b"before" + expected
    meagre = Meagre()
    holdfast.save(sample(), meagre, **options)  # type: ignore[arg-type]
    assert meagre.data == expected
    assert to_pipe(sample(), tmp_path, **options) == expected
    with open(tmp_path / "file", "wb") as file:
        file.write(b"before")
        holdfast.save(sample(), file, **options)
        file.write(b"after")
    assert (tmp_path / "file").read_bytes() == b"before" + expected + b"after"
    with open(tmp_path / "file", "rb") as file:
        file.seek(6)
        if format == "torch_legacy":  # the others end where their file does
            assert same(holdfast.load(file, framework="numpy"), sample())
            assert file.read() == b"after"


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("early", [0, 1, 1000, 1 << 40])
def test_early_and_late_checksums(
    tmp_path: Path, early: int, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever are known before anything is written, the file is the same."""
    holdfast.save(sample(), tmp_path / "archive.pt", durable=durable)
    expected = (tmp_path / "archive.pt").read_bytes()
    monkeypatch.setattr(torch_zip, "_EARLY", early)
    holdfast.save(sample(), tmp_path / "archive.pt", durable=durable)
    assert (tmp_path / "archive.pt").read_bytes() == expected
    stream = io.BytesIO()
    holdfast.save(sample(), stream, format="torch")
    with zipfile.ZipFile(tmp_path / "archive.pt") as archive:
        assert archive.testzip() is None
        sums = [info.CRC for info in archive.infolist() if "/data/" in info.filename]
        assert len(sums) == 34 and sums.count(0) == 2  # those of no bytes
    assert zipfile.ZipFile(io.BytesIO(stream.getvalue())).testzip() is None


@pytest.mark.parametrize("direct", [True, None, False])
def test_large_files_may_go_past_the_cache(
    tmp_path: Path, direct: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast import publish

    asked: list[bool | None] = []
    write = _engine.write

    def noting(*args: Any, **options: Any) -> bool:
        asked.append(options["direct"])
        return write(*args, **options)

    monkeypatch.setattr(_engine, "write", noting)
    if direct is None:
        monkeypatch.setattr(publish, "LARGE", 1 << 20)
    holdfast.save(sample(), tmp_path / "x.pt", durable=bool(direct))
    assert asked[0] is direct and len(asked) > 1
    assert same(holdfast.load(tmp_path / "x.pt", framework="numpy"), sample())


def test_progress(tmp_path: Path) -> None:
    for f in (tmp_path / "x.pt", io.BytesIO()):
        seen: list[tuple[int, int]] = []
        holdfast.save(
            sample(),
            f,
            format="torch",
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        done = [pair[0] for pair in seen]
        (total,) = {pair[1] for pair in seen}
        assert done == sorted(done) and total - 5_600_000 < done[-1] <= total
        size = f.stat().st_size if isinstance(f, Path) else len(f.getvalue())
        assert total == size == done[-1]


@pytest.mark.parametrize("stage", [1])
def test_progress_that_raises(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "x.pt"
    holdfast.save({"old": np.ones(3)}, path)
    before = path.read_bytes()
    left = stage

    def stop(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        holdfast.save({"a": np.ones(3_000_000), "b": np.ones(3)}, path, progress=stop, threads=1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_stream_that_takes_nothing() -> None:
    class Broken:
        def write(self, data: Any) -> int:
            return 0

    with pytest.raises(OSError, match="no progress"):
        holdfast.save(sample(), Broken(), format="torch")  # type: ignore[arg-type]


class Sealer:
    """A format of three tensors with a mark before each, of which the second waits for its sum."""

    def __init__(self, early: list[bool]) -> None:
        self.early = np.array(early)
        self.asked: list[tuple[bool, list[int] | None]] = []

    def plan(self, sizes: list[int]) -> Plan:
        offsets = np.cumsum([4 + n for n in sizes]) - np.array(sizes)
        return Plan(offsets.astype(np.uint64), int(offsets[-1]) + sizes[-1], early=self.early)

    def __call__(self, plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
        self.asked.append((early, None if crcs is None else crcs.tolist()))
        which = np.arange(3) if early else np.flatnonzero(~self.early)
        known = np.zeros(3, np.uint32) if crcs is None else crcs
        marks = np.where(self.early | (not early), known, 0).astype("<u4")
        return Pieces(
            marks.tobytes(),
            plan.offsets[which] - np.uint64(4),
            np.full(len(which), 4, np.uint64),
            which * 4,
        )


@pytest.mark.parametrize("early", [[True] * 3, [True, False, True], [False] * 3])
@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("target", ["path", "stream"])
def test_pieces(tmp_path: Path, early: list[bool], checksum: bool, target: str) -> None:
    arrays = [np.arange(n, dtype=np.uint8) + n for n in (5, 7, 200)]
    views = [TensorView(BY_NAME["uint8"], a.shape, a.ctypes.data, a) for a in arrays]
    seal = Sealer(early)
    plan = seal.plan([a.nbytes for a in arrays])
    stream = io.BytesIO()
    given: list[Any] = []
    write_out(
        tmp_path / "x" if target == "path" else stream,
        plan,
        TensorBatch.of(views),
        seal,
        durable=False,
        checksum=checksum,
        threads=1,
        progress=None,
        check=lambda crcs: given.append(crcs.tolist()),
    )
    sums = [zlib.crc32(a.tobytes()) for a in arrays]
    data = (tmp_path / "x").read_bytes() if target == "path" else stream.getvalue()
    marks = sums if checksum else [0, 0, 0]
    expected = b"".join(
        mark.to_bytes(4, "little") + a.tobytes() for mark, a in zip(marks, arrays, strict=True)
    )
    assert data == expected
    assert given == [sums]
    assert [asked[0] for asked in seal.asked] == [True, False]
    first = seal.asked[0][1]
    assert (first is None) == (not checksum)
    assert first is None or all(a == b for a, b, e in zip(first, sums, early, strict=True) if e)
    assert seal.asked[1][1] == (sums if checksum else None)


def test_a_check_that_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    array = np.arange(9, dtype=np.uint8)
    view = TensorView(BY_NAME["uint8"], array.shape, array.ctypes.data, array)
    (tmp_path / "x").write_bytes(b"old")
    stream = io.BytesIO()

    def refuse(crcs: np.ndarray) -> None:
        raise holdfast.ChecksumError("no")

    def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
        return Pieces.one(b"head", 0)

    for f in (tmp_path / "x", stream):
        with pytest.raises(holdfast.ChecksumError, match="no"):
            write_out(
                f,
                Plan(np.array([4], np.uint64), 13),
                TensorBatch.of([view]),
                seal,
                durable=False,
                checksum=False,
                threads=1,
                progress=None,
                check=refuse,
            )
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"
    assert stream.getvalue() == b""


def test_segments_of_pieces() -> None:
    data = bytearray(b"0123456789")
    pieces = Pieces(
        data, np.array([3, 90], np.uint64), np.array([2, 5], np.uint64), np.array([8, 1])
    )
    segments = segments_of(pieces)
    base = int(segments["address"][0]) - 8
    assert segments["offset"].tolist() == [3, 90]
    assert segments["nbytes"].tolist() == [2, 5]
    assert (segments["address"] - np.uint64(base)).tolist() == [8, 1]
    nothing = segments_of(Pieces.one(b"", 7))
    assert nothing["nbytes"].tolist() == [0]


@pytest.mark.parametrize(
    "make", [lambda: io.StringIO(), lambda: 7, lambda: io.TextIOWrapper(io.BytesIO())]
)
def test_what_is_no_target(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="binary file object|mode 'wb'"):
        holdfast.save({"a": np.ones(3)}, make(), format="torch")
