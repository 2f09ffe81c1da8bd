"""OneFlow's layouts as they are written: every byte, and what is refused."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow
from holdfast.dtypes import BY_NAME
from holdfast.formats._oneflow_emit import CONSTANTS, Emitter
from holdfast.formats._oneflow_write import check_elements, check_names, plan_snapshot
from holdfast.oneflow_saving import PlannedFile, plan_oneflow, replaceable
from holdfast.views import TensorBatch, TensorView
from oneflow_files import save, single


class Tensor:
    """What stands for ``oneflow.Tensor`` here: it keeps its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Parameter(Tensor):
    pass


class DType:
    number = -1

    def __setstate__(self, state: int) -> None:
        self.number = state


_CLASSES = {
    ("oneflow", "Tensor"): Tensor,
    ("oneflow.nn", "Parameter"): Parameter,
    ("oneflow._oneflow_internal", "dtype"): DType,
}


class Unpickler(pickle.Unpickler):
    """Python's own, with classes in the place of OneFlow's."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy.core.multiarray":
            module = "numpy._core.multiarray" if np.__version__ >= "2" else module
        return _CLASSES.get((module, name)) or super().find_class(module, name)


def loads(data: bytes) -> Any:
    content = Unpickler(io.BytesIO(data)).load()
    assert list(content) == ["protocol_version", "__oneflow__", "data"]
    assert content["protocol_version"] == 1
    assert content["__oneflow__"] is None
    return content["data"]


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


# -- the snapshot --------------------------------------------------------------------------------


def test_a_snapshot_byte_for_byte(tmp_path: Path) -> None:
    weight = np.arange(6, dtype="<f4").reshape(2, 3)
    save({"fc.weight": weight.T, "steps": np.array(7, "<i8"), "none": np.zeros((0, 3))}, tmp_path)
    assert tree(tmp_path) == {
        "fc.weight/meta": b"shape {\n  dim: 3\n  dim: 2\n}\ndata_type: kFloat\n",
        "fc.weight/out": weight.T.tobytes(),
        "none/meta": b"shape {\n  dim: 0\n  dim: 3\n}\ndata_type: kDouble\n",
        "none/out": b"",
        "snapshot_done": b"",
        "steps/meta": b"shape {\n}\ndata_type: kInt64\n",
        "steps/out": (7).to_bytes(8, "little"),
    }


def test_snapshot_done_is_last() -> None:
    planned = plan_oneflow({"a": np.zeros(2)})
    assert not isinstance(planned, PlannedFile)
    assert planned.plan.last == "snapshot_done"
    assert planned.plan.paths == ["a/out"]


def test_an_empty_dict_is_an_empty_snapshot(tmp_path: Path) -> None:
    save({}, tmp_path / "x")
    assert tree(tmp_path / "x") == {"snapshot_done": b""}


@pytest.mark.parametrize("layout", ["snapshot", "pickle"])
def test_an_empty_dict_comes_back(tmp_path: Path, layout: str) -> None:
    holdfast.oneflow.save({}, tmp_path / "x", layout=layout)
    assert holdfast.load(tmp_path / "x") == {}
    assert holdfast.verify(tmp_path / "x").ok
    with holdfast.open(tmp_path / "x") as opened:
        assert list(opened) == []
    holdfast.convert(tmp_path / "x", tmp_path / "y.safetensors")
    assert holdfast.load(tmp_path / "y.safetensors") == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("a//b", "empty"),
        ("a/", "empty"),
        ("..", "leads out"),
        ("a/../../b", "leads out"),
        ("./a", "leads out"),
        ("a\0b", "NUL"),
        ("snapshot_done", "OneFlow's own"),
        ("Snapshot_Done", "OneFlow's own"),
        ("snapshot_done/x", "OneFlow's own"),
        ("pickled_data", "OneFlow's own"),
        ("a/meta", "file of a tensor"),
        ("a/OUT", "file of a tensor"),
        ("a\ud800", "no Unicode"),
    ],
)
def test_names_that_are_no_folders(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        plan_oneflow({"fine": np.zeros(1), name: np.zeros(1)})
    assert repr(name) in str(caught.value)
    assert "layout='pickle'" in str(caught.value)
    plan_oneflow({"fine": np.zeros(1), name: np.zeros(1)}, "pickle")


@pytest.mark.parametrize(
    "names",
    [("Weight", "weight"), ("a/B", "A/b"), ("straße", "STRASSE"), ("a", "a/b"), ("A", "a/b/c")],
)
def test_names_that_meet(names: tuple[str, str]) -> None:
    for pair in (names, names[::-1]):
        with pytest.raises(ValueError, match=r"only its case differs|lies in the folder of"):
            check_names(pair)


def test_names_that_do_not_meet() -> None:
    names = ["a.b", "a-b", "a b", "meta", "out", "a.c/d", "ab/c", "..a", "a..", "é", "e\u0301"]
    check_names(names)
    assert len(plan_snapshot(names, _batch(["float32"] * len(names))).texts) == len(names) + 1


def test_many_names_in_flat_time() -> None:
    check_names([f"layer.{i}/block/weight" for i in range(100_000)])


def test_a_nested_name_is_written_and_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'conv/weight': its folder lies in another"):
        save({"conv/weight": np.zeros(1, "f4")}, tmp_path)
    assert sorted(tree(tmp_path)) == ["conv/weight/meta", "conv/weight/out", "snapshot_done"]


# -- element types -------------------------------------------------------------------------------


def _batch(dtypes: list[str]) -> TensorBatch:
    return TensorBatch.of([TensorView(BY_NAME[name], (0,), 0, None) for name in dtypes])


LOADABLE = ["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64"]
NEWER = ["int16", "complex64", "complex128"]


def test_every_type_that_the_last_release_loads() -> None:
    check_elements(LOADABLE, _batch(LOADABLE), {}, "torch")


@pytest.mark.parametrize("name", [row for row in BY_NAME if row not in LOADABLE])
def test_types_that_oneflow_cannot_load_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"tensor 'w': OneFlow cannot load .* {name}: save x?"
    ) as e:
        check_elements(["fine", "w"], _batch(["float32", name]), {}, "torch")
    assert re.search(r"save (x\.(int|long|float)\(\)|torch\.view_as_real\(x\))", str(e.value))


@pytest.mark.parametrize("name", NEWER)
def test_a_build_that_has_a_type_can_load_it(name: str) -> None:
    check_elements(["w"], _batch([name]), {}, "oneflow")


def test_dates_have_no_type() -> None:
    for layout in ("snapshot", "pickle", "file"):
        with pytest.raises(TypeError, match="tensor 'when': OneFlow cannot load elements of <M8"):
            plan_oneflow({"when": np.zeros(2, "M8[s]")}, layout)


def test_the_path_of_a_tensor_in_an_object_is_told() -> None:
    with pytest.raises(TypeError, match=r"tensor 'model\.1\.w': OneFlow cannot load .* uint16"):
        plan_oneflow({"model": [1, {"w": np.zeros(2, np.uint16)}]}, "pickle")


# -- pickles -------------------------------------------------------------------------------------


def test_a_pickle_folder(tmp_path: Path) -> None:
    shared = np.arange(3, dtype="f4")
    state = collections.OrderedDict(w=shared, again=shared, lr=0.5)
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    save({"model": state, "ids": [np.array([1, 2])]}, tmp_path, "snapshot")
    files = tree(tmp_path)
    assert sorted(files) == [
        *("pickled_data", "tensor_0/meta", "tensor_0/out", "tensor_1/meta", "tensor_1/out"),
    ]
    found = loads(files["pickled_data"])
    assert found["model"]["w"].state == {"path": "tensor_0"}
    assert found["model"]["w"] is found["model"]["again"]
    assert found["ids"][0].state == {"path": "tensor_1"}
    assert type(found["model"]) is collections.OrderedDict
    assert found["model"]._metadata == {"version": 1}
    assert files["tensor_0/out"] == shared.tobytes()
    assert files["tensor_1/meta"] == b"shape {\n  dim: 2\n}\ndata_type: kInt64\n"


def test_a_tensor_alone(tmp_path: Path) -> None:
    save(np.arange(3.0), tmp_path / "x")
    assert loads((tmp_path / "x/pickled_data").read_bytes()).state == {"path": "tensor_0"}


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (255, 256, 257), (64, 1, 70_000, 3)])
def test_a_single_file(sizes: tuple[int, ...]) -> None:
    arrays = {f"t{i}": np.arange(n, dtype="u1")[: n or None] for i, n in enumerate(sizes)}
    planned = plan_oneflow(arrays, "file")
    assert isinstance(planned, PlannedFile)
    data = single(planned)
    assert len(data) == planned.plan.size
    found = loads(data)
    assert list(found) == list(arrays)
    for i, (name, array) in enumerate(arrays.items()):
        state = found[name].state
        assert list(state) == ["data", "dtype", "device"]
        assert state["data"].dtype == array.dtype
        np.testing.assert_array_equal(state["data"], array)
        assert (state["dtype"].number, state["device"]) == (7, "cpu")
        offset = int(planned.plan.offsets[i])
        assert data[offset : offset + array.nbytes] == array.tobytes()
        assert offset % 64 == 0 or array.nbytes == 0


@pytest.mark.parametrize("dtype", LOADABLE)
def test_arrays_in_a_single_file(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::2].transpose(2, 0, 1)
    zero = np.ones((), dtype)
    planned = plan_oneflow({"a": array, "deep": [zero]}, "file")
    assert isinstance(planned, PlannedFile)
    found = loads(single(planned))
    for tensor, expected in ((found["a"], array), (found["deep"][0], zero)):
        held = tensor.state["data"]
        assert (held.dtype, held.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(held, expected)


def test_parameters_stay_parameters() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    module = {"w": weight, "f": frozen, "b": torch.ones(2)}
    for layout in ("pickle", "file"):
        planned = plan_oneflow([module], layout)
        data = (
            single(planned)
            if isinstance(planned, PlannedFile)
            else planned.plan.texts["pickled_data"]
        )
        (found,) = loads(data)
        kinds = {name: type(tensor) for name, tensor in found.items()}
        assert kinds == {"w": Parameter, "f": Parameter, "b": Tensor}


def test_arrays_beside_tensors_stay_arrays() -> None:
    torch = pytest.importorskip("torch")
    array = np.arange(3)
    for obj in ([array, torch.ones(2)], [torch.ones(2), array]):
        planned = plan_oneflow(obj, "file")
        assert isinstance(planned, PlannedFile)
        found = loads(single(planned))
        assert sorted(type(part).__name__ for part in found) == ["Tensor", "ndarray"]
        np.testing.assert_array_equal(next(p for p in found if isinstance(p, np.ndarray)), array)


def test_what_cannot_be_pickled_is_told_with_its_path() -> None:
    with pytest.raises((TypeError, pickle.PicklingError), match=r"\$\['a'\]\[1\]: "):
        plan_oneflow({"a": [np.zeros(1), (i for i in "x")]}, "pickle")


# -- the emitter ---------------------------------------------------------------------------------


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


class Bag(dict):  # type: ignore[type-arg]
    pass


class Row(list):  # type: ignore[type-arg]
    pass


def _plain(obj: object) -> Any:
    emitted = Emitter(lambda _: False, frozenset(), CONSTANTS).dump(obj)
    assert not emitted.tensors
    return pickle.loads(emitted.data)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -1, -(2**31), 2**63),
        *(-(2**63), -(2**31) - 1, -128, -32768, 2**2100, -(2**2100), 0.1, -0.0, float("inf")),
        *("", "a", "ü" * 200, "a" * 300, b"", b"a", b"b" * 300, "\ud800"),
        *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], {}, {1: 2}, {1: 2, 3: 4}),
        *({1, 2}, frozenset("ab"), bytearray(b"xy"), bytearray(), complex(1, 2), slice(1, 2)),
        *(collections.OrderedDict(a=1), collections.deque([1, 2]), collections.Counter("aab")),
        *(collections.defaultdict(list, {1: [2]}), Bag(a=1), Row([1, 2]), Point(3), Path("a/b")),
        *(range(3), int, len, Point, types.SimpleNamespace(a=1), type(None), ..., np.float32(1.5)),
        *(np.dtype("f4"), list(range(3000)), {i: str(i) for i in range(2500)}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_values_come_back_as_they_are(value: object) -> None:
    found = _plain([value, value])
    assert found[0] == value
    assert type(found[0]) is type(value)
    if isinstance(value, list | dict | Point):
        assert found[0] is found[1]


def test_an_array_that_is_no_tensor() -> None:
    array = np.arange(6).reshape(2, 3)
    emitted = Emitter(lambda _: False, frozenset(), CONSTANTS).dump([array])
    assert b"numpy.core.multiarray" in emitted.data
    assert b"numpy._core" not in emitted.data
    np.testing.assert_array_equal(Unpickler(io.BytesIO(emitted.data)).load()[0], array)


def test_objects_that_contain_themselves() -> None:
    row: list[Any] = [1]
    row.append(row)
    found = _plain(row)
    assert found[1] is found
    loop: list[Any] = []
    pair = (loop, 1, 2, 3)
    loop.append(pair)
    found = _plain(pair)
    assert found[0][0] is found
    point = Point(1)
    point.x = {"me": point}  # type: ignore[assignment]
    made = _plain(point)
    assert made.x["me"] is made


def test_too_deep_is_a_recursion_error() -> None:
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(RecursionError):
        _plain(deep)


# -- what may be replaced ------------------------------------------------------------------------


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    assert not replaceable(tmp_path / "nothing")
    assert replaceable(tmp_path)
    for layout in ("snapshot", "pickle"):
        save({"a": np.zeros(2)}, tmp_path / layout, layout)
        assert replaceable(tmp_path / layout)
    with pytest.warns(UserWarning, match="lies in another"):
        save({"a/b": np.zeros(2)}, tmp_path / "nested")
    assert replaceable(tmp_path / "nested")


def test_a_checkpoint_has_a_mark_and_a_meta_beside_every_out(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save({"a": np.zeros(2), "b": np.zeros(2)}, path)
    for mark in ("pickled_data", "model.mlir", "snapshot_done"):
        next(path.glob("*_d*") if mark == "model.mlir" else path.glob("[psm]*")).rename(path / mark)
        assert replaceable(path)
    (path / "a" / "meta").write_text("shape: what a build makes of it")
    assert not replaceable(path)
    (path / "a" / "meta").unlink()
    assert not replaceable(path)  # others have one
    (path / "b" / "meta").unlink()
    assert replaceable(path)  # as before November of 2020
    (path / "snapshot_done").rename(path / "pickled_data")
    assert not replaceable(path)


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize(
    "inside", [["bin/out"], ["x/"], ["a/b/c/"], ["out"], ["meta"], ["x/meta"], ["snapshot_done/x/"]]
)
def test_folders_of_other_programs_are_not_replaced(
    tmp_path: Path, inside: list[str], mark: bool
) -> None:
    for name in inside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(b"years of work")
    if mark:
        (tmp_path / "model.mlir").write_bytes(b"")
    assert not replaceable(tmp_path)
    with pytest.raises(FileExistsError, match="no part of a checkpoint, and would be lost"):
        holdfast.save({"a": np.zeros(2)}, tmp_path, format="oneflow")
    assert (tmp_path / inside[0]).exists()


def test_what_comes_while_a_save_runs_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "model"
    holdfast.save({"a": np.zeros(2)}, target, format="oneflow")

    def work(done: int, total: int) -> None:
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(FileExistsError, match="no part of a checkpoint, and would be lost"):
        holdfast.save({"a": np.ones(2)}, target, format="oneflow", progress=work)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["model"]


def test_a_checkpoint_that_comes_while_a_save_runs_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def other(done: int, total: int) -> None:
        save({"b": np.zeros(2)}, target)

    holdfast.save({"a": np.ones(2)}, target, format="oneflow", progress=other)
    assert list(holdfast.load(target)) == ["a"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("stray", ["notes.txt", "a/notes.txt", "link", "a/sub/model.py", "a/link"])
def test_what_is_no_part_of_a_checkpoint_is_not(tmp_path: Path, stray: str) -> None:
    path = tmp_path / "model"
    save({"a": np.zeros(2)}, path)
    target = path / stray
    target.parent.mkdir(exist_ok=True)
    if stray.endswith("link"):
        target.symlink_to(tmp_path)
    else:
        target.write_text("mine")
    assert not replaceable(path)
