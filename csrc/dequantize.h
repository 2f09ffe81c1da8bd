/*
 * dequantize.h - blocks of quantized numbers to float32.
 *
 * A block is 32 numbers of 4, 5 or 8 bits with a scale, and of some types an offset, as float16.
 * Each result is the product rounded once, and with an offset the sum rounded once more: the same
 * on every machine. No allocation but of a few words for each run; threads as threads.h has them.
 */
#ifndef HOLD_DEQUANTIZE_H
#define HOLD_DEQUANTIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOLD_BLOCK 32 /* numbers in a block */

/* Types of blocks, by the numbers that GGUF has for them. */
enum {
    HOLD_Q4_0 = 2, /* scale; 16 bytes of nibbles, the lower ones are the first half */
    HOLD_Q4_1 = 3, /* scale, offset; nibbles */
    HOLD_Q5_0 = 6, /* scale; 32 fifth bits; nibbles */
    HOLD_Q5_1 = 7, /* scale, offset; fifth bits; nibbles */
    HOLD_Q8_0 = 8, /* scale; 32 bytes */
};

/* Blocks end to end, and where the numbers go: 32 for each. Both at any address. */
typedef struct hold_blocks {
    const uint8_t *data;
    float *out;
    uint64_t count;
    int type;
} hold_blocks;

/* Bytes of a block, 0 for a type that is not among those above. */
size_t hold_block_size(int type);

/*
 * Dequantize `n` runs, by up to `threads` threads; 0: one for each CPU.
 * 0, -EINVAL for an unknown type, -ENOMEM.
 */
int hold_dequantize(const hold_blocks *runs, size_t n, int threads);

/*
 * Dequantize `count` blocks with the variant `which` of the code, counted from 0, the portable
 * one. False where this machine has no such variant. For tests.
 */
bool hold_dequantize_variant(size_t which, const hold_blocks *run);

#endif
