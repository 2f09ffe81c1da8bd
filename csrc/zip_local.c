#include <assert.h>
#include <string.h>

#include "zip.h"
#include "zip_bytes.h"
#include "zip_walk.h"

#define WINDOW ((uint64_t)1 << 20) /* bytes that are wanted at once, about */
#define NEAR ((uint64_t)16 << 10)  /* between headers that one window takes in */
#define SLACK 128u                 /* bytes that an extra field is expected to have, at most */

/* Where what follows the payload of the record before `next` begins. */
static uint64_t next_begin(const hold_zip *self)
{
    return self->next < self->n ? self->records[self->order[self->next]].header : self->start;
}

int hold_zip_check_gap(hold_zip *self, hold_zip_fault *fault)
{
    uint64_t begin = next_begin(self), gap = begin - self->end;
    bool last = self->next == self->n;

    assert(self->next <= self->n);
    if (self->next == 0) {
        fault->record = last ? -1 : (int64_t)self->order[0];
        if (begin != 0)
            return hold_zip_fail(fault, HOLD_ZIP_PREFIX, 0, 0, begin);
    } else {
        const hold_zip_record *before = &self->records[self->order[self->next - 1]];
        fault->record = (int64_t)self->order[self->next - (last ? 1 : 0)];
        if (begin < self->end)
            return hold_zip_fail(fault, last ? HOLD_ZIP_PAST : HOLD_ZIP_OVERLAP, begin,
                                 last ? begin : self->end, last ? self->end : begin);
        fault->record = (int64_t)self->order[self->next - 1];
        bool described = before->flags & FLAG_DESCRIPTOR;
        bool fits = described ? gap == 12 || gap == 16 || gap == 20 || gap == 24 : gap == 0;
        /* PyTorch writes none behind a payload of no bytes. */
        if (!fits && !(gap == 0 && before->packed == 0))
            return hold_zip_fail(fault, HOLD_ZIP_GAP, self->end, described ? 24 : 0, gap);
    }
    fault->record = -1;
    if (last && gap == 0)
        self->next++;
    return HOLD_ZIP_OK;
}

void hold_zip_want(const hold_zip *self, uint64_t *offset, uint64_t *nbytes)
{
    uint64_t stop = self->start;
    size_t at = self->next;

    *offset = self->end;
    *nbytes = 0;
    if (at > self->n)
        return;
    while (at < self->n) {
        uint32_t row = self->order[at];
        uint64_t header = self->records[row].header;
        stop = header + HOLD_ZIP_LOCAL + self->names[row].length + SLACK;
        if (++at == self->n) {
            if (stop > self->start || self->start - stop <= NEAR)
                stop = self->start;
            break;
        }
        uint64_t following = self->records[self->order[at]].header;
        if (following - header > NEAR || following - self->end > WINDOW)
            break;
    }
    if (stop < self->end + self->needed)
        stop = self->end + self->needed;
    if (stop > self->start)
        stop = self->start;
    *nbytes = stop - self->end;
}

/* Compare the `length` bytes behind the payload of `record` with what the directory says. */
static int check_descriptor(const hold_zip_record *record, const uint8_t *at, uint64_t length,
                            uint64_t position, hold_zip_fault *fault)
{
    bool wide = length >= 20, signature = length == 16 || length == 24;

    if (length == 0)
        return HOLD_ZIP_OK;
    if (signature) {
        if (get32(at) != SIGNATURE_DESCRIPTOR)
            return hold_zip_fail(fault, HOLD_ZIP_DESCRIPTOR, position, 0, 0);
        at += 4;
        position += 4;
    }
    uint32_t crc = get32(at);
    uint64_t packed = wide ? get64(at + 4) : get32(at + 4);
    uint64_t size = wide ? get64(at + 12) : get32(at + 8);
    if (crc != record->crc)
        return hold_zip_fail(fault, HOLD_ZIP_DESCRIPTOR_CRC, position, record->crc, crc);
    if (packed != record->packed)
        return hold_zip_fail(fault, HOLD_ZIP_DESCRIPTOR_PACKED, position + 4, record->packed,
                             packed);
    if (size != record->size)
        return hold_zip_fail(fault, HOLD_ZIP_DESCRIPTOR_SIZE, position + (wide ? 12 : 8),
                             record->size, size);
    return HOLD_ZIP_OK;
}

/* Compare CRC-32 and sizes of a local header with the directory. */
static int check_sizes(const hold_zip_record *record, const uint8_t *at, const zip_extra *extra,
                       hold_zip_fault *fault)
{
    uint32_t crc = get32(at + 14);
    uint64_t packed = get32(at + 18), size = get32(at + 22);

    if (extra->zip64 && (packed == UINT32_MAX || size == UINT32_MAX)) {
        /* In a local header it has both sizes, whatever the 32 bits say. */
        if (extra->zip64_length < 16)
            return hold_zip_fail(fault, HOLD_ZIP_EXTRA64, record->header, 16,
                                 extra->zip64_length);
        if (size == UINT32_MAX)
            size = get64(extra->zip64);
        if (packed == UINT32_MAX)
            packed = get64(extra->zip64 + 8);
    }
    /* Where a descriptor follows, there may be nothing here yet. */
    bool later = record->flags & FLAG_DESCRIPTOR;
    if (crc != record->crc && !(later && crc == 0))
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_CRC, record->header + 14, record->crc, crc);
    if (packed != record->packed && !(later && packed == 0))
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_PACKED, record->header + 18, record->packed,
                             packed);
    if (size != record->size && !(later && size == 0))
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_SIZE, record->header + 22, record->size, size);
    return HOLD_ZIP_OK;
}

/*
 * Look at the local header at `at`, of which `left` bytes are there. *taken is how many it has, or,
 * if that is more than `left`, has to have for another look.
 */
static int check_local(const hold_zip *self, size_t row, const uint8_t *at, uint64_t left,
                       uint64_t *taken, hold_zip_fault *fault)
{
    const hold_zip_record *record = &self->records[row];
    hold_text name = self->names[row];
    zip_extra extra;

    if (get32(at) != SIGNATURE_LOCAL)
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_BAD, record->header, 0, 0);
    size_t length = get16(at + 26), more = get16(at + 28);
    if (length != name.length)
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_NAME, record->header + 26, name.length, length);
    *taken = HOLD_ZIP_LOCAL + length + more;
    if (*taken > self->start - record->header ||
        record->packed > self->start - record->header - *taken)
        return hold_zip_fail(fault, HOLD_ZIP_PAST, record->header, self->start,
                             record->header + *taken + record->packed);
    if (*taken > left)
        return HOLD_ZIP_OK;
    if (memcmp(at + HOLD_ZIP_LOCAL, name.data, length) != 0)
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_NAME, record->header + HOLD_ZIP_LOCAL, length,
                             length);
    uint16_t flags = get16(at + 6), method = get16(at + 8);
    if (flags != record->flags)
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_FLAGS, record->header + 6, record->flags, flags);
    if (method != record->method)
        return hold_zip_fail(fault, HOLD_ZIP_LOCAL_METHOD, record->header + 8, record->method,
                             method);
    uint64_t place = record->header + HOLD_ZIP_LOCAL + length;
    if (!zip_extra_read(at + HOLD_ZIP_LOCAL + length, more, name.data, length, &extra))
        return hold_zip_fail(fault, HOLD_ZIP_EXTRA, place, 0, 0);
    if (extra.renames)
        return hold_zip_fail(fault, HOLD_ZIP_OTHER_NAME, place, 0, 0);
    return check_sizes(record, at, &extra, fault);
}

int hold_zip_walk(hold_zip *self, const uint8_t *bytes, hold_zip_fault *fault)
{
    uint64_t offset, nbytes;
    int code;

    hold_zip_want(self, &offset, &nbytes);
    *fault = (hold_zip_fault){.record = -1};
    while (self->next <= self->n) {
        bool last = self->next == self->n;
        uint64_t begin = next_begin(self), taken = 0;
        if (begin - offset + (last ? 0 : HOLD_ZIP_LOCAL) > nbytes)
            break;
        if (self->next) {
            fault->record = (int64_t)self->order[self->next - 1];
            code = check_descriptor(&self->records[fault->record], bytes + (self->end - offset),
                                    begin - self->end, self->end, fault);
            if (code)
                return code;
        }
        if (last) {
            self->next++;
            break;
        }
        size_t row = self->order[self->next];
        fault->record = (int64_t)row;
        uint64_t left = nbytes - (begin - offset);
        code = check_local(self, row, bytes + (begin - offset), left, &taken, fault);
        if (code)
            return code;
        if (taken > left) {
            self->needed = begin - self->end + taken;
            break;
        }
        self->records[row].offset = begin + taken;
        self->end = begin + taken + self->records[row].packed;
        self->needed = 0;
        self->next++;
        code = hold_zip_check_gap(self, fault);
        if (code)
            return code;
    }
    fault->record = -1;
    return HOLD_ZIP_OK;
}
