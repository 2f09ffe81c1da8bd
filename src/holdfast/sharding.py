"""Saving a checkpoint as several files with an index of which tensor is in which.

Every file but the index is written under a name that the checkpoint in the folder does not use, so
that the moment at which the index is replaced is the one at which the new checkpoint is there. What
only the old one used is removed after it. A journal says both before; a save that is stopped, or
the next one after it was killed, removes of what is in it all that no index names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fractions
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import formats, objects
from .collect import Collection, collect
from .errors import FormatError
from .folder import FolderSource
from .formats import shards
from .layout import Pieces, Plan
from .progress import reporting
from .publish import write_out
from .saving import SaveOptions
from .source import is_path
from .views import TensorBatch

__all__ = ["Content", "save_shards", "size_of", "target", "write_shards"]

_INDEX, _SINGLE = shards.INDEX, shards.SINGLE
#: What shards are called that were written here, or by Hugging Face's tools.
_OURS = re.compile(r"model(\.next\d*)?(-\d{5}-of-\d{5})?\.safetensors")
#: Which files a save is about to write and to remove, for the one after it if it is killed.
_JOURNAL = ".holdfast-shards"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def size_of(most: int | str) -> int:
    """Bytes of a size such as ``5_000_000_000``, ``"5GB"`` (of 1000) or ``"5GiB"`` (of 1024).

    Examples
    --------
    >>> size_of("5GB"), size_of("1.5 KiB"), size_of(7)
    (5000000000, 1536, 7)
    """
    if isinstance(most, bool) or not isinstance(most, int | str):
        raise TypeError(
            f"max_shard_size must be an int or a str such as '5GB', not {type(most).__name__}"
        )
    found = most
    if isinstance(most, str):
        match = _SIZE.fullmatch(most.strip())
        if match is None:
            raise ValueError(f"max_shard_size: expected a size such as '5GB', found {most!r}")
        number, unit, binary = match.groups()
        exact = fractions.Fraction(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()]
        found = int(exact)
    assert isinstance(found, int)
    if found < 1:
        raise ValueError(f"max_shard_size must be at least one byte, not {most!r}")
    return found


@dataclass(frozen=True, slots=True)
class Content:
    """What goes to several files.

    Attributes
    ----------
    found : Collection
    tree : object
        The object around the tensors, where it is more than a flat dict of them.
    release : ndarray of bool, optional
        Rows of the batch that are memory of unchanged maps, as
        :func:`holdfast.publish.write_out` has it.
    check : callable, optional
        Given the checksums of the tensors of one file, and which rows those are, raises where they
        are not what they should be; that file does not get its name then.
    """

    found: Collection
    tree: object
    release: np.ndarray | None = None
    check: Callable[[np.ndarray, slice], None] | None = None


def save_shards(obj: Any, f: object, options: SaveOptions, most: int) -> None:
    """Save an object to files of at most `most` bytes of tensors in the folder `f`.

    The folder is made where there is none; other files in it stay. What fits into one file is
    written as one, without an index.
    """
    folder = target(f, options)
    flat, blobs = objects.flatten(obj)
    found = collect(flat.names, flat.leaves)
    write_shards(Content(found, objects.tree_of(flat, blobs, found)), folder, options, most)


def target(f: object, options: SaveOptions) -> str:
    """Path of the folder that shards are to go to.

    Raises
    ------
    TypeError, ValueError
        `f` names none, or the options say that something else is to be written.
    """
    if not is_path(f):
        raise TypeError("max_shard_size= writes several files: give the path of a folder")
    if options.format not in (None, "safetensors"):
        raise ValueError(f"max_shard_size= writes safetensors files, not {options.format!r}")
    folder = os.fsdecode(f)  # type: ignore[arg-type]
    if formats.is_extension(os.path.splitext(folder)[1].lower()) and not os.path.isdir(folder):
        raise ValueError(f"{folder}: max_shard_size= writes several files: give a folder for them")
    return folder


def write_shards(content: Content, folder: str, options: SaveOptions, most: int) -> None:
    """Write files of at most `most` bytes of tensors, and the index where there are several."""
    groups = shards.split(content.found.batch.views["nbytes"].tolist(), most)
    made = _make_folder(folder)
    try:
        with _locked(folder):
            _replace(folder, groups, content, options)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def _replace(folder: str, groups: list[range], content: Content, options: SaveOptions) -> None:
    """Write the files of a checkpoint, and remove those that only the one before it used."""
    old, others = _settle(folder)
    names = [_SINGLE]
    if len(groups) > 1:
        names = shards.shard_names(len(groups), os.listdir(folder))
    own = {name for name in {_SINGLE, *old} - others if _OURS.fullmatch(name)}
    stale = sorted(own.difference(names))
    try:
        # The one file that needs no index is the checkpoint as soon as it has its name.
        passing = stale if len(groups) == 1 else [*names, *stale]
        if passing:
            text = "\n".join(passing).encode("utf-8", "surrogateescape")
            _write_text(os.path.join(folder, _JOURNAL), text, options.durable)
        if len(groups) == 1:
            _write(folder, _SINGLE, content, groups[0], options, None)
            _remove(folder, [_INDEX])
        else:
            _write_all(folder, names, groups, content, options)
        if options.durable:
            _flush(folder)  # before files go that the old index needs
        _remove(folder, stale)
        _remove(folder, [_JOURNAL])
    except BaseException:
        with contextlib.suppress(OSError, FormatError):  # else the next save does it
            _settle(folder)
        raise


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep other saves out of a folder.

    Raises
    ------
    BlockingIOError
        One is under way.
    """
    with _descriptor(folder) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = "Another save to this folder is under way"
            raise BlockingIOError(error.errno, text, folder) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise  # a file system without locks is none of these
        yield


def _make_folder(folder: str) -> bool:
    """Make a folder, if there is none; whether there was none."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            text = "Shards are written to a folder"
            raise NotADirectoryError(errno.ENOTDIR, text, folder) from None
        return False
    return True


def _used(source: FolderSource) -> tuple[set[str], set[str]]:
    """The files of the checkpoint that a folder holds, and of others that have an index in it."""
    indexes = [name for name in source.entries() if shards.is_index(name)]
    texts = source.read(indexes, most=shards.MOST)
    files = {
        name: shards.weight_files(text)
        for name, text in zip(indexes, texts, strict=True)
        if text is not None
    }
    old = files.pop(_INDEX, set())
    return old, set().union(*files.values())


def _settle(folder: str) -> tuple[set[str], set[str]]:
    """Bring a save to its end that has not come to it; what :func:`_used` returns.

    What it had said it would write is removed where its index is not there, and else what it had
    said it would remove.
    """
    with contextlib.closing(FolderSource(folder)) as source:
        source.links = True
        old, others = _used(source)
        said = source.read([_JOURNAL], most=shards.MOST)[0]
        there = source.entries()
    if said is None:
        return old, others
    names = set(said.decode("utf-8", "surrogateescape").split("\n")) - old - others
    if _INDEX not in there:
        names.discard(_SINGLE)  # which is then the checkpoint
    elif not old:
        names = set()  # a damaged index says nothing of what it needs
    _remove(folder, sorted(name for name in names if _OURS.fullmatch(name)))
    _remove(folder, [_JOURNAL])
    return old, others


def _write_all(
    folder: str,
    names: list[str],
    groups: list[range],
    content: Content,
    options: SaveOptions,
) -> None:
    """Write all shards, and then the index."""
    found = content.found
    weight_map = {
        found.names[row]: name for name, rows in zip(names, groups, strict=True) for row in rows
    }
    total = int(found.batch.views["nbytes"].sum())
    text = shards.index_text(
        weight_map, total, framework=found.framework, metadata=options.metadata, tree=content.tree
    )
    with reporting(options.progress, total) as report:
        done = 0
        for name, rows in zip(names, groups, strict=True):
            own = int(found.batch.views["nbytes"][rows.start : rows.stop].sum())
            _write(folder, name, content, rows, options, _behind(report, done, own))
            done += own
        _write_text(os.path.join(folder, _INDEX), text, options.durable)


def _write(
    folder: str,
    name: str,
    content: Content,
    rows: range,
    options: SaveOptions,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write some of the tensors as one file; where they are all, with what is said of all."""
    form = formats.for_saving("safetensors", "")
    found, check = content.found, content.check
    chosen = slice(rows.start, rows.stop)
    part = found.batch.take(chosen)
    whole = len(rows) == len(found.names)
    plan = form.plan(
        found.names[chosen],
        part,
        framework=found.framework,
        metadata=options.metadata if whole else None,
        structure=content.tree if whole else None,
        checksum=options.checksum,
        stem="",
    )
    write_out(
        os.path.join(folder, name),
        plan,
        part,
        form.seal,
        durable=options.durable,
        checksum=options.checksum,
        threads=options.threads,
        progress=options.progress if whole else progress,
        release=None if content.release is None else content.release[chosen],
        check=None if check is None else lambda crcs: check(crcs, chosen),
        staging=options.staging,
    )


def _write_text(path: str, text: bytes, durable: bool) -> None:
    """Replace a file by one with this content."""
    nothing = TensorBatch.of([])
    write_out(
        path,
        Plan(offsets=np.zeros(0, np.uint64), size=len(text)),
        nothing,
        lambda plan, crcs, early=False: Pieces.one(text, 0),  # noqa: ARG005
        durable=durable,
        checksum=False,
        threads=0,
        progress=None,
    )


def _behind(
    report: Callable[[int], object] | None, done: int, own: int
) -> Callable[[int, int], object] | None:
    """Progress of one shard of `own` bytes of tensors as part of that of all."""
    if report is None:
        return None
    return lambda more, _: report(done + min(more, own))


def _remove(folder: str, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


@contextlib.contextmanager
def _descriptor(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _flush(folder: str) -> None:
    """Have the names in a folder, and its own, on the device."""
    for path in (folder, os.path.dirname(os.path.abspath(folder))):
        with _descriptor(path) as fd:
            os.fsync(fd)
