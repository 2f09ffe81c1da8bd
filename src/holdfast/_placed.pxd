"""A tensor as a view of its storage, handed from an adapter to a format: no Python objects made."""

from libc.stdint cimport int64_t

cdef enum:
    PLACED_MAX_NDIM = 64

# Flags: base.REQUIRES_GRAD and base.PARAMETER of the adapters.
cdef enum:
    REQUIRES_GRAD = 1
    PARAMETER = 2

cdef struct Placed:
    Py_ssize_t row  # of the storage, among those that were seen
    int code        # of the dtype
    int place       # where the storage is: position in `places` of the storages; -1: on the host
    int flags
    int ndim
    int64_t nbytes  # of the whole storage
    int64_t offset  # in elements
    int64_t sizes[PLACED_MAX_NDIM]
    int64_t strides[PLACED_MAX_NDIM]

# What the attribute `placer` of an adapter's storages is a capsule of, by this name: what their
# method `add` does. Returns whether `out` says all of the tensor.
ctypedef bint (*Placer)(object storages, object tensor, Placed *out) except -1


cdef inline int set_extents(Placed *out, tuple sizes, tuple strides) except -1:
    """Shape and strides of a tensor on the host."""
    cdef Py_ssize_t axis
    out.place = -1
    if len(sizes) > PLACED_MAX_NDIM or len(sizes) != len(strides):
        raise ValueError(f"{len(sizes)} extents, {len(strides)} strides: expected at most "
                         f"{PLACED_MAX_NDIM} of both")
    out.ndim = <int>len(sizes)
    for axis in range(out.ndim):
        out.sizes[axis], out.strides[axis] = sizes[axis], strides[axis]
    return 0
