"""What OneFlow pickles: folders around a pickle and single files, of every era and protocol."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oneflow_states as files
from holdfast.errors import FormatError, UnsafeError
from holdfast.formats import oneflow_file
from holdfast.formats._inert import Global, Record
from holdfast.layout import Index
from holdfast.lenient import LenientResolver
from holdfast.safe import SafeResolver
from pickle_files import ORDERED, call, items, name, number, pairs, text

ERAS = Path(__file__).parents[1] / "golden" / "oneflow" / "eras"
EXPECTED = json.loads((ERAS / "expected.json").read_text())
FLOATS = np.arange(6, dtype="<f4").reshape(2, 3) + 0.5
LONGS = np.arange(4, dtype="<i8")


def values(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a single file."""
    return files.values(files.index_file(data), lambda _: data)


def whole(index: Index, made: dict[str, Any], *allowed: Any) -> Any:
    """The object, as a load gives it."""
    assert index.structure is not None
    assert index.inert

    def storage(*_: object) -> object:
        raise AssertionError("no storage is asked for")

    resolver = LenientResolver(SafeResolver("numpy", name="x", safe_globals=allowed))
    tensors = [made[key] for key in index.names.tolist()]
    return index.structure.replay(tensors, storage, resolver)


# -- what OneFlow wrote --------------------------------------------------------------------------


@pytest.mark.parametrize("era", sorted(EXPECTED))
def test_every_era(era: str) -> None:
    path = ERAS / era
    if path.is_dir():
        found = files.index_folder(path, strict=True)
        got = files.folder_values(path, found)
    else:
        data = path.read_bytes()
        found = files.index_file(data)
        assert found.end == len(data)
        got = values(data)
    assert found.framework == "oneflow"
    assert found.names.find(next(iter(got))) == 0
    assert len(EXPECTED[era]) >= 6
    for key, tensor in EXPECTED[era].items():
        i = found.names.tolist().index(key)
        assert (found.dtype(i).name, list(found.shape(i))) == (tensor["dtype"], tensor["shape"])
        assert hashlib.sha256(got[key].tobytes()).hexdigest() == tensor["sha256"]


def test_a_training_checkpoint() -> None:
    path = ERAS / "training_v3"
    found = files.index_folder(path)
    got = files.folder_values(path, found)
    assert len(got) == 12
    obj = whole(found, got)
    assert list(obj) == ["model", "optimizer", "epoch", "best", "tags"]
    assert obj["model"]._metadata == OrderedDict()
    assert obj["model"]["l1.weight"] is got["model.l1.weight"]
    assert obj["optimizer"]["state"][0]["momentum_buf"] is got["optimizer.state.0.momentum_buf"]
    assert obj["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3, 4, 5]
    assert (obj["epoch"], obj["best"], obj["tags"]) == (3, 0.5, ["a", None, True])
    assert found.kinds == dict.fromkeys(range(6), "parameter")


def test_a_module_comes_back_inert() -> None:
    path = ERAS / "module_v3"
    found = files.index_folder(path)
    got = files.folder_values(path, found)
    assert found.structure is not None
    assert list(found.structure.globals) == [
        *("__main__.Net", "collections.OrderedDict", "oneflow.nn.modules.linear.Linear"),
        "oneflow.nn.modules.activation.ReLU",
    ]
    net = whole(found, got)
    assert type(net) is Record
    assert net.cls.path == "__main__.Net"
    layer = net.state["_modules"]["l1"]
    assert layer.state["_parameters"]["weight"] is got["l1.weight"]
    assert layer.state["in_features"] == 20
    assert repr(found.structure.outline(lambda row: row)) == "<instance of __main__.Net>"


def test_a_class_that_is_allowed_is_made() -> None:
    data = files.saved(name("mine", "Point") + b")\x81" + pairs({"w": files.inside(
        files.of(FLOATS), files.FLOAT)}) + b"b")  # fmt: skip

    class Point:
        w: Any

    made = whole(files.index_file(data), {"w": FLOATS}, (Point, "mine.Point"))
    assert type(made) is Point
    assert made.w is FLOATS


# -- the states of tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("fortran", [False, True])
def test_elements_in_the_pickle(module: str, fortran: bool) -> None:
    data = files.saved(
        pairs({"a": files.inside(files.of(FLOATS, module=module, fortran=fortran), 2)})
    )
    files.assert_same(values(data)["a"], FLOATS)
    found = files.index_file(data)
    assert (found.strides is not None) is fortran
    assert data[int(found.entries["offset"][0]) :].startswith(FLOATS.tobytes("FC"[not fortran]))


@pytest.mark.parametrize("module", ["numpy.core.numeric", "numpy._core.numeric"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("opcode", [b"\x96", b"\x8e"])
def test_elements_of_protocol_5(module: str, order: str, opcode: bytes) -> None:
    elements = opcode + (24).to_bytes(8, "little") + FLOATS.tobytes(order)
    parts = elements, files.numpy_dtype("<f4"), items(number(2), number(3)), text(order)
    data = files.saved(files.inside(call(module, "_frombuffer", *parts), 2))
    data = b"\x80\x05" + data[2:]
    files.assert_same(values(data)["tensor"], FLOATS)


def test_elements_of_the_other_byte_order() -> None:
    data = files.saved(files.inside(files.of(FLOATS.astype(">f4")), 2))
    np.testing.assert_array_equal(values(data)["tensor"], FLOATS)


def test_bfloat16() -> None:
    wide = np.array([1.5, -2, 3.25], "<f4")
    data = files.saved(items(files.inside(files.of(wide), files.BFLOAT16)))
    found = files.index_file(data)
    assert found.dtype(0).name == "bfloat16"
    assert values(data)["0"].tolist() == (wide.view("<u4") >> 16).tolist()


@pytest.mark.parametrize("more", [{}, {"device": b"X\x04\0\0\0cuda"}, {
    "placement": name("oneflow._oneflow_internal", "placement") + b")\x81" + pairs(
        {"type": text("cpu"), "ranks": b"]"}) + b"b",
    "sbp": items(name("oneflow._oneflow_internal.sbp", "sbp") + b")\x81"
                 + items(text("B"), number(-1)) + b"b"),
}], ids=["0.6", "plain", "global"])  # fmt: skip
def test_states_of_other_releases(more: dict[str, bytes]) -> None:
    state = {"data": files.of(LONGS), "dtype": files.dtype(files.INT64), **more}
    data = files.saved(pairs({"a": files.tensor(pairs(state))}))
    found = files.index_file(data)
    assert values(data)["a"].tolist() == [0, 1, 2, 3]
    assert found.structure is not None
    assert list(found.structure.globals) == []  # nothing of its state is asked for


@pytest.mark.parametrize(
    ("module", "cls", "kind"),
    [
        ("oneflow", "Tensor", None),
        ("oneflow._oneflow_internal", "Tensor", None),
        ("oneflow.nn", "Parameter", "parameter"),
        ("oneflow._oneflow_internal.nn", "Parameter", "parameter"),
    ],
)
def test_classes_of_every_release(module: str, cls: str, kind: str | None) -> None:
    data = files.saved(files.inside(files.of(FLOATS), 2, module=module, cls=cls))
    assert files.index_file(data).kinds == ({} if kind is None else {0: kind})


def test_a_parameter_of_integers() -> None:
    data = files.saved(files.inside(files.of(LONGS), 6, module="oneflow.nn", cls="Parameter"))
    assert files.index_file(data).kinds == {0: "parameter,frozen"}


def test_tensors_that_are_one_object_stay_so(tmp_path: Path) -> None:
    obj = items(files.beside("tensor_7") + b"\x94", b"h\0", files.beside("tensor_7"))
    folder = files.pickle_folder(tmp_path / "c", obj, {"tensor_7": FLOATS, "tensor_9": LONGS})
    found = files.index_folder(folder)
    assert found.files == ["tensor_7/out", "pickled_data"]
    got = files.folder_values(folder, found)
    assert list(got) == ["0", "2"]
    first, same, other = whole(found, got)
    assert first is same
    assert other is not first


def test_arrays_and_bytes_that_are_no_tensors() -> None:
    raw = b"x" * 300
    obj = {"a": files.of(FLOATS), "b": files.binary(raw) + b"\x94", "c": b"h\0", "d": b"C\0",
           "t": files.inside(files.of(LONGS), 6),
           "s": call("numpy.core.multiarray", "scalar", files.numpy_dtype("<f4"),
                     files.binary(b"\0\0\x80\x3f")),
           "y": b"\x96" + (3).to_bytes(8, "little") + b"abc"}  # fmt: skip
    data = files.saved(pairs(obj))
    made = whole(files.index_file(data), values(data))
    files.assert_same(made["a"], FLOATS)
    assert (made["b"], made["d"], made["y"]) == (raw, b"", bytearray(b"abc"))
    assert made["c"] is made["b"]
    assert (made["s"], type(made["s"])) == (1.0, np.float32)
    assert made["t"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    """A folder, whose pickle has no elements in it, of the same content."""
    plain = {"epoch": 3, "x": 2**70, "y": -1.5, "z": {"k": (1, None, True)}, "l": list("ab")}
    plain |= {
        "i": [-1, -(2**31), 2**31, 2**63, -(2**63), 300],
        "u": "ü" * 300,
        "o": OrderedDict(a=1),
    }
    obj = pickle.dumps(plain, protocol=protocol)[2:-1]
    if protocol >= 4:
        obj = obj[9:]  # its frame
    part = pairs({"w": files.beside("tensor_0")})
    folder = files.pickle_folder(tmp_path / "c", items(obj, part), {"tensor_0": FLOATS})
    content = (folder / "pickled_data").read_bytes()
    (folder / "pickled_data").write_bytes(bytes([0x80, protocol]) + content[2:])
    found = files.index_folder(folder)
    made = whole(found, files.folder_values(folder, found))
    assert made[0] == plain
    assert type(made[0]["o"]) is OrderedDict
    np.testing.assert_array_equal(made[1]["w"], FLOATS)


def test_a_folder_with_elements_in_its_pickle(tmp_path: Path) -> None:
    obj = items(files.beside("tensor_0"), files.inside(files.of(LONGS), 6))
    folder = files.pickle_folder(tmp_path / "c", obj, {"tensor_0": FLOATS})
    found = files.index_folder(folder)
    got = files.folder_values(folder, found)
    np.testing.assert_array_equal(got["0"], FLOATS)
    np.testing.assert_array_equal(got["1"], LONGS)
    assert found.entries["file"].tolist() == [0, 1]


# -- the object around them ----------------------------------------------------------------------


def test_objects_that_contain_themselves() -> None:
    l_in_t = b"]\x94(" + b"h\0" + number(5) + b"e"  # l = [l, 5]
    data = files.saved(l_in_t)
    made = whole(files.index_file(data), {})
    assert made[0] is made
    assert made[1] == 5
    pair = b"]\x94h\0\x85\x94a" + b"0h\1"  # l = []; t = (l,); l.append(t); t
    made = whole(files.index_file(files.saved(pair)), {})
    assert type(made) is tuple
    assert made[0][0] is made
    net = name("mine", "Net") + b"]\x94\x85\x81\x94" + b"h\0h\1a0"  # n = Net(l); l.append(n); n
    made = whole(files.index_file(files.saved(net)), {})
    assert type(made) is Record
    assert made.args[0][0] is made


def test_records_of_every_kind() -> None:
    cls = name("mine", "Things") + b"\x94"
    made_of = cls + b")\x81" + b"(" + number(1) + number(2) + b"e"
    made_of += b"(" + text("k") + number(3) + b"u" + pairs({"x": number(4)}) + b"b"
    keyed = b"h\0)" + pairs({"size": number(5)}) + b"\x92"
    data = files.saved(items(made_of, keyed, b"h\0"))
    first, second, third = whole(files.index_file(data), {})
    assert (first.items, first.pairs, first.state) == ([1, 2], [("k", 3)], {"x": 4})
    assert second.kwargs == {"size": 5}
    assert type(third) is Global
    assert third.path == "mine.Things"


def test_an_instance_that_is_called() -> None:
    made = name("mine", "Point") + b")\x81" + items(number(1)) + b"R"
    found = files.index_file(files.saved(made))
    with pytest.raises(FormatError, match="a call of <instance of mine.Point>"):
        whole(found, {})


def test_sets_and_sharing() -> None:
    obj = items(b"\x8f\x94(" + number(1) + text("long enough") + b"\x94\x90", b"h\0", b"h\1",
                b"(" + number(7) + b"\x91")  # fmt: skip
    first, again, word, frozen = whole(files.index_file(files.saved(obj)), {})
    assert first == {1, "long enough"}
    assert again is first
    assert word == "long enough"
    assert frozen == frozenset({7})


def test_attributes_of_an_ordered_dict() -> None:
    state = ORDERED + b"(" + text("w") + number(1) + b"u" + pairs({"_metadata": ORDERED}) + b"b"
    made = whole(files.index_file(files.saved(state)), {})
    assert made == OrderedDict(w=1)
    assert made._metadata == OrderedDict()


@pytest.mark.parametrize("what", ["os.system", "builtins.eval", "mine.function"])
def test_calls_are_refused(what: str) -> None:
    module, _, function = what.rpartition(".")
    data = files.saved(items(files.inside(files.of(LONGS), 6), call(module, function, text("x"))))
    found = files.index_file(data)
    with pytest.raises(UnsafeError, match=re.escape(function)):
        whole(found, values(data))
    assert values(data)["0"].tolist() == [0, 1, 2, 3]  # the tensors can be had by name


# -- which files are taken for it ----------------------------------------------------------------


@pytest.mark.parametrize("magic", ["__oneflow__", "oneflow"])
def test_both_keys(magic: str) -> None:
    data = files.saved(pairs({"w": files.inside(files.of(LONGS), 6)}), magic=magic)
    assert values(data)["w"].tolist() == [0, 1, 2, 3]
    assert files.index_file(data + b"more").end == len(data)


def test_a_stream_of_unknown_size() -> None:
    data = files.saved(pairs({"w": files.inside(files.of(np.arange(9000)), 6)}))
    assert files.index_file(data + b"more", -1).end == len(data)


@pytest.mark.parametrize("obj", [{"a": 1}, ["oneflow"], "__oneflow__", {"k": "oneflow"}])
def test_other_pickles(obj: object) -> None:
    data = pickle.dumps(obj)
    assert oneflow_file.sniff(data, -1) is (b"oneflow" in data)
    if b"oneflow" in data:
        with pytest.raises(FormatError, match="x: this is a pickle, which cannot be read here"):
            files.index_file(data)


@pytest.mark.parametrize(
    "prefix", [b"", b"\x80", b"\x80\x01oneflow", b"\x80\x06oneflow", b"oneflow"]
)
def test_no_pickles(prefix: bytes) -> None:
    assert not oneflow_file.sniff(prefix, -1)
