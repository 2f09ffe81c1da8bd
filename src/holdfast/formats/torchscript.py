"""TorchScript archives: modules that ``torch.jit.save`` wrote, code and weights.

Layout (a zip archive under one root)::

    data.pkl, data/0, data/1, …             the tree of modules, and its tensors
    constants.pkl, constants/0, …           the tensors that the code names
    code/__torch__/….py (and .debug_pkl)    the classes of the modules
    extra/…                                 whatever the user added
    version, byteorder, .data/serialization_id

Nothing of the code is run or evaluated here. Of each class two lines are read, which say which
attributes of a module are its parameters and which its buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FormatError
from ..layout import Index, Persistent, Resolver
from . import Read, _zip
from ._inert import Global, Record, Tensor
from ._records import NameList, Records
from ._script_pickle import rename_storages
from ._torch_pickle import Pickled, build_index, read_object
from ._torch_zip_read import fill_storages

__all__ = ["EXTRA", "Slim", "claims", "index", "slim"]

#: Folder of the files that the user added.
EXTRA = "extra/"

_MOST_PICKLE = 1 << 30
_MOST_CODE = 64 << 20
_MOST_CLASSES = 1 << 19
#: Put before the keys of constants where tensors of the tree have the same ones.
_PREFIX = "constant."

# The code is not trusted: each of these takes time in proportion to the text, whatever it is. Where
# one has matched the beginning of a line, or of a string, nothing that follows can make it fail.
_CLASS = re.compile(
    r"^class ([^\s(:]+)(\(Module\))?[^\n]*$\n?((?:  __\w+__ = \[[^\n]*\]\n){0,16})", re.M
)
_LINE = re.compile(r"^  __(parameters|buffers)__ = \[(.{0,1048576})\]$", re.M)
_QUOTED = re.compile(r'"([^"\\]*(?:\\.?[^"\\]*)*)(?:"|$)')


def claims(directory: _zip.Directory) -> bool:
    """Whether an archive is a TorchScript one."""
    root = directory.root
    return root is not None and directory.find(f"{root}/constants.pkl") >= 0


def index(read: Read, size: int, name: str, directory: _zip.Directory, *, verify: bool) -> Index:
    """Find the parameters and buffers, under the names of the module's ``state_dict``.

    Files of torch before 1.6 do not say which attributes are buffers: there all tensors are shown.
    """
    del size
    records = Records(read, name, directory, verify=verify)
    tree = _pickled(records, "data", foreign=records.foreign())
    whole = build_index(tree, end=directory.end)
    found = list(_state(tree.root, _Classes(records)))
    names = [text for text, row in found if row >= 0]
    if len({text for text, _ in found}) < len(found):
        raise FormatError(f"{name}: record 'data.pkl': two tensors of the module have one name")
    rows = np.array([row for _, row in found if row >= 0], np.int64)
    special = [text for text, row in found if row < 0]
    return Index(
        names=NameList(names),
        entries=whole.entries[rows],
        dims=whole.dims,
        metadata={},
        framework="torch",
        end=directory.end,
        strides=whole.strides,
        storages=whole.storages,
        storage=None if whole.storage is None else whole.storage[rows],
        flags=None if whole.flags is None else whole.flags[rows],
        locations=whole.locations,
        structure=_Incomplete(name, names, special) if special else None,
        format="torchscript",
        program="torchscript",
    )


@dataclass(frozen=True, slots=True)
class _Incomplete:
    """A module's tensors, some of which are not just elements: quantized or sparse, say.

    The others can be had one by one; a dict that lacks those would not be what was asked for.
    """

    name: str
    names: list[str]
    special: list[str]
    data: bytes = b""
    globals: tuple[str, ...] = ()

    def paths(self) -> Mapping[str, int]:
        """Every name, and its entry."""
        return {text: row for row, text in enumerate(self.names)}

    def replay(
        self,
        tensors: Sequence[Any],  # noqa: ARG002
        storages: Callable[..., object],  # noqa: ARG002
        resolver: Resolver,  # noqa: ARG002
        *,
        encoding: str | None = None,  # noqa: ARG002
    ) -> object:
        """Raise TypeError, with the name of the first such tensor."""
        raise TypeError(
            f"{self.name}: tensor {self.special[0]!r} is quantized, sparse or of another special "
            "kind: weights_only=False gives the module that it is in, and keys= or holdfast.open() "
            "the other tensors"
        )

    def outline(self, leaf: Callable[[int], object]) -> object:
        """A dict of the other tensors."""
        return {text: leaf(row) for row, text in enumerate(self.names)}

    def persistent(self, pid: object) -> Persistent:
        """Raise KeyError: a program has no persistent ids for others to look up."""
        raise KeyError(pid)


def _pickled(records: Records, part: str, *, foreign: bool) -> Pickled:
    """The object pickle of `part` of the archive, every tensor in it checked."""
    record = f"{part}.pkl"
    offset = int(records.directory.rows["offset"][records.row(record)])
    pickled = read_object(
        records.bytes(record, _MOST_PICKLE, parsed=True),
        name=records.name,
        where=record,
        base=offset,
    )
    folder = f"{records.directory.root}/{part}/"
    fill_storages(pickled, records.directory, folder, records.name, foreign=foreign)
    return pickled


# -- names ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Class:
    """What the code says of a class: None where it does not say."""

    module: bool
    parameters: tuple[str, ...] | None
    buffers: tuple[str, ...] | None


@dataclass(slots=True)
class _Classes:
    """The classes of an archive, read as they are asked for."""

    records: Records
    known: dict[tuple[str, str], _Class] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def find(self, cls: Global) -> _Class:
        """The class that a pickle calls so; nothing is known of it where there is no code."""
        if cls.module not in self.read:
            self.read.add(cls.module)
            record = f"code/{cls.module.replace('.', '/')}.py"
            if self.records.find(record) >= 0:
                text = self.records.text(record, _MOST_CODE)
                for i, match in enumerate(_CLASS.finditer(text)):
                    if i == _MOST_CLASSES:
                        raise FormatError(
                            f"{self.records.name}: record {record!r}: expected at most "
                            f"{_MOST_CLASSES} classes, found more"
                        )
                    self.known[cls.module, match[1]] = _class(match)
        return self.known.get((cls.module, cls.name), _Class(True, None, None))


def _class(match: re.Match[str]) -> _Class:
    lists = {
        line[1]: tuple(_unescaped(text) for text in _QUOTED.findall(line[2]))
        for line in _LINE.finditer(match[3])
    }
    return _Class(match[2] is not None, lists.get("parameters"), lists.get("buffers"))


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _state(root: object, classes: _Classes) -> Iterator[tuple[str, int]]:
    """Names and entries of the parameters and buffers, in the order of ``state_dict``.

    The entry is -1 for one that is more than its elements.

    A module that stands at several places is shown at each; no module contains itself.
    """
    effort = 0
    inside: set[int] = set()
    # Each item: a module and its name, or the id of one that is left behind.
    work: list[tuple[object, str] | int] = [(root, "")]
    while work:
        item = work.pop()
        if isinstance(item, int):
            inside.discard(item)
            continue
        module, path = item
        state = _attributes(module)
        if state is None or not isinstance(module, Record) or not isinstance(module.cls, Global):
            continue
        effort += len(path) + len(state) + 1
        if id(module) in inside or effort > _MOST_EFFORT:
            raise FormatError(
                f"{classes.records.name}: record 'data.pkl': the module {path[:100]!r} "
                + ("contains itself" if id(module) in inside else "is one of too many")
            )
        known = classes.find(module.cls)
        if not known.module:
            continue
        for text in _own(state, known):
            effort += len(path) + len(text)
            value = state[text]
            yield path + text, value.entry if isinstance(value, Tensor) else -1
        inside.add(id(module))
        work.append(id(module))
        children = [
            (value, f"{path}{text}.") for text, value in state.items() if isinstance(value, Record)
        ]
        work.extend(reversed(children))


#: One module may stand at many places, and what contains it too: more names (in characters) and
#: attributes than this are refused.
_MOST_EFFORT = 1 << 25


def _attributes(module: object) -> Mapping[str, Any] | None:
    """The attributes of a module by name."""
    state = module.state if isinstance(module, Record) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return None
    return state


def _own(state: Mapping[str, Any], known: _Class) -> list[str]:
    """Which attributes of one module are its parameters and buffers."""
    listed = {*(known.parameters or ()), *(known.buffers or ())}
    tensors = [
        text
        for text, value in state.items()
        if isinstance(value, Tensor)
        or (text in listed and isinstance(value, Record) and value.called)
    ]
    if known.parameters is None:
        return tensors
    first = set(known.parameters)
    rest = set(tensors) - first if known.buffers is None else set(known.buffers) - first
    return [text for text in tensors if text in first] + [text for text in tensors if text in rest]


# -- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slim:
    """A TorchScript archive without its tensors, for a reader that is handed those apart.

    Attributes
    ----------
    records : dict of str to bytes
        The pickles, the code and the version.
    storages : dict of str to int
        Row of the directory for each key that the pickles name.
    """

    records: dict[str, bytes]
    storages: dict[str, int]


def slim(records: Records) -> Slim:
    """Everything of an archive but its tensors.

    Both pickles are checked, so that no tensor in them can reach past its storage; a key means one
    storage, whichever pickle names it.

    Raises
    ------
    FormatError
        The archive is not sound, or has tensors of the byte order of another machine.
    """
    if records.foreign():
        raise FormatError(
            f"{records.name}: a program whose tensors are big-endian cannot be run here; its "
            "parameters and buffers can be loaded, with weights_only=True"
        )
    tree = _pickled(records, "data", foreign=False)
    constants = _pickled(records, "constants", foreign=False)
    storages = {key: records.row(f"data/{key}") for key in tree.keys}
    prefix = _PREFIX if set(storages).intersection(constants.keys) else ""
    for key in constants.keys:
        storages[prefix + key] = records.row(f"constants/{key}")
    kept = {"data.pkl": bytes(tree.data), "constants.pkl": bytes(constants.data)}
    if prefix:
        kept["constants.pkl"] = rename_storages(kept["constants.pkl"], prefix, records.name)
    for record in records.names():
        if record in ("version", ".data/version") or record.startswith("code/"):
            kept[record] = records.bytes(record, _MOST_CODE)
    return Slim(kept, storages)
