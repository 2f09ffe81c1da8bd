# cython: language_level=3, boundscheck=False, wraparound=False
"""A pickle machine that runs nothing.

:class:`Machine` knows the opcodes and Python's own containers. What a pickle names, calls and
makes is decided by its subclasses; here nothing is imported and nothing is called.
"""

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Realloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy

from ._inert cimport Global, Storage, Tensor, brief
from ._pickle_stack cimport KEY_INTEGER, LINE, Stack

from ._garbage import uncollected
from ._inert import shorten
from ._pickle_stack import PassedOver, Truncated

__all__ = ["Truncated", "read_plain"]


cdef inline double big_endian(const unsigned char *data) noexcept:
    """The float that eight bytes are; Python's own way to say it is public from 3.11 on."""
    cdef uint64_t bits = 0
    cdef double value
    cdef int i
    for i in range(8):
        bits = bits << 8 | data[i]
    memcpy(&value, &bits, sizeof(value))
    return value


cdef class Machine(Stack):
    """Runs one pickle. Subclasses decide what globals, calls and persistent ids mean."""

    cdef object run(self):
        """The object; `pos` is then where the pickle ends."""
        with uncollected():
            return self.run_all()

    cdef object run_all(self):
        cdef int op
        while True:
            self.at = self.pos
            if self.pos >= self.size:
                raise Truncated(str(self.fault("the pickle has no end")), self.size + 1)
            op = self.data[self.pos]
            self.pos += 1
            if op == 0x2E:  # STOP
                break
            self.step(op)
        if self.nmarks or self.depth != 1:
            raise self.fault(f"{self.depth + self.nmarks} items are left on the stack, expected 1")
        return self.pop()

    cdef int step(self, int op) except -1:
        cdef Py_ssize_t start
        if op == 0x68:  # BINGET
            return self.get(self.number(1))
        elif op == 0x71:  # BINPUT
            return self.put(self.number(1))
        elif op == 0x6A:  # LONG_BINGET
            return self.get(self.number(4))
        elif op == 0x72:  # LONG_BINPUT
            return self.put(self.number(4))
        elif op == 0x94:  # MEMOIZE
            if self.passing:
                raise PassedOver  # the memo was not counted
            return self.put(<uint64_t> self.memo_next)
        elif op == 0x4B:  # BININT1
            return self.push(<long> self.number(1))
        elif op == 0x4D:  # BININT2
            return self.push(<long> self.number(2))
        elif op == 0x4A:  # BININT
            return self.push(<int32_t> self.number(4))
        elif op == 0x28:  # MARK
            if self.nmarks == self.marks_room:
                self.grow_marks()
            self.marks[self.nmarks] = self.fence = self.depth
            self.nmarks += 1
            return 0
        elif op == 0x74:  # TUPLE
            start = self.pop_mark()
            return self.push(self.take_tuple(start))
        elif op == 0x85 or op == 0x86 or op == 0x87:  # TUPLE1, TUPLE2, TUPLE3
            start = self.depth - (op - 0x84)
            if start < self.fence:
                raise self.fault("nothing is left on the stack")
            return self.push(self.take_tuple(start))
        elif op == 0x29:  # EMPTY_TUPLE
            return self.push(())
        elif op == 0x89:  # NEWFALSE
            return self.push(False)
        elif op == 0x88:  # NEWTRUE
            return self.push(True)
        elif op == 0x4E:  # NONE
            return self.push(None)
        elif op == 0x7D:  # EMPTY_DICT
            return self.push({})
        elif op == 0x5D:  # EMPTY_LIST
            return self.push([])
        elif op == 0x52 or op == 0x51 or op == 0x81 or op == 0x62 or op == 0x92 or op == 0x6F:
            return self.step_make(op)
        return self.step_text(op)

    cdef int grow_marks(self) except -1:
        cdef Py_ssize_t room = 64 if self.marks_room == 0 else 2 * self.marks_room
        cdef void *made = PyMem_Realloc(self.marks, <size_t> room * sizeof(Py_ssize_t))
        if made is NULL:
            raise MemoryError
        self.marks = <Py_ssize_t *> made
        self.marks_room = room
        return 0

    cdef int step_make(self, int op) except -1:
        """Calls, instances, states and persistent ids."""
        cdef Py_ssize_t start
        if op == 0x51:  # BINPERSID
            return self.push(self.on_persistent(self.pop()))
        if op == 0x62:  # BUILD
            state = self.pop()
            return self.push(self.on_build(self.pop(), state))
        kwargs = None
        if op == 0x6F:  # OBJ
            start = self.pop_mark()
            if start == self.depth:
                raise self.fault("a class is missing")
            args = self.take_tuple(start)
            cls, args = args[0], args[1:]
        else:
            if op == 0x92:  # NEWOBJ_EX
                kwargs = self.pop()
                if type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
                    raise self.fault(f"keyword arguments that are {brief(kwargs)}")
            args = self.pop()
            cls = self.pop()
        if type(args) is not tuple:
            raise self.fault(f"arguments that are {brief(args)}, expected a tuple")
        if op == 0x52:  # REDUCE
            return self.push(self.on_call(cls, args))
        return self.push(self.on_new(cls, args, {} if kwargs is None else kwargs))

    cdef int step_text(self, int op) except -1:
        """Text, bytes, numbers, items and globals."""
        cdef uint64_t nbytes
        cdef const char *text
        if op == 0x58:  # BINUNICODE
            nbytes = self.number(4)
        elif op == 0x8C or op == 0x43 or op == 0x55:  # SHORT_BINUNICODE, _BINBYTES, _BINSTRING
            nbytes = self.number(1)
        elif op == 0x8D or op == 0x8E or op == 0x96:  # BINUNICODE8, BINBYTES8, BYTEARRAY8
            nbytes = self.number(8)
        elif op == 0x42 or op == 0x54:  # BINBYTES, BINSTRING
            nbytes = self.number(4)
        elif op == 0x75:  # SETITEMS
            return self.set_items(self.pop_mark())
        elif op == 0x73:  # SETITEM
            return self.set_items(self.depth - 2)
        elif op == 0x65:  # APPENDS
            return self.append(self.pop_mark())
        elif op == 0x61:  # APPEND
            if self.depth <= self.fence:
                raise self.fault("nothing is left on the stack")
            return self.append(self.depth - 1)
        elif op == 0x47:  # BINFLOAT
            self.need(8)
            self.pos += 8
            return self.push(big_endian(<const unsigned char *> self.data + self.pos - 8))
        else:
            return self.step_rare(op)
        self.need(nbytes)
        text = <const char *> self.data + self.pos
        self.pos += <Py_ssize_t> nbytes
        if op == 0x58 or op == 0x8C or op == 0x8D:
            return self.push(self.decode(text, <Py_ssize_t> nbytes))
        if op == 0x96:
            return self.push(bytearray(text[:<Py_ssize_t> nbytes]))
        if op == 0x54 or op == 0x55:
            return self.push(self.decode_old(text, <Py_ssize_t> nbytes))
        return self.push(PyBytes_FromStringAndSize(text, <Py_ssize_t> nbytes))

    cdef str decode(self, const char *text, Py_ssize_t nbytes):
        try:
            return PyUnicode_DecodeUTF8(text, nbytes, "surrogatepass")
        except UnicodeDecodeError as error:
            raise self.fault("text that is not UTF-8") from error

    cdef object decode_old(self, const char *text, Py_ssize_t nbytes):
        """A str of Python 2: text where it can be that, else bytes, as in its NumPy arrays."""
        if self.encoding is None:
            try:
                return PyUnicode_DecodeUTF8(text, nbytes, NULL)
            except UnicodeDecodeError:
                return PyBytes_FromStringAndSize(text, nbytes)
        found = PyBytes_FromStringAndSize(text, nbytes)
        if self.encoding == "bytes":
            return found
        try:
            return found.decode(self.encoding)
        except UnicodeDecodeError as error:
            where = self.fault("a str of Python 2, which encoding='bytes' leaves as it is")
            error.reason = f"{error.reason} ({where})"
            raise

    cdef int step_rare(self, int op) except -1:
        cdef uint64_t nbytes
        if op == 0x63:  # GLOBAL
            module = self.line()
            return self.global_(module, self.line())
        elif op == 0x93:  # STACK_GLOBAL
            name = self.pop()
            return self.global_(self.pop(), name)
        elif op == 0x8A:  # LONG1
            return self.long_(self.number(1))
        elif op == 0x8B:  # LONG4
            return self.long_(self.number(4))
        elif op == 0x49 or op == 0x4C:  # INT, LONG
            return self.push(self.decimal(self.line(), op))
        elif op == 0x80:  # PROTO
            self.protocol = <int> self.number(1)
            if not 0 < self.protocol <= 5:
                raise self.fault(f"pickle protocol {self.protocol}, expected 1 to 5")
            return 0
        elif op == 0x95:  # FRAME
            nbytes = self.number(8)
            return self.need(nbytes)
        elif op == 0x6C:  # LIST
            return self.push(self.take_list(self.pop_mark()))
        elif op == 0x64:  # DICT
            return self.make_dict()
        elif op == 0x8F:  # EMPTY_SET
            return self.push(set())
        elif op == 0x90:  # ADDITEMS
            return self.add_items(self.pop_mark())
        elif op == 0x91:  # FROZENSET
            return self.push(self.make_set(frozenset, self.take_list(self.pop_mark()), True))
        elif op == 0x31:  # POP_MARK
            return self.drop(self.pop_mark())
        elif op == 0x30:  # POP
            if self.nmarks and self.marks[self.nmarks - 1] == self.depth:
                self.pop_mark()
            else:
                self.pop()
            return 0
        elif op == 0x32:  # DUP
            item = self.pop()
            self.push(item)
            if type(item) is Global or type(item) is Storage or type(item) is Tensor:
                if self.on_again(item):
                    return 0
            return self.push(item)
        raise self.fault("this opcode is not one that can be read here")

    cdef int make_dict(self) except -1:
        cdef list items = self.take_list(self.pop_mark())
        cdef Py_ssize_t i
        made = {}
        if len(items) & 1:
            raise self.fault("a key without a value")
        for i in range(0, len(items), 2):
            self.set_item(made, items[i], items[i + 1])
        return self.push(made)

    cdef object decimal(self, str text, int op):
        """What INT and LONG write; protocol 1 has no other way for large integers."""
        if op == 0x49 and text in ("00", "01"):
            return text == "01"
        digits = text.removesuffix("L") if op == 0x4C else text
        bare = digits.removeprefix("-")
        if not (bare.isascii() and bare.isdigit()) or len(bare) > 2 * KEY_INTEGER:
            raise self.fault(f"{brief(text)} is not a decimal number of at most 2048 digits")
        return int(digits)

    cdef int global_(self, object module, object name) except -1:
        if type(module) is not str or type(name) is not str:
            raise self.fault(f"a global named by {brief(module)} and {brief(name)}")
        if len(module) + len(name) > LINE:
            raise self.fault(f"the name of a global is longer than {LINE} characters")
        if self.protocol < 3:  # Python 2 gave some of its modules other names
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[module, name]
            else:
                module = IMPORT_MAPPING.get(module, module)
        return self.push(self.on_global(module, name))

    # -- what a subclass says ----------------------------------------------------------------

    cdef object on_global(self, str module, str name):
        raise self.fault(f"{shorten(module)}.{shorten(name)}: only plain values are expected here")

    cdef object on_persistent(self, object pid):
        raise self.fault("a persistent id, which is not expected here")

    cdef object on_call(self, object func, tuple args):
        raise self.fault(f"a call of {brief(func)}")

    cdef object on_new(self, object cls, tuple args, dict kwargs):
        raise self.fault(f"an instance of {brief(cls)}")

    cdef object on_build(self, object target, object state):
        raise self.fault(f"a state for {brief(target)}")


@cython.final
cdef class _Plain(Machine):
    cdef object on_global(self, str module, str name):
        if name.endswith(("Storage", "Tensor")) and module.partition(".")[0] == "torch":
            return Global(module, name)
        return Machine.on_global(self, module, name)


def read_plain(data, Py_ssize_t start=0, *, str name, str where="", int64_t base=0):
    """Read a pickle of plain values: Python's containers, numbers and text.

    Parameters
    ----------
    data : bytes-like
    start : int
        Where the pickle begins in `data`; it may end before `data` does.
    name : str
        Of the file, for messages.
    where : str
        What the pickle is called in messages.
    base : int
        Offset of `data` in the file, for messages.

    Returns
    -------
    obj : object
        Classes of storages and tensors of PyTorch come as :class:`Global`.
    end : int
        Where in `data` the pickle ends.

    Raises
    ------
    FormatError
        Not a pickle, or one of anything else.
    """
    cdef _Plain machine = _Plain(data, start, name, where, base)
    machine.longest = KEY_INTEGER  # messages write out what is not expected
    obj = machine.run()
    return obj, machine.pos
