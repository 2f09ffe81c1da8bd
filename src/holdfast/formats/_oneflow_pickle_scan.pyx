# cython: language_level=3, boundscheck=False, wraparound=False
"""Where the long runs of bytes of a pickle are, and the pickle without them.

The elements of tensors stand in a single file of OneFlow as ``bytes`` in its pickle, gigabytes of
them. :class:`Scanner` passes over a pickle without running it, and leaves every ``bytes`` and
``bytearray`` out: in its place stands a persistent id, the number of the run.
"""

cimport cython
from cpython.mem cimport PyMem_Free
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memchr

from ._pickle_out cimport Output, raw
from ._pickle_stack cimport LINE

import numpy as np

from ..errors import FormatError

__all__ = ["BLOCK", "Scanner"]

#: A run of bytes: where in the file, how many, and where in the condensed pickle what stands for
#: them ends; `array` for a ``bytearray``.
BLOCK = np.dtype([("offset", np.int64), ("nbytes", np.int64), ("end", np.int64),
                  ("array", np.int64)])

cdef struct Block:
    int64_t offset
    int64_t nbytes
    int64_t end
    int64_t array

cdef enum Shape:
    REFUSED = 0
    BARE = 1        # opcodes without an argument
    FIXED1 = 2      # with one of so many bytes
    FIXED2 = 3
    FIXED4 = 4
    FIXED8 = 5
    LINE1 = 6       # with lines of text
    LINE2 = 7
    COUNTED1 = 8    # with a count of so many bytes, and as many bytes as it says
    COUNTED4 = 9
    COUNTED8 = 10
    BLOCK1 = 11     # the same, of what is left out
    BLOCK4 = 12
    BLOCK8 = 13
    FRAME = 14
    LAST = 15

cdef uint8_t[256] _SHAPES


def _shape_all():
    cdef object ops, op
    for ops, shape in (
            (b"()012NR]abdelostu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94", BARE),
            (b"Khq\x80", FIXED1), (b"M", FIXED2), (b"Jjr", FIXED4), (b"G", FIXED8), (b"IL", LINE1),
            (b"c", LINE2), (b"\x8cU\x8a", COUNTED1), (b"XT\x8b", COUNTED4), (b"\x8d", COUNTED8),
            (b"C", BLOCK1), (b"B", BLOCK4), (b"\x8e\x96", BLOCK8), (b"\x95", FRAME),
            (b".", LAST)):
        for op in list(ops):
            _SHAPES[<int> op] = shape


_shape_all()


@cython.final
cdef class Scanner:
    """Passes over one pickle, a window at a time.

    Parameters
    ----------
    name : str
        Of the file, for messages.
    where : str
        What the pickle is called in messages.
    size : int
        Where the file ends; -1 where nobody knows.
    most : int
        Bytes of the condensed pickle, and number of runs, at most.

    Attributes
    ----------
    pos : int
        Where in the file the next opcode is; behind the pickle once `done`.
    done : bool
    """

    cdef str name, where
    cdef int64_t size, most
    cdef readonly int64_t pos
    cdef readonly bint done
    cdef Output out, found
    cdef int64_t count
    cdef bint passed  # whether the last opcode was left out

    def __init__(self, str name, str where, int64_t size, int64_t most):
        self.name = name
        self.where = where
        self.size = size
        self.most = most

    def __dealloc__(self):
        PyMem_Free(self.out.data)
        PyMem_Free(self.found.data)

    @property
    def condensed(self):
        """The pickle without the runs."""
        return self.out.data[:self.out.used] if self.out.used else b""

    @property
    def blocks(self):
        """The runs, as rows of BLOCK."""
        data = self.found.data[:self.found.used] if self.found.used else b""
        return np.frombuffer(data, BLOCK)

    cdef object fault(self, str text):
        return FormatError(f"{self.name}: {self.where}offset {self.pos}: {text}")

    cdef int room(self, int64_t nbytes) except -1:
        if nbytes > self.most - <int64_t> self.out.used:
            raise self.fault(f"a pickle of more than {self.most} bytes besides those of tensors")
        return 0

    def feed(self, const uint8_t[::1] data):
        """Take in the bytes at `pos`; returns how many there have to be to take in one opcode more.

        It is 0 where the pickle is at its end, or `pos` lies behind all of `data`.

        Raises
        ------
        FormatError
            An opcode that is not known, or that asks for more bytes than the file has.
        """
        cdef const uint8_t *start = &data[0] if data.shape[0] else NULL
        cdef int64_t left = data.shape[0], used
        while not self.done and left > 0:
            self.passed = False
            used = self.opcode(start, left)
            if used > left and not self.passed:
                return used
            self.pos += used
            start += used
            left -= used
        return 0

    cdef int64_t opcode(self, const uint8_t *at, int64_t left) except -1:
        """Take in one opcode; returns its length, or how many bytes it needs where `left` is less.

        Of one that is left out, `passed`, the length may be more than `left`.
        """
        cdef int shape = _SHAPES[at[0]], width
        cdef int64_t length
        if shape == BARE or shape == LAST:
            self.done = shape == LAST
            return self.keep(at, 1)
        if shape <= FIXED8 and shape != REFUSED:
            length = 1 + (1 << (shape - FIXED1))
            return self.keep(at, length) if length <= left else length
        if shape == LINE1 or shape == LINE2:
            return self.lines(at, left, 2 if shape == LINE2 else 1)
        if shape == REFUSED:
            raise self.fault(f"the opcode {at[0]:#04x} is not one that can be read here")
        width = 8 if shape in (COUNTED8, BLOCK8, FRAME) else (
            4 if shape in (COUNTED4, BLOCK4) else 1)
        if left < 1 + width:
            return 1 + width
        length = self.count_of(at + 1, width)
        if shape == FRAME:  # what stands in it gets shorter; a number that is dropped takes its place
            return self.keep(<const uint8_t *> b"K\x000K\x000K\x000", 9)
        if shape == BLOCK1 or shape == BLOCK4 or shape == BLOCK8:
            self.leave_out(1 + width, length, at[0] == 0x96)
            return 1 + width + length
        self.room(1 + width + length)
        length += 1 + width
        return self.keep(at, length) if length <= left else length

    cdef int64_t count_of(self, const uint8_t *at, int width) except -1:
        """The count that an opcode begins with: of bytes that the file can have."""
        cdef uint64_t count = 0
        cdef int i
        for i in range(width):
            count |= <uint64_t> at[i] << (8 * i)
        if count > <uint64_t> (0x3FFFFFFFFFFFFFFF) or self.size >= 0 and (
                <int64_t> count > self.size - self.pos - 1 - width):
            left = f", {self.size - self.pos - 1 - width} are left" if self.size >= 0 else ""
            raise self.fault(f"needs {count} more bytes{left}")
        return <int64_t> count

    cdef int64_t keep(self, const uint8_t *at, int64_t length) except -1:
        self.room(length)
        raw(&self.out, <const char *> at, <size_t> length)
        return length

    cdef int64_t lines(self, const uint8_t *at, int64_t left, int count) except -1:
        """Lines of text, of at most LINE bytes each."""
        cdef const uint8_t *found = at
        cdef int64_t length = 1
        cdef int i
        for i in range(count):
            found = <const uint8_t *> memchr(at + length, 10, <size_t> min(left - length, LINE))
            if found is NULL:
                if left - length >= LINE:
                    raise self.fault(f"a line has no end within {LINE} bytes")
                return left + 1
            length = found - at + 1
        return self.keep(at, length)

    cdef int leave_out(self, int64_t head, int64_t nbytes, bint array) except -1:
        """Note a run of bytes, and put its number in its place."""
        cdef Block block
        cdef uint8_t[6] stand_in
        cdef int i
        if self.count >= 0x7FFFFFFF:
            raise self.fault("more runs of bytes than can be counted")
        self.room(6)
        stand_in[0], stand_in[5] = 0x4A, 0x51  # BININT, BINPERSID
        for i in range(4):
            stand_in[1 + i] = <uint8_t> (<int64_t> self.count >> (8 * i))
        raw(&self.out, <const char *> &stand_in[0], 6)
        block.offset = self.pos + head
        block.nbytes = nbytes
        block.end = <int64_t> self.out.used
        block.array = array
        raw(&self.found, <const char *> &block, sizeof(Block))
        self.count += 1
        self.passed = True
        return 0
