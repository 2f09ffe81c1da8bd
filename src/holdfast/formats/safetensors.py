"""The native container: a valid safetensors file. ``docs/format.md`` says what stands in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import BY_NAME, DTYPES, DType
from ..errors import ChecksumError, FormatError
from ..layout import Index, Pieces, Plan, alignment_order, pack
from ..views import TensorBatch
from ._garbage import uncollected
from ._header import Fault, Header, emit, header_crc, scan, stamp
from ._header_text import read_error, short, write_error

__all__ = [
    "MAX_HEADER",
    "METADATA",
    "NEEDS_SIZE",
    "STRUCTURE",
    "header_size",
    "index",
    "parse",
    "plan",
    "seal",
    "sniff",
]

#: An object stands in it as a tree of JSON (:mod:`holdfast.tree`).
STRUCTURE = "tree"
METADATA = True
#: The header stands at the beginning.
NEEDS_SIZE = False

#: The most that the format allows for the JSON, padding included, in bytes.
MAX_HEADER = 100_000_000

_VERSION = 1
_KEY = "holdfast"
_CRC_KEY = "holdfast.crc32"

#: What the text of ``holdfast`` begins with, as the file has it, and where in it the digits are.
_OPENING = rb"{\"version\":1,\"crc32\":\""
_MARK = re.compile(rb'\{\\"version\\":([0-9]{1,9}),\\"crc32\\":\\"([0-9a-f]{8})\\"')

#: Names of adapters and what safetensors calls them under ``format``; others are called the same.
_FORMATS = {"torch": "pt", "numpy": "np", "jax": "flax"}
_FRAMEWORKS = {text: name for name, text in _FORMATS.items()}

#: By code: whether a type has no tag of its own, and how many bytes its elements take.
_TAGLESS = np.array([row.safetensors is None for row in DTYPES])
_PACKED = np.array([row.pack > 1 for row in DTYPES])
_U8 = BY_NAME["uint8"].code

_Bytes = bytes | bytearray | memoryview


# -- reading -------------------------------------------------------------------------------------


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is of this format, sound or not."""
    return prefix[8:].lstrip(b" \t\r\n")[:1] == b"{"


def header_size(prefix: bytes, size: int, name: str) -> int:
    """How many bytes from offset 0 on :func:`parse` needs.

    Parameters
    ----------
    prefix : bytes
        The first 8 bytes, or all where the file has less; more are ignored.
    size : int
        Of the file in bytes, or -1 where it is not known.
    name : str
        What messages call the file.

    Raises
    ------
    FormatError
    """
    if len(prefix) < 8:
        raise FormatError(
            f"{name}: expected the length of a safetensors header, 8 bytes at offset 0, "
            f"found a file of {len(prefix)} bytes"
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"{name}: expected a header of at most {MAX_HEADER} bytes, found a length of {length} "
            "at offset 0"
        )
    if 0 <= size < 8 + length:
        raise FormatError(
            f"{name}: the header needs {length} bytes at offset 8, file ends at {size}"
        )
    return 8 + length


def index(
    read: Callable[[int, int], bytes | memoryview], size: int, name: str, *, verify: bool = True
) -> Index:
    """Find the tensors of a file, of which ``read(offset, nbytes)`` returns the bytes.

    `size`, `name`, `verify` and what is raised: as :func:`parse` has them.
    """
    prefix = bytes(read(0, 8 if size < 0 else min(8, size)))
    return parse(read(0, header_size(prefix, size, name)), size, name, verify=verify)


def parse(head: _Bytes, size: int, name: str, *, verify: bool = True) -> Index:
    """Find the tensors that the header `head` describes.

    Parameters
    ----------
    head : bytes-like
        As many bytes as :func:`header_size` said. Kept by the result, and not to be changed.
    size : int
        Of the file in bytes, or -1 where it is not known: then nothing is said about how the
        tensors fit into it, and ``Index.end`` is where they end.
    name : str
        What messages call the file.
    verify : bool
        Whether a header that holdfast wrote has to be what it was then. Without, it only has to
        describe the tensors; where it is not what it was, tree, checksums and the types that
        safetensors lacks are given up.

    Raises
    ------
    FormatError
        ``ChecksumError`` where the header contradicts its own CRC-32.
    """
    if len(head) < 8 or len(head) != 8 + int.from_bytes(head[:8], "little"):
        expected = 8 + int.from_bytes(head[:8], "little")
        raise FormatError(f"{name}: expected {expected} bytes of header, found {len(head)}")
    try:
        header = scan(head)
    except Fault as fault:
        raise read_error(fault, head, name) from None
    end = len(head) + header.nbytes
    if 0 <= size != end:
        raise FormatError(f"{name}: the tensors end at offset {end}, the file at {size}")
    try:
        mark = _read_mark(header, head, name)
        crcs = _read_crcs(header, mark, name)
        types = _read_types(header, mark, name)
    except FormatError:
        if verify:
            raise
        mark, crcs, types = {}, None, {}
    for position, code in types.items():
        header.entries[position]["dtype"] = code
        header.entries[position]["ndim"] -= 1
    metadata = {key: text for key, text in header.metadata.items() if key not in (_KEY, _CRC_KEY)}
    framework = _FRAMEWORKS.get(metadata.get("format", ""))
    if mark and mark.get("format") != "user" and "format" in metadata:
        text = metadata.pop("format")
        framework = framework or text
    return Index(
        names=header.names,
        entries=header.entries,
        dims=header.dims,
        metadata=metadata,
        framework=framework,
        tree=mark.get("tree"),
        crcs=crcs,
        end=end,
        format="safetensors",
    )


def _near(text: str, key: str) -> bool:
    """Whether one flipped bit makes `key` of `text`."""
    if len(text) != len(key):
        return False
    flips = [ord(a) ^ ord(b) for a, b in zip(text, key, strict=True) if a != b]
    return len(flips) == 1 and flips[0].bit_count() == 1


def _check_unmarked(metadata: Mapping[str, str], name: str) -> None:
    """Refuse a header that holdfast wrote, and that lost the key which says so.

    One flipped bit can do that. The other key gives it away, and where there is none, what is left
    of the key and its value.
    """
    for key, text in metadata.items():
        lost = _near(key, _KEY) and text.startswith('{"version":')
        if lost or key == _CRC_KEY or _near(key, _CRC_KEY):
            raise FormatError(
                f"{name}: header damaged: metadata has the key {key!r}, but not {_KEY!r}; "
                "verify=False reads it anyway"
            )


def _read_mark(header: Header, head: _Bytes, name: str) -> dict[str, Any]:
    """What ``holdfast`` says, its CRC-32 found right; nothing where another wrote the file."""
    text = header.metadata.get(_KEY)
    if text is None:
        _check_unmarked(header.metadata, name)
        return {}
    hint = (
        "header damaged, or rewritten by a tool that copied the metadata; "
        "verify=False reads the tensors anyway"
    )
    match = _MARK.match(head, header.marker)
    if match is None:
        found = bytes(head[header.marker : header.marker + 48])
        raise FormatError(
            f"{name}: expected the version and the header's CRC-32 at offset {header.marker}, "
            f"found {found!r}: {hint}"
        )
    computed = header_crc(head, match.start(2))
    if match[2] != b"%08x" % computed:
        raise ChecksumError(
            f"{name}: expected the header's CRC-32 {match[2].decode()} (at offset "
            f"{match.start(2)}), found {computed:08x}: {hint}"
        )
    if int(match[1]) != _VERSION:
        raise FormatError(
            f"{name}: expected version {_VERSION}, found {int(match[1])}: a newer holdfast wrote "
            "this; verify=False reads the tensors anyway"
        )
    try:
        with uncollected():
            mark = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: metadata {_KEY!r} is not JSON: {error}") from None
    assert isinstance(mark, dict)  # it begins with a brace
    return mark


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_crcs(header: Header, mark: dict[str, Any], name: str) -> np.ndarray | None:
    """The CRC-32 of each tensor, in header order."""
    text, crcs = header.metadata.get(_CRC_KEY), header.numbers
    if not mark or (mark.get("checksum") is False and text is None):
        return None
    n = len(header.entries)
    if crcs is not None and len(crcs) == n and mark.get("checksum") is not False:
        return crcs
    length = 8 * len(crcs) if crcs is not None else len(text or "")
    found = "none" if text is None else f"{length} characters"
    raise FormatError(
        f"{name}: metadata {_CRC_KEY!r}: expected 8 lower-case hexadecimal digits for each of {n} "
        f"tensors, or none and checksum false; found {found}"
    )


def _read_types(header: Header, mark: dict[str, Any], name: str) -> dict[int, int]:
    """Code of each tensor whose type safetensors lacks, by position in header order."""
    types = mark.get("dtypes", {})
    if not isinstance(types, dict):
        raise FormatError(f"{name}: metadata {_KEY!r}: expected dtypes as an object")
    found: dict[int, int] = {}
    for key, text in types.items():
        position = int(key) if re.fullmatch("0|[1-9][0-9]{0,8}", key) else len(header.entries)
        row = BY_NAME.get(text) if isinstance(text, str) else None
        if row is None or not _is_bytes_of(header, position, row):
            raise FormatError(
                f"{name}: metadata {_KEY!r}: expected the position of a tensor of bytes and the "
                f"type that these are, found {short(key)}: {short(str(text))}"
            )
        found[position] = row.code
    return found


def _is_bytes_of(header: Header, position: int, row: DType) -> bool:
    """Whether the tensor at `position` may be the bytes of one of type `row`."""
    if position >= len(header.entries):
        return False
    entry = header.entries[position]
    ndim = int(entry["ndim"])
    if int(entry["dtype"]) != _U8 or ndim == 0:
        return False
    needed = row.safetensors is None or (row.pack > 1 and ndim == 1)
    return needed and int(header.dims[int(entry["dims"]) + ndim - 1]) == row.itemsize


# -- writing -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    """A header that lacks only the checksums."""

    head: bytearray
    mark_at: int  # where the digits of the header's own CRC-32 are
    crcs_at: int  # where those of the tensors' are, or -1


def plan(
    names: list[str],
    batch: TensorBatch,
    *,
    framework: str | None,
    metadata: Mapping[str, str] | None,
    structure: object | None,
    checksum: bool,
    stem: str = "",  # noqa: ARG001 - nothing in this format has the file's name
) -> Plan:
    """Decide where every byte of a new file stands.

    Parameters
    ----------
    names : list of str
        One for each row of `batch`; they stand in the header in this order.
    batch : TensorBatch
    framework : str or None
        Name of the adapter that described the tensors.
    metadata : mapping of str to str, optional
        What the user wants to keep in the file.
    structure : object, optional
        The tree that the tensors are the leaves of, as what ``json`` can write.
    checksum : bool
        Whether :func:`seal` will be given the CRC-32 of each tensor.

    Raises
    ------
    TypeError
        Names or metadata that are not str.
    ValueError
        Names twice, reserved or not Unicode; reserved metadata; a header beyond `MAX_HEADER`.
    """
    views = np.ascontiguousarray(batch.views)
    nbytes = np.ascontiguousarray(views["nbytes"])
    offsets = pack(nbytes, alignment_order(nbytes), 0)
    texts = _user_metadata(metadata)
    mark: dict[str, Any] = {"version": _VERSION, "crc32": "0" * 8}
    if not checksum:
        mark["checksum"] = False
    if "format" in texts:
        mark["format"] = "user"
    elif framework is not None:
        texts = {"format": _FORMATS.get(framework, framework), **texts}
    as_bytes = _TAGLESS[views["dtype"]] | (_PACKED[views["dtype"]] & (views["ndim"] == 0))
    if as_bytes.any():
        rows = np.flatnonzero(as_bytes).tolist()
        mark["dtypes"] = {str(i): DTYPES[views["dtype"][i]].name for i in rows}
    if structure is not None:
        mark["tree"] = structure
    texts[_KEY] = json.dumps(mark, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    if checksum:
        texts[_CRC_KEY] = "0" * (8 * len(names))
    head, value_at = _emit(names, batch, views, offsets, texts)
    at = dict(zip(texts, value_at, strict=True))
    return Plan(
        offsets=offsets + np.uint64(len(head)),
        size=len(head) + int(nbytes.sum()),
        state=_State(head, at[_KEY] + len(_OPENING), at.get(_CRC_KEY, -1)),
    )


def _user_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of `metadata`, checked."""
    texts = dict(metadata or {})
    for key, text in texts.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata has to be of str, found {key!r}: {text!r}")
        if key.startswith(_KEY):
            raise ValueError(f"metadata key {short(key)}: what begins with {_KEY!r} is reserved")
    return texts


def _emit(
    names: list[str],
    batch: TensorBatch,
    views: np.ndarray,
    offsets: np.ndarray,
    texts: Mapping[str, str],
) -> tuple[bytearray, list[int]]:
    """Write the header; the errors are the caller's."""
    pairs = [text for pair in texts.items() for text in pair]
    dims = np.ascontiguousarray(batch.dims, np.int64)
    try:
        head, value_at = emit(names, views.view(np.uint8), dims, offsets, pairs)
    except Fault as fault:
        raise write_error(fault) from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{short(error.object)}: a safetensors header is UTF-8, which cannot hold the lone "
            f"surrogate at index {error.start}"
        ) from None
    if len(head) - 8 > MAX_HEADER:
        raise ValueError(
            f"the header takes {len(head) - 8} bytes for {len(names)} tensors, the format allows "
            f"{MAX_HEADER}: save them in several files (shards)"
        )
    return head, value_at


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:
    """The whole header, to stand at offset 0.

    Parameters
    ----------
    plan : Plan
        What :func:`plan` returned.
    crcs : ndarray of uint32, shape (n,), or None
        CRC-32 of the bytes of each tensor in the file; None where the plan was made without.
    early : bool
        False: nothing of this format stands between the tensors.

    Returns
    -------
    Pieces
        Their bytes are the plan's own, not to be changed; sealing again writes over them.
    """
    state = plan.state
    assert isinstance(state, _State)
    assert not early, "nothing of this format stands between the tensors"
    if (crcs is not None) != (state.crcs_at >= 0):
        raise ValueError("checksums have to be given if, and only if, the plan was made for them")
    if crcs is not None:
        if len(crcs) != len(plan.offsets):
            raise ValueError(f"expected {len(plan.offsets)} checksums, found {len(crcs)}")
        stamp(state.head, state.crcs_at, np.ascontiguousarray(crcs, np.uint32))
    own = header_crc(state.head, state.mark_at)
    stamp(state.head, state.mark_at, np.array([own], np.uint32))
    return Pieces.one(state.head, 0)
