"""The single file that builds of OneFlow since 2023 save: a pickle, with the elements in it."""

from __future__ import annotations

from ..errors import FormatError
from ..layout import Index
from . import Read
from ._garbage import uncollected
from ._oneflow_pickle_index import What, build
from ._oneflow_pickle_object import read_pickle
from ._oneflow_pickle_state import folder_of

__all__ = ["NEEDS_SIZE", "index", "sniff"]

#: It is read from its beginning.
NEEDS_SIZE = False


def sniff(prefix: bytes, size: int) -> bool:  # noqa: ARG001
    """Whether a file that begins with `prefix` may be of this format.

    It may where a pickle names OneFlow at its beginning; :func:`index` finds out whether it is.
    """
    return (
        prefix[:1] == b"\x80"
        and prefix[1:2] in (b"\2", b"\3", b"\4", b"\5")
        and (b"oneflow" in prefix)
    )


def index(read: Read, size: int, name: str, *, verify: bool) -> Index:  # noqa: ARG001
    """Find the tensors of a single file.

    Of their elements nothing is read. Bytes behind the pickle are left alone, as OneFlow does.

    Parameters
    ----------
    verify : bool
        Changes nothing: this format has no checksums.

    Raises
    ------
    FormatError
        Anything that is not as OneFlow writes it, or too short.
    """
    with uncollected():
        return _index(read, size, name)


def _index(read: Read, size: int, name: str) -> Index:
    """What :func:`index` returns."""
    found = read_pickle(read, size, name, single=True)
    if found is None:
        raise FormatError(f"{name}: this is a pickle, which cannot be read here")
    for i, record in enumerate(found.tensors):
        what = What(found, name, i)
        path = folder_of(record, what)
        if path is not None:
            raise FormatError(
                f"{what}: its elements are in a sub-folder, {path!r}: this file is the "
                f"'pickled_data' of a folder, which is to be loaded itself"
            )
    made = build(found, {}, name, 0)
    made.end = found.end
    made.format = "oneflow_file"
    return made
