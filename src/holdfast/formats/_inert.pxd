from libc.stdint cimport int64_t


cpdef str brief(object item)


cdef class Global:
    cdef readonly str module
    cdef readonly str name
    # What a run that knows it makes of it: a code of that run's own, 0 for nothing; the code of
    # the dtype that it stands for; how often it was pushed, and how often used as what it is; and
    # the event at which it was pushed first.
    cdef int code
    cdef int dtype
    cdef int64_t pushed
    cdef int64_t used
    cdef Py_ssize_t event


cdef class Record:
    cdef readonly tuple args
    cdef readonly dict kwargs
    cdef tuple _held  # class and state
    cdef readonly list items
    cdef readonly list pairs
    cdef readonly bint called
    cdef readonly Py_ssize_t offset


cdef class Tensor:
    cdef readonly Py_ssize_t entry
    cdef Py_ssize_t event   # of what made it, or of what wrapped it
    cdef int role           # the run's own


# Stands in the memo for what a run passed over; `key` is text that it may use again itself.
cdef class Ghost:
    cdef str key


cdef class Storage:
    cdef readonly Py_ssize_t row
    cdef readonly int code
    # Elements of the row before it, where it is a view; elements; and as for a Global.
    cdef int64_t first
    cdef int64_t numel
    cdef int64_t pushed
    cdef int64_t used
    cdef Py_ssize_t event
