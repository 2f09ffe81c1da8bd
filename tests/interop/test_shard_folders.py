"""Folders of shards that lie, or hold other things: what is refused, and what is left alone."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import FormatError, _engine
from shard_files import INDEX, index_of, listing, rewrite, same, shards, tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    holdfast.save(tensors(), folder, max_shard_size=8000)
    return folder


# ---- indexes that lie -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    ["../model/a.safetensors", "/etc/passwd", "sub/a", "..", ".", "", "a\\b", "C:a", "a\0b", 3],
)
def test_files_outside_the_folder_are_refused(saved: Path, file: Any) -> None:
    rewrite(saved, lambda found: found["weight_map"].update({"layer.0.w": file}))
    with pytest.raises(FormatError, match=r"layer\.0\.w.*same folder"):
        holdfast.load(saved)


def test_a_missing_shard(saved: Path) -> None:
    (saved / shards("model", 5)[2]).unlink()
    with pytest.raises(FormatError, match=r"00003-of-00005\.safetensors: a file .* is missing"):
        holdfast.load(saved)


def test_a_tensor_that_is_not_in_its_shard(saved: Path) -> None:
    rewrite(saved, lambda found: found["weight_map"].update(x="model-00001-of-00005.safetensors"))
    with pytest.raises(FormatError, match="'x' is not in it"):
        holdfast.load(saved)


def test_a_tensor_that_stands_in_two(saved: Path) -> None:
    def move(found: dict[str, Any]) -> None:
        found["weight_map"]["layer.0.w"] = "other.safetensors"

    holdfast.save({"layer.0.w": tensors()["layer.0.w"]}, saved / "other.safetensors")
    rewrite(saved, move)
    with pytest.raises(FormatError, match="two checkpoints"):
        holdfast.load(saved)


def test_a_tensor_that_the_index_leaves_out_is_a_warning(saved: Path) -> None:
    rewrite(saved, lambda found: found["weight_map"].pop("layer.0.w"))
    with pytest.warns(UserWarning, match=r"layer\.0\.w"):
        assert "layer.0.w" not in holdfast.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": {}, "metadata": 3}',
        '{"weight_map": {"a": NaN}}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": {}, "metadata": {"holdfast": {"version": 1}}}',
        '{"weight_map": {}, "metadata": {"holdfast": 3}}',
    ],
    ids=range(9),
)
def test_damaged_indexes(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError):
        holdfast.load(tmp_path)


def test_an_index_of_a_newer_version(saved: Path) -> None:
    path = saved / INDEX
    data = path.read_bytes().replace(b'"version": 1', b'"version": 9')
    at = data.index(b'"crc32": "') + 10
    crc = b"%08x" % zlib.crc32(data[:at] + b"0" * 8 + data[at + 8 :])
    path.write_bytes(data[:at] + crc + data[at + 8 :])
    with pytest.raises(FormatError, match="newer holdfast"):
        holdfast.load(saved)
    assert same(holdfast.load(saved, verify=False), tensors())


def test_an_index_as_a_file_object_is_told_why_not(saved: Path) -> None:
    import io

    with pytest.raises(FormatError, match="path"):
        holdfast.load(io.BytesIO((saved / INDEX).read_bytes()))


def test_a_shard_that_is_an_index(saved: Path) -> None:
    (saved / shards("model", 5)[0]).write_bytes((saved / INDEX).read_bytes())
    with pytest.raises(FormatError, match="found an index"):
        holdfast.load(saved)


def test_a_shard_that_is_a_pipe_does_not_hang(saved: Path) -> None:
    path = saved / shards("model", 5)[1]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="neither a file"):
        holdfast.load(saved)


def test_two_indexes_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a", "b"):
        holdfast.save(tensors(), tmp_path / name, max_shard_size=8000)
        (tmp_path / name / INDEX).rename(tmp_path / f"{name}.index.json")
    with pytest.raises(FormatError, match="give the path of one"):
        holdfast.load(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="found nothing"):
        holdfast.load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(IsADirectoryError, match=r"notes\.txt"):
        holdfast.open(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(FormatError, match=r"torch\.distributed"):
        holdfast.load(tmp_path)


# ---- what else is in the folder -------------------------------------------------------------


def test_names_in_an_index_are_no_licence_to_remove(tmp_path: Path) -> None:
    for name in ("train.py", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    weight_map = {"a": "train.py", "b": "tokenizer.json", "c": INDEX}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    holdfast.save(tensors(), tmp_path, max_shard_size=8000)

    assert same(holdfast.load(tmp_path), tensors())
    assert (tmp_path / "train.py").read_text() == "mine"
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("size", [8000, "1GB"])
@pytest.mark.parametrize(
    "other", ["pytorch_model.bin.index.json", "x.index.json", "snapshot", "pickle", "two"]
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, other: str, size: int | str) -> None:
    if other in ("snapshot", "pickle"):
        obj = tensors(7) if other == "snapshot" else {"deep": {"er": tensors(7)}}
        holdfast.save(obj, tmp_path / "m", format="oneflow")
    else:
        holdfast.save(tensors(7), tmp_path / "m", max_shard_size=8000)
        (tmp_path / "m" / INDEX).rename(
            tmp_path / "m" / (other if "." in other else "a.index.json")
        )
        if other == "two":
            holdfast.save(tensors(8), tmp_path / "m", max_shard_size=8000)
            (tmp_path / "m" / INDEX).rename(tmp_path / "m" / "b.index.json")

    holdfast.save(tensors(1), tmp_path / "m", max_shard_size=size)

    assert same(holdfast.load(tmp_path / "m"), tensors(1))
    if other == "x.index.json":  # another checkpoint in the same folder stays what it was
        assert same(holdfast.load(tmp_path / "m" / other), tensors(7))


def test_a_file_called_out_makes_no_oneflow_folder(saved: Path) -> None:
    (saved / "out").write_text("a log")
    (saved / "logs").mkdir()
    (saved / "logs" / "out").write_text("a log")
    assert same(holdfast.load(saved), tensors())
    for name in [*shards("model", 5), INDEX]:
        (saved / name).unlink()
    with pytest.raises(IsADirectoryError):
        holdfast.load(saved)


def test_two_saves_at_once_do_not_mix(tmp_path: Path) -> None:
    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match="under way"):
            holdfast.save(tensors(2), tmp_path / "m", max_shard_size=8000)

    holdfast.save(tensors(1), tmp_path / "m", max_shard_size=8000, progress=meanwhile)
    assert same(holdfast.load(tmp_path / "m"), tensors(1))


def test_shards_of_another_index_are_not_written_over(saved: Path) -> None:
    (saved / INDEX).rename(saved / "mine.safetensors.index.json")
    _engine.fault_ban("pwrite", errno.ENOSPC)
    try:
        with pytest.raises(OSError, match="No space"):
            holdfast.save(tensors(1), saved, max_shard_size=8000)
    finally:
        _engine.fault_ban(None, 0)
    assert same(holdfast.load(saved), tensors())


def test_what_a_killed_save_left_is_removed_by_the_next(saved: Path) -> None:
    stray = [*shards("model.next", 2), "model-00009-of-00009.safetensors"]
    for name in (*stray, "train.py"):
        (saved / name).write_bytes(b"")
    named = [stray[0], stray[1], "train.py", shards("model", 5)[0]]
    (saved / ".holdfast-shards").write_text("\n".join(named))

    holdfast.save(tensors(1, n=2), saved, max_shard_size=4000)

    assert same(holdfast.load(saved), tensors(1, n=2))
    left = set(listing(saved))
    assert left == {*shards("model", 2), INDEX, "train.py", stray[2]}


@pytest.mark.parametrize("name", [INDEX, ".holdfast-shards"])
def test_a_pipe_in_the_folder_does_not_hang_a_save(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match="neither a file"):
        holdfast.save(tensors(), tmp_path, max_shard_size=8000)


@pytest.mark.parametrize("file", ["\ud800", "a" * 300])
def test_names_that_no_file_can_have(saved: Path, file: str) -> None:
    rewrite(saved, lambda found: found["weight_map"].update({"layer.0.w": file}))
    with pytest.raises(FormatError, match="same folder"):
        holdfast.load(saved)
    assert not holdfast.verify(saved).ok


def test_a_framework_that_is_no_name(saved: Path) -> None:
    found = index_of(saved)
    found["metadata"]["holdfast"]["framework"] = ["x"]
    (saved / INDEX).write_text(json.dumps(found))
    with pytest.raises(FormatError, match="name of a framework"):
        holdfast.load(saved, verify=False)


def test_deflated_shards(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(100_000, np.float32))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"zeros": "a.npz"}}))
    assert not holdfast.load(tmp_path)["zeros"].any()


def test_links_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    name = shards("model", 5)[0]
    (saved / name).rename(tmp_path / "elsewhere.safetensors")
    (saved / name).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="out of the folder"):
        holdfast.load(saved)
    hub = tmp_path / "hub"
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    holdfast.save(tensors(), tmp_path / "other", max_shard_size=8000)
    for i, file in enumerate(listing(tmp_path / "other")):
        (tmp_path / "other" / file).rename(hub / "blobs" / f"{i:08x}")
        (snapshot / file).symlink_to(f"../../blobs/{i:08x}")
    assert same(holdfast.load(snapshot), tensors())


def test_more_shards_than_may_be_open(tmp_path: Path) -> None:
    wanted = {f"t{i}": np.full(3, i, np.float32) for i in range(700)}
    holdfast.save(wanted, tmp_path / "m", max_shard_size=12)
    rewrite(tmp_path / "m", lambda found: None)
    order = np.random.default_rng(2).permutation(700).tolist()
    target = {f"t{i}": np.zeros(3, np.float32) for i in order}
    holdfast.load_into(target, tmp_path / "m")
    assert all(target[name].tolist() == wanted[name].tolist() for name in wanted)
    assert same(holdfast.load(tmp_path / "m", mmap=False), wanted)


def test_a_gguf_file_as_a_shard_keeps_its_blocks(tmp_path: Path, golden: Path) -> None:
    path = next((golden / "gguf").glob("*.gguf"))
    (tmp_path / "a.gguf").write_bytes(path.read_bytes())
    whole = holdfast.load(path, framework="numpy", dequantize=True)
    weight_map = dict.fromkeys(whole, "a.gguf")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = holdfast.load(tmp_path, framework="numpy", dequantize=True)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in whole.items()
    }


@pytest.mark.parametrize("deep", [False, True])
def test_a_folder_of_checkpoints_is_none(tmp_path: Path, deep: bool) -> None:
    obj = {"model": {"deep": tensors(1, n=2)}} if deep else tensors(1, n=2)
    for name in ("epoch1", "epoch2"):
        holdfast.save(obj, tmp_path / name, format="oneflow")
    with pytest.raises(FormatError, match="several checkpoints, 'epoch1' the first"):
        holdfast.load(tmp_path)


def test_verify_tells_of_a_save_that_was_interrupted(tmp_path: Path) -> None:
    holdfast.save(tensors(1, n=2), tmp_path / "m", format="oneflow")
    assert holdfast.verify(tmp_path / "m").ok
    (tmp_path / "m" / "snapshot_done").unlink()
    report = holdfast.verify(tmp_path / "m")
    assert not report.ok and "interrupted" in report.problems[0]
