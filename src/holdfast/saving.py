"""What :func:`holdfast.save` does, and what drop-ins for other libraries need of it besides."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import adapters, formats, objects
from .annotated import StateDict
from .collect import collect
from .formats import Writing
from .layout import Plan
from .progress import ProgressArgument
from .publish import check_target, write_out
from .source import FileLike, is_path
from .views import TensorBatch

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["SaveOptions", "save_file", "written_apart"]

#: Formats that no module of ``formats`` writes by itself, and the module here that does, with
#: ``save_apart``.
_APART = {"oneflow": "oneflow_saving"}


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How to save. What is not said here is as :func:`holdfast.save` has it.

    Attributes
    ----------
    threads : int
        0 lets the engine choose.
    framework : str, optional
        Whose tensors to look for; by default those of every framework in use.
    pickle_module : module, optional
        For formats whose objects are pickles: whose ``Pickler`` pickles.
    pickle_protocol : int
        Of the pickle.
    settings : mapping
        What else the format's ``plan`` takes. With ``data`` False among it, room is left for the
        tensors' bytes and none of them is written: they are holes, or zeros.
    max_shard_size : int or str, optional
        Where the tensors go to several files: how much to one, as :func:`holdfast.save` has it.
    staging : Staging, optional
        How tensors in the memory of devices come to the host.
    """

    format: str | None = None
    durable: bool = True
    checksum: bool = True
    metadata: Mapping[str, str] | None = None
    threads: int = 0
    progress: ProgressArgument = None
    framework: str | None = None
    pickle_module: ModuleType | Any = None
    pickle_protocol: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_shard_size: int | str | None = None
    staging: Staging | None = None


def save_file(obj: Any, f: FileLike, options: SaveOptions) -> None:
    """Save an object to a file."""
    metadata: object = options.metadata
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict of str to str, not {type(metadata).__name__}")
    if type(obj) is StateDict:
        obj = dict(obj)
    if options.max_shard_size is not None:
        from . import sharding

        most = sharding.size_of(options.max_shard_size)
        sharding.save_shards(obj, f, options, most)
        return
    check_target(f)
    path = os.fsdecode(f) if is_path(f) else ""  # type: ignore[arg-type]
    extension = os.path.splitext(path)[1].lower()
    if _program(obj, f, extension, options):
        return
    apart = written_apart(options.format)
    if apart is not None:
        apart.save_apart(obj, f, options)
        return
    form = formats.for_saving(options.format, extension)
    take = {"tree": _as_tree, "arrays": _as_arrays, "array": _as_arrays}.get(
        form.STRUCTURE, _as_pickle
    )
    plan, batch = take(obj, form, path, options)
    write_out(
        f,
        plan,
        batch,
        form.seal,
        durable=options.durable,
        checksum=formats.checksummed(form, options.checksum),
        threads=options.threads,
        progress=options.progress,
        blank=not options.settings.get("data", True),
        staging=options.staging,
    )


def _as_tree(obj: Any, form: Writing, path: str, options: SaveOptions) -> tuple[Plan, TensorBatch]:
    """Plan a file in which the object is a tree of JSON around its tensors."""
    del path
    flat, blobs = objects.flatten(obj)
    found = collect(flat.names, flat.leaves)
    plan = form.plan(
        found.names,
        found.batch,
        framework=found.framework,
        metadata=options.metadata,
        structure=objects.tree_of(flat, blobs, found),
        checksum=options.checksum,
        stem="",
    )
    return plan, found.batch


def _as_arrays(
    obj: Any, form: Writing, path: str, options: SaveOptions
) -> tuple[Plan, TensorBatch]:
    """Plan a file that holds a flat dict of tensors, or a single one, and nothing else."""
    del path
    names, tensors = objects.arrays_of(obj, form.STRUCTURE)
    found = collect(names, tensors, ties=False)
    plan = form.plan(
        found.names,
        found.batch,
        framework=found.framework,
        metadata=options.metadata,
        structure=found.kinds,
        checksum=True,
        stem="",
    )
    return plan, found.batch


def _as_pickle(
    obj: Any, form: Writing, path: str, options: SaveOptions
) -> tuple[Plan, TensorBatch]:
    """Plan a file in which the object is a pickle around its tensors' storages."""
    from .pickling import pickle_object

    found = pickle_object(
        obj,
        legacy=form.STRUCTURE == "legacy pickle",
        pickle_module=options.pickle_module,
        protocol=options.pickle_protocol,
        framework=options.framework,
    )
    plan = form.plan(
        found.keys,
        found.batch,
        framework=found.framework,
        metadata=options.metadata,
        structure=found.data,
        checksum=options.checksum,
        stem=os.path.splitext(os.path.basename(path))[0],
        **options.settings,
    )
    return plan, found.batch


def written_apart(format: str | None) -> ModuleType | None:
    """The module that saves in a format whose checkpoints are no single files, for its name."""
    if format not in _APART:
        return None
    return importlib.import_module(f".{_APART[format]}", __package__)


def _program(obj: Any, f: FileLike, extension: str, options: SaveOptions) -> bool:
    """Save `obj` if it is a program, as the framework that made it writes it; whether it was."""
    kind = adapters.program_kind(obj)
    if kind is None:
        return False
    from . import programs

    programs.check_format(kind, options.format, extension)
    unfit = [
        name
        for name, given in (
            ("metadata", options.metadata is not None),
            ("checksum=False", not options.checksum),
            ("progress", bool(options.progress)),
        )
        if given
    ]
    if unfit:
        raise ValueError(f"{', '.join(unfit)}: not for programs, which PyTorch itself writes")
    programs.save_program(obj, f, kind=kind, durable=options.durable)
    return True
