"""What drop-ins ask of a load besides, and how storages become tensors and objects."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import storages
from holdfast.dtypes import BY_NAME
from holdfast.formats._garbage import uncollected
from holdfast.layout import ENTRY, STORAGE, Index
from holdfast.loading import LoadOptions, load_file
from torch_archives import archive

OBJ = {"a": np.arange(500, 510, dtype="i4"), "b": np.ones((2, 3)), "n": [1, "x"]}


def saved(format: str = "torch") -> io.BytesIO:
    out = io.BytesIO()
    holdfast.save(OBJ, out, format=format)
    out.seek(0)
    return out


def options(**given: Any) -> LoadOptions:
    return LoadOptions(**{"framework": "numpy", **given})


@pytest.mark.parametrize("format", ["torch", "torch_legacy", "safetensors"])
def test_the_gate_comes_first(format: str) -> None:
    seen: list[str] = []

    def gate(name: str) -> None:
        seen.append(name)
        raise LookupError("closed")

    with pytest.raises(LookupError, match="closed"):
        load_file(saved(format), options(gate=gate, mmap=True, keys="nothing"))
    assert seen == [format]
    assert load_file(saved(format), options(gate=seen.append))["n"] == [1, "x"]
    assert seen == [format] * 2


@pytest.mark.parametrize("format", ["torch", "torch_legacy", "safetensors"])
def test_without_data(format: str) -> None:
    """The object, with tensors of the right shapes in which nothing was read."""
    stream = saved(format)
    found = load_file(stream, options(data=False))
    assert found["n"] == [1, "x"]
    assert found["a"].shape == (10,) and found["a"].dtype == np.int32 and not found["a"].any()
    assert found["b"].shape == (2, 3) and not found["b"].any()
    assert stream.tell() == len(stream.getvalue())


@pytest.mark.parametrize(
    ("said", "taken", "swapped"),
    [
        (None, None, False), (None, "little", False), (None, "big", True),
        ("little", "big", False), ("big", "little", True), ("big", None, True),
    ],
)  # fmt: skip
def test_the_byte_order_that_is_taken(said: str | None, taken: str | None, swapped: bool) -> None:
    """What is asked for counts where the file does not say."""
    data = archive({"a": OBJ["a"]}, byteorder=said)
    found = load_file(io.BytesIO(data), options(byteorder=taken))["a"]
    # Where the file says "big", its bytes were written so: swapping makes them right.
    wrong = swapped and said is None
    assert np.array_equal(found.byteswap() if wrong else found, OBJ["a"])


def test_what_is_wrong_with_the_options_is_told() -> None:
    with pytest.raises(ValueError, match="framework"):
        load_file(io.BytesIO(b"nothing"), options(framework="abacus"))
    with pytest.raises(ValueError, match="mmap=True needs the path"):
        load_file(saved(), options(mmap=True))
    with pytest.raises(TypeError, match="keys must be names or patterns, not int"):
        load_file(saved(), options(keys=[3]))
    with pytest.raises(KeyError, match=r"no tensor is called 'c' \(2 are here\)"):
        load_file(saved(), options(keys=["a", "c"]))
    with pytest.raises(ValueError, match="map_location='cuda'"):
        load_file(saved(), options(map_location="cuda"))


def test_keys_are_names_before_they_are_patterns() -> None:
    obj = {"w[0]": np.zeros(1), "w0": np.ones(1), "m": {"x.y": np.ones(2), "*": np.ones(3)}}
    out = io.BytesIO()
    holdfast.save(obj, out, format="torch")

    def names(keys: Any) -> list[str]:
        out.seek(0)
        return list(holdfast.load(out, keys=keys, framework="numpy"))

    assert names("w[0]") == ["w[0]"]
    assert names("w?") == ["w0"]
    assert names("m.*") == ["m.*"]
    assert names(["m.x*", "w0"]) == ["w0", "m.x.y"]
    assert names("*") == ["w[0]", "w0", "m.x.y", "m.*"]
    assert names([]) == []


# ---- which entries can be taken as they stand --------------------------------------------------


def index_of(rows: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]) -> Index:
    """float32 entries: storage, first element, shape, strides in elements; storages of 100 each."""
    entries, dims, strides = np.zeros(len(rows), ENTRY), [], []
    for i, (own, first, shape, steps) in enumerate(rows):
        nbytes = 4 * int(np.prod(shape))
        code = BY_NAME["float32"].code
        entries[i] = (1000 * own + 4 * first, nbytes, len(dims), code, len(shape), 0)
        dims.extend(shape)
        strides.extend(4 * step for step in steps)
    n = 1 + max(row[0] for row in rows)
    found = np.zeros(n, STORAGE)
    found["offset"], found["nbytes"] = np.arange(n) * 1000, 400
    found["dtype"] = BY_NAME["float32"].code
    return Index(
        names=None,  # type: ignore[arg-type]
        entries=entries,
        dims=np.array(dims, np.int64),
        metadata={},
        strides=np.array(strides, np.int64),
        storages=found,
        storage=np.array([row[0] for row in rows], np.int64),
    )


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "C": ((20, 5), (5, 1), True),
    "Fortran": ((20, 5), (1, 20), False),
    "gaps": ((5, 5), (10, 1), False),
    "expanded": ((5, 5), (0, 1), False),
    "one row": ((1, 5), (77, 1), True),
    "one column": ((20, 1), (1, 99), True),
    "nothing": ((0, 7), (3, 3), True),
    "scalar": ((), (), True),
    "many": ((5, 1, 2, 1, 10), (20, 7, 10, 0, 1), True),
}


@pytest.mark.parametrize("case", SHAPES)
def test_dense(case: str) -> None:
    shape, strides, expected = SHAPES[case]
    index = index_of([(0, 0, (100,), (1,)), (1, 0, shape, strides), (2, 3, (4,), (2,))])
    assert storages.dense(index, np.array([1])).tolist() == [expected]
    assert storages.dense(index, np.array([2, 1, 0])).tolist() == [False, expected, True]
    assert storages.dense(index, np.array([], np.int64)).tolist() == []
    own = expected and int(np.prod(shape)) == 100
    assert storages.alone(index, np.array([1, 0])).tolist() == [own, True]


def test_alone() -> None:
    index = index_of(
        [(0, 0, (100,), (1,)), (1, 0, (100,), (1,)), (1, 5, (2,), (1,)), (2, 1, (99,), (1,))]
    )
    assert storages.alone(index, np.arange(4)).tolist() == [True, False, False, False]
    assert storages.alone(index, np.array([3, 0])).tolist() == [False, True]
    assert storages.used(index, np.array([2, 1])).tolist() == [1]
    assert storages.used(index, np.arange(4)).tolist() == [0, 1, 2]


def test_no_garbage_is_looked_for_while_objects_are_made(tmp_path: Path) -> None:
    holdfast.save({"x": np.zeros(3), "rows": [[i] for i in range(20_000)]}, tmp_path / "x")
    begun: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            begun.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    try:
        found = holdfast.load(tmp_path / "x")
    finally:
        gc.callbacks.remove(note)
    assert len(found["rows"]) == 20_000
    assert len(begun) < 10, "there is one for every 700 objects or so"
    assert gc.isenabled()
    gc.disable()
    try:
        holdfast.load(tmp_path / "x")
        assert not gc.isenabled()
    finally:
        gc.enable()


class _Mark:
    pass


def _young() -> int:
    return len(gc.get_objects(0)) + len(gc.get_objects(1))


@pytest.mark.skipif(gc.get_freeze_count() > 0, reason="this Python freezes objects of its own")
def test_what_is_made_at_once_is_old_once_between_full_collections() -> None:
    gc.collect()
    with uncollected():
        first = [[i] for i in range(20_000)]
    assert _young() < 10_000
    assert gc.get_freeze_count() == 0
    with uncollected():
        second = [[i] for i in range(20_000)]
    assert _young() >= 20_000
    gc.collect()
    with uncollected():
        third = [[i] for i in range(20_000)]
    assert _young() < 10_000
    mark = _Mark()
    gone = weakref.ref(mark)
    third += [first, second, third, mark]  # type: ignore[list-item]
    del first, second, third, mark
    gc.collect()
    assert gone() is None, "what becomes garbage is found all the same"


def test_garbage_of_a_program_that_loads_again_and_again_is_found(tmp_path: Path) -> None:
    holdfast.save({"rows": [[i] for i in range(20_000)]}, tmp_path / "x")
    alive: weakref.WeakSet[_Mark] = weakref.WeakSet()
    most = 0
    for _ in range(60):
        mark = _Mark()
        vars(mark)["itself"] = mark
        alive.add(mark)
        vars(mark)["rows"] = holdfast.load(tmp_path / "x")
        del mark
        passing = [[i] for i in range(5_000)]
        del passing
        most = max(most, len(alive))
    assert most < 40


def test_a_small_load_promotes_nothing(tmp_path: Path) -> None:
    holdfast.save({"x": np.zeros(3)}, tmp_path / "x")
    holdfast.load(tmp_path / "x")
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(100_000, 10, 10)
    try:
        own = [[i] for i in range(30_000)]
        holdfast.load(tmp_path / "x")
        assert gc.get_count()[0] >= 30_000
    finally:
        gc.set_threshold(*thresholds)
    assert len(own) == 30_000


def test_what_a_program_froze_stays_frozen(tmp_path: Path) -> None:
    holdfast.save({"rows": [[i] for i in range(20_000)]}, tmp_path / "x")
    gc.collect()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        found = holdfast.load(tmp_path / "x")
        assert len(found["rows"]) == 20_000
        assert 0 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_the_callers_own_code_runs_with_the_collector_on(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    holdfast.save({"x": torch.ones(3)}, tmp_path / "x")
    seen: list[bool] = []

    def where(tensor: object, location: str) -> None:
        seen.append(gc.isenabled())

    holdfast.load(tmp_path / "x", where)
    assert seen == [True]
