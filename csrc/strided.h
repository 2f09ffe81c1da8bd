/*
 * strided.h - tensors that do not lie densely in C order, to and from dense bytes.
 *
 * The *image* of such a tensor is its elements in C order without gaps: what a file holds. Both
 * functions move the bytes [begin, end) of the image, which may begin and stop inside an element.
 * `base` is the address of the element with index zero everywhere. The layout has passed
 * hold_layout_check, and end is at most its nbytes. No memory is allocated. Any thread.
 */
#ifndef HOLD_STRIDED_H
#define HOLD_STRIDED_H

#include "hold.h"

/* 0 if the layout is sound and its image has `nbytes` bytes, else -EINVAL. */
int hold_layout_check(const hold_layout *layout, uint64_t nbytes);

/* Copy bytes of the image to `out`. */
void hold_strided_gather(const hold_layout *layout, const void *base, uint64_t begin, uint64_t end,
                         void *out);

/* Copy `in` to bytes of the image. Where the layout swaps, the bytes of `in` are clobbered. */
void hold_strided_scatter(const hold_layout *layout, void *base, uint64_t begin, uint64_t end,
                          void *in);

#endif
