"""Objects as torch.save pickles them: rows, kinds and bounds, without PyTorch."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest

import pickle_files as files
from holdfast.dtypes import BY_NAME
from holdfast.errors import FormatError, UnsafeError
from holdfast.formats._inert import Record, Storage, Tensor
from holdfast.formats._torch_pickle import build_index
from holdfast.layout import CONJUGATE, NEGATIVE, QUANTIZED
from pickle_files import (
    FALSE,
    NONE,
    ORDERED,
    TRUE,
    Book,
    call,
    items,
    number,
    numbers,
    pairs,
    parameter,
    read,
    replay,
    simple,
    text,
)

# -- rows ----------------------------------------------------------------------------------------


def test_a_state_dict() -> None:
    body = call("collections", "OrderedDict") + b"("
    body += text("a.w") + simple("0", (2, 3)) + text("a.b") + simple("1", ())
    body += b"u" + pairs({"_metadata": ORDERED}) + b"b"
    found = read(body)
    assert found.names.tolist() == ["a.w", "a.b"] and found.keys == ["0", "1"]
    assert found.entries["nbytes"].tolist() == [24, 4]
    assert found.storages["nbytes"].tolist() == [24, 4]
    assert found.dims.tolist() == [2, 3] and found.strides.tolist() == [12, 4]
    assert found.dense and found.flags is None and not found.kinds
    assert found.locations == ["cpu", "cpu"] and found.globals == ["collections.OrderedDict"]
    book = Book()
    made = replay(found, book)
    assert made == OrderedDict({"a.w": "T0", "a.b": "T1"}) and type(made) is OrderedDict
    assert made._metadata == OrderedDict() and not book.asked
    outline = found.structure.outline(lambda i: -i)
    assert outline == OrderedDict({"a.w": 0, "a.b": -1})


def test_the_index_has_offsets_in_the_file() -> None:
    place = files.storage("LongStorage", "k", 10)
    found = read(items(files.tensor(place, 2, (2,), (3,)), files.tensor(place, 0, (10,), (1,))))
    assert not found.dense
    found.storages["offset"] = 1000
    index = build_index(found, metadata={"a": "b"}, end=2000)
    assert index.entries["offset"].tolist() == [1016, 1000]
    assert index.strides is not None and index.strides.tolist() == [24, 8]
    assert index.storage is not None and index.storage.tolist() == [0, 0]
    assert index.names.tolist() == ["0", "1"] and index.names.find("1") == 1
    assert index.structure is found.structure and index.framework == "torch"
    assert found.entries["offset"].tolist() == [16, 0]


@pytest.mark.parametrize(
    ("kind", "dtype", "itemsize"),
    [
        ("DoubleStorage", "float64", 8), ("FloatStorage", "float32", 4),
        ("HalfStorage", "float16", 2), ("BFloat16Storage", "bfloat16", 2),
        ("LongStorage", "int64", 8), ("IntStorage", "int32", 4), ("ShortStorage", "int16", 2),
        ("CharStorage", "int8", 1), ("ByteStorage", "uint8", 1), ("BoolStorage", "bool", 1),
        ("ComplexFloatStorage", "complex64", 8), ("ComplexDoubleStorage", "complex128", 16),
        ("ComplexHalfStorage", "complex32", 4), ("UntypedStorage", "uint8", 1),
        ("Float8_e4m3fnStorage", "float8_e4m3fn", 1), ("UInt16Storage", "uint16", 2),
    ],
)  # fmt: skip
def test_types_of_storages(kind: str, dtype: str, itemsize: int) -> None:
    found = read(files.tensor(files.storage(kind, "0", 6, module="torch.storage"), 1, (5,), (1,)))
    assert found.entries["dtype"].tolist() == [BY_NAME[dtype].code]
    assert found.entries["offset"].tolist() == [itemsize]
    assert found.storages["nbytes"].tolist() == [6 * itemsize]
    assert found.storages["dtype"].tolist() == [BY_NAME[dtype].code]


def test_types_without_a_storage_of_their_own() -> None:
    place = files.storage("UntypedStorage", "0", 12, module="torch.storage")
    body = files.tensor(
        place, 1, (2,), (1,), files.name("torch", "uint32"), function="_rebuild_tensor_v3"
    )
    found = read(body)
    assert found.entries["dtype"].tolist() == [BY_NAME["uint32"].code]
    assert found.entries["offset"].tolist() == [4] and found.entries["nbytes"].tolist() == [8]
    assert replay(found) == "T0"
    with pytest.raises(FormatError, match="elements 1 to 3 of a storage of 3"):
        read(body.replace(numbers((2,)), numbers((3,)), 1))


def test_a_dtype_without_a_name_here_is_asked_for() -> None:
    place = files.storage("UntypedStorage", "0", 2, module="torch.storage")
    found = read(
        files.tensor(
            place, 0, (1,), (1,), files.name("torch", "bits16"), function="_rebuild_tensor_v3"
        )
    )
    assert len(found.entries) == 0
    made = replay(found)
    assert made[:2] == ("call", "torch._utils._rebuild_tensor_v3")
    assert made[2][0] == ("storage", 0, -1) and made[2][6] == "torch.bits16"


def test_conjugates_and_negatives() -> None:
    place = files.storage("ComplexFloatStorage", "0", 1)
    both = pairs({"conj": TRUE, "neg": TRUE})
    found = read(
        items(
            files.tensor(place, 0, (1,), (1,), both),
            files.tensor(place, 0, (1,), (1,), NONE),
            files.tensor(place, 0, (1,), (1,), pairs({"conj": FALSE, "neg": TRUE})),
        )
    )
    assert found.flags is not None
    assert found.flags.tolist() == [CONJUGATE | NEGATIVE, 0, NEGATIVE]
    assert replay(found) == ("T0", "T1", "T2")


def test_no_elements() -> None:
    place = files.storage("FloatStorage", "0", 0)
    found = read(files.tensor(place, 7, (0, 2**62), (2**40, 1)))
    assert found.entries["offset"].tolist() == [0] and found.entries["nbytes"].tolist() == [0]
    assert found.dense and found.dims.tolist() == [0, 2**62]


def test_size_as_other_kinds_of_sequence() -> None:
    place = files.storage("FloatStorage", "0", 6)
    size = call("torch", "Size", numbers((2, 3)))
    body = call("torch._utils", "_rebuild_tensor", place, number(0), size, b"](K\x03K\x01e")
    found = read(body)
    assert found.dims.tolist() == [2, 3] and found.dense


# -- bounds --------------------------------------------------------------------------------------

PLACE = files.storage("FloatStorage", "0", 6)
WRONG = {
    "beyond": (files.tensor(PLACE, 1, (6,), (1,)), "elements 1 to 6 of a storage of 6"),
    "stride beyond": (files.tensor(PLACE, 0, (2, 2), (3, 3)), "0 to 6 of a storage of 6"),
    "offset": (files.tensor(PLACE, -1, (1,), (1,)), "-1 as storage offset"),
    "offset huge": (files.tensor(PLACE, 2**63, (1,), (1,)), "as storage offset"),
    "extent": (files.tensor(PLACE, 0, (-1,), (1,)), "-1 as extent"),
    "extent beside none": (files.tensor(PLACE, 0, (0, -1), (1, 1)), "-1 as extent"),
    "stride": (files.tensor(PLACE, 0, (2,), (-1,)), "-1 as stride"),
    "stride huge": (files.tensor(PLACE, 0, (3,), (2**62,)), "a tensor of size"),
    "stride of one": (files.tensor(PLACE, 0, (1,), (2**62,)), "a tensor of stride"),
    "count": (files.tensor(PLACE, 0, (2**40, 2**40), (0, 0)), "a tensor of size"),
    "bytes": (files.tensor(PLACE, 0, (2**62,), (0,)), "elements of 4 bytes"),
    "lengths": (files.tensor(PLACE, 0, (1, 1), (1,)), "2 extents and 1 strides"),
    "dimensions": (files.tensor(PLACE, 0, (1,) * 65, (1,) * 65), "65 extents"),
    "bool extent": (
        call("torch._utils", "_rebuild_tensor", PLACE, number(0), items(TRUE), numbers((1,))),
        "True as extent",
    ),
    "float offset": (
        call("torch._utils", "_rebuild_tensor", PLACE, b"G" + b"\0" * 8, b")", b")"),
        "a float as storage offset",
    ),
    "size": (
        call("torch._utils", "_rebuild_tensor", PLACE, number(0), NONE, b")"), "size is None"
    ),
    "no storage": (files.tensor(NONE, 0, (), ()), "whose storage is None"),
    "arguments": (call("torch._utils", "_rebuild_tensor_v2", PLACE), "made of 1 arguments"),
    "gradient": (files.tensor(PLACE, 0, (1,), (1,), gradient=NONE), "None as requires_grad"),
    "gradient of integers": (
        files.tensor(files.storage("LongStorage", "0", 6), 0, (1,), (1,), gradient=TRUE),
        "a tensor of int64 that requires a gradient",
    ),
    "parameter of integers": (
        call("torch._utils", "_rebuild_parameter",
             files.tensor(files.storage("LongStorage", "0", 6), 0, (1,), (1,)), TRUE, ORDERED),
        "a tensor of int64 that requires a gradient",
    ),
    "metadata": (files.tensor(PLACE, 0, (1,), (1,), number(3)), "metadata is 3"),
    "quantized": (
        files.tensor(files.storage("QInt8Storage", "0", 6), 0, (1,), (1,)),
        "without scale and zero point",
    ),
    "type unknown": (files.storage("OddStorage", "0", 1), "type torch.OddStorage"),
    "type of others": (files.storage("FloatStorage", "0", 1, module="evil"), "evil.FloatStorage"),
    "numel": (files.storage("FloatStorage", "0", -1), "-1 as number of elements"),
    "numel huge": (files.storage("DoubleStorage", "0", 2**62), "of 4611686018427387904 elements"),
    "another numel": (PLACE + files.storage("FloatStorage", "0", 7) + b"\x86", "another type or"),
    "another type": (PLACE + files.storage("IntStorage", "0", 6) + b"\x86", "another type or"),
    "quantized and not": (
        files.storage("ByteStorage", "0", 6) + files.storage("QUInt8Storage", "0", 6) + b"\x86",
        "another type or",
    ),
    "pid of 6": (
        items(text("storage"), files.name("torch", "FloatStorage"), text("0"), text("cpu"),
              number(1), NONE) + b"Q",
        "a persistent id of 6 items",
    ),
    "pid of another kind": (items(text("module"), NONE, NONE, NONE, NONE) + b"Q", "5 items"),
    "pid text": (text("0") + b"Q", "a persistent id that is '0'"),
    "state of a dict": (pairs({}) + pairs({}) + b"b", "a state for a dict"),
    "state of a tensor": (PLACE.replace(b"Q", b"Q") + b"}b", "a state for a Storage"),
    "attribute": (
        call("collections", "OrderedDict") + pairs({"__class__": NONE}) + b"b",
        "cannot have an attribute '__class__'",
    ),
    "method": (
        call("collections", "OrderedDict") + pairs({"items": NONE}) + b"b", "attribute 'items'"
    ),
    "call of a tensor": (simple() + b")R", "a call of a Tensor"),
    "instance of a tensor": (simple() + b")\x81", "an instance of a Tensor"),
    "appends to a tensor": (simple() + b"Na", "appends to a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "why"), WRONG.values(), ids=WRONG)
def test_wrong(body: bytes, why: str) -> None:
    with pytest.raises(FormatError) as found:
        read(body)
    assert why in str(found.value) and str(found.value).startswith("m.pt: data.pkl: offset ")


@pytest.mark.parametrize("key", ["", "a/b", "..", "../a", ".", "a\\b", "a\0", "a\n", "k" * 300])
def test_keys_that_are_no_plain_name(key: str) -> None:
    with pytest.raises(FormatError, match="expected a plain name"):
        read(files.storage("FloatStorage", key, 1))


@pytest.mark.parametrize("key", ["0", "94412033", "7.storage", "weights_1", "k" * 255])
def test_keys_that_are(key: str) -> None:
    assert read(files.storage("FloatStorage", key, 1)).keys == [key]


# -- parameters and old tensors ------------------------------------------------------------------


def test_parameters_are_a_kind_of_their_tensor() -> None:
    body = {
        "p": parameter(simple("0")),
        "f": parameter(simple("1"), FALSE),
        "g": simple("2", gradient=TRUE),
        "t": simple("3"),
    }
    found = read(pairs(body))
    assert found.kinds == {0: "parameter", 1: "parameter,frozen", 2: "requires_grad"}
    assert found.names.tolist() == ["p", "f", "g", "t"]
    assert replay(found) == {"p": "T0", "f": "T1", "g": "T2", "t": "T3"}


def test_a_tensor_that_is_wanted_beside_its_parameter() -> None:
    inner = simple(gradient=TRUE) + b"q\x07"
    for body in (
        pairs({"p": parameter(inner), "t": b"h\x07"}),  # after
        pairs({"t": inner, "p": parameter(b"h\x07")}),  # before
        pairs({"p": parameter(inner), "q": parameter(b"h\x07")}),
    ):
        found, book = read(body), Book()
        assert found.kinds == {0: "requires_grad"} and set(found.structure.paths()) <= set("ptq")
        made = replay(found, book)
        asked = [args for what, func, args in book.asked if what == "call"]
        assert asked and all(args[:2] == ("T0", True) for args in asked)
        assert made["p"] == ("call", "torch._utils._rebuild_parameter", asked[0])


def test_hooks_and_state_are_asked_for() -> None:
    hooks = ORDERED + number(1) + NONE + b"s"
    stateful = call(
        "torch._utils", "_rebuild_parameter_with_state", simple("2"), TRUE, ORDERED,
        pairs({"extra": simple("3")}),
    )  # fmt: skip
    body = {"h": simple("0", hooks=hooks), "p": parameter(simple("1"), TRUE, hooks), "s": stateful}
    found, book = read(pairs(body)), Book()
    assert found.names.tolist() == ["h", "p", "s", "s.extra"] and found.kinds == {}
    made = replay(found, book)
    assert made["h"][1] == "torch._utils._rebuild_tensor_v2"
    assert made["h"][2][0] == ("storage", 0, BY_NAME["float32"].code)
    assert made["p"][2][0] == "T1" and made["p"][2][2] == OrderedDict({1: None})
    assert made["s"][2] == ("T2", True, OrderedDict(), {"extra": "T3"})


def test_tensors_and_variables_before_0_4() -> None:
    place = files.storage("FloatStorage", "0", 6)
    old = files.name("torch", "FloatTensor") + b")\x81q\x01"
    old += items(place, number(1), numbers((2,)), numbers((1,))) + b"b"
    variable = files.name("torch.autograd.variable", "Variable")
    wrapped = variable + items(simple("1")) + b"R" + items(TRUE, FALSE, ORDERED) + b"b"
    param = files.name("torch.nn.parameter", "Parameter") + b")\x81"
    param += items(simple("2"), NONE, ORDERED, FALSE, FALSE) + b"b"
    made = files.name("torch.nn.parameter", "Parameter") + items(simple("3"), TRUE) + b"R"
    body = pairs({"old": old, "again": b"h\x01", "v": wrapped, "p": param, "q": made})
    found, book = read(body), Book()
    assert found.kinds == {1: "requires_grad", 2: "parameter,frozen", 3: "parameter"}
    assert dict(found.structure.paths()) == {"old": 0, "again": 0, "v": 1, "p": 2, "q": 3}
    assert found.entries["offset"].tolist()[0] == 4
    expected = {"old": "T0", "again": "T0", "v": "T1", "p": "T2", "q": "T3"}
    assert replay(found, book) == expected and not book.asked


def test_names_of_python_2_and_old_modules() -> None:
    body = items(
        files.name("__builtin__", "long"), files.name("copy_reg", "_reduce_ex"),
        call("copy_reg", "_reconstructor", files.name("a", "B"),
             files.name("__builtin__", "object"), NONE),
        call("__builtin__", "set", b"](K\x01K\x02e"),
        files.name("torch.tensor", "Tensor"),
    )  # fmt: skip
    found, book = read(body), Book()
    made = replay(found, book)
    assert made[:2] == ("builtins.int", "copyreg._reduce_ex")
    assert made[2] == ("new", "a.B", (), {}) and made[3] == {1, 2}
    assert made[4] == "torch._tensor.Tensor"


# -- special tensors -----------------------------------------------------------------------------


def test_quantized_tensors_are_no_entries() -> None:
    place = files.storage("QUInt8Storage", "0", 3)
    scales = {"a": simple("1", (3,)), "b": simple("2", (3,))}
    scheme = files.name("torch", "per_channel_affine")
    parts = items(scheme, scales["a"], scales["b"], number(0))
    body = call(
        "torch._utils", "_rebuild_qtensor", place, number(0), numbers((3,)), numbers((1,)), parts,
        FALSE, ORDERED,
    )  # fmt: skip
    found = read(pairs({"w": body}))
    assert found.names.tolist() == ["w.scales", "w.zero_points"]
    assert found.storages["dtype"].tolist()[0] == BY_NAME["uint8"].code
    made = replay(found)["w"]
    assert made[1] == "torch._utils._rebuild_qtensor"
    assert made[2][0] == ("storage", 0, -2 - QUANTIZED.index("quint8"))
    assert made[2][4] == ("torch.per_channel_affine", "T0", "T1", 0)


def test_sparse_and_nested_tensors_show_what_they_are_made_of() -> None:
    def sparse(layout: str, *parts: bytes) -> bytes:
        kind = call("torch.serialization", "_get_layout", text(layout))
        return call("torch._utils", "_rebuild_sparse_tensor", kind, items(*parts))

    body = {
        "coo": sparse("torch.sparse_coo", simple("0"), simple("1"), numbers((2, 2))),
        "csr": sparse("torch.sparse_csr", simple("2"), simple("3"), simple("4"), b")"),
        "bsc": sparse("torch.sparse_bsc", simple("5"), simple("6"), simple("7"), b")"),
        "odd": sparse("torch.other", simple("8")),
        "n": call("torch._utils", "_rebuild_nested_tensor",
                  *[simple(str(9 + i)) for i in range(4)]),
    }  # fmt: skip
    found = read(pairs(body))
    assert found.names.tolist() == [
        "coo.indices", "coo.values", "csr.crow_indices", "csr.col_indices", "csr.values",
        "bsc.ccol_indices", "bsc.row_indices", "bsc.values", "odd.0",
        "n.buffer", "n.sizes", "n.strides", "n.storage_offsets",
    ]  # fmt: skip
    made = replay(found)
    assert made["coo"][2][1][:2] == ("T0", "T1") and made["n"][2] == ("T9", "T10", "T11", "T12")


def test_subclasses_are_shown_as_plain_and_asked_for_as_they_are() -> None:
    args = [files.storage("FloatStorage", "0", 6), number(0), numbers((6,)), numbers((1,))]
    body = call(
        "torch._tensor", "_rebuild_from_type_v2", files.name("torch._utils", "_rebuild_tensor_v2"),
        files.name("mine", "Sub"), items(*args, FALSE, ORDERED), pairs({"more": simple("1")}),
    )  # fmt: skip
    found = read(pairs({"w": body, "x": simple("2")}))
    assert found.names.tolist() == ["w.more", "w", "x"]
    made = replay(found)
    assert made["x"] == "T2" and made["w"][1] == "torch._tensor._rebuild_from_type_v2"
    func, cls, inner, state = made["w"][2]
    assert (func, cls, state) == ("torch._utils._rebuild_tensor_v2", "mine.Sub", {"more": "T0"})
    assert inner[0] == ("storage", 0, BY_NAME["float32"].code)


def test_a_storage_that_is_wanted_itself() -> None:
    place = files.storage("FloatStorage", "0", 6)
    kept = place + b"q\x05"
    body = items(
        place, files.tensor(kept, 0, (6,), (1,)), b"h\x05", files.tensor(b"h\x05", 1, (), ())
    )
    found = read(body)
    code = BY_NAME["float32"].code
    assert replay(found) == (("storage", 0, code), "T0", ("storage", 0, code), "T1")
    outline = found.structure.outline(lambda i: i)
    assert type(outline[0]) is Storage and outline[0].row == 0  # type: ignore[index]
    only = read(files.tensor(kept, 0, (6,), (1,)))
    assert replay(only) == "T0"


# -- other objects -------------------------------------------------------------------------------


def test_everything_else_is_asked_for_once_and_in_order() -> None:
    thing = files.name("a", "Thing") + items(number(1)) + b"\x81" + pairs({"k": NONE}) + b"b"
    made = call("b", "make", simple()) + b"(NNe" + text("key") + NONE + b"s"
    book = Book()
    found = read(items(thing, made))
    assert found.globals == ["a.Thing", "b.make", "collections.OrderedDict"]
    replay(found, book)
    assert [what[0] for what in book.asked] == [
        "find", "new", "build", "find", "call", "extend", "update",
    ]  # fmt: skip
    first, second = found.root
    assert type(first) is Record and first.args == (1,) and first.state == {"k": None}
    assert type(second.args[0]) is Tensor and second.items == [None, None]
    assert second.pairs == [("key", None)] and second.called


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (TypeError("no way"), TypeError, "m.pt: tensor 'a.w': no way"),
        (ValueError("no way"), FormatError, "m.pt: tensor 'a.w': no way"),
        (RuntimeError(), FormatError, "m.pt: tensor 'a.w': RuntimeError"),
        (FormatError("no way"), FormatError, "m.pt: tensor 'a.w': no way"),
        (UnsafeError("exactly this"), UnsafeError, "exactly this"),
        (ImportError("exactly this"), ImportError, "exactly this"),
    ],
)
def test_what_a_resolver_raises_names_the_tensor(
    error: Exception, kind: type[Exception], words: str
) -> None:
    body = pairs({"a": pairs({"w": call("torch._utils", "_rebuild_nested_tensor", simple())})})
    with pytest.raises(kind) as found:
        replay(read(body), Book(error))
    assert str(found.value) == words and type(found.value) is kind


def test_numbers_of_tensors_are_checked_when_the_object_is_made() -> None:
    found = read(items(simple("0"), simple("1")))
    with pytest.raises(FormatError, match="no tensor was given for entry 1"):
        found.structure.replay(["T0"], Storage, Book())


def test_long_integers_are_values_and_no_keys() -> None:
    value = -(2**200_000)
    long = pickle.dumps(value, 2)[2:-1]
    assert replay(read(pairs({"seen": long, "again": items(long)}))) == {
        "seen": value, "again": (value,),
    }  # fmt: skip
    with pytest.raises(FormatError, match="more than 1024 bytes as a key"):
        read(b"}" + long + NONE + b"s")
    with pytest.raises(FormatError, match="more than 1024 bytes as a key"):
        read(b"\x8f(" + items(NONE, items(long)) + b"\x90")
    with pytest.raises(FormatError, match="an integer of 1048577 bytes, more than 1048576"):
        read(b"\x8b\x01\x00\x10\x00" + bytes(1048577))
