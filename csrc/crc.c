/* The zip CRC-32: tables for any machine, the choice of a faster variant, and combining. */
#include "crc.h"
#include "hold.h"

#include <string.h>

#define POLYNOMIAL 0xEDB88320u /* x^32 + x^26 + ... + 1, the highest power in bit 0 */
#define ONE 0x80000000u        /* the polynomial 1 */
#define PORTABLE_BLOCK ((size_t)64 << 10) /* copied, then summed while it is in cache */

/*
 * table[k][b]: what byte b adds to the state when k zero bytes follow it. Filled, like the choice,
 * when the library is loaded: before any thread can call, so no locks.
 */
static uint32_t table[8][256];
static uint32_t copy_portable(uint32_t state, const uint8_t *data, size_t nbytes, uint8_t *to);
static hold_crc_way variants[1 + HOLD_CRC_VARIANTS] = {{hold_crc_portable, copy_portable}};
static size_t variant_count = 1;

__attribute__((constructor)) static void prepare(void)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t state = b;
        for (int bit = 0; bit < 8; bit++)
            state = (state >> 1) ^ (state & 1 ? POLYNOMIAL : 0);
        table[0][b] = state;
    }
    for (int k = 1; k < 8; k++)
        for (uint32_t b = 0; b < 256; b++)
            table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 0xff];
    variant_count = 1 + hold_crc_variants_x86(variants + 1);
}

static inline uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint32_t hold_crc_portable(uint32_t state, const uint8_t *data, size_t nbytes)
{
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        uint32_t a = state ^ load32(data);
        uint32_t b = load32(data + 4);
        state = table[7][a & 0xff] ^ table[6][a >> 8 & 0xff] ^ table[5][a >> 16 & 0xff] ^
                table[4][a >> 24] ^ table[3][b & 0xff] ^ table[2][b >> 8 & 0xff] ^
                table[1][b >> 16 & 0xff] ^ table[0][b >> 24];
    }
    for (; nbytes; data++, nbytes--)
        state = (state >> 8) ^ table[0][(state ^ *data) & 0xff];
    return state;
}

static uint32_t copy_portable(uint32_t state, const uint8_t *data, size_t nbytes, uint8_t *to)
{
    for (size_t n; nbytes; nbytes -= n, data += n, to += n) {
        n = nbytes < PORTABLE_BLOCK ? nbytes : PORTABLE_BLOCK;
        memcpy(to, data, n);
        state = hold_crc_portable(state, to, n);
    }
    return state;
}

uint32_t hold_crc32(uint32_t crc, const void *data, size_t nbytes)
{
    return ~variants[variant_count - 1].update(~crc, data, nbytes);
}

uint32_t hold_crc32_copy(uint32_t crc, void *to, const void *from, size_t nbytes)
{
    return ~variants[variant_count - 1].copy(~crc, from, nbytes, to);
}

bool hold_crc32_variant(size_t which, uint32_t *crc, void *to, const void *data, size_t nbytes)
{
    if (which >= variant_count)
        return false;
    *crc = to ? ~variants[which].copy(~*crc, data, nbytes, to)
              : ~variants[which].update(~*crc, data, nbytes);
    return true;
}

/* The product of two polynomials modulo the CRC's. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = ONE; bit; bit >>= 1) {
        product ^= a & bit ? b : 0;
        b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

uint32_t hold_crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b)
{
    /* Appending a zero byte multiplies by x^8; square it up to the length. */
    uint32_t power = ONE >> 8;
    for (uint64_t n = nbytes_b; n; n >>= 1) {
        if (n & 1)
            a = multiply(power, a);
        power = multiply(power, power);
    }
    return a ^ b;
}
