# cython: language_level=3
"""The headers of the scanner and the writer, as far as the glue needs them."""

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "header_memory.h" nogil:
    void hold_advise_huge(void *data, size_t nbytes)


cdef extern from "header.h" nogil:
    ctypedef struct hold_json_span:
        const uint8_t *data
        size_t length
        bint escaped

    size_t hold_json_unescape(const hold_json_span *span, uint8_t *out)

    ctypedef struct hold_text:
        const uint8_t *data
        size_t length

    ctypedef struct hold_header_type:
        hold_text tag
        uint32_t bits
        uint32_t pack

    ctypedef struct hold_header_types:
        const hold_header_type *rows
        size_t n

    ctypedef struct hold_header_entry:
        int64_t dims
        int16_t ndim

    ctypedef struct hold_header_view:
        uint64_t nbytes

    ctypedef struct hold_header_fault:
        int code
        int32_t type
        int64_t entry
        uint64_t position
        uint64_t expected
        uint64_t found
        uint64_t begin
        uint64_t end
        size_t dims
        size_t ndim

    ctypedef struct hold_names:
        pass

    ctypedef struct hold_header_pair:
        hold_json_span key
        hold_json_span value

    ctypedef struct hold_header:
        hold_header_entry *entries
        hold_text *names
        int64_t *dims
        hold_header_pair *pairs
        hold_names index
        size_t n
        size_t nnames
        size_t ndims
        size_t npairs
        uint64_t nbytes

    ctypedef struct hold_header_source:
        hold_header_types types
        size_t bytes_type
        const hold_text *names
        const hold_header_view *views
        const uint64_t *offsets
        const int64_t *dims
        size_t n
        size_t ndims
        const hold_text *pairs
        size_t npairs

    int64_t hold_names_find(const hold_names *self, const hold_text *names, hold_text wanted)
    int hold_header_scan(const uint8_t *bytes, size_t nbytes, hold_header_types types,
                         const uint64_t *key, hold_header *out, hold_header_fault *fault)
    void hold_header_free(hold_header *self)

    ctypedef struct hold_header_room:
        size_t nbytes
        bint escapes

    int hold_header_measure(const hold_header_source *source, const uint64_t *key,
                            hold_header_room *out, hold_header_fault *fault)
    int hold_header_emit(const hold_header_source *source, hold_header_room room, uint8_t *out,
                         size_t *nbytes, uint64_t *value_at, hold_header_fault *fault)
    void hold_header_hex(const uint32_t *values, size_t n, uint8_t *out)
    bint hold_header_unhex(const uint8_t *text, size_t n, uint32_t *out)
    uint32_t hold_header_crc(const uint8_t *bytes, size_t nbytes, size_t at)

    enum:
        HOLD_JSON_END, HOLD_JSON_VALUE, HOLD_JSON_OBJECT, HOLD_JSON_ARRAY, HOLD_JSON_STRING
        HOLD_JSON_INTEGER, HOLD_JSON_RANGE, HOLD_JSON_COLON, HOLD_JSON_SEPARATOR
        HOLD_JSON_CONTROL, HOLD_JSON_ESCAPE, HOLD_JSON_SURROGATE, HOLD_JSON_UTF8
        HOLD_JSON_NESTING
        HOLD_HEADER_NOMEM, HOLD_HEADER_TRAILING, HOLD_HEADER_METADATA, HOLD_HEADER_REPEATED
        HOLD_HEADER_NO_DTYPE, HOLD_HEADER_NO_SHAPE, HOLD_HEADER_NO_OFFSETS, HOLD_HEADER_TAG
        HOLD_HEADER_NDIM, HOLD_HEADER_PAIR, HOLD_HEADER_BACKWARD, HOLD_HEADER_OVERFLOW
        HOLD_HEADER_BITS, HOLD_HEADER_ODD, HOLD_HEADER_SPAN, HOLD_HEADER_DUPLICATE
        HOLD_HEADER_TILING, HOLD_HEADER_VIEW
