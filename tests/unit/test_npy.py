"""Headers of NumPy's arrays: read, refused, written; and files of a single array."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import numpy_files as files
from holdfast.errors import FormatError
from holdfast.formats import _npy_header, npy
from holdfast.formats._npy_literal import read_literal
from numpy_files import literal


def load(data: bytes, **options: Any) -> Any:
    return holdfast.load(io.BytesIO(data), **options)


def floats(n: int) -> bytes:
    return np.arange(n, dtype="<f4").tobytes()


# -- literals ------------------------------------------------------------------------------------

LITERALS = [
    "{}",
    " { } ",
    "{'a': 1}",
    "{'a': (), 'b': (1,), 'c': (1, 2), 'd': (1, 2,), 'e': [], 'f': [1,], 'g': ((1,), [2])}",
    "{'a': True, 'b': False, 'c': None}",
    "{\"a\": \"it's\", 'b': '\"', 'c': '\\''}",
    r"{'a': '\n\t\\\x41\101\u00e9\U0001f600\0'}",
    "{'a': (3), 'b': ((4))}",
    "{'a': [('x', '<f4'), (('t', 'n'), '|S3', (2,))]}",
    "{\n'a'\t:\r\n1\n,\n}\n",
    "{'é': 'ü'}",
    "{'a': 99999999999999999999}",
]


@pytest.mark.parametrize("text", LITERALS)
def test_a_literal_is_what_python_makes_of_it(text: str) -> None:
    assert read_literal(text, "x") == (ast.literal_eval(text.strip()), "")


def test_a_long_of_python_2() -> None:
    assert read_literal("{'shape': (3L, 4l)}", "x")[0] == {"shape": (3, 4)}


def test_a_comment_behind_it() -> None:
    assert read_literal("{'a': 1,} # hello  \n", "x") == ({"a": 1}, "hello")


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "}", "{'a'", "{'a':", "{'a': }", "{'a': 1", "{'a': 1,", "{'a': 1 'b': 2}",
        "{'a': 1}}", "{'a': 1} x", "{'a': 1}, 2", "{1: 2}", "{'a': 1, 'a': 2}", "{'a'}", "{'a', 1}",
        "{'a': -1}", "{'a': 1.5}", "{'a': 1e3}", "{'a': 0x1}", "{'a': 1_0}", "{'a': 1j}",
        "{'a': 1 2}", "{'a': [1 2]}", "{'a': (1, 2]}", "{'a': [,]}", "{'a': (,)}", "{'a': {}}",
        "{'a': b'x'}", "{'a': u'x'}", "{'a': 'x' 'y'}", "{'a': 'x}", "{'a': '\n'}", "{'a': '\\q'}",
        "{'a': '\\N{DIGIT ONE}'}", "{'a': '\\x4'}", "{'a': '\\U00110000'}", "{'a': f'x'}",
        "{'a': x}", "{'a': true}", "{'a': Truer}", "{'a': print()}", "{'a': __import__('os')}",
        "{'a': 1+1}", "{'a': 123456789012345678901}", "dict(a=1)", "[1]", "1", "{'a': 1} # x\ny",
        "{'a': " + "[" * 70 + "]" * 70 + "}", "{'a': " + "(" * 100_000, "#", "{'a': 1 # x\n}",
    ],
)  # fmt: skip
def test_what_is_no_literal(text: str) -> None:
    with pytest.raises(FormatError, match=r"^x\.npy: header: expected .* at character \d+, found"):
        read_literal(text, "x.npy")


# -- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "text",
    [
        literal() + " " * 30 + "\n",
        literal(),
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}",
        '{"descr": "<f4", "fortran_order": False, "shape": (2L, 3L)}',
        literal() + "  # made by hand",
    ],
)
def test_every_version_is_read(version: tuple[int, int], text: str) -> None:
    data = files.npy(text, floats(6), version)
    got = load(data)
    assert got.dtype == np.float32 and got.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_no_dimension_in_fortran_order() -> None:
    got = load(files.npy(literal(shape="()", order="True"), floats(1)))
    assert got.shape == () and got == 0


def test_fortran_order() -> None:
    got = load(files.npy(literal(order="True"), floats(6)))
    assert got.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert got.flags.f_contiguous and got.flags.writeable


def test_the_other_byte_order() -> None:
    got = load(files.npy(literal("'>f4'"), np.arange(6, dtype=">f4").tobytes()))
    assert got.dtype == np.dtype("=f4") and got.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("descr", ["f4", "=f4", "<f4", "|f4"])
def test_ways_to_say_the_machine_s_order(descr: str) -> None:
    got = load(files.npy(literal(f"'{descr}'"), floats(6)))
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]


HEADERS = {
    "no magic": (b"\x93NUMPX\1\0" + bytes(60), "not a checkpoint"),
    "version 0": (
        files.npy(literal(), version=(0, 0)), "expected version 1.0, 2.0 or 3.0, found 0.0"),
    "version 1.1": (files.npy(literal(), version=(1, 1)), "expected version .* found 1.1"),
    "version 4": (files.npy(literal(), version=(4, 0)), "expected version .* found 4.0"),
    "nothing behind the magic": (b"\x93NUMPY\1\0", "expected a .npy header of at least 12 bytes"),
    "length past the end": (files.npy(literal(), length=60000), "60010 bytes at 0|file ends at"),
    "length of 4 GiB": (
        files.npy(literal(), version=(2, 0), length=0xFFFFFFFF),
        "header: expected at most 1048576 bytes, found 4294967307",
    ),
    "no UTF-8": (
        files.npy(b"{'\xff': 1}", version=(3, 0)), "expected UTF-8, as its version 3.0 says"),
    "a key too few": (files.npy("{'descr': '<f4', 'shape': ()}"), "expected the keys"),
    "a key too many": (files.npy(literal()[:-1] + "'x': 1}"), "expected the keys .* 'x'"),
    "a key twice": (files.npy(literal()[:-1] + "'shape': ()}"), "each once"),
    "shape is an integer": (files.npy(literal(shape="(6)"), floats(6)), "expected a tuple"),
    "shape is a list": (files.npy(literal(shape="[6]"), floats(6)), "a tuple of integers as shape"),
    "shape of texts": (files.npy(literal(shape="('6',)"), floats(6)), "a tuple of integers"),
    "shape of booleans": (files.npy(literal(shape="(True,)"), floats(1)), "a tuple of integers"),
    "negative extent": (files.npy(literal(shape="(-6,)"), floats(6)), "an integer of 0 or more"),
    "extents of 2**64": (
        files.npy(literal(shape=f"({1 << 32}, {1 << 32})"), floats(6)), "2\\*\\*63 bytes or more"),
    "an extent of 2**64": (
        files.npy(literal(shape=f"({1 << 64},)"), floats(6)), "2\\*\\*63 bytes or more"),
    "extents that a 0 hides": (
        files.npy(literal(shape=f"(0, {1 << 62}, 9)")), "2\\*\\*63 bytes or more"),
    "65 dimensions": (files.npy(literal(shape="(" + "1," * 65 + ")")), "at most 64 dimensions"),
    "64 dimensions of dates": (
        files.npy(literal("'<M8[s]'", "(" + "1," * 64 + ")")), "at most 63 dimensions"),
    "order is an integer": (files.npy(literal(order="0"), floats(6)), "expected True or False"),
    "data cut off": (files.npy(literal(), floats(5)), "expected 24 bytes of elements .* found 20"),
    "data behind": (files.npy(literal(), floats(7)), "expected 24 bytes of elements .* found 28"),
    "no data": (files.npy(literal()), "expected 24 bytes of elements .* found 0"),
    "many elements of no bytes": (
        files.npy(literal("'|V0'", f"({1 << 40},)")),
        "at most 1048576 elements that have no bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "text"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    for mmap in (True, False):
        with pytest.raises(FormatError, match=text) as caught:
            holdfast.load(path, mmap=mmap)
        assert str(caught.value).startswith(f"{path}: ")
    assert not holdfast.verify(path).ok


DTYPES = {
    "objects": ("'|O'", "Python objects, kept as a pickle.*allow_pickle=True"),
    "objects of old": ("'|O8'", "Python objects, kept as a pickle"),
    "objects in a record": ("[('a', '<f4'), ('b', '|O')]", "Python objects, kept as a pickle"),
    "no text": ("4", "4 is no dtype"),
    "None": ("None", "None is no dtype"),
    "a name": ("'float32'", "'float32' is no dtype that is known here"),
    "several": ("'f4,f4'", "is no dtype that is known here"),
    "empty": ("''", "is no dtype that is known here"),
    "size": ("'<f3'", "is no dtype that is known here"),
    "an ml_dtypes type that numpy.save spoils": ("'<f1'", "is no dtype that is known here"),
    "a class": ("'<class'", "is no dtype that is known here"),
    "text too long": ("'|S9999999999'", "S9999999999"),
    "a tuple": ("('<f4', (2,))", "is no dtype"),
    "a field of one": ("[('a',)]", "is no field of a record"),
    "a field of four": ("[('a', '<f4', (1,), 2)]", "is no field of a record"),
    "a field that is a text": ("['<f4']", "is no field of a record"),
    "a field named by a number": ("[(1, '<f4')]", "is no name of a field"),
    "a title that is a number": ("[((1, 'a'), '<f4')]", "is no name of a field"),
    "a field twice": ("[('a', '<f4'), ('a', '<f4')]", "dtype"),
    "a sub-array of texts": ("[('a', '<f4', ('x',))]", "a sub-array of shape"),
    "a huge sub-array": (f"[('a', '<f4', ({1 << 40},))]", "dtype"),
    "records too deep": ("[('a', " * 20 + "'<f4'" + ")]" * 20, "nest too deep"),
}


@pytest.mark.parametrize(("descr", "text"), DTYPES.values(), ids=DTYPES)
def test_a_dtype_that_is_not_read(descr: str, text: str) -> None:
    with pytest.raises(FormatError, match=r"header: dtype .*" + text):
        load(files.npy(literal(descr), bytes(64)))


@pytest.mark.parametrize(
    ("descr", "hint", "text"),
    [
        ("'<f2'", "bfloat16", "<f2 cannot be bfloat16"),
        ("'|V4'", "bfloat16", "'|V4' cannot be 'bfloat16'"),
        ("'|S2'", "bfloat16", "cannot be 'bfloat16'"),
        ("'|V2'", "float6_e2m3fn", "cannot be"),
        ("'|V2'", "nonsense", "cannot be 'nonsense'"),
        ("'|V0'", "ml_dtypes.int4", "cannot be"),
        ("'|V1'", "ml_dtypes.__class__.x", "cannot be"),
        ("[('a', '|V2')]", "bfloat16", "a record cannot be bfloat16"),
    ],
)
def test_a_hint_that_cannot_be(descr: str, hint: str, text: str) -> None:
    with pytest.raises(FormatError, match="header: dtype .*" + text.replace("|", r"\|")):
        load(files.npy(literal(descr, "(2,)") + f" # holdfast: {hint}\n", bytes(8)))


def test_a_hint_of_a_type_that_ml_dtypes_lacks() -> None:
    pytest.importorskip("ml_dtypes")
    data = files.npy(literal("'|V2'", "(2,)") + " # holdfast: ml_dtypes.nothing\n", bytes(4))
    with pytest.raises(FormatError, match="not a type of ml_dtypes"):
        load(data)


def test_elements_of_no_bytes() -> None:
    for descr in ("|V0", "|S0", "<U0"):
        got = load(files.npy(literal(f"'{descr}'", "(3,)")))
        assert got.shape == (3,) and got.tobytes().strip(b"\0") == b""


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (0,), (2, 0, 3), (1 << 40, 0), (1,) * 64, (123456, 1, 1)]
)
@pytest.mark.parametrize("descr", ["<f4", "|u1", [("a", "<f4"), ("", "|V4")]])
def test_a_header_is_laid_out_as_numpy_does(shape: tuple[int, ...], descr: Any) -> None:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    assert _npy_header.emit(descr, shape) == out.getvalue()
    assert len(out.getvalue()) % 64 == 0


@pytest.mark.parametrize("name", ["a", "é", "ж", "x" * 70000])
def test_the_version_is_the_least_that_can(name: str) -> None:
    dtype = np.dtype([(name, "<f4")])
    head = _npy_header.emit(dtype.descr, (2,))
    version = (3, 0) if name == "ж" else (2, 0) if len(name) > 9 else (1, 0)
    assert tuple(head[6:8]) == version and len(head) % 64 == 0
    got = np.load(io.BytesIO(head + bytes(8)), max_header_size=1 << 20)
    assert got.dtype == dtype
    assert load(head + bytes(8)).dtype == dtype


# -- files ---------------------------------------------------------------------------------------


def test_a_single_array(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    array = np.arange(12.0).reshape(3, 4)
    holdfast.save(array, path)
    assert np.load(path).tolist() == array.tolist()
    assert np.load(path, mmap_mode="r").tolist() == array.tolist()
    got = holdfast.load(path)
    assert got.tolist() == array.tolist() and got.flags.writeable
    with holdfast.open(path) as f:
        assert list(f) == ["tensor"] and f["tensor"].tolist() == array.tolist()
        assert f.slice("tensor")[1, ::2].tolist() == [4, 6]
        assert (f.info("tensor").offset, f.tree().shape) == (128, (3, 4))
    target = {"tensor": np.zeros((3, 4), "f4")}
    holdfast.load_into(target, path)
    assert target["tensor"].tolist() == array.tolist()
    report = holdfast.verify(path)
    assert (report.ok, report.checked, report.unchecked) == (True, 0, 1)


def test_a_stream_behind_which_another_stands() -> None:
    out = io.BytesIO()
    holdfast.save(np.arange(3), out, format="npy")

    class Pipe(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            data = source.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)

    source = io.BytesIO(out.getvalue())
    assert holdfast.load(Pipe()).tolist() == [0, 1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        ({"a": np.zeros(2)}, r"\$: a dict; this format holds a single array: a \.npz file"),
        ([np.zeros(2)], r"\$: a list; this format holds a single array"),
        (3.0, r"\$: a float; this format holds a single array"),
        (np.float32(3), r"\$: a float32; this format holds a single array"),
    ],
)
def test_what_is_no_single_array(tmp_path: Path, obj: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        holdfast.save(obj, tmp_path / "x.npy")
    assert list(tmp_path.iterdir()) == []


def test_what_an_array_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object array"):
        holdfast.save(np.array([None, {}], object), tmp_path / "x.npy")
    with pytest.raises(ValueError, match="metadata have no place"):
        holdfast.save(np.zeros(2), tmp_path / "x.npy", metadata={"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_sniff() -> None:
    assert npy.sniff(b"\x93NUMPY\x01\x00", -1)
    assert not npy.sniff(b"\x93NUMP", -1)
