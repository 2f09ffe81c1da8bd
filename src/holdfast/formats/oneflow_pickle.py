"""The folder that OneFlow since 0.6 saves: a pickle, and the elements of its tensors beside it.

In ``pickled_data`` each tensor is the name of a sub-folder, in which ``out`` has the elements and
``meta`` says what they are.
"""

from __future__ import annotations

from ..errors import FormatError
from ..layout import Folder, Index
from ._garbage import uncollected
from ._oneflow_meta import parse_all, read_all
from ._oneflow_pickle_index import Member, What, build
from ._oneflow_pickle_object import Found, read_pickle
from ._oneflow_pickle_state import folder_of

__all__ = ["LINKS", "index_folder", "sniff_folder"]

#: OneFlow makes no symbolic links.
LINKS = False

PICKLE, META, DATA = "pickled_data", "meta", "out"


def sniff_folder(folder: Folder) -> bool:
    """Whether a folder is of this format; a variable may be called as the pickle is."""
    return folder.entries().get(PICKLE, "folder") != "folder"


def index_folder(folder: Folder, *, verify: bool, strict: bool) -> Index:  # noqa: ARG001
    """Find the tensors of a folder with ``pickled_data``.

    Only the sub-folders that the pickle names are looked at: others are left from earlier saves.

    Parameters
    ----------
    verify, strict : bool
        Change nothing: this format has no checksums, and nothing says that a save is complete.

    Raises
    ------
    FormatError
        Anything that is not as OneFlow writes it, or of another size.
    """
    with uncollected():
        return _index(folder)


def _index(folder: Folder) -> Index:
    """What :func:`index_folder` returns."""
    name = f"{folder.name.rstrip('/')}/{PICKLE}"
    pickle = folder.part(PICKLE)
    found = read_pickle(pickle.read, pickle.size, name)
    assert found is not None
    if found.end != pickle.size:
        raise FormatError(f"{name}: the pickle ends at {found.end}, the file at {pickle.size}")
    first: dict[str, int] = {}  # the first tensor of each sub-folder
    for i, record in enumerate(found.tensors):
        path = folder_of(record, What(found, folder.name, i))
        if path is not None:
            first.setdefault(path, i)
    members = _members(folder, found, first)
    made = build(found, members, folder.name, len(members))
    made.files = [*(f"{path}/{DATA}" for path in members), PICKLE]
    made.format = "oneflow_pickle"
    return made


def _members(folder: Folder, found: Found, first: dict[str, int]) -> dict[str, Member]:
    """The sub-folders that tensors name, each with what it says of its elements."""
    texts = read_all(folder, [f"{path}/{META}" for path in first])
    sizes = folder.sizes([f"{path}/{DATA}" for path in first]).tolist()
    what = [What(found, f"{folder.name.rstrip('/')}/{path}", row) for path, row in first.items()]
    for text, size, who in zip(texts, sizes, what, strict=True):
        if text is None or size < 0:
            raise FormatError(
                f"{who}: expected a folder with {META!r} and {DATA!r}, found "
                f"no {META if text is None else DATA!r}"
            )
    said = parse_all([text or b"" for text in texts], what)
    return {
        path: (number, dtype, shape, size)
        for number, (path, (dtype, shape), size) in enumerate(zip(first, said, sizes, strict=True))
    }
