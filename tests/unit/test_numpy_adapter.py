"""What is NumPy's own: scalars, dtypes, byte orders, subclasses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import _engine
from holdfast.adapters.numpy import ADAPTER, decode_dtype, encode_dtype
from holdfast.dtypes import BY_NAME
from holdfast.views import DENSE, SWAPPED, VIEW, TensorBatch

CODECS = {codec.tag: codec for codec in ADAPTER.codecs}
SCALAR = CODECS["numpy.scalar"]


def describe(*arrays: Any) -> tuple[TensorBatch, dict[int, str]]:
    return ADAPTER.describe(list(arrays), [f"a{i}" for i in range(len(arrays))])


def batch_over(data: bytes, dtype: str, shape: tuple[int, ...]) -> TensorBatch:
    buffer = _engine.allocate(len(data))
    memoryview(buffer)[:] = data
    views = np.array([(buffer.address, len(data), 0, BY_NAME[dtype].code, len(shape), DENSE)], VIEW)
    return TensorBatch(views, np.array(shape, np.int64), [buffer])


# -- arrays


def test_foreign_byte_order_is_flagged_where_it_matters() -> None:
    batch, kinds = describe(
        np.arange(3, dtype=">f4"), np.arange(3, dtype="<f4"), np.arange(3, dtype=">i1"),
        np.arange(4, dtype=">c16")[::2],
    )  # fmt: skip
    assert [int(f) & SWAPPED for f in batch.views["flags"]] == [SWAPPED, 0, 0, SWAPPED]
    assert [int(f) & DENSE for f in batch.views["flags"]] == [DENSE, DENSE, DENSE, 0]
    assert [batch[i].dtype.name for i in (0, 3)] == ["float32", "complex128"]
    assert not kinds


def test_both_integers_of_eight_bytes_are_int64() -> None:
    batch, kinds = describe(*(np.zeros(1, np.dtype(letter)) for letter in "lqLQ"))
    assert [batch[i].dtype.name for i in range(4)] == ["int64", "int64", "uint64", "uint64"]
    assert not kinds


def test_harmless_subclasses_are_held_as_plain_arrays(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(2, 3))
    records = np.zeros(2, [("a", "i4")]).view(np.recarray)
    batch, kinds = describe(mapped, records)
    assert all(map(ADAPTER.is_tensor, (mapped, records)))
    assert batch[0].address == mapped.ctypes.data
    assert (batch[0].owner, batch[0].shape) == (mapped, (2, 3))
    assert list(kinds) == [1]
    (back,) = ADAPTER.wrap(batch_over(records.tobytes(), "uint8", (2, 4)), {0: kinds[1]})
    assert (type(back), back.dtype) == (np.ndarray, np.dtype([("a", "i4")]))


def test_an_array_of_no_dimensions_is_no_scalar() -> None:
    assert ADAPTER.is_tensor(np.array(1.5))
    assert not ADAPTER.is_tensor(np.float64(1.5))
    (back,) = ADAPTER.wrap(batch_over(np.float64(1.5).tobytes(), "float64", ()), {})
    assert (type(back), back.shape, back[()]) == (np.ndarray, (), 1.5)


def test_misaligned_memory_is_flagged_as_such() -> None:
    batch = batch_over(b"\0" * 12, "uint8", (12,))
    batch.views["address"] += np.uint64(1)
    batch.views["nbytes"] = 8
    batch.views["dtype"] = BY_NAME["float64"].code
    batch.dims[0] = 1
    (back,) = ADAPTER.wrap(batch, {})
    assert not back.flags.aligned
    assert back.flags.c_contiguous
    assert back.flags.writeable
    assert back[0] == 0.0


def test_shapes_that_do_not_fit_their_bytes_are_refused() -> None:
    batch = batch_over(b"\0" * 12, "float32", (4,))
    with pytest.raises(ValueError, match="12 bytes were given for an array of 16"):
        ADAPTER.wrap(batch, {})


def test_read_only_arrays_are_described_and_known() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    batch, _ = describe(array)
    assert batch[0].address == array.ctypes.data
    assert not ADAPTER.writable(array)
    with pytest.raises(ValueError, match="read-only"):
        ADAPTER.fill(array, np.zeros(3))


def test_variable_length_strings_are_refused() -> None:
    if not hasattr(np, "dtypes") or not hasattr(np.dtypes, "StringDType"):
        pytest.skip("this NumPy has none")
    with pytest.raises(TypeError, match=r"tensor 'a0'.*astype\('U'\)"):
        describe(np.array(["a"], np.dtypes.StringDType()))


def test_types_with_parameters_that_are_not_numpys_own_are_refused() -> None:
    """All of them have one type number, which is none: -1."""
    umath = getattr(np, "_core", np.core if np.__version__ < "2" else None)._multiarray_umath
    scaled = umath._get_sfloat_dtype()(1.0)  # which NumPy has for its own tests
    assert scaled.num == -1
    with pytest.raises(TypeError, match="tensor 'a0': dtype .*not one that can be saved"):
        describe(np.array([1.0, 2.0]).view(scaled))


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(TypeError, match="tensor 'a1': a list is not"):
        describe(np.zeros(1), [1])


def test_without_ml_dtypes_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"bfloat16.*pip install ml_dtypes"):
        ADAPTER.wrap(batch_over(b"\0" * 4, "bfloat16", (2,)), {})


def test_types_of_ml_dtypes_beyond_the_table() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[1, -2], [3, 4]], ml_dtypes.int4)[:, ::-1]
    batch, kinds = describe(array)
    assert kinds == {0: "dtype:ml_dtypes.int4"}
    view = batch[0]
    assert (view.dtype.name, view.shape, view.strides) == ("uint8", (2, 2, 1), (2, -1, 1))
    (back,) = ADAPTER.wrap(batch_over(array.tobytes(), "uint8", (2, 2, 1)), kinds)
    assert back.dtype == array.dtype
    assert (back == array).all()


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((8,), "dtype:<f16"),  # the last dimension is not the item size
        ((), "dtype:<M8[s]"),
        ((2, 8), "dtype:|O"),
        ((2, 8), "dtype:O"),
        ((2, 8), "dtype:"),
        ((2, 8), "dtype:float64"),
        ((2, 8), "dtype:f8,i4"),
        ((2, 8), 'dtype:{"names":["a"],"formats":["|O"],"offsets":[0],"itemsize":8}'),
        ((2, 8), 'dtype:{"names":["a"],"formats":["<i4"],"offsets":[-4],"itemsize":8}'),
        ((2, 8), 'dtype:{"names":["a"],"formats":["<i4"],"offsets":[6],"itemsize":8}'),
        ((2, 8), 'dtype:{"names":["a","a"],"formats":["<i4","<i4"],"offsets":[0,4],"itemsize":8}'),
        ((2, 8), 'dtype:{"names":[1],"formats":["<i4"],"offsets":[0],"itemsize":8}'),
        ((2, 8), 'dtype:{"names":["a"]}'),
        ((2, 8), 'dtype:{"a":["<i4",0]}'),
        ((2, 8), "dtype:{"),
        ((2, 8), "dtype:" + '{"formats":[' * 50_000),
        ((2, 8), "dtype:|V99999999999"),
        ((2, 8), "dtype:ml_dtypes.finfo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_kinds_are_refused(shape: tuple[int, ...], kind: str) -> None:
    batch = batch_over(b"\0" * int(np.prod(shape)), "uint8", shape)
    with pytest.raises(ValueError, match=r"."):
        ADAPTER.wrap(batch, {0: kind})


def test_a_kind_over_an_element_type_that_it_cannot_have() -> None:
    with pytest.raises(ValueError, match="cannot be stored as float32"):
        ADAPTER.wrap(batch_over(b"\0" * 32, "float32", (1, 8)), {0: "dtype:<M8[s]"})


def test_arrays_are_in_host_memory() -> None:
    array = np.zeros(1)
    assert ADAPTER.place(array, None) is array
    assert ADAPTER.place(array, "cpu") is array
    with pytest.raises(ValueError, match=r"cuda:0.*framework='torch'"):
        ADAPTER.place(array, "cuda:0")


# -- scalars and dtypes


def through(tag: str, value: Any) -> Any:
    codec = CODECS[tag]
    assert any(isinstance(value, kind) for kind in codec.types)
    return codec.decode(json.loads(json.dumps(codec.encode(value))))


SCALARS = [
    np.bool_(True), np.int8(-3), np.uint64(2**64 - 1), np.float16(-0.0), np.float32("nan"),
    np.float64("inf"), np.complex64(1 - 2j), np.complex128(complex("nan-0j")), np.longdouble("0.1"),
    np.clongdouble(1j), np.datetime64("2020-02-29T12", "ns"), np.datetime64("NaT", "s"),
    np.timedelta64(5, "25s"), np.timedelta64(7, "D"), np.str_("héllo\0"), np.str_(""),
    np.str_("\ud800"),
    np.bytes_(b"a\0b\0"), np.bytes_(b""), np.void(b"\1\2\3"),
    np.array([(1, 2.5)], [("a", "i1"), ("b", "<f8")])[0],
    np.frombuffer(b"\x01\x00\xc0\x7f", np.float32)[0],  # a NaN with a payload
]  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda s: f"{type(s).__name__} {s!r:.20}")
def test_scalars_come_back_bit_for_bit(scalar: Any) -> None:
    back = through("numpy.scalar", scalar)
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype
    assert back.tobytes() == scalar.tobytes()
    if isinstance(scalar, str | bytes):
        assert back == scalar


def test_scalars_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
        back = through("numpy.scalar", kind(1.0))
        assert type(back) is kind
        assert back == kind(1.0)


@pytest.mark.parametrize(
    "value",
    [
        None, [], "x", ["<f4"], ["<f4", 3], ["<f4", "00"], ["<f4", "0000 000"], ["<f4", "zz000000"],
        ["<f4", "00 00 00"], ["|O", "0" * 16], ["|b1", "02"], ["<U1", "ffffffff"], [None, ""],
        [["<f4", [1]], "0" * 8], [{}, ""], ["<f4", "00000000", 1], ["float32", "0" * 8],
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_scalars_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        SCALAR.decode(value)


def test_scalars_of_objects_are_refused() -> None:
    scalar = np.array([(1, None)], [("a", "i1"), ("b", object)])[0]
    with pytest.raises(TypeError, match="references to Python objects"):
        SCALAR.encode(scalar)


DTYPE_LIST = [
    *"?bBhHiIlLqQefdgFDGSUVMm", ">f8", ">U5", "S3", "V7", "M8[25s]", ">m8[D]", "S0",
    [("a", "i1"), ("b", ">f8", (2, 3))],
    [(("title", "a"), "i1")],
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    {"names": ["x", "y"], "formats": ["i4", "i2"], "offsets": [4, 0], "itemsize": 16},
    [("outer", [("inner", "S2"), ("more", [("deep", "M8[ns]")])])],
    ("f4", (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("spec", DTYPE_LIST, ids=str)
def test_dtypes_come_back(spec: Any) -> None:
    dtype = np.dtype(spec)
    back = through("numpy.dtype", dtype)
    assert back == dtype
    assert (back.str, back.itemsize, back.fields) == (dtype.str, dtype.itemsize, dtype.fields)
    assert back.isalignedstruct == dtype.isalignedstruct


def test_dtypes_of_ml_dtypes_come_back() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e5m2", "int4"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        assert encode_dtype(dtype) == f"ml_dtypes.{name}"
        assert decode_dtype(f"ml_dtypes.{name}") == dtype


def test_dtypes_of_objects_are_refused() -> None:
    for dtype in (np.dtype(object), np.dtype([("a", [("b", object)])])):
        with pytest.raises(TypeError, match="references to Python objects"):
            encode_dtype(dtype)


@pytest.mark.parametrize(
    "value",
    [
        "O", "|O", "|O8", "object", "f8,f8", "float64", "<f8\n", "", "<M8[ns",
        "<M8[0000000000000s]", "T", "numpy.object_", 3, None, ["<f4"], ["<f4", [-1]],
        ["<f4", [2**70]], ["<f4", "3"],
        ["<f4", [True]], {"formats": "<f4", "names": "a"}, {"names": ["a"], "formats": []},
        {"names": ["a"], "formats": ["<f4"], "offsets": [2**80]}, {"type": "O"},
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_dtypes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="dtype"):
        decode_dtype(value)


def test_dtypes_nested_without_end_are_refused() -> None:
    value: Any = "<f4"
    for _ in range(500):
        value = [value, [1]]
    with pytest.raises(ValueError, match="too deep"):
        decode_dtype(value)
