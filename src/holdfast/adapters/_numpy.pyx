# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""NumPy arrays described and made through NumPy's C API."""

from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF, PyObject
from libc.stdint cimport int16_t, uint16_t, uint64_t, uintptr_t
cimport numpy as cnp

from holdfast._buffer cimport Buffer
from holdfast.adapters._columns cimport View

import numpy as np

from holdfast import dtypes, views as waist

__all__ = ["address", "describe", "wrap"]

cdef extern from "numpy/arrayobject.h":
    PyTypeObject PyArray_Type
    object PyArray_NewFromDescr(PyTypeObject *type, cnp.PyArray_Descr *descr, int ndim,
                                const cnp.npy_intp *dims, const cnp.npy_intp *strides, void *data,
                                int flags, PyObject *obj)

cnp.import_array()

cdef enum:
    MAX_NDIM = 64
    BUILTIN = 24  # type numbers of NumPy's own that the table can name
    OPAQUE = -1

cdef uint16_t DENSE = waist.DENSE
cdef uint16_t SWAPPED = waist.SWAPPED
cdef int TYPES = len(dtypes.DTYPES)
cdef int UINT8 = dtypes.BY_NAME["uint8"].code
cdef int CODES[BUILTIN]  # by type number: the code of dtypes.DTYPES, or OPAQUE


cdef void fill_codes():
    for number in range(BUILTIN):
        CODES[number] = OPAQUE
    # Characters, not names: C's long and long long are two types of the same size.
    for letter in "?bBhHiIlLqQefdFD":
        dtype = np.dtype(letter)
        CODES[dtype.num] = dtypes.BY_NUMPY[dtype.name].code


fill_codes()


def describe(list arrays, dict user, vet, name_kind):
    """Columns of arrays; nothing is copied.

    Parameters
    ----------
    arrays : list
    user : dict of int to int
        Code of the dtype table for type numbers that are not NumPy's own.
    vet : callable
        Called as ``vet(array, i)`` for what is not exactly an ndarray; raises where it cannot be
        described as one.
    name_kind : callable
        Called as ``name_kind(array, i)`` for an array of any other dtype: the kind that says
        which. It is then described as bytes, with one more dimension. Raises where it cannot be.

    Returns
    -------
    views, dims, strides : ndarray, ndarray, ndarray or None
    kinds : dict of int to str
    """
    cdef Py_ssize_t i, n = len(arrays), extents = 0
    for i in range(n):
        array = arrays[i]
        if not cnp.PyArray_CheckExact(array):
            vet(array, i)
        extents += cnp.PyArray_NDIM(array) + 1
    # One to spare, so that &dims[used] is an element even behind the last row.
    views, dims = np.zeros(n, waist.VIEW), np.empty(extents + 1, np.int64)
    strides = np.empty(extents + 1, np.int64)
    cdef View[::1] rows = views
    cdef long long[::1] shape = dims, steps = strides
    cdef Py_ssize_t used = 0
    cdef int code, number
    cdef bint dense = True
    cdef dict kinds = {}
    for i in range(n):
        array = arrays[i]
        number = cnp.PyArray_TYPE(array)
        # Types with parameters that other packages make all have the number -1.
        code = CODES[number] if 0 <= number < BUILTIN else <int>user.get(number, OPAQUE)
        if code == OPAQUE:
            kinds[i] = name_kind(array, i)
        used += put(&rows[i], array, code, used, &shape[used], &steps[used])
        dense = dense and rows[i].flags & DENSE
    return views, dims[:used], None if dense else strides[:used], kinds


def address(cnp.ndarray array not None):
    """Address of the element with index zero everywhere."""
    return <uintptr_t>cnp.PyArray_DATA(array)


cdef int put(View *row, cnp.ndarray array, int code, Py_ssize_t start, long long *shape,
             long long *steps) noexcept:
    """Fill one row and its extents and strides; how many of these there are."""
    cdef int axis, ndim = cnp.PyArray_NDIM(array)
    row.address = <uintptr_t>cnp.PyArray_DATA(array)
    row.nbytes = <uint64_t>cnp.PyArray_NBYTES(array)
    row.dims = start
    row.dtype = UINT8 if code == OPAQUE else code
    row.flags = DENSE if cnp.PyArray_IS_C_CONTIGUOUS(array) else 0
    for axis in range(ndim):
        shape[axis] = cnp.PyArray_DIM(array, axis)
        steps[axis] = cnp.PyArray_STRIDE(array, axis)
    if code == OPAQUE:
        shape[ndim], steps[ndim] = cnp.PyArray_ITEMSIZE(array), 1
        ndim += 1
    elif cnp.PyArray_ISBYTESWAPPED(array):
        row.flags |= SWAPPED
    row.ndim = <int16_t>ndim
    return ndim


def wrap(const View[::1] rows not None, const long long[::1] dims not None, list buffers, owner,
         list descrs not None):
    """Arrays over the memory of buffers; nothing is copied.

    Parameters
    ----------
    rows : ndarray of VIEW
        Dense, in native byte order.
    dims : ndarray of int64
    buffers : list of Buffer
    owner : ndarray of int64 or None
        Which of `buffers` each row lies in; None: all in the first.
    descrs : list of dtype
        By code of the dtype table; read only where a row has the code.

    Returns
    -------
    list of ndarray
        Each keeps its buffer alive.
    """
    cdef Py_ssize_t i, n = rows.shape[0]
    cdef const long long[::1] choice = owner
    cdef list made = [None] * n
    for i in range(n):
        if not (0 <= rows[i].ndim <= MAX_NDIM and 0 <= rows[i].dims
                and rows[i].dims + rows[i].ndim <= dims.shape[0]
                and 0 <= rows[i].dtype < TYPES):
            raise ValueError(f"row {i} of the batch cannot be wrapped")
        buffer = buffers[0 if choice is None else choice[i]]
        made[i] = wrap_row(<Buffer?>buffer, &rows[i], dims, descrs[rows[i].dtype])
    return made


cdef object wrap_row(Buffer buffer, const View *row, const long long[::1] dims,
                     cnp.dtype descr):
    cdef cnp.npy_intp shape[MAX_NDIM]
    cdef uint64_t first = <uintptr_t>buffer.handle.data
    cdef int axis
    cdef cnp.ndarray array
    if row.nbytes > 0 and (row.address < first
                           or row.address - first > buffer.handle.nbytes
                           or row.nbytes > buffer.handle.nbytes - (row.address - first)):
        raise ValueError(f"{row.nbytes} bytes at {row.address:#x} lie outside of their buffer")
    for axis in range(row.ndim):
        shape[axis] = dims[row.dims + axis]
    Py_INCREF(descr)  # stolen, as the base is below
    array = PyArray_NewFromDescr(
        &PyArray_Type, <cnp.PyArray_Descr *>descr, row.ndim, shape, NULL,
        <void *><uintptr_t>row.address if row.nbytes else NULL, cnp.NPY_ARRAY_CARRAY, NULL)
    if <uint64_t>cnp.PyArray_NBYTES(array) != row.nbytes:
        raise ValueError(
            f"{row.nbytes} bytes were given for an array of {cnp.PyArray_NBYTES(array)}")
    if row.nbytes:
        Py_INCREF(buffer)
        cnp.PyArray_SetBaseObject(array, buffer)
        cnp.PyArray_UpdateFlags(array, cnp.NPY_ARRAY_ALIGNED)
    return array
