# cython: language_level=3
"""Memory that tensors can outlive their maker in: the owner that travels with every pointer."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uintptr_t

__all__ = ["Buffer"]


cdef class Buffer:
    """A block of memory that the engine allocated or mapped.

    Writable, of bytes, through the buffer protocol (``memoryview(buffer)``). Whoever holds this
    object, or one of the tensors made over it, keeps the memory; it is given back with the last.
    Not made by hand: ``_engine.allocate`` and ``_engine.map_file`` return it, and ``_engine.lend``
    for memory of a device, which the buffer protocol does not show.

    Attributes
    ----------
    device : int
        Where the memory is (:func:`holdfast.views.device_code`); 0 for that of the host.
    lender : object
        What keeps memory that ``_engine.lend`` was given; None for all other memory.
    """

    def __init__(self):
        raise TypeError("Buffer objects come from _engine.allocate and _engine.map_file")

    @staticmethod
    cdef Buffer adopt(hold_buffer *handle):
        """The Python owner of `handle`, taking over the caller's share of it."""
        cdef Buffer self = Buffer.__new__(Buffer)
        self.handle = handle
        return self

    def __dealloc__(self):
        if self.handle is not NULL:
            hold_buffer_release(self.handle)

    @property
    def address(self):
        """Address of the first byte."""
        return <uintptr_t>self.handle.data

    def __len__(self):
        return self.handle.nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.device:
            raise BufferError("the memory of a device cannot be seen from the host")
        PyBuffer_FillInfo(view, self, self.handle.data, <Py_ssize_t>self.handle.nbytes, 0, flags)
