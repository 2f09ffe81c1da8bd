"""The types of tensors that GGUF numbers: how many elements a block has, in how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..dtypes import BY_NAME
from ._gguf import TYPE

__all__ = ["BY_TYPE_NAME", "DEQUANTIZED", "REMOVED", "TABLE", "TYPES", "BlockType"]


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type.

    Attributes
    ----------
    id : int
        Its number in a file.
    name : str
        As GGUF calls it, such as ``"Q4_K"``.
    elements : int
        Of a block, which are adjacent along the last axis.
    nbytes : int
        Of a block.
    dtype : str or None
        Name in the dtype table; None for blocks that have to be dequantized to be used.
    """

    id: int
    name: str
    elements: int
    nbytes: int
    dtype: str | None = None


_ROWS: tuple[tuple[int, str, int, int, str | None], ...] = (
    (0, "F32", 1, 4, "float32"),
    (1, "F16", 1, 2, "float16"),
    (2, "Q4_0", 32, 18, None),
    (3, "Q4_1", 32, 20, None),
    (6, "Q5_0", 32, 22, None),
    (7, "Q5_1", 32, 24, None),
    (8, "Q8_0", 32, 34, None),
    (9, "Q8_1", 32, 36, None),
    (10, "Q2_K", 256, 84, None),
    (11, "Q3_K", 256, 110, None),
    (12, "Q4_K", 256, 144, None),
    (13, "Q5_K", 256, 176, None),
    (14, "Q6_K", 256, 210, None),
    (15, "Q8_K", 256, 292, None),
    (16, "IQ2_XXS", 256, 66, None),
    (17, "IQ2_XS", 256, 74, None),
    (18, "IQ3_XXS", 256, 98, None),
    (19, "IQ1_S", 256, 50, None),
    (20, "IQ4_NL", 32, 18, None),
    (21, "IQ3_S", 256, 110, None),
    (22, "IQ2_S", 256, 82, None),
    (23, "IQ4_XS", 256, 136, None),
    (24, "I8", 1, 1, "int8"),
    (25, "I16", 1, 2, "int16"),
    (26, "I32", 1, 4, "int32"),
    (27, "I64", 1, 8, "int64"),
    (28, "F64", 1, 8, "float64"),
    (29, "IQ1_M", 256, 56, None),
    (30, "BF16", 1, 2, "bfloat16"),
    (34, "TQ1_0", 256, 54, None),
    (35, "TQ2_0", 256, 66, None),
    (39, "MXFP4", 32, 17, None),
    (40, "NVFP4", 64, 36, None),
    (41, "Q1_0", 128, 18, None),
    (42, "Q2_0", 64, 18, None),
)

#: Number -> type.
TYPES: dict[int, BlockType] = {row[0]: BlockType(*row) for row in _ROWS}
BY_TYPE_NAME: dict[str, BlockType] = {row.name: row for row in TYPES.values()}

#: Numbers that GGUF had for layouts that nothing reads any more.
REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

#: Types whose blocks :func:`._gguf.dequantize` turns into numbers.
DEQUANTIZED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})


def _table() -> np.ndarray:
    table = np.zeros(max(TYPES) + 1, TYPE)
    for row in TYPES.values():
        code = BY_NAME[row.dtype or "uint8"].code
        table[row.id] = (row.elements, row.nbytes, code, row.dtype is None)
    return table


#: What the scanner has to know of them, by number.
TABLE = _table()
