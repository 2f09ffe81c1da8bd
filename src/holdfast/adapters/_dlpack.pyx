# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Tensors described and made through the DLPack C exchange API of their framework."""

from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int16_t, int64_t, uintptr_t

from holdfast._buffer cimport Buffer
from holdfast.adapters._columns cimport View

import numpy as np

from holdfast import dtypes, views as waist

__all__ = ["Exchange"]

cdef extern from "Python.h":
    ctypedef struct Type "PyTypeObject":
        Getter tp_descr_get
    Type *Py_TYPE(object)
    object PyObject_CallOneArg(object function, object argument)
    int PyGC_Disable()
    int PyGC_Enable()

cdef enum:
    # Tensors whose structures share an allocation: enough to make that cheap, few enough that one
    # tensor which outlives the others holds little.
    BLOCK = 64
    MAX_NDIM = 64
    KINDS = 32  # DLPack type codes that the tables have room for
    COMPLEX = 5  # the type code of complex numbers; below 2 are the integers

cdef uint16_t DENSE = waist.DENSE

cdef int TYPES = len(dtypes.DTYPES)

# By DLPack type code and bits: the code of dtypes.DTYPES, or -1. And the other way about.
cdef int CODES[KINDS][256]
cdef hold_dl_dtype LISTED[64]
cdef int ITEMSIZES[64]


cdef void fill_tables():
    for kind in range(KINDS):
        for bits in range(256):
            CODES[kind][bits] = -1
    for row in dtypes.DTYPES:
        ITEMSIZES[row.code] = row.itemsize
        LISTED[row.code].lanes = 0
        if row.dlpack is not None:
            kind, bits, lanes = row.dlpack
            CODES[kind][bits] = row.code
            LISTED[row.code] = hold_dl_dtype(kind, bits, lanes)


fill_tables()


cdef inline int code_of(hold_dl_dtype dtype) noexcept:
    """Position of an element type in the table, -1 where it has none."""
    cdef int code = CODES[dtype.code][dtype.bits] if dtype.code < KINDS else -1
    return code if code >= 0 and LISTED[code].lanes == dtype.lanes else -1


cdef inline hold_dl_device place_of(Buffer buffer):
    """Where the memory of a buffer is."""
    cdef int code = buffer.device
    # As views.device_of has it, which would cost a call for each tensor.
    return hold_dl_device(code >> 16, code & 0xFFFF) if code else hold_dl_device(HOLD_DLPACK_CPU, 0)


cdef class Columns:
    """The columns of a batch while it is described: dims and strides grow as they fill."""

    cdef readonly object views, dims, strides, devices
    cdef View[::1] rows
    cdef long long[::1] extents, steps
    cdef Py_ssize_t used
    cdef bint dense

    def __init__(self, Py_ssize_t n):
        self.views = np.zeros(n, waist.VIEW)
        self.rows = self.views
        self.used = 0
        self.dense = True
        self.dims = self.strides = np.empty(0, np.int64)
        self.grow(4 * n + MAX_NDIM)

    cdef grow(self, Py_ssize_t capacity):
        dims, strides = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        dims[:self.used] = self.dims[:self.used]
        strides[:self.used] = self.strides[:self.used]
        self.dims, self.strides = dims, strides
        self.extents, self.steps = dims, strides

    cdef int put(self, Py_ssize_t i, const hold_dl_tensor *tensor, int code) except -1:
        cdef View *row = &self.rows[i]
        # One to spare, so that &extents[used] is an element even for the last 0-d tensor.
        if self.used + tensor.ndim >= self.extents.shape[0]:
            self.grow(2 * self.extents.shape[0])
        if hold_dl_measure(tensor, ITEMSIZES[code], <int64_t *>&self.extents[self.used],
                           <int64_t *>&self.steps[self.used], &row.nbytes):
            row.flags = DENSE
        else:
            self.dense = False
        row.address = <uintptr_t>tensor.data + tensor.byte_offset
        row.dims = self.used
        row.dtype = code
        row.ndim = <int16_t>tensor.ndim
        self.used += tensor.ndim
        if tensor.device.type != HOLD_DLPACK_CPU:
            if self.devices is None:
                self.devices = np.zeros(len(self.views), np.int32)
            self.devices[i] = waist.device_code(tensor.device.type, tensor.device.id)
        return 0

    cdef tuple finish(self):
        return (
            self.views,
            self.dims[:self.used],
            None if self.dense else self.strides[:self.used],
            self.devices,
        )


cdef inline bint has_elements(const hold_dl_tensor *tensor) noexcept:
    for axis in range(tensor.ndim):
        if tensor.shape[axis] == 0:
            return False
    return True


cdef class Exchange:
    """The exchange API of one tensor type.

    Parameters
    ----------
    tensor, parameter : type
        The plain tensor type, which has the attribute ``__dlpack_c_exchange_api__``, and the one
        subclass of it that is described as easily. Tensors of other types are never touched.
    byte_dtypes : tuple
        What ``tensor.dtype`` is for the integers of one byte.

    Raises
    ------
    ValueError
        If the API is not one that this library can use.
    """

    def __init__(self, tensor, parameter, tuple byte_dtypes):
        self.tensor, self.parameter, self.byte_dtypes = tensor, parameter, byte_dtypes
        self.capsule = tensor.__dlpack_c_exchange_api__
        self.api = <const hold_dl_exchange *>PyCapsule_GetPointer(
            self.capsule, "dlpack_exchange_api")
        if self.api.version.major != HOLD_DLPACK_MAJOR:
            raise ValueError(f"DLPack {self.api.version.major}: this library speaks 1")
        if self.api.describe is NULL or self.api.import_managed is NULL:
            raise ValueError("the DLPack exchange API lacks a function")
        # The descriptors themselves, so that no type is searched for each tensor.
        self.requires_grad = tensor.requires_grad
        self.get_requires_grad = Py_TYPE(self.requires_grad).tp_descr_get
        self.is_neg, self.is_conj = tensor.is_neg, tensor.is_conj

    def describe(self, list tensors, resolve):
        """Columns of tensors; nothing is copied but what `resolve` copies.

        Parameters
        ----------
        tensors : list
        resolve : callable
            Called as ``resolve(tensor, i)`` for each that is not plain memory of a known element
            type. Returns a tensor that is, with the same values, or raises.

        Returns
        -------
        views, dims, strides, devices : ndarray, ndarray, ndarray or None, ndarray or None
            As :class:`holdfast.views.TensorBatch` has them.
        owners : list
            `tensors`, or a copy of it with what `resolve` returned.
        kinds : dict of int to str
        """
        cdef Py_ssize_t i, n = len(tensors)
        cdef Columns columns = Columns(n)
        cdef hold_dl_tensor found
        cdef int code
        cdef dict kinds = {}
        cdef list owners = tensors
        for i in range(n):
            tensor = tensors[i]
            code = self.look(tensor, &found, True)
            if code < 0:
                if owners is tensors:
                    owners = list(tensors)
                owners[i] = resolve(tensor, i)
                code = self.look(owners[i], &found, True)
                if code < 0:
                    raise TypeError(f"a {type(tensor).__name__} that DLPack cannot describe")
            kind = self.kind(tensor)
            if kind is not None:
                kinds[i] = kind
            columns.put(i, &found, code)
        return (*columns.finish(), owners, kinds)

    cdef object kind(self, object tensor):
        """What the type and the gradient of a tensor have to say, or None."""
        cdef bint parameter = <object>type(tensor) is self.parameter
        if self.records(tensor):
            return "parameter" if parameter else "requires_grad"
        return "parameter,frozen" if parameter else None

    cdef bint records(self, object tensor) except -1:
        """Whether gradients of a tensor are recorded."""
        return self.get_requires_grad(self.requires_grad, tensor, <object>type(tensor)) is True

    cdef int look(self, object tensor, hold_dl_tensor *out, bint anywhere=False) except -2:
        """Describe `tensor` if memory says all of it: the code of its dtype, or else -1.

        Memory of the host, or with `anywhere` also that of a CUDA device.
        """
        cdef int code
        cdef object kind = <object>type(tensor)
        if kind is not self.tensor and kind is not self.parameter:
            return -1
        if self.api.describe(<void *>tensor, out) != 0:
            PyErr_Clear()  # `resolve` can say better what is wrong with it
            return -1
        code = code_of(out.dtype)
        if code < 0 or out.ndim > MAX_NDIM:
            return -1
        if out.device.type != HOLD_DLPACK_CPU and not (
                anywhere and out.device.type == HOLD_DLPACK_CUDA):
            return -1
        # A lazy negation or conjugation is a mark on the tensor that DLPack does not see.
        if PyObject_CallOneArg(self.is_neg, tensor) is True:
            return -1
        if out.dtype.code == COMPLEX and PyObject_CallOneArg(self.is_conj, tensor) is True:
            return -1
        # Types of less than a byte are described as bytes.
        if out.dtype.bits == 8 and out.dtype.code < 2 and tensor.dtype not in self.byte_dtypes:
            return -1
        if out.data is NULL and has_elements(out):
            return -1
        return code

    def wrap(self, View[::1] rows not None, const long long[::1] dims not None, list buffers,
             owner):
        """Tensors over the memory of buffers; nothing is copied.

        Parameters
        ----------
        rows : ndarray of VIEW
            Dense, in native byte order, of dtypes that have a DLPack type.
        dims : ndarray of int64
        buffers : list of Buffer
        owner : ndarray of int64 or None
            Which of `buffers` each row lies in; None: all in the first.

        Returns
        -------
        list
            New tensors, each keeping its buffer alive.
        """
        cdef Py_ssize_t start, n = rows.shape[0]
        cdef const long long[::1] choice = owner if owner is not None else None
        cdef list made = PyList_New(n)
        # Nothing of what is made here can be garbage yet: collections would only cost.
        cdef int collecting = PyGC_Disable()
        try:
            for start in range(0, n, BLOCK):
                self.wrap_block(rows[start:start + BLOCK], dims, buffers,
                                None if choice is None else choice[start:start + BLOCK], made,
                                start)
        finally:
            if collecting:
                PyGC_Enable()
        return made

    cdef int wrap_block(self, View[::1] rows, const long long[::1] dims, list buffers,
                        const long long[::1] choice, list made, Py_ssize_t start) except -1:
        cdef Py_ssize_t i, n = rows.shape[0]
        cdef size_t extents = 0
        cdef hold_dl_block *block
        cdef const View *row
        cdef Buffer buffer = <Buffer?>buffers[0] if choice is None and n else None
        cdef object tensor
        for i in range(n):
            row = &rows[i]
            if not (0 <= row.ndim <= MAX_NDIM and 0 <= row.dims
                    and row.dims + row.ndim <= dims.shape[0]
                    and 0 <= row.dtype < TYPES and LISTED[row.dtype].lanes):
                raise ValueError(f"row {start + i} of the batch cannot be wrapped")
            extents += <size_t>row.ndim
        block = hold_dl_block_new(n, extents)
        if block is NULL:
            raise MemoryError
        try:
            for i in range(n):
                if choice is not None:
                    buffer = <Buffer?>buffers[choice[i]]
                tensor = self.wrap_row(block, buffer, &rows[i], dims)
                Py_INCREF(tensor)  # which the list takes over
                PyList_SET_ITEM(made, start + i, tensor)
        finally:
            hold_dl_block_close(block)
        return 0

    cdef int refused(self) except -1:
        """Raise what the framework said when it made no tensor."""
        if PyErr_Occurred() is NULL:
            raise BufferError("the framework made no tensor and does not say why")
        return -1

    cdef object wrap_row(self, hold_dl_block *block, Buffer buffer, const View *row,
                         const long long[::1] dims):
        cdef uint64_t first = <uintptr_t>buffer.handle.data
        cdef uint64_t nbytes = <uint64_t>ITEMSIZES[row.dtype]
        cdef int axis
        cdef hold_dl_managed *managed
        cdef void *made = NULL
        cdef object tensor
        if row.nbytes > 0 and (row.address < first
                               or row.address - first > buffer.handle.nbytes
                               or row.nbytes > buffer.handle.nbytes - (row.address - first)):
            raise ValueError(f"{row.nbytes} bytes at {row.address:#x} lie outside of their buffer")
        for axis in range(row.ndim):
            nbytes *= <uint64_t>dims[row.dims + axis]
        if nbytes != row.nbytes:
            raise ValueError(f"{row.nbytes} bytes were given for a tensor of {nbytes}")
        managed = hold_dl_block_add(
            block, buffer.handle, <void *><uintptr_t>row.address if row.nbytes else NULL,
            place_of(buffer), LISTED[row.dtype], row.ndim,
            <const int64_t *>&dims[row.dims] if row.ndim else NULL)
        if self.api.import_managed(managed, &made) != 0:
            hold_dl_block_undo(block)
            self.refused()
        tensor = <object>made
        Py_DECREF(tensor)  # the variable has a reference of its own
        return tensor
