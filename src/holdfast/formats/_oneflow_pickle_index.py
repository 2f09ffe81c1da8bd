"""From what is in a pickle of OneFlow to an index: the rows of its tensors, and the object."""

from __future__ import annotations

from collections.abc import Mapping

from ..dtypes import DType
from ..layout import Index
from ._oneflow_pickle_object import Found
from ._oneflow_pickle_state import Columns, array_of, dtype_of, kind_of
from ._torch_pickle import build_index

__all__ = ["Member", "What", "build"]

#: A sub-folder that has the elements of a tensor: number of the file, type, shape and bytes.
Member = tuple[int, DType, tuple[int, ...], int]


class What:
    """File and tensor, for messages; the name of the tensor is found when there is one."""

    __slots__ = ("_found", "_name", "_row")

    def __init__(self, found: Found, name: str, row: int) -> None:
        self._found = found
        self._name = name
        self._row = row

    def __str__(self) -> str:
        return f"{self._name}: tensor {self._found.pickled.names.tolist()[self._row]!r}"


def build(found: Found, members: Mapping[str, Member], name: str, pickle: int) -> Index:
    """The index of an object and its tensors.

    Parameters
    ----------
    found : Found
    members : mapping of str to tuple
        The sub-folders that tensors name.
    name : str
        Of the file or folder, for messages.
    pickle : int
        Number of the file that the pickle is.

    Raises
    ------
    FormatError
        The elements of a tensor are not as many, or not of the type, that is said of them.
    """
    columns = Columns()
    pickled = found.pickled
    offsets, sizes = found.blocks["offset"].tolist(), found.blocks["nbytes"].tolist()
    for row, record in enumerate(found.tensors):
        what = What(found, name, row)
        path = record.state.get("path")
        if path is not None:
            number, dtype, shape, nbytes = members[path]
            columns.add(dtype, shape, (number, 0, nbytes), what)
        else:
            array = array_of(record.state["data"], what)
            dtype = dtype_of(record.state, what)
            place = (pickle, offsets[array.block], sizes[array.block])
            columns.add(
                dtype,
                array.shape,
                place,
                what,
                held=array.dtype,
                fortran=array.fortran,
                foreign=array.foreign,
            )
        kind = kind_of(record, dtype)
        if kind:
            pickled.kinds[row] = kind
    pickled.entries = columns.entries()
    pickled.dims = columns.dims()
    pickled.strides = columns.strides()
    pickled.storage = columns.storage()
    pickled.dense = not columns.strided
    pickled.storages = columns.storages()
    pickled.locations = []
    made = build_index(pickled, framework="oneflow")
    made.entries = pickled.entries
    made.locations = None
    made.inert = True
    return made
