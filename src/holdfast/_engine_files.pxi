# Many files in a folder, and a folder that is published whole. Part of _engine.pyx: the calls
# that tests make fail are counted in a module, so there is one.

from cpython.bytes cimport PyBytes_AsString, PyBytes_AsStringAndSize

import numpy as np


cdef extern from "hold.h" nogil:
    ctypedef struct hold_file:
        const char *path
        void *data
        uint64_t room
        int64_t size

    ctypedef struct hold_batch:
        const char *const *folders
        const int64_t *first
        const hold_file *files
        size_t n

    int hold_files_read(int dirfd, hold_file *files, size_t n, bint links,
                        const hold_options *options, hold_report *report)
    int hold_files_write(int dirfd, const hold_batch *batch, const hold_options *options,
                         hold_report *report)
    int hold_file_open(int dirfd, const char *path, bint links)
    int hold_file_create(int dirfd, const char *path)

    ctypedef struct hold_folder:
        pass

    int hold_folder_begin(const char *path, bint replace, hold_folder **out)
    int hold_folder_fd(const hold_folder *self)
    int hold_folder_complete(hold_folder *self, bint durable)
    int hold_folder_look(hold_folder *self)
    int hold_folder_allow(hold_folder *self, bint replace)
    int hold_folder_commit(hold_folder *self, bint durable)
    void hold_folder_abort(hold_folder *self)


cdef const char *text_of(path) except NULL:
    """The bytes of a path, which lives as long as they are used; without a null byte in it."""
    cdef char *text = NULL
    if PyBytes_AsStringAndSize(path, &text, NULL) < 0:
        return NULL
    return text


cdef object not_plain(path):
    return ValueError(
        f"{os.fsdecode(path)!r} is not a path inside a folder: relative, with components that are "
        "neither empty nor '.' nor '..'"
    )


cdef object check_path(int rc, path, folder):
    """Raise what went wrong with a file in a folder, of which `folder` is the name if known."""
    if rc == HOLD_ERULE:
        raise not_plain(path)
    name = os.fsdecode(path)
    check(rc, name if folder is None else os.path.join(os.fsdecode(folder), name))


cdef class Files:
    """Rows for C of files and their places in memory."""

    cdef list paths
    cdef hold_file *rows
    cdef size_t n

    def __cinit__(self, paths, address, room):
        cdef const uint64_t[::1] addresses = address
        cdef const uint64_t[::1] rooms = room
        cdef size_t i
        self.paths = list(paths)
        self.n = len(self.paths)
        if <size_t>addresses.shape[0] != self.n or <size_t>rooms.shape[0] != self.n:
            raise ValueError(
                f"{self.n} paths, {addresses.shape[0]} addresses, {rooms.shape[0]} lengths"
            )
        self.rows = <hold_file *>calloc(self.n + 1, sizeof(hold_file))
        if self.rows is NULL:
            raise MemoryError
        for i in range(self.n):
            self.rows[i].path = text_of(self.paths[i])
            self.rows[i].data = <void *><size_t>addresses[i]
            self.rows[i].room = rooms[i]

    def __dealloc__(self):
        free(self.rows)


def read_files(int dirfd, paths, address, room, *, bint links=False, int threads=0, progress=None,
               filename=None):
    """Read the first bytes of many files in a folder, each to a place of its own.

    Returns the sizes of the files, as int64: -errno where one could not be opened.
    """
    cdef Files files = Files(paths, address, room)
    cdef Caller caller = Caller()
    cdef hold_report report
    cdef hold_options options
    cdef size_t i
    cdef int rc
    caller.progress = progress
    options.threads = threads
    options.progress = call_back
    options.context = <void *>caller
    with nogil:
        rc = hold_files_read(dirfd, files.rows, files.n, links, &options, &report)
    if rc == HOLD_EABORT:
        raise caller.raised
    if rc:
        check_path(rc, files.paths[report.segment], filename)
    sizes = np.empty(files.n, np.int64)
    cdef int64_t[::1] found = sizes
    for i in range(files.n):
        found[i] = files.rows[i].size
    return sizes


def write_files(int dirfd, folders, files, first, address, nbytes, *, int threads=0, progress=None,
                filename=None):
    """Make folders in a folder and new files in them, ``files[first[i]:first[i + 1]]`` in each.

    Files are names in their folder, which is "" for that of `dirfd` itself.
    """
    cdef Files rows = Files(files, address, nbytes)
    cdef const int64_t[::1] firsts = first
    cdef list names = list(folders)
    cdef Caller caller = Caller()
    cdef hold_report report
    cdef hold_options options
    cdef hold_batch batch
    cdef size_t i
    cdef const char **texts
    cdef bint whole
    cdef int rc
    batch.n = len(names)
    whole = <size_t>firsts.shape[0] == batch.n + 1
    if not whole or firsts[0] != 0 or firsts[batch.n] != <int64_t>rows.n:
        raise ValueError(f"first: does not divide {rows.n} files among {batch.n} folders")
    for i in range(batch.n):
        if firsts[i] > firsts[i + 1]:
            raise ValueError(f"first: falls from {firsts[i]} to {firsts[i + 1]} at {i}")
    texts = <const char **>calloc(batch.n + 1, sizeof(char *))
    if texts is NULL:
        raise MemoryError
    try:
        for i in range(batch.n):
            texts[i] = text_of(names[i])
        batch.folders = texts
        batch.first = &firsts[0]
        batch.files = rows.rows
        caller.progress = progress
        options.threads = threads
        options.progress = call_back
        options.context = <void *>caller
        with nogil:
            rc = hold_files_write(dirfd, &batch, &options, &report)
    finally:
        free(texts)
    if rc == HOLD_EABORT:
        raise caller.raised
    if rc:
        path = names[report.file]
        if report.segment >= 0:
            path = os.path.join(path, rows.paths[report.segment])
        check_path(rc, path, filename)


def open_beneath(int dirfd, path, *, bint links=False, filename=None):
    """Open a regular file in a folder for reading: a descriptor, which the caller closes."""
    cdef const char *text = text_of(path)
    cdef int rc
    with nogil:
        rc = hold_file_open(dirfd, text, links)
    if rc < 0:
        check_path(rc, path, filename)
    return rc


def create_beneath(int dirfd, path, *, filename=None):
    """Create a file in a folder, and the folders on the way: a descriptor, for the caller."""
    cdef const char *text = text_of(path)
    cdef int rc
    with nogil:
        rc = hold_file_create(dirfd, text)
    if rc < 0:
        check_path(rc, path, filename)
    return rc


#: How often what has the name is looked at once more, since another took it meanwhile.
cdef enum:
    LOOKS = 100


cdef int decide(hold_folder *handle, may_replace) except? -1:
    """Ask whether what has the name now may be replaced: 0, -errno, or 1 to be asked again."""
    cdef int rc
    cdef bint allowed = False
    with nogil:
        rc = hold_folder_look(handle)
    if rc >= 0:
        allowed = may_replace(rc)
    elif rc != -errno.ENOENT:
        return rc
    with nogil:
        rc = hold_folder_allow(handle, allowed)
    return rc


cdef class FolderPublication:
    """A folder being filled that appears under its name whole, by :meth:`commit`, or not at all.

    Without `replace` the name must be that of nothing, or of an empty folder. As a context manager
    it is aborted at the end of the block unless it was committed.
    """

    cdef hold_folder *handle
    cdef readonly object path

    def __cinit__(self, path, *, bint replace=True):
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int rc
        if b"\0" in encoded:
            raise ValueError(f"embedded null byte in path {path!r}")
        self.path = os.fspath(path)
        with nogil:
            rc = hold_folder_begin(name, replace, &self.handle)
        check(rc, self.path)

    def __dealloc__(self):
        if self.handle is not NULL:
            hold_folder_abort(self.handle)

    cdef hold_folder *end(self) except NULL:
        cdef hold_folder *handle = self.handle
        if handle is NULL:
            raise ValueError(f"{self.path}: the publication has ended")
        self.handle = NULL
        return handle

    @property
    def fd(self):
        """Descriptor of the new folder; owned by this object."""
        if self.handle is NULL:
            raise ValueError(f"{self.path}: the publication has ended")
        return hold_folder_fd(self.handle)

    def ask(self, may_replace):
        """Raise FileExistsError if by now the name is that of a folder not to be replaced.

        `may_replace` is given a descriptor of the folder that has the name, if there is one. An
        empty one is replaced whatever it says.
        """
        cdef hold_folder *handle = self.end()  # so that it is not ended by what is called
        cdef int rc = 1
        cdef int looks = 0
        try:
            while rc == 1:
                looks += 1
                rc = decide(handle, may_replace) if looks <= LOOKS else -errno.EBUSY
        finally:
            self.handle = handle
        check(rc, self.path)

    def commit(self, bint durable=True, may_replace=None):
        """Give the folder its name; if `durable`, once all in it is on the device.

        `may_replace` is asked as by :meth:`ask`, at the last moment, and only the folder about which
        it was asked is replaced.
        """
        cdef hold_folder *handle = self.end()
        cdef int rc
        cdef int looks = 0
        try:
            with nogil:
                rc = hold_folder_complete(handle, durable)
            while rc == 0:
                if may_replace is not None:
                    rc = decide(handle, may_replace)
                    if rc < 0:
                        break
                if rc == 0:
                    with nogil:
                        rc = hold_folder_commit(handle, durable)
                    if rc != 1:
                        handle = NULL
                        break
                looks += 1
                rc = 0 if looks < LOOKS else -errno.EBUSY
        finally:
            if handle is not NULL:
                with nogil:
                    hold_folder_abort(handle)
        check(rc, self.path)

    def abort(self):
        """Forget the folder, unless it was committed or forgotten already."""
        if self.handle is NULL:
            return
        cdef hold_folder *handle = self.end()
        with nogil:
            hold_folder_abort(handle)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.abort()
