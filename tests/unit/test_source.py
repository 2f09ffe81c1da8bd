"""Where bytes come from: pipes that are taken whole, streams that seek, descriptors of files."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest

import holdfast
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT
from holdfast.source import Source, open_source

NUMPY: dict[str, Any] = {"framework": "numpy"}
DATA = random.Random(8).randbytes((9 << 20) + 77)


class Once:
    """What reads, a little at a time, and does nothing else."""

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        self.stream = io.BytesIO(data)
        self.most = most
        self.asked: list[int] = []

    def read(self, nbytes: int = -1) -> bytes:
        self.asked.append(nbytes)
        assert nbytes >= 0, "an open end must not be asked for: it may never come"
        return self.stream.read(min(nbytes, self.most))


def source_of(stream: Any) -> Source:
    return open_source(cast(BinaryIO, stream))


# ---- taking all of a stream --------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, (1 << 20) - 1, 1 << 20, (2 << 20) + 1])
@pytest.mark.parametrize("most", [1 << 30, 70_001])
@pytest.mark.parametrize("peeked", [0, 512])
def test_settle(size: int, most: int, peeked: int) -> None:
    data = DATA[:size]
    stream = Once(data, most)
    source = source_of(stream)
    assert (source.size, source.fd, source.repeatable) == (-1, -1, False)
    assert source.peek(peeked) == data[:peeked]
    source.settle()
    assert source.size == size
    assert source.repeatable and not source.mappable
    for _ in range(2):
        assert source.read(0, size) == data
        assert source.read(size // 2, size - size // 2) == data[size // 2 :]
        assert source.peek(100) == data[:100]
        with source.replay() as again:
            assert again.read() == data
    with pytest.raises(FormatError, match=rf"needs 2 bytes at offset {size}, file ends at {size}"):
        source.read(size, 2)
    assert max(stream.asked) <= 1 << 20, "a bounded request, whatever the file may be"
    source.settle()
    assert source.size == size
    source.leave(0)
    source.close()


def test_settle_of_what_knows_its_size_takes_nothing() -> None:
    stream = io.BytesIO(b"before" + DATA)
    stream.seek(6)
    source = open_source(stream)
    source.settle()
    assert source.stream is stream and source.size == len(DATA)


@contextlib.contextmanager
def pipe(data: bytes, path: Path | None = None) -> Iterator[Any]:
    """A pipe with `data` in it: its path, or its end opened."""

    def feed(out: Any) -> None:
        with contextlib.suppress(BrokenPipeError), open(out, "wb", buffering=0) as file:
            file.write(data)

    end: Any = path
    if path is not None:
        os.mkfifo(path)
        out: Any = path
    else:
        read, out = os.pipe()
        end = os.fdopen(read, "rb")
    thread = threading.Thread(target=feed, args=(out,))
    thread.start()
    try:
        yield end
    finally:
        if path is None:
            end.close()
        thread.join()


@pytest.fixture(params=["torch", "torch_legacy", "safetensors"])
def saved(request: pytest.FixtureRequest) -> bytes:
    out = io.BytesIO()
    obj = {"w": np.arange(300_000.0), "b": np.ones((2, 3), "i2"), "n": 5}
    holdfast.save(obj, out, format=request.param)
    return out.getvalue()


def check(found: dict[str, Any]) -> None:
    assert np.array_equal(found["w"], np.arange(300_000.0))
    assert found["b"].shape == (2, 3)


@pytest.mark.parametrize("by_path", [True, False])
def test_pipes(tmp_path: Path, saved: bytes, by_path: bool) -> None:
    """Whole files by way of a pipe; nothing of it stays open."""
    before = len(os.listdir("/proc/self/fd"))
    for i, use in enumerate((load, into, opened, verified)):
        with pipe(saved, tmp_path / f"pipe{i}" if by_path else None) as f:
            use(f)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
    if by_path:
        with pipe(saved, tmp_path / "last") as f:
            holdfast.convert(f, tmp_path / "out.pt")
        check(holdfast.load(tmp_path / "out.pt", **NUMPY))


def load(f: Any) -> None:
    found = holdfast.load(f, **NUMPY)
    check(found)
    assert found["n"] == 5


def into(f: Any) -> None:
    target = {"w": np.zeros(300_000), "b": np.zeros((2, 3), "i2")}
    holdfast.load_into(target, f)
    check(target)


def opened(f: Any) -> None:
    with holdfast.open(f, **NUMPY) as checkpoint:
        assert list(checkpoint) == ["w", "b"]
        checkpoint.prefetch()
        check(dict(checkpoint))


def verified(f: Any) -> None:
    report = holdfast.verify(f)
    assert report.ok and report.checked + report.unchecked == 2


def test_mapping_a_pipe_is_refused(tmp_path: Path, saved: bytes) -> None:
    with (
        pipe(saved, tmp_path / "pipe") as f,
        pytest.raises(ValueError, match="mmap=True needs the path of a regular file"),
    ):
        holdfast.load(f, mmap=True, **NUMPY)


def test_a_stream_of_something_else(tmp_path: Path) -> None:
    with pipe(DATA, None) as f, pytest.raises(FormatError, match="not a checkpoint"):
        holdfast.load(f)
    with pytest.raises(FormatError, match="the file is empty"):
        holdfast.load(cast(BinaryIO, Once(b"")))
    for bad in ("text", None, 7):
        stream = Once(b"")
        stream.read = lambda nbytes=-1, bad=bad: bad  # type: ignore[method-assign, return-value, misc, assignment]
        with pytest.raises(TypeError, match=f"read.. returned {type(bad).__name__}"):
            holdfast.load(cast(BinaryIO, stream))


# ---- streams that seek -------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 6, 5000])
@pytest.mark.parametrize("kind", ["memory", "file", "raw", "gzip", "spooled", "named"])
def test_from_where_a_stream_stands(tmp_path: Path, saved: bytes, kind: str, start: int) -> None:
    """And it is left at the end of the checkpoint."""
    whole = b"x" * start + saved
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(whole, 1) if kind == "gzip" else whole)
    stream: Any
    if kind == "memory":
        stream = io.BytesIO(whole)
    elif kind == "gzip":
        stream = gzip.GzipFile(path)
    elif kind in ("spooled", "named"):
        temporary: Any = tempfile
        make = temporary.SpooledTemporaryFile if kind == "spooled" else temporary.NamedTemporaryFile
        stream = make()
        stream.write(whole)
    else:
        stream = io.FileIO(path) if kind == "raw" else io.BufferedReader(io.FileIO(path))
    with stream:
        for use in (load, into, opened, verified):
            stream.seek(start)
            use(stream)
            assert not stream.closed
        stream.seek(start)
        load(stream)
        assert stream.tell() == len(whole)
        source = open_source(stream)
        assert source.fd == -1, "it is at its end"
        stream.seek(start)
        source = open_source(stream)
        assert source.size == len(saved)
        # Only of a regular file that is at its start is a descriptor taken.
        assert source.mappable == (start == 0 and kind in ("file", "raw", "named"))
        assert source.read(3, 1000) == saved[3:1003]
        source.close()
        if start:
            stream.seek(start)
            with pytest.raises(ValueError, match="mmap=True needs the path"):
                holdfast.load(stream, mmap=True, **NUMPY)


def test_a_descriptor_of_its_own(tmp_path: Path, saved: bytes) -> None:
    """A file object can be closed, its file deleted and replaced; what was taken is still it."""
    path = tmp_path / "file"
    path.write_bytes(saved)
    with open(path, "rb") as file:
        checkpoint = holdfast.open(file, **NUMPY)
    path.unlink()
    path.write_bytes(b"another")
    check(dict(checkpoint))
    checkpoint.close()
    with open(path, "w+b") as file:
        file.write(saved)
        file.seek(0)
        load(file)  # what was still in the buffer of the file object is seen
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    with open(fd, "r+b") as file:
        file.write(saved)
        file.seek(0)
        load(file)


def test_positions_that_make_no_sense(saved: bytes) -> None:
    stream = io.BytesIO(saved)
    stream.seek(len(saved) + 10)
    with pytest.raises(FormatError, match="empty"):
        holdfast.load(stream)
    for length in (0, 3, 511, 512, len(saved) - 1):
        with pytest.raises(FormatError, match="BytesIO"):
            holdfast.load(io.BytesIO(saved[:length]))


def test_large_reads_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = open_source(path)
    for offset, nbytes in ((0, len(DATA)), (5, 8 << 20), (len(DATA) - 3, 3), (len(DATA), 0)):
        assert source.read(offset, nbytes) == DATA[offset : offset + nbytes]
    for offset, nbytes in ((0, len(DATA) + 1), (len(DATA), 1), (7, len(DATA)), (1 << 40, 5)):
        with pytest.raises(FormatError, match=f"needs {nbytes} bytes at offset {offset}, file"):
            source.read(offset, nbytes)
    source.close()
    source.close()


@pytest.mark.parametrize("make", [lambda: io.StringIO("x"), lambda: 7, lambda: object()])
def test_what_is_no_file(make: Any) -> None:
    with pytest.raises(TypeError, match="binary file object|mode 'rb'"):
        holdfast.load(make())


@pytest.mark.parametrize("way", ["path", "file object", "stream", "pipe"])
def test_where_a_file_ends_is_told_truly(tmp_path: Path, way: str) -> None:
    """Also of what begins behind its end, where nothing is found."""
    path = tmp_path / "x"
    path.write_bytes(DATA[:1000])
    with open(path, "rb") as f:
        streams: dict[str, Any] = {
            "path": path,
            "file object": f,
            "stream": io.BytesIO(DATA[:1000]),
            "pipe": Once(DATA[:1000], 70),
        }
        source = source_of(streams[way]) if way == "pipe" else open_source(streams[way])
        for offset in (900, 1000, 5000):
            with pytest.raises(FormatError, match=rf"at offset {offset}, file ends at 1000$"):
                source.read(offset, 200)
        if way == "stream":
            streams[way].truncate(300)
        elif way != "pipe":
            os.truncate(path, 300)
        if way != "pipe":
            segments = np.zeros(1, SEGMENT)
            segments["offset"], segments["nbytes"] = 600, 100
            with pytest.raises(FormatError, match="at offset 600, file ends at 300$"):
                source.move(segments, checksum=False)
            with pytest.raises(FormatError, match="at offset 600, file ends at 300$"):
                source.read(600, 100)
        source.close()


class Part:
    """A part of a file, as a stream of its own."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.file = file
        self.start = start
        file.seek(start)

    def read(self, nbytes: int = -1) -> bytes:
        return self.file.read(nbytes)

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset + (0 if whence else self.start), whence) - self.start


class Masked(io.FileIO):
    """A file whose bytes are others than those on the disk."""

    def readinto(self, into: Any) -> int | None:
        n = super().readinto(into)
        view = memoryview(into).cast("B")
        for i in range(n or 0):
            view[i] ^= 0x55
        return n


def test_what_reads_otherwise_than_its_file_is_read_itself(tmp_path: Path) -> None:
    """They were read by the descriptor of the file beneath: another checkpoint in it, say."""
    files = []
    for value in (1, 2):
        holdfast.save({"w": np.full(3, value)}, tmp_path / "x")
        files.append((tmp_path / "x").read_bytes())
    (tmp_path / "both").write_bytes(files[0] + files[1])
    with open(tmp_path / "both", "rb") as file:
        part = Part(file, len(files[0]))
        assert holdfast.load(cast(BinaryIO, part), **NUMPY)["w"].tolist() == [2, 2, 2]
    (tmp_path / "masked").write_bytes(bytes(byte ^ 0x55 for byte in files[0]))
    with io.BufferedReader(Masked(tmp_path / "masked")) as masked:
        assert holdfast.load(masked, **NUMPY)["w"].tolist() == [1, 1, 1]


def test_temporary_files_are_read_by_their_descriptor() -> None:
    with tempfile.NamedTemporaryFile() as file:
        holdfast.save({"w": np.ones(3)}, file)  # type: ignore[arg-type]
        file.seek(0)
        source = source_of(file)
        assert source.fd >= 0
        source.close()


class Silent:
    """What seeks and does not say where to."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def read(self, nbytes: int = -1) -> bytes:
        return self.stream.read(nbytes)

    def tell(self) -> int:
        return self.stream.tell()

    def seek(self, offset: int, whence: int = 0) -> None:
        self.stream.seek(offset, whence)

    def seekable(self) -> bool:
        return True


@pytest.mark.parametrize("format", ["safetensors", "torch", "torch_legacy", "npz"])
def test_a_seek_that_returns_nothing(format: str) -> None:
    saved = io.BytesIO()
    holdfast.save({"w": np.arange(3000.0), "v": np.ones(3)}, saved, format=format)
    for whole in (True, False):
        data = saved.getvalue() if whole else saved.getvalue()[:-3000]
        stream = cast(BinaryIO, Silent(data))
        if not whole:
            with pytest.raises(FormatError):
                holdfast.load(stream, **NUMPY)
            continue
        assert holdfast.load(stream, **NUMPY)["w"].sum() == 4498500
        assert stream.tell() == len(data)
    with tempfile.SpooledTemporaryFile() as file:
        holdfast.save({"w": np.ones(3)}, file, format=format)  # type: ignore[arg-type]
        file.seek(0)
        assert holdfast.verify(file).ok  # type: ignore[arg-type]
