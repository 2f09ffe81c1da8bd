"""The one table of element types: every other module asks it, none keeps a second one.

A row says how one type is called by each party. Its position in :data:`DTYPES` is its
``code``, the number by which the column arrays of :mod:`holdfast.views` and
:mod:`holdfast.layout` and the C code speak of it; rows are only ever added at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_DLPACK", "BY_NAME", "BY_NUMPY", "BY_SAFETENSORS", "BY_TORCH", "DTYPES", "DType"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes
    ----------
    code : int
        Position in :data:`DTYPES`.
    name : str
        The name used in this library's messages and metadata (``"float32"``).
    bits : int
        Size of one element as a file counts them. Types of 4 and 6 bits are packed there.
    unit : int
        Size in bytes of the scalar that a byte order applies to and that alignment asks for:
        4 for ``complex64``, 1 for everything of a byte or less.
    safetensors : str or None
        Tag in a safetensors header; None where that format has none, and the bytes are stored.
    numpy : str or None
        Attribute of ``numpy``, or of ``ml_dtypes`` where ``ml_dtypes`` is set.
    torch : str or None
        Attribute of ``torch``.
    dlpack : tuple of int or None
        ``(type code, bits, lanes)`` of a DLPack ``DLDataType``.
    ml_dtypes : bool
        Whether the NumPy side comes from the ``ml_dtypes`` package.
    pack : int
        How many elements of a file one element in memory holds. 2 for ``float4_e2m1fn_x2``, whose
        in-memory shape counts bytes while a file's counts halves of them along the last axis.
    """

    code: int
    name: str
    bits: int
    unit: int
    safetensors: str | None
    numpy: str | None
    torch: str | None
    dlpack: tuple[int, int, int] | None
    ml_dtypes: bool = False
    pack: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory; 0 where no framework has such an element (6 bits)."""
        return self.bits * self.pack // 8

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a dense array of `shape`, its shape in memory."""
        count = self.pack
        for extent in shape:
            count *= extent
        return count * self.bits // 8


_Text = str | None
_Code = tuple[int, int, int] | None

# fmt: off
_ROWS: tuple[tuple[str, int, int, _Text, _Text, _Text, _Code, bool, int], ...] = (
    # name, bits, unit, safetensors, numpy, torch, DLPack (code, bits, lanes), ml_dtypes, pack
    ("bool", 8, 1, "BOOL", "bool_", "bool", (6, 8, 1), False, 1),
    ("uint8", 8, 1, "U8", "uint8", "uint8", (1, 8, 1), False, 1),
    ("int8", 8, 1, "I8", "int8", "int8", (0, 8, 1), False, 1),
    ("uint16", 16, 2, "U16", "uint16", "uint16", (1, 16, 1), False, 1),
    ("int16", 16, 2, "I16", "int16", "int16", (0, 16, 1), False, 1),
    ("uint32", 32, 4, "U32", "uint32", "uint32", (1, 32, 1), False, 1),
    ("int32", 32, 4, "I32", "int32", "int32", (0, 32, 1), False, 1),
    ("uint64", 64, 8, "U64", "uint64", "uint64", (1, 64, 1), False, 1),
    ("int64", 64, 8, "I64", "int64", "int64", (0, 64, 1), False, 1),
    ("float16", 16, 2, "F16", "float16", "float16", (2, 16, 1), False, 1),
    ("float32", 32, 4, "F32", "float32", "float32", (2, 32, 1), False, 1),
    ("float64", 64, 8, "F64", "float64", "float64", (2, 64, 1), False, 1),
    ("bfloat16", 16, 2, "BF16", "bfloat16", "bfloat16", (4, 16, 1), True, 1),
    ("complex64", 64, 4, "C64", "complex64", "complex64", (5, 64, 1), False, 1),
    ("complex128", 128, 8, None, "complex128", "complex128", (5, 128, 1), False, 1),
    ("float8_e4m3fn", 8, 1, "F8_E4M3", "float8_e4m3fn", "float8_e4m3fn", (10, 8, 1), True, 1),
    ("float8_e5m2", 8, 1, "F8_E5M2", "float8_e5m2", "float8_e5m2", (12, 8, 1), True, 1),
    ("float8_e8m0fnu", 8, 1, "F8_E8M0", "float8_e8m0fnu", "float8_e8m0fnu", (14, 8, 1), True, 1),
    ("float8_e4m3fnuz", 8, 1, "F8_E4M3FNUZ", "float8_e4m3fnuz", "float8_e4m3fnuz", (11, 8, 1), True, 1),  # noqa: E501
    ("float8_e5m2fnuz", 8, 1, "F8_E5M2FNUZ", "float8_e5m2fnuz", "float8_e5m2fnuz", (13, 8, 1), True, 1),  # noqa: E501
    ("float4_e2m1fn_x2", 4, 1, "F4", None, "float4_e2m1fn_x2", (17, 4, 2), False, 2),
    ("float6_e2m3fn", 6, 1, "F6_E2M3", None, None, None, False, 1),
    ("float6_e3m2fn", 6, 1, "F6_E3M2", None, None, None, False, 1),
    ("complex32", 32, 2, None, None, "complex32", (5, 32, 1), False, 1),
)
# fmt: on

DTYPES: tuple[DType, ...] = tuple(DType(code, *row) for code, row in enumerate(_ROWS))

BY_NAME: dict[str, DType] = {row.name: row for row in DTYPES}
BY_SAFETENSORS: dict[str, DType] = {row.safetensors: row for row in DTYPES if row.safetensors}
BY_NUMPY: dict[str, DType] = {row.numpy.rstrip("_"): row for row in DTYPES if row.numpy}
BY_TORCH: dict[str, DType] = {row.torch: row for row in DTYPES if row.torch}
BY_DLPACK: dict[tuple[int, int, int], DType] = {row.dlpack: row for row in DTYPES if row.dlpack}
