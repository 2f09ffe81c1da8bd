"""What :func:`holdfast.load` does, and what drop-ins for other libraries need of it besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import adapters, fetch, objects
from .adapters import Adapter
from .annotated import annotate
from .booleans import settle
from .destinations import destination, said_of
from .errors import FormatError
from .fetch import Destination
from .folder import FolderSource, Origin, open_origin
from .layout import FOREIGN, Index
from .pickled import Trust
from .progress import ProgressArgument, reporting
from .reader import Reader
from .replaced import again
from .source import FileLike
from .views import TensorBatch

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["LoadOptions", "bring", "load_file"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load. What is not said here is as :func:`holdfast.load` has it.

    Attributes
    ----------
    threads : int
        0 lets the engine choose.
    trust : Trust
    gate : callable, optional
        Given the name of the format before anything else is done with the file; what it raises
        ends the load.
    byteorder : {"little", "big"}, optional
        What a file that could say its byte order and does not is taken for.
    dequantize : bool
        Whether blocks of quantized numbers become float32, where their type is known.
    data : bool
        False leaves the tensors' bytes unread: zeros.
    shared : bool
        Whether a map is shared with the file, so that writing to the tensors writes to it.
    strict : bool
        Whether a folder that was not saved to its end is an error.
    staging : Staging, optional
        How tensors pass through the memory of the host to that of devices.
    """

    map_location: Any = None
    mmap: bool | None = None
    framework: str | None = None
    keys: str | Iterable[str] | None = None
    verify: bool | None = None
    threads: int = 0
    progress: ProgressArgument = None
    trust: Trust = field(default_factory=Trust)
    gate: Callable[[str], None] | None = None
    byteorder: str | None = None
    dequantize: bool = False
    data: bool = True
    shared: bool = False
    strict: bool = False
    staging: Staging | None = None


@again
def load_file(f: FileLike, options: LoadOptions) -> Any:
    """Load the object in a file."""
    if options.framework is not None:
        adapters.by_name(options.framework)  # so that a bad name is told before a bad file
    with Reader(
        open_origin(f), verify=options.verify is not False, strict=options.strict
    ) as reader:
        source, index = reader.source, reader.index
        if options.gate is not None:
            options.gate(index.format)
        if index.program is not None and not options.trust.weights_only:
            return _program(source, index.program, options)
        location = said_of(index, options.map_location)
        if location is not options.map_location:
            options = replace(options, map_location=location)
        adapter = adapters.choose(options.framework, index.framework)
        if options.mmap and not source.mappable:
            raise ValueError(f"{source.name}: mmap=True needs the path of a regular file")
        if options.byteorder == "big" and index.byteorder is None and index.storages is not None:
            index.storages["flags"] |= FOREIGN
        chosen = None if options.keys is None else reader.select(options.keys)
        if chosen is None:
            reader.check()
            rows = np.arange(len(index), dtype=np.int64)
        else:
            rows = np.array(sorted(set(chosen.values())), np.int64)
        to = _devices(reader, rows, adapter, options)
        batch = bring(source, index, rows, adapter, options, to)
        made = objects.assembler(
            index,
            batch,
            rows,
            adapter,
            name=source.name,
            forced=options.framework is not None,
            kinds=reader.kinds,
            location=options.map_location,
            placed=to is not None and to.whole,
            trust=options.trust,
        )
        found = made.whole() if chosen is None else made.named(chosen)
        source.leave(index.end)
        if isinstance(index.metadata, dict):
            return found
        if options.dequantize:
            from .dequantize import dequantized

            index = dequantized(index)
        return annotate(
            found,
            index,
            (reader.paths() if chosen is None else chosen).items(),
        )


def _devices(
    reader: Reader, rows: np.ndarray, adapter: Adapter, options: LoadOptions
) -> Destination | None:
    """The devices that these entries are read to; None for the memory of the host alone."""
    if not options.data or adapter.dataless(options.map_location):
        return None
    if options.dequantize and reader.index.encodings:
        return None
    return destination(
        reader.source,
        reader.index,
        rows,
        adapter,
        location=options.map_location,
        kinds=reader.kinds,
        forced=options.framework is not None,
        staging=options.staging,
    )


def bring(
    source: Origin,
    index: Index,
    rows: np.ndarray,
    adapter: Adapter,
    options: LoadOptions,
    to: Destination | None,
) -> TensorBatch:
    """The tensors of these entries in memory: mapped, read, or dequantized."""
    if not options.dequantize or not index.encodings:
        return _raw(source, index, rows, adapter, options, to)
    from .dequantize import dequantize, dequantized

    if not options.data or adapter.dataless(options.map_location):
        return fetch.blank_tensors(dequantized(index), rows)
    batch = _raw(source, index, rows, adapter, options, None)
    return dequantize(index, batch, rows, threads=options.threads)


def _raw(
    source: Origin,
    index: Index,
    rows: np.ndarray,
    adapter: Adapter,
    options: LoadOptions,
    to: Destination | None,
) -> TensorBatch:
    """The tensors of these entries as the file has them."""
    mapped = to is None and (source.local if options.mmap is None else options.mmap)
    if not options.data or adapter.dataless(options.map_location):
        return fetch.blank_tensors(index, rows)
    check = fetch.checkable(index) and (not mapped if options.verify is None else options.verify)
    total = 0 if options.progress is None else fetch.total(index, rows)
    with reporting(options.progress, total) as report:
        if not mapped:
            batch = fetch.read_tensors(
                source,
                index,
                rows,
                verify=check,
                threads=options.threads,
                progress=report,
                to=to,
            )
            return settle(index, batch)
        if check:
            fetch.verify_rows(source, index, rows, threads=options.threads, progress=report)
        if options.shared:  # what is written to its memory is written to the file
            return fetch.map_tensors(source, index, rows, source.maps(index, shared=True))
        return settle(index, fetch.map_tensors(source, index, rows))


def _program(source: Origin, kind: str, options: LoadOptions) -> Any:
    """The program that a file holds."""
    from . import programs

    assert not isinstance(source, FolderSource)  # which no program is kept in
    if options.keys is not None:
        raise ValueError(f"{source.name}: keys= takes tensors, which weights_only=True gives")
    if options.framework not in (None, "torch"):
        raise FormatError(
            f"{source.name}: framework={options.framework!r} has no programs; weights_only=True "
            "gives the tensors"
        )
    mapped = source.local if options.mmap is None else options.mmap
    return programs.load_program(
        source,
        kind,
        map_location=options.map_location,
        mmap=mapped,
        threads=options.threads,
        verify=options.verify,
    )
