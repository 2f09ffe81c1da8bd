# cython: language_level=3
"""The JSON header of a safetensors file, scanned and written in C."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport (PyByteArray_AS_STRING, PyByteArray_FromStringAndSize,
                                PyByteArray_Resize)
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

from ..dtypes import BY_NAME, DTYPES
from ..layout import ENTRY
from ..views import VIEW

__all__ = ["Fault", "Header", "HeaderNames", "emit", "header_crc", "scan", "stamp"]


cdef extern from "sys/random.h" nogil:
    ssize_t getrandom(void *buffer, size_t nbytes, unsigned int flags)


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    str PyUnicode_New(Py_ssize_t length, Py_UCS4 largest)
    void *PyUnicode_DATA(object text)


# What Python calls the codes.
cdef dict _KINDS = {
    HOLD_JSON_END: "end",
    HOLD_JSON_VALUE: "value",
    HOLD_JSON_OBJECT: "object",
    HOLD_JSON_ARRAY: "array",
    HOLD_JSON_STRING: "string",
    HOLD_JSON_INTEGER: "integer",
    HOLD_JSON_RANGE: "range",
    HOLD_JSON_COLON: "colon",
    HOLD_JSON_SEPARATOR: "separator",
    HOLD_JSON_CONTROL: "control",
    HOLD_JSON_ESCAPE: "escape",
    HOLD_JSON_SURROGATE: "surrogate",
    HOLD_JSON_UTF8: "utf8",
    HOLD_JSON_NESTING: "nesting",
    HOLD_HEADER_TRAILING: "trailing",
    HOLD_HEADER_METADATA: "metadata",
    HOLD_HEADER_REPEATED: "repeated",
    HOLD_HEADER_NO_DTYPE: "no_dtype",
    HOLD_HEADER_NO_SHAPE: "no_shape",
    HOLD_HEADER_NO_OFFSETS: "no_offsets",
    HOLD_HEADER_TAG: "tag",
    HOLD_HEADER_NDIM: "ndim",
    HOLD_HEADER_PAIR: "pair",
    HOLD_HEADER_BACKWARD: "backward",
    HOLD_HEADER_OVERFLOW: "overflow",
    HOLD_HEADER_BITS: "bits",
    HOLD_HEADER_ODD: "odd",
    HOLD_HEADER_SPAN: "span",
    HOLD_HEADER_DUPLICATE: "duplicate",
    HOLD_HEADER_TILING: "tiling",
    HOLD_HEADER_VIEW: "view",
}

# The one dtype table, as C sees it; filled once, when this module is imported.
cdef hold_header_type _ROWS[64]
cdef hold_header_types _TYPES
cdef uint64_t _KEY[2]
cdef list _TAGS = [row.safetensors.encode() if row.safetensors else None for row in DTYPES]

assert len(DTYPES) <= 64 and all(0 < len(tag) <= 16 for tag in _TAGS if tag is not None)
assert sizeof(hold_header_entry) == ENTRY.itemsize and sizeof(hold_header_view) == VIEW.itemsize
for _code, _row in enumerate(DTYPES):
    _ROWS[_code].bits = _row.bits
    _ROWS[_code].pack = _row.pack
    if _TAGS[_code] is not None:
        _ROWS[_code].tag.data = <const uint8_t *><char *>_TAGS[_code]
        _ROWS[_code].tag.length = len(_TAGS[_code])
_TYPES.rows = _ROWS
_TYPES.n = len(DTYPES)
if getrandom(_KEY, sizeof(_KEY), 0) != sizeof(_KEY):
    raise OSError("getrandom: no random bytes")


class Fault(Exception):
    """What is wrong with a header; the format makes a message of it.

    Attributes
    ----------
    kind : str
        One of the values of ``_KINDS``.
    position : int
        Of the byte that is wrong, from the start of the file; 0 where it is about no byte.
    name : str or None
        The tensor it is about.
    entry : int
        Its position, or -1.
    type, shape, begin, end
        Code, shape in the header and data_offsets of the tensor, where the fault is in these.
    expected, found : int
        As csrc/header.h says for each kind.
    """

    def __init__(self, kind, position=0, name=None, entry=-1, type=0, shape=(), begin=0, end=0,
                 expected=0, found=0):
        super().__init__(kind)
        self.kind = kind
        self.position = position
        self.name = name
        self.entry = entry
        self.type = type
        self.shape = shape
        self.begin = begin
        self.end = end
        self.expected = expected
        self.found = found


cdef str _decode(const hold_text *text):
    cdef size_t i
    cdef uint8_t every = 0
    cdef str made
    for i in range(text.length):
        every |= text.data[i]
    if every < 0x80 and text.length > 1:  # as nearly all are; of short ones there are singletons
        made = PyUnicode_New(<Py_ssize_t>text.length, 0x7F)
        memcpy(PyUnicode_DATA(made), text.data, text.length)
        return made
    return PyUnicode_DecodeUTF8(<const char *>text.data, <Py_ssize_t>text.length, NULL)


cdef str _decode_span(const hold_json_span *span):
    """The characters that a string of the header stands for."""
    cdef uint8_t *plain
    cdef size_t length
    if not span.escaped:
        return PyUnicode_DecodeUTF8(<const char *>span.data, <Py_ssize_t>span.length, NULL)
    plain = <uint8_t *>PyMem_Malloc(span.length)
    if plain is NULL:
        raise MemoryError
    try:
        length = hold_json_unescape(span, plain)
        return PyUnicode_DecodeUTF8(<const char *>plain, <Py_ssize_t>length, NULL)
    finally:
        PyMem_Free(plain)


cdef class HeaderNames:
    """The names of a scanned header; each becomes a str only when asked for (``Names``).

    Keeps the bytes that were scanned.
    """

    cdef hold_header header
    cdef Py_buffer head
    cdef list cache

    def __cinit__(self, head):
        PyObject_GetBuffer(head, &self.head, PyBUF_SIMPLE)

    def __dealloc__(self):
        hold_header_free(&self.header)
        PyBuffer_Release(&self.head)

    def __len__(self):
        return <Py_ssize_t>self.header.n

    def tolist(self):
        """Every name, in header order; the list is the index's own, not to be changed."""
        cdef size_t i
        if self.cache is None:
            self.cache = [_decode(&self.header.names[i]) for i in range(self.header.n)]
        return self.cache

    def find(self, str name not None):
        """Position of `name`, or -1."""
        cdef hold_text wanted
        cdef Py_ssize_t length
        try:
            wanted.data = <const uint8_t *>PyUnicode_AsUTF8AndSize(name, &length)
        except UnicodeEncodeError:
            return -1
        wanted.length = <size_t>length
        return hold_names_find(&self.header.index, self.header.names, wanted)

    cdef object fault(self, const hold_header_fault *fault):
        """The exception for `fault`."""
        cdef size_t i
        if fault.code == HOLD_HEADER_NOMEM:
            return MemoryError()
        name = None
        if fault.entry >= 0 and <size_t>fault.entry < self.header.nnames:
            name = _decode(&self.header.names[fault.entry])
        shape = tuple([self.header.dims[fault.dims + i] for i in range(fault.ndim)])
        return Fault(_KINDS[fault.code], fault.position, name, fault.entry, fault.type, shape,
                     fault.begin, fault.end, fault.expected, fault.found)


cdef class _Column:
    """Memory of a scanned header, as a buffer that an array can stand on."""

    cdef HeaderNames owner
    cdef void *data
    cdef size_t nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.nbytes, 0, flags)


cdef object _array(HeaderNames owner, void *data, size_t n, object dtype):
    cdef _Column column
    if n == 0:
        return np.empty(0, dtype)
    column = _Column.__new__(_Column)
    column.owner = owner
    column.data = data
    column.nbytes = n * <size_t>dtype.itemsize
    return np.frombuffer(column, dtype)


class Header:
    """A header that was scanned: names, entries and dims as in ``layout.Index``.

    Attributes
    ----------
    metadata : dict of str to str
        All of ``__metadata__``; the value that became `numbers` is empty here.
    numbers : ndarray of uint32 or None
        What the value of ``holdfast.crc32`` says, where it is as :func:`stamp` writes it.
    marker : int
        Where the text of the value of ``holdfast`` begins in the bytes, or -1.
    nbytes : int
        Of the data.
    """

    __slots__ = ("dims", "entries", "marker", "metadata", "names", "nbytes", "numbers")


cdef object _read_numbers(const hold_json_span *span):
    """What eight lower-case hexadecimal digits each stand for; None where they are not such."""
    cdef const uint8_t *digits = span.data
    cdef Py_ssize_t length = <Py_ssize_t>span.length
    cdef uint32_t[::1] values
    cdef bint good = True
    cdef str text
    if span.escaped:
        text = _decode_span(span)
        digits = <const uint8_t *>PyUnicode_AsUTF8AndSize(text, &length)
    if length % 8:
        return None
    out = np.empty(length // 8, np.uint32)
    if length:
        values = out
        with nogil:
            good = hold_header_unhex(digits, <size_t>length // 8, &values[0])
    return out if good else None


cdef _read_metadata(HeaderNames names, object out):
    cdef size_t i
    cdef hold_header_pair *pair
    out.metadata = {}
    out.marker = -1
    out.numbers = None
    for i in range(names.header.npairs):
        pair = &names.header.pairs[i]
        key = _decode_span(&pair.key)
        position = pair.key.data - <const uint8_t *>names.head.buf
        if key in out.metadata:
            raise Fault("metadata_key", position, key)
        if key == "holdfast.crc32":
            out.numbers = _read_numbers(&pair.value)
            if out.numbers is not None:
                out.metadata[key] = ""
                continue
        out.metadata[key] = _decode_span(&pair.value)
        if key == "holdfast":
            out.marker = pair.value.data - <const uint8_t *>names.head.buf


def scan(head, bytes key=None):
    """Scan the first ``8 + n`` bytes of a file, which must not change while the result lives.

    Parameters
    ----------
    head : bytes-like
    key : bytes, optional
        16 for the hash of names, instead of those that were drawn when the process began.

    Raises
    ------
    Fault
    """
    cdef HeaderNames names = HeaderNames(head)
    cdef hold_header_fault fault
    cdef uint64_t words[2]
    cdef int code
    if names.head.len < 8:
        raise ValueError("head has less than 8 bytes")
    memcpy(words, _KEY, sizeof(words))
    if key is not None:
        if len(key) != sizeof(words):
            raise ValueError(f"key has {len(key)} bytes, not 16")
        memcpy(words, <const char *>key, sizeof(words))
    with nogil:
        code = hold_header_scan(<const uint8_t *>names.head.buf, <size_t>names.head.len, _TYPES,
                                words, &names.header, &fault)
    if code:
        raise names.fault(&fault)
    out = Header()
    out.names = names
    out.entries = _array(names, names.header.entries, names.header.n, ENTRY)
    out.dims = _array(names, names.header.dims, names.header.ndims, np.dtype(np.int64))
    out.nbytes = names.header.nbytes
    _read_metadata(names, out)
    return out


cdef hold_text *_texts(list texts) except NULL:
    """The UTF-8 of each str, owned by these; the array is the caller's, to PyMem_Free()."""
    cdef Py_ssize_t i, length, n = len(texts)
    cdef object text
    cdef hold_text *out = <hold_text *>PyMem_Malloc((n + 1) * sizeof(hold_text))
    if out is NULL:
        raise MemoryError
    try:
        for i in range(n):
            text = texts[i]
            if type(text) is not str:
                raise TypeError(f"expected a str, found {type(text).__name__}: {text!r}")
            out[i].data = <const uint8_t *>PyUnicode_AsUTF8AndSize(text, &length)
            out[i].length = <size_t>length
    except BaseException:
        PyMem_Free(out)
        raise
    return out


cdef object _emit_error(const hold_header_fault *fault, list names):
    if fault.code == HOLD_HEADER_NOMEM:
        return MemoryError()
    name = names[fault.entry] if fault.entry >= 0 else None
    return Fault(_KINDS[fault.code], 0, name, fault.entry)


def emit(list names, const uint8_t[::1] views, const int64_t[::1] dims,
         const uint64_t[::1] offsets, list pairs):
    """The whole header for these tensors; the inverse of :func:`scan`.

    Parameters
    ----------
    names : list of str
    views : bytes of an array of VIEW, as many rows as names
    dims : extents that `views` refers to
    offsets : where each tensor stands, from the start of the data
    pairs : list of str
        Key, value, key, value of ``__metadata__``.

    Returns
    -------
    head : bytearray
        Length, JSON and padding.
    value_at : list of int
        Where in `head` the text of each value begins.

    Raises
    ------
    Fault
        Kinds "duplicate", "metadata", "overflow", "bits" and "view".
    UnicodeEncodeError
        A lone surrogate.
    """
    cdef hold_header_source source
    cdef hold_header_fault fault
    cdef hold_text *name_texts = NULL
    cdef hold_text *pair_texts = NULL
    cdef uint64_t[::1] value_at = np.zeros(len(pairs) // 2 + 1, np.uint64)
    cdef hold_header_room room
    cdef uint8_t *data
    cdef size_t nbytes = 0
    cdef int code
    cdef object head
    if views.shape[0] != len(names) * VIEW.itemsize or offsets.shape[0] != len(names):
        raise ValueError(f"{len(names)} names, {views.shape[0] / VIEW.itemsize} views, "
                         f"{offsets.shape[0]} offsets")
    try:
        name_texts = _texts(names)
        pair_texts = _texts(pairs)
        source.types = _TYPES
        source.bytes_type = BY_NAME["uint8"].code
        source.names = name_texts
        source.views = NULL
        source.offsets = NULL
        source.dims = NULL
        if names:
            source.views = <const hold_header_view *>&views[0]
            source.offsets = &offsets[0]
        if dims.shape[0]:
            source.dims = &dims[0]
        source.n = len(names)
        source.ndims = dims.shape[0]
        source.pairs = pair_texts
        source.npairs = len(pairs) // 2
        with nogil:
            code = hold_header_measure(&source, _KEY, &room, &fault)
        if code:
            raise _emit_error(&fault, names)
        head = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>room.nbytes)
        data = <uint8_t *>PyByteArray_AS_STRING(head)
        with nogil:
            hold_advise_huge(data, room.nbytes)
            code = hold_header_emit(&source, room, data, &nbytes, &value_at[0], &fault)
        if code:
            raise _emit_error(&fault, names)
        PyByteArray_Resize(head, <Py_ssize_t>nbytes)
        return head, [int(at) for at in value_at[:len(pairs) // 2]]
    finally:
        PyMem_Free(name_texts)
        PyMem_Free(pair_texts)


def header_crc(const uint8_t[::1] head, size_t at):
    """CRC-32 of a header, in which the eight digits at `at` count as zeros."""
    cdef uint32_t crc
    if at + 8 > <size_t>head.shape[0]:
        raise ValueError(f"digits at {at}, in {head.shape[0]} bytes")
    with nogil:
        crc = hold_header_crc(&head[0], <size_t>head.shape[0], at)
    return crc


def stamp(uint8_t[::1] head, size_t at, const uint32_t[::1] values):
    """Write eight hexadecimal digits for each of `values` into `head`, from `at` on."""
    cdef size_t n = <size_t>values.shape[0]
    if n == 0:
        return
    if at > <size_t>head.shape[0] or n > (<size_t>head.shape[0] - at) // 8:
        raise ValueError(f"{n} numbers at {at}, in {head.shape[0]} bytes")
    with nogil:
        hold_header_hex(&values[0], n, &head[at])
