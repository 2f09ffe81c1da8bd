#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "hold.h"
#include "zip.h"
#include "zip_bytes.h"
#include "zip_walk.h"

#define MADE_BY 0x031e /* of the zip64 end record: version 3.0, Unix */
#define NEEDED 0x2d    /* to read it: version 4.5 */

/* Length of a record's name with the root and the slash between. */
static size_t full_length(const hold_zip_plan *plan, const hold_zip_item *item)
{
    return plan->root.length + 1 + item->name.length;
}

/*
 * Bytes of the zip64 field, its own four included; 0 where there is none. The local header and the
 * directory have the same numbers in it.
 */
static uint64_t extra64(const hold_zip_item *item)
{
    uint64_t size = (item->size >= UINT32_MAX ? 16u : 0u) + (item->header >= UINT32_MAX ? 8u : 0u);

    return size ? size + 4 : 0;
}

/* Bytes of the descriptor behind the payload. */
static uint64_t descriptor_bytes(const hold_zip_item *item)
{
    return item->size == 0 ? 0 : extra64(item) ? 24 : 16;
}

/* What is wrong with the names, if something is. */
static int check_names(const hold_zip_plan *plan, const uint64_t key[2], hold_zip_fault *fault)
{
    size_t letters = 0, duplicate = 0;
    hold_names index = {0};
    int code = HOLD_ZIP_NOMEM, rc;

    for (size_t i = 0; i < plan->n; i++) {
        const hold_zip_item *item = &plan->items[i];
        fault->record = (int64_t)i;
        if (item->name.length > 0xffff || full_length(plan, item) > 0xffff)
            return hold_zip_fail(fault, HOLD_ZIP_LONG, 0, 0xffff, full_length(plan, item));
        if (hold_zip_check_name(item->name))
            return hold_zip_fail(fault, HOLD_ZIP_NAME, 0, 0, 0);
        if (item->name.data[item->name.length - 1] == '/' && item->size)
            return hold_zip_fail(fault, HOLD_ZIP_FOLDER, 0, 0, item->size);
        letters += item->name.length;
    }
    uint8_t *arena = malloc(letters + 1);
    hold_text *folded = malloc(plan->n * sizeof *folded + 1);
    if (arena == NULL || folded == NULL)
        goto out;
    letters = 0;
    for (size_t i = 0; i < plan->n; i++) {
        folded[i] = (hold_text){arena + letters, plan->items[i].name.length};
        hold_zip_fold(plan->items[i].name, arena + letters);
        letters += folded[i].length;
    }
    rc = hold_names_build(&index, folded, plan->n, key, &duplicate);
    fault->record = rc == -EEXIST ? (int64_t)duplicate : -1;
    code = rc == 0 ? HOLD_ZIP_OK : rc == -EEXIST ? HOLD_ZIP_TWICE : HOLD_ZIP_NOMEM;
out:
    hold_names_free(&index);
    free(arena);
    free(folded);
    fault->code = code;
    return code;
}

int hold_zip_measure(hold_zip_plan *plan, const uint64_t key[2], hold_zip_fault *fault)
{
    uint64_t cursor = 0, inside = 0;

    assert(plan->alignment >= 1 && plan->alignment <= 32768);
    *fault = (hold_zip_fault){.record = -1};
    if (hold_zip_check_name(plan->root) || plan->root.length > 0xffff ||
        memchr(plan->root.data, '/', plan->root.length))
        return hold_zip_fail(fault, HOLD_ZIP_NAME, 0, 0, 0);
    int code = check_names(plan, key, fault);
    if (code)
        return code;
    plan->npieces = 1;
    for (size_t i = 0; i < plan->n; i++) {
        hold_zip_item *item = &plan->items[i];
        /* With at most 2^17 bytes each around them, sums stay below 2^64. */
        if (item->size > INT64_MAX - cursor || INT64_MAX - cursor - item->size < 0x20000) {
            fault->record = (int64_t)i;
            return hold_zip_fail(fault, HOLD_ZIP_TOO_LARGE, 0, INT64_MAX, item->size);
        }
        item->header = cursor;
        /* The field that pads is there with four bytes at least. */
        cursor += HOLD_ZIP_LOCAL + full_length(plan, item) + extra64(item) + 4;
        cursor += (plan->alignment - cursor % plan->alignment) % plan->alignment;
        inside += cursor - item->header;
        item->offset = cursor;
        if (item->payload)
            inside += item->size;
        else if (item->size)
            plan->npieces++;
        cursor += item->size;
        item->descriptor = item->size ? inside + 4 : 0;
        inside += descriptor_bytes(item);
        cursor += descriptor_bytes(item);
    }
    for (size_t i = 0; i < plan->n; i++) {
        hold_zip_item *item = &plan->items[i];
        uint64_t nbytes = HOLD_ZIP_CENTRAL + full_length(plan, item) + extra64(item);
        item->central = inside + 16;
        inside += nbytes;
        cursor += nbytes;
    }
    plan->nbytes = inside + HOLD_ZIP_END64 + HOLD_ZIP_LOCATOR + HOLD_ZIP_END;
    plan->size = cursor + HOLD_ZIP_END64 + HOLD_ZIP_LOCATOR + HOLD_ZIP_END;
    if (plan->size > INT64_MAX)
        return hold_zip_fail(fault, HOLD_ZIP_TOO_LARGE, 0, INT64_MAX, plan->size);
    return HOLD_ZIP_OK;
}

static uint8_t *put_name(uint8_t *at, const hold_zip_plan *plan, const hold_zip_item *item)
{
    memcpy(at, plan->root.data, plan->root.length);
    at += plan->root.length;
    *at++ = '/';
    memcpy(at, item->name.data, item->name.length);
    return at + item->name.length;
}

/* Put a zip64 field, where there has to be one. A local header does not know `packed` yet. */
static uint8_t *put_zip64(uint8_t *at, const hold_zip_item *item, uint64_t packed)
{
    uint64_t nbytes = extra64(item);

    if (nbytes == 0)
        return at;
    at = put16(put16(at, EXTRA_ZIP64), (uint16_t)(nbytes - 4));
    if (item->size >= UINT32_MAX)
        at = put64(put64(at, item->size), packed);
    if (item->header >= UINT32_MAX)
        at = put64(at, item->header);
    return at;
}

static uint16_t flags_of(const hold_zip_item *item)
{
    return item->size ? FLAG_UTF8 | FLAG_DESCRIPTOR : FLAG_UTF8;
}

static uint8_t *put_local(uint8_t *at, const hold_zip_plan *plan, const hold_zip_item *item)
{
    size_t name = full_length(plan, item);
    uint64_t nbytes = item->offset - item->header, extra = nbytes - HOLD_ZIP_LOCAL - name;
    uint8_t *end = at + nbytes;

    at = put32(at, SIGNATURE_LOCAL);
    at = put16(at, 0);
    at = put16(at, flags_of(item));
    memset(at, 0, 18); /* method, time, date, CRC-32, sizes */
    at = put16(at + 18, (uint16_t)name);
    at = put16(at, (uint16_t)extra);
    at = put_name(at, plan, item);
    at = put_zip64(at, item, 0);
    at = put16(put16(at, EXTRA_PADDING), (uint16_t)(end - at - 4));
    memset(at, 'Z', (size_t)(end - at));
    return end;
}

static uint8_t *put_descriptor(uint8_t *at, const hold_zip_item *item, uint32_t crc)
{
    if (item->size == 0)
        return at;
    at = put32(put32(at, SIGNATURE_DESCRIPTOR), crc);
    if (descriptor_bytes(item) == 24)
        return put64(put64(at, item->size), item->size);
    return put32(put32(at, (uint32_t)item->size), (uint32_t)item->size);
}

static uint8_t *put_central(uint8_t *at, const hold_zip_plan *plan, const hold_zip_item *item)
{
    at = put32(at, SIGNATURE_CENTRAL);
    at = put32(at, 0); /* versions */
    at = put16(at, flags_of(item));
    memset(at, 0, 10); /* method, time, date, CRC-32 */
    at = put32(put32(at + 10, least32(item->size)), least32(item->size));
    at = put16(at, (uint16_t)full_length(plan, item));
    at = put16(at, (uint16_t)extra64(item));
    memset(at, 0, 10); /* comment, disk, attributes */
    at = put32(at + 10, least32(item->header));
    at = put_name(at, plan, item);
    return put_zip64(at, item, item->size);
}

/* Put what ends the file. The directory has `nbytes` bytes from `start` on. */
static void put_tail(uint8_t *at, const hold_zip_plan *plan, uint64_t start, uint64_t nbytes)
{
    uint16_t count = plan->n < UINT16_MAX ? (uint16_t)plan->n : UINT16_MAX;

    at = put64(put32(at, SIGNATURE_END64), HOLD_ZIP_END64 - 12);
    at = put64(put16(put16(at, MADE_BY), NEEDED), 0); /* this disk, that of the directory */
    at = put64(put64(at, plan->n), plan->n);
    at = put64(put64(at, nbytes), start);
    at = put32(put32(at, SIGNATURE_LOCATOR), 0);
    at = put32(put64(at, start + nbytes), 1);
    at = put32(put32(at, SIGNATURE_END), 0);
    at = put16(put16(at, count), count);
    at = put32(put32(at, least32(nbytes)), least32(start));
    put16(at, 0);
}

void hold_zip_emit(const hold_zip_plan *plan, uint8_t *out, hold_zip_piece *pieces)
{
    uint8_t *at = out, *begin = out;
    uint64_t cursor = 0; /* in the file, where `begin` goes */
    size_t n = 0;

    for (size_t i = 0; i < plan->n; i++) {
        const hold_zip_item *item = &plan->items[i];
        uint32_t crc = 0;
        at = put_local(at, plan, item);
        if (item->payload && item->size) {
            memcpy(at, item->payload, (size_t)item->size);
            at += item->size;
            crc = hold_crc32(0, item->payload, (size_t)item->size);
        } else if (item->size) {
            pieces[n++] = (hold_zip_piece){cursor, (uint64_t)(at - begin),
                                           (uint64_t)(begin - out)};
            begin = at;
            cursor = item->offset + item->size;
        }
        at = put_descriptor(at, item, crc);
    }
    uint8_t *directory = at;
    for (size_t i = 0; i < plan->n; i++)
        at = put_central(at, plan, &plan->items[i]);
    put_tail(at, plan, cursor + (uint64_t)(directory - begin), (uint64_t)(at - directory));
    at += HOLD_ZIP_END64 + HOLD_ZIP_LOCATOR + HOLD_ZIP_END;
    pieces[n++] = (hold_zip_piece){cursor, (uint64_t)(at - begin), (uint64_t)(begin - out)};
    assert(n == plan->npieces && (uint64_t)(at - out) == plan->nbytes);
    for (size_t i = 0; i < plan->n; i++) {
        const hold_zip_item *item = &plan->items[i];
        if (item->payload && item->size)
            memcpy(out + item->central, out + item->descriptor, 4);
    }
}

void hold_zip_stamp(uint8_t *data, uint64_t descriptor, uint64_t central, uint32_t crc)
{
    if (descriptor == 0)
        return;
    put32(data + descriptor, crc);
    put32(data + central, crc);
}
