# cython: language_level=3, boundscheck=False, wraparound=False
"""The opcodes by which torch.save has always written a plain tensor, recognised in one step.

Nearly every tensor of nearly every file is written alike, save for numbers and the key of its
storage. Going through those thirty opcodes one by one makes seven objects that nobody sees.
"""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t

from ._inert cimport Ghost, Global
from ._torch_table cimport DICT, MAX_NDIM, STORAGE_TYPE

__all__ = []

cdef enum:
    MAX_NAME = 32


cdef class Usual:
    """A plain tensor, as the bytes of a pickle say it."""

    cdef bint parse(self, const uint8_t *data, Py_ssize_t pos, Py_ssize_t size, PyObject **memo,
                    Py_ssize_t memo_room, bint legacy) except -1:
        """Whether the bytes at `pos`, after the global was pushed, are the usual ones."""
        self.data, self.pos, self.size = data, pos, size
        self.memo, self.memo_room = memo, memo_room
        self.nghosts = 0
        if not (self.byte(0x28) and self.byte(0x28) and self.storage()):
            return False
        if legacy and not self.byte(0x4E):
            return False
        if not (self.byte(0x74) and self.forget() and self.byte(0x51)):
            return False
        if not (self.integer(&self.offset) and self.extents(self.dims, &self.ndim)
                and self.extents(self.steps, &self.nsteps) and self.nsteps == self.ndim):
            return False
        if not (self.byte(0x89) and self.global_(DICT) is not None and self.byte(0x29)
                and self.byte(0x52) and self.forget()):
            return False
        return (self.byte(0x74) and self.forget() and self.byte(0x52)
                and self.put(&self.result))

    cdef bint storage(self) except -1:
        """Its word, type, key, location and number of elements."""
        cdef Global kind
        word = self.get()
        if type(word) is not str or word != "storage":
            return False
        kind = self.global_(STORAGE_TYPE)
        if kind is None or kind.dtype < 0:
            return False
        self.dtype = kind.dtype
        if not self.key_():
            return False
        self.location = self.short_text() if self.byte(0x58) else self.get()
        return type(self.location) is str and self.integer(&self.numel)

    cdef object short_text(self):
        """The name of a device other than the host's, which torch writes anew each time."""
        cdef Py_ssize_t length = 0, i
        cdef uint64_t stated
        if not self.number(4, &stated) or not 0 < stated <= MAX_NAME or (
                <Py_ssize_t> stated > self.size - self.pos):
            return None
        length = <Py_ssize_t> stated
        for i in range(length):
            if not 0x20 <= self.data[self.pos + i] < 0x7F:
                return None
        text = (<const char *> self.data + self.pos)[:length].decode("ascii")
        self.pos += length
        return text if self.forget() else None

    cdef bint key_(self) except -1:
        cdef Py_ssize_t length, i
        self.new_key = self.byte(0x58)
        if not self.new_key:
            found = self.get()
            self.key = (<Ghost> found).key if type(found) is Ghost else (
                found if type(found) is str else None)
            return self.key is not None
        if self.size - self.pos < 4:
            return False
        length = self.data[self.pos]
        if length == 0 or length > 24 or self.data[self.pos + 1] or self.data[self.pos + 2] or (
                self.data[self.pos + 3]) or self.size - self.pos - 4 < length:
            return False
        self.pos += 4
        for i in range(length):
            if not 0x30 <= self.data[self.pos + i] <= 0x39:
                return False
        self.key = (<const char *> self.data + self.pos)[:length].decode("ascii")
        self.pos += length
        return self.put(&self.key_place)

    # -- single opcodes ----------------------------------------------------------------------

    cdef bint byte(self, int wanted) noexcept:
        if self.pos >= self.size or self.data[self.pos] != wanted:
            return False
        self.pos += 1
        return True

    cdef bint number(self, int width, uint64_t *value) noexcept:
        cdef int i
        if self.size - self.pos < width:
            return False
        value[0] = 0
        for i in range(width):
            value[0] |= <uint64_t> self.data[self.pos + i] << (8 * i)
        self.pos += width
        return True

    cdef bint integer(self, int64_t *value) noexcept:
        """An integer that is not negative."""
        cdef uint64_t found = 0
        cdef int width
        if self.byte(0x4B):
            width = 1
        elif self.byte(0x4D):
            width = 2
        elif self.byte(0x4A):
            width = 4
        elif self.byte(0x8A):
            if self.pos >= self.size or not 0 < self.data[self.pos] <= 8:
                return False
            width = self.data[self.pos]
            self.pos += 1
            if not self.number(width, &found) or found >> (8 * width - 1):
                return False
            value[0] = <int64_t> found
            return True
        else:
            return False
        if not self.number(width, &found) or (width == 4 and found >> 31):
            return False
        value[0] = <int64_t> found
        return True

    cdef bint put(self, int64_t *place) noexcept:
        """The memo's place that the item is put in; -1 where it is in none."""
        cdef uint64_t index
        place[0] = -1
        if self.byte(0x71):
            if not self.number(1, &index):
                return False
        elif self.byte(0x72):
            if not self.number(4, &index):
                return False
        else:
            return True
        place[0] = <int64_t> index
        return True

    cdef bint forget(self) noexcept:
        """An item that only this tensor is made of."""
        cdef int64_t place
        if not self.put(&place):
            return False
        if place >= 0:
            self.ghosts[self.nghosts] = place
            self.nghosts += 1
        return True

    cdef object get(self):
        """What the memo has at a place that was filled before this tensor; else None."""
        cdef uint64_t index
        if not ((self.byte(0x68) and self.number(1, &index))
                or (self.byte(0x6A) and self.number(4, &index))):
            return None
        if index >= <uint64_t> self.memo_room or self.memo[index] is NULL:
            return None
        return <object> self.memo[index]

    cdef Global global_(self, int code):
        found = self.get()
        return <Global> found if type(found) is Global and (<Global> found).code == code else None

    cdef bint extents(self, int64_t *values, Py_ssize_t *count) noexcept:
        """A tuple of integers."""
        cdef bint marked = self.byte(0x28)
        cdef Py_ssize_t n = 0
        if not marked and self.byte(0x29):
            count[0] = 0
            return self.forget()
        while n < MAX_NDIM and self.integer(&values[n]):
            n += 1
        count[0] = n
        if marked:
            return self.byte(0x74) and self.forget()
        return 0 < n < 4 and self.byte(<int> (0x84 + n)) and self.forget()
