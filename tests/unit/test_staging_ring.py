"""The ring over a simulated device: the right bytes, in order, through few blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import _engine, staging
from holdfast.layout import SEGMENT
from holdfast.staging import ring
from holdfast.staging.base import PAGE
from staged import BLOCK, CODES, SMALL, Case, devices, drain, fill

SIZES = st.one_of(
    st.integers(0, 5000),
    st.sampled_from([PAGE, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77]),
)
ROWS = st.lists(
    st.tuples(SIZES, st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 100, PAGE, 70_001])),
    min_size=1,
    max_size=40,
)


@given(
    rows=ROWS,
    start=st.integers(0, 3 * PAGE),
    blocks=st.integers(1, 4),
    pin=st.booleans(),
    lazy=st.booleans(),
    files=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120)
def test_bytes_and_checksums_are_the_segments(
    rows: list[tuple[int, int, int]],
    start: int,
    blocks: int,
    pin: bool,
    lazy: bool,
    files: bool,
    seed: int,
) -> None:
    setting = staging.Staging(BLOCK, blocks)
    with devices(2, pin=pin, lazy=lazy, delay=0.0 if lazy else 1e-4) as made:
        case = Case([(*row, i // 3 if files else 0) for i, row in enumerate(rows)], start, seed)
        found = drain(case, case.to_host(setting), made[0])
        assert found == [content.tobytes() for content in case.content]
        case.check_crcs()
        case.check_memory()
        assert sum(len(device.pinned) for device in made) <= (blocks if pin else 0)
        case.wipe()
        case.segments["crc"] = 0
        fill(case, case.to_device(setting), made[1])
        case.check_memory()
        case.check_crcs()
        case.owners.clear()
        assert [device.used for device in made] == [0, 0]


def test_no_segments_are_no_parts() -> None:
    none = np.zeros(0, SEGMENT)
    assert list(staging.to_host(none, np.zeros(0, np.int64))) == []
    assert list(staging.to_device(none, np.zeros(0, np.int64))) == []


def test_memory_of_the_host_alone_needs_no_device() -> None:
    case = Case([(10, 0, 0, 0), (0, 0, 0, 0), (100_000, 0, 0, 0)])
    parts = list(case.to_host())
    assert len(parts) == 1
    assert parts[0].segments["address"].tolist() == case.segments["address"].tolist()
    assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
    fill(case, case.to_device())


def test_blocks_are_as_few_as_they_may_be() -> None:
    setting = staging.Staging(BLOCK, 2)
    with devices(lazy=True) as (device,):
        case = Case([(10 * BLOCK, 1, 0, 0)])
        seen: list[int] = []
        for part in case.to_host(setting):
            block = int(part.segments["address"][0])
            assert not device.busy(block, BLOCK)
            seen.append(block)
            assert len(device.pinned) <= 2
        assert len(seen) == 10
        assert len(set(seen)) == 2
        assert device.calls["pin"] == 2, "blocks are pinned once"
        list(case.to_host(setting))
        assert device.calls["pin"] == 2, "and stay pinned"
        assert device.calls["begin"] == 2
        list(case.to_host(staging.Staging(BLOCK, 1)))
        assert len(device.pinned) == 1, "no more than the setting of the last"


def test_copies_run_ahead_of_the_caller() -> None:
    with devices(lazy=True) as (device,):
        case = Case([(10 * BLOCK, 1, 0, 0)])
        parts = case.to_host(SMALL)
        assert device.calls["copy"] == 0, "nothing happens before it is asked for"
        next(parts)
        assert device.calls["to_host"] == SMALL.blocks
        assert device.calls["run"] == 1
        next(parts)
        assert device.calls["to_host"] == SMALL.blocks + 1
        parts.close()
        assert device.calls["run"] == SMALL.blocks + 1, "what was under way is waited for"


def test_what_was_filled_is_on_its_way_when_the_next_is_asked_for() -> None:
    with devices(lazy=True) as (device,):
        case = Case([(5 * BLOCK, 1, 0, 0)])
        parts = case.to_device(SMALL)
        for n in range(5):
            next(parts)
            assert device.calls["to_device"] == n
        assert next(parts, None) is None
        assert device.calls["run"] == 5, "at the end all of it has arrived"


def test_a_call_for_little_pins_nothing() -> None:
    with devices(pin=False) as (device,):
        case = Case([(3 * BLOCK, 1, 0, 0)])
        before = _engine.live_buffers()
        parts = case.to_host(SMALL)
        next(parts)
        assert _engine.live_buffers() > before
        parts.close()
        assert _engine.live_buffers() == before
        little = Case([(100, 1, 0, 0)])
        part = next(little.to_host(staging.Staging()))
        assert part.segments["nbytes"].tolist() == [100]
        assert device.calls["pin"] == 0


def test_a_call_for_little_uses_what_is_pinned_already() -> None:
    with devices() as (device,):
        case = Case([(BLOCK * 3 // 2, 1, 0, 0)])
        list(case.to_host(staging.Staging(BLOCK, 2)))
        pinned = dict(device.pinned)
        assert len(pinned) == 2
        ring.PIN_FROM = 1 << 30
        more = Case([(9 * BLOCK, 1, 0, 0)])
        seen = {int(part.segments["address"][0]) for part in more.to_host(SMALL)}
        assert seen == set(pinned)
        assert device.calls["pin"] == 2


def test_blocks_of_another_size_are_given_back_before_more_are_pinned() -> None:
    with devices() as (device,):
        case = Case([(9 * BLOCK, 1, 0, 0)])
        for setting in (SMALL, staging.Staging(2 * BLOCK, 2), SMALL):
            drain(case, case.to_host(setting))
            assert sorted(device.pinned.values()) == [setting.block_size] * setting.blocks
        assert device.calls["pin"] == 8


def test_large_calls_pin_by_default() -> None:
    assert ring.PIN_FROM == 64 << 20
    assert ring.SCRATCH_MOST == 64 << 20


def test_a_device_piece_begins_where_the_offset_is_congruent() -> None:
    with devices() as (_,):
        case = Case([(100, 1, 0, 0), (50, 0, 0, 0), (7000, 1, 0, 0), (10, 1, 8000, 0)], 5000)
        (part,) = case.to_host(SMALL)
        own = part.segments
        assert ((own["address"] - own["offset"])[[0, 2, 3]] % PAGE == 0).all()
        assert part.rows.tolist() == [0, 1, 2, 3]


def test_parts_end_at_multiples_of_4096() -> None:
    with devices() as (_,):
        case = Case([(3 * BLOCK, 1, 0, 0)], start=5)
        ends = [
            int(part.segments[0]["offset"] + part.segments[0]["nbytes"]) for part in case.to_host()
        ]
        assert ends == [BLOCK, 2 * BLOCK, 3 * BLOCK, 3 * BLOCK + 5]


@pytest.mark.parametrize("small", [ring.GATHER_FROM - 1, ring.GATHER_FROM])
def test_many_small_pieces_are_gathered(small: int) -> None:
    with devices(2, lazy=True) as (device, other):
        case = Case([(1000, 1, 0, 0)] * small + [(1000, 2, 0, 0)] * 3)
        drain(case, case.to_host())
        case.check_crcs()
        many = small >= ring.GATHER_FROM
        assert device.calls["gather"] == many
        assert device.calls["to_host"] == 1
        assert device.calls["run"] == (small + 1 if many else small)
        assert device.peak - device.used == (BLOCK if many else 0), "and scratch memory is freed"
        assert other.calls["gather"] == 0
        case.wipe()
        fill(case, case.to_device())
        case.check_memory()
        assert device.calls["scatter"] == many


def test_large_pieces_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "GATHER_BELOW", 1000)
    with devices() as (device,):
        case = Case([(1000, 1, 0, 0)] * 20)
        assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
        assert device.calls["gather"] == 0
        assert device.calls["allocate"] == len(case), "no scratch memory"


def test_a_device_without_room_gathers_nothing() -> None:
    with devices(capacity=60 * 1000) as (device,):
        case = Case([(500, 1, 0, 0)] * 100)
        assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
        assert device.calls["gather"] == 0
        assert device.calls["allocate"] == len(case) + 1, "it is asked once"
        case.wipe()
        fill(case, case.to_device())
        case.check_memory()


def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SCRATCH_MOST", 20_000)
    with devices() as (device,):
        case = Case([(1500, 1, 0, 0)] * 60)
        assert drain(case, case.to_host()) == [content.tobytes() for content in case.content]
        assert device.peak == case.nbytes + 20_000
        assert device.calls["gather"] > 3


# ---- memory that is not dense ------------------------------------------------------------------


def strided_case(array: np.ndarray, view: np.ndarray, start: int, on: int = 1) -> tuple:
    """A case of one strided segment among others: the case, its layouts, its dense bytes."""
    case = Case([(70, 1, 0, 0), (array.nbytes, on, 0, 0), (30, 1, 0, 0)], start)
    case.now(1)[:] = array.reshape(-1).view(np.uint8)
    away = view.__array_interface__["data"][0] - array.__array_interface__["data"][0]
    case.segments["address"][1] += np.uint64(away)
    case.segments["nbytes"][1] = view.nbytes
    case.segments["offset"][2] = case.segments["offset"][1] + view.nbytes
    case.content[1] = np.frombuffer(view.tobytes(), np.uint8)
    return case, [(1, view.shape, view.strides, view.itemsize, 0)]


VIEWS = {
    "transposed": lambda a: a.T,
    "permuted": lambda a: a.transpose(1, 2, 0),
    "stepped": lambda a: a[:, ::2, 1::3],
    "backwards": lambda a: a[::-1, :, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "dense": lambda a: a,
    "one": lambda a: a[1, 1, 1, ...],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("start", [0, 1, 4095])
@pytest.mark.parametrize("dtype", ["u1", "<f4", "<c16"])
def test_strided_tensors_arrive_dense(name: str, start: int, dtype: str) -> None:
    with devices(lazy=start == 0) as (device,):
        array = np.random.default_rng(3).integers(0, 99, (30, 20, 60)).astype(dtype)
        case, layouts = strided_case(array, VIEWS[name](array), start)
        found = drain(case, case.to_host(layouts=layouts), device)
        assert found == [content.tobytes() for content in case.content]
        case.check_crcs()
        assert device.calls["strided"] > 0
        case.owners.clear()
        assert device.used == 0


def test_strided_tensors_fit_in_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SCRATCH_LEAST", 1000)
    array = np.random.default_rng(3).integers(0, 99, (50, 60, 20)).astype("<i4")
    with devices(capacity=array.nbytes + 100 + 3000) as (device,):
        case, layouts = strided_case(array, array.T, 0)
        assert drain(case, case.to_host(layouts=layouts))[1] == array.T.tobytes()
        assert device.peak <= array.nbytes + 100 + 3000
    with devices(capacity=array.nbytes + 100 + 500) as (device,):
        case, layouts = strided_case(array, array.T, 0)
        with pytest.raises(MemoryError, match=r"host:0: cannot allocate \d+ bytes, 500 of"):
            drain(case, case.to_host(layouts=layouts))


def test_strided_memory_of_the_host_passes_through() -> None:
    array = np.arange(3000, dtype="<i4").reshape(10, 20, 15)
    with devices() as (device,):
        case, layouts = strided_case(array, array.T, 0, on=0)
        # After a part that was cut, too: positions are counted anew in each.
        parts = list(case.to_host(layouts=layouts))
        assert [part.layouts for part in parts] == [layouts]
        drain(case, case.to_host(layouts=layouts))
        case.check_crcs()
        assert device.calls["strided"] == 0


def test_layouts_are_counted_in_their_part() -> None:
    array = np.arange(600, dtype="<i4").reshape(10, 20, 3)
    with devices():
        case = Case([(2 * BLOCK + 10, 1, 0, 0), (array.nbytes, 0, 0, 0), (9, 1, 0, 0)])
        case.now(1)[:] = array.reshape(-1).view(np.uint8)
        view = array.T
        case.content[1] = np.frombuffer(view.tobytes(), np.uint8)
        layouts = [(1, view.shape, view.strides, 4, 0)]
        kept = [part.layouts for part in case.to_host(layouts=layouts)]
        assert kept == [[], [], [(1, view.shape, view.strides, 4, 0)]]
        drain(case, case.to_host(layouts=layouts))
        case.check_crcs()


def test_layouts_of_devices_are_checked() -> None:
    with devices():
        case = Case([(80, 1, 0, 0)])
        with pytest.raises(ValueError, match="segment 0, 80 bytes on a device: shape"):
            case.to_host(layouts=[(0, (4, 5), (20, 4), 8, 0)])
        with pytest.raises(ValueError, match="elements of swapped bytes"):
            case.to_host(layouts=[(0, (4, 5), (20, 4), 4, 4)])


# ---- settings ----------------------------------------------------------------------------------


def test_staging_settings() -> None:
    assert staging.Staging() == staging.Staging(16 << 20, 4)
    for size, blocks in itertools.product((1 << 15, BLOCK + 1, 0, -BLOCK), (1,)):
        with pytest.raises(ValueError, match="block_size must be a multiple of 4096"):
            staging.Staging(size, blocks)
    with pytest.raises(ValueError, match="blocks must be at least 1, not 0"):
        staging.Staging(blocks=0)
    with pytest.raises(TypeError, match="blocks must be an int, not float"):
        staging.Staging(blocks=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="block_size must be an int, not bool"):
        staging.Staging(True)


def test_wrong_segments() -> None:
    with pytest.raises(TypeError, match="SEGMENT"):
        staging.to_host(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ValueError, match="3 segments, 2 devices"):
        staging.to_device(np.zeros(3, SEGMENT), np.zeros(2, int))


def test_allocated_memory_says_where_it_is() -> None:
    with devices(2) as (_, other):
        buffer = staging.allocate(CODES[1], 1000, "torch")
        assert (buffer.device, len(buffer)) == (CODES[1], 1000)
        assert other.frameworks == ["torch"]
        assert other.used == 1000
        with pytest.raises(BufferError):
            memoryview(buffer)  # type: ignore[arg-type]
        del buffer
        assert other.used == 0
