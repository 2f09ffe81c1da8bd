# cython: language_level=3
"""The CRC-32 of bytes that are known in two parts, without reading either."""

from libc.stdint cimport uint32_t, uint64_t

import numpy as np

__all__ = ["shift"]


cdef extern from "hold.h" nogil:
    uint32_t hold_crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b)


def shift(crcs, nbytes):
    """What CRC-32s contribute to those of the same bytes with others behind them.

    Where `b` is the CRC-32 of `n` bytes and `a` of those before them, ``shift(a, n) ^ b`` is that
    of both together; and ``shift(a, n)`` and that of both give `b`.

    Parameters
    ----------
    crcs : ndarray of uint32, shape (n,)
    nbytes : ndarray of uint64, shape (n,)
        How many bytes follow.

    Returns
    -------
    ndarray of uint32, shape (n,)
    """
    cdef const uint32_t[::1] before = np.ascontiguousarray(crcs, np.uint32)
    cdef const uint64_t[::1] lengths = np.ascontiguousarray(nbytes, np.uint64)
    found = np.empty(before.shape[0], np.uint32)
    cdef uint32_t[::1] out = found
    cdef Py_ssize_t i
    if lengths.shape[0] != before.shape[0]:
        raise ValueError(f"{before.shape[0]} checksums, {lengths.shape[0]} lengths")
    with nogil:
        for i in range(before.shape[0]):
            out[i] = hold_crc32_combine(before[i], 0, lengths[i])
    return found
