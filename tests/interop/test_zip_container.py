"""The zip container beside PyTorch's writer, Python's reader and Info-ZIP."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.formats import _zip


def reader(path: Path) -> tuple[Callable[[int, int], bytes], int]:
    fd = os.open(path, os.O_RDONLY)
    data = memoryview(np.memmap(path, np.uint8, "r"))
    os.close(fd)
    return lambda offset, nbytes: bytes(data[offset : offset + nbytes]), len(data)


def rebuild(path: Path) -> int:
    """Lay the archive at `path` out anew, compare every byte; return how many pieces it has."""
    read, size = reader(path)
    found = _zip.scan(read, size, str(path))
    assert found.root is not None
    names = [name.removeprefix(f"{found.root}/") for name in found.names]
    inline = {
        row: _zip.extract(read, found, row, str(path), limit=1 << 20)
        for row, name in enumerate(names)
        if not name.startswith("data/")
    }
    skeleton = _zip.emit(found.root, names, found.rows["size"], inline)
    rest = np.array([row for row in range(len(names)) if row not in inline], np.int64)
    skeleton.stamp(rest, found.rows["crc"][rest])
    assert skeleton.size == size
    assert (skeleton.offsets == found.rows["offset"]).all()
    for offset, nbytes, start in zip(
        skeleton.piece_offset.tolist(),
        skeleton.piece_nbytes.tolist(),
        skeleton.piece_start.tolist(),
        strict=True,
    ):
        assert read(offset, nbytes) == skeleton.data[start : start + nbytes]
    return len(skeleton.piece_offset)


def test_the_layout_is_that_of_torch_save(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    for i, name in enumerate(["m.pt", "a.b.pt", "longer name.bin", "é.pt", "x"]):
        sizes = [0, 1, 7, 64, 65, 4096, 100_003][: 3 + i]
        tensors = {f"t{n}": torch.rand(n, generator=generator) for n in sizes}
        path = tmp_path / name
        torch.save({**tensors, "view": tensors["t7"][2:5]}, path)
        assert rebuild(path) == len(sizes)


def test_the_layout_of_large_records_is_that_of_torch_save(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "big.pt"
    sizes = [2**32 + 64, 16, 0, 2**32 - 1, 2**32 - 2, 1]
    # Storages of that many bytes that are neither touched nor written: the file has holes.
    with torch.serialization.skip_data():
        torch.save([torch.empty(size, dtype=torch.uint8) for size in sizes], path)
    assert path.stat().st_blocks * 512 < 10 << 20
    assert rebuild(path) == 6


def model(path: Path, sizes: list[int]) -> list[bytes]:
    """Write an archive to `path` as a save would: pieces and payloads."""
    rng = np.random.default_rng(5)
    payloads = [rng.bytes(size) for size in sizes]
    names = [*(f"data/{i}" for i in range(len(sizes))), "version"]
    skeleton = _zip.emit("r", names, np.array([*sizes, 2]), {len(sizes): b"3\n"})
    crcs = [zlib.crc32(payload) for payload in payloads]
    skeleton.stamp(np.arange(len(sizes)), np.array(crcs, np.uint32))
    with path.open("wb") as file:
        file.truncate(skeleton.size)
        columns: Any = (skeleton.piece_offset, skeleton.piece_nbytes, skeleton.piece_start)
        for offset, nbytes, start in zip(*(c.tolist() for c in columns), strict=True):
            file.seek(offset)
            file.write(skeleton.data[start : start + nbytes])
        for offset, payload in zip(skeleton.offsets.tolist(), payloads, strict=False):
            file.seek(offset)
            file.write(payload)
    return [*payloads, b"3\n"]


@pytest.mark.parametrize("sizes", [[], [0], [5, 0, 100_000, 1], [64] * 300])
def test_others_take_what_is_written(tmp_path: Path, sizes: list[int]) -> None:
    path = tmp_path / "x.zip"
    payloads = model(path, sizes)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert [archive.read(name) for name in archive.namelist()] == payloads
    unzip = shutil.which("unzip")
    if unzip is None:
        pytest.skip("unzip is not here")
    done = subprocess.run([unzip, "-t", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No errors detected" in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("level", ["-0", "-6", "-9"])
def test_archives_of_info_zip(tmp_path: Path, level: str) -> None:
    tool = shutil.which("zip")
    if tool is None:
        pytest.skip("zip is not here")
    folder = tmp_path / "archive"
    (folder / "data").mkdir(parents=True)
    payloads = {"archive/data.pkl": b"text " * 500, "archive/data/0": b"x", "archive/data/1": b""}
    for name, payload in payloads.items():
        (tmp_path / name).write_bytes(payload)
    subprocess.run([tool, "-q", "-r", level, "x.zip", "archive"], cwd=tmp_path, check=True)
    # From a pipe to a pipe: the size is not known when the header is written.
    piped = subprocess.run(
        [tool, "-q", "-", "-"], input=b"text " * 500, capture_output=True, check=True
    )
    (tmp_path / "piped.zip").write_bytes(piped.stdout)
    read, size = reader(tmp_path / "x.zip")
    found = _zip.scan(read, size, "x.zip")
    assert found.root == "archive"
    assert set(found.names) == {*payloads, "archive/", "archive/data/"}
    for name, payload in payloads.items():
        assert _zip.extract(read, found, found.find(name), "x.zip", limit=5000) == payload
    read, size = reader(tmp_path / "piped.zip")
    found = _zip.scan(read, size, "piped.zip")
    assert found.names == ["-"]
    assert _zip.extract(read, found, 0, "piped.zip", limit=5000) == b"text " * 500


def test_another_program_took_apart_and_put_together(tmp_path: Path) -> None:
    """A file of torch that was unpacked and packed again, as people do."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(100.0)}, path)
    shutil.unpack_archive(path, tmp_path / "apart", "zip")
    packed = shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path / "apart", "model")
    read, size = reader(Path(packed))
    found = _zip.scan(read, size, packed)
    row = found.find("model/data/0")
    data = _zip.extract(read, found, row, packed, limit=400)
    assert (np.frombuffer(data, np.float32) == np.arange(100)).all()
