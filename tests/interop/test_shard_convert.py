"""holdfast.convert to a folder of shards: from every format, onto itself, and when it fails."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import ChecksumError, _engine
from holdfast.cli import main
from shard_files import INDEX, index_of, listing, same, shards, tensors

FORMATS = {
    "safetensors": ".safetensors",
    "torch": ".pt",
    "torch_legacy": ".old",
    "npz": ".npz",
    "oneflow": "",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    holdfast.save(tensors(), path)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_from_every_format(tmp_path: Path, form: str) -> None:
    src = tmp_path / f"src{FORMATS[form]}"
    holdfast.save(tensors(), src, format=form)
    holdfast.convert(src, tmp_path / "m", max_shard_size=8000)
    assert listing(tmp_path / "m") == [*shards("model", 5), INDEX]
    assert index_of(tmp_path / "m")["metadata"]["total_size"] == 9 * 4000
    found = holdfast.load(tmp_path / "m", framework="numpy")
    assert {name: found[name].tolist() for name in found} == {
        name: tensor.tolist() for name, tensor in tensors().items()
    }
    report = holdfast.verify(tmp_path / "m")
    assert report.ok and report.checked == 9


@pytest.mark.parametrize("form", ["safetensors", "torch", "torch_legacy"])
def test_a_nested_checkpoint_and_its_metadata(tmp_path: Path, form: str) -> None:
    weights = OrderedDict(tensors())
    saved = {"model": weights, "head": weights["layer.3.w"], "epoch": 3, 7: (None, b"x" * 5000)}
    metadata = None if form == "torch_legacy" else {"by": "me"}
    holdfast.save(saved, tmp_path / "src", format=form, metadata=metadata)
    holdfast.convert(tmp_path / "src", tmp_path / "m", max_shard_size="8KB")
    found = holdfast.load(tmp_path / "m", framework="numpy")
    assert type(found["model"]) is OrderedDict and same(found["model"], weights)
    assert found["head"] is found["model"]["layer.3.w"]
    assert found["epoch"] == 3 and found[7] == (None, b"x" * 5000)
    with holdfast.open(tmp_path / "m") as f:
        assert f.metadata == (metadata or {})


def test_other_sizes_of_shards_and_one_file(tmp_path: Path, source: Path) -> None:
    holdfast.convert(source, tmp_path / "m", max_shard_size=8000)
    holdfast.convert(tmp_path / "m", tmp_path / "n", max_shard_size=16_000)
    assert listing(tmp_path / "n") == [*shards("model", 3), INDEX]
    holdfast.convert(tmp_path / "n" / INDEX, tmp_path / "o", max_shard_size="1MB")
    assert listing(tmp_path / "o") == ["model.safetensors"]
    holdfast.convert(tmp_path / "o", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_checksums_are_left_out_where_they_are_not_wanted(tmp_path: Path, source: Path) -> None:
    holdfast.convert(source, tmp_path / "m", max_shard_size=8000, checksum=False)
    assert holdfast.verify(tmp_path / "m").unchecked == 9


def test_onto_itself(tmp_path: Path) -> None:
    large = {f"t{i}": np.full(40_000, i, np.float32) for i in range(6)}
    small = {f"s{i}": np.full(3, i, np.float32) for i in range(6)}
    folder = tmp_path / "m"
    holdfast.save(large | small, folder, max_shard_size=160_000)
    for size, names in ((320_012, 5), ("1GB", 1), (160_000, 8)):
        holdfast.convert(folder, folder, max_shard_size=size)
        assert len(listing(folder)) == names
        assert same(holdfast.load(folder), large | small)


def test_a_file_in_the_folder_that_it_becomes(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name[:5]
        folder.mkdir()
        holdfast.save(tensors(), folder / name)
        holdfast.convert(folder / name, folder, max_shard_size=8000)
        kept = [name] if name == "pytorch_model.bin" else []
        assert listing(folder) == sorted([*shards("model", 5), INDEX, *kept])
        assert same(holdfast.load(folder, framework="numpy"), tensors())


def test_file_objects_and_progress(tmp_path: Path, source: Path) -> None:
    calls: list[tuple[int, int]] = []
    holdfast.convert(
        io.BytesIO(source.read_bytes()),
        tmp_path / "m",
        max_shard_size=8000,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert same(holdfast.load(tmp_path / "m"), tensors())
    assert calls[-1] == (36_000, 36_000) and calls == sorted(calls)


def test_blocks_of_gguf_stay_blocks(tmp_path: Path, golden: Path) -> None:
    path = next((golden / "gguf").glob("*.gguf"))
    blocks = holdfast.load(path, framework="numpy")
    holdfast.convert(path, tmp_path / "m", max_shard_size=200)
    found = holdfast.load(tmp_path / "m", framework="numpy")
    assert same(found, blocks) and len(listing(tmp_path / "m")) > 2
    with holdfast.open(tmp_path / "m") as f:
        assert json.loads(f.metadata["gguf.encodings"]) == blocks.encodings


# ---- when it fails --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_damage_is_not_passed_on(tmp_path: Path, form: str) -> None:
    src = tmp_path / "src"
    holdfast.save(tensors(), src, format=form)
    with holdfast.open(src) as f:
        offset = f.info("layer.7.w").offset
    data = bytearray(src.read_bytes())
    data[offset + 9] ^= 1
    src.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"src: .*damaged"):
        holdfast.convert(src, tmp_path / "new", max_shard_size=8000)
    assert not (tmp_path / "new").exists()
    holdfast.save(tensors(1), tmp_path / "old", max_shard_size=8000)
    with pytest.raises(ChecksumError):
        holdfast.convert(src, tmp_path / "old", max_shard_size=8000)
    assert listing(tmp_path / "old") == [*shards("model", 5), INDEX]
    assert same(holdfast.load(tmp_path / "old"), tensors(1))


def test_whichever_call_fails_one_checkpoint_is_there_whole(tmp_path: Path) -> None:
    """Onto itself, where what is written and what is read are files of one folder."""
    folder, failures = tmp_path / "m", 0
    holdfast.save(tensors(n=4), folder, max_shard_size=8000)
    for n in range(1, 2000):
        _engine.fault_arm(n, errno.EIO)
        try:
            holdfast.convert(folder, folder, max_shard_size=4000)
        except OSError:
            failures += 1
        finally:
            hit = _engine.fault_hit()
            _engine.fault_arm(0, 0)
        assert same(holdfast.load(folder), tensors(n=4))
        assert not [name for name in listing(folder) if name.endswith(".tmp")]
        if hit is None:
            assert len(listing(folder)) == 5 and failures > 10
            break
        if len(listing(folder)) == 5:  # it was through but for the end
            holdfast.save(tensors(n=4), folder, max_shard_size=8000)
    else:
        pytest.fail("the conversion never came to its end")


def test_targets_that_cannot_be(tmp_path: Path, source: Path) -> None:
    for dst, options, message in (
        (io.BytesIO(), {}, "path of a folder"),
        (tmp_path / "x", {"format": "torch"}, "safetensors files, not 'torch'"),
        (tmp_path / "x", {"format": "oneflow"}, "safetensors files, not 'oneflow'"),
        (tmp_path / "x.safetensors", {}, "give a folder"),
        (tmp_path / "x", {"max_shard_size": "much"}, "such as '5GB'"),
        (tmp_path / "x", {"max_shard_size": 1.5}, "must be an int or a str"),
    ):
        given: dict[str, Any] = {"max_shard_size": 8000, **options}
        with pytest.raises((TypeError, ValueError), match=message):
            holdfast.convert(source, dst, **given)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError):
        holdfast.convert(source, tmp_path / "notes", max_shard_size=8000)
    with pytest.raises(FileNotFoundError):
        holdfast.convert(tmp_path / "nothing", tmp_path / "x", max_shard_size=8000)
    assert listing(tmp_path) == ["notes", source.name]
    assert same(holdfast.load(source), tensors())


# ---- what it takes --------------------------------------------------------------------------


@pytest.mark.skipif(
    "HOLDFAST_SANITIZED" in os.environ, reason="the sanitizer takes memory of its own"
)
@pytest.mark.parametrize("form", ["torch", "shards"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    """320 MB in a process of its own: the resident set grows by a fraction of that."""
    code = """
import sys, numpy as np, holdfast
src, dst, form = sys.argv[1:]
row = np.random.default_rng(0).integers(0, 9, 3000, np.uint8)
parts = {
    f"t{i}": np.broadcast_to(row[i : i + 1000], (n // 1000, 1000))
    for i, n in enumerate([120_000_000, *[2_000_000] * 100])
}
how = {"max_shard_size": "100MB"} if form == "shards" else {"format": form}
holdfast.save(parts, src, durable=False, **how)
del parts
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
def high():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
start = high()
holdfast.convert(src, dst, durable=False, max_shard_size="50MB")
print(high() - start)
with holdfast.open(src, framework="numpy") as a, holdfast.open(dst, framework="numpy") as b:
    assert list(a) == list(b) and len(a) == 101
    assert all(np.array_equal(a[n], b[n]) for n in list(a)[:20])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b"), form],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 200_000_000


def test_the_command(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert main(["convert", str(source), str(tmp_path / "m"), "--max-shard-size", "8KB"]) == 0
    assert listing(tmp_path / "m") == [*shards("model", 5), INDEX]
    assert same(holdfast.load(tmp_path / "m"), tensors())
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(source), str(tmp_path / "n"), "--max-shard-size", "much"])
    assert "expected a size such as '5GB', found 'much'" in capsys.readouterr().err
    assert main(["convert", str(source), str(source), "--max-shard-size", "5GB"]) == 1
    assert not (tmp_path / "n").exists()
