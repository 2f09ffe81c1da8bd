"""One row of ``views.VIEW``; a typed memoryview of it checks the layout against the array's."""

from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint64_t


cdef struct View:
    uint64_t address
    uint64_t nbytes
    int64_t dims
    int32_t dtype
    int16_t ndim
    uint16_t flags
