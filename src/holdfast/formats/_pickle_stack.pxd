from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef enum:
    # Longest line of text (names of globals, decimal numbers), longest integer of an object, and
    # longest one that is a key or stands in a table, in bytes.
    LINE = 4096
    INTEGER = 1048576
    KEY_INTEGER = 1024
    # Keys that are tuples: members in all, and levels.
    KEY_MEMBERS = 10000
    KEY_LEVELS = 64
    # Members of all such keys, each time that one is hashed: at least, and for each byte.
    KEYS = 4194304
    KEYS_PER_BYTE = 8
    # Bytes of copies of things that are copied more than once, and how many are none worth counting.
    COPIED = 268435456
    SMALL = 512
    # Keys of one hash in a dict of more than so many items.
    CROWD = 1000


cdef class Stack:
    cdef const uint8_t[::1] buffer
    cdef const uint8_t *data
    cdef Py_ssize_t size, pos, at, begin
    cdef str name, where
    cdef int64_t base
    cdef int protocol
    cdef bint passing  # whether anything was passed over
    cdef PyObject **stack
    cdef Py_ssize_t depth, room, fence
    cdef Py_ssize_t *marks
    cdef Py_ssize_t nmarks, marks_room
    cdef PyObject **memo
    cdef Py_ssize_t memo_room, memo_next
    cdef dict hashes
    cdef dict sources  # by their id, what something large was made of, and what was made so
    cdef int64_t copied  # bytes that were made of these
    cdef int64_t hashed  # members of keys
    cdef uint64_t longest  # of integers, in bytes
    cdef bint giants  # whether there was an integer that is too long for a key

    cdef object fault(self, str text)
    cdef int grow(self) except -1
    cdef int push(self, object item) except -1
    cdef object pop(self)
    cdef Py_ssize_t pop_mark(self) except -1
    cdef tuple take_tuple(self, Py_ssize_t start)
    cdef list take_list(self, Py_ssize_t start)
    cdef int drop(self, Py_ssize_t start) except -1
    cdef int need(self, uint64_t nbytes) except -1
    cdef uint64_t number(self, int width) except? 0xFFFFFFFFFFFFFFFF
    cdef str line(self)
    cdef int put(self, uint64_t index) except -1
    cdef int remember(self, uint64_t index, PyObject *item) except -1
    cdef int get(self, uint64_t index) except -1
    cdef int long_(self, uint64_t nbytes) except -1
    cdef int check_key(self, object target, object key) except -1
    cdef int check_integer(self, object key) except -1
    cdef int check_tuple(self, object key) except -1
    cdef int set_item(self, object target, object key, object value) except -1
    cdef int set_items(self, Py_ssize_t start) except -1
    cdef int append(self, Py_ssize_t start) except -1
    cdef int add_items(self, Py_ssize_t start) except -1
    cdef int copies(self, object source, int64_t nbytes) except -1
    cdef object made(self, object obj)
    cdef object make_set(self, object kind, object items, bint own=*)
    cdef object make_ordered(self, tuple args)
    cdef int set_attributes(self, object target, object state) except -1

    cdef int on_again(self, object item) except -1
    cdef int on_extend(self, object target, list items) except -1
    cdef int on_update(self, object target, list pairs) except -1
