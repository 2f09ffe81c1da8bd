"""What is wrong with a header, in words."""

from __future__ import annotations

from ..dtypes import DTYPES
from ..errors import FormatError
from ._header import Fault

__all__ = ["read_error", "short", "write_error"]

#: What a header has to have at a byte, where it has something else.
_EXPECTED = {
    "value": "a JSON value",
    "object": "an object",
    "array": "an array",
    "string": "a string",
    "integer": "an integer of 0 or more",
    "range": "an integer below 2**63",
    "colon": "':'",
    "separator": "',' or the closing bracket",
    "control": "no control character in a string",
    "escape": "an escape that JSON has",
    "surrogate": "both halves of a surrogate pair",
    "utf8": "UTF-8",
    "nesting": "at most 128 levels of nesting",
    "trailing": "nothing but white space after the object",
    "metadata": "'__metadata__' once",
    "metadata_key": "each key of '__metadata__' once",
    "repeated": "each key of a tensor once",
    "no_dtype": "an object with the key 'dtype'",
    "no_shape": "an object with the key 'shape'",
    "no_offsets": "an object with the key 'data_offsets'",
    "tag": "a known dtype",
    "ndim": "at most 64 dimensions",
    "pair": "data_offsets of two integers",
}


def short(name: str, limit: int = 100) -> str:
    """`name` in quotes, without its middle where it is long."""
    if len(name) > limit:
        name = name[: limit // 2] + "..." + name[-limit // 2 :]
    return repr(name)


def _tensor_text(fault: Fault) -> str:
    """What is wrong with the tensor that `fault` is about."""
    row = DTYPES[fault.type]
    kind = f"{row.safetensors} of shape {fault.shape}"
    span = f"its data_offsets [{fault.begin}, {fault.end}]"
    if fault.kind == "backward":
        return f"{span} end before they begin"
    if fault.kind == "overflow":
        return f"{kind} needs 2**64 bits or more"
    if fault.kind == "bits":
        return f"{kind} is not a whole number of bytes"
    if fault.kind == "odd":
        return f"{kind} has a last dimension that is not a multiple of {row.pack}"
    assert fault.kind == "span", fault.kind
    return f"{kind} needs {fault.expected} bytes, {span} span {fault.found}"


def read_error(fault: Fault, head: bytes | bytearray | memoryview, file: str) -> FormatError:
    """The exception for a header `head` of the file called `file`."""
    at = fault.position
    about = f"{file}: header"
    if fault.name is not None:
        part = "metadata" if fault.kind == "metadata_key" else "tensor"
        about = f"{file}: {part} {short(fault.name)}"
    if fault.kind == "end":
        text = f"expected more JSON at offset {at}, found the end of the header"
    elif fault.kind in _EXPECTED:
        found = bytes(head[at : at + 24])
        text = f"expected {_EXPECTED[fault.kind]} at offset {at}, found {found!r}"
    elif fault.kind == "duplicate":
        return FormatError(f"{about}: the name is there twice")
    elif fault.kind == "tiling":
        gap = fault.found - fault.expected
        what = f"{gap} bytes before it are nobody's" if gap > 0 else f"{-gap} bytes are another's"
        start = len(head)
        text = f"expected to begin at offset {start + fault.expected}, found "
        text += f"{start + fault.found}: {what}"
    else:
        text = f"{_tensor_text(fault)} (header, offset {at})"
    return FormatError(f"{about}: {text}")


def write_error(fault: Fault) -> ValueError:
    """The exception for tensors that no header can describe."""
    about = f"tensor {short(fault.name or '')}"
    if fault.kind == "duplicate":
        return ValueError(f"{about}: the name is there twice")
    if fault.kind == "metadata":
        return ValueError(f"{about}: the name is reserved by the format")
    if fault.kind == "overflow":
        return ValueError(f"{about}: its shape describes 2**64 bits or more")
    if fault.kind == "bits":
        return ValueError(f"{about}: its shape and type are not a whole number of bytes")
    return ValueError(f"{about}: its type, shape and size contradict each other")
