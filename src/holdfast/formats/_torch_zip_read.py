"""Reading the archives that torch.save writes since PyTorch 1.6; see torch_zip for their layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from ..layout import CHECKED, FOREIGN, Index
from ._records import most_parsed
from ._torch_pickle import Pickled, build_index, read_object
from ._zip import Directory, extract

__all__ = ["claims", "fill_storages", "index"]

Read = Callable[[int, int], bytes | memoryview]

#: What the pickle of an object may take at most, in bytes: far more than any object needs whose
#: tensors stand beside it, and less than would exhaust the memory.
MAX_PICKLE = 4 << 30
#: The same for the small records that say one thing.
_MAX_RECORD = 1 << 20


def claims(directory: Directory) -> bool:
    """Whether this is an archive of torch.save."""
    return directory.root is not None and directory.find(f"{directory.root}/data.pkl") >= 0


def index(read: Read, size: int, name: str, directory: Directory, *, verify: bool = True) -> Index:
    """Find the tensors; the pickle is read, never run.

    Raises
    ------
    FormatError
        The pickle is malformed, or a storage that it names is not there or has another size.
    """
    del size
    root = directory.root
    row = directory.find(f"{root}/data.pkl")
    most = most_parsed(directory, row, MAX_PICKLE)
    data = extract(read, directory, row, name, limit=most, verify=verify)
    pickled = read_object(data, name=name, where=f"{root}/data.pkl")
    order = _text(read, directory, name, "byteorder", verify)
    if order not in (None, "little", "big"):
        raise FormatError(
            f"{name}: record '{root}/byteorder': expected 'little' or 'big', found {order[:40]!r}"
        )
    fill_storages(pickled, directory, f"{root}/data/", name, foreign=order == "big")
    own = _own(read, directory, name, verify)
    found = build_index(
        pickled,
        metadata=own.get("metadata", {}),
        framework=own.get("framework", "torch"),
        end=directory.end,
    )
    found.format = "torch"
    found.byteorder = order
    return found


def fill_storages(
    pickled: Pickled, directory: Directory, folder: str, name: str, *, foreign: bool = False
) -> None:
    """Say where the storages of a pickle are: those of the records in `folder` with their keys.

    Raises
    ------
    FormatError
        A record is missing, or has another size than the pickle says.
    """
    find = directory.find
    rows = np.array([find(folder + key) for key in pickled.keys], np.int64)
    for i in np.flatnonzero(rows < 0).tolist():
        raise FormatError(
            f"{name}: storage {pickled.keys[i]!r}: expected a record {folder + pickled.keys[i]!r}, "
            "found none of that name"
        )
    records = directory.rows[rows]
    storages = pickled.storages
    for i in np.flatnonzero(records["size"] != storages["nbytes"]).tolist():
        raise FormatError(
            f"{name}: storage {pickled.keys[i]!r}: expected {int(storages['nbytes'][i])} bytes at "
            f"offset {int(records['offset'][i])}, found a record of {int(records['size'][i])}"
        )
    storages["offset"] = records["offset"]
    storages["packed"] = np.where(records["method"] == 0, 0, records["packed"])
    storages["crc"] = records["crc"]
    # A CRC of 0 says that it was not computed.
    checked = (records["crc"] != 0) | (records["size"] == 0)
    storages["flags"] = np.where(checked, CHECKED, 0) | (FOREIGN if foreign else 0)


def _text(read: Read, directory: Directory, name: str, record: str, verify: bool) -> str | None:
    """The text of a small record, or None where there is no such."""
    row = directory.find(f"{directory.root}/{record}")
    if row < 0:
        return None
    data = extract(read, directory, row, name, limit=_MAX_RECORD, verify=verify)
    return data.decode("utf-8", "replace")


def _own(read: Read, directory: Directory, name: str, verify: bool) -> Mapping[str, Any]:
    """What holdfast says besides in a file that it wrote; nothing of another's."""
    text = _text(read, directory, name, ".holdfast", verify)
    if text is None:
        return {}
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: record '.holdfast' is not JSON: {error}") from None
    metadata = found.get("metadata", {}) if isinstance(found, dict) else None
    framework = found.get("framework", "torch") if isinstance(found, dict) else None
    if (
        not isinstance(framework, str)
        or not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
    ):
        raise FormatError(
            f"{name}: record '.holdfast': expected an object with 'framework' and 'metadata' of "
            f"text, found {text[:80]!r}"
        )
    return {"framework": framework, "metadata": metadata}
