/*
 * zip_bytes.h - little-endian numbers at any address, the signatures of zip, and extra fields.
 */
#ifndef HOLD_ZIP_BYTES_H
#define HOLD_ZIP_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SIGNATURE_LOCAL 0x04034b50u
#define SIGNATURE_DESCRIPTOR 0x08074b50u
#define SIGNATURE_CENTRAL 0x02014b50u
#define SIGNATURE_END64 0x06064b50u
#define SIGNATURE_LOCATOR 0x07064b50u
#define SIGNATURE_END 0x06054b50u

#define FLAG_DEFLATE 0x0006u    /* how hard the deflater tried, were it in vain */
#define FLAG_DESCRIPTOR 0x0008u /* CRC-32 and sizes stand behind the payload */
#define FLAG_UTF8 0x0800u       /* the name is UTF-8 */

#define EXTRA_ZIP64 0x0001u
#define EXTRA_PATH 0x7075u    /* another name for the record */
#define EXTRA_PADDING 0x4246u /* "FB": what PyTorch aligns payloads with */

static inline uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

static inline uint32_t get32(const uint8_t *at)
{
    return get16(at) | (uint32_t)get16(at + 2) << 16;
}

static inline uint64_t get64(const uint8_t *at)
{
    return get32(at) | (uint64_t)get32(at + 4) << 32;
}

static inline uint8_t *put16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
    return at + 2;
}

static inline uint8_t *put32(uint8_t *at, uint32_t value)
{
    return put16(put16(at, (uint16_t)value), (uint16_t)(value >> 16));
}

static inline uint8_t *put64(uint8_t *at, uint64_t value)
{
    return put32(put32(at, (uint32_t)value), (uint32_t)(value >> 32));
}

/* `value` where it fits, else the mark that says that it stands in the zip64 field. */
static inline uint32_t least32(uint64_t value)
{
    return value < UINT32_MAX ? (uint32_t)value : UINT32_MAX;
}

/* What of an extra field is looked at. */
typedef struct zip_extra {
    const uint8_t *zip64; /* NULL: none */
    size_t zip64_length;
    bool renames; /* it gives a name that is not the record's */
} zip_extra;

/* Look through the extra field of a record called `name`. Returns whether it is well formed. */
static inline bool zip_extra_read(const uint8_t *at, size_t left, const uint8_t *name,
                                  size_t length, zip_extra *out)
{
    *out = (zip_extra){0};
    while (left >= 4) {
        uint16_t id = get16(at);
        size_t size = get16(at + 2);
        at += 4;
        left -= 4;
        if (size > left)
            return false;
        if (id == EXTRA_ZIP64) {
            if (out->zip64)
                return false;
            out->zip64 = at;
            out->zip64_length = size;
        } else if (id == EXTRA_PATH) {
            /* A version, the CRC-32 of the name that it stands for, and the name. */
            if (size != length + 5 || memcmp(at + 5, name, length) != 0)
                out->renames = true;
        }
        at += size;
        left -= size;
    }
    return true; /* up to three bytes may be left: some tools align with these */
}

#endif
