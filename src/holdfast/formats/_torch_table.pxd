from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._inert cimport Storage, Tensor
from ._pickle cimport Machine


# What the first run notes of each global, call, instance, state and persistent id, in the order
# of the pickle, and the second run then does.
cdef enum:
    MAX_NDIM = 64


cdef enum Event:
    # A global: keep it as it is, for it is only called or names a storage's type; or find it.
    KEEP = 0
    FIND = 1
    # A persistent id: KEEP (only tensors are made of the storage), or one of these.
    GIVE = 2        # the storage
    CLASS = 3       # the class that it names
    GIVEN = 4       # the tensor that it names
    # A call.
    CALL = 5        # ask
    CALL_SKIP = 6   # ask, and pass over the entry that shows the tensor as a plain one
    NEXT = 7        # the tensor of the next entry
    SAME = 8        # the first argument, which already is the parameter
    ORDERED = 9     # an OrderedDict
    SET = 10
    FROZENSET = 11
    NEW = 12        # an instance: ask
    LATE = 13       # the tensor that will be known when its state has been read
    # A state.
    STATE = 14      # ask
    ATTRIBUTES = 15  # of an OrderedDict
    DONE = 16       # it is in the tensor
    DONE_SKIP = 17  # it is in the tensor, whose entry is the next


cdef class Columns:
    cdef uint8_t *data
    cdef size_t nbytes, room

    cdef void *add(self, size_t nbytes) except NULL
    cdef object array(self, object dtype)


# What a global is to torch's pickles.
cdef enum Code:
    UNKNOWN = 0
    REBUILD_V1 = 1
    REBUILD_V2 = 2
    REBUILD_V3 = 3
    PARAMETER_OF = 4    # _rebuild_parameter
    FROM_TYPE = 5       # _rebuild_from_type_v2
    SPECIAL = 6         # other ways to make a tensor of others
    VARIABLE = 7        # classes that wrap a tensor
    PARAMETER = 8
    LEGACY = 9          # classes of tensors that get a state
    STORAGE_TYPE = 10
    DICT = 11           # collections.OrderedDict
    SET_TYPE = 12
    FROZENSET_TYPE = 13
    RECONSTRUCT = 14


# One row of ENTRY.
cdef struct Row:
    uint64_t offset
    uint64_t nbytes
    int64_t dims
    int16_t dtype
    int16_t ndim
    uint32_t file


# A storage: elements, bytes, the code in its persistent id, and that of the type it is kept as.
cdef struct Span:
    int64_t numel
    int64_t nbytes
    int32_t given
    int32_t dtype


# What a persistent id named: for where the second run wants the storage itself.
cdef struct Mention:
    int64_t event
    int64_t row
    int32_t code
    int32_t narrowed  # to elements `first` to `first + numel` of the row
    int64_t first
    int64_t numel


# A tensor that the runs pass over in one step: bytes of the pickle, and the memo's place for it.
cdef struct Passage:
    int64_t start
    int64_t end
    int64_t place


cdef class Table(Machine):
    cdef bint legacy, strided, flagged
    cdef Columns events, rows, dims, strides, owners, flags, spans, mentions
    cdef Py_ssize_t nentries
    cdef readonly list keys, locations
    cdef dict row_of, views
    cdef readonly dict kinds

    cdef Py_ssize_t event(self, int what) except -1
    cdef object on_storage(self, tuple pid)
    cdef int64_t find_storage(self, str key, int code, int64_t numel, location) except -1
    cdef int64_t add_storage(self, str key, int code, int64_t numel, location) except -1
    cdef int mention(self, Storage storage, Py_ssize_t event, bint narrowed) except -1
    cdef int narrow(self, Storage storage, view) except -1
    cdef int64_t integer(self, object value, str what) except -1
    cdef Tensor add_tensor(self, tuple args, int code)
    cdef bint usual(self, tuple args, int code)
    cdef uint16_t conjugation(self, metadata) except? 0xFFFF
    cdef int check_gradient(self, int dtype) except -1
    cdef tuple extents(self, object size, str what)
    cdef Py_ssize_t add_row(self, Storage storage, int dtype, tuple args) except -1
    cdef Py_ssize_t put_row(self, Py_ssize_t owner, int code, int64_t first, int64_t numel,
                            int dtype, int64_t offset, Py_ssize_t ndim, int64_t *dims,
                            int64_t *steps) except -1
    cdef int place(self, int code, int64_t first, int64_t numel, int64_t offset, int64_t last,
                   int64_t count, Row *row) except -1
