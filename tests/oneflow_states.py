"""Checkpoints of OneFlow put together by hand: folders of variables, and pickles by opcodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.dtypes import BY_NAME
from holdfast.folder import FolderSource
from holdfast.formats import oneflow_file, oneflow_pickle, oneflow_snapshot
from holdfast.formats._oneflow_meta import meta_text
from holdfast.layout import Index
from pickle_files import call, items, name, number, numbers, pairs, text

FLOAT, INT64, BFLOAT16 = 2, 6, 11
#: Bytes of pickles, without running into a protocol that lacks an opcode.
PROTO = b"\x80\x04"


# -- folders -------------------------------------------------------------------------------------


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal in type, shape and elements; old releases of NumPy have no ``strict=`` for it."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def meta(shape: Sequence[int], dtype: str) -> bytes:
    """The text that OneFlow writes."""
    return meta_text(shape, BY_NAME[dtype].code)


def variable(folder: Path, shape: Sequence[int], dtype: str, data: bytes) -> None:
    """One sub-folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta").write_bytes(meta(shape, dtype))
    (folder / "out").write_bytes(data)


def snapshot(folder: Path, arrays: Mapping[str, np.ndarray], *, done: bool = True) -> Path:
    """A folder as OneFlow before 0.6 wrote it."""
    folder.mkdir(exist_ok=True)
    for key, array in arrays.items():
        variable(folder / key, array.shape, array.dtype.name, array.tobytes())
    if done:
        (folder / "snapshot_done").write_bytes(b"")
    return folder


def index_folder(folder: Path, *, strict: bool = False) -> Index:
    """What a load finds in a folder, whichever of the formats it is."""
    source = FolderSource(folder)
    try:
        forms: tuple[Any, ...] = (oneflow_pickle, oneflow_snapshot)
        form = next(form for form in forms if form.sniff_folder(source))
        found: Index = form.index_folder(source, verify=True, strict=strict)
        for text in source.notes:
            warnings.warn(text, UserWarning, stacklevel=2)
        return found
    finally:
        source.close()


# -- pickles -------------------------------------------------------------------------------------


def dtype(code: int) -> bytes:
    """A dtype of OneFlow's."""
    return name("oneflow._oneflow_internal", "dtype") + b")\x81" + number(code) + b"b"


def numpy_dtype(descr: str) -> bytes:
    """A dtype of NumPy's, ``"<f4"`` say."""
    none = b"N" * 3 + number(-1) * 2 + number(0)
    made = call("numpy", "dtype", text(descr[1:]), b"\x89", b"\x88")
    return made + b"(" + number(3) + text(descr[0]) + none + b"tb"


def binary(data: bytes) -> bytes:
    """Bytes, as protocol 3 and later have them."""
    if len(data) < 256:
        return b"C" + bytes([len(data)]) + data
    return b"B" + len(data).to_bytes(4, "little") + data


def array(
    shape: Sequence[int],
    descr: str,
    data: bytes,
    *,
    fortran: bool = False,
    module: str = "numpy.core.multiarray",
) -> bytes:
    """An array as NumPy pickles it."""
    made = name("numpy", "ndarray"), numbers((0,)), binary(b"b")
    state = number(1), numbers(shape), numpy_dtype(descr), b"\x88" if fortran else b"\x89"
    return call(module, "_reconstruct", *made) + items(*state, binary(data)) + b"b"


def of(value: np.ndarray, **how: Any) -> bytes:
    """An array as NumPy pickles it."""
    order = "F" if how.get("fortran") else "C"
    return array(value.shape, value.dtype.str, value.tobytes(order), **how)


def tensor(state: bytes, module: str = "oneflow", cls: str = "Tensor") -> bytes:
    """A tensor with this state."""
    return name(module, cls) + b")\x81" + state + b"b"


def beside(path: str, **cls: str) -> bytes:
    """A tensor whose elements are in a sub-folder."""
    return tensor(pairs({"path": text(path)}), **cls)


def inside(data: bytes, code: int, **cls: str) -> bytes:
    """A tensor whose elements are in the pickle."""
    parts = {"data": data, "dtype": dtype(code), "device": text("cpu")}
    return tensor(pairs(parts), **cls)


def saved(obj: bytes, *, magic: str | None = "__oneflow__", version: bytes = b"K\x01") -> bytes:
    """The pickle that is around an object."""
    parts = {"protocol_version": version}
    if magic is not None:
        parts[magic] = b"N"
    return PROTO + pairs({**parts, "data": obj}) + b"."


def pickle_folder(folder: Path, obj: bytes, arrays: Mapping[str, np.ndarray]) -> Path:
    """A folder as OneFlow since 0.6 writes it."""
    snapshot(folder, arrays, done=False)
    (folder / "pickled_data").write_bytes(saved(obj, magic=None))
    return folder


def index_file(data: bytes, size: int | None = None) -> Index:
    """What a load finds in a single file."""

    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert nbytes >= 0
        found = data[offset : offset + nbytes]
        if len(found) != nbytes:
            raise oneflow_file.FormatError("x: too short")
        return found

    assert oneflow_file.sniff(data[:512], len(data))
    return oneflow_file.index(read, len(data) if size is None else size, "x", verify=True)


# -- what was found ------------------------------------------------------------------------------


def values(index: Index, read: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    """Every tensor; of types that NumPy lacks, unsigned integers of their size."""
    found = {}
    for i, key in enumerate(index.names.tolist()):
        entry, row, shape = index.entries[i], index.dtype(i), index.shape(i)
        data = read("" if index.files is None else index.files[int(entry["file"])])
        kind = np.dtype(f"u{row.itemsize}" if row.ml_dtypes or row.numpy is None else row.numpy)
        strides = None
        if index.strides is not None:
            first = int(entry["dims"])
            strides = tuple(index.strides[first : first + len(shape)].tolist())
        offset = int(entry["offset"])
        if 0 in shape:
            found[key] = np.empty(shape, kind)
            continue
        found[key] = np.ndarray(shape, kind, data, offset, strides).copy()
        if index.storages is not None and index.storage is not None:
            own = index.storages[index.storage[i]]
            assert own["offset"] <= offset
            assert offset + int(entry["nbytes"]) <= int(own["offset"]) + int(own["nbytes"])
            if own["flags"]:
                found[key] = found[key].byteswap()
    return found


def folder_values(folder: Path, index: Index) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    return values(index, lambda file: (folder / file).read_bytes())
