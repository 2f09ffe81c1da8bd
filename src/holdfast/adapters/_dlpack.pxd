from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from holdfast._buffer cimport Buffer, hold_buffer
from holdfast.adapters._columns cimport View


cdef extern from "dlpack.h" nogil:
    const int HOLD_DLPACK_MAJOR
    const int HOLD_DLPACK_CPU
    const int HOLD_DLPACK_CUDA

    ctypedef struct hold_dl_device:
        int32_t type
        int32_t id

    ctypedef struct hold_dl_dtype:
        uint8_t code
        uint8_t bits
        uint16_t lanes

    ctypedef struct hold_dl_tensor:
        void *data
        hold_dl_device device
        int32_t ndim
        hold_dl_dtype dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct hold_dl_version:
        uint32_t major
        uint32_t minor

    ctypedef struct hold_dl_managed:
        pass

    ctypedef struct hold_dl_exchange:
        hold_dl_version version
        # With the GIL; -1 with an exception set. Undeclared as `except` because the functions are
        # a framework's: the callers check.
        int (*import_managed)(hold_dl_managed *managed, void **object) noexcept
        int (*describe)(void *object, hold_dl_tensor *out) noexcept

    ctypedef struct hold_dl_block:
        pass

    bint hold_dl_measure(const hold_dl_tensor *tensor, int64_t itemsize, int64_t *dims,
                         int64_t *strides, uint64_t *nbytes)
    hold_dl_block *hold_dl_block_new(size_t tensors, size_t dims)
    hold_dl_managed *hold_dl_block_add(hold_dl_block *block, hold_buffer *buffer, void *data,
                                       hold_dl_device device, hold_dl_dtype dtype, int32_t ndim,
                                       const int64_t *shape)
    void hold_dl_block_undo(hold_dl_block *block)
    void hold_dl_block_close(hold_dl_block *block)


cdef extern from "Python.h":
    ctypedef object (*Getter "descrgetfunc")(object descriptor, object obj, object type)


cdef class Exchange:
    cdef object capsule, tensor, parameter, requires_grad, is_neg, is_conj
    cdef tuple byte_dtypes
    cdef const hold_dl_exchange *api
    cdef Getter get_requires_grad

    cdef object kind(self, object tensor)
    cdef bint records(self, object tensor) except -1
    cdef int look(self, object tensor, hold_dl_tensor *out, bint anywhere=*) except -2
    cdef int wrap_block(self, View[::1] rows, const long long[::1] dims, list buffers,
                        const long long[::1] choice, list made, Py_ssize_t start) except -1
    cdef int refused(self) except -1
    cdef object wrap_row(self, hold_dl_block *block, Buffer buffer, const View *row,
                         const long long[::1] dims)
