/*
 * header_memory.h - memory for columns of up to a million tensors.
 *
 * Touching fresh memory a page at a time costs more than what a header's rows are made from. Blocks
 * of several MiB ask for huge pages, of which one fault brings 512; smaller ones come from what
 * malloc() has warm.
 */
#ifndef HOLD_HEADER_MEMORY_H
#define HOLD_HEADER_MEMORY_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Below, the ends that fill no huge page, and the part of the last that is not used, outweigh. */
#define HOLD_HUGE_LEAST ((size_t)4 << 20)
#define HOLD_HUGE_EDGE ((uintptr_t)4096)

/* Ask for huge pages under a block that was not touched yet. Advice: nothing is reported. */
static inline void hold_advise_huge(void *data, size_t nbytes)
{
    if (nbytes < HOLD_HUGE_LEAST)
        return;
    uintptr_t start = ((uintptr_t)data + HOLD_HUGE_EDGE - 1) & ~(HOLD_HUGE_EDGE - 1);
    uintptr_t end = ((uintptr_t)data + nbytes) & ~(HOLD_HUGE_EDGE - 1);
    (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
}

/* As realloc(), of any sizes; free() gives the block back. */
static inline void *hold_grow_block(void *data, size_t nbytes)
{
    void *grown = realloc(data, nbytes);
    if (grown)
        hold_advise_huge(grown, nbytes);
    return grown;
}

#endif
