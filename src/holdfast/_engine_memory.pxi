# Memory: allocated, mapped, or lent by others. Part of _engine.pyx: the calls that tests make fail
# are counted in a module, so there is one.

from cpython.ref cimport Py_DECREF, Py_INCREF


cdef extern from "hold.h" nogil:
    int hold_buffer_alloc(size_t nbytes, hold_buffer **out)
    int hold_buffer_map(int fd, uint64_t offset, size_t nbytes, bint shared, hold_buffer **out)
    int hold_buffer_lend(void *data, size_t nbytes, void *owner, void (*let_go)(void *) noexcept,
                         hold_buffer **out)
    size_t hold_buffer_count()
    void hold_keep(size_t most)
    size_t hold_kept()
    size_t hold_kept_release()
    int hold_filesystem(int fd, uint64_t *out)
    int hold_expect(const void *data, size_t nbytes)
    int hold_prefetch(const void *data, size_t nbytes, int threads)
    int hold_populate_cached(const void *data, size_t nbytes, size_t most, int threads, size_t *out)
    int hold_drop(const void *data, size_t nbytes)
    int hold_resident(const void *data, size_t nbytes, uint64_t *out)


cdef extern from "Python.h":
    bint Py_IsInitialized() nogil


def allocate(size_t nbytes):
    """Memory with whatever it holds: page-aligned; 2 MiB and more in huge pages where there are any."""
    cdef hold_buffer *handle = NULL
    cdef int rc
    with nogil:
        rc = hold_buffer_alloc(nbytes, &handle)
    if rc and rc == -errno.ENOMEM:
        raise MemoryError(f"cannot allocate {nbytes} bytes")
    check(rc)
    return Buffer.adopt(handle)


cdef void let_go(void *owner) noexcept nogil:
    # Tensors may outlive the interpreter; what they hold of it is then gone already.
    if Py_IsInitialized():
        with gil:
            Py_DECREF(<object>owner)


def lend(uint64_t address, size_t nbytes, owner, int device):
    """Memory of a device, or any that is neither allocated nor mapped here.

    Parameters
    ----------
    address : int
        Of the first byte, where the device has it.
    nbytes : int
    owner : object
        What keeps it alive; it is let go of with the last tensor over the buffer.
    device : int
        Where it is: see :func:`holdfast.views.device_code`.
    """
    cdef hold_buffer *handle = NULL
    cdef Buffer buffer
    check(hold_buffer_lend(<void *>address, nbytes, <void *>owner, let_go, &handle))
    Py_INCREF(owner)
    buffer = Buffer.adopt(handle)
    buffer.device, buffer.lender = device, owner
    return buffer


def map_file(int fd, uint64_t offset, size_t nbytes, filename=None, bint shared=False):
    """A part of a file, mapped readable and writable: private, or shared with the file."""
    cdef hold_buffer *handle = NULL
    cdef int rc
    with nogil:
        rc = hold_buffer_map(fd, offset, nbytes, shared, &handle)
    check(rc, filename)
    return Buffer.adopt(handle)


def filesystem(int fd):
    """The kind of file system that a file is on: the magic number of ``statfs(2)``."""
    cdef uint64_t magic = 0
    cdef int rc
    with nogil:
        rc = hold_filesystem(fd, &magic)
    check(rc)
    return magic


cdef char *part(Buffer buffer, size_t offset, size_t nbytes) except? NULL:
    """The address of a part of a buffer."""
    if offset > buffer.handle.nbytes or nbytes > buffer.handle.nbytes - offset:
        raise ValueError(
            f"bytes [{offset}, {offset + nbytes}) of a buffer of {buffer.handle.nbytes} bytes"
        )
    return <char *>buffer.handle.data + offset


def expect(Buffer buffer not None, size_t offset, size_t nbytes):
    """Have what is missing of a part of a mapping read by 2 MiB, and ahead, once it is touched."""
    cdef char *data = part(buffer, offset, nbytes)
    cdef int rc
    with nogil:
        rc = hold_expect(data, nbytes)
    check(rc)


def prefetch(Buffer buffer not None, size_t offset, size_t nbytes, int threads=0):
    """Bring a part of a mapping into memory."""
    cdef char *data = part(buffer, offset, nbytes)
    cdef int rc
    with nogil:
        rc = hold_prefetch(data, nbytes, threads)
    check(rc)


def populate_cached(Buffer buffer not None, size_t most, int threads=0):
    """Fill in the page tables of a mapping of at most `most` bytes, where its file is in memory.

    Returns how many bytes, in whole pages, that was done for: all but pieces of 16 MiB of which,
    by a sample, more than a little is missing; none where there are so few that faults are as cheap.
    """
    cdef size_t done = 0
    cdef int rc
    with nogil:
        rc = hold_populate_cached(buffer.handle.data, buffer.handle.nbytes, most, threads, &done)
    check(rc)
    return done


def drop(Buffer buffer not None, size_t offset, size_t nbytes):
    """Let go of the pages that hold a part of a mapping; the next access reads them anew."""
    cdef char *data = part(buffer, offset, nbytes)
    cdef int rc
    with nogil:
        rc = hold_drop(data, nbytes)
    check(rc)


def resident(Buffer buffer not None, size_t offset, size_t nbytes):
    """How many bytes of a part of a mapping are in memory."""
    cdef char *data = part(buffer, offset, nbytes)
    cdef uint64_t found = 0
    cdef int rc
    with nogil:
        rc = hold_resident(data, nbytes, &found)
    check(rc)
    return found


def keep(size_t most):
    """Keep at most `most` bytes of memory that buffers no longer need, for those that come later."""
    with nogil:
        hold_keep(most)


def kept():
    """How many bytes are kept."""
    return hold_kept()


def release_kept():
    """Give back all that is kept. Returns how many bytes that was."""
    cdef size_t found
    with nogil:
        found = hold_kept_release()
    return found


def live_buffers():
    """How many buffers the process has."""
    return hold_buffer_count()
