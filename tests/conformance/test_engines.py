"""What every engine does with segments: one suite for the C engine and for the plain one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import _engine, _engine_py
from holdfast.errors import FormatError
from holdfast.layout import SEGMENT

MIB = 1 << 20
NOISE = np.frombuffer(os.urandom(24 * MIB), np.uint8)


def rows(sizes: list[int], start: int = 0, base: np.ndarray = NOISE) -> np.ndarray:
    """Segments end to end from `start` on, in the file; in memory at odd places of `base`."""
    segments = np.zeros(len(sizes), SEGMENT)
    segments["nbytes"] = sizes
    ends = np.cumsum(sizes, dtype=np.uint64)
    segments["offset"] = ends - segments["nbytes"] + np.uint64(start)
    places = (np.arange(len(sizes), dtype=np.uint64) * 7919) % np.uint64(1000)
    segments["address"] = base.ctypes.data + places
    return segments


def content(segments: np.ndarray, base: np.ndarray = NOISE) -> bytes:
    """The bytes that `segments` point to in `base`."""
    parts = []
    for row in segments:
        at = int(row["address"]) - base.ctypes.data
        parts.append(base[at : at + int(row["nbytes"])].tobytes())
    return b"".join(parts)


def crcs(segments: np.ndarray, base: np.ndarray = NOISE) -> list[int]:
    return [zlib.crc32(content(segments[i : i + 1], base)) for i in range(len(segments))]


#: name: (sizes, offset of the first)
SHAPES: dict[str, tuple[list[int], int]] = {
    "none": ([], 0),
    "empty": ([0], 0),
    "empties": ([0, 0, 5, 0, 0, 3, 0], 0),
    "byte": ([1], 0),
    "tiny": ([1, 2, 3, 1000, 1024, 0, 7] * 500, 4096),
    "thousands": ([333] * 20_000, 0),
    "page": ([4096], 4096),
    "chunk": ([8 * MIB], 0),
    "straddling": ([8 * MIB - 1, 2, 8 * MIB - 1], 0),
    "one over all": ([22 * MIB + 13], 0),
    "odd start": ([100_000, 5 * MIB, 1, 6 * MIB], 12_345),
    "odd start small": ([17], 4095),
    "aligned start": ([3, 9 * MIB, 70_000], 3 * 4096),
    "mixed": ([10, 200_000, 0, 63, 64 << 10, 5 * MIB + 1, 1] * 3, 0),
}


class EngineSuite:
    """A subclass gives the engine."""

    engine: ModuleType
    #: Threads and O_DIRECT, in the combinations that take different ways through the engine.
    ways: list[tuple[int, bool]] = [(1, False)]

    @pytest.fixture(params=["disk", "memory"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
        if request.param == "disk":
            yield tmp_path
            return
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no /dev/shm")
        path = Path(tempfile.mkdtemp(dir="/dev/shm"))
        yield path
        shutil.rmtree(path)

    @pytest.fixture
    def fd(self, folder: Path) -> Iterator[int]:
        fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        yield fd
        os.close(fd)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_write_then_read(self, fd: int, shape: str) -> None:
        sizes, start = SHAPES[shape]
        for threads, direct in self.ways:
            os.ftruncate(fd, 0)
            segments = rows(sizes, start)
            self.check_write(fd, segments, start, threads, direct)
            self.check_read(fd, segments, start, threads)

    def check_write(
        self, fd: int, segments: np.ndarray, start: int, threads: int, direct: bool
    ) -> None:
        expected = content(segments)
        self.engine.write(fd, segments, threads=threads, direct=direct)
        assert segments["crc"].tolist() == crcs(segments)
        nbytes = start + len(expected) if expected else 0
        assert os.fstat(fd).st_size == nbytes
        assert os.pread(fd, nbytes + 1, 0) == (bytes(start) + expected if expected else b"")

    def check_read(self, fd: int, segments: np.ndarray, start: int, threads: int) -> None:
        expected = content(segments)
        target = np.zeros(len(expected) + 3 * len(segments), np.uint8)
        back = segments.copy()
        back["crc"] = 0
        # Neighbours in the file are neighbours in memory for some of the segments only.
        shift = np.cumsum(np.arange(len(segments)) % 3, dtype=np.uint64)
        back["address"] = target.ctypes.data + segments["offset"] - np.uint64(start) + shift
        self.engine.read([fd], back, threads=threads)
        assert back["crc"].tolist() == segments["crc"].tolist()
        assert content(back, target) == expected
        written = np.count_nonzero(target)
        assert written == np.count_nonzero(np.frombuffer(expected, np.uint8)), "nothing beside"

    def test_without_checksums_the_column_is_left_alone(self, fd: int) -> None:
        segments = rows([10, 9 * MIB, 3])
        segments["crc"] = 0xDEAD
        self.engine.write(fd, segments, checksum=False, direct=True)
        self.engine.read([fd], segments, checksum=False)
        assert segments["crc"].tolist() == [0xDEAD] * 3

    @pytest.mark.parametrize("direct", [False, True])
    def test_what_lies_outside_is_left_alone(self, fd: int, direct: bool) -> None:
        before = os.urandom(20 * MIB)
        os.pwrite(fd, before, 0)
        segments = rows([5, 9 * MIB, 100], start=5000)
        self.engine.write(fd, segments, direct=direct)
        expected = content(segments)
        end = 5000 + len(expected)
        assert os.pread(fd, 30 * MIB, 0) == before[:5000] + expected + before[end:]

    def test_the_file_of_a_row_is_ignored_in_a_write(self, fd: int) -> None:
        segments = rows([100, 9 * MIB, 3, 200])
        segments["file"] = [3, 0, 9, 2]
        self.engine.write(fd, segments, direct=True)
        assert os.pread(fd, 10 * MIB, 0) == content(segments)
        assert segments["crc"].tolist() == crcs(segments)

    def test_flags_and_position_are_as_before(self, fd: int) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        os.lseek(fd, 7, os.SEEK_SET)
        segments = rows([9 * MIB])
        self.engine.write(fd, segments, direct=True)
        self.engine.read([fd], segments)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7

    @pytest.mark.parametrize("threads", [0, 1, 5])
    @pytest.mark.parametrize("gap", [1, 1000, 100_000, 9 * MIB])
    def test_read_skips_gaps(self, fd: int, gap: int, threads: int) -> None:
        data = NOISE.tobytes()
        os.pwrite(fd, data, 0)
        sizes = [1, 5000, 0, 300_000, 12, 40_000]
        offsets = [k * gap + sum(sizes[:k]) for k in range(len(sizes))]
        keep = [k for k, at in enumerate(offsets) if at + sizes[k] <= len(data)]
        segments = rows([sizes[k] for k in keep])
        segments["offset"] = [offsets[k] for k in keep]
        target = np.zeros(1 << 20, np.uint8)
        segments["address"] = target.ctypes.data + np.arange(len(keep), dtype=np.uint64)
        segments["address"] += np.cumsum(segments["nbytes"]) - segments["nbytes"]
        self.engine.read([fd], segments, threads=threads)
        for row in segments:
            at, n = int(row["offset"]), int(row["nbytes"])
            assert content(row.reshape(1), target) == data[at : at + n]
            assert row["crc"] == zlib.crc32(data[at : at + n])
        assert len(keep) >= 2

    def test_read_several_files(self, folder: Path) -> None:
        sizes = [[3, 9 * MIB, 0], [], [5 * MIB], [1, 1]]
        fds, parts = [], []
        for file, of_file in enumerate(sizes):
            segments = rows(of_file, start=file * 10)
            segments["file"] = file
            fds.append(os.open(folder / str(file), os.O_RDWR | os.O_CREAT))
            self.engine.write(fds[-1], segments)
            parts.append(segments)
        segments = np.concatenate(parts)
        expected, sums = content(segments), segments["crc"].tolist()
        target = np.zeros(len(expected), np.uint8)
        segments["address"] = target.ctypes.data + np.cumsum(segments["nbytes"])
        segments["address"] -= segments["nbytes"]
        segments["crc"] = 1
        seen: list[int] = []
        self.engine.read(fds, segments, progress=seen.append)
        assert target.tobytes() == expected
        assert segments["crc"].tolist() == sums
        assert seen[-1] == len(expected)
        for fd in fds:
            os.close(fd)

    def test_read_nowhere_checks_only(self, fd: int) -> None:
        segments = rows([100, 9 * MIB, 1])
        self.engine.write(fd, segments)
        expected = segments["crc"].tolist()
        segments["address"] = 0
        segments["crc"] = 0
        self.engine.read([fd], segments)
        assert segments["crc"].tolist() == expected

    @pytest.mark.parametrize("swap", [0, 2, 4])
    def test_strided_among_dense(self, fd: int, swap: int) -> None:
        matrix = NOISE[: 4 * 1500 * 1000].view(np.uint32).reshape(1500, 1000)
        views = [matrix.T, matrix[::-2, 5:900:3], matrix[7:8]]
        sizes = [50, views[0].nbytes, 1, views[1].nbytes, views[2].nbytes, 70_000]
        segments = rows(sizes)
        layouts, images = [], {}
        for i, view in zip((1, 3, 4), views, strict=True):
            layouts.append((i, view.shape, view.strides, 4, swap))
            segments["address"][i] = view.ctypes.data
            data = np.frombuffer(view.tobytes(), np.uint8)
            images[i] = (data.reshape(-1, swap)[:, ::-1] if swap else data).tobytes()
        expected = [images.get(i) or content(segments[i : i + 1]) for i in range(len(sizes))]
        for threads, direct in self.ways:
            os.ftruncate(fd, 0)
            segments["crc"] = 0
            self.engine.write(fd, segments, layouts=layouts, threads=threads, direct=direct)
            assert os.pread(fd, sum(sizes) + 1, 0) == b"".join(expected)
            assert segments["crc"].tolist() == [zlib.crc32(part) for part in expected]
            assert not segments["layout"].any()

        back = np.zeros_like(matrix)
        segments["address"] = 0
        segments["address"][1] = back.T.ctypes.data
        self.engine.read([fd], segments, layouts=layouts[:1])
        assert (back == matrix).all()
        assert segments["crc"].tolist() == [zlib.crc32(part) for part in expected]

    def test_file_too_short(self, fd: int) -> None:
        os.pwrite(fd, bytes(1000), 0)
        target = np.zeros(5000, np.uint8)
        segments = rows([100, 2000], base=target)
        message = r"some\.bin: needs 2000 bytes at offset 100, file ends at 1000"
        with pytest.raises(FormatError, match=message):
            self.engine.read([fd], segments, filenames=["some.bin"])
        segments["offset"] += np.uint64(5000)
        message = "needs 100 bytes at offset 5000, file ends at 1000$"  # and not where it begins
        with pytest.raises(FormatError, match=message):
            self.engine.read([fd], segments, filenames=["some.bin"])

    @pytest.mark.parametrize("threads", [1, 3])
    def test_progress_grows_to_the_total(self, fd: int, threads: int) -> None:
        segments = rows([21 * MIB, 5])
        for transfer in (
            lambda report: self.engine.write(fd, segments, threads=threads, progress=report),
            lambda report: self.engine.read(
                [fd], nowhere(segments), threads=threads, progress=report
            ),
        ):
            seen: list[int] = []
            transfer(seen.append)
            assert seen == sorted(seen)
            assert seen[-1] == 21 * MIB + 5
            assert 1 <= len(seen) <= 10

    def test_progress_can_stop_it(self, fd: int) -> None:
        class Stop(Exception):
            pass

        def stop(done: int) -> None:
            raise Stop

        segments = rows([9 * MIB])
        with pytest.raises(Stop):
            self.engine.write(fd, segments, progress=stop)
        self.engine.write(fd, segments)
        with pytest.raises(Stop):
            self.engine.read([fd], nowhere(segments), progress=stop)

    def test_errors_of_the_system(self, folder: Path) -> None:
        (folder / "file").write_bytes(b"x" * 100)
        fd = os.open(folder / "file", os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file descriptor"):
            self.engine.write(fd, rows([10]), filename="f")
        os.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            self.engine.read([fd], nowhere(rows([10])), filenames=["f"])


def nowhere(segments: np.ndarray) -> np.ndarray:
    """The same segments without memory: a read of them checks only."""
    copy = segments.copy()
    copy["address"] = 0
    return copy


class TestPlain(EngineSuite):
    engine = _engine_py


class TestC(EngineSuite):
    engine = _engine
    ways = [(1, False), (2, False), (4, True), (0, True), (8, False), (7, True), (100, True)]

    def test_direct_is_used_where_the_disk_takes_it(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        except OSError:
            pytest.skip("no O_DIRECT here")
        assert self.engine.write(fd, rows([9 * MIB]), direct=True) is True
        assert self.engine.write(fd, rows([9 * MIB]), direct=False) is False
        assert self.engine.write(fd, rows([9000]), direct=True) is False  # not worth it
        os.close(fd)

    @pytest.mark.parametrize("direct", [False, True, None])
    def test_room_is_taken_for_the_whole_file(self, tmp_path: Path, direct: bool | None) -> None:
        # A block without a place makes ext4 write back the others when the file is renamed.
        path = tmp_path / "file"
        segments, size = rows([9 * MIB + 100], 4096), 10 * MIB + 10
        with path.open("wb", buffering=0) as f:
            self.engine.write(f.fileno(), segments, direct=direct, size=size)
            if os.fstat(f.fileno()).st_size != size:
                pytest.skip("this file system takes no room beforehand")
            assert os.fstat(f.fileno()).st_blocks * 512 >= size
            os.pwrite(f.fileno(), b"head", 0)
            self.engine.write(f.fileno(), rows([700], 4096 + 9 * MIB + 100), size=0)
        found = path.read_bytes()
        tail = content(rows([700]))
        assert found[:6] == b"head\0\0"
        assert found[4096:-1] == content(segments) + tail + bytes(size - 1 - 4096 - 9 * MIB - 800)

    def test_room_is_taken_once_for_all_parts(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb", buffering=0) as f:
            self.engine.write(f.fileno(), rows([2 * MIB]), size=4 * MIB)
            if os.fstat(f.fileno()).st_size != 4 * MIB:
                pytest.skip("this file system takes no room beforehand")
            _engine.fault_ban("fallocate", errno.ENOSPC)
            try:
                self.engine.write(f.fileno(), rows([2 * MIB], 2 * MIB), size=4 * MIB)
                with pytest.raises(OSError, match="No space"):  # it is to be longer than that
                    self.engine.write(f.fileno(), rows([2 * MIB], 4 * MIB), size=6 * MIB)
            finally:
                _engine.fault_ban(None, 0)

    def test_errors_name_the_file(self, folder: Path) -> None:
        (folder / "file").write_bytes(b"")
        fd = os.open(folder / "file", os.O_RDONLY)
        with pytest.raises(OSError) as caught:
            self.engine.write(fd, rows([10]), filename="my file")
        assert caught.value.filename == "my file"
        os.close(fd)

    @pytest.mark.parametrize(
        "change",
        [
            {"offset": [0, 11, 20]},  # a gap
            {"offset": [0, 9, 20]},  # an overlap
            {"offset": [10, 0, 20]},
            {"address": [1, 0, 1]},
            {"offset": [2**63, 2**63 + 10, 2**63 + 20]},
            {"offset": [2**64 - 30, 2**64 - 20, 2**64 - 10]},
        ],
    )
    def test_refuses_rows_that_break_the_rules(self, fd: int, change: dict[str, list[int]]) -> None:
        segments = rows([10, 10, 10])
        for column, values in change.items():
            segments[column] = np.array(values, np.uint64)
        with pytest.raises(ValueError, match=r"f: segment [0-2] of 3, 10 bytes at offset"):
            self.engine.write(fd, segments, filename="f")
        assert os.fstat(fd).st_size == 0

    def test_refuses_what_is_no_table_of_segments(self, fd: int) -> None:
        with pytest.raises(TypeError, match="rows of 8 bytes"):
            self.engine.write(fd, np.zeros(3))
        with pytest.raises(ValueError, match="segment 5"):
            self.engine.write(fd, rows([4]), layouts=[(5, (1,), (1,), 4, 0)])
        segments = rows([4])
        segments["file"] = 1
        with pytest.raises(ValueError, match="segment 0 of 1, 4 bytes at offset 0 of file 1"):
            self.engine.read([fd], segments)

    def test_many_threads_of_python_at_once(self, folder: Path) -> None:
        segments = rows([10, 3 * MIB, 77, 2 * MIB])
        expected, failures = content(segments), []

        def work(name: str) -> None:
            try:
                mine = segments.copy()
                fd = os.open(folder / name, os.O_RDWR | os.O_CREAT)
                for _ in range(3):
                    self.engine.write(fd, mine, threads=3, direct=True)
                    assert os.pread(fd, 10 * MIB, 0) == expected
                    self.engine.read([fd], nowhere(mine), threads=3)
                os.close(fd)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(str(k),)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_in_a_forked_child(self, fd: int) -> None:
        segments = rows([20 * MIB])
        self.engine.write(fd, segments, threads=4)
        expected = int(segments["crc"][0])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                back = nowhere(segments)
                self.engine.read([fd], back, threads=4)
                self.engine.write(fd, segments, threads=4, direct=True)
                code = 0 if int(back["crc"][0]) == expected else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_an_interrupt_gets_through(self, fd: int) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        segments = rows([20 * MIB])
        self.engine.write(fd, segments)

        def read_for_ever() -> None:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            while True:
                self.engine.read([fd], nowhere(segments))

        try:
            with pytest.raises(KeyboardInterrupt):
                read_for_ever()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.integers(30_000, 140_000), st.integers(MIB, 3 * MIB)),
        max_size=30,
    ),
    start=st.sampled_from([0, 1, 4096, 5000, MIB - 3]),
    old=st.integers(0, 2 * MIB),
    threads=st.integers(0, 8),
    direct=st.booleans(),
    chosen=st.randoms(use_true_random=False),
)
def test_the_engines_agree(
    tmp_path: Path, sizes: list[int], start: int, old: int, threads: int, direct: bool, chosen
) -> None:
    made = {}
    for engine in (_engine, _engine_py):
        segments = rows(sizes, start)
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.pwrite(fd, NOISE[:old].tobytes(), 0)
        engine.write(fd, segments, threads=threads, direct=direct)
        made[engine] = os.pread(fd, 100 * MIB, 0), segments["crc"].tolist()
        if engine is _engine:
            os.close(fd)
    assert made[_engine] == made[_engine_py]

    subset = segments[sorted(chosen.sample(range(len(sizes)), len(sizes) // 2))]
    results = []
    for engine in (_engine, _engine_py):
        target = np.zeros(start + sum(sizes), np.uint8)
        back = subset.copy()
        back["address"] = target.ctypes.data + back["offset"]
        engine.read([fd], back, threads=threads)
        results.append((target.tobytes(), back["crc"].tolist()))
    os.close(fd)
    assert results[0] == results[1]
