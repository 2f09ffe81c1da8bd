"""save, load, open, load_into, verify: the pipeline of tensors to and from files.

    save   object ─flatten─▶ leaves ─describe─▶ batch ─plan─▶ layout ─write, seal, publish─▶ file
    load   file ─recognise, index─▶ entries ─map | read─▶ batch ─wrap─▶ tensors ─rebuild─▶ object

There is no branch here on a framework or on a format; each step asks one of their tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from . import adapters, fetch, formats, objects
from .checkpoint import Checkpoint, Reader, open_checkpoint
from .collect import collect
from .fill import IncompatibleKeys, fill_from
from .progress import ProgressArgument, reporting
from .publish import check_target, write_out
from .source import FileLike, is_path, open_source
from .verification import Report, verify_file

__all__ = ["load", "load_into", "open", "save", "verify"]

#: More threads than any machine has a use for; the engine's own limit may be lower.
_MAX_THREADS = 1 << 16


def save(
    obj: Any,
    f: FileLike,
    *,
    format: str | None = None,
    durable: bool = True,
    checksum: bool = True,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: ProgressArgument = None,
) -> None:
    """Save an object with tensors in it.

    A file of that name is replaced whole or not at all: whatever happens meanwhile, a crash or
    a power cut included, the name stands for the old content or for the new one.

    Parameters
    ----------
    obj : object
        Any nesting of dict, OrderedDict, list, tuple, set and frozenset with tensors (NumPy
        arrays, torch tensors and parameters), NumPy scalars, str, bytes, numbers, None and the
        like as leaves: a state dict, a training checkpoint. Tensors may be strided, expanded or of
        a foreign byte order; only the elements that they show are written, in C order. Tensors that
        are one memory are stored once.
    f : str, bytes, os.PathLike or binary file object
        Where to. A symbolic link is followed. A file object is written from its position on, in
        order; of the promises about replacing and durability none holds for it.
    format : str, optional
        ``"safetensors"``. By default that which the extension of the path means.
    durable : bool
        Whether to return only when the data are on the device (fsync of the file and of its
        directory). False leaves that to the system; replacing stays atomic.
    checksum : bool
        Whether to store a CRC-32 of each tensor, for ``load`` and ``verify`` to check.
    metadata : mapping of str to str, optional
        Whatever should stand in the header besides.
    threads : int, optional
        How many threads write. By default what measured fastest.
    progress : bool or callable, optional
        True for a progress bar (needs tqdm), or a callable ``(bytes_done, bytes_total)``.

    Raises
    ------
    TypeError
        Something in `obj` cannot be held; the message has its path and says which way works.
        Nothing has been written.
    ValueError
        `obj` contains itself, or the header would be too large and the tensors should be sharded.
    OSError
        Of the system; the file of that name is what it was.

    Notes
    -----
    No copy of the tensors is made: beside them, a save takes at most 64 MiB of memory. (Only of
    torch tensors whose conjugation or negation is still to be done, a copy is.) Tensors must not
    change while they are being saved: what is written may then not match its checksum.

    Examples
    --------
    >>> import numpy, tempfile, holdfast
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> holdfast.save({"model": {"w": numpy.eye(2)}, "epoch": 3}, path)
    >>> holdfast.load(path)["epoch"]
    3
    """
    check_target(f)
    workers = _threads(threads)
    extension = os.path.splitext(os.fsdecode(f))[1].lower() if is_path(f) else ""  # type: ignore[arg-type]
    form = formats.for_saving(format, extension)
    flat, blobs = objects.flatten(obj)
    found = collect(flat.names, flat.leaves)
    plan = form.plan(
        found.names,
        found.batch,
        framework=found.framework,
        metadata=metadata,
        tree=objects.tree_of(flat, blobs, found),
        checksum=checksum,
    )
    write_out(
        f,
        plan,
        found.batch,
        form.seal,
        durable=durable,
        checksum=checksum,
        threads=workers,
        progress=progress,
    )


def load(
    f: FileLike,
    map_location: Any = None,
    *,
    weights_only: bool = True,
    mmap: bool | None = None,
    framework: str | None = None,
    keys: str | Iterable[str] | None = None,
    verify: bool | None = None,
    threads: int | None = None,
    progress: ProgressArgument = None,
) -> Any:
    """Load what :func:`save` saved, or any safetensors file.

    Parameters
    ----------
    f : str, bytes, os.PathLike or binary file object
        What it is is told from its content, never from its name. A file object is read from its
        position on.
    map_location : optional
        As for ``torch.load``: a device, a dict of devices, or a callable ``(tensor, "cpu")``. None
        leaves tensors where they are read: in the memory of the host.
    weights_only : bool
        Code is never run from a file. False would allow it in formats that can hold code; none of
        those that are read here can, so both values read alike.
    mmap : bool, optional
        True maps the file: tensors are views of it, writable and private to the process, and cost
        no read until they are touched. Many processes that map one file share one copy of it. False
        reads into memory, with several threads. None maps on a local file system, and reads on a
        network one and from file objects.
    framework : {"numpy", "torch"}, optional
        What the tensors come back as. By default the framework that saved the file; where the file
        does not say, the first of torch and NumPy that is imported already; NumPy where
        that framework is not installed.
    keys : str or iterable of str, optional
        Names of tensors, or glob patterns (``"encoder.*"``). Only these are read, and they come
        back as a flat dict.
    verify : bool, optional
        Whether to check the checksums. None checks them when tensors are read (they are computed
        as the bytes go by) and not when they are mapped, which would read the whole file. The
        header's own checksum is checked unless this is False.
    threads : int, optional
        How many threads read. By default what measured fastest.
    progress : bool or callable, optional
        As for :func:`save`.

    Returns
    -------
    object
        What was saved; of a file that another program wrote, a dict of name to tensor. Each
        tensor keeps alive the memory it needs.

    Raises
    ------
    FormatError
        The bytes are not those of a sound file; ChecksumError where it is a checksum. The
        message names the tensor.
    FileNotFoundError, IsADirectoryError, PermissionError, OSError
        Of the system.
    KeyError
        A name or pattern in `keys` fits nothing.

    Warnings
    --------
    While a file is mapped, do not change it in place: processes that map it see the change, or get
    SIGBUS where it was cut. :func:`save` does not: it replaces the file, and maps keep the old one.
    """
    del weights_only  # a promise to formats that can hold code; none of these can
    workers = _threads(threads)
    if framework is not None:
        adapters.by_name(framework)  # so that a bad name is told before a bad file
    with Reader(open_source(f), verify=verify is not False) as reader:
        source, index = reader.source, reader.index
        adapter = adapters.choose(framework, index.framework)
        if mmap and not source.mappable:
            raise ValueError(f"{source.name}: mmap=True needs the path of a regular file")
        mapped = source.local if mmap is None else mmap
        chosen = None if keys is None else reader.select(keys)
        if chosen is None:
            rows = np.arange(len(index), dtype=np.int64)
        else:
            rows = np.array(sorted(set(chosen.values())), np.int64)
        check = index.crcs is not None and (not mapped if verify is None else verify)
        total = int(index.entries["nbytes"][rows].sum())
        with reporting(progress, total) as report:
            if not mapped:
                batch = fetch.read_tensors(
                    source, index, rows, verify=check, threads=workers, progress=report
                )
            else:
                if check:
                    fetch.verify_rows(source, index, rows, threads=workers, progress=report)
                batch = fetch.map_tensors(source, index, rows)
        made = objects.Assembler(
            index,
            batch,
            rows,
            adapter,
            name=source.name,
            forced=framework is not None,
            kinds=reader.kinds,
            location=map_location,
        )
        return made.whole() if chosen is None else made.named(chosen)


def open(f: FileLike, *, framework: str | None = None, threads: int | None = None) -> Checkpoint:
    """Open a file without reading more than its header.

    Parameters
    ----------
    f, framework, threads
        As for :func:`load`.

    Returns
    -------
    Checkpoint
        A mapping of names to tensors, each read when it is asked for, and a context manager. Of a
        file object that cannot seek, tensors can be read only once: all by ``prefetch()``, or one.

    Examples
    --------
    >>> import numpy, tempfile, holdfast
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> holdfast.save({"model": {"w": numpy.arange(6).reshape(3, 2)}}, path)
    >>> with holdfast.open(path) as f:
    ...     print(list(f), f.info("model.w").shape, f.slice("model.w")[1:, 0])
    ['model.w'] (3, 2) [2 4]
    """
    return open_checkpoint(f, framework, _threads(threads))


def load_into(
    target: Any,
    f: FileLike,
    *,
    strict: bool = True,
    prefix: str = "",
    threads: int | None = None,
) -> IncompatibleKeys:
    """Fill the tensors of a model, or of a dict, from a file, in place.

    The bytes are read into the memory that the tensors have, strided or not, so that the model is
    never in memory twice. Where a dtype differs it is converted, a part of a tensor at a time.

    Parameters
    ----------
    target : torch.nn.Module or nesting of dicts, lists and tuples of tensors
        Of a module, its parameters and persistent buffers, as in its ``state_dict()``. What
        ``get_extra_state()`` of a module returned is not filled: its tensors are unexpected.
    f : str, bytes, os.PathLike or binary file object
        As for :func:`load`.
    strict : bool
        Whether missing and unexpected names are an error.
    prefix : str
        Only what is stored under names that begin with this is taken, without it:
        ``prefix="model."`` for a module saved as ``{"model": module.state_dict(), ...}``.
    threads : int, optional
        As for :func:`load`.

    Returns
    -------
    IncompatibleKeys
        ``missing_keys`` and ``unexpected_keys``.

    Raises
    ------
    RuntimeError
        Shapes differ, or with `strict` the names do; in the words of torch, before any tensor
        is touched.
    ValueError
        A tensor of the target is read-only or expanded.
    io.UnsupportedOperation
        A file object cannot seek, and some of its bytes are needed twice.
    ChecksumError
        The bytes are not those that were written; the target has been filled with them.
    """
    return fill_from(target, f, strict=strict, prefix=prefix, threads=_threads(threads))


def verify(f: FileLike, *, threads: int | None = None) -> Report:
    """Check every byte of a file against the checksums in it.

    Parameters
    ----------
    f, threads
        As for :func:`load`.

    Returns
    -------
    Report
        ``ok``, ``problems``, ``checked``, ``unchecked``. What is wrong with the content is a
        problem in the report, never an exception.

    Raises
    ------
    OSError
        The file cannot be read at all.
    """
    return verify_file(f, threads=_threads(threads))


def _threads(threads: int | None) -> int:
    """What the engine takes: 0 lets it choose."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int or None, not {type(threads).__name__}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return min(threads, _MAX_THREADS)
