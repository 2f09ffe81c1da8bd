/*
 * kept.h - memory that tensors no longer need, kept for those that come next.
 *
 * Memory that nobody has touched costs more than the bytes that go into it: the kernel zeroes each
 * page, and a host under a virtual machine may have to find it first. So ranges of huge pages are
 * kept when they are given back, as any allocator keeps them, under three rules:
 *
 * Lent        What is kept is the kernel's to take (MADV_FREE): when memory runs short it does so,
 *             before it swaps and before it kills.
 * No more     An allocation that finds nothing fitting first gives back as many bytes of what is
 *             kept as it takes: the process never holds more than it once needed at a time.
 * Private     A child made by fork() finds its copy empty (MADV_WIPEONFORK): it copies no pages.
 *             What was allocated before a fork is not kept: the kernel takes back no page that two
 *             processes have.
 *
 * Any thread may call. Where the table is busy for long, allocations do without it; a child begins
 * with an empty one if another thread of its parent was just there.
 */
#ifndef HOLD_KEPT_H
#define HOLD_KEPT_H

#include "hold.h"

#define HOLD_HUGE ((size_t)2 << 20)

/* How often this process has forked, or was: older memory may be another's, too. */
unsigned hold_kept_forks(void);

/*
 * A kept range of at least `nbytes`, aligned to HOLD_HUGE, with whatever it held; *span is how long
 * it is. NULL: there is none, and as many bytes as asked for have been given back.
 */
void *hold_kept_take(size_t nbytes, size_t *span);

/* Give back at least `nbytes` of what is kept, or all. Returns how many bytes that were. */
size_t hold_kept_give_back(size_t nbytes);

/* Keep a private, anonymous range, aligned to HOLD_HUGE; or unmap it, if that cannot be. */
void hold_kept_put(void *base, size_t span);

#endif
