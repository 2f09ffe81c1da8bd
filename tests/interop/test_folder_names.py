"""Folders by the names of what is in them: variants, single files, and several of either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import holdfast
from gguf_files import Tensor, build
from holdfast import FormatError
from shard_files import listing, same, tensors

STEMS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")


def put_shards(folder: Path, stem: str, place: str, seed: int = 0) -> Path:
    """A checkpoint in two shards, as transformers and diffusers name them; returns the index."""
    base, end = stem.split(".")
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i in (1, 2):
        number = f"-{i:05d}-of-00002"
        name = {
            "": f"{base}{number}.{end}",
            "new": f"{base}.fp16{number}.{end}",
            "old": f"{base}{number}.fp16.{end}",
        }[place]
        some = dict(list(tensors(seed, n=4).items())[2 * i - 2 : 2 * i])
        holdfast.save(some, folder / name)
        weight_map |= dict.fromkeys(some, name)
    index = {"": f"{stem}.index.json", "new": f"{stem}.index.fp16.json"}
    path = folder / index.get(place, f"{stem}.fp16.index.json")
    text = json.dumps({"metadata": {"total_size": 16_000}, "weight_map": weight_map})
    path.write_text(text)
    return path


def put(folder: Path, name: str, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    holdfast.save(tensors(seed, n=4), folder / name)


def check(path: Path, seed: int = 0) -> None:
    """What every function gives of a folder, or of a file."""
    expected = tensors(seed, n=4)
    assert same(dict(holdfast.load(path, framework="numpy")), expected)
    with holdfast.open(path, framework="numpy") as f:
        assert same({name: f[name] for name in f}, expected)
    target = {name: np.zeros_like(array) for name, array in expected.items()}
    holdfast.load_into(target, path)
    assert same(target, expected)
    assert holdfast.verify(path).ok
    dst = path.parent / "converted"
    holdfast.convert(path, dst)
    assert same(holdfast.load(dst, framework="numpy"), expected)
    dst.unlink()


@pytest.mark.parametrize("place", ["", "new", "old"])
@pytest.mark.parametrize("stem", [*STEMS, "diffusion_pytorch_model.bin"])
def test_an_index_of_any_name(tmp_path: Path, stem: str, place: str) -> None:
    index = put_shards(tmp_path / "m", stem, place)
    check(tmp_path / "m")
    if place == "new":  # by its path, too
        put_shards(tmp_path / "m", "model.safetensors", "", seed=1)
        check(index)


@pytest.mark.parametrize(
    "name",
    [
        *STEMS,
        "model.fp16.safetensors",
        "pytorch_model.bf16.bin",
        "diffusion_pytorch_model.non_ema.safetensors",
        "adapter_model.safetensors",
        "weights.npz",
        "epoch=3.ckpt",
        "last.pt",
        "x.pth",
    ],
)
def test_one_file_of_weights(tmp_path: Path, name: str) -> None:
    put(tmp_path / "m", name)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "README.md").write_text("a model")
    (tmp_path / "m" / "logs").mkdir()
    check(tmp_path / "m")


def test_one_gguf_file_and_one_array(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tensor = Tensor.random("w", (3, 64), "Q8_0")
    (tmp_path / "m" / "x.gguf").write_bytes(build([tensor]))
    found = holdfast.load(tmp_path / "m", framework="numpy", dequantize=True)
    whole = holdfast.load(tmp_path / "m" / "x.gguf", framework="numpy", dequantize=True)
    assert same(dict(found), dict(whole)) and found["w"].shape == (3, 64)
    (tmp_path / "n").mkdir()
    holdfast.save(np.arange(5.0), tmp_path / "n" / "a.npy")
    with holdfast.open(tmp_path / "n", framework="numpy") as f:
        assert [f[name].tolist() for name in f] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.fp16.safetensors", "model.safetensors"], 1),
        (["pytorch_model.bin", "model.fp16.safetensors"], 0),
        (["pytorch_model.bin", "model.safetensors"], 1),
        (["pytorch_model.fp16.bin", "model.fp16.safetensors"], 1),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], 1),
        (["optimizer.pt", "training_args.bin", "adapter_model.safetensors"], 2),
        (["x.gguf", "model.safetensors"], 1),
        (["x.safetensors", "model.fp16.safetensors"], 1),
    ],
)
def test_which_of_several_is_taken(tmp_path: Path, names: Sequence[str], taken: int) -> None:
    for seed, name in enumerate(names):
        if name.endswith(".gguf"):
            (tmp_path / "m").mkdir(exist_ok=True)
            (tmp_path / "m" / name).write_bytes(b"GGUF")
        else:
            put(tmp_path / "m", name, seed)
    check(tmp_path / "m", seed=taken)


def test_one_variant_in_two_formats(tmp_path: Path) -> None:
    put_shards(tmp_path / "m", "pytorch_model.bin", "new", seed=1)
    put_shards(tmp_path / "m", "model.safetensors", "new", seed=2)
    check(tmp_path / "m", seed=2)


@pytest.mark.parametrize(
    "names",
    [
        ["model.bf16.safetensors", "model.fp16.safetensors"],
        ["model.bf16.safetensors", "pytorch_model.fp16.bin"],
        ["model.bf16.safetensors", "INDEX"],
        ["a.safetensors", "b.safetensors"],
        ["a.npz", "b.pt"],
        [f"checkpoint-{i:02d}.pt" for i in range(12)],
    ],
)
def test_several_are_told_and_none_is_taken(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "m"
    if "INDEX" in names:
        names = [names[0], put_shards(folder, "model.safetensors", "new").name]
    for name in names:
        if not (folder / name).exists():
            put(folder, name)
    shown = ", ".join(repr(name) for name in sorted(names)[:10])
    more = " and 2 more" if len(names) > 10 else ""
    message = f"m: expected one checkpoint, found {shown}{more}: give the path of one"
    for function in (holdfast.load, holdfast.open):
        with pytest.raises(FormatError) as error:
            function(folder)
        assert str(error.value).endswith(message)
    assert holdfast.verify(folder).problems[0].endswith(message)
    before = listing(folder)
    with pytest.raises(FormatError):
        holdfast.convert(folder, tmp_path / "out")
    assert listing(folder) == before and not (tmp_path / "out").exists()
    assert same(holdfast.load(folder / names[0], framework="numpy"), tensors(n=4))


def test_shards_that_look_like_variants_belong_to_their_index(tmp_path: Path) -> None:
    weight_map = {}
    for i, (name, array) in enumerate(tensors(n=4).items()):
        file = f"model.part{i}.safetensors"
        (tmp_path / "m").mkdir(exist_ok=True)
        holdfast.save({name: array}, tmp_path / "m" / file)
        weight_map[name] = file
    (tmp_path / "m" / "mine.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(tmp_path / "m")


def test_a_save_leaves_the_shards_of_a_variant(tmp_path: Path) -> None:
    """They may be called as ours are; its index says whose they are."""
    folder = tmp_path / "m"
    holdfast.save(tensors(5, n=4), folder, max_shard_size=8000)
    index = folder / "model.safetensors.index.fp16.json"
    (folder / "model.safetensors.index.json").rename(index)
    holdfast.save(tensors(6, n=4), folder, max_shard_size=8000)
    check(folder, seed=6)
    check(index, seed=5)
    holdfast.save(tensors(7, n=4), folder, max_shard_size="1MB")
    check(folder, seed=7)
    check(index, seed=5)


def test_a_folder_of_oneflow_stays_one(tmp_path: Path) -> None:
    for deep in (False, True):
        path = tmp_path / f"m{deep}"
        obj = {"deep": tensors(n=2)} if deep else tensors(n=2)
        holdfast.save(obj, path, format="oneflow")
        for name in ("optimizer.pt", "a.bf16.safetensors", "b.safetensors"):
            holdfast.save(tensors(1), path / name)
        for name in ("model.bf16.safetensors", "model.fp16.safetensors"):
            shutil.copy(path / "b.safetensors", path / name)
        with holdfast.open(path, framework="numpy") as f:
            assert len(f) == 2


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.fp16.safetensors").mkdir()
    os.mkfifo(folder / "pipe.pt")
    with pytest.raises(IsADirectoryError, match="one file of weights"):
        holdfast.load(folder)
    (folder / "tokens.bin").write_bytes(b"no checkpoint")
    with pytest.raises(FormatError, match=r"m/tokens\.bin: not a checkpoint"):
        holdfast.load(folder)
    put(folder, "last.pt")
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(FormatError, match=r"torch\.distributed"):
        holdfast.load(folder)
