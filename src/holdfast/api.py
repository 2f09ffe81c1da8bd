"""save, load, open, load_into, verify: the pipeline of tensors to and from files.

    save   object ─flatten─▶ leaves ─describe─▶ batch ─plan─▶ layout ─write, seal, publish─▶ file
    load   file ─recognise, index─▶ entries ─map | read─▶ batch ─wrap─▶ tensors ─rebuild─▶ object

There is no branch here on a framework or on a format; each step asks one of their tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import holdfast  # what annotations name is looked up in it, when somebody wants to know

from .progress import ProgressArgument
from .source import FileLike

__all__ = ["convert", "load", "load_into", "open", "save", "verify"]

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
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    progress: ProgressArgument = None,
    staging: holdfast.Staging | None = None,
) -> None:
    """Save an object with tensors in it.

    A file of that name is replaced whole or not at all: whatever happens meanwhile, a crash or
    a power cut included, the name stands for the old content or for the new one.

    Parameters
    ----------
    obj : object
        Any nesting of dict, OrderedDict, list, tuple, set and frozenset with tensors (NumPy arrays,
        torch tensors and parameters, CuPy and JAX arrays, on whatever device), NumPy scalars, str,
        bytes, numbers, None and the like as leaves: a state dict, a training checkpoint. Tensors
        may be strided, expanded or of a foreign byte order; only the elements that they show are
        written, in C order. Tensors that are one memory are stored once.

        To a torch format goes all that ``torch.save`` takes, as it takes it: a storage of torch's
        is written once and whole, with all that tensors are views of. Programs, a ``ScriptModule``
        or an ``ExportedProgram``, are written by torch, to ``.pt`` and ``.pt2``.
    f : str, bytes, os.PathLike or binary file object
        Where to. A symbolic link is followed. A file object is written from its position on, in
        order; of the promises about replacing and durability none holds for it.
    format : {"safetensors", "torch", "torch_legacy", "npz", "npy", "oneflow"}, optional
        By default that which the extension of the path means: ``.pt``, ``.pth``, ``.bin`` and
        ``.ckpt`` the archive that ``torch.load`` reads (``"torch"``), any other the container.
        ``"torch_legacy"`` is what torch before 1.6 wrote. ``.npz`` and ``.npy`` are NumPy's: a flat
        dict of tensors, and a single one. ``"oneflow"`` is the folder that ``oneflow.save`` makes;
        a folder of that name is replaced if it holds nothing but such a checkpoint.
    durable : bool
        Whether to return only when the data are on the device (fsync of the file and of its
        directory). False leaves that to the system: replacing stays atomic for other processes,
        but a power cut within the next half minute may leave an empty file in place of the old one.
    checksum : bool
        Whether to store a CRC-32 of each tensor (or storage), for ``load`` and ``verify`` to check.
        ``"torch_legacy"`` has no place for them.
    metadata : mapping of str to str, optional
        Whatever should stand in the header besides. ``"torch_legacy"`` has no place for it either.
    max_shard_size : int or str, optional
        `f` is a folder, made where there is none, and gets files of at most so many bytes of
        tensors (``"5GB"``; a larger tensor stands alone) in Hugging Face's layout:
        ``model-00001-of-00003.safetensors`` … and ``model.safetensors.index.json``, which is
        replaced last. A checkpoint that was in it before is complete up to that moment, which is
        why the files of a new one may be called ``model.next-…``; other files in it stay.
    threads : int, optional
        How many threads write. By default what measured fastest.
    progress : bool or callable, optional
        True for a progress bar (needs tqdm), or a callable ``(bytes_done, bytes_total)``.
    staging : Staging, optional
        How tensors of CUDA devices come to the host: through how many blocks of pinned memory, and
        how large ones. By default four of 16 MiB.

    Raises
    ------
    TypeError
        Something in `obj` cannot be held; the message has its path and says which way works.
        Nothing has been written.
    ValueError
        `obj` contains itself, or the header would be too large and the tensors should be sharded;
        an unknown format, or metadata that have no place in it.
    pickle.PicklingError, AttributeError, RuntimeError
        To a torch format: what ``torch.save`` raises for `obj`. Nothing has been written.
    OSError
        Of the system; the file of that name is what it was.

    Notes
    -----
    No copy of the tensors is made: beside them (and the pickle), a save takes at most 64 MiB of
    memory. (Only of torch tensors whose conjugation or negation is still to be done, a copy is,
    but not to torch formats.) Tensors must not change while they are being saved: what is written
    may then not match its checksum.

    Examples
    --------
    >>> import numpy, tempfile, holdfast
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> holdfast.save({"model": {"w": numpy.eye(2)}, "epoch": 3}, path)
    >>> holdfast.load(path)["epoch"]
    3
    """
    from .saving import SaveOptions, save_file

    save_file(
        obj,
        f,
        SaveOptions(
            format=format,
            durable=durable,
            checksum=checksum,
            metadata=metadata,
            threads=_threads(threads),
            progress=progress,
            max_shard_size=max_shard_size,
            staging=_staging(staging),
        ),
    )


def load(
    f: FileLike,
    map_location: Any = None,
    *,
    weights_only: bool = True,
    safe_globals: Iterable[Any] = (),
    mmap: bool | None = None,
    framework: str | None = None,
    keys: str | Iterable[str] | None = None,
    verify: bool | None = None,
    strict: bool = False,
    dequantize: bool = False,
    threads: int | None = None,
    progress: ProgressArgument = None,
    staging: holdfast.Staging | None = None,
) -> Any:
    """Load what :func:`save` saved, or others did: see the formats below.

    Of a program (TorchScript, ``torch.export``) the parameters and buffers come back under the
    names that they have in its ``state_dict``.

    Parameters
    ----------
    f : str, bytes, os.PathLike or binary file object
        What it is is told from its content, never from its name. A file object is read from its
        position on.
    map_location : optional
        As for ``torch.load``: a device (of CuPy's or JAX's, too), a dict of devices, or a callable.
        To a CUDA device the tensors are read through pinned memory, without a map. Of a file of
        ``torch.save`` it is given storages and the device that each was saved from, and None puts
        them there; of others it is given tensors and ``"cpu"``, and None leaves them in the memory
        of the host.
    weights_only : bool
        True is a promise: no code from the file runs, and nothing outside an exact list of tensors,
        containers and plain values is made. False unpickles whatever a file of ``torch.save``
        holds, whole modules say, and gives the program that a TorchScript or ``torch.export`` file
        holds: that may run any code, so only for files that you trust.
    safe_globals : iterable
        Classes and functions that a pickle may use besides, or pairs of one and the full name that
        the file has for it.
    mmap : bool, optional
        True maps the file: tensors are views of it, writable and private to the process, and cost
        no read until they are touched (those of bool, whose bytes are made 0 or 1, are read; so is
        what little is missing where the page cache has nearly all of 64 MiB or more). Many
        processes that map one file share one copy of it. False reads into memory, with several
        threads. None maps on a local file system, and reads on a network one and from file objects.
    framework : {"numpy", "torch", "oneflow", "jax", "cupy"}, optional
        What the tensors come back as. By default the framework that saved the file; where that is
        not installed or the file does not say, the first of torch, OneFlow and NumPy that is
        imported already.
    keys : str or iterable of str, optional
        Names of tensors, or glob patterns (``"encoder.*"``). Only these are read, and they come
        back as a flat dict, whatever else the file holds.
    verify : bool, optional
        Whether to check the checksums. None checks them when tensors are read (they are computed
        as the bytes go by) and not when they are mapped, which would read the whole file. The
        header's own checksum is checked unless this is False.
    strict : bool
        Whether a folder of OneFlow's whose save was interrupted (``snapshot_done`` is missing) is
        an error. Otherwise it is a warning, and what is there is loaded.
    dequantize : bool
        Whether the tensors of a GGUF file that are blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 become
        float32, in memory of their own. Others, and without this all, are their blocks as bytes:
        uint8, of which the last two axes are the blocks of a row and the bytes of a block.
    threads : int, optional
        How many threads read. By default what measured fastest.
    progress : bool or callable, optional
        As for :func:`save`.
    staging : Staging, optional
        As for :func:`save`, of what `map_location` wants on a CUDA device.

    Returns
    -------
    object
        What was saved; of a file that another program wrote, a dict of name to tensor. Each
        tensor keeps alive the memory it needs.

    Raises
    ------
    FormatError
        The bytes are not those of a sound file; ChecksumError where it is a checksum; UnsafeError
        where a pickle asks for what is not allowed. The message names the tensor, or what to pass.
    TypeError
        What comes back cannot hold what the file has, such as bfloat16 without ml_dtypes.
    RuntimeError
        The device that torch's tensors were on, or are wanted on, is not there; in torch's words.
    FileNotFoundError, IsADirectoryError, PermissionError, OSError
        Of the system.
    KeyError
        A name or pattern in `keys` fits nothing.

    Warnings
    --------
    While a file is mapped, do not change it in place: processes that map it see the change, or get
    SIGBUS where it was cut. :func:`save` does not: it replaces the file, and maps keep the old one.
    """
    from .loading import LoadOptions, load_file
    from .pickled import Trust

    return load_file(
        f,
        LoadOptions(
            map_location=map_location,
            mmap=mmap,
            framework=framework,
            keys=keys,
            verify=verify,
            strict=strict,
            dequantize=dequantize,
            threads=_threads(threads),
            progress=progress,
            staging=_staging(staging),
            trust=Trust(weights_only=weights_only, safe_globals=tuple(safe_globals)),
        ),
    )


def convert(
    src: FileLike,
    dst: FileLike,
    format: str | None = None,
    *,
    durable: bool = True,
    checksum: bool = True,
    max_shard_size: int | str | None = None,
    dequantize: bool = False,
    threads: int | None = None,
    progress: ProgressArgument = None,
) -> None:
    """Write what is in one file to another, in another format, or to several.

    No tensor is made, and unless `dequantize` says so none is decoded: bytes go from a map of the
    one file to the other, so that the memory taken does not grow with them. Checksums of `src`,
    where it has them, are checked. (In a file of torch, arrays of NumPy's beside tensors are a part
    of the pickle, as :func:`save` has them, and pass through memory.)

    Parameters
    ----------
    src : str, bytes, os.PathLike or binary file object
        As for :func:`load`. A file object is read into memory first.
    dst : str, bytes, os.PathLike or binary file object
        As for :func:`save`; it may be `src` itself.
    format : str, optional
        As for :func:`save`: by default that which the extension of `dst` means.
    durable, checksum, max_shard_size, threads, progress
        As for :func:`save`: with `max_shard_size`, `dst` is a folder that shards go to, and a
        checkpoint that was in it is replaced; it may be the one that `src` is, or is in.
    dequantize : bool
        As for :func:`load`. The floats go through a temporary file beside `dst`, which takes as
        much room as they do, or where `dst` is a file object through one in the folder for
        temporary files.

    Warns
    -----
    UserWarning
        `src` holds more than values, a whole module say, which cannot be had without running code,
        or a tensor of a special kind: `dst` is then a flat dict of what :func:`open` names. Or
        tensors have attributes of Python's, which are left out. Or it has metadata, and the other
        format no place for them.

    Raises
    ------
    FormatError, TypeError, ValueError, OSError
        As :func:`load` and :func:`save` do; `dst` is then what it was.

    Warnings
    --------
    `src` is mapped while it is converted: do not cut it meanwhile. One that was cut before the map
    is a FormatError; one that is cut under it is a SIGBUS, for whatever is compared before a page
    is touched can be untrue when it is. A pipe is read, not mapped, for a file that others may cut.
    `dst` is what it was in any case.

    Examples
    --------
    >>> import numpy, tempfile, holdfast
    >>> folder = tempfile.mkdtemp()
    >>> holdfast.save({"w": numpy.eye(2)}, folder + "/model.pt")
    >>> holdfast.convert(folder + "/model.pt", folder + "/model.safetensors")
    >>> holdfast.load(folder + "/model.safetensors")["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    from .conversion import convert_file
    from .saving import SaveOptions

    convert_file(
        src,
        dst,
        SaveOptions(
            format=format,
            durable=durable,
            checksum=checksum,
            threads=_threads(threads),
            progress=progress,
            max_shard_size=max_shard_size,
        ),
        dequantize=dequantize,
    )


def open(
    f: FileLike,
    *,
    framework: str | None = None,
    strict: bool = False,
    dequantize: bool = False,
    threads: int | None = None,
    map_location: Any = None,
    staging: holdfast.Staging | None = None,
) -> holdfast.Checkpoint:
    """Open a file without reading more than its header, or of torch's files the pickle.

    Nothing that the file names is imported or run. Of a module that was saved whole, the names are
    those of its ``state_dict``.

    Parameters
    ----------
    f, framework, strict, dequantize, threads, staging
        As for :func:`load`.
    map_location : optional
        As for :func:`load`; but by default everything is in the memory of the host, whatever device
        a file of ``torch.save`` was saved from.

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
    from .checkpoint import open_checkpoint

    return open_checkpoint(
        f, framework, _threads(threads), strict, dequantize, map_location, _staging(staging)
    )


def load_into(
    target: Any,
    f: FileLike,
    *,
    strict: bool = True,
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
    dequantize: bool = False,
    threads: int | None = None,
    staging: holdfast.Staging | None = None,
) -> holdfast.IncompatibleKeys:
    r"""Fill the tensors of a model, or of a dict, from a file, in place.

    The bytes are read into the memory that the tensors have, strided or not, so that the model is
    never in memory twice. Where a dtype differs it is converted, a part of a tensor at a time.
    Of a folder that OneFlow wrote before it said what is in one, types and shapes are the target's,
    and no code of a module's own runs.

    Parameters
    ----------
    target : torch.nn.Module or nesting of dicts, lists and tuples of tensors
        Of a module, its parameters and persistent buffers, as in its ``state_dict()``. Where it, or
        a module in it, has code of its own for being loaded (hooks of ``load_state_dict``, a
        ``_load_from_state_dict``, a ``set_extra_state``), that runs: ``load_state_dict`` is called
        with tensors that are a map of the file, and with what else the module's own ``state_dict``
        has. It takes as long as it takes, a GPU is not filled through pinned memory, and where it
        fails part of the module may have been filled.
    f : str, bytes, os.PathLike or binary file object
        As for :func:`load`.
    strict : bool
        Whether missing and unexpected names are an error.
    prefix : str
        Only what is stored under names that begin with this is taken, without it:
        ``prefix="model."`` for a module saved as ``{"model": module.state_dict(), ...}``.
    rename : mapping of str to str, optional
        Regular expressions and what to put in place of what they find in a stored name, as
        ``re.sub`` does, one after the other and before `prefix` is looked for:
        ``rename={r"^module\.": ""}`` for a model that was saved while it was wrapped.
    dequantize : bool
        As for :func:`load`: the blocks of a GGUF file fill tensors of any dtype with the numbers
        that they stand for.
    threads, staging
        As for :func:`load`.

    Returns
    -------
    IncompatibleKeys
        ``missing_keys`` and ``unexpected_keys``.

    Raises
    ------
    RuntimeError
        Shapes differ (or numbers of bytes, where the folder does not say shapes), or with `strict`
        the names do; in the words of torch, before any tensor is touched.
    ValueError
        A tensor of the target is read-only or expanded; `rename` is no regular expression, or makes
        one name of two.
    io.UnsupportedOperation
        A file object cannot seek, and some of its bytes are needed twice.
    ChecksumError
        The bytes are not those that were written; the target has been filled with them.
    """
    from .fill import fill_from

    return fill_from(
        target,
        f,
        strict=strict,
        prefix=prefix,
        rename=rename,
        dequantize=dequantize,
        threads=_threads(threads),
        staging=_staging(staging),
    )


def verify(f: FileLike, *, threads: int | None = None) -> holdfast.Report:
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
    from .verification import verify_file

    return verify_file(f, threads=_threads(threads))


def _staging(staging: holdfast.Staging | None) -> holdfast.Staging | None:
    """`staging`, if it is that or nothing."""
    if staging is not None and not isinstance(staging, holdfast.Staging):
        raise TypeError(f"staging must be a Staging or None, not {type(staging).__name__}")
    return staging


def _threads(threads: int | None) -> int:
    """What the engine takes: 0 lets it choose."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int or None, not {type(threads).__name__}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return min(threads, _MAX_THREADS)
