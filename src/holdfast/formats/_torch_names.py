"""What torch.save calls things in a pickle: storage types, dtypes, ways to make a tensor."""

from __future__ import annotations

from ..dtypes import BY_NAME, BY_TORCH
from ..layout import QUANTIZED

__all__ = ["DTYPES_BY_NAME", "LEGACY_TENSORS", "REBUILD", "STORAGE_TYPES", "UNTYPED"]

#: Code of untyped bytes, among those of the dtype table.
UNTYPED = -1

_CLASSIC = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "ComplexHalf": "complex32",
    "UInt16": "uint16",
    "UInt32": "uint32",
    "UInt64": "uint64",
}

#: Name of a storage class, in whatever module of torch, -> code: of its dtype, or ``UNTYPED``, or
#: ``-2 - i`` for position i of ``layout.QUANTIZED``.
STORAGE_TYPES: dict[str, int] = {
    "UntypedStorage": UNTYPED,
    **{f"{name}Storage": BY_NAME[dtype].code for name, dtype in _CLASSIC.items()},
    **{
        f"{name.capitalize()}Storage": row.code
        for name, row in BY_TORCH.items()
        if name.startswith(("float8", "float4"))
    },
    **{
        f"{name}Storage": -2 - QUANTIZED.index(quantized)
        for name, quantized in {
            "QInt8": "qint8",
            "QUInt8": "quint8",
            "QInt32": "qint32",
            "QUInt4x2": "quint4x2",
            "QUInt2x4": "quint2x4",
        }.items()
    },
}

#: Attribute of torch -> code of the dtype.
DTYPES_BY_NAME: dict[str, int] = {name: row.code for name, row in BY_TORCH.items()}

#: Classes of tensors before 0.4, in torch and torch.cuda, and what came after them.
LEGACY_TENSORS = frozenset(
    {f"{name}Tensor" for name in _CLASSIC if "Complex" not in name and "UInt" not in name}
    | {"Tensor"}
)

#: The calls by which a tensor of a special kind is made of others: only asked for, never made here.
REBUILD = frozenset(
    {
        ("torch._utils", name)
        for name in (
            "_rebuild_qtensor",
            "_rebuild_sparse_tensor",
            "_rebuild_sparse_csr_tensor",
            "_rebuild_nested_tensor",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor",
            "_rebuild_xla_tensor",
            "_rebuild_mlc_tensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_wrapper_subclass",
            "_rebuild_parameter_with_state",
        )
    }
    | {
        ("torch._tensor", "_rebuild_from_type"),
        ("torch.nested._internal.nested_tensor", "_rebuild_njt"),
    }
)
