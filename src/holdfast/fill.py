"""Filling tensors that exist already, so that a model is never in memory twice."""

from __future__ import annotations

import enum
import heapq
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _engine, adapters, fetch, objects
from .adapters import Adapter
from .booleans import BOOL, settle, settle_view
from .collect import by_adapter, join_kind, opaque
from .dequantize import dequantized, read_part
from .errors import ChecksumError
from .folder import open_origin
from .formats._gguf_types import DEQUANTIZED
from .handover import hand_over
from .layout import Index
from .overlaps import Place, entangled, place_of
from .reader import Reader
from .renaming import apply, renamed, rules_of
from .replaced import again
from .source import FileLike
from .straight import Group, fill_straight
from .views import TensorBatch, TensorView

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["IncompatibleKeys", "fill_from"]

#: A tensor whose dtype has to be converted passes through memory in parts of at most this.
PART = 8 << 20
#: Shapes of a scalar as PyTorch before 0.4 had it, and of what it fills.
_SCALAR = ((1,), ())


class IncompatibleKeys(NamedTuple):
    """What did not match between a target and a file, under the names that torch gives it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor to be filled."""

    name: str
    tensor: Any
    adapter: Adapter
    view: TensorView
    kind: str
    place: Place | None  # its bytes in memory, if it has any
    row: int = -1  # the entry of the file that fills it


class _Way(enum.Enum):
    """How a tensor is filled: from the file, through memory in parts, or through all of itself."""

    STRAIGHT = 0
    CONVERTED = 1
    COPIED = 2


@again
def fill_from(
    target: Any,
    f: FileLike,
    *,
    strict: bool,
    prefix: str,
    rename: Mapping[str, str] | None,
    dequantize: bool,
    threads: int,
    staging: Staging | None = None,
) -> IncompatibleKeys:
    """What :func:`holdfast.load_into` does."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
    rules = rules_of(rename)
    leaves = _leaves(target)
    with Reader(open_origin(f), guess=False) as reader:
        if dequantize:
            reader.described = dequantized(reader.index)
        stored = {
            name[len(prefix) :]: row
            for name, row in renamed(reader, rules).items()
            if name.startswith(prefix)
        }
        for name in reader.index.refused:
            new = apply(name, rules)
            if new.startswith(prefix) and (strict or new[len(prefix) :] in leaves):
                reader.check([name])
        for adapter in adapters.loaded():
            loader = adapter.own_loader(target, stored)
            # Of what does not say its types there are no tensors but those of the target.
            if loader is not None and reader.index.guess is None:
                given = hand_over(
                    loader,
                    adapter,
                    reader,
                    stored,
                    _twins(leaves, stored),
                    prefix,
                    rules,
                    strict=strict,
                    dequantize=dequantize,
                    threads=threads,
                )
                return IncompatibleKeys(*given)
        groups, barred = _described(leaves)
        if not barred and fill_straight(reader, groups, stored, threads):
            return IncompatibleKeys([], [])
        named = {target.name: target for group in groups for target in _targets(group)}
        matches = [
            replace(target, row=stored[name]) for name, target in named.items() if name in stored
        ]
        filled = {match.place for match in matches} - {None}
        keys = IncompatibleKeys(
            [name for name, target in named.items()
             if name not in stored and target.place not in filled]
            + [name for name in barred if name not in stored],
            [name for name in stored if name not in named and name not in barred],
        )  # fmt: skip
        wrong = [text for name, text in barred.items() if name in stored]
        _refuse(target, reader, matches, keys if strict else None, wrong)
        matches = _last(matches)
        if reader.index.guess is not None:
            said = {match.row: (match.view.dtype, match.view.shape) for match in matches}
            reader.index = reader.described = reader.index.guess.told(said)
        _fill(reader, matches, threads, staging)
    return keys


def _twins(leaves: dict[str, Any], stored: Mapping[str, int]) -> dict[str, str]:
    """Names of tensors that are not stored, and those under which the same ones are."""
    there = {id(tensor): name for name, tensor in leaves.items() if name in stored}
    return {
        name: there[id(tensor)]
        for name, tensor in leaves.items()
        if name not in stored and id(tensor) in there
    }


def _last(matches: list[_Target]) -> list[_Target]:
    """Of several tensors that are one memory the last one, which is the one that counts."""
    found: dict[object, _Target] = {}
    for match in matches:
        place = match.name if match.place is None else match.place
        found.pop(place, None)
        found[place] = match
    return list(found.values())


def _leaves(target: Any) -> dict[str, Any]:
    """The tensors of a module, or of any nesting that ``save`` takes, by name."""
    for adapter in adapters.loaded():
        named = adapter.named_tensors(target)
        if named is not None:
            return named
    if not isinstance(target, Mapping | list | tuple):
        raise TypeError(
            "target must be a module or a dict (or a nesting of them) of tensors, not "
            f"{type(target).__name__}"
        )
    flat, blobs = objects.flatten(target)
    pairs = zip(flat.names, flat.leaves, strict=True)
    return {name: leaf for name, leaf in pairs if id(leaf) not in blobs}


def _described(named: dict[str, Any]) -> tuple[list[Group], dict[str, str]]:
    """What is to be filled.

    Tensors that none of a file fits are apart, with what their framework says of them.
    """
    found: list[Group] = []
    barred: dict[str, str] = {}
    names, leaves = list(named), list(named.values())
    for adapter, rows in by_adapter(leaves).items():
        whys = [adapter.mismatch(leaves[row], names[row]) for row in rows]
        if any(why is not None for why in whys):
            told = zip(rows, whys, strict=True)
            barred.update((names[row], why) for row, why in told if why is not None)
            rows = [row for row in rows if names[row] not in barred]
        if not rows:
            continue
        some, members = [names[row] for row in rows], [leaves[row] for row in rows]
        found.append(Group(adapter, some, members, *adapter.describe(members, some)))
    return found, barred


def _targets(group: Group) -> Iterator[_Target]:
    """The tensors of a group, each by itself."""
    for i, (name, tensor) in enumerate(zip(group.names, group.members, strict=True)):
        kind = join_kind(group.adapter.name, group.kinds.get(i, ""))
        view = group.batch[i]
        target = _Target(name, tensor, group.adapter, view, kind, place_of(view))
        _check_writable(target)
        yield target


def _check_writable(target: _Target) -> None:
    """Raise ValueError for a tensor whose memory cannot be written to."""
    name, view = target.name, target.view
    if not target.adapter.writable(target.tensor):
        raise ValueError(f"target tensor {name!r} is read-only, so it cannot be filled")
    if view.strides and any(
        stride == 0 and extent > 1 for stride, extent in zip(view.strides, view.shape, strict=True)
    ):
        raise ValueError(
            f"target tensor {name!r} is expanded: several of its elements are one place in "
            "memory, so it cannot be filled"
        )


def _refuse(
    target: Any,
    reader: Reader,
    matches: list[_Target],
    keys: IncompatibleKeys | None,
    wrong: list[str],
) -> None:
    """Raise RuntimeError, in torch's words, before anything is written.

    `wrong` is what frameworks say of tensors that nothing in a file fits.
    """
    problems = []
    if keys is not None and keys.missing_keys:
        problems.append(f"Missing key(s) in state_dict: {_quoted(keys.missing_keys)}. ")
    if keys is not None and keys.unexpected_keys:
        problems.append(f"Unexpected key(s) in state_dict: {_quoted(keys.unexpected_keys)}. ")
    problems += wrong
    for match in matches:
        shape = reader.described.shape(match.row)
        if reader.index.guess is not None:
            found, needed = int(reader.index.entries["nbytes"][match.row]), match.view.nbytes
            if found != needed:
                problems.append(
                    f"size mismatch for {match.name}: {match.view.dtype.name} of shape "
                    f"{match.adapter.shape_text(match.view.shape)} in the current model needs "
                    f"{needed} bytes, the checkpoint has {found} and does not say of what type."
                )
        elif shape != match.view.shape and (shape, match.view.shape) != _SCALAR:
            problems.append(
                f"size mismatch for {match.name}: copying a param with shape "
                f"{match.adapter.shape_text(shape)} from checkpoint, the shape in current model is "
                f"{match.adapter.shape_text(match.view.shape)}.{_encoding(reader, match.row)}"
            )
        # Bytes of a dtype that the table lacks mean nothing as another one.
        kinds = (reader.kinds.get(match.row), match.kind)
        if opaque(kinds[0]) != opaque(kinds[1]):
            here, there = (opaque(kind) or match.view.dtype.name for kind in kinds)
            problems.append(
                f"dtype mismatch for {match.name}: {here} in the checkpoint, {there} in the "
                "current model."
            )
    if problems:
        raise RuntimeError(
            f"{reader.source.name}: Error(s) in loading state_dict for {type(target).__name__}:\n\t"
            + "\n\t".join(problems)
        )


def _encoding(reader: Reader, row: int) -> str:
    """What there is to say of a tensor that is read as blocks of quantized numbers."""
    text = reader.described.encodings.get(row)
    if text is None:
        return ""
    if text in DEQUANTIZED:
        return f" Those are blocks of {text}: dequantize=True makes float32 of them."
    return f" Those are blocks of {text}, which cannot be dequantized here."


def _quoted(names: list[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:50])
    return shown if len(names) <= 50 else f"{shown}, … ({len(names)} in all)"


def _fill(reader: Reader, matches: list[_Target], threads: int, staging: Staging | None) -> None:
    """Read what needs no conversion straight into place, in one pass; convert the rest."""
    index, source = reader.index, reader.source
    ways = {id(match): _way(match, reader) for match in matches}
    direct = [match for match in matches if ways[id(match)] is _Way.STRAIGHT]
    rest = [match for match in matches if ways[id(match)] is _Way.CONVERTED]
    apart = [match for match in matches if ways[id(match)] is _Way.COPIED]
    # What passes only once does so in the order of the file, and nothing of it at once.
    together = entangled([match.place for match in matches]) if source.repeatable else []
    turns = [matches[i] for i in together]
    waiting = set(map(id, turns))
    passes = _passes(index, [match for match in direct if id(match) not in waiting])
    if (rest or apart or len(passes) > 1) and not source.repeatable:
        name = (rest or apart or passes[1])[0].name
        raise io.UnsupportedOperation(
            f"{source.name}: cannot seek, which filling {name!r} needs: its dtype is not that in "
            "the file, or it is filled from the same bytes as another tensor"
        )
    _check_dtypes(reader, rest)
    # What is a view among others of checked bytes has no checksum of its own.
    rows = np.array([match.row for match in (*direct, *rest)], np.int64)
    shared = rows[~fetch.expected_crcs(index, rows)[0]]
    if len(shared) and fetch.checkable(index):
        fetch.verify_rows(source, index, shared, threads=threads)
    for members in passes:
        _read_into(reader, members, threads, staging)
    for match in [match for match in (*rest, *apart) if id(match) not in waiting] + turns:
        way = ways[id(match)]
        if way is _Way.STRAIGHT:
            _read_into(reader, [match], threads, staging)
        elif way is _Way.CONVERTED:
            _convert(reader, match, threads)
        else:
            _copy(reader, match)


def _way(match: _Target, reader: Reader) -> _Way:
    """How one tensor is to be filled."""
    index = reader.index
    if not fetch.partial(index, match.row):
        return _Way.COPIED
    if reader.described.encodings.get(match.row) != index.encodings.get(match.row):
        return _Way.CONVERTED  # blocks, to be dequantized
    straight = _reads_straight(match, index, reader.source.repeatable)
    return _Way.STRAIGHT if straight else _Way.CONVERTED


def _reads_straight(match: _Target, index: Index, repeatable: bool) -> bool:
    """Whether the bytes of the file are those of the tensor, and can be brought where it is."""
    view = match.view
    if view.owner is not match.tensor or view.dtype is not index.dtype(match.row):
        return False
    return not view.device or (repeatable and view.layout() is None)


def _passes(index: Index, matches: list[_Target]) -> list[list[_Target]]:
    """Matches in as few groups as can be, in each of which no byte of a file is read twice.

    One entry may fill several tensors, and entries may be views of the same bytes.
    """
    passes: list[list[_Target]] = [[]]
    ends = [(0, 0, 0)]  # in which file each pass ends and where, and which pass it is: a heap
    entries = index.entries[["file", "offset", "nbytes"]][[match.row for match in matches]]
    for i in np.lexsort((entries["offset"], entries["file"])).tolist():
        file, offset, nbytes = entries[i].tolist()
        *end, which = ends[0]
        if [file, offset] >= end:
            heapq.heapreplace(ends, (file, offset + nbytes, which))
        else:
            which = len(passes)
            passes.append([])
            heapq.heappush(ends, (file, offset + nbytes, which))
        passes[which].append(matches[i])
    return passes


def _copy(reader: Reader, match: _Target) -> None:
    """Fill one tensor whose elements do not stand in the file one after the other."""
    index, rows = reader.index, np.array([match.row], np.int64)
    batch = fetch.read_tensors(reader.source, index, rows, verify=fetch.checkable(index))
    settle(index, batch)
    made = objects.assembler(
        index,
        batch,
        rows,
        match.adapter,
        name=reader.source.name,
        forced=True,
        kinds=reader.kinds,
    )
    value = made.named({"": match.row})[""]
    if (index.shape(match.row), match.view.shape) == _SCALAR:
        value = value.reshape(())
    match.adapter.fill(match.tensor, value)


def _check_dtypes(reader: Reader, matches: list[_Target]) -> None:
    """Raise TypeError, before anything is written, for what cannot be made to be converted."""
    described = reader.described
    for adapter, dtype in {(match.adapter, described.dtype(match.row)) for match in matches}:
        empty = TensorView(dtype, (0,), 0, _engine.allocate(0))
        try:
            adapter.wrap(TensorBatch.of([empty]), {})
        except TypeError as error:
            raise TypeError(f"{reader.source.name}: {error}") from error


def _read_into(
    reader: Reader, matches: list[_Target], threads: int, staging: Staging | None
) -> None:
    """Read entries into the memory that their tensors have."""
    index = reader.index
    strided = [match for match in matches if match.view.layout() is not None]
    if strided and any(match.view.device for match in matches):
        # What goes to devices is dense and passes in parts; the engine scatters what does not.
        dense = [match for match in matches if match.view.layout() is None]
        _read_into(reader, dense, threads, staging)
        matches = strided
    rows = np.array([match.row for match in matches], np.int64)
    segments = fetch.segments_of(index, rows)
    layouts: list[_engine.Layout] = []
    for i, match in enumerate(matches):
        view = match.view
        segments["address"][i] = view.address if view.nbytes else 0
        layout = view.layout()
        if layout is not None:
            layouts.append((i, *layout))
    for adapter in {match.adapter for match in matches}:
        adapter.changing([match.tensor for match in matches if match.adapter is adapter])
    verify = fetch.checkable(index)
    devices = np.array([match.view.device for match in matches], np.int32)
    fetch.move(
        reader.source,
        segments,
        layouts=layouts,
        verify=verify,
        threads=threads,
        devices=devices if devices.any() else None,
        booleans=index.entries["dtype"][rows] == BOOL,
        staging=staging,
    )
    if verify:
        fetch.check(reader.source.name, index, rows, segments)
    for match in matches:
        settle_view(match.view)


def _convert(reader: Reader, match: _Target, threads: int) -> None:
    """Fill one tensor whose dtype is not that of the file, a part at a time."""
    index, source = reader.index, reader.source
    if reader.described.encodings.get(match.row) != index.encodings.get(match.row):
        size = reader.described.dtype(match.row).itemsize
        for where, first, shape in _parts(match.view.shape, size):
            floats = read_part(source, index, match.row, first, shape, threads=threads)
            match.adapter.fill(match.tensor[where], match.adapter.wrap(floats, {})[0])
        return  # the format that has blocks has no checksums
    crc = 0
    for where, first, shape in _parts(match.view.shape, index.dtype(match.row).itemsize):
        batch = fetch.read_part(source, index, match.row, first, shape)
        data = batch.owners[0]
        crc = _engine.crc32(memoryview(data)[: int(batch.views["nbytes"][0])], crc)  # type: ignore[arg-type]
        settle(index, batch)
        match.adapter.fill(match.tensor[where], match.adapter.wrap(batch, {})[0])
    has, expected = fetch.expected_crcs(index, np.array([match.row]))
    if has[0] and crc != int(expected[0]):
        raise ChecksumError(fetch.mismatch(source.name, index, match.row, crc))


def _parts(
    shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[tuple[Any, ...], int, tuple[int, ...]]]:
    """Parts of at most PART bytes, in C order: what to index with, first element and shape.

    Examples
    --------
    >>> list(_parts((2, 3), 4))
    [((Ellipsis,), 0, (2, 3))]
    >>> [(where[:2], first, shape) for where, first, shape in _parts((1, PART), 2)]
    [((0, slice(0, 4194304, None)), 0, (4194304,)), ((0, slice(4194304, 8388608, None)), 4194304, (4194304,))]
    """  # noqa: E501
    inner = math.prod(shape)  # elements under one index of the axis that is cut
    if inner * itemsize <= PART:
        yield (...,), 0, shape
        return
    axis = -1
    while inner * itemsize > PART:
        axis += 1
        inner //= shape[axis]
    step = PART // (inner * itemsize)
    for i, outer in enumerate(np.ndindex(shape[:axis])):
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            first = (i * shape[axis] + start) * inner
            yield (*outer, slice(start, stop), ...), first, (stop - start, *shape[axis + 1 :])
