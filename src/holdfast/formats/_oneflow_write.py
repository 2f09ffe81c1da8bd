"""OneFlow's checkpoints laid out: the snapshot folder, the folder around a pickle, the single file.

In both folders the bytes of a tensor are a file of their own, ``out``, beside a text that says what
they are, ``meta``. The single file is a pickle with the elements in it; padding, which an unpickler
drops, has them begin at multiples of 64.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from ..dtypes import BY_NAME, DTYPES
from ..layout import FolderPlan, Pieces, Plan
from ..views import TensorBatch
from ._oneflow_emit import Emitted, integer, text
from ._oneflow_meta import BY_NUMBER, NUMBERS, meta_text

__all__ = ["check_elements", "check_names", "plan_file", "plan_folder", "plan_snapshot", "seal"]

DATA, META, DONE, PICKLE = "out", "meta", "snapshot_done", "pickled_data"

#: Of elements in a single file, in bytes.
ALIGNMENT = 64

#: Codes of the element types that OneFlow can load.
_LOADABLE = [code for code, number in NUMBERS.items() if BY_NUMBER[number].loadable]
#: Those that builds newer than 0.9.0, the last release, are needed for: written only where the
#: tensors are such a build's own.
_NEWER = frozenset(BY_NAME[name].code for name in ("int16", "complex64", "complex128"))

_BFLOAT16 = BY_NAME["bfloat16"].code

#: For the others what turns them into one of these.
_WAYS = {
    "int16": "x.int()",
    "uint16": "x.int()",
    "uint32": "x.long()",
    "uint64": "x.long(), if its values are below 2**63",
    "complex32": "torch.view_as_real(x)",
    "complex64": "torch.view_as_real(x)",
    "complex128": "torch.view_as_real(x)",
}

#: NumPy's names of the element types, in a pickle: whether they have a byte order, and which.
_NUMPY = {code: np.dtype(DTYPES[code].name).newbyteorder("<").str for code in _LOADABLE}
_SHORT, _LONG = (1 << 8), (1 << 32)


# -- what can be held ----------------------------------------------------------------------------


def check_elements(
    names: Sequence[str],
    batch: TensorBatch,
    kinds: Mapping[int, str],
    framework: str | None,
    *,
    inline: bool = False,
) -> None:
    """Raise TypeError for a tensor that OneFlow could not load; the message says the way out.

    Parameters
    ----------
    names : sequence of str
    batch : TensorBatch
    kinds : mapping of int to str
        Of the rows that a plain tensor does not say all of.
    framework : str or None
        Whose tensors these are: ``"oneflow"`` can load what it has.
    inline : bool
        Whether they go into a pickle, from which OneFlow makes bfloat16 of float32. Of a ``meta``
        that says bfloat16 it does not.
    """
    for i, kind in kinds.items():
        _, found, dtype = kind.rpartition("dtype:")
        if found:
            raise _refusal(names[i], dtype, None)
    allowed = np.zeros(len(DTYPES), np.bool_)
    allowed[[code for code in _LOADABLE if framework == "oneflow" or code not in _NEWER]] = True
    allowed[_BFLOAT16] = inline
    wrong = np.flatnonzero(~allowed[batch.views["dtype"]])
    if len(wrong):
        i = int(wrong[0])
        name = DTYPES[int(batch.views["dtype"][i])].name
        raise _refusal(names[i], name, _WAYS.get(name, "x.float()"))


def _refusal(name: str, dtype: str, way: str | None) -> TypeError:
    other = "a .safetensors or .pt file holds it as it is"
    if dtype == "bfloat16":
        other = f"layout='file', which newer builds read, or {other}"
    out = f"save {way}; {other}" if way else other
    return TypeError(f"tensor {name!r}: OneFlow cannot load elements of {dtype}: {out}")


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless every name can be that of a folder of its own.

    Refused is what would leave the folder, stand for a file of OneFlow's own, or meet another name:
    also where a file system does not tell upper from lower case.
    """
    known: dict[str, str] = {}
    for name in names:
        why = _why_not(name)
        if why:
            raise _unfit(name, why)
        other = known.setdefault(_folded(name), name)
        if other is not name:
            raise _unfit(name, f"only its case differs from that of {other!r}")
    for folded, name in known.items():
        at = folded.find("/")
        while at >= 0:
            if folded[:at] in known:
                raise _unfit(name, f"it lies in the folder of {known[folded[:at]]!r}")
            at = folded.find("/", at + 1)


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else name.casefold()


def _why_not(name: str) -> str | None:
    """Why a name cannot be that of a folder, or None."""
    if "\0" in name:
        return "it contains a NUL"
    parts = _folded(name).split("/")
    if "" in parts:
        return "it is absolute" if name.startswith("/") else "a part of it is empty"
    if "." in parts or ".." in parts:
        return "it leads out of its own folder"
    if parts[0] in (DONE, PICKLE):
        return f"{parts[0]!r} is a file of OneFlow's own"
    if len(parts) > 1 and parts[-1] in (META, DATA):
        return f"{parts[-1]!r} is a file of a tensor"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "it is no Unicode text"
    return None


def _unfit(name: str, why: str) -> ValueError:
    return ValueError(
        f"tensor {name!r}: {why}, so it cannot be a folder; rename it, or save with layout='pickle'"
    )


# -- folders -------------------------------------------------------------------------------------


def plan_snapshot(names: Sequence[str], batch: TensorBatch) -> FolderPlan:
    """A folder for each tensor, called what the tensor is, and ``snapshot_done`` written last.

    Raises
    ------
    ValueError
        A name that cannot be that of a folder.
    """
    check_names(names)
    texts = _metas(names, batch)
    texts[DONE] = b""
    return FolderPlan([f"{name}/{DATA}" for name in names], texts, DONE)


def plan_folder(emitted: Emitted, batch: TensorBatch, kinds: Mapping[int, str]) -> FolderPlan:
    """A folder around the pickle of an object, in which each tensor has a sub-folder.

    Parameters
    ----------
    emitted : Emitted
        With ``CONSTANTS``.
    batch : TensorBatch
        Its tensors.
    kinds : mapping of int to str
        Which of them are parameters.
    """
    names = [f"tensor_{i}" for i in range(len(emitted.tensors))]
    parts = []
    for i, part in enumerate(_split(emitted)):
        if i:
            path = emitted.constant("path") + text(names[i - 1])
            parts += [_opened(emitted, kinds.get(i - 1, "")), path, b"sb"]
        parts.append(part)
    texts = _metas(names, batch)
    texts[PICKLE] = b"".join(parts)
    return FolderPlan([f"{name}/{DATA}" for name in names], texts, PICKLE)


def _metas(names: Sequence[str], batch: TensorBatch) -> dict[str, bytes]:
    dims = batch.dims.tolist()
    first, ndim, codes = (batch.views[field].tolist() for field in ("dims", "ndim", "dtype"))
    return {
        f"{name}/{META}": meta_text(dims[start : start + n], code)
        for name, start, n, code in zip(names, first, ndim, codes, strict=True)
    }


# -- the pickle ----------------------------------------------------------------------------------


def _split(emitted: Emitted) -> list[bytes]:
    """What stands before, between and after the tensors of a pickle."""
    ends = [0, *emitted.places, len(emitted.data)]
    return [emitted.data[a:b] for a, b in itertools.pairwise(ends)]


def _opened(emitted: Emitted, kind: str) -> bytes:
    """An instance of a tensor's class, with its number, and an empty dict for its state."""
    parameter = kind.rpartition(":")[2].startswith("parameter")
    cls = ("oneflow.nn", "Parameter") if parameter else ("oneflow", "Tensor")
    return emitted.constant(cls) + b")\x81\x94}"


def plan_file(
    emitted: Emitted,
    batch: TensorBatch,
    kinds: Mapping[int, str],
    narrow: frozenset[int] = frozenset(),
) -> Plan:
    """A file that is the pickle of an object, with the elements of its tensors in it.

    Parameters
    ----------
    emitted : Emitted
        With ``INLINE_CONSTANTS``.
    batch, kinds
        As for :func:`plan_folder`; what OneFlow has as bfloat16 is float32 in the batch.
    narrow : frozenset of int
        Which rows these are.
    """
    parts = _split(emitted)
    dims, sizes = batch.dims.tolist(), batch.views["nbytes"].tolist()
    offsets, starts = [], []  # of the elements, and of what stands after them, in the file
    own: list[bytes] = [parts[0]]
    at = len(parts[0])
    for i, nbytes in enumerate(sizes):
        row = batch.views[i]
        first = int(row["dims"])
        shape = dims[first : first + int(row["ndim"])]
        head = _opened(emitted, kinds.get(i, "")) + _array(emitted, shape, int(row["dtype"]))
        head += _padded(at + len(head), nbytes)
        offsets.append(at + len(head))
        starts.append(offsets[-1] + nbytes)
        tail = (
            b"tb" + _rest(emitted, _BFLOAT16 if i in narrow else int(row["dtype"])) + parts[i + 1]
        )
        own += [head, tail]
        at = starts[-1] + len(tail)
    return Plan(
        offsets=np.array(offsets, np.uint64),
        size=at,
        early=np.zeros(len(sizes), np.bool_),
        state=_pieces(own, starts),
    )


def _array(emitted: Emitted, shape: list[int], code: int) -> bytes:
    """An array's beginning: ``'data'``, what makes it, and its state up to the elements."""
    known = emitted.constant
    made = known(("numpy.core.multiarray", "_reconstruct")) + known(("numpy", "ndarray"))
    descr = _NUMPY[code]
    order = text(descr[0]) + b"NNN" + 2 * integer(-1) + integer(0)
    dtype = known(("numpy", "dtype")) + text(descr[1:]) + b"\x89\x88\x87R(" + integer(3) + order
    extents = b"(" + b"".join([integer(extent) for extent in shape]) + b"t"
    begun = b"(" + known("data") + made + integer(0) + b"\x85C\x01b\x87R(" + integer(1)
    return begun + extents + dtype + b"tb\x89"


def _rest(emitted: Emitted, code: int) -> bytes:
    """A tensor's end: its dtype and its device."""
    known = emitted.constant
    dtype = known(("oneflow._oneflow_internal", "dtype")) + b")\x81" + integer(NUMBERS[code]) + b"b"
    return known("dtype") + dtype + known("device") + known("cpu") + b"ub"


def _padded(at: int, nbytes: int) -> bytes:
    """What stands before so many bytes, so that they begin at a multiple of ALIGNMENT.

    Padding is a text of zeros, pushed and dropped.
    """
    if nbytes < _SHORT:
        head = b"C" + bytes((nbytes,))
    elif nbytes < _LONG:
        head = b"B" + struct.pack("<I", nbytes)
    else:
        head = b"\x8e" + struct.pack("<Q", nbytes)
    lack = -(at + len(head)) % ALIGNMENT
    if nbytes == 0 or lack == 0:
        return head
    lack += ALIGNMENT if lack < 3 else 0
    return b"C" + bytes((lack - 3,)) + bytes(lack - 3) + b"0" + head


def _pieces(own: list[bytes], starts: list[int]) -> Pieces:
    """The format's own bytes: what stands before each tensor's elements, and after the last."""
    runs = [own[0]]
    if starts:
        runs = [own[0] + own[1]]
        for i in range(2, len(own) - 1, 2):
            runs.append(own[i] + own[i + 1])
        runs.append(own[-1])
    sizes = np.array([len(run) for run in runs], np.uint64)
    return Pieces(
        b"".join(runs),
        np.array([0, *starts], np.uint64),
        sizes,
        np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[:-1]).astype(np.int64)]),
    )


def seal(plan: Plan, crcs: np.ndarray | None, early: bool = False) -> Pieces:  # noqa: ARG001
    """What stands around the tensors of a single file: all of it with `early`, then nothing."""
    pieces: Pieces = plan.state
    if early:
        return pieces
    return Pieces(b"", pieces.offset[:0], pieces.nbytes[:0], pieces.start[:0])
