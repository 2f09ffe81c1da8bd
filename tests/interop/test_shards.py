"""Checkpoints in several files: saved, loaded as one, replaced."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import ChecksumError, _engine
from holdfast.sharding import size_of
from shard_files import INDEX, index_of, listing, same, shards, tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    holdfast.save(tensors(), folder, max_shard_size=8000)
    return folder


# ---- what is written -----------------------------------------------------------------------


def test_the_layout_of_the_hub(saved: Path) -> None:
    assert listing(saved) == [*shards("model", 5), INDEX]
    found = index_of(saved)
    assert found["metadata"]["total_size"] == 9 * 4000
    assert list(found["weight_map"]) == list(tensors())
    assert found["weight_map"]["layer.2.w"] == "model-00002-of-00005.safetensors"


def test_safetensors_reads_every_shard(saved: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    found: dict[str, np.ndarray] = {}
    for name in shards("model", 5):
        found |= safetensors.load_file(saved / name)
    assert same({key: found[key] for key in tensors()}, tensors())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["", INDEX])
def test_load_from_the_folder_or_its_index(saved: Path, name: str, mmap: bool) -> None:
    assert same(holdfast.load(saved / name, mmap=mmap), tensors())


def test_a_nested_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = tensors()
    weights["tied"] = weights["layer.0.w"]
    saved = {"model": weights, "epoch": 3, "betas": (0.9, 0.99), "long": b"x" * 5000, 7: None}
    holdfast.save(saved, tmp_path / "c", max_shard_size="8KB")

    loaded = holdfast.load(tmp_path / "c")

    assert same(loaded.pop("model"), weights)
    assert loaded == {"epoch": 3, "betas": (0.9, 0.99), "long": b"x" * 5000, 7: None}
    assert holdfast.load(tmp_path / "c")["model"]["tied"] is not None
    again = holdfast.load(tmp_path / "c")["model"]
    assert again["tied"] is again["layer.0.w"]


def test_one_that_fits_needs_no_index(tmp_path: Path) -> None:
    holdfast.save({"model": tensors(), "epoch": 1}, tmp_path / "c", max_shard_size="1GB")
    assert listing(tmp_path / "c") == ["model.safetensors"]
    assert holdfast.load(tmp_path / "c")["epoch"] == 1


def test_a_larger_tensor_stands_alone_and_none_is_no_tensor(tmp_path: Path) -> None:
    holdfast.save(tensors(n=3), tmp_path / "c", max_shard_size=10)
    assert len(shards("model", 3)) == len(listing(tmp_path / "c")) - 1
    holdfast.save({}, tmp_path / "none", max_shard_size=10)
    assert holdfast.load(tmp_path / "none") == {}


def test_metadata_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    holdfast.save(
        tensors(),
        tmp_path / "c",
        max_shard_size=8000,
        metadata={"who": "me"},
        progress=lambda *a: seen.append(a),
    )
    with holdfast.open(tmp_path / "c") as f:
        assert f.metadata["who"] == "me"
    assert seen[-1] == (36000, 36000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with pytest.raises(ValueError, match="total_size"):
        holdfast.save(tensors(), tmp_path / "d", max_shard_size=8000, metadata={"total_size": "1"})


def test_sizes_as_people_write_them() -> None:
    assert size_of("5GB") == 5_000_000_000
    assert size_of("2 GiB") == 2 << 30
    assert size_of("1.5kb") == 1500
    assert size_of("12") == size_of(12) == 12
    for bad, kind in (
        ("5 apples", ValueError),
        (0, ValueError),
        (True, TypeError),
        ((), TypeError),
    ):
        with pytest.raises(kind, match="max_shard_size"):
            size_of(bad)  # type: ignore[arg-type]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    import io

    with pytest.raises(TypeError, match="folder"):
        holdfast.save(tensors(), io.BytesIO(), max_shard_size=10)
    with pytest.raises(ValueError, match="folder"):
        holdfast.save(tensors(), tmp_path / "a.safetensors", max_shard_size=10)
    with pytest.raises(ValueError, match="torch"):
        holdfast.save(tensors(), tmp_path / "a", max_shard_size=10, format="torch")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="Shards are written to a folder") as caught:
        holdfast.save(tensors(), tmp_path / "file", max_shard_size=10)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, str(tmp_path / "file"))


# ---- all that a checkpoint can do -----------------------------------------------------------


def test_open_slices_keys_verify_convert_fill(saved: Path, tmp_path: Path) -> None:
    wanted = tensors()
    with holdfast.open(saved) as f:
        assert list(f) == list(wanted)
        assert f.info("layer.2.w").file.endswith("model-00002-of-00005.safetensors")
        assert np.array_equal(f.slice("layer.3.w")[3:5, 1], wanted["layer.3.w"][3:5, 1])
        f.prefetch("layer.1*")
    assert list(holdfast.load(saved, keys=["layer.8.*", "layer.0.w"])) == ["layer.0.w", "layer.8.w"]
    report = holdfast.verify(saved)
    assert (report.ok, report.checked, report.unchecked) == (True, 9, 0)
    holdfast.convert(saved, tmp_path / "one.safetensors")
    assert same(holdfast.load(tmp_path / "one.safetensors"), wanted)
    target = {name: np.zeros_like(value) for name, value in wanted.items()}
    holdfast.load_into(target, saved)
    assert same(target, wanted)


def test_a_flipped_bit_anywhere_is_seen(saved: Path) -> None:
    for name in listing(saved):
        path = saved / name
        data = path.read_bytes()
        for at in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            assert not holdfast.verify(saved).ok, (name, at)
        path.write_bytes(data)
    assert holdfast.verify(saved).ok


def test_damage_is_told_with_tensor_and_file(saved: Path) -> None:
    path = saved / shards("model", 5)[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"00004-of-00005\.safetensors: tensor 'layer\.7\.w'"):
        holdfast.load(saved, mmap=False)


def test_shards_without_checksums_beside_shards_with(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    wanted = tensors(n=2)
    safetensors.save_file({"layer.0.w": wanted["layer.0.w"]}, tmp_path / "a.safetensors")
    holdfast.save({"layer.1.w": wanted["layer.1.w"]}, tmp_path / "b.safetensors")
    weight_map = {"layer.1.w": "b.safetensors", "layer.0.w": "a.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    assert list(holdfast.load(tmp_path, mmap=False)) == ["layer.1.w", "layer.0.w"]
    report = holdfast.verify(tmp_path)
    assert (report.ok, report.checked, report.unchecked) == (True, 1, 1)


def test_shards_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight_map: dict[str, str] = {}
    wanted = {}
    for i in range(2):
        big = torch.randn(10, 10)
        part = {f"w{i}": big, f"view{i}": big[2:5].t(), f"p{i}": torch.arange(i + 3)}
        name = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
        wanted |= part
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))
    for mmap in (True, False):
        loaded = holdfast.load(tmp_path, mmap=mmap)
        assert list(loaded) == list(wanted)
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        base = loaded["w1"].untyped_storage().data_ptr()
        assert loaded["view1"].untyped_storage().data_ptr() == base
    assert isinstance(holdfast.load(path, framework="numpy")["view0"], np.ndarray)


# ---- replacing ------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_and_other_files_stay(saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    holdfast.save(tensors(1), saved, max_shard_size=8000)
    assert listing(saved) == ["config.json", *shards("model.next", 5), INDEX]
    assert same(holdfast.load(saved), tensors(1))

    holdfast.save(tensors(2, n=4), saved, max_shard_size=8000)
    assert listing(saved) == ["config.json", *shards("model", 2), INDEX]
    assert same(holdfast.load(saved), tensors(2, n=4))

    holdfast.save(tensors(3), saved, max_shard_size="1MB")
    assert listing(saved) == ["config.json", "model.safetensors"]
    holdfast.save(tensors(4), saved, max_shard_size=8000)
    assert same(holdfast.load(saved), tensors(4))
    assert "model.safetensors" not in listing(saved)


def test_whichever_call_fails_one_checkpoint_is_there_whole(saved: Path) -> None:
    old, new = tensors(), tensors(1, n=5)
    for n in range(1, 2000):
        _engine.fault_arm(n, errno.EIO)
        try:
            holdfast.save(new, saved, max_shard_size=8000)
        except OSError:
            failed = True
        else:
            failed = False
        finally:
            hit = _engine.fault_hit()
            _engine.fault_arm(0, 0)
        loaded = holdfast.load(saved, mmap=False)
        if hit is None:
            assert same(loaded, new)
            break
        assert same(loaded, old) or same(loaded, new)
        assert failed or same(loaded, new)
        if same(loaded, new):
            holdfast.save(old, saved, max_shard_size=8000)
        assert not [name for name in listing(saved) if name.endswith(".tmp")]
    else:
        pytest.fail("the save never came to its end")


def test_a_new_folder_is_not_left_behind(tmp_path: Path) -> None:
    _engine.fault_ban("pwrite", errno.ENOSPC)
    try:
        with pytest.raises(OSError, match="No space"):
            holdfast.save(tensors(), tmp_path / "c", max_shard_size=8000)
    finally:
        _engine.fault_ban(None, 0)
    assert not (tmp_path / "c").exists()
