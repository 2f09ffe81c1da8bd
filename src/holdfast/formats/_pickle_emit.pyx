# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Objects pickled around their tensors, as ``torch.save`` does it, byte for byte.

Python's pickle protocol 2 with tensors taken out: a plain tensor becomes a call of torch's rebuild
function over a persistent id, which stands for its storage. Nothing of torch is needed for that.
Everything else is pickled as Python's own pickler pickles it, so that the opcodes are those that
torch reads with ``weights_only``. (One exception: bytes of length 0, for which Python names a
global that torch does not allow.)
"""

from pickle import PicklingError

from cpython.dict cimport PyDict_Next
from cpython.mem cimport PyMem_Free
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t

from holdfast._placed cimport PARAMETER, REQUIRES_GRAD, Placed, Placer, set_extents
from holdfast.formats._pickle_out cimport (Memo, Output, byte, coded, extent, integer,
                                           long_integer, memo_close, memo_find, memo_open,
                                           memo_put, new_text, raw, real, text)

from ..dtypes import DTYPES
from ._pickle_reduce import MixedError, batches, reduce_object
from ._torch_storages import DTYPE_GLOBALS, FIXED_GLOBALS, STORAGE_GLOBALS

__all__ = ["Emitter"]


cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    # Whether it fails is not to be seen from the number alone: it differs between versions.
    int Py_EnterRecursiveCall(const char *where) except *
    void Py_LeaveRecursiveCall()
    long long PyLong_AsLongLongAndOverflow(object, int *overflow) except? -1

cdef enum:
    BATCH = 1000  # items that one opcode adds, as in Python's pickler

# Positions in FIXED_GLOBALS; for each, `Emitter.fixed` has its number once it was written.
cdef enum:
    REBUILD_V2
    REBUILD_V3
    REBUILD_PARAMETER
    ORDERED_DICT
    UNTYPED
    CODEC_ENCODE
    FIXED

cdef list _FIXED = FIXED_GLOBALS
cdef list _CLASSES = STORAGE_GLOBALS
cdef list _DTYPES = DTYPE_GLOBALS
cdef list _ITEMSIZES = [row.itemsize for row in DTYPES]


cdef class Emitter:
    """One run of the pickler.

    Parameters
    ----------
    first : Storages or None
        Where the tensors of the exact types `first_types`, and storages, are put.
    second : Storages or None
        Where arrays of the types `second_types` are put, so that they are written as tensors too;
        but only where there is no tensor of the first kind and where no class's own way of being
        pickled holds them: they are then pickled as any object.
    legacy : bool
        Whether persistent ids are those of the stream that torch wrote up to 1.5.

    Attributes
    ----------
    source : Storages or None
        The one of `first` and `second` that has the tensors of the object.
    steps : list
        Keys and indices to where the emitter is, or where it stopped.
    """

    cdef object first, second
    cdef readonly object source
    cdef readonly list steps
    cdef object add_first, add_second, persistent
    cdef Placer placer  # what `add_first` is in C, or NULL
    cdef frozenset first_types, second_types
    cdef bint legacy
    cdef Memo memo
    cdef Output out
    cdef Py_ssize_t count  # objects that have a number so far
    cdef Py_ssize_t fixed[FIXED]
    cdef dict globals
    cdef int foreign  # how many reductions' own arguments and states surround the present object

    def __init__(self, first, frozenset first_types, second, frozenset second_types, bint legacy):
        self.first, self.first_types = first, first_types
        self.second, self.second_types = second, second_types
        self.add_first = None if first is None else first.add
        self.add_second = None if second is None else second.add
        self.persistent = None if first is None else first.persistent
        capsule = getattr(first, "placer", None)
        if capsule is not None:
            self.placer = <Placer>PyCapsule_GetPointer(capsule, "holdfast.placer")
        self.legacy = legacy
        self.globals, self.steps = {}, []
        for i in range(FIXED):
            self.fixed[i] = -1

    def __cinit__(self, *_):
        memo_open(&self.memo, 1023)

    def __dealloc__(self):
        memo_close(&self.memo)
        PyMem_Free(self.out.data)

    def dump(self, obj):
        """The pickle of `obj`."""
        text(&self.out, b"\x80\x02")
        self.save(obj)
        byte(&self.out, c".")
        return (<char *>self.out.data)[:self.out.used]

    # -- the memo --------------------------------------------------------------------------------

    cdef inline int number(self) except -1:
        """Give what was just written a number; nobody will ask for it."""
        if self.count < 256:
            coded(&self.out, c"q", self.count, 1)
        else:
            coded(&self.out, c"r", self.count, 4)
        self.count += 1
        return 0

    cdef inline int remember(self, object obj) except -1:
        memo_put(&self.memo, obj, self.count)
        return self.number()

    cdef inline int recall(self, Py_ssize_t index) except -1:
        if index < 256:
            return coded(&self.out, c"h", index, 1)
        return coded(&self.out, c"j", index, 4)

    # -- atoms -----------------------------------------------------------------------------------

    cdef inline int integer(self, object obj) except -1:
        cdef int overflow
        cdef long long value = PyLong_AsLongLongAndOverflow(obj, &overflow)
        if overflow == 0 and -0x80000000 <= value <= 0x7FFFFFFF:
            return integer(&self.out, value)
        return long_integer(&self.out, obj)

    cdef int string(self, object obj) except -1:
        """A str that has no number yet."""
        cdef Py_ssize_t size = 0
        cdef const char *data
        cdef bytes encoded
        if PyUnicode_IS_ASCII(obj):
            data = PyUnicode_AsUTF8AndSize(obj, &size)
        else:
            encoded = obj.encode("utf-8", "surrogatepass")
            data, size = encoded, len(encoded)
        if size > 0xFFFFFFFF:
            raise OverflowError("a str of more than 4 GiB does not fit into a torch file")
        coded(&self.out, c"X", <uint64_t>size, 4)
        raw(&self.out, data, <size_t>size)
        return self.remember(obj)

    cdef inline int shared(self, object obj) except -1:
        """A str that may have a number."""
        cdef Py_ssize_t index = memo_find(&self.memo, obj)
        return self.recall(index) if index >= 0 else self.string(obj)

    cdef int encoded(self, bytes obj) except -1:
        """Bytes, which protocol 2 has no opcode for."""
        self.known(CODEC_ENCODE)
        self.shared(obj.decode("latin-1"))
        self.shared("latin1")
        byte(&self.out, 0x86)
        self.number()
        byte(&self.out, c"R")
        return self.remember(obj)

    # -- globals ---------------------------------------------------------------------------------

    cdef inline int known(self, int which) except -1:
        if self.fixed[which] >= 0:
            return self.recall(self.fixed[which])
        self.fixed[which] = self.named(_FIXED[which])
        return 0

    cdef Py_ssize_t named(self, bytes name) except -1:
        """A global by its text, module and name each with a newline behind; its number."""
        index = self.globals.get(name)
        if index is not None:
            self.recall(index)
            return index
        byte(&self.out, c"c")
        text(&self.out, name)
        self.globals[name] = self.count
        self.number()
        return self.count - 1

    # -- tensors ---------------------------------------------------------------------------------

    cdef bint tensor(self, object obj, bint second) except -1:
        """Write a tensor, if it is one of those that its framework has nothing else to say of."""
        cdef Placed at
        cdef bint parameter
        if not second:
            self.claim(self.first)
        elif self.first is not None and self.source is self.first:
            return False
        if not second and self.placer is not NULL:
            if not self.placer(self.first, obj, &at):
                return False
            key = (<list>self.first.keys)[at.row]
        else:
            found = self.add_second(obj) if second else self.add_first(obj)
            if found is None:
                return False
            key, at.code, at.nbytes, at.offset, sizes, strides, at.flags = <tuple>found
            set_extents(&at, sizes, strides)
        if second:
            self.claim(self.second)
        parameter = at.flags & PARAMETER
        if parameter:
            self.known(REBUILD_PARAMETER)
        self.plain(key, &at, not parameter and at.flags & REQUIRES_GRAD)
        if parameter:
            self.number()
            byte(&self.out, 0x88 if at.flags & REQUIRES_GRAD else 0x89)
            self.no_hooks()
            byte(&self.out, 0x87)
            self.number()
            byte(&self.out, c"R")
        self.remember(obj)
        return True

    cdef int claim(self, object source) except -1:
        if self.source is not None and self.source is not source:
            raise MixedError
        self.source = source
        return 0

    cdef int plain(self, object key, const Placed *at, bint requires_grad) except -1:
        """The call that makes a tensor; it has no number yet."""
        cdef bytes kind = _CLASSES[at.code]
        cdef bint typed = kind is not None
        self.known(REBUILD_V2 if typed else REBUILD_V3)
        raw(&self.out, b"((", 2)
        self.shared("storage")
        if typed:
            self.named(kind)
        else:
            self.known(UNTYPED)
        self.shared(key)
        if at.place < 0:
            self.shared("cpu")
        else:  # torch makes the names of other devices anew for each
            new_text(&self.out, (<list>self.first.places)[at.place])
            self.number()
        extent(&self.out, at.nbytes // <int64_t>_ITEMSIZES[at.code] if typed else at.nbytes)
        if self.legacy:
            byte(&self.out, c"N")
        byte(&self.out, c"t")
        self.number()
        byte(&self.out, c"Q")
        extent(&self.out, at.offset)
        self.extents(at.sizes, at.ndim)
        self.extents(at.strides, at.ndim)
        byte(&self.out, 0x88 if requires_grad else 0x89)
        self.no_hooks()
        if not typed:
            self.named(_DTYPES[at.code])
        byte(&self.out, c"t")
        self.number()
        return byte(&self.out, c"R")

    cdef int no_hooks(self) except -1:
        self.known(ORDERED_DICT)
        raw(&self.out, b")R", 2)
        return self.number()

    cdef int extents(self, const int64_t *values, int n) except -1:
        """A tuple of integers that nothing else refers to."""
        if n == 0:
            return byte(&self.out, c")")
        if n > 3:
            byte(&self.out, c"(")
        for axis in range(n):
            extent(&self.out, values[axis])
        byte(&self.out, c"t" if n > 3 else <uint8_t>(0x84 + n))
        return self.number()

    # -- objects ---------------------------------------------------------------------------------

    cdef bint atom(self, object obj) except -1:
        """Write `obj` if it is one of the values that most leaves are; they cannot fail."""
        cdef object kind = <object>type(obj)
        if obj is None:
            byte(&self.out, c"N")
        elif kind is bool:
            byte(&self.out, 0x88 if obj is True else 0x89)
        elif kind is int:
            self.integer(obj)
        elif kind is float:
            real(&self.out, obj)
        elif kind is str:
            self.shared(obj)
        else:
            return False
        return True

    cdef int save(self, object obj) except -1:
        cdef Py_ssize_t index
        cdef object kind
        if self.atom(obj):
            return 0
        index = memo_find(&self.memo, obj)
        if index >= 0:
            return self.recall(index)
        kind = <object>type(obj)
        if kind in self.first_types:
            if self.tensor(obj, False):
                return 0
        elif kind in self.second_types and self.foreign == 0:
            if self.tensor(obj, True):
                return 0
        Py_EnterRecursiveCall(b" while pickling an object")
        try:
            if kind is dict:
                byte(&self.out, c"}")
                self.remember(obj)
                self.save_dict(obj)
            elif kind is list:
                byte(&self.out, c"]")
                self.remember(obj)
                self.save_list(obj)
            elif kind is tuple:
                self.save_tuple(obj)
            elif kind is bytes:
                self.encoded(obj)
            else:
                self.save_other(obj, kind)
        finally:
            Py_LeaveRecursiveCall()
        return 0

    cdef int save_dict(self, dict obj) except -1:
        cdef Py_ssize_t n = len(obj), place = 0, done = 0
        cdef PyObject *key = NULL
        cdef PyObject *value = NULL
        if n == 0:
            return 0
        self.steps.append(None)
        while True:
            if n > 1 and done % BATCH == 0:
                byte(&self.out, c"(")
            while PyDict_Next(obj, &place, &key, &value):
                self.pair(<object>key, <object>value)
                if len(obj) != n:
                    raise RuntimeError("dictionary changed size during iteration")
                done += 1
                if n > 1 and done % BATCH == 0:
                    break
            else:
                break
            byte(&self.out, c"u")
        byte(&self.out, c"s" if n == 1 else c"u")
        self.steps.pop()
        return 0

    cdef int pair(self, object key, object value) except -1:
        self.steps[len(self.steps) - 1] = key
        self.save(key)
        return self.save(value)

    cdef int save_list(self, list obj) except -1:
        cdef Py_ssize_t i, n = len(obj)
        if n == 0:
            return 0
        self.steps.append(None)
        for i in range(n):
            if n > 1 and i % BATCH == 0:
                byte(&self.out, c"(")
            self.item(i, obj[i])
            if len(obj) != n:
                raise RuntimeError("list changed size during iteration")
            if n > 1 and (i % BATCH == BATCH - 1 or i == n - 1):
                byte(&self.out, c"e")
        if n == 1:
            byte(&self.out, c"a")
        self.steps.pop()
        return 0

    cdef inline int item(self, Py_ssize_t i, object obj) except -1:
        if not self.atom(obj):
            self.steps[len(self.steps) - 1] = i
            self.save(obj)
        return 0

    cdef int save_tuple(self, tuple obj) except -1:
        cdef Py_ssize_t i, n = len(obj), index
        if n == 0:
            return byte(&self.out, c")")
        if n > 3:
            byte(&self.out, c"(")
        self.steps.append(None)
        for i in range(n):
            self.item(i, obj[i])
        self.steps.pop()
        index = memo_find(&self.memo, obj)
        if index >= 0:  # it contains itself, and what it contains has written it
            if n > 3:
                byte(&self.out, c"1")
            else:
                for i in range(n):
                    byte(&self.out, c"0")
            return self.recall(index)
        byte(&self.out, c"t" if n > 3 else <uint8_t>(0x84 + n))
        return self.remember(obj)

    cdef int save_items(self, object items) except -1:
        """The items that a reduction gives for a list of its own kind."""
        cdef Py_ssize_t i = 0
        self.steps.append(None)
        for batch in batches(items):
            if len(batch) > 1:
                byte(&self.out, c"(")
            for item in batch:
                self.item(i, item)
                i += 1
            byte(&self.out, c"e" if len(batch) > 1 else c"a")
        self.steps.pop()
        return 0

    cdef int save_pairs(self, object pairs) except -1:
        """The pairs that a reduction gives for a dict of its own kind."""
        self.steps.append(None)
        for batch in batches(pairs):
            if len(batch) > 1:
                byte(&self.out, c"(")
            for entry in batch:
                if not (type(entry) is tuple and len(<tuple>entry) == 2):
                    self.steps.pop()
                    raise PicklingError("dict items iterator must return 2-tuples")
                self.pair(entry[0], entry[1])
            byte(&self.out, c"u" if len(batch) > 1 else c"s")
        self.steps.pop()
        return 0

    cdef int save_other(self, object obj, object kind) except -1:
        """An object of a type that no opcode is for."""
        if self.persistent is not None:
            found = self.persistent(obj)
            if found is not None:
                if found[0] == "storage":
                    self.claim(self.first)
                self.foreign += 1
                self.save(found)
                self.foreign -= 1
                return byte(&self.out, c"Q")
        found = reduce_object(obj)
        if type(found) is tuple:
            return self.reduce(obj, found)
        return memo_put(&self.memo, obj, self.named(found))

    cdef int reduce(self, object obj, tuple reduction) except -1:
        """The call that makes `obj`, and what is then done to it."""
        cdef Py_ssize_t index
        new, func, args, state, items, pairs, setter = reduction
        self.foreign += 1
        self.save(func)
        self.save(args)
        byte(&self.out, 0x81 if new else c"R")
        self.foreign -= 1
        index = memo_find(&self.memo, obj)
        if index >= 0:  # its own arguments contain it
            byte(&self.out, c"0")
            self.recall(index)
        else:
            self.remember(obj)
        if items is not None:
            self.save_items(items)
        if pairs is not None:
            self.save_pairs(pairs)
        if state is None:
            return 0
        self.foreign += 1
        if setter is None:
            self.save(state)
            byte(&self.out, c"b")
        else:
            self.save(setter)
            self.save(obj)
            self.save(state)
            raw(&self.out, b"\x86R0", 3)
        self.foreign -= 1
        return 0
