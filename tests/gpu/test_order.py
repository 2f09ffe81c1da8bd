"""What was asked of a stream before a save or a load, and what is asked of one after it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

import holdfast

pytestmark = pytest.mark.usefixtures("copies")

MIB = 1 << 20
#: Cycles that a kernel sleeps for: about a tenth of a second.
LONG = 200_000_000


def current(torch: Any, side: bool) -> Any:
    """A stream of its own, or the default one."""
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    return torch.cuda.stream(stream)


def bytes_of(torch: Any, value: int, nbytes: int = 80 * MIB) -> Any:
    return torch.full((nbytes,), value, dtype=torch.uint8, device="cuda")


def all_are(tensor: Any, value: int) -> bool:
    return bool((tensor == value).all())


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("nbytes", [1000, 80 * MIB])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_saved_is_what_the_stream_will_have_computed(
    torch: Any, tmp_path: Path, side: bool, nbytes: int, name: str
) -> None:
    tensor = bytes_of(torch, 1, nbytes)
    torch.cuda.synchronize()
    with current(torch, side):
        torch.cuda._sleep(LONG)
        tensor.fill_(7)
        holdfast.save({"x": tensor}, tmp_path / name)
    assert all_are(holdfast.load(tmp_path / name, "cpu", framework="torch")["x"], 7)


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_what_is_changed_after_a_save_is_not_in_the_file(
    torch: Any, tmp_path: Path, side: bool
) -> None:
    with current(torch, side):
        tensor, small = bytes_of(torch, 7), [bytes_of(torch, 7, 100) for _ in range(500)]
        holdfast.save({"x": tensor, "small": small}, tmp_path / "x")
        tensor.zero_()
        for each in small:
            each.zero_()
    found = holdfast.load(tmp_path / "x")
    assert all_are(found["x"], 7)
    assert all(all_are(each, 7) for each in found["small"])


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_memory_that_is_still_written_to_can_be_loaded_to(
    torch: Any, tmp_path: Path, side: bool
) -> None:
    holdfast.save({"x": bytes_of(torch, 7)}, tmp_path / "x")
    torch.cuda.empty_cache()
    with current(torch, side):
        old = bytes_of(torch, 1)
        address = old.data_ptr()
        torch.cuda._sleep(LONG)
        old.fill_(9)
        del (
            old
        )  # its memory goes to the next that asks for it on this stream, before the kernel ran
        found = holdfast.load(tmp_path / "x", "cuda")["x"]
        torch.cuda.synchronize()
        assert all_are(found, 7)
        if found.data_ptr() != address:
            pytest.skip("torch gave other memory: nothing has been shown")


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_tensors_that_are_still_written_to_are_filled_after_that(
    torch: Any, tmp_path: Path, side: bool
) -> None:
    holdfast.save({"x": bytes_of(torch, 7), "y": bytes_of(torch, 7, 100)}, tmp_path / "x")
    target = {"x": bytes_of(torch, 1), "y": bytes_of(torch, 1, 100)}
    torch.cuda.synchronize()
    with current(torch, side):
        torch.cuda._sleep(LONG)
        for tensor in target.values():
            tensor.fill_(9)
        holdfast.load_into(target, tmp_path / "x")
    torch.cuda.synchronize()
    assert all(all_are(tensor, 7) for tensor in target.values())


def test_what_is_loaded_can_be_used_on_any_stream(torch: Any, tmp_path: Path) -> None:
    holdfast.save({"x": bytes_of(torch, 7)}, tmp_path / "x")
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = holdfast.load(tmp_path / "x", "cuda")["x"]
        with torch.cuda.stream(torch.cuda.Stream()):
            assert all_are(found, 7)


def test_large_tensors_are_of_the_allocator(torch: Any, tmp_path: Path) -> None:
    """Their memory is not given to others while a stream that was recorded needs it."""
    holdfast.save({"x": bytes_of(torch, 7)}, tmp_path / "x")
    torch.cuda.empty_cache()
    found = holdfast.load(tmp_path / "x", "cuda")["x"]
    address, other = found.data_ptr(), torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(LONG)
        sums = found.clone()
    found.record_stream(other)
    del found
    again = bytes_of(torch, 9)
    assert again.data_ptr() != address
    torch.cuda.synchronize()
    assert all_are(sums, 7)


def test_threads_with_streams_of_their_own(torch: Any, tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(3):
                    value = 10 * number + turn
                    tensor = bytes_of(torch, 0, 70 * MIB + number)
                    torch.cuda._sleep(LONG // 10)
                    tensor.fill_(value)
                    holdfast.save({"x": tensor}, tmp_path / str(number), durable=False)
                    tensor.zero_()
                    found = holdfast.load(tmp_path / str(number), "cuda")["x"]
                    if not all_are(found, value) or len(found) != len(tensor):
                        wrong.append((number, turn))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_callback_that_saves_is_told(torch: Any, tmp_path: Path) -> None:
    tensor = bytes_of(torch, 7)
    told: list[str] = []

    def again(done: int, total: int) -> None:
        if not told:
            with pytest.raises(RuntimeError, match="already") as caught:
                holdfast.save({"x": tensor}, tmp_path / "y")
            told.append(str(caught.value))

    holdfast.save({"x": tensor}, tmp_path / "x", progress=again)
    assert told
    assert all_are(holdfast.load(tmp_path / "x")["x"], 7)


def test_cupys_stream_is_waited_for(torch: Any, cupy: Any, tmp_path: Path) -> None:
    array = cupy.ones(80 * MIB, cupy.uint8)
    tensor = torch.from_dlpack(array)
    other = cupy.random.random(30_000_000)
    cupy.cuda.runtime.deviceSynchronize()
    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null):
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            array.fill(1)
            for _ in range(200):
                other = cupy.sqrt(other)
            array.fill(7)
            holdfast.save({"x": tensor}, tmp_path / "x")
        cupy.cuda.runtime.deviceSynchronize()
        assert all_are(holdfast.load(tmp_path / "x")["x"], 7)
