"""Tensors written to a folder, a file for each: every kind of memory, and what may fail."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from holdfast import _engine, publish_folder
from holdfast.dtypes import BY_NAME
from holdfast.layout import FolderPlan
from holdfast.publish_folder import write_folder
from holdfast.views import TensorBatch, TensorView

MIB = 1 << 20


@pytest.fixture(autouse=True)
def disarmed() -> object:
    yield
    _engine.fault_arm(0, 0)
    _engine.fault_ban(None, 0)


def batch_of(arrays: list[np.ndarray]) -> TensorBatch:
    return TensorBatch.of(
        [
            TensorView(
                dtype=BY_NAME[array.dtype.newbyteorder("=").name],
                shape=array.shape,
                address=array.ctypes.data,
                owner=array,
                strides=None if array.flags.c_contiguous else array.strides,
                swapped=not array.dtype.isnative,
            )
            for array in arrays
        ]
    )


def plan_of(arrays: dict[str, np.ndarray]) -> FolderPlan:
    texts = {f"{name}/meta": f"about {name}".encode() for name in arrays}
    return FolderPlan(
        [f"{name}/out" for name in arrays], {**texts, "snapshot_done": b""}, "snapshot_done"
    )


def save(path: Path, arrays: dict[str, np.ndarray], **how: object) -> None:
    options = {"durable": False, **how}
    write_folder(path, plan_of(arrays), batch_of(list(arrays.values())), **options)  # type: ignore[arg-type]


def check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    names = [*arrays, "snapshot_done"]
    assert sorted(os.listdir(path)) == sorted({name.split("/")[0] for name in names})
    for name, array in arrays.items():
        assert sorted(n for n in os.listdir(path / name) if n in ("meta", "out")) == ["meta", "out"]
        native = array.astype(array.dtype.newbyteorder("="))
        assert (path / name / "out").read_bytes() == native.tobytes(), name
        assert (path / name / "meta").read_bytes() == f"about {name}".encode()
    assert (path / "snapshot_done").read_bytes() == b""


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "small": rng.random(100),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3), "f4"),
        "empty.transposed": np.zeros((3, 0), "f4").T,
        "just.small": rng.random(MIB // 8),
        "just.large": rng.random(MIB // 8 + 1),
        "large": rng.random((9 * MIB + 24) // 8),
        "strided": rng.random((30, 40)).T,
        "strided.large": rng.random((600, 700)).T,
        "reversed": rng.integers(0, 99, 50)[::-1],
        "swapped": rng.random(60).astype(">f8"),
        "swapped.large": rng.random((700, 300)).astype(">f4").T,
        "nested/name": rng.random(7),
        "nested/other": rng.random(7),
    }


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("threads", [0, 1])
def test_every_kind_of_tensor(
    tmp_path: Path, arrays: dict[str, np.ndarray], durable: bool, threads: int
) -> None:
    for _ in range(2):
        save(tmp_path / "model", arrays, durable=durable, threads=threads)
        check(tmp_path / "model", arrays)
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_but_texts(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "a", FolderPlan([], {"x/y": b"text", "z": b""}), batch_of([]), durable=True
    )
    write_folder(tmp_path / "b", FolderPlan([], {}), batch_of([]), durable=False)

    assert (tmp_path / "a/x/y").read_bytes() == b"text"
    assert (tmp_path / "a/z").read_bytes() == b""
    assert os.listdir(tmp_path / "b") == []


def test_the_last_file_is_written_last(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("write", "write_files"):
        real = getattr(_engine, name)

        def spy(*arguments: object, real: object = real, **how: object) -> object:
            done = real(*arguments, **how)  # type: ignore[operator]
            temp = next(tmp_path.glob(".holdfast-*"))
            order.append("done" if (temp / "snapshot_done").exists() else "not yet")
            return done

        monkeypatch.setattr(publish_folder._engine, name, spy)

    save(tmp_path / "model", arrays)

    assert order[-1] == "done"
    assert set(order[:-1]) == {"not yet"}
    assert len(order) == 9  # the small ones in one, seven others, the last


def test_progress(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    seen: list[tuple[int, int]] = []

    save(tmp_path / "model", arrays, progress=lambda done, total: seen.append((done, total)))

    texts = sum(len(f"about {name}") for name in arrays)
    total = sum(array.nbytes for array in arrays.values()) + texts
    assert {t for _, t in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_progress_that_raises_leaves_nothing(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "model", arrays, progress=stop)

    assert os.listdir(tmp_path) == []


def test_replacing(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    save(target, {"x": np.zeros(3)}, replace=False)
    with pytest.raises(FileExistsError):
        save(target, arrays, replace=False)
    check(target, {"x": np.zeros(3)})

    save(target, arrays, replace=True)
    check(target, arrays)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a//b", "nul\0byte"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    for size in (3, MIB):
        with pytest.raises(ValueError):
            save(tmp_path / "model", {name: np.zeros(size)})
        assert os.listdir(tmp_path) == []


def test_two_tensors_for_one_file(tmp_path: Path) -> None:
    arrays = [np.zeros(3), np.zeros(4)]

    with pytest.raises(FileExistsError) as caught:
        write_folder(
            tmp_path / "model", FolderPlan(["a/out"] * 2, {}), batch_of(arrays), durable=False
        )

    assert caught.value.filename == str(tmp_path / "model/a/out")
    assert os.listdir(tmp_path) == []


def test_memory_of_maps_is_let_go_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(8 * MIB))
    with open(tmp_path / "file", "rb") as file:
        mapped = _engine.map_file(file.fileno(), 0, 8 * MIB)
    array = np.frombuffer(mapped, np.uint8)
    content = array.tobytes()

    save(tmp_path / "model", {"x": array}, release=np.array([True]))

    assert (tmp_path / "model/x/out").read_bytes() == content
    assert array.tobytes() == content


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EINTR, 0])
@pytest.mark.parametrize("durable", [False, True])
def test_every_call_may_fail(tmp_path: Path, error: int, durable: bool) -> None:
    rng = np.random.default_rng(1)
    old = {"x": np.arange(100.0)}
    new = {"a": rng.random(1000), "b": rng.random((500, 600)).T, "c": rng.random(MIB // 4)}
    target = tmp_path / "model"
    raised: Counter[str] = Counter()
    save(target, old)
    descriptors = len(os.listdir("/proc/self/fd"))
    for n in range(1, 2000):
        failure = None
        _engine.fault_arm(n, error)
        try:
            save(target, new, durable=durable, threads=1)
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        assert os.listdir(tmp_path) == ["model"], hit
        assert len(os.listdir("/proc/self/fd")) == descriptors, hit
        if failure is None:
            check(target, new)
            save(target, old)
        else:
            assert error > 0 and error != errno.EINTR, f"{hit} should have been overcome"
            assert failure.errno == error, hit
            assert str(failure.filename).startswith(str(target)), hit
            check(target, old)
            raised[hit or ""] += 1
        if hit is None:
            break

    assert n > 50
    if error > 0 and error != errno.EINTR:
        assert {"pwrite", "openat2", "mkdirat", "exchange", "close"} <= set(raised)
        assert durable == ("fsync" in raised)


def test_a_file_that_fails_stops_those_beside_it(tmp_path: Path) -> None:
    new = {f"t{i}": np.full(MIB // 4 + i, i, "f8") for i in range(7)}
    target = tmp_path / "model"
    raised: Counter[str] = Counter()
    for n in range(1, 1000, 3):
        failure = None
        _engine.fault_arm(n, errno.EIO)
        try:
            save(target, new, threads=3)
        except OSError as caught:
            failure = caught
        hit = _engine.fault_hit()
        _engine.fault_arm(0, 0)
        assert os.listdir(tmp_path) in ([], ["model"])
        if failure is not None:
            assert failure.errno == errno.EIO
            assert str(failure.filename).startswith(str(target))
            raised[hit or ""] += 1
        else:
            check(target, new)
        if hit is None:
            break

    assert hit is None
    assert os.listdir(tmp_path) == ["model"]
    assert sum(raised.values()) > 20


def test_an_interrupt_stops_all(tmp_path: Path) -> None:
    new = {f"t{i}": np.full(2 * MIB, i, "u1") for i in range(20)}
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(
            tmp_path / "model",
            FolderPlan([f"{name}/out" for name in new], {}),
            batch_of(list(new.values())),
            durable=True,
            threads=4,
            progress=stop,
        )

    assert len(seen) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("slow", [False, True, None])
def test_both_ways_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool | None
) -> None:
    """Past the page cache the large ones, through it small ones, while that is not in the way."""
    monkeypatch.setattr(publish_folder, "LARGE", 1)
    real = _engine.write
    written: list[tuple[bool, int]] = []

    def spy(fd: int, segments: np.ndarray, *, direct: bool, **how: object) -> bool:
        if direct is slow:
            time.sleep(0.05)
        written.append((direct, int(segments["nbytes"].sum())))
        return real(fd, segments, direct=direct, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(publish_folder._engine, "write", spy)
    new = {f"t{i}": np.full(MIB + 8 * i + 8, i, "u1") for i in range(40)}
    new["alone"] = np.zeros(16 * MIB, "u1")

    save(tmp_path / "model", new)

    check(tmp_path / "model", new)
    through, past = ([size for way, size in written if way is kind] for kind in (False, True))
    assert len(through) + len(past) == 41
    assert max(past) == 16 * MIB
    if slow is not None:
        assert through
    if slow is False:  # each of the two threads learns it from the first that it writes
        assert len(through) <= 4
        assert max(through) < MIB + 8 * 20


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_more_threads_than_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(publish_folder, "LARGE", 1)
    real, seen = _engine.write, set()

    def spy(*args: object, threads: int, **how: object) -> bool:
        assert threads <= asked
        seen.add(threading.get_ident())
        return real(*args, threads=threads, **how)  # type: ignore[arg-type]

    asked = threads
    monkeypatch.setattr(publish_folder._engine, "write", spy)
    new = {f"t{i}": np.full(MIB + 8 * i + 8, i, "u1") for i in range(12)}

    save(tmp_path / "model", new, threads=threads)

    check(tmp_path / "model", new)
    assert len(seen) <= threads


@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, 0])
def test_every_call_of_reading_may_fail(tmp_path: Path, error: int) -> None:
    data = os.urandom(10_000)
    paths = [b"a/x", b"a/y", b"b"]
    (tmp_path / "a").mkdir()
    for path in paths:
        (tmp_path / path.decode()).write_bytes(data)
    folder = os.open(tmp_path, os.O_RDONLY)
    hits: Counter[str] = Counter()
    for ban in (None, "openat2"):
        for n in range(1, 200):
            memory = np.zeros((3, 10_000), np.uint8)
            address = np.uint64(memory.ctypes.data) + np.arange(3, dtype=np.uint64) * 10_000
            _engine.fault_ban(ban, errno.ENOSYS)
            _engine.fault_arm(n, error)
            failure = sizes = None
            try:
                sizes = _engine.read_files(
                    folder, paths, address, np.full(3, 10_000, np.uint64), threads=1
                ).tolist()
            except OSError as caught:
                failure = caught
            hit = _engine.fault_hit()
            _engine.fault_arm(0, 0)
            if hit is None:
                break
            hits[hit] += 1
            if failure is not None:
                assert (error, hit) == (errno.EIO, "pread")
                assert failure.filename in ("a/x", "a/y", "b")
                continue
            assert sizes is not None
            for size, row in zip(sizes, memory, strict=True):
                assert size == 10_000 or (size == -errno.EIO == -error), hit
                assert size < 0 or row.tobytes() == data
    os.close(folder)
    assert {"openat2", "openat", "fstat", "pread", "close"} <= set(hits)
