# cython: language_level=3, boundscheck=False, wraparound=False
"""The C engine, as Python sees it. Each function takes the memory, calls C without the GIL, checks."""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror

from holdfast._buffer cimport Buffer, hold_buffer

import errno
import os

from .errors import FormatError

__all__ = [
    "FolderPublication", "Publication", "allocate", "crc32", "crc32_combine", "crc32_copies",
    "crc32_variants", "create_beneath", "drop", "expect", "fault_arm", "fault_ban", "fault_hit",
    "filesystem", "lend", "live_buffers", "map_file", "open_beneath", "populate_cached", "prefetch",
    "read", "read_files", "resident", "write", "write_files",
]


cdef extern from "<pthread.h>" nogil:
    void pthread_exit(void *value)


cdef extern from "<stdbool.h>" nogil:
    ctypedef bint boolean "bool"


cdef extern from "hold.h" nogil:
    const int HOLD_ESHORT
    const int HOLD_ESTALL
    const int HOLD_EABORT
    const int HOLD_ERULE
    const int HOLD_MAX_NDIM
    const int HOLD_DIRECT_ALWAYS
    const int HOLD_DIRECT_FASTER

    uint32_t hold_crc32(uint32_t crc, const void *data, size_t nbytes)
    uint32_t hold_crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b)
    bint hold_crc32_variant(size_t which, uint32_t *crc, void *to, const void *data,
                            size_t nbytes)

    ctypedef struct hold_layout:
        const int64_t *shape
        const int64_t *strides
        int32_t ndim
        int32_t itemsize
        int32_t swap

    ctypedef struct hold_segment:
        uint64_t offset
        uint64_t nbytes
        const hold_layout *layout
        uint32_t file

    ctypedef int (*hold_progress)(void *context, uint64_t done) noexcept nogil

    ctypedef struct hold_options:
        int threads
        bint checksum
        int direct
        double enough
        uint64_t size
        int fill
        hold_progress progress
        void *context

    ctypedef struct hold_report:
        int64_t segment
        uint64_t offset
        uint32_t file
        bint direct

    int hold_write(int fd, hold_segment *segments, size_t n, const hold_options *options,
                   hold_report *report)
    int hold_checksum(hold_segment *segments, size_t n, const hold_options *options,
                      hold_report *report)
    int HOLD_FILL_NEVER
    int HOLD_FILL_AGAIN
    int HOLD_FILL_NOW
    uint64_t HOLD_MARK_LEAST
    int hold_load_look(int fd, uint64_t nbytes)
    int hold_load_mark(int fd)
    int hold_read(const int *fds, size_t nfds, hold_segment *segments, size_t n,
                  const hold_options *options, hold_report *report)

    ctypedef struct hold_publication:
        pass

    int hold_publish_begin(const char *path, hold_publication **out)
    int hold_publish_fd(const hold_publication *self)
    int hold_publish_commit(hold_publication *self, bint durable)
    void hold_publish_abort(hold_publication *self)

    uint64_t hold_fault_arm(uint64_t n, int error)
    void hold_fault_ban(const char *name, int error)
    const char *hold_fault_hit()


# ---- errors ------------------------------------------------------------------------------------

cdef object check(int rc, object filename=None):
    """Raise what the code of a C function stands for, unless that is success."""
    if rc == 0:
        return
    code = errno.EIO if rc == HOLD_ESTALL else -rc
    text = strerror(code).decode("utf-8", "replace")
    if rc == HOLD_ESTALL:
        text = "a transfer makes no progress"
    if filename is None:
        raise OSError(code, text)
    raise OSError(code, text, filename)


include "_engine_memory.pxi"


# ---- checksums ---------------------------------------------------------------------------------

def crc32(const unsigned char[::1] data not None, uint32_t value=0):
    """The CRC-32 of `data`, continuing that of the bytes before it: ``zlib.crc32``, but faster."""
    cdef size_t nbytes = data.shape[0]
    with nogil:
        if nbytes:
            value = hold_crc32(value, &data[0], nbytes)
    return value


def crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b):
    """The CRC-32 of A followed by B, from those of A and of B and the length of B."""
    return hold_crc32_combine(a, b, nbytes_b)


def crc32_variants(const unsigned char[::1] data not None, uint32_t value=0):
    """What each way to compute :func:`crc32` that this machine has gives, the portable one first."""
    cdef list found = []
    cdef size_t nbytes = data.shape[0]
    cdef const unsigned char *bytes_ = &data[0] if nbytes else NULL
    cdef uint32_t crc = value
    while hold_crc32_variant(len(found), &crc, NULL, bytes_, nbytes):
        found.append(crc)
        crc = value
    return found


def crc32_copies(const unsigned char[::1] data not None, uint32_t value=0):
    """The same of the ways to compute it while bytes are copied: each with the copy."""
    cdef list found = []
    cdef size_t nbytes = data.shape[0]
    cdef uint32_t crc = value
    cdef bytearray to = bytearray(nbytes)
    while nbytes and hold_crc32_variant(len(found), &crc, <char *>to, &data[0], nbytes):
        found.append((crc, to))
        to = bytearray(nbytes)
        crc = value
    return found


# ---- moving bytes ------------------------------------------------------------------------------

cdef class Segments:
    """The rows of a SEGMENT array, with their layouts set while this object lives."""

    cdef unsigned char[::1] view
    cdef hold_segment *rows
    cdef size_t n
    cdef size_t used           # how many rows have a layout
    cdef size_t *at            # which ones
    cdef hold_layout *layouts  # one for each of those
    cdef int64_t *dims

    def __cinit__(self, segments, layouts):
        if segments.dtype.itemsize != sizeof(hold_segment):
            raise TypeError(
                f"segments: rows of {segments.dtype.itemsize} bytes, not {sizeof(hold_segment)}"
            )
        self.n = len(segments)
        if self.n == 0:
            return
        self.view = segments.view("u1")
        self.rows = <hold_segment *>&self.view[0]
        if layouts:
            self.take(list(layouts))

    def __dealloc__(self):
        for k in range(self.used):
            self.rows[self.at[k]].layout = NULL
        free(self.at)
        free(self.layouts)
        free(self.dims)

    cdef take(self, list layouts):
        cdef size_t at = 0
        cdef size_t k = 0
        cdef size_t total = sum([len(row[1]) for row in layouts])
        cdef hold_layout *layout
        self.layouts = <hold_layout *>calloc(len(layouts), sizeof(hold_layout))
        self.dims = <int64_t *>calloc(2 * total + 1, sizeof(int64_t))
        self.at = <size_t *>calloc(len(layouts), sizeof(size_t))
        if self.layouts is NULL or self.dims is NULL or self.at is NULL:
            raise MemoryError
        for i, shape, strides, itemsize, swap in layouts:
            if not 0 <= i < self.n or len(shape) != len(strides) or len(shape) > HOLD_MAX_NDIM:
                raise ValueError(f"segment {i}: shape {shape}, strides {strides}")
            layout = &self.layouts[k]
            layout.shape = &self.dims[at]
            layout.strides = &self.dims[total + at]
            layout.ndim = len(shape)
            layout.itemsize = itemsize
            layout.swap = swap
            for d in range(len(shape)):
                self.dims[at + <size_t>d] = shape[d]
                self.dims[total + at + <size_t>d] = strides[d]
            at += len(shape)
            self.rows[<size_t>i].layout = layout
            self.at[k] = i
            k += 1
            self.used = k


cdef class Caller:
    """The Python side of a transfer: its progress callable, and what that raised."""

    cdef object progress
    cdef object raised

    cdef int call(self, uint64_t done) noexcept:
        try:
            PyErr_CheckSignals()
            if self.progress is not None:
                self.progress(done)
        except BaseException as error:
            self.raised = error
            return 1
        return 0


cdef int call_back(void *context, uint64_t done) noexcept nogil:
    # Daemon threads may outlive the interpreter. What it does with those that it finds is left to do
    # here then, as nothing of it is there that this one could return to.
    if not Py_IsInitialized():
        pthread_exit(NULL)
    with gil:
        return (<Caller>context).call(done)


cdef object check_transfer(int rc, hold_report *report, Segments rows, Caller caller, filename):
    """Raise what a transfer failed with."""
    if rc == 0:
        return
    if rc == HOLD_EABORT:
        raise caller.raised
    if rc == HOLD_ERULE:
        row = rows.rows[report.segment]
        raise ValueError(
            f"{filename}: segment {report.segment} of {rows.n}, {row.nbytes} bytes at offset "
            f"{row.offset} of file {row.file}: out of order, or its file, memory or layout is not "
            "what it should be"
        )
    if rc == HOLD_ESHORT:
        row = rows.rows[report.segment]
        raise FormatError(
            f"{filename}: needs {row.nbytes} bytes at offset {row.offset}, "
            f"file ends at {report.offset}"
        )
    check(rc, filename)


def checksum(segments, *, layouts=None, int threads=0, filename=None):
    """Fill in the checksums of segments that writing them would, without writing them."""
    cdef Segments rows = Segments(segments, layouts)
    cdef hold_report report
    cdef hold_options options
    cdef int rc
    options.threads = threads
    with nogil:
        rc = hold_checksum(rows.rows, rows.n, &options, &report)
    check_transfer(rc, &report, rows, Caller(), filename)


def write(int fd, segments, *, layouts=None, int threads=0, bint checksum=True, direct=False,
          double enough=0, uint64_t size=0, progress=None, filename=None):
    """Write segments, which lie end to end in the file; whether O_DIRECT was used.

    `direct`: True past the page cache, False through it, None in whichever way is faster: but
    only where the cache takes less than `enough` bytes a second, if that is not 0.
    `size`: of the file once all of it is written, so that room for it can be taken; 0: not known.
    Segments whose file is 1 are of unchanged mappings, and let go of once written.
    """
    cdef Segments rows = Segments(segments, layouts)
    cdef Caller caller = Caller()
    cdef hold_report report
    cdef hold_options options
    cdef int rc
    caller.progress = progress
    options.threads = threads
    options.checksum = checksum
    options.direct = HOLD_DIRECT_FASTER if direct is None else HOLD_DIRECT_ALWAYS if direct else 0
    options.enough = enough
    options.size = size
    options.progress = call_back
    options.context = <void *>caller
    with nogil:
        rc = hold_write(fd, rows.rows, rows.n, &options, &report)
    check_transfer(rc, &report, rows, caller, filename)
    return report.direct


#: Whether what is read is brought into the page cache: never; of files that are loaded a second
#: time, each by one call; always.
FILL_NEVER, FILL_AGAIN, FILL_NOW = HOLD_FILL_NEVER, HOLD_FILL_AGAIN, HOLD_FILL_NOW
#: Of smaller files it is not known whether they were loaded before.
MARK_LEAST = HOLD_MARK_LEAST


def loaded_before(int fd, uint64_t nbytes):
    """Whether a file was loaded before of which so many bytes will be, in several calls.

    None where there is no use in knowing: most of it is in the page cache, or little is wanted.
    """
    cdef int rc
    with nogil:
        rc = hold_load_look(fd, nbytes)
    if rc == -errno.ENODATA:
        return None
    if rc < 0:
        check(rc)
    return rc == 1


def mark_loaded(int fd):
    """Have it known the next time that a file was loaded, of which that was not known."""
    cdef int rc
    with nogil:
        rc = hold_load_mark(fd)
    check(rc)


def read(fds, segments, *, layouts=None, int threads=0, bint checksum=True, int fill=HOLD_FILL_NEVER,
         progress=None, filenames=None):
    """Read segments of one or several files."""
    cdef Segments rows = Segments(segments, layouts)
    cdef Caller caller = Caller()
    cdef hold_report report
    cdef hold_options options
    cdef size_t nfds = len(fds)
    cdef int *files = <int *>calloc(nfds + 1, sizeof(int))
    cdef int rc
    if files is NULL:
        raise MemoryError
    try:
        for i in range(nfds):
            files[i] = fds[i]
        caller.progress = progress
        options.threads = threads
        options.checksum = checksum
        options.direct = 0
        options.fill = fill
        options.progress = call_back
        options.context = <void *>caller
        with nogil:
            rc = hold_read(files, nfds, rows.rows, rows.n, &options, &report)
    finally:
        free(files)
    if rc == HOLD_ESHORT:  # what was asked for may begin behind the end
        report.offset = min(report.offset, <uint64_t>os.fstat(fds[report.file]).st_size)
    named = filenames is not None and report.file < len(filenames)
    check_transfer(rc, &report, rows, caller, filenames[report.file] if named else None)


# ---- publishing --------------------------------------------------------------------------------

cdef class Publication:
    """A file being written that appears under its name whole, by :meth:`commit`, or not at all.

    As a context manager it is aborted at the end of the block unless it was committed.
    """

    cdef hold_publication *handle
    cdef readonly object path

    def __cinit__(self, path):
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int rc
        if b"\0" in encoded:
            raise ValueError(f"embedded null byte in path {path!r}")
        self.path = os.fspath(path)
        with nogil:
            rc = hold_publish_begin(name, &self.handle)
        check(rc, self.path)

    def __dealloc__(self):
        if self.handle is not NULL:
            hold_publish_abort(self.handle)

    cdef hold_publication *end(self) except NULL:
        cdef hold_publication *handle = self.handle
        if handle is NULL:
            raise ValueError(f"{self.path}: the publication has ended")
        self.handle = NULL
        return handle

    @property
    def fd(self):
        """Descriptor to write to; owned by this object."""
        if self.handle is NULL:
            raise ValueError(f"{self.path}: the publication has ended")
        return hold_publish_fd(self.handle)

    def commit(self, bint durable=True):
        """Give the file its name; if `durable`, once it is on the device."""
        cdef hold_publication *handle = self.end()
        cdef int rc
        with nogil:
            rc = hold_publish_commit(handle, durable)
        check(rc, self.path)

    def abort(self):
        """Forget the file, unless it was committed or forgotten already."""
        if self.handle is NULL:
            return
        cdef hold_publication *handle = self.end()
        with nogil:
            hold_publish_abort(handle)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.abort()


include "_engine_files.pxi"


# ---- tests -------------------------------------------------------------------------------------

def fault_arm(uint64_t n, int error):
    """Make the `n`-th system call from now fail with `error`, or go half way where that is 0.

    A negative `error` makes it succeed, so many milliseconds late.
    """
    return hold_fault_arm(n, error)


def fault_ban(name, int error):
    """Make every call of this name fail with `error`; None: none."""
    cdef bytes encoded = b"" if name is None else name.encode()
    cdef const char *banned = NULL
    if name is not None:
        banned = encoded
    hold_fault_ban(banned, error)


def fault_hit():
    """Name of the call that the last armed fault hit, or None."""
    cdef const char *name = hold_fault_hit()
    return None if name is NULL else name.decode()
