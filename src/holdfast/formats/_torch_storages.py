"""Globals that torch.save writes for dtypes, as the opcode ``GLOBAL`` has them."""

from __future__ import annotations

from ..dtypes import BY_NAME, DTYPES
from ._torch_names import STORAGE_TYPES

__all__ = ["CLASSES", "DTYPE_GLOBALS", "FIXED_GLOBALS", "STORAGE_GLOBALS"]

#: Dtypes whose storages have a class of their own in a pickle. The others came after torch had
#: given these classes up: their storages are untyped bytes, and the tensor names its dtype.
_TYPED = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)

_NAMES = {code: name for name, code in STORAGE_TYPES.items()}
#: Code of the table -> class in the module ``torch``.
CLASSES = {BY_NAME[name].code: _NAMES[BY_NAME[name].code] for name in _TYPED}

#: By code of the table: these classes, or None.
STORAGE_GLOBALS = [
    f"torch\n{CLASSES[row.code]}\n".encode() if row.code in CLASSES else None for row in DTYPES
]
#: By code of the table: the dtypes; None for those that torch lacks.
DTYPE_GLOBALS = [f"torch\n{row.torch}\n".encode() if row.torch else None for row in DTYPES]

#: What else is written without being looked up; the emitter knows the order.
FIXED_GLOBALS = [
    b"torch._utils\n_rebuild_tensor_v2\n",
    b"torch._utils\n_rebuild_tensor_v3\n",
    b"torch._utils\n_rebuild_parameter\n",
    b"collections\nOrderedDict\n",
    b"torch.storage\nUntypedStorage\n",
    b"_codecs\nencode\n",
]
