# cython: language_level=3, boundscheck=False, wraparound=False
"""What a pickle machine works on: its stack, its memo, the bytes, and Python's own containers.

Every length is checked against what is left before anything is allocated, nothing recurses, and
what a pickle can make this hold is in proportion to the bytes that it takes in the file.
"""

from collections import OrderedDict

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_SetItem
from cpython.list cimport PyList_New
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject, PyObject_SetItem
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_New
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memchr, memset

from ._inert cimport Ghost, Global, Storage, Tensor, brief

from ..errors import FormatError

cdef extern from "Python.h":
    # With a reference to `item` that they take over.
    void PyTuple_SET_ITEM(PyObject *target, Py_ssize_t i, PyObject *item)
    void PyList_SET_ITEM(PyObject *target, Py_ssize_t i, PyObject *item)


cdef dict _OPCODES = {
    0x28: "MARK", 0x29: "EMPTY_TUPLE", 0x2E: "STOP", 0x30: "POP", 0x31: "POP_MARK", 0x32: "DUP",
    0x42: "BINBYTES", 0x43: "SHORT_BINBYTES", 0x46: "FLOAT", 0x47: "BINFLOAT", 0x49: "INT",
    0x4A: "BININT", 0x4B: "BININT1", 0x4C: "LONG", 0x4D: "BININT2", 0x4E: "NONE", 0x50: "PERSID",
    0x51: "BINPERSID", 0x52: "REDUCE", 0x53: "STRING", 0x54: "BINSTRING", 0x55: "SHORT_BINSTRING",
    0x56: "UNICODE", 0x58: "BINUNICODE", 0x5D: "EMPTY_LIST", 0x61: "APPEND", 0x62: "BUILD",
    0x63: "GLOBAL", 0x64: "DICT", 0x65: "APPENDS", 0x67: "GET", 0x68: "BINGET", 0x69: "INST",
    0x6A: "LONG_BINGET", 0x6C: "LIST", 0x6F: "OBJ", 0x70: "PUT", 0x71: "BINPUT",
    0x72: "LONG_BINPUT", 0x73: "SETITEM", 0x74: "TUPLE", 0x75: "SETITEMS", 0x7D: "EMPTY_DICT",
    0x80: "PROTO", 0x81: "NEWOBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x85: "TUPLE1",
    0x86: "TUPLE2", 0x87: "TUPLE3", 0x88: "NEWTRUE", 0x89: "NEWFALSE", 0x8A: "LONG1",
    0x8B: "LONG4", 0x8C: "SHORT_BINUNICODE", 0x8D: "BINUNICODE8", 0x8E: "BINBYTES8",
    0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX",
    0x93: "STACK_GLOBAL", 0x94: "MEMOIZE", 0x95: "FRAME", 0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}

# Attributes of an OrderedDict that a pickle could hide by one of the same name.
cdef frozenset _METHODS = frozenset(dir(OrderedDict))


class Truncated(FormatError):
    """The bytes end before the pickle does; there have to be `needed` of them at least."""

    def __init__(self, text, needed):
        super().__init__(text)
        self.needed = needed


class PassedOver(Exception):  # noqa: N818 - it never leaves the package
    """The pickle asks for what was passed over: it has to be run again without that."""


cdef class Stack:
    """What one pickle has pushed and remembered, and the bytes that are left of it."""

    def __cinit__(self, data, Py_ssize_t start, str name, str where, int64_t base, *more, **named):
        self.buffer = memoryview(data).cast("B")
        self.size = self.buffer.shape[0]
        self.data = &self.buffer[0] if self.size else NULL
        if start < 0 or start > self.size:
            raise ValueError("start lies outside of the data")
        self.pos = self.at = self.begin = start
        self.name = name
        self.where = where
        self.base = base
        self.hashes = {}
        self.sources = {}
        self.longest = INTEGER

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.depth):
            Py_XDECREF(self.stack[i])
        for i in range(self.memo_room):
            Py_XDECREF(self.memo[i])
        PyMem_Free(self.stack)
        PyMem_Free(self.marks)
        PyMem_Free(self.memo)

    cdef object fault(self, str text):
        """The error that this pickle is wrong at the opcode that is being run."""
        where = f"{self.where}: " if self.where else ""
        op = self.data[self.at] if self.at < self.size else -1
        code = _OPCODES.get(op, f"{op:#04x}" if op >= 0 else "the end")
        return FormatError(f"{self.name}: {where}offset {self.base + self.at} ({code}): {text}")

    # -- the stack ---------------------------------------------------------------------------

    cdef int grow(self) except -1:
        cdef Py_ssize_t room = 256 if self.room == 0 else 2 * self.room
        cdef void *made = PyMem_Realloc(self.stack, <size_t> room * sizeof(PyObject *))
        if made is NULL:
            raise MemoryError
        self.stack = <PyObject **> made
        self.room = room
        return 0

    cdef int push(self, object item) except -1:
        if self.depth == self.room:
            self.grow()
        Py_INCREF(item)
        self.stack[self.depth] = <PyObject *> item
        self.depth += 1
        return 0

    cdef object pop(self):
        if self.depth <= self.fence:
            raise self.fault("nothing is left on the stack")
        self.depth -= 1
        item = <object> self.stack[self.depth]
        Py_DECREF(item)
        return item

    cdef Py_ssize_t pop_mark(self) except -1:
        """Where on the stack the items after the last mark begin; the mark is gone."""
        if self.nmarks == 0:
            raise self.fault("there is no mark")
        self.nmarks -= 1
        self.fence = self.marks[self.nmarks - 1] if self.nmarks else 0
        return self.marks[self.nmarks]

    cdef tuple take_tuple(self, Py_ssize_t start):
        """The items from `start` on, which leave the stack."""
        cdef Py_ssize_t i, n = self.depth - start
        cdef tuple made = PyTuple_New(n)
        for i in range(n):
            PyTuple_SET_ITEM(<PyObject *> made, i, self.stack[start + i])
        self.depth = start
        return made

    cdef list take_list(self, Py_ssize_t start):
        cdef Py_ssize_t i, n = self.depth - start
        cdef list made = PyList_New(n)
        for i in range(n):
            PyList_SET_ITEM(<PyObject *> made, i, self.stack[start + i])
        self.depth = start
        return made

    cdef int drop(self, Py_ssize_t start) except -1:
        # One at a time: what goes may run code that is Python's own, never one that sees the stack.
        cdef PyObject *item
        while self.depth > start:
            self.depth -= 1
            item = self.stack[self.depth]
            Py_XDECREF(item)
        return 0

    # -- reading -----------------------------------------------------------------------------

    cdef int need(self, uint64_t nbytes) except -1:
        if nbytes > <uint64_t> (self.size - self.pos):
            text = f"needs {nbytes} more bytes, {self.size - self.pos} are left"
            raise Truncated(str(self.fault(text)), self.pos + int(nbytes))
        return 0

    cdef uint64_t number(self, int width) except? 0xFFFFFFFFFFFFFFFF:
        cdef uint64_t value = 0
        cdef int i
        self.need(width)
        for i in range(width):
            value |= <uint64_t> self.data[self.pos + i] << (8 * i)
        self.pos += width
        return value

    cdef str line(self):
        """Text up to the end of its line."""
        cdef Py_ssize_t left = min(self.size - self.pos, LINE)
        cdef const uint8_t *start = self.data + self.pos
        cdef const uint8_t *found = NULL
        if left > 0:
            found = <const uint8_t *> memchr(start, 10, left)
        if found is NULL:
            if left < LINE:
                raise Truncated(str(self.fault("a line has no end")), self.size + 1)
            raise self.fault(f"a line has no end within {LINE} bytes")
        self.pos += found - start + 1
        try:
            return PyUnicode_DecodeUTF8(<const char *> start, found - start, NULL)
        except UnicodeDecodeError as error:
            raise self.fault("a line that is not UTF-8") from error

    cdef int long_(self, uint64_t nbytes) except -1:
        if nbytes > self.longest:
            raise self.fault(f"an integer of {nbytes} bytes, more than {self.longest}")
        if nbytes > KEY_INTEGER:
            self.giants = True
        self.need(nbytes)
        text = PyBytes_FromStringAndSize(<const char *> self.data + self.pos, <Py_ssize_t> nbytes)
        self.pos += <Py_ssize_t> nbytes
        return self.push(int.from_bytes(text, "little", signed=True))

    # -- the memo ----------------------------------------------------------------------------

    cdef int put(self, uint64_t index) except -1:
        if self.depth <= self.fence:
            raise self.fault("nothing is left on the stack")
        return self.remember(index, self.stack[self.depth - 1])

    cdef int remember(self, uint64_t index, PyObject *item) except -1:
        cdef Py_ssize_t room
        cdef void *made
        cdef PyObject *old
        if index > <uint64_t> self.pos:
            raise self.fault(f"memo index {index} is too large for a pickle of so few bytes")
        if index >= <uint64_t> self.memo_room:
            room = max(256, 2 * <Py_ssize_t> index)
            made = PyMem_Realloc(self.memo, <size_t> room * sizeof(PyObject *))
            if made is NULL:
                raise MemoryError
            self.memo = <PyObject **> made
            memset(self.memo + self.memo_room, 0,
                   <size_t> (room - self.memo_room) * sizeof(PyObject *))
            self.memo_room = room
        old = self.memo[index]
        self.memo[index] = item
        Py_INCREF(<object> item)
        if old is NULL:
            self.memo_next += 1
        else:
            Py_XDECREF(old)
        return 0

    cdef int get(self, uint64_t index) except -1:
        if index >= <uint64_t> self.memo_room or self.memo[index] is NULL:
            raise self.fault(f"memo index {index} was never set")
        item = <object> self.memo[index]
        if type(item) is Ghost:
            raise PassedOver
        if type(item) is Global or type(item) is Storage or type(item) is Tensor:
            if self.on_again(item):
                return 0
        return self.push(item)

    # -- containers --------------------------------------------------------------------------
    cdef int check_key(self, object target, object key) except -1:
        """Whether `key` can be hashed in bounded time and stack, and does not crowd `target`."""
        kind = type(key)
        if kind is str or kind is bytes or kind is float or kind is bool or key is None:
            return 0
        if kind is int and -0x8000000000000000 <= key < 0x8000000000000000:
            return 0
        if isinstance(key, tuple):
            self.check_tuple(key)
        elif kind is int:
            self.check_integer(key)
        try:
            value = hash(key)
        except TypeError as error:
            raise self.fault(f"{brief(key)} cannot be a key") from error
        # Numbers, and tuples of them, can be chosen so that all have one hash, and each then costs
        # a comparison with all others.
        if len(target) > CROWD:
            known = self.hashes.setdefault(value, [0, key])
            if known[1] is not key and known[1] != key:
                known[0] += 1
                if known[0] > CROWD:
                    raise self.fault(f"more than {CROWD} keys have one hash")
        return 0

    cdef int check_integer(self, object key) except -1:
        # Python hashes it anew each time, and would take long to write it out for a path.
        if self.giants and type(key) is int and key.bit_length() > 8 * KEY_INTEGER:
            raise self.fault(f"an integer of more than {KEY_INTEGER} bytes as a key")
        return 0

    cdef int check_tuple(self, object key) except -1:
        """Refuse a tuple whose hash would take long, or recurse deeply."""
        cdef Py_ssize_t members = 0
        cdef int levels = 0
        level = [key]
        while level:
            levels += 1
            for item in level:
                members += len(item)
                if self.giants and members <= KEY_MEMBERS:
                    for child in item:
                        self.check_integer(child)
            if levels > KEY_LEVELS or members > KEY_MEMBERS:
                raise self.fault("a key of too many members or levels")
            level = [child for item in level for child in item if isinstance(child, tuple)]
        # A few bytes have one key hashed once more, and Python does not keep the hash of a tuple.
        self.hashed += members
        if self.hashed > KEYS + KEYS_PER_BYTE * <int64_t> (self.size - self.begin):
            raise self.fault("keys that have too many members in all")
        return 0

    cdef int set_item(self, object target, object key, object value) except -1:
        if type(key) is not str:
            self.check_key(target, key)
        if type(target) is dict:
            PyDict_SetItem(target, key, value)
        else:
            PyObject_SetItem(target, key, value)
        return 0

    cdef int set_items(self, Py_ssize_t start) except -1:
        """Set the keys and values from `start` on as items of what stands below them."""
        cdef Py_ssize_t i
        if (self.depth - start) & 1:
            raise self.fault("a key without a value")
        if start <= self.fence:
            raise self.fault("nothing is left on the stack")
        target = <object> self.stack[start - 1]
        if type(target) is dict or type(target) is OrderedDict:
            for i in range(start, self.depth, 2):
                self.set_item(target, <object> self.stack[i], <object> self.stack[i + 1])
            return self.drop(start)
        items = self.take_list(start)
        if not items:
            return 0
        for key in items[::2]:
            self.check_key((), key)
        return self.on_update(target, list(zip(items[::2], items[1::2])))

    cdef int append(self, Py_ssize_t start) except -1:
        """Append the items from `start` on to what stands below them."""
        cdef Py_ssize_t i
        if start <= self.fence:
            raise self.fault("nothing is left on the stack")
        target = <object> self.stack[start - 1]
        if type(target) is list:
            for i in range(start, self.depth):
                (<list> target).append(<object> self.stack[i])
            return self.drop(start)
        items = self.take_list(start)
        return self.on_extend(target, items) if items else 0

    cdef int add_items(self, Py_ssize_t start) except -1:
        if start <= self.fence:
            raise self.fault("nothing is left on the stack")
        target = <object> self.stack[start - 1]
        if type(target) is not set:
            raise self.fault(f"adds members to {brief(target)}")
        for item in self.take_list(start):
            self.check_key(target, item)
            (<set> target).add(item)
        return 0

    cdef int copies(self, object source, int64_t nbytes) except -1:
        """Note that `nbytes` are made of `source`; a few bytes have them made once more."""
        if nbytes >= SMALL:
            if id(source) in self.sources:
                self.copied += nbytes
                if self.copied > COPIED:
                    raise self.fault(f"more than {COPIED} bytes of copies of the same things")
            self.sources[id(source)] = source  # kept, so that its id stays its own
        return 0

    cdef object made(self, object obj):
        """`obj`, which is a copy: one of it is not the first."""
        if len(obj) * 64 >= SMALL:
            self.sources[id(obj)] = obj
        return obj

    cdef object make_set(self, object kind, object items, bint own=False):
        """A set or frozenset of `items`; `own`: they are nobody else's."""
        made = set()
        if type(items) not in (list, tuple, set, frozenset):
            raise self.fault(f"a set of the members of {brief(items)}")
        if not own:
            self.copies(items, 64 * len(items))
        for item in items:
            self.check_key(made, item)
            made.add(item)
        if kind is frozenset:
            made = frozenset(made)
        return made if own else self.made(made)

    cdef object make_ordered(self, tuple args):
        """``OrderedDict(*args)``."""
        made = OrderedDict()
        if not args:
            return made
        pairs = args[0]
        if type(pairs) in (dict, OrderedDict, list, tuple):
            self.copies(pairs, 128 * len(pairs))
        if type(pairs) is dict or type(pairs) is OrderedDict:
            pairs = list(pairs.items())
        if len(args) != 1 or type(pairs) not in (list, tuple):
            raise self.fault("arguments of an OrderedDict that are not one list of pairs")
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise self.fault("arguments of an OrderedDict that are not one list of pairs")
            self.set_item(made, pair[0], pair[1])
        return self.made(made)

    cdef int set_attributes(self, object target, object state) except -1:
        """Attributes of an OrderedDict, such as the ``_metadata`` of a state_dict."""
        if state is None:
            return 0
        if type(state) is not dict:
            raise self.fault(f"{brief(state)} as the state of an OrderedDict")
        for key in <dict> state:
            if type(key) is not str or key in _METHODS or key.startswith("__"):
                raise self.fault(f"an OrderedDict cannot have an attribute {brief(key)}")
        self.copies(state, 64 * len(<dict> state))
        target.__dict__.update(state)
        return 0

    # -- what the machine says ---------------------------------------------------------------

    cdef int on_again(self, object item) except -1:
        """A global, tensor or storage is pushed once more; true where that was done already."""
        return 0

    cdef int on_extend(self, object target, list items) except -1:
        raise self.fault(f"appends to {brief(target)}")

    cdef int on_update(self, object target, list pairs) except -1:
        raise self.fault(f"sets items of {brief(target)}")
