# cython: language_level=3, boundscheck=False, wraparound=False
"""The header of a GGUF file, scanned in C, and its blocks of numbers dequantized."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

import numpy as np

__all__ = ["MIN_PAIR", "MIN_TENSOR", "PAIR", "TENSOR", "TYPE", "Fault", "dequantize", "lay",
           "pairs", "strings", "tensors", "texts", "variant"]


cdef extern from "gguf.h" nogil:
    enum:
        HOLD_GGUF_MIN_PAIR, HOLD_GGUF_MIN_TENSOR, HOLD_GGUF_MAX_SHAPE
        HOLD_GGUF_END, HOLD_GGUF_KEY, HOLD_GGUF_KIND, HOLD_GGUF_NESTED, HOLD_GGUF_TRUTH
        HOLD_GGUF_COUNT, HOLD_GGUF_NAME, HOLD_GGUF_NDIM, HOLD_GGUF_EXTENT, HOLD_GGUF_TYPE
        HOLD_GGUF_ROW, HOLD_GGUF_OVERFLOW, HOLD_GGUF_UNALIGNED, HOLD_GGUF_TILING, HOLD_GGUF_SHORT
    ctypedef struct hold_gguf_pair:
        pass
    ctypedef struct hold_gguf_tensor:
        pass
    ctypedef struct hold_gguf_type:
        pass
    ctypedef struct hold_gguf_fault:
        int code
        uint64_t row
        uint64_t position
        uint64_t expected
        uint64_t found
    ctypedef struct hold_gguf_bytes:
        const uint8_t *data
        uint64_t nbytes
        uint64_t at
    ctypedef struct hold_gguf_data:
        uint64_t start
        uint64_t alignment
        int64_t size
    int hold_gguf_pairs(hold_gguf_bytes *, hold_gguf_pair *, uint64_t, hold_gguf_fault *)
    int hold_gguf_tensors(hold_gguf_bytes *, hold_gguf_tensor *, uint64_t, hold_gguf_fault *)
    int hold_gguf_lay(hold_gguf_tensor *, uint64_t, const hold_gguf_type *, uint64_t,
                      const hold_gguf_data *, int64_t *, uint64_t *, hold_gguf_fault *)
    int hold_gguf_strings(hold_gguf_bytes *, uint64_t *, uint64_t *, uint64_t, hold_gguf_fault *)


cdef extern from "dequantize.h" nogil:
    enum:
        HOLD_BLOCK
    ctypedef struct hold_blocks:
        const uint8_t *data
        float *out
        uint64_t count
        int type
    size_t hold_block_size(int)
    int hold_dequantize(const hold_blocks *, size_t, int)
    bint hold_dequantize_variant(size_t, const hold_blocks *)


#: One key and its value: the C struct ``hold_gguf_pair``.
PAIR = np.dtype(
    [("key", "u8"), ("key_length", "u8"), ("value", "u8"), ("count", "u8"), ("nbytes", "u8"),
     ("kind", "i4"), ("element", "i4")],
    align=True,
)
#: One tensor: the C struct ``hold_gguf_tensor``.
TENSOR = np.dtype(
    [("name", "u8"), ("offset", "u8"), ("extents", "i8", 4), ("name_length", "u4"), ("ndim", "u4"),
     ("type", "i4"), ("dtype", "i4"), ("nbytes", "u8"), ("dims", "i8"), ("shape_ndim", "u8")],
    align=True,
)
#: One type of tensors, at the position that is its number: the C struct ``hold_gguf_type``.
TYPE = np.dtype(
    [("elements", "u4"), ("nbytes", "u4"), ("dtype", "i4"), ("raw", "u4")],
    align=True,
)
#: The fewest bytes that a pair takes, and a tensor info.
MIN_PAIR = HOLD_GGUF_MIN_PAIR
MIN_TENSOR = HOLD_GGUF_MIN_TENSOR

assert sizeof(hold_gguf_pair) == PAIR.itemsize and sizeof(hold_gguf_tensor) == TENSOR.itemsize
assert sizeof(hold_gguf_type) == TYPE.itemsize

# What Python calls the codes.
cdef dict _KINDS = {
    HOLD_GGUF_END: "end",
    HOLD_GGUF_KEY: "key",
    HOLD_GGUF_KIND: "kind",
    HOLD_GGUF_NESTED: "nested",
    HOLD_GGUF_TRUTH: "truth",
    HOLD_GGUF_COUNT: "count",
    HOLD_GGUF_NAME: "name",
    HOLD_GGUF_NDIM: "ndim",
    HOLD_GGUF_EXTENT: "extent",
    HOLD_GGUF_TYPE: "type",
    HOLD_GGUF_ROW: "row",
    HOLD_GGUF_OVERFLOW: "overflow",
    HOLD_GGUF_UNALIGNED: "unaligned",
    HOLD_GGUF_TILING: "tiling",
    HOLD_GGUF_SHORT: "short",
}


class Fault(Exception):
    """What is wrong with a header; the format makes a message of it.

    Attributes
    ----------
    kind : str
        One of the values of ``_KINDS``.
    row : int
        The pair or tensor that it is about.
    position : int
        In the bytes that were scanned.
    expected, found : int
        As csrc/gguf.h says for each kind.
    rows : ndarray or None
        What was scanned, of which `row` is the last that has anything.
    """

    def __init__(self, kind, row, position, expected, found, rows=None):
        super().__init__(kind)
        self.kind = kind
        self.row = row
        self.position = position
        self.expected = expected
        self.found = found
        self.rows = rows


cdef object _fault(const hold_gguf_fault *fault, object rows):
    return Fault(_KINDS[fault.code], fault.row, fault.position, fault.expected, fault.found, rows)


cdef _view(data, Py_buffer *view, uint64_t at):
    PyObject_GetBuffer(data, view, PyBUF_SIMPLE)
    if at > <uint64_t>view.len:
        PyBuffer_Release(view)
        raise ValueError(f"expected a position in {len(data)} bytes, found {at}")


def pairs(data, uint64_t at, uint64_t n):
    """Scan `n` pairs that begin at `at`. The caller has seen that there are bytes for so many.

    Returns
    -------
    rows : ndarray of PAIR, shape (n,)
    at : int
        Of the first byte behind them.

    Raises
    ------
    Fault
    """
    cdef Py_buffer view
    cdef hold_gguf_bytes source
    cdef hold_gguf_fault fault
    cdef int rc
    rows = np.zeros(n, PAIR)
    cdef uint8_t[::1] out = rows.view(np.uint8)
    cdef hold_gguf_pair *first = <hold_gguf_pair *>&out[0] if n else NULL
    _view(data, &view, at)
    try:
        source = hold_gguf_bytes(<const uint8_t *>view.buf, view.len, at)
        with nogil:
            rc = hold_gguf_pairs(&source, first, n, &fault)
    finally:
        PyBuffer_Release(&view)
    if rc:
        raise _fault(&fault, rows)
    return rows, source.at


def tensors(data, uint64_t at, uint64_t n):
    """Scan `n` tensor infos that begin at `at`; as :func:`pairs`, with rows of TENSOR."""
    cdef Py_buffer view
    cdef hold_gguf_bytes source
    cdef hold_gguf_fault fault
    cdef int rc
    rows = np.zeros(n, TENSOR)
    cdef uint8_t[::1] out = rows.view(np.uint8)
    cdef hold_gguf_tensor *first = <hold_gguf_tensor *>&out[0] if n else NULL
    _view(data, &view, at)
    try:
        source = hold_gguf_bytes(<const uint8_t *>view.buf, view.len, at)
        with nogil:
            rc = hold_gguf_tensors(&source, first, n, &fault)
    finally:
        PyBuffer_Release(&view)
    if rc:
        raise _fault(&fault, rows)
    return rows, source.at


def lay(rows, types, uint64_t start, uint64_t alignment, int64_t size):
    """Say where tensors stand and what they are in memory: the last columns of their rows.

    Parameters
    ----------
    rows : ndarray of TENSOR, shape (n,)
        From :func:`tensors`; changed in place.
    types : ndarray of TYPE
    start : int
        Of the data, from the start of the file.
    alignment : int
        A power of two.
    size : int
        Of the file; -1 where nobody knows.

    Returns
    -------
    ndarray of int64
        The extents of all tensors, end to end.

    Raises
    ------
    Fault
    """
    cdef uint8_t[::1] own = rows.view(np.uint8)
    cdef const uint8_t[::1] table = types.view(np.uint8)
    cdef uint64_t n = len(rows), ntypes = len(types), ndims = 0
    cdef hold_gguf_data data = hold_gguf_data(start, alignment, size)
    cdef hold_gguf_fault fault
    cdef int rc
    assert rows.dtype == TENSOR and types.dtype == TYPE and ntypes > 0
    assert start < 1 << 62 and 0 < alignment < 1 << 32 and alignment & (alignment - 1) == 0
    dims = np.zeros(HOLD_GGUF_MAX_SHAPE * n, np.int64)
    cdef int64_t[::1] extents = dims
    if n == 0:
        return dims
    with nogil:
        rc = hold_gguf_lay(<hold_gguf_tensor *>&own[0], n, <const hold_gguf_type *>&table[0],
                           ntypes, &data, &extents[0], &ndims, &fault)
    if rc:
        raise _fault(&fault, rows)
    return dims[:ndims].copy()


def texts(data, const uint64_t[::1] starts, const uint64_t[::1] lengths, bytes errors=None):
    """The UTF-8 at some places of `data`, each a str.

    Raises
    ------
    UnicodeDecodeError
        One is no UTF-8, and `errors` does not say what else it is (b"surrogateescape").
    """
    cdef Py_buffer view
    cdef Py_ssize_t i
    cdef list found = []
    cdef const char *how = NULL
    if errors is not None:
        how = errors
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        for i in range(starts.shape[0]):
            if starts[i] > <uint64_t>view.len or lengths[i] > <uint64_t>view.len - starts[i]:
                raise ValueError(f"expected a place in {view.len} bytes, found {starts[i]}")
            found.append(PyUnicode_DecodeUTF8(<const char *>view.buf + starts[i],
                                              <Py_ssize_t>lengths[i], how))
    finally:
        PyBuffer_Release(&view)
    return found


def strings(data, uint64_t at, uint64_t n):
    """The `n` strings of an array that begins at `at` and that :func:`pairs` has passed over.

    Bytes that are no UTF-8 become surrogates, so that nothing is lost.
    """
    cdef Py_buffer view
    cdef hold_gguf_bytes source
    cdef hold_gguf_fault fault
    cdef int rc
    starts, lengths = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    cdef uint64_t[::1] first = starts, length = lengths
    if n == 0:
        return []
    _view(data, &view, at)
    try:
        source = hold_gguf_bytes(<const uint8_t *>view.buf, view.len, at)
        with nogil:
            rc = hold_gguf_strings(&source, &first[0], &length[0], n, &fault)
    finally:
        PyBuffer_Release(&view)
    if rc:
        raise _fault(&fault, None)
    return texts(data, starts, lengths, b"surrogateescape")


cdef _runs(const uint64_t[::1] data, const uint64_t[::1] out, const uint64_t[::1] count,
           const int32_t[::1] type):
    """Rows of ``hold_blocks``, in a bytearray."""
    cdef Py_ssize_t i, n = data.shape[0]
    rows = bytearray(n * sizeof(hold_blocks))
    cdef uint8_t[::1] own = rows
    cdef hold_blocks *first = <hold_blocks *>&own[0] if n else NULL
    assert out.shape[0] == count.shape[0] == type.shape[0] == n
    for i in range(n):
        if hold_block_size(type[i]) == 0:
            raise ValueError(f"blocks of type {type[i]} cannot be dequantized")
        first[i].data = <const uint8_t *><uintptr_t>data[i]
        first[i].out = <float *><uintptr_t>out[i]
        first[i].count = count[i]
        first[i].type = type[i]
    return rows


def dequantize(data, out, count, type, int threads=0):
    """Blocks of numbers to float32, by several threads.

    Parameters
    ----------
    data, out : ndarray of uint64, shape (n,)
        Addresses of the blocks of each run, and of where its numbers go, 32 for each block.
    count : ndarray of uint64, shape (n,)
        Blocks of each run.
    type : ndarray of int32, shape (n,)
        What they are, by the number that GGUF has for it.
    threads : int
        0: one for each CPU.
    """
    rows = _runs(data, out, count, type)
    cdef uint8_t[::1] own = rows
    cdef size_t n = len(data)
    cdef int rc
    if n == 0:
        return
    with nogil:
        rc = hold_dequantize(<const hold_blocks *>&own[0], n, threads)
    if rc == -ENOMEM:
        raise MemoryError
    assert rc == 0


def variant(size_t which, uint64_t data, uint64_t out, uint64_t count, int type):
    """Dequantize a run with one variant of the code; False where there is no such. For tests."""
    cdef hold_blocks run
    if hold_block_size(type) == 0:
        raise ValueError(f"blocks of type {type} cannot be dequantized")
    run = hold_blocks(<const uint8_t *><uintptr_t>data, <float *><uintptr_t>out, count, type)
    return hold_dequantize_variant(which, &run)
