# cython: language_level=3, boundscheck=False, wraparound=False
"""The tensors and storages that a pickle of torch.save names, as rows, each checked."""

from collections import OrderedDict

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.string cimport memcpy

from ._inert cimport Global, Record, Storage, Tensor, brief
from ._pickle cimport Machine

import numpy as np

from ..dtypes import BY_NAME, DTYPES
from ..layout import CONJUGATE, ENTRY, NEGATIVE, STORAGE

__all__ = ["Table"]


cdef extern from *:
    """
    #define hold_mul(a, b, out) __builtin_mul_overflow(a, b, out)
    #define hold_add(a, b, out) __builtin_add_overflow(a, b, out)
    """
    bint hold_mul(int64_t a, int64_t b, int64_t *out) nogil
    bint hold_add(int64_t a, int64_t b, int64_t *out) nogil

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

# The struct Span.
cdef object _SPAN = np.dtype([("numel", np.int64), ("nbytes", np.int64), ("given", np.int32),
                              ("dtype", np.int32)])

cdef int _CONJUGATE = CONJUGATE, _NEGATIVE = NEGATIVE
cdef int _UINT8 = BY_NAME["uint8"].code
# Bytes of an element by code, and what the integers of a quantized type are kept as.
cdef int64_t[64] _SIZES
cdef bint[64] _FLOATING
cdef int[6] _KEPT_CODES
cdef dict _KEPT = {-1: "uint8", -2: "int8", -3: "uint8", -4: "int32", -5: "uint8", -6: "uint8"}
for _row in DTYPES:
    _SIZES[_row.code] = _row.itemsize
    _FLOATING[_row.code] = _row.name.startswith(("float", "bfloat", "complex"))
for _code, _text in _KEPT.items():
    _KEPT_CODES[-1 - _code] = BY_NAME[_text].code
assert len(DTYPES) <= 64 and sizeof(Row) == ENTRY.itemsize


cdef int dtype_of(int code):
    """Code of the dtype that a storage of `code` is kept as."""
    return code if code >= 0 else <int> _KEPT_CODES[-1 - code]


cdef int _plain_key(str key) except -1:
    """Whether `key` is fit to be the name of a record, and of nothing above it."""
    return 0 < len(key) <= 255 and key.isprintable() and ".." not in key and key != "." and not any(
        [c in key for c in "/\\:"])


@cython.final
cdef class Columns:
    """Bytes that grow at their end."""

    def __dealloc__(self):
        PyMem_Free(self.data)

    cdef void *add(self, size_t nbytes) except NULL:
        """Room for so many more bytes; what it returned before is no longer good."""
        cdef size_t room
        cdef void *made
        if self.room - self.nbytes < nbytes:
            room = 2 * self.room + nbytes + 1024
            made = PyMem_Realloc(self.data, room)
            if made is NULL:
                raise MemoryError
            self.data = <uint8_t *> made
            self.room = room
        self.nbytes += nbytes
        return self.data + (self.nbytes - nbytes)

    cdef object array(self, object dtype):
        """A copy as an array."""
        cdef uint8_t[::1] view
        made = np.empty(self.nbytes // dtype.itemsize, dtype)
        if self.nbytes:
            view = made.view(np.uint8)
            memcpy(&view[0], self.data, self.nbytes)
        return made


cdef class Table(Machine):
    """A run that collects tensors and storages; what else there is, its subclass decides."""

    def __init__(self, data, start, name, where, base, bint legacy=False, *more):
        self.legacy = legacy
        self.events, self.rows, self.dims = Columns(), Columns(), Columns()
        self.strides, self.owners, self.flags, self.spans = (Columns(), Columns(), Columns(),
                                                             Columns())
        self.mentions = Columns()
        self.keys, self.locations = [], []
        self.row_of, self.views, self.kinds = {}, {}, {}

    def columns(self):
        """Entries, dims, strides, storage and flags (or None), and whether all is dense."""
        return (self.rows.array(ENTRY), self.dims.array(np.dtype(np.int64)),
                self.strides.array(np.dtype(np.int64)), self.owners.array(np.dtype(np.int64)),
                self.flags.array(np.dtype(np.uint16)) if self.flagged else None,
                not self.strided)

    def storages(self):
        """Rows of STORAGE that know their size and dtype."""
        found = self.spans.array(_SPAN)
        made = np.zeros(len(found), STORAGE)
        made["nbytes"] = found["nbytes"]
        made["dtype"] = found["dtype"]
        return made

    cdef Py_ssize_t event(self, int what) except -1:
        (<uint8_t *> self.events.add(1))[0] = <uint8_t> what
        return <Py_ssize_t> self.events.nbytes - 1

    # -- storages ----------------------------------------------------------------------------

    cdef object on_storage(self, tuple pid):
        cdef Global kind
        cdef Storage made
        cdef int64_t numel
        key = pid[2]
        if type(pid[1]) is not Global or (<Global> pid[1]).code != STORAGE_TYPE:
            raise self.fault(f"a storage of type {brief(pid[1])}, which is not known")
        kind = <Global> pid[1]
        kind.used += 1
        if type(key) is not str or type(pid[3]) is not str:
            raise self.fault(f"a storage's key {brief(key)} and location {brief(pid[3])}, "
                             "expected text")
        numel = self.integer(pid[4], "number of elements")
        made = Storage(self.find_storage(<str> key, kind.dtype, numel, pid[3]), kind.dtype)
        made.numel = numel
        made.pushed = 1
        made.event = self.event(GIVE)
        if self.legacy and pid[5] is not None:
            self.narrow(made, pid[5])
        self.mention(made, made.event, self.legacy and pid[5] is not None)
        return made

    cdef int mention(self, Storage storage, Py_ssize_t event, bint narrowed) except -1:
        cdef Mention found
        found.event = event
        found.row = storage.row
        found.code = storage.code
        found.narrowed = narrowed
        found.first = storage.first
        found.numel = storage.numel
        (<Mention *> self.mentions.add(sizeof(Mention)))[0] = found
        return 0

    cdef int64_t find_storage(self, str key, int code, int64_t numel, location) except -1:
        """The row of a storage that a persistent id names."""
        cdef Span *span
        found = self.row_of.get(key)
        if found is None:
            return self.add_storage(key, code, numel, location)
        span = <Span *> self.spans.data + <int64_t> found
        # One without elements has no bytes that types could read differently.
        if span.numel != numel or numel and span.given != (_UINT8 if code == -1 else code):
            raise self.fault(f"storage {brief(key)} was named before with another type or "
                             f"number of elements: {span.numel}, now {numel}")
        return found

    cdef int64_t add_storage(self, str key, int code, int64_t numel, location) except -1:
        cdef Span span
        if not (key.isascii() and key.isdigit() and len(key) < 32) and not _plain_key(key):
            raise self.fault(f"a storage's key {brief(key)}, expected a plain name")
        if len(location) > 255:
            raise self.fault("a storage's location of more than 255 characters")
        span.numel = numel
        span.given = _UINT8 if code == -1 else code
        span.dtype = dtype_of(code)
        if hold_mul(numel, _SIZES[span.dtype], &span.nbytes):
            raise self.fault(f"storage {brief(key)} of {numel} elements")
        (<Span *> self.spans.add(sizeof(Span)))[0] = span
        self.row_of[key] = len(self.keys)
        self.keys.append(key)
        self.locations.append(location)
        return len(self.keys) - 1

    cdef int narrow(self, Storage storage, view) except -1:
        """Make it a view of itself, as old torch saved storages that share memory."""
        cdef int64_t first, numel
        if type(view) is not tuple or len(view) != 3 or type(view[0]) not in (str, int):
            raise self.fault(f"a storage's view that is {brief(view)}, expected three items")
        first = self.integer(view[1], "offset of a view")
        numel = self.integer(view[2], "size of a view")
        if first > storage.numel or numel > storage.numel - first:
            raise self.fault(f"elements {first} to {first + <object> numel} of a storage of "
                             f"{storage.numel}")
        if self.views.setdefault(view[0], (storage.row, first, numel)) != (
                storage.row, first, numel):
            raise self.fault(f"view {brief(view[0])} was named before with another extent")
        storage.first = first
        storage.numel = numel
        return 0

    cdef int64_t integer(self, object value, str what) except -1:
        """`value`, which is to be an int of 63 bits that is not negative."""
        cdef int over = 0
        cdef int64_t found
        if type(value) is not int:
            raise self.fault(f"{brief(value)} as {what}, expected an integer")
        found = PyLong_AsLongLongAndOverflow(value, &over)
        if over or found < 0:
            raise self.fault(f"{brief(value)} as {what}, expected 0 to 2**63 - 1")
        return found

    # -- tensors -----------------------------------------------------------------------------

    cdef Tensor add_tensor(self, tuple args, int code):
        """The row that a rebuild function would make of `args`; None for a dtype without one."""
        cdef Py_ssize_t n = len(args)
        cdef Storage storage
        cdef int dtype
        cdef uint16_t flags = 0
        if (n != 4) if code == REBUILD_V1 else (
                not (6 <= n <= 7) if code == REBUILD_V2 else not (7 <= n <= 8)):
            raise self.fault(f"a tensor made of {n} arguments")
        if type(args[0]) is not Storage:
            raise self.fault(f"a tensor whose storage is {brief(args[0])}")
        storage = <Storage> args[0]
        dtype = _UINT8 if storage.code == -1 else storage.code
        if code == REBUILD_V3:
            if type(args[6]) is not Global:
                raise self.fault(f"a tensor whose dtype is {brief(args[6])}")
            dtype = (<Global> args[6]).dtype
        if dtype < 0:
            if code != REBUILD_V3:
                raise self.fault("a quantized storage without scale and zero point")
            return None
        if n > (7 if code == REBUILD_V3 else 6):
            flags = self.conjugation(args[n - 1])
        made = Tensor(self.add_row(storage, dtype, args))
        (<uint16_t *> self.flags.add(sizeof(uint16_t)))[0] = flags
        if flags:
            self.flagged = True
        if code != REBUILD_V1:
            if type(args[4]) is not bool:
                raise self.fault(f"{brief(args[4])} as requires_grad, expected a bool")
            if args[4] is True:
                self.check_gradient(dtype)
                self.kinds[made.entry] = "requires_grad"
        return made

    cdef bint usual(self, tuple args, int code):
        """Whether nothing was given to a rebuild function that its row cannot say."""
        if code == REBUILD_V1:
            return True
        hooks = args[5]
        if hooks is not None and (type(hooks) not in (OrderedDict, dict, tuple) or hooks):
            return False
        if len(args) == (7 if code == REBUILD_V2 else 8):
            extra = args[len(args) - 1]
            return extra is None or (type(extra) is dict and extra.keys() <= {"conj", "neg"})
        return True

    cdef uint16_t conjugation(self, metadata) except? 0xFFFF:
        cdef uint16_t flags = 0
        if type(metadata) is Record and type((<Record> metadata).cls) is Global and (
                (<Record> metadata).cls.path == "torch.jit._pickle.restore_type_tag" and
                (<Record> metadata).args):
            metadata = (<Record> metadata).args[0]  # TorchScript names the type of every dict
        if type(metadata) is dict:
            if metadata.get("conj") is True:
                flags |= <uint16_t> _CONJUGATE
            if metadata.get("neg") is True:
                flags |= <uint16_t> _NEGATIVE
        elif metadata is not None:
            raise self.fault(f"a tensor whose metadata is {brief(metadata)}")
        return flags

    cdef int check_gradient(self, int dtype) except -1:
        if not _FLOATING[dtype]:
            raise self.fault(f"a tensor of {DTYPES[dtype].name} that requires a gradient")
        return 0

    cdef tuple extents(self, object size, str what):
        """`size` as a tuple: torch.Size is one of these as well."""
        if type(size) is Record and (<Record> size).called and type((<Record> size).cls) is Global:
            if (<Global> (<Record> size).cls).name == "Size" and len((<Record> size).args) == 1:
                size = (<Record> size).args[0]
        if type(size) is list:
            size = tuple(size)
        if type(size) is not tuple:
            raise self.fault(f"a tensor whose {what} is {brief(size)}, expected a tuple")
        return <tuple> size

    cdef Py_ssize_t add_row(self, Storage storage, int dtype, tuple args) except -1:
        """Check a tensor against its storage and add its row; returns the number of the entry."""
        cdef tuple size = self.extents(args[2], "size")
        cdef tuple stride = self.extents(args[3], "stride")
        cdef Py_ssize_t i, ndim = len(size)
        cdef int64_t offset = self.integer(args[1], "storage offset")
        cdef int64_t[MAX_NDIM] dims, steps
        if len(stride) != ndim or ndim > MAX_NDIM:
            raise self.fault(f"a tensor of {ndim} extents and {len(stride)} strides")
        for i in range(ndim):
            dims[i] = self.integer(size[i], "extent")
            steps[i] = self.integer(stride[i], "stride")
        return self.put_row(storage.row, storage.code, storage.first, storage.numel, dtype, offset,
                            ndim, dims, steps)

    cdef Py_ssize_t put_row(self, Py_ssize_t owner, int code, int64_t first, int64_t numel,
                            int dtype, int64_t offset, Py_ssize_t ndim, int64_t *dims,
                            int64_t *steps) except -1:
        """Add the row of a tensor in elements `first` to `first + numel` of a storage."""
        cdef int64_t itemsize = _SIZES[dtype], count = 1, last = offset, step, dense = 1
        cdef bint plain = True
        cdef size_t nbytes = <size_t> ndim * sizeof(int64_t)
        cdef Row row
        cdef Py_ssize_t i
        for i in range(ndim):
            if dims[i] == 0:
                count = 0
        for i in range(ndim - 1, -1, -1):
            if count == 0:
                break
            if hold_mul(dims[i] - 1, steps[i], &step) or hold_add(last, step, &last) or (
                    hold_mul(count, dims[i], &count)):
                raise self.fault(f"a tensor of size {[dims[i] for i in range(ndim)]} and stride "
                                 f"{[steps[i] for i in range(ndim)]}")
            if dims[i] != 1:
                plain = plain and steps[i] == dense
            dense = count
        for i in range(ndim):
            if hold_mul(steps[i], itemsize, &steps[i]):
                raise self.fault(f"a tensor of stride {steps[i]}")
        row.dims = <int64_t> (self.dims.nbytes // sizeof(int64_t))
        if ndim:
            memcpy(self.dims.add(nbytes), dims, nbytes)
            memcpy(self.strides.add(nbytes), steps, nbytes)
        row.ndim = <int16_t> ndim
        row.dtype = dtype
        row.file = 0
        self.place(code, first, numel, offset, last, count, &row)
        (<Row *> self.rows.add(sizeof(Row)))[0] = row
        (<int64_t *> self.owners.add(sizeof(int64_t)))[0] = owner
        if not plain:
            self.strided = True
        self.nentries += 1
        return self.nentries - 1

    cdef int place(self, int code, int64_t first, int64_t numel, int64_t offset, int64_t last,
                   int64_t count, Row *row) except -1:
        """Say where in its storage a tensor is, whose elements are `offset` to `last`."""
        cdef int64_t unit = 1 if code == -1 else _SIZES[dtype_of(code)]
        cdef int64_t itemsize = _SIZES[row.dtype], room, start, nbytes
        # Neither overflows: they are at most the size of the storage, which was checked.
        room = numel * unit
        start = first * unit
        if hold_mul(count, itemsize, &nbytes):
            raise self.fault(f"a tensor of {count} elements of {itemsize} bytes")
        if count == 0:
            offset = min(offset, room // itemsize)
        elif last >= room // itemsize:
            raise self.fault(
                f"a tensor of elements {offset} to {last} of a storage of {room // itemsize}")
        row.offset = <uint64_t> (start + offset * itemsize)
        row.nbytes = <uint64_t> nbytes
        return 0
