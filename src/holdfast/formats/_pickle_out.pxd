"""Opcodes of pickle protocol 2 written to memory that grows, and the memo, as inline C."""

from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy


# -- bytes ---------------------------------------------------------------------------------------

cdef struct Output:
    uint8_t *data
    size_t used
    size_t capacity


cdef inline int reserve(Output *out, size_t more) except -1:
    cdef size_t capacity
    cdef void *data
    if out.capacity - out.used < more:
        capacity = 2 * out.capacity + more + 4096
        data = PyMem_Realloc(out.data, capacity)
        if data is NULL:
            raise MemoryError
        out.data, out.capacity = <uint8_t *>data, capacity
    return 0


cdef inline int byte(Output *out, uint8_t value) except -1:
    reserve(out, 1)
    out.data[out.used] = value
    out.used += 1
    return 0


cdef inline int coded(Output *out, uint8_t op, uint64_t value, int nbytes) except -1:
    """An opcode and its argument of so many bytes, at most 8, the lowest first."""
    cdef int i
    reserve(out, 9)
    out.data[out.used] = op
    for i in range(nbytes):
        out.data[out.used + 1 + i] = <uint8_t>(value >> 8 * i)
    out.used += 1 + nbytes
    return 0


cdef inline int raw(Output *out, const char *data, size_t n) except -1:
    reserve(out, n)
    memcpy(out.data + out.used, data, n)
    out.used += n
    return 0


cdef inline int text(Output *out, bytes data) except -1:
    return raw(out, data, len(data))


cdef inline int new_text(Output *out, str value) except -1:
    """A short text that is nowhere else."""
    cdef bytes data = value.encode("utf-8")
    coded(out, c"X", <uint64_t>len(data), 4)
    return raw(out, data, <size_t>len(data))


# -- numbers -------------------------------------------------------------------------------------

cdef inline int integer(Output *out, int64_t value) except -1:
    """An int that fits into 32 bits."""
    if 0 <= value < 1 << 8:
        return coded(out, c"K", <uint64_t>value, 1)
    if 0 <= value < 1 << 16:
        return coded(out, c"M", <uint64_t>value, 2)
    return coded(out, c"J", <uint64_t>value, 4)


cdef inline int long_integer(Output *out, object value) except -1:
    """An int that does not."""
    cdef Py_ssize_t nbytes = (value.bit_length() >> 3) + 1
    cdef bytes data = value.to_bytes(nbytes, "little", signed=True)
    cdef const uint8_t *digits = data
    # -(2 ** 63) and its like have a byte to spare.
    if value < 0 and digits[nbytes - 1] == 0xFF and digits[nbytes - 2] & 0x80:
        nbytes -= 1
    if nbytes < 256:
        coded(out, 0x8A, <uint64_t>nbytes, 1)
    else:
        coded(out, 0x8B, <uint64_t>nbytes, 4)
    return raw(out, <const char *>digits, <size_t>nbytes)


cdef inline int extent(Output *out, int64_t value) except -1:
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return integer(out, value)
    return long_integer(out, value)


cdef inline int real(Output *out, double value) except -1:
    cdef uint64_t bits
    cdef int i
    memcpy(&bits, &value, 8)
    reserve(out, 9)
    out.data[out.used] = c"G"
    for i in range(8):
        out.data[out.used + 1 + i] = <uint8_t>(bits >> (56 - 8 * i))
    out.used += 9
    return 0


# -- the memo ------------------------------------------------------------------------------------

cdef struct Place:
    PyObject *key
    Py_ssize_t value


cdef struct Memo:
    # A hash table of addresses; mask + 1 places, of which at most two thirds are taken.
    Place *places
    size_t mask
    size_t used


cdef inline int memo_open(Memo *memo, size_t mask) except -1:
    """Make a memo with mask + 1 places, a power of two."""
    memo.places = <Place *>PyMem_Calloc(mask + 1, sizeof(Place))
    if memo.places is NULL:
        raise MemoryError
    memo.mask, memo.used = mask, 0
    return 0


cdef inline void memo_close(Memo *memo):
    """Let go of every object in it. Harmless for one that was zeroed and never opened."""
    cdef size_t i
    cdef PyObject *key
    if memo.places is not NULL:
        for i in range(memo.mask + 1):
            key = memo.places[i].key
            memo.places[i].key = NULL
            if key is not NULL:
                Py_DECREF(<object>key)
    PyMem_Free(memo.places)
    memo.places = NULL


cdef inline Place *memo_place(const Memo *memo, PyObject *key) noexcept:
    """Where `key` stands, or else would."""
    # Objects of one region stay neighbours, for the cache; the regions are strewn.
    cdef uint64_t address = <uintptr_t>key
    cdef uint64_t region = (address >> 16) * <uint64_t>0x9E3779B97F4A7C15
    cdef size_t i = <size_t>((address >> 4) + (region >> 24)) & memo.mask
    while memo.places[i].key is not NULL and memo.places[i].key is not key:
        i = (i + 1) & memo.mask
    return &memo.places[i]


cdef inline Py_ssize_t memo_find(const Memo *memo, object key) noexcept:
    """The number of `key`, or -1."""
    cdef const Place *place = memo_place(memo, <PyObject *>key)
    return -1 if place.key is NULL else place.value


cdef inline int memo_grow(Memo *memo) except -1:
    cdef Memo wider
    cdef size_t i
    memo_open(&wider, 2 * memo.mask + 1)
    for i in range(memo.mask + 1):
        if memo.places[i].key is not NULL:
            memo_place(&wider, memo.places[i].key)[0] = memo.places[i]
    wider.used = memo.used
    PyMem_Free(memo.places)
    memo[0] = wider
    return 0


cdef inline int memo_put(Memo *memo, object key, Py_ssize_t value) except -1:
    """Give `key` a number. It is kept alive, so that its address means it as long as the memo."""
    cdef Place *place
    if 3 * memo.used > 2 * memo.mask:
        memo_grow(memo)
    place = memo_place(memo, <PyObject *>key)
    if place.key is NULL:
        Py_INCREF(key)
        place.key = <PyObject *>key
        memo.used += 1
    place.value = value
    return 0
