"""Folders of OneFlow's without a pickle: a sub-folder for each variable, its elements in ``out``.

So ``flow.save`` wrote before version 0.6, ``meta`` beside ``out`` saying what the elements are, and
an empty ``snapshot_done`` at the end; so do graphs that are saved. The oldest, of 2019 and 2020,
have no ``meta``: what they hold only the model knows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..dtypes import BY_NAME, DTYPES, DType
from ..errors import FormatError
from ..layout import ENTRY, FOREIGN, STORAGE, Folder, Guess, Index
from ..views import dense_strides
from ._oneflow_meta import parse_all, read_all
from ._records import NameList

__all__ = ["LINKS", "index_folder", "sniff_folder"]

#: OneFlow makes no symbolic links.
LINKS = False

META, DATA, DONE = "meta", "out", "snapshot_done"
#: What the newer layout has, that is no snapshot.
PICKLE = "pickled_data"
_USUAL = {META: "file", DATA: "file"}
#: What a graph that was saved has besides its variables: never `DONE`.
_GRAPHS = ("model.mlir", "job")
#: Variables without ``meta`` of which it is known that they count steps: one int64.
_STEPS = "System-Train-"

_FLOAT32, _INT64, _UINT8 = BY_NAME["float32"], BY_NAME["int64"], BY_NAME["uint8"]
_BFLOAT16 = BY_NAME["bfloat16"].code
_UNITS = np.array([row.unit for row in DTYPES], np.uint64)
#: Where in a float32 the bytes of the bfloat16 begin that it was made of.
_UPPER = 2 if sys.byteorder == "little" else 0
#: A name is no longer than a path can be, nor nested deeper.
_MAX_LEVELS = 64
#: Of so many sub-folders is asked what is in them before a folder is taken for none of ours.
_SNIFFED = 256
_SNIFFED_LEVELS = 4

_Said = tuple[DType, tuple[int, ...]]


def sniff_folder(folder: Folder) -> bool:
    """Whether a folder is of this format: it has a mark, or variables and nothing else.

    Without a mark, ``meta`` beside ``out`` in a sub-folder will do. Where there is no ``meta``, all
    that there is has to be sub-folders with ``out``: many programs call a file so.
    """
    found = folder.entries()
    if any(found.get(name) == "file" for name in (DONE, *_GRAPHS[:1])):
        return True
    if found.get(DATA) == "file" and set(found) <= {META, DATA}:
        return True
    folders = [name for name, kind in found.items() if kind == "folder"][:_SNIFFED]
    alone = bool(folders) and set(found.values()) == {"folder"}
    for _ in range(_SNIFFED_LEVELS):
        deeper: list[str] = []
        for path in folders:
            inside = _inside(folder, path)
            has = inside.get(DATA) == "file"
            if has and inside.get(META) == "file":
                return True
            alone = alone and has and len(inside) == 1
            deeper += [f"{path}/{name}" for name, kind in inside.items() if kind == "folder"]
        if alone:
            return True
        folders = deeper[:_SNIFFED]
    return False


def _inside(folder: Folder, path: str) -> Mapping[str, str]:
    """What is in a sub-folder; nothing where that cannot be told."""
    try:
        return folder.entries(path)
    except (OSError, FormatError):
        return {}


def index_folder(folder: Folder, *, verify: bool, strict: bool) -> Index:  # noqa: ARG001
    """Find the variables of a folder; a folder that is a variable itself has one.

    Names are paths: ``a/b`` is in a folder ``b`` in a folder ``a``. Files besides are passed over.
    Of variables from before OneFlow wrote what they are, types and shapes are guessed, and the
    index says so.

    Parameters
    ----------
    verify : bool
        Changes nothing: this format has no checksums.
    strict : bool
        Whether a save that did not come to its end is an error, rather than a warning.

    Warns
    -----
    UserWarning
        The save was interrupted.

    Raises
    ------
    FormatError
        There is no variable, nor the mark of a save that had none; one is not all there or not of
        the size that it says; or the folder
        has symbolic links.
    """
    top = folder.entries()
    if top.get(DATA) == "file":
        paths, names = [""], ["tensor"]
    else:
        paths = names = _variables(folder, top)
        if not names and top.get(DONE) == "file":
            return _nothing()
        if not names:
            raise FormatError(
                f"{folder.name}: expected sub-folders with {DATA!r}, found no variable"
            )
        if top.get(DONE) != "file" and not any(top.get(name) == "file" for name in _GRAPHS):
            text = f"{folder.name}: has no {DONE!r}: the save was interrupted"
            if strict:
                raise FormatError(text)
            folder.notes.append(text)
    files = [f"{path}/{DATA}" if path else DATA for path in paths]
    sizes = folder.sizes(files)
    gone = np.flatnonzero(sizes < 0)
    if len(gone):
        raise FormatError(
            f"{folder.name}: tensor {names[int(gone[0])]!r}: {DATA!r} is gone meanwhile"
        )
    said = _said(folder, paths, names)
    if said is None:
        return _guessed(folder.name, names, sizes, files)
    made = _index(folder.name, names, said, sizes)
    made.files = files
    return made


# -- which variables there are -------------------------------------------------------------------


def _variables(folder: Folder, top: Mapping[str, str]) -> list[str]:
    """The paths of all variables, in the order of their names."""
    found: list[str] = []
    level = _folders(folder, "", top)
    for _ in range(_MAX_LEVELS):
        if not level:
            found.sort()
            return found
        deeper: list[str] = []
        for path in level:
            inside = folder.entries(path)
            if inside == _USUAL:  # nearly all, of very many
                found.append(path)
                continue
            if DONE in inside or PICKLE in inside:
                raise FormatError(
                    f"{folder.name}: a folder of several checkpoints, {path!r} the first; give the "
                    "path of one"
                )
            deeper += _folders(folder, path, inside)
            if inside.get(DATA) == "file":
                found.append(path)
            elif META in inside or DATA in inside:
                known = {META: inside.get(META), DATA: inside.get(DATA)}
                _check(folder, path, known)
        level = deeper
    raise FormatError(f"{folder.name}: folders in more than {_MAX_LEVELS} levels")


def _folders(folder: Folder, path: str, inside: Mapping[str, str]) -> list[str]:
    """The sub-folders of a folder; FormatError where it has a symbolic link."""
    if "link" in inside.values():
        name = next(name for name, kind in inside.items() if kind == "link")
        raise FormatError(
            f"{folder.name.rstrip('/')}/{path + '/' if path else ''}{name}: is a symbolic link, "
            "which is not followed"
        )
    kinds = inside.items()
    return [f"{path}/{name}" if path else name for name, kind in kinds if kind == "folder"]


def _check(folder: Folder, path: str, known: Mapping[str, str | None]) -> None:
    """Raise FormatError for a sub-folder that has the one file of a variable, not the other."""
    if known[META] == "file" or known[DATA] not in (None, "folder"):
        raise FormatError(
            f"{folder.name.rstrip('/')}/{path}: tensor {path!r}: expected a file {DATA!r}, found "
            f"{'none' if known[DATA] is None else 'what is no regular file'}"
        )


# -- what they are -------------------------------------------------------------------------------


def _said(folder: Folder, paths: Sequence[str], names: Sequence[str]) -> list[_Said] | None:
    """Type and shape of each variable; None where they are said of none."""
    where = [f"{folder.name}: tensor {name!r}" for name in names]
    metas = [f"{path}/{META}" if path else META for path in paths]
    texts = read_all(folder, metas)
    found = [text for text in texts if text is not None]
    if len(found) == len(texts):
        return parse_all(found, where)
    if found:
        row = texts.index(None)
        raise FormatError(f"{where[row]}: has no {META!r}, though others have one")
    return None


def _guessed(name: str, names: list[str], sizes: np.ndarray, files: list[str]) -> Index:
    """The index of variables of which nothing is said but their sizes."""
    guesses = [_guess(name, size) for name, size in zip(names, sizes.tolist(), strict=True)]

    def told(known: Mapping[int, _Said]) -> Index:
        said = [known.get(row, guess) for row, guess in enumerate(guesses)]
        made = _index(name, names, said, sizes)
        made.files = files
        return made

    found = told({})
    warning = (
        f"{name}: has no {META!r} beside any {DATA!r}: neither types nor shapes of the "
        f"{len(names)} tensors are known; they are taken for float32 of one dimension "
        "(load_into takes them from the model that it fills)"
    )
    found.guess = Guess(warning, told)
    return found


def _guess(name: str, size: int) -> _Said:
    """What a variable may be of which nothing is said."""
    if size == _INT64.itemsize and name.startswith(_STEPS):
        return _INT64, (1,)
    if size % _FLOAT32.itemsize == 0:
        return _FLOAT32, (size // _FLOAT32.itemsize,)
    return _UINT8, (size,)


@dataclass(slots=True)
class _Kinds:
    """The different types and shapes of a folder, as columns, and which each variable has."""

    known: dict[_Said, int] = field(default_factory=dict)
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # nbytes, dtype, ndim, wide

    def number(self, said: _Said) -> int:
        if said not in self.known:
            dtype, shape = said
            # What is too large for a file is made a size that none has.
            nbytes = min(dtype.nbytes(shape), (1 << 62) - 1)
            wide = 2 * nbytes if dtype.code == _BFLOAT16 and nbytes else -1
            self.known[said] = len(self.rows)
            self.rows.append((nbytes, dtype.code, len(shape), wide))
        return self.known[said]


def _index(name: str, names: list[str], said: Sequence[_Said], sizes: np.ndarray) -> Index:
    """The index of variables of these types and shapes, whose files have these sizes."""
    kinds = _Kinds()
    # Equal ones are mostly one object, which is found faster than by what it says.
    different = {id(one): one for one in said}
    numbers = {key: kinds.number(one) for key, one in different.items()}
    which = np.array([numbers[id(one)] for one in said], np.int64)
    nbytes, dtype, ndim, wide = np.array(kinds.rows, np.int64).T[:, which]
    widened = sizes == wide
    bad = np.flatnonzero((sizes != nbytes) & ~widened)
    if len(bad):
        i = int(bad[0])
        kind, shape = said[i]
        raise FormatError(
            f"{name}: tensor {names[i]!r}: {kind.name} of shape {shape} needs "
            f"{kind.nbytes(shape)} bytes, {DATA!r} has {int(sizes[i])}"
        )
    # Extents that others multiply to nothing are in no size.
    vast = [i for i, (kind, shape) in enumerate(kinds.known) if _vast(kind, shape)]
    if vast:
        i = int(np.flatnonzero(np.isin(which, vast))[0])
        raise FormatError(
            f"{name}: tensor {names[i]!r}: a shape of {said[i][1]}, too large for any memory"
        )
    entries = np.zeros(len(names), ENTRY)
    entries["nbytes"], entries["dtype"], entries["ndim"] = nbytes, dtype, ndim
    entries["dims"] = np.cumsum(ndim) - ndim
    entries["file"] = np.arange(len(names))
    dims = [extent for _, shape in said for extent in shape]
    made = Index(
        NameList(names),
        entries,
        np.array(dims, np.int64),
        {},
        framework="oneflow",
        format="oneflow",
    )
    if widened.any() or sys.byteorder != "little":
        _spread(made, said, sizes, widened)
    return made


def _nothing() -> Index:
    """The index of a folder without variables."""
    made = Index(
        NameList([]),
        np.zeros(0, ENTRY),
        np.zeros(0, np.int64),
        {},
        framework="oneflow",
        format="oneflow",
    )
    made.files = []
    return made


def _vast(kind: DType, shape: tuple[int, ...]) -> bool:
    return math.prod([extent for extent in shape if extent]) * kind.itemsize >= 1 << 63


def _spread(made: Index, said: Sequence[_Said], sizes: np.ndarray, widened: np.ndarray) -> None:
    """Let entries be views of their files, as those need that are not there as they are.

    OneFlow writes numbers of bfloat16 as float32: each as it is, and two bytes of zeros.
    """
    n = len(made)
    made.entries["offset"][widened] = _UPPER
    storages = np.zeros(n, STORAGE)
    storages["nbytes"] = sizes
    storages["dtype"] = np.where(widened, _FLOAT32.code, made.entries["dtype"])
    storages["file"] = made.entries["file"]
    if sys.byteorder != "little":
        storages["flags"] = np.where(_UNITS[storages["dtype"]] > 1, FOREIGN, 0)
    strides: list[int] = []
    for (kind, shape), wide in zip(said, widened.tolist(), strict=True):
        strides += dense_strides(shape, _FLOAT32.itemsize if wide else kind.itemsize)
    made.strides = np.array(strides, np.int64)
    made.storages, made.storage = storages, np.arange(n, dtype=np.int64)
