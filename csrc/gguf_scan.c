/* The pairs and tensor infos of a GGUF file. */
#include "gguf.h"

#include <stdbool.h>

/* Bytes of a value by its type; 0 for those that say it themselves. */
static const uint8_t widths[HOLD_GGUF_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static inline uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t load64(const uint8_t *p)
{
    return load32(p) | (uint64_t)load32(p + 4) << 32;
}

static int fail(hold_gguf_fault *fault, int code, uint64_t position, uint64_t expected,
                uint64_t found)
{
    fault->code = code;
    fault->position = position;
    fault->expected = expected;
    fault->found = found;
    return code;
}

/* 0 if `count` items of `width` bytes each are there, which is at most 2^30 items of 24. */
static int want(const hold_gguf_bytes *bytes, uint64_t count, uint64_t width,
                hold_gguf_fault *fault)
{
    uint64_t nbytes = count * width;
    if (nbytes <= bytes->nbytes - bytes->at)
        return 0;
    return fail(fault, HOLD_GGUF_END, bytes->at, bytes->at + nbytes, 0);
}

static int take32(hold_gguf_bytes *bytes, uint32_t *out, hold_gguf_fault *fault)
{
    int rc = want(bytes, 1, 4, fault);
    if (rc == 0) {
        *out = load32(bytes->data + bytes->at);
        bytes->at += 4;
    }
    return rc;
}

static int take64(hold_gguf_bytes *bytes, uint64_t *out, hold_gguf_fault *fault)
{
    int rc = want(bytes, 1, 8, fault);
    if (rc == 0) {
        *out = load64(bytes->data + bytes->at);
        bytes->at += 8;
    }
    return rc;
}

/* A length in front of that many items of at least `width` bytes, all of which are there. */
static int take_count(hold_gguf_bytes *bytes, uint64_t width, uint64_t *out,
                      hold_gguf_fault *fault)
{
    uint64_t position = bytes->at;
    int rc = take64(bytes, out, fault);
    if (rc == 0 && *out > HOLD_GGUF_MAX_COUNT)
        rc = fail(fault, HOLD_GGUF_COUNT, position, HOLD_GGUF_MAX_COUNT, *out);
    return rc ? rc : want(bytes, *out, width, fault);
}

static int take_string(hold_gguf_bytes *bytes, uint64_t *start, uint64_t *length,
                       hold_gguf_fault *fault)
{
    int rc = take_count(bytes, 1, length, fault);
    if (rc == 0) {
        *start = bytes->at;
        bytes->at += *length;
    }
    return rc;
}

/* Scalars of one type, end to end. */
static int take_scalars(hold_gguf_bytes *bytes, int32_t kind, uint64_t count,
                        hold_gguf_fault *fault)
{
    uint64_t width = widths[kind];
    int rc = want(bytes, count, width, fault);
    if (rc)
        return rc;
    if (kind == HOLD_GGUF_BOOL)
        for (uint64_t i = 0; i < count; i++)
            if (bytes->data[bytes->at + i] > 1)
                return fail(fault, HOLD_GGUF_TRUTH, bytes->at + i, 1, bytes->data[bytes->at + i]);
    bytes->at += count * width;
    return 0;
}

static int take_array(hold_gguf_bytes *bytes, hold_gguf_pair *row, hold_gguf_fault *fault)
{
    uint64_t position = bytes->at, start, length;
    uint32_t kind = 0;
    int rc = take32(bytes, &kind, fault);
    if (rc)
        return rc;
    if (kind == HOLD_GGUF_ARRAY)
        return fail(fault, HOLD_GGUF_NESTED, position, 0, kind);
    if (kind >= HOLD_GGUF_KINDS)
        return fail(fault, HOLD_GGUF_KIND, position, 0, kind);
    row->element = (int32_t)kind;
    rc = take_count(bytes, kind == HOLD_GGUF_STRING ? 8 : widths[kind], &row->count, fault);
    if (rc)
        return rc;
    row->value = bytes->at;
    if (kind != HOLD_GGUF_STRING)
        return take_scalars(bytes, row->element, row->count, fault);
    for (uint64_t i = 0; i < row->count && rc == 0; i++)
        rc = take_string(bytes, &start, &length, fault);
    return rc;
}

static int take_pair(hold_gguf_bytes *bytes, hold_gguf_pair *row, hold_gguf_fault *fault)
{
    uint64_t position = bytes->at;
    uint32_t kind = 0;
    *row = (hold_gguf_pair){.count = 1, .element = -1};
    int rc = take_string(bytes, &row->key, &row->key_length, fault);
    if (rc == 0 && row->key_length == 0)
        rc = fail(fault, HOLD_GGUF_KEY, position, 1, 0);
    if (rc)
        return rc;
    position = bytes->at;
    rc = take32(bytes, &kind, fault);
    if (rc)
        return rc;
    if (kind >= HOLD_GGUF_KINDS)
        return fail(fault, HOLD_GGUF_KIND, position, 0, kind);
    row->kind = (int32_t)kind;
    if (kind == HOLD_GGUF_ARRAY) {
        rc = take_array(bytes, row, fault);
    } else if (kind == HOLD_GGUF_STRING) {
        rc = take_string(bytes, &row->value, &row->count, fault);
    } else {
        row->value = bytes->at;
        rc = take_scalars(bytes, row->kind, 1, fault);
    }
    row->nbytes = bytes->at - row->value;
    return rc;
}

int hold_gguf_pairs(hold_gguf_bytes *bytes, hold_gguf_pair *rows, uint64_t n,
                    hold_gguf_fault *fault)
{
    *fault = (hold_gguf_fault){0};
    for (uint64_t i = 0; i < n; i++) {
        fault->row = i;
        int rc = take_pair(bytes, &rows[i], fault);
        if (rc)
            return rc;
    }
    return 0;
}

static int take_tensor(hold_gguf_bytes *bytes, hold_gguf_tensor *row, hold_gguf_fault *fault)
{
    uint64_t position = bytes->at, length = 0, extent = 0;
    uint32_t type = 0;
    *row = (hold_gguf_tensor){0};
    int rc = take64(bytes, &length, fault);
    if (rc == 0 && length > HOLD_GGUF_MAX_NAME)
        rc = fail(fault, HOLD_GGUF_NAME, position, HOLD_GGUF_MAX_NAME, length);
    if (rc == 0)
        rc = want(bytes, length, 1, fault);
    if (rc)
        return rc;
    row->name = bytes->at;
    row->name_length = (uint32_t)length;
    position = bytes->at += length;
    rc = take32(bytes, &row->ndim, fault);
    if (rc == 0 && row->ndim > HOLD_GGUF_MAX_DIMS)
        rc = fail(fault, HOLD_GGUF_NDIM, position, HOLD_GGUF_MAX_DIMS, row->ndim);
    for (int i = 0; i < HOLD_GGUF_MAX_DIMS; i++)
        row->extents[i] = 1;
    for (uint32_t i = 0; rc == 0 && i < row->ndim; i++) {
        position = bytes->at;
        rc = take64(bytes, &extent, fault);
        if (rc == 0 && extent > INT64_MAX)
            rc = fail(fault, HOLD_GGUF_EXTENT, position, 0, extent);
        row->extents[i] = (int64_t)extent;
    }
    if (rc == 0)
        rc = take32(bytes, &type, fault);
    row->type = (int32_t)type;
    return rc ? rc : take64(bytes, &row->offset, fault);
}

int hold_gguf_tensors(hold_gguf_bytes *bytes, hold_gguf_tensor *rows, uint64_t n,
                      hold_gguf_fault *fault)
{
    *fault = (hold_gguf_fault){0};
    for (uint64_t i = 0; i < n; i++) {
        fault->row = i;
        int rc = take_tensor(bytes, &rows[i], fault);
        if (rc)
            return rc;
    }
    return 0;
}

/* Bytes of a tensor. An extent of 0 does not make the others possible. */
static int measure(hold_gguf_tensor *row, const hold_gguf_type *type, hold_gguf_fault *fault)
{
    int64_t most = 1, nbytes;
    bool empty = false;
    for (int i = 0; i < HOLD_GGUF_MAX_DIMS; i++) {
        empty |= row->extents[i] == 0;
        if (row->extents[i] && __builtin_mul_overflow(most, row->extents[i], &most))
            return fail(fault, HOLD_GGUF_OVERFLOW, 0, 0, 0);
    }
    if (row->extents[0] % type->elements)
        return fail(fault, HOLD_GGUF_ROW, 0, type->elements, (uint64_t)row->extents[0]);
    if (__builtin_mul_overflow(most / type->elements, (int64_t)type->nbytes, &nbytes))
        return fail(fault, HOLD_GGUF_OVERFLOW, 0, 0, 0);
    row->nbytes = empty ? 0 : (uint64_t)nbytes;
    row->dtype = type->dtype;
    return 0;
}

/* Extents in memory, the last of which is that along which elements are adjacent. */
static uint64_t shape(const hold_gguf_tensor *row, const hold_gguf_type *type, int64_t *dims)
{
    uint64_t n = 0;
    for (uint32_t i = row->ndim; i-- > 0;)
        dims[n++] = i == 0 ? row->extents[0] / type->elements : row->extents[i];
    if (type->raw)
        dims[n++] = type->nbytes;
    return n;
}

/* The next multiple of `alignment`, a power of two; false where there is none in 64 bits. */
static bool align(uint64_t at, uint64_t alignment, uint64_t *out)
{
    if (__builtin_add_overflow(at, alignment - 1, out))
        return false;
    *out &= ~(alignment - 1);
    return true;
}

/* 0 if the tensor stands at `expected` and ends within the file; its offset is made absolute. */
static int place(hold_gguf_tensor *row, const hold_gguf_data *data, uint64_t expected,
                 hold_gguf_fault *fault)
{
    uint64_t end;
    if (row->offset & (data->alignment - 1))
        return fail(fault, HOLD_GGUF_UNALIGNED, 0, data->alignment, row->offset);
    if (row->offset != expected)
        return fail(fault, HOLD_GGUF_TILING, 0, expected, row->offset);
    if (__builtin_add_overflow(row->offset, data->start, &row->offset) ||
        __builtin_add_overflow(row->offset, row->nbytes, &end) || end > INT64_MAX)
        return fail(fault, HOLD_GGUF_OVERFLOW, 0, 0, 0);
    if (data->size >= 0 && end > (uint64_t)data->size)
        return fail(fault, HOLD_GGUF_SHORT, row->offset, end, (uint64_t)data->size);
    return 0;
}

int hold_gguf_lay(hold_gguf_tensor *rows, uint64_t n, const hold_gguf_type *types, uint64_t ntypes,
                  const hold_gguf_data *data, int64_t *dims, uint64_t *ndims,
                  hold_gguf_fault *fault)
{
    uint64_t end = 0, expected = 0;
    *fault = (hold_gguf_fault){0};
    *ndims = 0;
    for (uint64_t i = 0; i < n; i++) {
        hold_gguf_tensor *row = &rows[i];
        fault->row = i;
        if (row->type < 0 || (uint64_t)row->type >= ntypes || types[row->type].elements == 0)
            return fail(fault, HOLD_GGUF_TYPE, 0, 0, (uint32_t)row->type);
        const hold_gguf_type *type = &types[row->type];
        int rc = measure(row, type, fault);
        if (rc)
            return rc;
        if (!align(end, data->alignment, &expected))
            return fail(fault, HOLD_GGUF_OVERFLOW, 0, 0, 0);
        rc = place(row, data, expected, fault);
        if (rc)
            return rc;
        end = expected + row->nbytes; /* place() has seen that it is less than 2^63 */
        row->dims = (int64_t)*ndims;
        row->shape_ndim = shape(row, type, dims + *ndims);
        *ndims += row->shape_ndim;
    }
    return 0;
}

int hold_gguf_strings(hold_gguf_bytes *bytes, uint64_t *starts, uint64_t *lengths, uint64_t n,
                      hold_gguf_fault *fault)
{
    *fault = (hold_gguf_fault){0};
    for (uint64_t i = 0; i < n; i++) {
        fault->row = i;
        int rc = take_string(bytes, &starts[i], &lengths[i], fault);
        if (rc)
            return rc;
    }
    return 0;
}
