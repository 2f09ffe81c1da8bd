"""The texts beside variables of OneFlow: read in every way the form allows, else refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.dtypes import BY_NAME, DTYPES
from holdfast.errors import FormatError
from holdfast.formats._oneflow_meta import (
    BY_TEXT,
    DATA_TYPES,
    MAX_NDIM,
    MOST,
    NUMBERS,
    meta_text,
    parse,
    parse_all,
)
from patience import within

ERAS = Path(__file__).parents[1] / "golden" / "oneflow" / "eras"


def said(text: str) -> tuple[str, tuple[int, ...]]:
    dtype, shape = parse(text.encode(), "ckpt: tensor 'w'")
    return dtype.name, shape


def test_what_oneflow_wrote_is_read_and_written_the_same() -> None:
    texts = [path.read_bytes() for path in sorted(ERAS.glob("*/*/meta"))]
    assert len(texts) == 46
    for text in texts:
        dtype, shape = parse(text, "x")
        assert meta_text(shape, dtype.code) == text
    assert parse_all(texts, ["x"] * 46) == [parse(text, "x") for text in texts]


@pytest.mark.parametrize("row", DATA_TYPES, ids=lambda row: row.name)
def test_every_data_type_by_name_and_by_number(row: object) -> None:
    number, name, dtype = row.number, row.name, row.dtype  # type: ignore[attr-defined]
    assert BY_TEXT[name].number == number
    for value in (name, str(number), hex(number)):
        text = f"shape {{ dim: 2 }} data_type: {value}"
        if dtype is None:
            with pytest.raises(FormatError, match=f"data type {name}"):
                said(text)
        else:
            assert said(text) == (dtype.name, (2,))


def test_numbers_are_those_that_oneflow_writes() -> None:
    assert NUMBERS[BY_NAME["int8"].code] == 4  # kInt8, not kChar
    assert {DTYPES[code].name for code in NUMBERS} == {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128"),
    }
    for code in NUMBERS:
        assert parse(meta_text((3,), code), "x") == (DTYPES[code], (3,))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("shape {\n}\ndata_type: kFloat\n", ()),
        ("shape { dim: 0 } data_type: kFloat", (0,)),
        ("shape: { dim: 3 dim: 4 } data_type: kFloat", (3, 4)),
        ("shape < dim: 3 dim: 4 > data_type: kFloat", (3, 4)),
        ("shape: < dim: 3 > data_type: kFloat", (3,)),
        ("shape { dim: [3, 4] } data_type: kFloat", (3, 4)),
        ("shape { dim: [3] dim: 4 dim: [] } data_type: kFloat", (3, 4)),
        ("data_type: kFloat shape { dim: 3 }", (3,)),
        ("data_type: 2, shape { dim: 3; dim: 4, };", (3, 4)),
        ("shape{dim:0x40}data_type:0x2", (64,)),
        ("shape{dim:0X1f dim:010 dim:00}data_type:02", (31, 8, 0)),
        ("# of the model\nshape { # extents\n dim: 3 # rows\n}\ndata_type: kFloat # end", (3,)),
        ("\tshape\r\n{\r\ndim\v:\f3}data_type : kFloat", (3,)),
        ("shape { dim: 3 } stride { dim: 1 } data_type: kFloat", (3,)),
        ('shape { dim: 3 note { a: "}" b: -1.5e3 c < d: [x, y] > } } data_type: kFloat', (3,)),
        ("shape { dim: 9223372036854775807 } data_type: kFloat", (2**63 - 1,)),
        ("shape {\n  dim: 010\n}\ndata_type: kFloat\n", (8,)),
        ("shape {\n  dim: 0\n  dim: 10\n}\ndata_type: kFloat\n", (0, 10)),
    ],
)
def test_every_way_to_write_it(text: str, shape: tuple[int, ...]) -> None:
    assert said(text) == ("float32", shape)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected 'shape' in 'meta', found none"),
        ("data_type: kFloat", "expected 'shape'"),
        ("shape { dim: 3 }", "expected 'data_type'"),
        ("shape { } shape { } data_type: kFloat", "offset 10: a second 'shape'"),
        ("shape { } data_type: kFloat data_type: kFloat", "a second 'data_type'"),
        ("shape { dim: -1 } data_type: kFloat", "an extent of -1"),
        ("shape { dim: - 1 } data_type: kFloat", "an extent of -1"),
        ("shape { dim: 9223372036854775808 } data_type: kFloat", "an extent of 92233720368"),
        ("shape { dim: 3.0 } data_type: kFloat", "expected an integer, found '3.0'"),
        ("shape { dim: 08 } data_type: kFloat", "expected an integer, found '08'"),
        ("shape { dim: 1_0 } data_type: kFloat", "expected an integer"),
        ("shape { dim: kFloat } data_type: kFloat", "expected an integer, found 'kFloat'"),
        ("shape { dim: " + "9" * 5000 + " } data_type: kFloat", "expected an integer"),
        ("shape { dim 3 } data_type: kFloat", "expected ':'"),
        ("shape { dim: [3 4] } data_type: kFloat", "expected ',' or ']'"),
        ("shape { dim: [3, 4 } data_type: kFloat", "expected ',' or ']'"),
        ("shape { dim: 3 > data_type: kFloat", "expected the name of a field, found '>'"),
        ("shape [ ] data_type: kFloat", "expected '<', found '['"),
        ("shape { dim: 3 } data_type kFloat", "expected ':'"),
        ("shape { dim: 3 } data_type: kFloat128", "'kFloat128', not known"),
        ("shape { dim: 3 } data_type: kfloat", "'kfloat', not known"),
        ("shape { dim: 3 } data_type: 22", "of a number not known"),
        ("shape { dim: 3 } data_type: -2", "of a number not known"),
        ("shape { dim: 3 } data_type: kOFRecord", "no tensor can have"),
        ("shape { dim: 3 } data_type: kFloat is_dynamic: true", "'is_dynamic' is not known"),
        ("shape { dim: 3 } data_type: kFloat note", "expected a value for 'note'"),
        ("shape { dim: 3 } data_type: kFloat note {", "the text has no end"),
        ("shape { dim: 3 } data_type: kFloat note { >", "expected '}', found '>'"),
        ("shape { dim: 3 } data_type: kFloat note " + "{ a " * 40, "more than 32 levels"),
        ("shape { dim: 3 } data_type: kFloat } ", "expected the name of a field, found '}'"),
        ("shape { dim: 3 } data_type: kFloat [x.y] { }", "expected the name of a field"),
        ("shape { dim: 3 } data_type: kFloat \0", "found '\\x00'"),
        ("\ufeffshape { dim: 3 } data_type: kFloat", "expected a name"),
        ('shape { dim: 3 } data_type: kFloat n { a: "x }', "offset 42"),
        ("shape {\n" + "  dim: 1\n" * (MAX_NDIM + 1) + "}\ndata_type: kFloat\n", "more than 64"),
    ],
)
def test_anything_else_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormatError, match=re.escape(problem)) as caught:
        said(text)
    assert str(caught.value).startswith("ckpt: tensor 'w': ")
    assert len(str(caught.value)) < 200


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(FormatError, match="not UTF-8: found the byte 0xff at offset 2"):
        parse(b"# \xff\nshape { } data_type: kFloat", "x")


def test_too_long() -> None:
    text = b"shape { }\ndata_type: kFloat\n"
    assert parse(text + b" " * (MOST - len(text)), "x")[1] == ()
    with pytest.raises(FormatError, match=f"at most {MOST} bytes of 'meta', found {MOST + 1}"):
        parse(text + b" " * (MOST - len(text) + 1), "x")


@pytest.mark.parametrize(
    "bomb",
    ["#" * MOST, "#\n" * (MOST // 2), " " * MOST, "#" * (MOST - 1) + "@", "shape{" * (MOST // 6),
     "shape{dim:1 " * (MOST // 12), '"' * MOST, "0x" * (MOST // 2), "a{b:\"" + "\\\"" * 9],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_bombs_take_no_time(bomb: str) -> None:
    with within(5), pytest.raises(FormatError):
        said(bomb)
