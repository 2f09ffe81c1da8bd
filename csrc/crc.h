/*
 * crc.h - the variants of the CRC-32, for the file that chooses among them.
 *
 * Each takes and returns the inner state (the complement of the value that hold_crc32 speaks of).
 * A copy moves the bytes as it sums them, so that memory is read once: `to` does not overlap them.
 */
#ifndef HOLD_CRC_H
#define HOLD_CRC_H

#include <stddef.h>
#include <stdint.h>

typedef struct hold_crc_way {
    uint32_t (*update)(uint32_t state, const uint8_t *data, size_t nbytes);
    uint32_t (*copy)(uint32_t state, const uint8_t *data, size_t nbytes, uint8_t *to);
} hold_crc_way;

/* Any machine, any length: eight bytes at a step. */
uint32_t hold_crc_portable(uint32_t state, const uint8_t *data, size_t nbytes);

#define HOLD_CRC_VARIANTS 3

/* The variants that this machine can run, slowest first. Returns how many. */
size_t hold_crc_variants_x86(hold_crc_way out[HOLD_CRC_VARIANTS]);

#endif
