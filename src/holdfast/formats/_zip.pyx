# cython: language_level=3
"""The zip container: its directory scanned, its records extracted, its headers written."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

from ..errors import ChecksumError, FormatError
from ._zip_inflate import exactly, inflate
from ._zip_text import about, read_error, short, write_error

__all__ = ["RECORD", "Directory", "Skeleton", "emit", "extract", "inflate", "scan"]


# What Python calls the codes.
cdef dict _KINDS = {
    HOLD_ZIP_NO_END: "no_end", HOLD_ZIP_TRAILING: "trailing", HOLD_ZIP_AMBIGUOUS: "ambiguous",
    HOLD_ZIP_DISKS: "disks", HOLD_ZIP_LOCATOR_BAD: "locator", HOLD_ZIP_END64_BAD: "end64",
    HOLD_ZIP_CONTRARY: "contrary", HOLD_ZIP_PLACE: "place", HOLD_ZIP_HUGE: "huge",
    HOLD_ZIP_COUNT: "count", HOLD_ZIP_ENTRY: "entry", HOLD_ZIP_SHORT: "short",
    HOLD_ZIP_REST: "rest", HOLD_ZIP_VERSION: "version", HOLD_ZIP_FLAGS: "flags",
    HOLD_ZIP_METHOD: "method", HOLD_ZIP_STORED_SIZE: "stored_size", HOLD_ZIP_RATIO: "ratio",
    HOLD_ZIP_NAME: "name", HOLD_ZIP_OTHER_NAME: "other_name", HOLD_ZIP_FOLDER: "folder",
    HOLD_ZIP_EXTRA: "extra", HOLD_ZIP_EXTRA64: "extra64", HOLD_ZIP_HEADER: "header",
    HOLD_ZIP_TWICE: "twice", HOLD_ZIP_PREFIX: "prefix", HOLD_ZIP_OVERLAP: "overlap",
    HOLD_ZIP_GAP: "gap", HOLD_ZIP_LOCAL_BAD: "local",
    HOLD_ZIP_LOCAL_FLAGS: "local_flags", HOLD_ZIP_LOCAL_METHOD: "local_method",
    HOLD_ZIP_LOCAL_CRC: "local_crc", HOLD_ZIP_LOCAL_SIZE: "local_size",
    HOLD_ZIP_LOCAL_PACKED: "local_packed", HOLD_ZIP_LOCAL_NAME: "local_name", HOLD_ZIP_PAST: "past",
    HOLD_ZIP_DESCRIPTOR: "descriptor", HOLD_ZIP_DESCRIPTOR_CRC: "descriptor_crc",
    HOLD_ZIP_DESCRIPTOR_SIZE: "descriptor_size", HOLD_ZIP_DESCRIPTOR_PACKED: "descriptor_packed",
    HOLD_ZIP_LONG: "long", HOLD_ZIP_TOO_LARGE: "too_large",
}

#: A record of an archive: where its local header begins, where its payload begins, the bytes of
#: that in the file and once inflated, its CRC-32 (0 may mean that there is none), its method
#: (0 stored, 8 deflated) and the flags of its header.
RECORD = np.dtype([("header", np.uint64), ("offset", np.uint64), ("packed", np.uint64),
                   ("size", np.uint64), ("crc", np.uint32), ("method", np.uint16),
                   ("flags", np.uint16)], align=True)
assert RECORD.itemsize == sizeof(hold_zip_record)

#: The C struct ``hold_zip_piece``.
cdef object _PIECE = np.dtype([("offset", np.uint64), ("nbytes", np.uint64), ("start", np.uint64)])
assert _PIECE.itemsize == sizeof(hold_zip_piece)

#: Files of up to so many bytes are read at once; of others so many at the end, to begin with.
cdef uint64_t _WHOLE = 1 << 20, _END = 1 << 17
assert _END >= HOLD_ZIP_TAIL

cdef uint16_t _UTF8 = 0x0800
cdef uint64_t _KEY[2]
if getrandom(_KEY, sizeof(_KEY), 0) != sizeof(_KEY):
    raise OSError("getrandom: no random bytes")


cdef class Directory:
    """The records of an archive, in the order of its directory.

    Attributes
    ----------
    rows : ndarray of RECORD, shape (n,)
        Read-only.
    root : str or None
        What stands before the first slash of every name, where that is one for all.
    start : int
        Where the directory begins, from the start of the file.
    end : int
        Size of the file.
    """

    cdef hold_zip zip
    cdef bytes data
    cdef list cache
    cdef dict places
    cdef readonly object rows
    cdef readonly str root
    cdef readonly uint64_t start, end

    def __cinit__(self):
        self.data = b""

    def __dealloc__(self):
        hold_zip_free(&self.zip)

    def __init__(self):
        raise TypeError("a Directory is what scan() returns")

    def __len__(self):
        return <Py_ssize_t>self.zip.n

    @property
    def names(self):
        """Every name, in the order of `rows`; the list is the directory's own."""
        if self.cache is None:
            self.cache = [self.name_of(i, "strict") for i in range(self.zip.n)]
        return self.cache

    def find(self, str name not None):
        """Row of the record called exactly `name`, or -1."""
        cdef hold_text wanted
        cdef Py_ssize_t length
        cdef bytes room
        if self.places is not None:
            return self.places.get(name, -1)
        if not name.isascii():
            return -1
        wanted.data = <const uint8_t *>PyUnicode_AsUTF8AndSize(name, &length)
        wanted.length = <size_t>length
        room = PyBytes_FromStringAndSize(NULL, length)
        return hold_zip_lookup(&self.zip, wanted, <uint8_t *>PyBytes_AS_STRING(room))

    cdef str name_of(self, size_t i, str errors):
        cdef const hold_text *text = &self.zip.names[i]
        cdef const uint8_t *entry = text.data - 46
        cdef bytes raw
        if (entry[8] | entry[9] << 8) & _UTF8:
            return PyUnicode_DecodeUTF8(<const char *>text.data, <Py_ssize_t>text.length,
                                        errors.encode())
        raw = text.data[:text.length]
        return raw.decode("cp437")

    cdef object fault(self, const hold_zip_fault *fault, str name):
        """The exception for `fault`."""
        cdef str record = None, other = None
        if fault.code == HOLD_ZIP_NOMEM:
            return MemoryError()
        if fault.record >= 0:
            record = self.name_of(fault.record, "backslashreplace")
        if fault.code == HOLD_ZIP_TWICE:
            other = self.name_of(fault.found, "backslashreplace")
        return read_error(_KINDS[fault.code], name, record, fault.position, fault.expected,
                          fault.found, other)

    def check_case(self, str name not None):
        """Raise FormatError where two names differ in case alone: some readers ignore it."""
        cdef size_t one = self.zip.twin[0], two = self.zip.twin[1]
        if self.zip.twins:
            raise read_error("case", name, self.name_of(two, "backslashreplace"), self.start, 0, 0,
                             self.name_of(one, "backslashreplace"))

    cdef object check_foreign(self, str name):
        """Names beyond ASCII have to be what their flag says, and to differ."""
        cdef size_t i
        cdef dict places = {}
        cdef str found
        for i in range(self.zip.n):
            try:
                found = self.name_of(i, "strict")
            except UnicodeDecodeError:
                raise read_error("utf8", name, self.name_of(i, "backslashreplace"),
                                 self.start, 0, 0, None) from None
            if found in places:
                raise read_error("twice", name, found, self.start, 0, places[found], found)
            places[found] = i
        self.places = places

    cdef object walk(self, object read, bytes tail, uint64_t begin, str name):
        """Compare the local headers with the directory; `tail` is the file from `begin` on."""
        cdef hold_zip_fault fault
        cdef uint64_t offset, nbytes
        cdef const uint8_t *data
        cdef bytes window
        cdef int code
        while True:
            hold_zip_want(&self.zip, &offset, &nbytes)
            if nbytes == 0:
                return
            if offset >= begin:
                data = <const uint8_t *>PyBytes_AS_STRING(tail) + (offset - begin)
            else:
                window = exactly(read, offset, nbytes, name)
                data = <const uint8_t *>PyBytes_AS_STRING(window)
            with nogil:
                code = hold_zip_walk(&self.zip, data, &fault)
            if code:
                raise self.fault(&fault, name)


def scan(read, uint64_t size, str name not None, *, bint caseless=True):
    """Read the directory of an archive and compare it with the headers of its records.

    Parameters
    ----------
    read : callable
        ``read(offset, nbytes)`` returns that many bytes of the file, or raises.
    size : int
        Of the file, in bytes.
    name : str
        What to call the file in messages.
    caseless : bool
        Refuse names that differ in case alone. Without, :meth:`Directory.check_case` does.

    Returns
    -------
    Directory

    Raises
    ------
    FormatError
        It is no archive, or not one that every reader of zip files would read the same.
    """
    cdef Directory self = Directory.__new__(Directory)
    cdef hold_zip_tail tail
    cdef hold_zip_fault fault
    cdef uint64_t length = size if size <= _WHOLE else _END
    cdef uint64_t begin = size - length, least = min(length, <uint64_t>HOLD_ZIP_TAIL)
    cdef bytes data = exactly(read, begin, length, name)
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(data)
    cdef int code
    with nogil:
        code = hold_zip_find(at + length - least, least, size, &tail, &fault)
    if code:
        raise self.fault(&fault, name)
    if tail.start >= begin:
        self.data = at[tail.start - begin:tail.start - begin + tail.size]
    else:
        self.data = exactly(read, tail.start, tail.size, name)
    self.start = tail.start
    self.end = size
    at = <const uint8_t *>PyBytes_AS_STRING(self.data)
    with nogil:
        code = hold_zip_read(at, &tail, _KEY, &self.zip, &fault)
    if code:
        raise self.fault(&fault, name)
    if caseless:
        self.check_case(name)
    if self.zip.foreign:
        self.check_foreign(name)
    self.walk(read, data, begin, name)
    rows = np.empty(self.zip.n, RECORD)
    cdef uint8_t[::1] memory
    if self.zip.n:
        memory = rows.view(np.uint8)
        memcpy(&memory[0], self.zip.records, self.zip.n * sizeof(hold_zip_record))
    rows.flags.writeable = False
    self.rows = rows
    if self.zip.root:
        self.root = self.name_of(0, "strict").partition("/")[0]
    return self


def extract(read, Directory directory not None, Py_ssize_t row, str name not None, *,
            uint64_t limit, bint verify=True):
    """The bytes of a record, inflated where it is deflated.

    Parameters
    ----------
    read, name
        As in :func:`scan`.
    directory : Directory
    row : int
    limit : int
        The most bytes that it may have, inflated or not.
    verify : bool
        Compare the bytes with the CRC-32 of the directory, where that has one.

    Returns
    -------
    bytes

    Raises
    ------
    FormatError
        It has more bytes than `limit`, or other ones than the directory says.
    ChecksumError
        The CRC-32 is another.
    """
    if not 0 <= row < <Py_ssize_t>directory.zip.n:
        raise IndexError(f"row {row} of {directory.zip.n}")
    entry = directory.rows[row]
    cdef uint64_t size = entry["size"], packed = entry["packed"], offset = entry["offset"]
    cdef uint32_t crc, expected = entry["crc"]
    cdef const uint8_t *at
    cdef size_t length
    where = about(name, directory.name_of(row, "strict"))
    if size > limit or packed > limit:
        raise FormatError(f"{where}: expected at most {limit} bytes, found {max(size, packed)}")
    data = exactly(read, offset, packed, name) if packed else b""
    if entry["method"] == HOLD_ZIP_DEFLATED:
        data = inflate(data, size, where)
    if verify and expected:
        at = <const uint8_t *>PyBytes_AS_STRING(data)
        length = <size_t>PyBytes_GET_SIZE(data)
        with nogil:
            crc = hold_crc32(0, at, length)
        if crc != expected:
            raise ChecksumError(f"{where}: its bytes at offset {offset} have the CRC-32 "
                                f"{crc:08x}, expected {expected:08x}")
    return data


cdef class Skeleton:
    """An archive without the payloads that stand elsewhere in memory.

    Attributes
    ----------
    data : bytearray
        Everything else: pieces, one behind the other.
    offsets : ndarray of uint64, shape (n,)
        Where in the file the payload of each record begins.
    size : int
        Of the file, in bytes.
    piece_offset, piece_nbytes : ndarray of uint64, shape (m,)
        Where in the file each piece goes, and its length. Between two pieces stands a payload.
    piece_start : ndarray of int64, shape (m,)
        Where in `data` each piece begins.
    """

    cdef readonly bytearray data
    cdef readonly object offsets
    cdef readonly uint64_t size
    cdef readonly object piece_offset, piece_nbytes, piece_start
    cdef uint64_t nbytes
    cdef object descriptors, centrals, following

    def __init__(self):
        raise TypeError("a Skeleton is what emit() returns")

    def stamp(self, rows, crcs):
        """Set the CRC-32 of records.

        Parameters
        ----------
        rows : ndarray of int64, shape (k,)
        crcs : ndarray of uint32, shape (k,)
        """
        cdef const int64_t[::1] places = np.ascontiguousarray(rows, np.int64)
        cdef const uint32_t[::1] values = np.ascontiguousarray(crcs, np.uint32)
        cdef const uint64_t[::1] descriptors = self.descriptors
        cdef const uint64_t[::1] centrals = self.centrals
        cdef Py_ssize_t i, n = descriptors.shape[0]
        cdef uint8_t *data = <uint8_t *>PyByteArray_AS_STRING(self.data)
        if <uint64_t>len(self.data) != self.nbytes:
            raise ValueError(f"the data had {self.nbytes} bytes, now it has {len(self.data)}")
        if places.shape[0] != values.shape[0]:
            raise ValueError(f"{places.shape[0]} rows, {values.shape[0]} checksums")
        for i in range(places.shape[0]):
            if not 0 <= places[i] < n:
                raise IndexError(f"row {places[i]} of {n}")
        for i in range(places.shape[0]):
            hold_zip_stamp(data, descriptors[places[i]], centrals[places[i]], values[i])

    def late(self, mask):
        """The pieces to write once the checksums of some records are known.

        Parameters
        ----------
        mask : ndarray of bool, shape (n,)
            The records whose checksums are not known before their payloads are written; of those
            that are inline, and of no bytes, nothing is waited for.

        Returns
        -------
        ndarray of int64
            Ascending; the last piece, which has the directory, is always among them.
        """
        mask = np.asarray(mask, np.bool_)
        if mask.shape != self.following.shape:
            raise ValueError(f"a mask of shape {mask.shape}, {len(self.following)} records")
        # No two records have the same, and only the last record can have the last piece.
        found = self.following[mask & (self.following > 0)]
        last = len(self.piece_offset) - 1
        return found if len(found) and found[-1] == last else np.append(found, last)


cdef _fill_items(hold_zip_item *items, list names, const uint64_t[::1] sizes, dict inline):
    """Let each item refer to its name and its payload, which are the caller's."""
    cdef Py_ssize_t i, length
    cdef object text, payload
    for i in range(len(names)):
        text = names[i]
        if type(text) is not str:
            raise TypeError(f"expected a str, found {type(text).__name__}: {text!r}")
        try:
            items[i].name.data = <const uint8_t *>PyUnicode_AsUTF8AndSize(text, &length)
        except UnicodeEncodeError:
            raise ValueError(f"record {short(text)}: the name cannot be written as UTF-8") from None
        items[i].name.length = <size_t>length
        items[i].size = sizes[i]
    for row, payload in inline.items():
        if type(payload) is not bytes:
            raise TypeError(f"record {row}: expected bytes, found {type(payload).__name__}")
        if not 0 <= row < len(names):
            raise IndexError(f"row {row} of {len(names)}")
        i = row
        if <uint64_t>PyBytes_GET_SIZE(payload) != sizes[i]:
            raise ValueError(f"record {short(names[i])}: its size is {sizes[i]}, "
                             f"its bytes are {len(payload)}")
        items[i].payload = <const uint8_t *>PyBytes_AS_STRING(payload)


def emit(str root not None, list names not None, sizes, dict inline not None,
         uint64_t alignment=64):
    """Lay out an archive as PyTorch does.

    Parameters
    ----------
    root : str
        The folder that all records are in.
    names : list of str
        Without the root, in the order of the file.
    sizes : ndarray of uint64, shape (n,)
        Of the payloads, in bytes.
    inline : dict of int to bytes
        The payloads that are written along with the headers, by their position.
    alignment : int
        Of the payloads in the file, in bytes, 1 to 32768.

    Returns
    -------
    Skeleton
        Its checksums are those of the payloads that are inline; the others are 0.

    Raises
    ------
    ValueError
        A name that :func:`scan` would refuse, or a size that does not fit.
    """
    cdef Skeleton self = Skeleton.__new__(Skeleton)
    cdef const uint64_t[::1] lengths = np.ascontiguousarray(sizes, np.uint64)
    cdef size_t n = len(names)
    cdef hold_zip_plan plan
    cdef hold_zip_fault fault
    cdef Py_ssize_t length
    cdef int code
    # Nobody else may take what is referred to from these while they are read without the GIL.
    names = list(names)
    inline = dict(inline)
    if lengths.shape[0] != <Py_ssize_t>n:
        raise ValueError(f"{n} names, {lengths.shape[0]} sizes")
    if not 1 <= alignment <= 32768:
        raise ValueError(f"alignment: expected 1 to 32768, found {alignment}")
    try:
        plan.root.data = <const uint8_t *>PyUnicode_AsUTF8AndSize(root, &length)
    except UnicodeEncodeError:
        raise ValueError(f"root {short(root)}: the name cannot be written as UTF-8") from None
    plan.root.length = <size_t>length
    plan.n = n
    plan.alignment = alignment
    plan.items = <hold_zip_item *>PyMem_Calloc(n + 1, sizeof(hold_zip_item))
    if plan.items is NULL:
        raise MemoryError
    try:
        _fill_items(plan.items, names, lengths, inline)
        with nogil:
            code = hold_zip_measure(&plan, _KEY, &fault)
        if code == HOLD_ZIP_NOMEM:
            raise MemoryError
        if code:
            record = names[fault.record] if fault.record >= 0 else None
            raise write_error(_KINDS[code], root, record, fault.expected, fault.found)
        _fill_skeleton(self, &plan)
    finally:
        PyMem_Free(plan.items)
    return self


cdef _fill_skeleton(Skeleton self, const hold_zip_plan *plan):
    """Write a plan that was measured."""
    cdef size_t i
    cdef int64_t piece = 0
    cdef uint64_t[::1] offsets, descriptors, centrals
    cdef int64_t[::1] following
    cdef uint8_t[::1] memory
    cdef uint8_t *data
    cdef hold_zip_piece *pieces_at
    pieces = np.empty(plan.npieces, _PIECE)
    memory = pieces.view(np.uint8)
    self.size = plan.size
    self.nbytes = plan.nbytes
    self.data = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>plan.nbytes)
    data = <uint8_t *>PyByteArray_AS_STRING(self.data)
    self.offsets = np.empty(plan.n, np.uint64)
    self.descriptors = np.empty(plan.n, np.uint64)
    self.centrals = np.empty(plan.n, np.uint64)
    self.following = np.zeros(plan.n, np.int64)
    offsets, descriptors = self.offsets, self.descriptors
    centrals, following = self.centrals, self.following
    pieces_at = <hold_zip_piece *>&memory[0]
    with nogil:
        hold_zip_emit(plan, data, pieces_at)
    for i in range(plan.n):
        offsets[i] = plan.items[i].offset
        descriptors[i] = plan.items[i].descriptor
        centrals[i] = plan.items[i].central
        if plan.items[i].size and plan.items[i].payload is NULL:
            piece += 1
            following[i] = piece
    self.piece_offset = np.ascontiguousarray(pieces["offset"])
    self.piece_nbytes = np.ascontiguousarray(pieces["nbytes"])
    self.piece_start = pieces["start"].astype(np.int64)
