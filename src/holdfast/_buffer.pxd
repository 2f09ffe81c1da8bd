from libc.stddef cimport size_t


cdef extern from "hold.h" nogil:
    ctypedef struct hold_buffer:
        void *data
        size_t nbytes

    void hold_buffer_retain(hold_buffer *self)
    void hold_buffer_release(hold_buffer *self)


cdef class Buffer:
    cdef hold_buffer *handle
    # Where the memory is, as views.DEVICE has it: 0 for the memory of the host.
    cdef readonly int device
    cdef readonly object lender

    @staticmethod
    cdef Buffer adopt(hold_buffer *handle)
