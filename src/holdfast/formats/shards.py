"""Checkpoints in several files with an index of which tensor is in which: Hugging Face's layout.

``docs/shards.md`` says what stands in the index, and what of it is ours.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import ChecksumError, FormatError
from ..layout import Folder, Index, Part
from ._header_text import short
from ._merge import merge, select

__all__ = [
    "INDEX",
    "LINKS",
    "MOST",
    "SINGLE",
    "checkpoints",
    "files_in",
    "index_folder",
    "index_shards",
    "index_text",
    "is_index",
    "shard_index",
    "shard_names",
    "sniff",
    "sniff_folder",
    "split",
    "weight_files",
]

#: The cache of Hugging Face's hub is folders of links.
LINKS = True

#: An index beyond this is none: a hundred bytes each for ten million tensors.
MOST = 1 << 28
#: What is written here.
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: What Hugging Face's tools call a checkpoint, in the order in which one of several is taken. Each
#: may have the name of a variant ("fp16") in it.
_NAMES = (
    INDEX,
    SINGLE,
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
_RANKS = {name: rank for rank, name in enumerate(_NAMES)}
#: Such a name: its stem, a variant (which stands in one of three places), and its ending.
_NAME = re.compile(
    r"(?P<stem>[a-z_]+)(?:\.(?P<single>[^.]+))?\.(?P<end>safetensors|bin)"
    r"(?:(?:\.(?P<old>[^.]+))?(?P<index>\.index)(?:\.(?P<new>[^.]+))?\.json)?"
)
_ISINDEX = re.compile(r".*\.index(\.[^.]+)?\.json", re.DOTALL)
_ISSHARD = re.compile(r".*-\d{5}-of-\d{5}(\.[^.]+)?\.[a-z]+", re.DOTALL)

_KEY = "holdfast"
_VERSION = 1
#: The digits of the checksum in an index, as we write it.
_MARK = re.compile(rb'"holdfast": \{"version": [0-9]{1,9}, "crc32": "([0-9a-f]{8})"')
_TRACE = re.compile(rb'\{"version": [0-9]{1,9}, "crc32": "[0-9a-f]{8}"')
#: In bytes, on every file system of Linux.
_LONGEST = 255
_PLAIN = re.compile(r"[^/\\\0:]+")


# -- reading -------------------------------------------------------------------------------------


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` is the index, sound or not."""
    text = prefix.lstrip(b" \t\r\n")
    return text[:1] == b"{" and b"\0" not in prefix[:8]


def is_index(name: str) -> bool:
    """Whether an index of shards could be called so."""
    return _ISINDEX.fullmatch(name) is not None


def files_in(folder: Folder) -> list[str]:
    """Names of the files in a folder."""
    return [name for name, kind in folder.entries().items() if kind in ("file", "link")]


def sniff_folder(folder: Folder) -> bool:
    """Whether a folder has such an index, or the one file that needs none."""
    return len(checkpoints(folder)) == 1


def _parsed(name: str) -> tuple[int, str] | None:
    """Where a name of Hugging Face's comes in the order, and its variant; None for another."""
    match = _NAME.fullmatch(name)
    if match is None or _ISSHARD.fullmatch(name):
        return None
    stem, end, *variants = match.group("stem", "end", "single", "old", "new")
    said = [variant for variant in variants if variant is not None]
    rank = _RANKS.get(f"{stem}.{end}" + (".index.json" if match["index"] else ""))
    if rank is None or len(said) > 1:
        return None
    return rank, "".join(said)


def checkpoints(folder: Folder) -> list[str]:
    """Names of what could be the checkpoint in a folder: indexes, and files with a known name.

    Of one variant in several formats one is here, of several variants each; but where there is
    one without a variant, that alone.
    """
    found = files_in(folder)
    known: dict[str, tuple[int, str]] = {}
    others = []
    for name in found:
        parsed = _parsed(name)
        if parsed is not None:
            rank, variant = parsed
            known[variant] = min((rank, name), known.get(variant, (rank, name)))
        elif is_index(name):
            others.append(name)
    if "" in known:
        return [known[""][1]]
    names = [name for _, name in known.values()] + others
    indexes = [name for name in names if is_index(name)]
    if not indexes or len(names) == 1:
        return sorted(names)
    texts = folder.read(indexes, most=MOST)
    shards = set().union(*(weight_files(text) for text in texts if text is not None))
    return sorted(name for name in names if name not in shards)


def index_folder(folder: Folder, *, verify: bool, strict: bool) -> Index:  # noqa: ARG001
    """Find the tensors of all shards.

    Raises
    ------
    FormatError
        The index or a shard is damaged, a shard or a tensor is missing, or stands in two.
    """
    start = getattr(folder, "start", "")
    name = start or checkpoints(folder)[0]
    if start or is_index(name):
        return index_shards(folder, name, verify)
    return merge(folder.name, [(name, shard_index(folder.part(name), verify), None)])


def index_shards(folder: Folder, start: str, verify: bool) -> Index:
    """Find the tensors of all shards that the index called `start` names."""
    name = f"{folder.name.rstrip('/')}/{start}"
    part = folder.part(start)  # opened once: another save may replace it at any time
    if part.size > MOST:
        raise FormatError(f"{name}: expected at most {MOST} bytes, found {part.size}")
    found = _Listing.parse(bytes(part.read(0, part.size)), name, verify=verify)
    return _gather(folder, found, verify)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What an index says."""

    name: str
    weight_map: Mapping[str, str]
    metadata: Mapping[str, str]
    mark: Mapping[str, Any]

    @classmethod
    def parse(cls, data: bytes, name: str, *, verify: bool) -> _Listing:
        """Read the text of an index."""
        try:
            listing = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{name}: the index of shards is not JSON: {error}") from None
        weights = listing.get("weight_map") if isinstance(listing, dict) else None
        if not isinstance(weights, dict):
            raise FormatError(f"{name}: expected an index of shards, with an object 'weight_map'")
        for tensor, file in weights.items():
            if not isinstance(file, str) or not _is_plain(file):
                raise FormatError(
                    f"{name}: tensor {short(tensor)}: expected the name of a file in the same "
                    f"folder, found {short(str(file))}"
                )
        metadata = listing.get("metadata", {})
        if not isinstance(metadata, dict):
            raise FormatError(f"{name}: expected 'metadata' as an object")
        mark = metadata.pop(_KEY, None)
        if verify:
            _check_mark(mark, data, name)
        framework = mark.get("framework") if isinstance(mark, dict) else None
        if not isinstance(framework, str | None):
            raise FormatError(f"{name}: expected the name of a framework, found {framework!r}")
        texts = {
            key: text if isinstance(text, str) else json.dumps(text)
            for key, text in metadata.items()
            if key != "total_size"
        }
        return cls(name, weights, texts, mark if isinstance(mark, dict) else {})


def _is_plain(file: str) -> bool:
    """Whether a text can be the name of a file in the same folder."""
    try:
        length = len(file.encode())
    except UnicodeEncodeError:
        return False
    return length <= _LONGEST and bool(_PLAIN.fullmatch(file)) and file not in (".", "..")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} stands in it twice")
    return found


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _check_mark(mark: object, data: bytes, name: str) -> None:
    """Raise where an index that was written here is not what it was."""
    match = _MARK.search(data)
    if mark is None:
        if _TRACE.search(data, 0, 4096):  # one flipped bit can lose the key
            raise FormatError(
                f"{name}: the index of shards is damaged: it has a checksum, but not {_KEY!r} in "
                "'metadata'; verify=False reads it anyway"
            )
        return
    if match is None or not isinstance(mark, dict):
        raise FormatError(f"{name}: the index of shards is damaged: no checksum in {_KEY!r}")
    computed = zlib.crc32(data[: match.start(1)] + b"0" * 8 + data[match.end(1) :])
    if match[1] != b"%08x" % computed:
        raise ChecksumError(
            f"{name}: expected the CRC-32 {match[1].decode()} of the index, found {computed:08x}: "
            "damaged, or changed by hand; verify=False reads it anyway"
        )
    if mark.get("version") != _VERSION:
        raise FormatError(
            f"{name}: expected version {_VERSION}, found {mark.get('version')!r}: a newer holdfast "
            "wrote this; verify=False reads the tensors anyway"
        )


def shard_index(part: Part, verify: bool) -> Index:
    """The index of one shard, of whichever format."""
    from . import PREFIX, Reading, of_folders, recognise

    form = recognise(part.peek(PREFIX), part.size, part.name)
    if of_folders(form):
        raise FormatError(f"{part.name}: expected a shard, found an index of shards")
    found = cast(Reading, form).index(part.read, part.size, part.name, verify=verify)
    if found.program is not None:
        raise FormatError(
            f"{part.name}: expected a file of tensors alone, found a program: give its path"
        )
    for reason in found.refused.values():  # what would be left out without a word
        raise FormatError(reason)
    return found


def _gather(folder: Folder, listing: _Listing, verify: bool) -> Index:
    """The tensors of all shards, in the order of the index."""
    files = dict.fromkeys(listing.weight_map.values())
    wanted: dict[str, list[str]] = {file: [] for file in files}
    for tensor, file in listing.weight_map.items():
        wanted[file].append(tensor)
    shards = []
    for file, tensors in wanted.items():
        part = folder.part(file)
        shard = shard_index(part, verify)
        chosen, rest = select(shard, tensors, part.name)
        folder.notes += _check_rest(rest, listing, file, part.name)
        shards.append((file, shard, (tensors, chosen)))
    merged = merge(folder.name, shards, order=list(listing.weight_map))
    merged.metadata = {**merged.metadata, **listing.metadata}
    tree = listing.mark.get("tree")
    if tree is not None:
        merged.tree = tree
        merged.framework = cast("str | None", listing.mark.get("framework"))
    return merged


def _check_rest(rest: Sequence[str], listing: _Listing, file: str, name: str) -> list[str]:
    """What to say about tensors of a shard that the index does not say are in it."""
    twice = [tensor for tensor in rest if tensor in listing.weight_map]
    if twice:
        raise FormatError(
            f"{name}: tensor {short(twice[0])} stands in it, but the index says it is in "
            f"{listing.weight_map[twice[0]]!r}: files of two checkpoints"
        )
    if not rest:
        return []
    return [
        f"{name}: {len(rest)} tensors, {short(rest[0])} the first, are not in the index and are "
        f"left out (shard {file!r})"
    ]


# -- writing -------------------------------------------------------------------------------------


def split(nbytes: Sequence[int], most: int) -> list[range]:
    """Runs of tensors, each of at most `most` bytes; a larger one stands alone.

    Examples
    --------
    >>> split([4, 4, 4, 20, 1], 8)
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    found, begin, total = [], 0, 0
    for i, size in enumerate(nbytes):
        if i > begin and total + size > most:
            found.append(range(begin, i))
            begin, total = i, 0
        total += size
    if begin < len(nbytes) or not found:
        found.append(range(begin, len(nbytes)))
    return found


def shard_names(count: int, taken: Sequence[str]) -> list[str]:
    """What `count` shards are called, by names of which none is taken.

    The usual ones; where a checkpoint is replaced that has them, others, so that no moment is
    without a complete one.
    """
    there = set(taken)
    for base in ("model", "model.next", *(f"model.next{i}" for i in range(2, 1000))):
        names = [f"{base}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [f"{base}.safetensors"]
        if there.isdisjoint(names):
            return names
    raise FileExistsError("a thousand sets of shards are there already")


def index_text(
    weight_map: Mapping[str, str],
    total: int,
    *,
    framework: str | None,
    metadata: Mapping[str, str] | None,
    tree: object,
) -> bytes:
    """The text of the index of a checkpoint, with its own checksum."""
    mark: dict[str, Any] = {"version": _VERSION, "crc32": "0" * 8}
    if tree is not None:
        mark |= {"framework": framework, "tree": tree}
    texts = dict(metadata or {})
    for key in texts:
        if key in (_KEY, "total_size"):
            raise ValueError(f"metadata key {short(key)} is reserved")
    listing = {"metadata": {"total_size": total, **texts}, "weight_map": dict(weight_map)}
    text = json.dumps(listing, indent=2, allow_nan=False)
    own = json.dumps(mark, allow_nan=False)
    opening = '{\n  "metadata": {'
    assert text.startswith(opening)
    data = f'{opening}\n    "{_KEY}": {own},{text[len(opening) :]}\n'.encode()
    match = _MARK.search(data)
    assert match is not None
    crc = b"%08x" % zlib.crc32(data)
    return data[: match.start(1)] + crc + data[match.end(1) :]


def weight_files(data: bytes) -> set[str]:
    """The shards that an index names; none where it is not one."""
    try:
        return set(_Listing.parse(data, "", verify=False).weight_map.values())
    except FormatError:
        return set()
