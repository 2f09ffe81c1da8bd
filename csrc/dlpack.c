#include "dlpack.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* One tensor of a block. `managed` comes first: its address is that of the row. */
typedef struct dl_row {
    hold_dl_managed managed;
    hold_buffer *buffer; /* NULL once deleted */
} dl_row;

struct hold_dl_block {
    atomic_size_t shares; /* the maker's, and one for each tensor that lives or has yet to come */
    size_t room, used;
    int64_t *free_dims; /* where the extents of the next tensor go */
    dl_row rows[];
};

bool hold_dl_measure(const hold_dl_tensor *tensor, int64_t itemsize, int64_t *dims,
                     int64_t *strides, uint64_t *nbytes)
{
    bool dense = true;
    bool empty = false;
    bool huge = false;
    int64_t count = 1;
    for (int32_t axis = tensor->ndim - 1; axis >= 0; axis--) {
        int64_t extent = tensor->shape[axis];
        dense = dense && (extent == 1 || tensor->strides == NULL || tensor->strides[axis] == count);
        dims[axis] = extent;
        strides[axis] = (tensor->strides == NULL ? count : tensor->strides[axis]) * itemsize;
        empty = empty || extent == 0;
        huge = huge || __builtin_mul_overflow(count, extent > 0 ? extent : 1, &count);
    }
    huge = huge || __builtin_mul_overflow(count, itemsize, &count);
    *nbytes = empty ? 0 : huge ? UINT64_MAX : (uint64_t)count;
    return dense || empty;
}

hold_dl_block *hold_dl_block_new(size_t tensors, size_t dims)
{
    /* Callers pass the sizes of arrays that exist, so that neither product can wrap. */
    size_t head = sizeof(hold_dl_block) + tensors * sizeof(dl_row);
    hold_dl_block *block = malloc(head + dims * sizeof(int64_t));
    if (block == NULL)
        return NULL;
    atomic_init(&block->shares, tensors + 1);
    block->room = tensors;
    block->used = 0;
    block->free_dims = (int64_t *)(void *)((char *)block + head);
    return block;
}

static void drop_shares(hold_dl_block *block, size_t n)
{
    if (atomic_fetch_sub_explicit(&block->shares, n, memory_order_acq_rel) == n)
        free(block);
}

void hold_dl_block_close(hold_dl_block *block)
{
    drop_shares(block, 1 + block->room - block->used);
}

static void row_delete(hold_dl_managed *managed)
{
    dl_row *row = (dl_row *)(void *)managed;
    hold_buffer *buffer = row->buffer;
    assert(buffer != NULL);
    row->buffer = NULL;
    hold_buffer_release(buffer);
    drop_shares(managed->manager_ctx, 1);
}

hold_dl_managed *hold_dl_block_add(hold_dl_block *block, hold_buffer *buffer, void *data,
                                   hold_dl_device device, hold_dl_dtype dtype, int32_t ndim,
                                   const int64_t *shape)
{
    dl_row *row = &block->rows[block->used++];
    int64_t *dims = block->free_dims;
    block->free_dims = dims + ndim;
    for (int32_t axis = 0; axis < ndim; axis++)
        dims[axis] = shape[axis];
    *row = (dl_row){
        .managed = {
            .version = {HOLD_DLPACK_MAJOR, 0},
            .manager_ctx = block,
            .deleter = row_delete,
            .tensor = {
                .data = data,
                .device = device,
                .ndim = ndim,
                .dtype = dtype,
                .shape = dims,
                .strides = NULL, /* dense; to DLPack 1.2 and newer that has to be spelt out */
            },
        },
        .buffer = buffer,
    };
    hold_buffer_retain(buffer);
    return &row->managed;
}

void hold_dl_block_undo(hold_dl_block *block)
{
    dl_row *row = &block->rows[block->used - 1];
    if (row->buffer != NULL)
        row_delete(&row->managed);
}
