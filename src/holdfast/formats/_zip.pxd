# cython: language_level=3
"""The headers of the zip container's reader and writer, as far as the glue needs them."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


cdef extern from "sys/random.h" nogil:
    ssize_t getrandom(void *buffer, size_t nbytes, unsigned int flags)


cdef extern from "hold.h" nogil:
    uint32_t hold_crc32(uint32_t crc, const void *data, size_t nbytes)


cdef extern from "zip.h" nogil:
    ctypedef struct hold_text:
        const uint8_t *data
        size_t length

    ctypedef struct hold_zip_fault:
        int code
        int64_t record
        uint64_t position
        uint64_t expected
        uint64_t found

    ctypedef struct hold_zip_record:
        pass

    ctypedef struct hold_zip_tail:
        uint64_t start
        uint64_t size
        uint64_t count

    ctypedef struct hold_zip:
        hold_zip_record *records
        hold_text *names
        size_t n
        size_t root
        size_t foreign
        bint twins
        size_t twin[2]

    int hold_zip_find(const uint8_t *bytes, size_t nbytes, uint64_t size, hold_zip_tail *out,
                      hold_zip_fault *fault)
    int hold_zip_read(const uint8_t *bytes, const hold_zip_tail *tail, const uint64_t *key,
                      hold_zip *out, hold_zip_fault *fault)
    void hold_zip_want(const hold_zip *self, uint64_t *offset, uint64_t *nbytes)
    int hold_zip_walk(hold_zip *self, const uint8_t *bytes, hold_zip_fault *fault)
    int64_t hold_zip_lookup(const hold_zip *self, hold_text wanted, uint8_t *room)
    void hold_zip_free(hold_zip *self)

    ctypedef struct hold_zip_item:
        hold_text name
        uint64_t size
        const uint8_t *payload
        uint64_t offset
        uint64_t descriptor
        uint64_t central

    ctypedef struct hold_zip_plan:
        hold_zip_item *items
        size_t n
        hold_text root
        uint64_t alignment
        uint64_t size
        uint64_t nbytes
        size_t npieces

    ctypedef struct hold_zip_piece:
        pass

    int hold_zip_measure(hold_zip_plan *plan, const uint64_t *key, hold_zip_fault *fault)
    void hold_zip_emit(const hold_zip_plan *plan, uint8_t *out, hold_zip_piece *pieces)
    void hold_zip_stamp(uint8_t *data, uint64_t descriptor, uint64_t central, uint32_t crc)

    enum:
        HOLD_ZIP_DEFLATED, HOLD_ZIP_TAIL
        HOLD_ZIP_NOMEM, HOLD_ZIP_NO_END, HOLD_ZIP_TRAILING, HOLD_ZIP_AMBIGUOUS, HOLD_ZIP_DISKS
        HOLD_ZIP_LOCATOR_BAD, HOLD_ZIP_END64_BAD, HOLD_ZIP_CONTRARY, HOLD_ZIP_PLACE
        HOLD_ZIP_HUGE, HOLD_ZIP_COUNT, HOLD_ZIP_ENTRY, HOLD_ZIP_SHORT, HOLD_ZIP_REST
        HOLD_ZIP_VERSION, HOLD_ZIP_FLAGS, HOLD_ZIP_METHOD, HOLD_ZIP_STORED_SIZE, HOLD_ZIP_RATIO
        HOLD_ZIP_NAME, HOLD_ZIP_OTHER_NAME, HOLD_ZIP_FOLDER, HOLD_ZIP_EXTRA
        HOLD_ZIP_EXTRA64, HOLD_ZIP_HEADER, HOLD_ZIP_TWICE, HOLD_ZIP_PREFIX
        HOLD_ZIP_OVERLAP, HOLD_ZIP_GAP, HOLD_ZIP_LOCAL_BAD, HOLD_ZIP_LOCAL_FLAGS
        HOLD_ZIP_LOCAL_METHOD, HOLD_ZIP_LOCAL_CRC, HOLD_ZIP_LOCAL_SIZE, HOLD_ZIP_LOCAL_PACKED
        HOLD_ZIP_LOCAL_NAME, HOLD_ZIP_PAST, HOLD_ZIP_DESCRIPTOR, HOLD_ZIP_DESCRIPTOR_CRC
        HOLD_ZIP_DESCRIPTOR_SIZE, HOLD_ZIP_DESCRIPTOR_PACKED, HOLD_ZIP_LONG
        HOLD_ZIP_TOO_LARGE
