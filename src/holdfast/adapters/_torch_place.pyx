# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Where plain PyTorch tensors lie, thousands of them; their storages in the order first seen."""

from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int16_t, int64_t, uint16_t, uint64_t, uintptr_t

from holdfast._placed cimport (PARAMETER, PLACED_MAX_NDIM, REQUIRES_GRAD, Placed, Placer,
                               set_extents)
from holdfast.adapters._columns cimport View
from holdfast.adapters._dlpack cimport HOLD_DLPACK_CPU, Exchange, hold_dl_tensor

import numpy as np
import torch

from holdfast import dtypes, views as waist

__all__ = ["Places"]

cdef extern from "Python.h":
    object PyObject_CallOneArg(object function, object argument)

cdef uint16_t DENSE = waist.DENSE
cdef int TYPES = len(dtypes.DTYPES)
cdef int64_t ITEMSIZES[64]
for _row in dtypes.DTYPES:
    ITEMSIZES[_row.code] = max(1, _row.itemsize)

cdef object _Parameter = torch.nn.Parameter
cdef object _getstate = getattr(torch.Tensor, "__getstate__", None)  # from Python 3.11 on
# Tensors with names are refused by the versions that have them.
cdef object _has_names = getattr(torch.Tensor, "has_names", None)
cdef object _storage_of = getattr(torch.Tensor, "untyped_storage", None)  # from torch 2.0 on
cdef object _data_ptr = torch.UntypedStorage.data_ptr
cdef object _nbytes = torch.UntypedStorage.nbytes


# -- a hash table of addresses -------------------------------------------------------------------

cdef struct Slot:
    uint64_t key  # 0: free
    int64_t value


cdef struct Table:
    Slot *slots  # mask + 1 of them, of which at most two thirds are taken
    size_t mask
    size_t used


cdef inline Slot *slot_of(const Table *table, uint64_t key) noexcept:
    """Where `key` stands, or else would."""
    # Addresses of one region stay neighbours, for the cache; the regions are strewn.
    cdef uint64_t region = (key >> 16) * <uint64_t>0x9E3779B97F4A7C15
    cdef size_t i = <size_t>((key >> 4) + (region >> 24)) & table.mask
    while table.slots[i].key != 0 and table.slots[i].key != key:
        i = (i + 1) & table.mask
    return &table.slots[i]


cdef int widen(Table *table) except -1:
    """Have room for one more."""
    cdef Table wider
    cdef size_t i
    if table.slots is not NULL and 3 * table.used <= 2 * table.mask:
        return 0
    wider.mask = 4 * table.mask + 3 if table.slots is not NULL else 1023
    wider.used = table.used
    wider.slots = <Slot *>PyMem_Calloc(wider.mask + 1, sizeof(Slot))
    if wider.slots is NULL:
        raise MemoryError
    if table.slots is not NULL:
        for i in range(table.mask + 1):
            if table.slots[i].key != 0:
                slot_of(&wider, table.slots[i].key)[0] = table.slots[i]
    PyMem_Free(table.slots)
    table[0] = wider
    return 0


cdef inline int put(Table *table, uint64_t key, int64_t value) except -1:
    """Give `key`, which has none, a value."""
    cdef Slot *slot
    widen(table)
    slot = slot_of(table, key)
    slot.key, slot.value = key, value
    table.used += 1
    return 0


# -- storages ------------------------------------------------------------------------------------

cdef struct Row:
    uint64_t address
    int64_t nbytes
    int64_t said
    int code


cdef inline tuple extents(const int64_t *values, int n):
    """A tuple of the extents of a tensor, or of its strides."""
    if n == 1:  # as nearly always where there are many
        return (values[0],)
    if n == 2:
        return (values[0], values[1])
    return tuple([values[axis] for axis in range(n)])


cdef class Places:
    """Storages of PyTorch, and tensors as views of them.

    Parameters
    ----------
    exchange : Exchange or None
        What describes tensors.
    place : callable
        What does where there is none: ``place(tensor)`` returns the code of the dtype, the address
        of the first element (0 where there are no elements), the shape and the strides in
        elements, whether gradients are recorded, and the number of the CUDA device (-1: in the
        memory of the host); or None for tensors that this does not say all of.
    said : sequence of int
        By code of the dtype: what a persistent id says of such elements; -1: they have none.
    cuda : bool
        Whether tensors of CUDA devices are placed, too.

    Attributes
    ----------
    places : list of str
        What persistent ids call the devices that storages are on, other than the host.
    elsewhere : list of int
        Rows of the storages on them.
    keys : list of str
        Of the storages, in the order in which they were first seen.
    storages : list
        They are kept alive, so that the addresses of torch's own structures mean them.
    """

    cdef Exchange exchange
    cdef object place
    cdef readonly list keys, storages, places, elsewhere
    cdef list numbers  # of the devices that are in `places`
    cdef bint cuda
    cdef int64_t said[64]
    cdef Table known   # by the address of torch's own structure: the row of a storage
    # By the address of the first byte: what was said of it. Filled once two things are said.
    cdef Table memory
    cdef Row *rows
    cdef size_t room

    def __init__(self, exchange, place, said, bint cuda=False):
        self.exchange, self.place, self.cuda = exchange, place, cuda
        self.keys, self.storages = [], []
        self.places, self.elsewhere, self.numbers = [], [], []
        for code in range(TYPES):
            self.said[code] = said[code]

    def __cinit__(self, *_, **__):
        widen(&self.known)

    def __dealloc__(self):
        PyMem_Free(self.known.slots)
        PyMem_Free(self.memory.slots)
        PyMem_Free(self.rows)

    def add(self, tensor):
        """Where a plain tensor of the host lies. See :meth:`.base.Storages.add`."""
        cdef Placed at
        if not self.find(tensor, &at) or at.place >= 0:
            return None
        return (self.keys[at.row], at.code, at.nbytes, at.offset, extents(at.sizes, at.ndim),
                extents(at.strides, at.ndim), at.flags)

    @property
    def placer(self):
        """`add` for callers in C: see :mod:`holdfast._placed`."""
        return PyCapsule_New(<void *><Placer>find_placed, "holdfast.placer", NULL)

    cdef bint find(self, object tensor, Placed *at) except -1:
        cdef uint64_t address = 0
        cdef bint requires_grad
        cdef int number = -1
        cdef Py_ssize_t seen = len(self.keys)
        if self.exchange is None:
            placed = self.place(tensor)
            if placed is None or len(placed[2]) > PLACED_MAX_NDIM:
                return False
            at.code, address, sizes, strides, requires_grad, number = placed
            if number >= 0 and not self.cuda:
                return False
            set_extents(at, sizes, strides)
        elif not self.describe(tensor, at, &address, &number):
            return False
        else:
            requires_grad = self.exchange.records(tensor)
        if self.said[at.code] < 0 or not is_bare(tensor):
            return False
        at.flags = REQUIRES_GRAD if requires_grad else 0
        if <object>type(tensor) is _Parameter:
            at.flags |= PARAMETER
        elif at.flags and tensor._backward_hooks:
            return False  # torch warns that they are not kept
        at.row = self.row_of(storage_of(tensor), self.said[at.code], at.code)
        at.nbytes = self.rows[at.row].nbytes
        at.place = -1
        if number >= 0:
            at.place = self.place_of(number)
            if at.row == seen:
                self.elsewhere.append(seen)
        if address != 0:
            at.offset = <int64_t>(address - self.rows[at.row].address) // ITEMSIZES[at.code]
        else:
            at.offset = tensor.storage_offset()
        return True

    cdef int place_of(self, int number) except -1:
        """Position of a CUDA device among the places."""
        if number not in self.numbers:  # of which there are few
            self.numbers.append(number)
            self.places.append(f"cuda:{number}")
        return self.numbers.index(number)

    cdef bint describe(
        self, object tensor, Placed *at, uint64_t *address, int *number
    ) except -1:
        """What the exchange says of a tensor; the address is 0 where there are no elements."""
        cdef hold_dl_tensor found
        at.code = self.exchange.look(tensor, &found, self.cuda)
        if at.code < 0 or found.strides is NULL or found.ndim > PLACED_MAX_NDIM:
            return False
        if found.data is not NULL:
            address[0] = <uintptr_t>found.data + found.byte_offset
        if found.device.type != HOLD_DLPACK_CPU:
            number[0] = found.device.id
        at.ndim = found.ndim
        # Copied at once: they are the tensor's own, and anything may happen to it later.
        for axis in range(found.ndim):
            at.sizes[axis], at.strides[axis] = found.shape[axis], found.strides[axis]
        return True

    def see(self, storage, int64_t said, int code, bint memory=True):
        """The row of a storage, a new one where it was not seen before.

        Parameters
        ----------
        storage : torch.UntypedStorage
        said : int
            What is said of its elements. Of one memory only one thing can be.
        code : int
            Of the dtype that they are counted as.
        memory : bool
            Whether it has any: not on the device ``"meta"``.

        Raises
        ------
        RuntimeError
            Another thing was said before of the same memory.
        """
        return self.row_of(storage, said, code, memory)

    cdef Py_ssize_t row_of(
        self, object storage, int64_t said, int code, bint memory=True
    ) except -1:
        cdef uint64_t cdata = storage._cdata
        cdef Slot *slot = slot_of(&self.known, cdata)
        cdef Row *row
        cdef uint64_t address
        if slot.key != 0:
            row = &self.rows[slot.value]
            if row.said != said:
                self.claim(row.address, said)
            return slot.value
        address = PyObject_CallOneArg(_data_ptr, storage) if memory else 0
        self.claim(address, said)
        return self.append(storage, cdata, Row(
            address=address, nbytes=PyObject_CallOneArg(_nbytes, storage), said=said, code=code))

    cdef int claim(self, uint64_t address, int64_t said) except -1:
        """One memory cannot be this and that; but what has no memory may be said to be both."""
        cdef size_t i, n = len(self.keys)
        if self.memory.slots is NULL:
            if n == 0 or said == self.rows[0].said:
                return 0
            for i in range(n):
                self.remember(self.rows[i].address, self.rows[i].said)
        return self.remember(address, said)

    cdef int remember(self, uint64_t address, int64_t said) except -1:
        cdef Slot *slot
        widen(&self.memory)
        if address == 0:
            return 0
        slot = slot_of(&self.memory, address)
        if slot.key == 0:
            put(&self.memory, address, said)
        elif slot.value != said:
            raise RuntimeError(
                "Cannot save multiple tensors or storages that view the same data as different "
                "types"
            )
        return 0

    cdef Py_ssize_t append(self, object storage, uint64_t cdata, Row row) except -1:
        cdef Py_ssize_t n = len(self.keys)
        cdef void *rows
        if <size_t>n >= self.room:
            rows = PyMem_Realloc(self.rows, (2 * self.room + 256) * sizeof(Row))
            if rows is NULL:
                raise MemoryError
            self.rows, self.room = <Row *>rows, 2 * self.room + 256
        self.rows[n] = row
        self.storages.append(storage)
        self.keys.append(str(n))
        put(&self.known, cdata, n)
        return n

    def columns(self):
        """The storages as rows of VIEW and their extents, one for each."""
        cdef Py_ssize_t i, n = len(self.keys)
        views, dims = np.zeros(n, waist.VIEW), np.empty(n, np.int64)
        cdef View[::1] rows = views
        cdef int64_t[::1] counts = dims
        for i in range(n):
            rows[i].address = self.rows[i].address
            rows[i].nbytes = <uint64_t>self.rows[i].nbytes
            rows[i].dims = i
            rows[i].dtype = self.rows[i].code
            rows[i].ndim = 1
            rows[i].flags = DENSE
            counts[i] = self.rows[i].nbytes // ITEMSIZES[self.rows[i].code]
        return views, dims


cdef bint find_placed(object storages, object tensor, Placed *out) except -1:
    return (<Places>storages).find(tensor, out)


cdef inline bint is_bare(object tensor) except -1:
    """Whether there is nothing about a tensor that its memory does not say."""
    if _getstate is None:
        if tensor.__dict__:
            return False
    elif PyObject_CallOneArg(_getstate, tensor):
        return False
    return _has_names is None or not _has_names(tensor)


cdef inline object storage_of(object tensor):
    if _storage_of is None:
        return tensor.storage().untyped()
    return PyObject_CallOneArg(_storage_of, tensor)
