from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t

from ._inert cimport Global
from ._torch_table cimport MAX_NDIM


cdef class Usual:
    cdef const uint8_t *data
    cdef Py_ssize_t pos, size, memo_room
    cdef PyObject **memo
    # What it is made of.
    cdef str key
    cdef object location
    cdef int dtype
    cdef bint new_key
    cdef int64_t numel, offset, key_place, result
    cdef Py_ssize_t ndim, nsteps
    cdef int64_t[MAX_NDIM] dims
    cdef int64_t[MAX_NDIM] steps
    # Places in the memo of what is of no use to others.
    cdef int64_t[8] ghosts
    cdef int nghosts

    cdef bint parse(self, const uint8_t *data, Py_ssize_t pos, Py_ssize_t size, PyObject **memo,
                    Py_ssize_t memo_room, bint legacy) except -1
    cdef bint storage(self) except -1
    cdef bint key_(self) except -1
    cdef object short_text(self)
    cdef bint byte(self, int wanted) noexcept
    cdef bint number(self, int width, uint64_t *value) noexcept
    cdef bint integer(self, int64_t *value) noexcept
    cdef bint put(self, int64_t *place) noexcept
    cdef bint forget(self) noexcept
    cdef object get(self)
    cdef Global global_(self, int code)
    cdef bint extents(self, int64_t *values, Py_ssize_t *count) noexcept
