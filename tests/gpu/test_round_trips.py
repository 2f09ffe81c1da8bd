"""Bits on a CUDA device to a file and back, against what ``.cpu()`` and ``.to("cuda")`` make."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from cuda_tensors import made, raw, same, small_ring, spread
from holdfast import ChecksumError, staging
from holdfast.dtypes import BY_TORCH

FORMATS = ["a.safetensors", "a.npz", "a.pt", "shards", "folder"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (0,), (3, 0, 2), (5, 3), (65_537,), (300_001,)]

pytestmark = pytest.mark.usefixtures("copies")


@pytest.fixture(params=[False, True], ids=["pageable", "pinned"])
def ring(request: pytest.FixtureRequest) -> Iterator[staging.Staging]:
    with small_ring(request.param) as settings:
        yield settings


def save(obj: Any, path: Path, **how: Any) -> None:
    """Save in the format that the name stands for."""
    if path.name == "shards":
        how["max_shard_size"] = 100_000
    elif path.name == "folder":
        how["format"] = "oneflow"
    holdfast.save(obj, path, **how)


def on_host(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [name for name in BY_TORCH if name is not None])
def test_every_dtype(torch: Any, ring: staging.Staging, tmp_path: Path, name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    tensors = {str(shape): made(name, shape) for shape in SHAPES}
    hosts = {str(shape): made(name, shape, device="cpu") for shape in SHAPES}
    holdfast.save(tensors, tmp_path / "device", staging=ring)
    holdfast.save(hosts, tmp_path / "host")
    assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()
    same(holdfast.load(tmp_path / "device", "cpu", mmap=False), hosts, "cpu")
    for path in (tmp_path / "device", tmp_path / "host"):
        same(holdfast.load(path, "cuda", staging=ring), tensors)
    holdfast.save(tensors, tmp_path / "x.pt", staging=ring)
    same(holdfast.load(tmp_path / "x.pt", staging=ring), tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(torch: Any, ring: staging.Staging, tmp_path: Path, name: str) -> None:
    tensors = spread()
    save(tensors, tmp_path / name, staging=ring)
    assert holdfast.verify(tmp_path / name).ok
    host = holdfast.load(tmp_path / name, "cpu", framework="torch")
    same({key: host[key] for key in tensors}, on_host(tensors), "cpu")
    found = holdfast.load(tmp_path / name, "cuda:0", framework="torch", staging=ring)
    same({key: found[key] for key in tensors}, tensors)
    save(on_host(tensors), tmp_path / ("of-the-host-" + name), **_shape_of(name))
    found = holdfast.load(
        tmp_path / ("of-the-host-" + name), "cuda", framework="torch", staging=ring
    )
    same({key: found[key] for key in tensors}, tensors)


def _shape_of(name: str) -> dict[str, Any]:
    """What `save` would have said of a folder of that name."""
    return {"shards": {"max_shard_size": 100_000}, "folder": {"format": "oneflow"}}.get(name, {})


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
@pytest.mark.parametrize("durable", [False, True])
def test_the_file_is_that_of_the_host(
    torch: Any, ring: staging.Staging, tmp_path: Path, name: str, durable: bool
) -> None:
    tensors = spread()
    mixed = {key: t.cpu() if i % 3 == 1 else t for i, (key, t) in enumerate(tensors.items())}
    holdfast.save(on_host(tensors), tmp_path / ("host-" + name), durable=durable)
    holdfast.save(mixed, tmp_path / name, staging=ring, durable=durable)
    assert (tmp_path / name).read_bytes() == (tmp_path / ("host-" + name)).read_bytes()


def test_views_that_begin_anywhere(torch: Any, ring: staging.Staging, tmp_path: Path) -> None:
    base = made("uint8", (400_000,))
    tensors = {
        f"{start}+{n}": base[start : start + n]
        for start in (1, 3, 511, 4097)
        for n in (1, 2, 4095, 4096, 4097, 65_535, 65_537, 200_003)
    }
    holdfast.save(tensors, tmp_path / "x", staging=ring)
    same(holdfast.load(tmp_path / "x", "cuda", staging=ring), tensors)
    targets = {key: base.new_zeros(len(t) + 5)[3 : 3 + len(t)] for key, t in tensors.items()}
    holdfast.load_into(targets, tmp_path / "x", staging=ring)
    same(targets, tensors)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int32", "complex64"])
def test_tensors_that_are_not_dense(
    torch: Any, ring: staging.Staging, tmp_path: Path, dtype: str
) -> None:
    base, deep = made(dtype, (301, 411)), made(dtype, (3, 5, 17, 19))
    tensors = {
        "transposed": base.T,
        "step": base[::2, 1::3],
        "columns": base[:, 5:17],
        "expanded": base[:1].expand(50, 411),
        "channels last": deep.contiguous(memory_format=torch.channels_last),
        "permuted": deep.permute(2, 0, 3, 1),
        "diagonal": base.as_strided((100, 2), (413, 1)),
        "one column": base[:, 7],
        "dense": base,
    }
    if dtype == "complex64":
        tensors["conjugate"] = base.conj()
        tensors["imaginary"] = base.conj().imag
    holdfast.save(tensors, tmp_path / "x", staging=ring)
    same(holdfast.load(tmp_path / "x", "cuda", staging=ring), tensors)
    found = holdfast.load(tmp_path / "x", framework="numpy")
    for key, tensor in tensors.items():
        assert found[key].tobytes() == raw(tensor), key


def test_a_nesting_of_here_and_there(torch: Any, ring: staging.Staging, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(made("float32", (50, 40)).nan_to_num())
    tree = {
        "model": {"w": weight, "b": torch.nn.Parameter(made("int64", (9,)), requires_grad=False)},
        "optimizer": [{"step": torch.tensor(3.0), "avg": made("float32", (50, 40))}],
        "epoch": 3,
        "array": np.arange(5),
        "text": "x" * 5000,
    }
    tree["tie"] = tree["model"]["w"]
    holdfast.save(tree, tmp_path / "x", staging=ring)
    host = holdfast.load(tmp_path / "x")
    assert host["model"]["w"].device.type == "cpu"
    assert raw(host["optimizer"][0]["avg"]) == raw(tree["optimizer"][0]["avg"])
    found = holdfast.load(tmp_path / "x", "cuda", staging=ring)
    assert found["tie"] is found["model"]["w"]
    assert type(found["tie"]) is torch.nn.Parameter and found["tie"].requires_grad
    assert not found["model"]["b"].requires_grad
    assert found["optimizer"][0]["step"].device.type == "cuda"
    assert isinstance(found["array"], np.ndarray) and found["array"].tolist() == [0, 1, 2, 3, 4]
    assert (found["epoch"], found["text"]) == (3, "x" * 5000)
    same({"w": found["model"]["w"]}, {"w": weight})


def test_what_map_location_takes(torch: Any, tmp_path: Path) -> None:
    tensors = spread()
    holdfast.save(tensors, tmp_path / "x")
    locations: list[Any] = ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0]
    locations += [{"cpu": "cuda:0"}, lambda tensor, where: tensor.cuda()]
    for location in locations:
        same(holdfast.load(tmp_path / "x", location), tensors)
    same(holdfast.load(tmp_path / "x"), on_host(tensors), "cpu")
    found = holdfast.load(tmp_path / "x", "cuda", keys=["u700001", "f4"])
    same(found, {key: tensors[key] for key in ("u700001", "f4")})
    with pytest.raises(RuntimeError):
        holdfast.load(tmp_path / "x", f"cuda:{torch.cuda.device_count()}")


def test_every_device(torch: Any, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    tensors = spread()
    apart = {k: t.to("cuda:1") if i % 2 else t for i, (k, t) in enumerate(tensors.items())}
    holdfast.save(apart, tmp_path / "x")
    same(holdfast.load(tmp_path / "x", "cpu"), on_host(tensors), "cpu")
    same(holdfast.load(tmp_path / "x", "cuda:1"), tensors, "cuda:1")


def test_file_objects(torch: Any, ring: staging.Staging, tmp_path: Path) -> None:
    tensors = spread()
    stream = io.BytesIO()
    holdfast.save(tensors, stream, staging=ring)
    stream.seek(0)
    same(holdfast.load(stream, "cuda", staging=ring), tensors)
    (tmp_path / "x").write_bytes(stream.getvalue())
    assert holdfast.verify(tmp_path / "x").ok


def test_what_cannot_be_staged_is_brought_there_too(torch: Any, tmp_path: Path) -> None:
    value = np.arange(70_001, dtype=np.float32)
    np.savez_compressed(tmp_path / "x.npz", x=value)
    expected = {"x": torch.from_numpy(value).to("cuda")}
    same(holdfast.load(tmp_path / "x.npz", "cuda", framework="torch"), expected)
    np.savez(tmp_path / "y.npz", x=value.astype(">f4"))
    same(holdfast.load(tmp_path / "y.npz", "cuda", framework="torch"), expected)
    holdfast.save({"x": value}, tmp_path / "z")
    once = io.BufferedReader(Once((tmp_path / "z").read_bytes()))
    same(holdfast.load(once, "cuda", framework="torch"), expected)


class Once(io.RawIOBase):
    """Bytes that pass once."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        return self._data.readinto(memory)


@pytest.mark.parametrize("name", FORMATS)
def test_opened_on_a_device(torch: Any, ring: staging.Staging, tmp_path: Path, name: str) -> None:
    tensors = spread()
    save(tensors, tmp_path / name, staging=ring)
    where = {"framework": "torch", "map_location": "cuda", "staging": ring}
    with holdfast.open(tmp_path / name, **where) as f:
        same({key: f[key] for key in tensors}, tensors)
        for part in (slice(5, 90, 3), slice(None, None, 50), 7, (slice(1, 9), slice(3, 40, 2))):
            same({"x": f.slice("f4")[part]}, {"x": tensors["f4"][part]})
        f.prefetch(["f2", "u4095"])
        assert f["f2"] is f["f2"]
        same({"x": f["f2"]}, {"x": tensors["f2"]})
    with holdfast.open(tmp_path / name, framework="torch") as f:
        assert f["f4"].device.type == "cpu"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.npz"])
@pytest.mark.parametrize("flip", [0, 350_000, 700_000])
def test_damage_is_seen(
    torch: Any, ring: staging.Staging, tmp_path: Path, name: str, flip: int
) -> None:
    path = tmp_path / name
    holdfast.save({"x": made("uint8", (700_001,)), "y": made("uint8", (65,))}, path, staging=ring)
    with holdfast.open(path) as f:
        at = f.info("x").offset + flip
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="tensor 'x'"):
        holdfast.load(path, "cuda", framework="torch", staging=ring)
    target = {"x": torch.zeros(700_001, dtype=torch.uint8, device="cuda")}
    with pytest.raises(ChecksumError, match="tensor 'x'"):
        holdfast.load_into(target, path, strict=False, staging=ring)


def test_progress_counts_all_bytes(torch: Any, ring: staging.Staging, tmp_path: Path) -> None:
    tensors = spread()
    total = sum(tensor.nbytes for tensor in tensors.values())
    seen: list[tuple[int, int]] = []
    holdfast.save(tensors, tmp_path / "x", staging=ring, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] >= total
    seen.clear()
    holdfast.load(
        tmp_path / "x", "cuda", staging=ring, progress=lambda *at: seen.append(at), mmap=False
    )
    assert seen == sorted(seen) and seen[-1] == (total, total)
