"""What is saved for OneFlow: an object as one of OneFlow's layouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import adapters
from .adapters import Adapter
from .collect import Collection, collect
from .dtypes import BY_NAME
from .errors import FormatError, warn
from .folder import FolderSource
from .formats import _oneflow_write
from .formats._garbage import uncollected
from .formats._oneflow_emit import CONSTANTS, INLINE_CONSTANTS, Emitted, Emitter
from .formats._oneflow_meta import MOST, parse_all
from .formats._oneflow_write import DATA, DONE, META, PICKLE
from .formats._pickle_reduce import MixedError
from .layout import FolderPlan, Plan
from .pickling import telling
from .publish import check_target, write_out
from .publish_folder import write_folder
from .source import FileLike, is_path
from .views import DENSE, VIEW, TensorBatch, elements

if TYPE_CHECKING:
    from .saving import SaveOptions

__all__ = [
    "LAYOUTS",
    "PlannedFile",
    "PlannedFolder",
    "plan_oneflow",
    "replaceable",
    "save_apart",
]

_FLOAT32, _BFLOAT16 = BY_NAME["float32"].code, BY_NAME["bfloat16"].code

#: What ``layout=`` can be.
LAYOUTS = ("snapshot", "pickle", "file")

#: Of OneFlow's own load, which the format's writer has as well.
_PROTOCOL = 1

#: Files of a checkpoint: in the folder itself, and in those of its tensors.
_PART = frozenset({META, DATA})
_USUAL = {META: "file", DATA: "file"}
_MARKS = frozenset({DONE, PICKLE, "model.mlir"})
_OWN = _PART | _MARKS | {"one_embedding_options.json"}
#: Nor is a folder one that is deeper than any name of a tensor.
_MAX_LEVELS = 64

#: Subclasses of arrays that are written as the arrays that they are.
_ARRAYS: frozenset[type] = frozenset({np.ndarray, np.memmap, np.matrix})


@dataclass(frozen=True, slots=True)
class PlannedFolder:
    """A folder, and the tensors that go into it."""

    plan: FolderPlan
    batch: TensorBatch


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file, and the tensors that go into it; ``formats._oneflow_write`` seals it."""

    plan: Plan
    batch: TensorBatch


def plan_oneflow(
    obj: Any,
    layout: str = "snapshot",
    localize: Callable[[Any], Any] | None = None,
    known: Sequence[Adapter] | None = None,
) -> PlannedFolder | PlannedFile:
    """How an object is saved in one of OneFlow's layouts.

    Parameters
    ----------
    obj : object
        Tensors are those of every framework in use; arrays of NumPy count where there are no
        others, and stay arrays beside them.
    layout : {"snapshot", "pickle", "file"}
        ``"snapshot"`` is the folder of OneFlow's tutorials, which holds a flat dict of tensors and
        nothing else; for any other object it means ``"pickle"``, the folder that
        ``oneflow.save`` makes since version 0.6. ``"file"`` is what it makes since 2023.
    localize : callable, optional
        What is saved for a tensor: itself, or what another one gathered.
    known : sequence of Adapter, optional
        Whose tensors to look for; by default those of every framework in use.

    Raises
    ------
    TypeError
        A tensor of a type that OneFlow cannot load, or that cannot be held at all.
    ValueError
        A name that cannot be that of a folder; an unknown layout.
    pickle.PicklingError, AttributeError, RecursionError
        Something cannot be pickled; the message has its path.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    known = adapters.loaded() if known is None else known
    if layout == "snapshot" and _is_flat(obj, known):
        return _snapshot(obj, localize, known)
    inline = layout == "file"
    content = {"protocol_version": _PROTOCOL, "__oneflow__": None, "data": obj}
    emitted = _emit(content, INLINE_CONSTANTS if inline else CONSTANTS, known)
    # Their paths begin in `content`.
    names = [name.partition(".")[2] or "tensor" for name in emitted.names]
    found = _collect(names, emitted.tensors, localize, known, inline=inline)
    if inline:
        batch, narrow = _widened(found.batch)
        return PlannedFile(_oneflow_write.plan_file(emitted, batch, found.kinds, narrow), batch)
    return PlannedFolder(_oneflow_write.plan_folder(emitted, found.batch, found.kinds), found.batch)


def _is_flat(obj: Any, known: Sequence[Adapter]) -> bool:
    """Whether `obj` is a dict of texts to tensors."""
    if not isinstance(obj, Mapping):
        return False
    owner: dict[type, Adapter | None] = {}
    for key, value in obj.items():
        kind = type(value)
        if kind not in owner:
            owner[kind] = next((adapter for adapter in known if adapter.is_tensor(value)), None)
        if owner[kind] is None or not isinstance(key, str):
            return False
    # Beside tensors of others, arrays are no tensors.
    frameworks = {adapter.name for adapter in owner.values() if adapter is not None}
    return len(frameworks) < 2 or "numpy" not in frameworks


def _snapshot(
    obj: Mapping[str, Any], localize: Callable[[Any], Any] | None, known: Sequence[Adapter]
) -> PlannedFolder:
    names = list(obj)
    found = _collect(names, list(obj.values()), localize, known)
    plan = _oneflow_write.plan_snapshot(names, found.batch)
    nested = next((name for name in names if "/" in name), None)
    if nested is not None:
        warn(
            f"tensor {nested!r}: its folder lies in another, where OneFlow's own load does not "
            "look; layout='pickle' holds it for that"
        )
    return PlannedFolder(plan, found.batch)


def _collect(
    names: list[str],
    tensors: list[Any],
    localize: Callable[[Any], Any] | None,
    known: Sequence[Adapter],
    *,
    inline: bool = False,
) -> Collection:
    """Columns of the tensors, none of them merged: OneFlow has no two names for one tensor."""
    if localize is not None:
        tensors = [localize(tensor) for tensor in tensors]
    if not tensors:
        nothing = TensorBatch(np.zeros(0, VIEW), np.zeros(0, np.int64), [])
        return Collection([], nothing, (), {}, None)
    found = collect(names, tensors, known, ties=False)
    _oneflow_write.check_elements(names, found.batch, found.kinds, found.framework, inline=inline)
    return found


def _widened(batch: TensorBatch) -> tuple[TensorBatch, frozenset[int]]:
    """The batch with float32 in place of bfloat16, as OneFlow has it in a pickle; and which rows.

    Each number is exact: its bytes are the upper half of a float32.
    """
    narrow = np.flatnonzero(batch.views["dtype"] == _BFLOAT16).tolist()
    if not narrow:
        return batch, frozenset()
    views, owners = batch.views.copy(), list(batch.owners)
    for row in narrow:
        view = batch[row]
        wide = np.zeros(view.shape, np.uint32)
        if view.nbytes:
            bits = elements(view, "u2")
            np.left_shift(bits.byteswap() if view.swapped else bits, 16, out=wide, dtype=np.uint32)
        owners.append(wide)
        views["address"][row], views["nbytes"][row] = wide.ctypes.data, wide.nbytes
    views["dtype"][narrow], views["flags"][narrow] = _FLOAT32, DENSE
    made = TensorBatch(views, batch.dims, owners, batch.strides, batch.owner, devices=batch.devices)
    return made, frozenset(narrow)


def _emit(
    content: dict[str, Any],
    constants: tuple[str | tuple[str, str], ...],
    known: Sequence[Adapter],
) -> Emitted:
    """The pickle; arrays are tensors unless there are others."""
    frameworks = [adapter for adapter in known if adapter.name != "numpy"]
    own = _ARRAYS.union(*(adapter.plain_types for adapter in known if adapter.name == "numpy"))

    def is_tensor(obj: object) -> bool:
        return any(adapter.is_tensor(obj) for adapter in frameworks)

    with uncollected():
        for arrays in (own, frozenset[type]()):
            emitter = Emitter(is_tensor, arrays, constants)
            try:
                with telling(emitter.steps, 1):
                    return emitter.dump(content)
            except MixedError:
                continue
        raise AssertionError("without arrays there is nothing to mix")


# -- writing -------------------------------------------------------------------------------------


def save_apart(
    obj: Any,
    f: FileLike,
    options: SaveOptions,
    *,
    layout: str = "snapshot",
    localize: Callable[[Any], Any] | None = None,
    known: Sequence[Adapter] | None = None,
    release: Callable[[TensorBatch], np.ndarray] | None = None,
) -> None:
    """Save an object in one of OneFlow's layouts; to a file object always as the single file.

    Parameters
    ----------
    obj, layout, localize, known
        As for :func:`plan_oneflow`.
    f : str, bytes, os.PathLike or binary file object
        A folder of that name is replaced whole if it is empty or a checkpoint of OneFlow's, both
        before anything is written and once all is.
    options : SaveOptions
    release : callable, optional
        Given the tensors, says which are memory of unchanged maps, to be let go of once written.

    Raises
    ------
    FileExistsError
        A folder of that name holds what is no part of a checkpoint, and would be lost.
    ValueError
        There are metadata, which have no place.
    OSError
        Of the system; what was there before is as it was.
    """
    check_target(f)
    if options.metadata:
        raise ValueError(
            "metadata have no place in OneFlow's formats; format='safetensors' has one"
        )
    planned = plan_oneflow(obj, layout if is_path(f) else "file", localize, known)
    mapped = None if release is None else release(planned.batch)
    if isinstance(planned, PlannedFile):
        write_out(
            f,
            planned.plan,
            planned.batch,
            _oneflow_write.seal,
            durable=options.durable,
            checksum=False,
            threads=options.threads,
            progress=options.progress,
            release=mapped,
            staging=options.staging,
        )
        return
    path = cast("str | bytes | os.PathLike[str]", f)
    try:
        write_folder(
            path,
            planned.plan,
            planned.batch,
            durable=options.durable,
            threads=options.threads,
            progress=options.progress,
            replace=partial(replaceable, path),
            release=mapped,
            staging=options.staging,
        )
    except FileExistsError as error:
        if error.filename != os.fspath(path):
            raise
        text = "The folder holds what is no part of a checkpoint, and would be lost"
        raise FileExistsError(error.errno, text, error.filename) from None


def replaceable(path: str | bytes | os.PathLike[str], fd: int | None = None) -> bool:
    """Whether a folder is empty, or a checkpoint of OneFlow's with nothing else in it.

    Parameters
    ----------
    path : str, bytes or os.PathLike
    fd : int, optional
        A descriptor of the folder; `path` then says only what it is called.
    """
    try:
        with closing(FolderSource(path, fd=fd)) as folder:
            return not folder.entries() or _is_checkpoint(folder)
    except (FileNotFoundError, NotADirectoryError, FormatError):
        return False


def _is_checkpoint(folder: FolderSource) -> bool:
    """Whether a folder says that it is a checkpoint, and all in it is part of one.

    Its names alone are no sign: many programs have a folder ``out``.
    """
    top = folder.entries()
    if not any(top.get(mark) == "file" for mark in _MARKS):
        return False
    variables: list[str] = []
    waiting = [""]
    while waiting:
        path = waiting.pop()
        inside = folder.entries(path)
        if inside == _USUAL and path and path.count("/") < _MAX_LEVELS:  # nearly all, of very many
            variables.append(path)
            continue
        own = _PART if path else _OWN
        deeper = [name for name, kind in inside.items() if kind == "folder"]
        files = {name for name, kind in inside.items() if kind == "file" and name in own}
        if len(deeper) + len(files) < len(inside) or path.count("/") >= _MAX_LEVELS:
            return False
        if DATA in files:
            variables.append(path)
        elif META in files or not inside:
            return False
        waiting += [f"{path}/{name}" if path else name for name in deeper]
    metas = folder.read([f"{path}/{META}" if path else META for path in variables], most=MOST)
    said = [meta for meta in metas if meta is not None]
    if len(said) < len(metas):
        # Before November of 2020 no variable had one.
        return not said and top.get(DONE) == "file"
    parse_all(said, variables)
    return True
