/*
 * dlpack.h - tensors described and handed out as DLPack structures, many at a time.
 */
#ifndef HOLD_DLPACK_H
#define HOLD_DLPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dlpack_abi.h"
#include "hold.h"

/*
 * Copy the extents and, in bytes, the strides of a tensor whose elements have `itemsize` bytes to
 * dims[0 .. ndim) and strides[0 .. ndim). *nbytes is what it occupies when dense
 * (UINT64_MAX where that has no 64-bit number, as an expanded tensor can manage).
 * Returns whether its elements lie densely in C order (a tensor without elements does).
 */
bool hold_dl_measure(const hold_dl_tensor *tensor, int64_t itemsize, int64_t *dims,
                     int64_t *strides, uint64_t *nbytes);

/*
 * Room for the structures of many tensors in one allocation, which is given back when the maker
 * and all the tensors in it have let go. Made and filled by one thread; the tensors may be
 * deleted from any thread at any time, without the GIL.
 */
typedef struct hold_dl_block hold_dl_block;

/* A block for `tensors` tensors with `dims` extents in all. The maker has a share of it. NULL:
 * out of memory. */
hold_dl_block *hold_dl_block_new(size_t tensors, size_t dims);

/*
 * The next tensor of the block: dense, `ndim` extents copied from `shape`, its first element at
 * `data`, which lies in `buffer`, in the memory of `device`. It retains `buffer` until its deleter
 * is called. There must be room for it.
 */
hold_dl_managed *hold_dl_block_add(hold_dl_block *block, hold_buffer *buffer, void *data,
                                   hold_dl_device device, hold_dl_dtype dtype, int32_t ndim,
                                   const int64_t *shape);

/*
 * Take back the tensor last added, after a framework refused it: calls its deleter unless the
 * framework has done so already.
 */
void hold_dl_block_undo(hold_dl_block *block);

/* Give up the maker's share. */
void hold_dl_block_close(hold_dl_block *block);

#endif
