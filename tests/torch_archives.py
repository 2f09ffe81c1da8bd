"""Archives of torch.save that torch itself would not write, but others do: made byte by byte."""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO
from typing import Any

import numpy as np

from holdfast.dtypes import DTYPES
from holdfast.pickling import pickle_object
from torch_files import content
from zip_files import Record, build


def archive(
    obj: Any,
    *,
    method: int = 0,
    byteorder: str | None = None,
    odd: bool = False,
    checksum: bool = True,
    units: dict[int, int] | None = None,
) -> bytes:
    """The archive of an object.

    Parameters
    ----------
    method : {0, 8}
        Whether storages are deflated.
    byteorder : str, optional
        Content of the record of that name. With ``"big"`` storages are written so.
    odd : bool
        Whether storages begin at odd offsets.
    units : dict of int to int
        How many bytes of a storage are one number, where its type does not say so.
    """
    found = pickle_object(obj)
    records = [Record("a/data.pkl", found.data)]
    if byteorder is not None:
        records.append(Record("a/byteorder", byteorder.encode()))
    for i, key in enumerate(found.keys):
        view = found.batch[i]
        data = content(view)
        unit = (units or {}).get(i, DTYPES[view.dtype.code].unit)
        if byteorder == "big" and unit > 1:
            data = np.frombuffer(data, f"u{unit}").byteswap().tobytes()
        stated = {} if checksum else {"crc": 0}
        record = Record(f"a/data/{key}", data, method, local=dict(stated), central=dict(stated))
        if odd:
            start = len(build(records)) - len(_tail(records))
            lead = start + 30 + len(record.raw) + 4
            padding = lead % 2 == 0
            record.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        records.append(record)
    return build([*records, Record("a/version", b"3\n")])


def _tail(records: list[Record]) -> bytes:
    """What follows the last record of an archive."""
    data = build(records)
    return data[int.from_bytes(data[-6:-2], "little") :]


def rewritten(data: bytes) -> bytes:
    """An archive as Python's zipfile writes it again, with every record deflated."""
    out = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(data)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def damaged(data: bytes, what: bytes) -> bytes:
    """`data` with a bit flipped in the middle of the only place where `what` stands."""
    at = data.index(what)
    assert data.find(what, at + 1) < 0
    out = bytearray(data)
    out[at + len(what) // 2] ^= 16
    return bytes(out)
