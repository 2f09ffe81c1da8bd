"""open: nothing read but the header, tensors when asked for."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine
from holdfast.layout import Entry


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    obj = {
        "model": {"fc.weight": np.arange(600.0).reshape(30, 20), "fc.bias": rng.random(5, "f4")},
        "step": np.array(7),
        "lr": [0.5, None],
    }
    holdfast.save(obj, tmp_path / "ckpt", metadata={"who": "me"})
    return tmp_path / "ckpt"


@pytest.fixture(params=["path", "stream", "network"])
def opened(request: pytest.FixtureRequest, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "network":
        monkeypatch.setattr(_engine, "filesystem", lambda fd: 0x6969)
    source: Any = io.BytesIO(saved.read_bytes()) if request.param == "stream" else saved
    with holdfast.open(source) as f:
        yield f


def test_mapping(opened: Any) -> None:
    names = ["model.fc.weight", "model.fc.bias", "step"]
    assert list(opened) == list(opened.keys()) == names and len(opened) == 3
    assert "step" in opened and "lr" not in opened and 7 not in opened
    assert opened["step"] == 7 and opened["model.fc.weight"][2, 3] == 43
    assert dict(opened.items())["model.fc.bias"].dtype == np.float32
    assert opened.get("absent") is None
    for other in (7, None, b"step", ("step",)):
        assert opened.get(other) is None
        with pytest.raises(KeyError, match="no tensor is called"):
            opened[other]
    for other in (["step"], np.zeros(2), {}):  # which no dict could be asked for
        assert other not in opened and opened.get(other, 7) == 7
        for use in (opened.__getitem__, opened.info, opened.slice):
            with pytest.raises(KeyError, match="no tensor is called"):
                use(other)
    with pytest.raises(KeyError, match="did you mean 'model.fc.bias'"):
        opened["model.fc.bais"]
    assert opened.metadata == {"who": "me"}
    assert "3 tensors, open" in repr(opened)


def test_info_and_tree(opened: Any, saved: Path) -> None:
    info = opened.info("model.fc.weight")
    assert (info.name, info.dtype, info.shape, info.nbytes) == (
        "model.fc.weight", "float64", (30, 20), 4800,
    )  # fmt: skip
    raw = saved.read_bytes()[info.offset : info.offset + info.nbytes]
    assert raw == np.arange(600.0).tobytes()
    tree = opened.tree()
    assert tree["lr"] == [0.5, None]
    assert isinstance(tree["step"], Entry) and tree["model"]["fc.weight"] == info


@pytest.mark.parametrize(
    "key",
    [
        np.s_[10:20, ::2], np.s_[3], np.s_[-1, 5:], np.s_[::-3], np.s_[25:100], np.s_[5:2],
        np.s_[...], np.s_[:, 3], np.s_[[1, 4]], np.s_[8:3:-2, 1],
    ],
)  # fmt: skip
def test_slices(opened: Any, key: Any) -> None:
    part = opened.slice("model.fc.weight")
    assert part.shape == (30, 20) and part.dtype == "float64" and len(part) == 30
    want = np.arange(600.0).reshape(30, 20)[key]
    assert np.array_equal(part[key], want) and part[key].shape == want.shape
    with pytest.raises(IndexError):
        part[30]
    with pytest.raises(TypeError):
        len(opened.slice("step"))


@pytest.mark.parametrize("stream", [False, True])
def test_slices_of_dtypes_that_the_table_lacks(tmp_path: Path, stream: bool) -> None:
    days = np.arange(6).astype("M8[D]").reshape(2, 3)
    path = tmp_path / "days"
    holdfast.save({"days": days, "day": days[:1, 0].reshape(())}, path)
    with holdfast.open(io.BytesIO(path.read_bytes()) if stream else path) as f:
        part, single = f.slice("days"), f.slice("day")
        assert (part.shape, part.dtype, len(part)) == ((2, 3), "<M8[D]", 2)
        assert (part[1:, ::-1] == days[1:, ::-1]).all() and part[-1, 2] == days[-1, 2]
        assert single.shape == () and single[()] == days[0, 0]
        assert f.info("days").shape == (2, 3, 8)  # as it stands in the file


def test_prefetch(opened: Any) -> None:
    opened.prefetch()
    opened.prefetch("model.*")
    assert opened["model.fc.weight"].sum() == 179700


def test_closed(saved: Path) -> None:
    f = holdfast.open(saved)
    weight = f["model.fc.weight"]
    f.close()
    f.close()
    assert weight[29, 19] == 599
    with pytest.raises(ValueError, match="closed"):
        f["step"]
    with pytest.raises(ValueError, match="closed"):
        f.prefetch()
    assert "closed" in repr(f)


@pytest.mark.parametrize("way", ["tensor", "slice", "prefetch"])
def test_closed_beside_a_thread_that_reads(
    way: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor, which would be the next file's, is closed when the read has ended."""
    from holdfast import fetch

    f = holdfast.open(saved)
    f._mapped = False  # as on a network file system
    move, reading, closed = fetch.move, threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> None:
        reading.set()
        assert closed.wait(60)
        move(*args, **options)

    monkeypatch.setattr(fetch, "move", slowly)
    found: list[Any] = []

    def use() -> None:
        if way == "prefetch":
            f.prefetch()
        else:
            part = f["model.fc.weight"] if way == "tensor" else f.slice("model.fc.weight")[29:]
            found.append(float(part[-1, 19]))

    thread = threading.Thread(target=use)
    thread.start()
    assert reading.wait(60)
    fd = f._reader.source.fd
    f.close()
    assert "closed" in repr(f) and os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        f["step"]
    closed.set()
    thread.join()
    assert found == ([] if way == "prefetch" else [599.0])
    assert f._reader.source.fd == -1 and not f._held
    with pytest.raises(OSError):
        os.fstat(fd)


def test_closed_in_a_child_of_a_process_that_reads(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the thread is not that reads here."""
    from holdfast import fetch

    f = holdfast.open(saved)
    f._mapped = False
    move = fetch.move
    found: list[int] = []

    def slowly(*args: Any, **options: Any) -> None:
        pid = os.fork()
        if pid == 0:
            fd = f._reader.source.fd
            f._users = {(os.getppid(), object())}
            f.close()
            os._exit(7 if f._reader.source.fd == -1 and fd >= 0 else 1)
        found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        move(*args, **options)

    monkeypatch.setattr(fetch, "move", slowly)
    assert f["model.fc.weight"][29, 19] == 599
    assert found == [7]
    f.close()


def test_closed_again_and_again_beside_threads_that_read(saved: Path) -> None:
    raised: list[BaseException] = []
    right = 0

    def use(f: Any, start: threading.Barrier) -> None:
        nonlocal right
        start.wait()
        try:
            while True:
                right += f["model.fc.weight"][29, 19] == 599
                right += f.slice("model.fc.weight")[3:4].shape == (1, 20)
        except BaseException as error:
            if not (isinstance(error, ValueError) and "closed" in str(error)):
                raised.append(error)

    for k in range(60):
        f = holdfast.open(saved)
        f._mapped = k % 2 == 0
        start = threading.Barrier(4)
        threads = [threading.Thread(target=use, args=(f, start)) for _ in range(3)]
        for thread in threads:
            thread.start()
        start.wait()
        time.sleep(k % 7 / 1000)
        f.close()
        for thread in threads:
            thread.join()
        assert f._reader.source.fd == -1
    assert raised == [] and right > 0


def test_dropped_without_close(saved: Path) -> None:
    f = holdfast.open(saved)
    weight = f["model.fc.weight"]
    del f
    assert weight[0, 1] == 1


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A file whose data are a hole of 1 TB opens as quickly, and a slice of it reads."""
    path = tmp_path / "huge"
    holdfast.save({"x": np.ones(4)}, path)
    header = path.read_bytes()[:4096]
    size = 1 << 40
    import json
    import struct

    entry = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(entry).encode().ljust(len(header) - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        try:
            file.truncate(4096 + size)
        except OSError:
            pytest.skip("this file system has no files of 1 TB")
    with holdfast.open(path) as f:
        assert f.info("x").nbytes == size
        assert f.slice("x")[size - 5 : size - 3].tolist() == [0, 0]


def test_is_itself_alone(saved: Path) -> None:
    with holdfast.open(saved) as f, holdfast.open(saved) as g:
        assert f == f and f != g and len({f, g}) == 2
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="open the file again"):
                way(f)
        assert f["step"] == 7


def test_threads_share_a_stream(tmp_path: Path) -> None:
    """The position of a file object is one; without checksums nothing else would notice."""
    obj = {f"t{i}": np.full(500 + i, i) for i in range(40)}
    holdfast.save(obj, tmp_path / "x", checksum=False)

    class Slow(io.BytesIO):
        def seek(self, *where: int) -> int:
            found = super().seek(*where)
            time.sleep(0)  # lets another thread in
            return found

    with holdfast.open(Slow((tmp_path / "x").read_bytes())) as f, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (f[f"t{i % 40}"] == i % 40).all(), range(400)))
    assert len(found) == 400 and all(found)


class _Once(io.BytesIO):
    """A file object that cannot seek, like a pipe."""

    def seekable(self) -> bool:
        return False

    def seek(self, *where: int) -> int:
        raise io.UnsupportedOperation("seek")

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


def test_a_stream_that_cannot_seek_is_read_once(saved: Path) -> None:
    data = saved.read_bytes()
    with holdfast.open(_Once(data)) as f:
        assert f.info("step").shape == () and "step" in f
        f.prefetch()
        assert f["step"] == 7 and f["model.fc.bias"].shape == (5,)
    with holdfast.open(_Once(data)) as f:
        assert f["step"] == 7
        with pytest.raises(io.UnsupportedOperation, match=r"_Once.*load\(\)"):
            f["model.fc.bias"]
    target = {"model": {"fc.weight": np.zeros((30, 20)), "fc.bias": np.zeros(5, "f4")}}
    target["step"] = np.zeros((), "i8")  # type: ignore[assignment]
    holdfast.load_into(target, _Once(data))
    assert target["step"] == 7
    target["model"]["fc.bias"] = np.zeros(5)
    target["step"][...] = 0  # type: ignore[index]
    with pytest.raises(io.UnsupportedOperation, match=r"cannot seek.*'model.fc.bias'"):
        holdfast.load_into(target, _Once(data))
    assert target["step"] == 0


def test_cost_of_a_name_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for each of n tensors walks the tree a fixed number of times, not n."""
    from holdfast import tree

    shared = np.ones(2)
    holdfast.save({"t": np.zeros(2, "M8[s]"), "l": [shared] * 50}, tmp_path / "x")
    walks: list[object] = []
    walk = tree.walk
    monkeypatch.setattr(tree, "walk", lambda node: (walks.append(node), walk(node))[1])
    with holdfast.open(tmp_path / "x") as f:
        assert len(f) == 51 and len(list(f)) == 51
        for name in f:
            assert name in f and f.info(name).nbytes == 16 and len(f[name]) == 2
            assert f.slice(name)[:1].size == 1 and f.get(name + "?") is None
    assert 0 < len(walks) < 10
