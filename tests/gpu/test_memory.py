"""What a save and a load take of the host, pinned, and of the device; when there is none left."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from cuda_tensors import Counts, made, occupied, raw, same, spread, taken
from holdfast import _engine, staging
from holdfast.staging import registry
from holdfast.views import device_code
from patience import within

MIB = 1 << 20
CODE = device_code(2, 0)


def large(torch: Any) -> dict[str, Any]:
    """512 MiB in eight tensors."""
    return {
        str(i): torch.randint(0, 256, (64 * MIB,), dtype=torch.uint8, device="cuda")
        for i in range(8)
    }


def equal(torch: Any, found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pinned_memory_is_bounded_and_given_back(
    torch: Any, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, tensors = Counts(copies, monkeypatch), large(torch)
    for _ in range(2):
        holdfast.save(tensors, tmp_path / "x", durable=False)
        equal(torch, holdfast.load(tmp_path / "x", "cuda"), tensors)
    assert 16 * MIB <= counts.most <= 64 * MIB
    assert counts.pinned == counts.most, "the blocks were pinned anew"
    staging.release_pinned()
    assert counts.pinned == 0
    settings = staging.Staging(block_size=4 * MIB, blocks=2)
    counts.most = 0
    holdfast.save(tensors, tmp_path / "x", durable=False, staging=settings)
    equal(torch, holdfast.load(tmp_path / "x", "cuda", staging=settings), tensors)
    assert 0 < counts.most <= 8 * MIB


def test_little_is_not_pinned(
    torch: Any, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, tensors = Counts(copies, monkeypatch), spread()
    holdfast.save(tensors, tmp_path / "x")
    same(holdfast.load(tmp_path / "x", "cuda"), tensors)
    assert counts.most == 0


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("name", ["x", "x.pt"])
def test_memory_is_bounded(torch: Any, tmp_path: Path, name: str) -> None:
    tensors = large(torch)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    for measured in (False, True):  # the first time, code is loaded, too
        staging.release_pinned()
        with taken() as saved:
            holdfast.save(tensors, tmp_path / name, durable=False)
        staging.release_pinned()
        with taken() as loaded:
            found = holdfast.load(tmp_path / name, "cuda", mmap=False)
        equal(torch, found, tensors)
        del found
        target = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        staging.release_pinned()
        with taken() as filled:
            holdfast.load_into(target, tmp_path / name)
        equal(torch, target, tensors)
        del target
        if measured:
            assert max(saved.host, loaded.host, filled.host) <= 96 * MIB
            assert saved.device <= 64 * MIB
            assert loaded.device <= nbytes + MIB
            assert filled.device <= MIB


@pytest.mark.usefixtures("copies")
def test_a_transposed_tensor_is_not_copied_whole(torch: Any, tmp_path: Path) -> None:
    tensor = torch.randint(0, 2**31, (8192, 8192), dtype=torch.int32, device="cuda").T
    holdfast.save({"x": tensor[:10]}, tmp_path / "x")
    with taken() as saved:
        holdfast.save({"x": tensor}, tmp_path / "x", durable=False)
    assert saved.device <= 64 * MIB
    assert torch.equal(holdfast.load(tmp_path / "x", "cuda")["x"], tensor)


def test_many_small_tensors_are_few_transfers(
    torch: Any, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [1024 + i % 7 for i in range(20_000)]
    block = made("uint8", (sum(sizes),))
    parts = block.split(sizes)
    tensors = {f"layers.{i}.weight": part.clone() for i, part in enumerate(parts)}
    counts = Counts(copies, monkeypatch)
    with within(20):
        holdfast.save(tensors, tmp_path / "x", durable=False)
    assert 0 < counts.rows["to_host"] <= 64
    assert counts.rows["gather"] >= 19_000
    host = holdfast.load(tmp_path / "x", "cpu")
    assert torch.equal(torch.cat(list(host.values())), block.cpu())
    with within(20):
        found = holdfast.load(tmp_path / "x", "cuda")
    assert 0 < counts.rows["to_device"] <= 64
    assert counts.rows["scatter"] >= 19_000
    assert list(found) == list(tensors)
    assert torch.equal(torch.cat(list(found.values())), block)


@pytest.mark.usefixtures("copies")
def test_a_device_without_room_for_a_load(torch: Any, tmp_path: Path) -> None:
    holdfast.save({"x": torch.zeros(64 * MIB), "y": torch.ones(3)}, tmp_path / "x")
    holdfast.load(tmp_path / "x", "cuda", keys=["y"])
    before, buffers = occupied(), _engine.live_buffers()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MIB) / total, 0)
    try:
        with pytest.raises(MemoryError, match=rf"cuda:0.*{256 * MIB}"):
            holdfast.load(tmp_path / "x", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert (occupied(), _engine.live_buffers()) == (before, buffers)
    assert holdfast.load(tmp_path / "x", "cuda")["y"].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("copies")
def test_a_full_device_can_be_saved(torch: Any, tmp_path: Path) -> None:
    tensors = spread() | {"large": made("uint8", (80 * MIB,))}
    gc.collect()
    torch.cuda.empty_cache()
    cupy: Any = sys.modules.get("cupy")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, 0)
    if cupy is not None:
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + 1)
    try:
        holdfast.save(tensors, tmp_path / "x")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        if cupy is not None:
            pool.set_limit(size=0)
    found = holdfast.load(tmp_path / "x", "cpu")
    assert {name: raw(tensor) for name, tensor in found.items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }


def test_a_device_without_room_for_anything(
    torch: Any, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nbytes: int, framework: str | None) -> tuple[int, object]:
        raise MemoryError(f"cuda:0: cannot allocate {nbytes} bytes")

    tensors = spread()
    monkeypatch.setattr(copies, "allocate", refuse)
    holdfast.save(tensors, tmp_path / "x")
    same(holdfast.load(tmp_path / "x"), {k: t.cpu() for k, t in tensors.items()}, "cpu")
    with pytest.raises(MemoryError, match="cuda:0: cannot allocate"):
        holdfast.save({"x": made("float32", (300, 411)).T}, tmp_path / "x")
    assert list(holdfast.load(tmp_path / "x", "cpu")) == list(tensors)
    with pytest.raises(MemoryError, match="cuda:0: cannot allocate"):
        holdfast.load(tmp_path / "x", "cuda")


@pytest.mark.parametrize("call", ["begin", "to_host", "record"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_save_that_fails_leaves_the_old_file(
    torch: Any,
    copies: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    n: int,
) -> None:
    tensors, calls, real = large(torch), 0, getattr(copies, call)

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise RuntimeError(f"{call} was made to fail")
        return real(*arguments)

    holdfast.save({"old": torch.ones(3)}, tmp_path / "x")
    before = occupied()
    if call == "begin" and n > 1:
        pytest.skip("it is called once")
    with monkeypatch.context() as patch:
        patch.setattr(copies, call, fail)
        with pytest.raises(RuntimeError, match="was made to fail"):
            holdfast.save(tensors, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert list(holdfast.load(tmp_path / "x")) == ["old"]
    assert occupied() == before
    holdfast.save(tensors, tmp_path / "x", durable=False)
    equal(torch, holdfast.load(tmp_path / "x", "cuda"), tensors)


@pytest.mark.parametrize("without", ["cupy", "nothing"])
def test_torch_copies_where_there_is_no_cupy(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    elif "cupy" not in sys.modules:
        pytest.skip("CuPy is not imported")
    monkeypatch.setattr(registry, "_found", {})
    found = staging.device(CODE)
    assert type(found).__name__ == ("TorchDevice" if without == "cupy" else "CupyDevice")
    assert found.name == "cuda:0"
    tensors = spread()
    holdfast.save(tensors, tmp_path / "x")
    same(holdfast.load(tmp_path / "x", "cuda"), tensors)


def test_without_either_the_error_says_what_to_install(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdfast.save({"old": torch.ones(3)}, tmp_path / "x")
    tensor = torch.ones(3, device="cuda")
    monkeypatch.setattr(registry, "_found", {})
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", (("cupy", "CupyDevice"),))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match="pip install cupy-cuda12x"):
        holdfast.save({"x": tensor}, tmp_path / "x")
    assert list(holdfast.load(tmp_path / "x")) == ["old"]
