#include "header_scan.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "header_memory.h"
#include "hold.h"

/* Keys of a tensor's object. */
enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };

/* Record what is wrong at `at`. Returns the code; 0 passes through. */
static int fault_at(hold_scan *self, int code, const uint8_t *at)
{
    if (code && !self->fault->code) {
        self->fault->code = code;
        self->fault->position = (uint64_t)(at - self->bytes);
    }
    return code;
}

/* As fault_at, at the cursor. */
static int fault_here(hold_scan *self, int code)
{
    return fault_at(self, code, self->json.at);
}

/*
 * How many tensors the rest of the header has, about: as many as there would be if all took the
 * bytes of those in the middle. In proportion to the bytes, whatever these are.
 */
static size_t guess_tensors(const hold_scan *self)
{
    size_t left = (size_t)(self->json.end - self->json.at), most = left / 32 + 8, n = 0;
    const uint8_t *start = self->json.at + left / 2, *at = start;
    size_t sample = left / 2 < 4096 ? left / 2 : 4096;

    while (sample && (at = memchr(at, '}', (size_t)(start + sample - at))) != NULL) {
        n++;
        at++;
    }
    size_t guess = sample ? left / sample * n : 0;
    guess += guess / 32 + 8;
    return guess < most ? guess : most;
}

/* Let *array have room for `more` elements of `size` bytes than *room. Returns 0 or the code. */
static int grow(hold_scan *self, void *array, size_t *room, size_t more, size_t size)
{
    void *old, *grown;

    memcpy(&old, array, sizeof old);
    grown = hold_grow_block(old, (*room + more) * size);
    if (grown == NULL)
        return fault_here(self, HOLD_HEADER_NOMEM);
    memcpy(array, &grown, sizeof grown);
    *room += more;
    return HOLD_JSON_OK;
}

int hold_scan_grow(hold_scan *self)
{
    hold_header *out = self->out;
    int code = HOLD_JSON_OK;

    /* A first guess that is right for most; what it lacks is doubled. */
    if (out->nnames == out->names_room) {
        size_t more = out->nnames ? out->nnames : guess_tensors(self);
        code = grow(self, &out->names, &out->names_room, more, sizeof *out->names);
        if (!code)
            code = grow(self, &out->entries, &out->entries_room, more, sizeof *out->entries);
    }
    if (!code && out->dims_room - out->ndims < HOLD_MAX_NDIM) {
        size_t more = (out->ndims ? out->ndims : out->names_room) + HOLD_MAX_NDIM;
        code = grow(self, &out->dims, &out->dims_room, more, sizeof *out->dims);
    }
    return code;
}

static int scan_dtype(hold_scan *self)
{
    const uint8_t *start = self->json.at;
    hold_json_span span;
    uint8_t plain[64];
    int code = fault_here(self, hold_json_string(&self->json, &span));

    if (code)
        return code;
    if (span.escaped && span.length <= sizeof plain)
        span = (hold_json_span){plain, hold_json_unescape(&span, plain), false};
    /* Most tensors have the type of the one before. */
    size_t type = self->tensor.type;
    for (size_t tried = 0; tried < self->types.n; tried++) {
        const hold_text *tag = &self->types.rows[type].tag;
        if (tag->data && tag->length == span.length &&
            memcmp(tag->data, span.data, span.length) == 0) {
            self->tensor.type = type;
            return HOLD_JSON_OK;
        }
        type = type + 1 == self->types.n ? 0 : type + 1;
    }
    return fault_at(self, HOLD_HEADER_TAG, start);
}

static int scan_shape(hold_scan *self)
{
    hold_header *out = self->out;
    bool first = true, done;
    int code = fault_here(self, hold_json_byte(&self->json, '[', HOLD_JSON_ARRAY));

    self->tensor.dims = out->ndims;
    while (!code) {
        uint64_t extent;
        code = fault_here(self, hold_json_next(&self->json, ']', &first, &done));
        if (code || done)
            break;
        if (out->ndims - self->tensor.dims == HOLD_MAX_NDIM)
            return fault_here(self, HOLD_HEADER_NDIM);
        code = fault_here(self, hold_json_integer(&self->json, &extent));
        if (!code)
            out->dims[out->ndims++] = (int64_t)extent;
    }
    self->tensor.ndim = out->ndims - self->tensor.dims;
    return code;
}

static int scan_offsets(hold_scan *self)
{
    uint64_t values[2] = {0, 0};
    size_t n = 0;
    bool first = true, done;
    const uint8_t *start = self->json.at;
    int code = fault_here(self, hold_json_byte(&self->json, '[', HOLD_JSON_ARRAY));

    while (!code) {
        code = fault_here(self, hold_json_next(&self->json, ']', &first, &done));
        if (code || done)
            break;
        if (n == 2)
            return fault_at(self, HOLD_HEADER_PAIR, start);
        code = fault_here(self, hold_json_integer(&self->json, &values[n++]));
    }
    if (code)
        return code;
    if (n != 2)
        return fault_at(self, HOLD_HEADER_PAIR, start);
    self->tensor.begin = values[0];
    self->tensor.end = values[1];
    return HOLD_JSON_OK;
}

/* Move over `text`, if that is what stands at the cursor. */
static inline bool skip_text(hold_scan *self, const char *text, size_t length)
{
    if ((size_t)(self->json.end - self->json.at) < length ||
        memcmp(self->json.at, text, length) != 0)
        return false;
    self->json.at += length;
    return true;
}

/* Read the key of a tensor's object; *seen is 0 where it is none of those known. */
static int scan_key(hold_scan *self, unsigned *seen)
{
    hold_json_span key;

    *seen = 0;
    /* As every writer puts them. */
    if (skip_text(self, "\"dtype\":", 8))
        *seen = DTYPE;
    else if (skip_text(self, "\"shape\":", 8))
        *seen = SHAPE;
    else if (skip_text(self, "\"data_offsets\":", 15))
        *seen = OFFSETS;
    if (*seen) {
        hold_json_space(&self->json);
        return HOLD_JSON_OK;
    }
    int code = fault_here(self, hold_json_key(&self->json, &key));
    if (code)
        return code;
    if (hold_json_equals(&key, "dtype", 5))
        *seen = DTYPE;
    else if (hold_json_equals(&key, "shape", 5))
        *seen = SHAPE;
    else if (hold_json_equals(&key, "data_offsets", 12))
        *seen = OFFSETS;
    return HOLD_JSON_OK;
}

/* One `key: value` of a tensor's object. */
static int scan_member(hold_scan *self)
{
    const uint8_t *start = self->json.at;
    unsigned seen;
    int code = scan_key(self, &seen);

    if (code)
        return code;
    if (self->tensor.seen & seen)
        return fault_at(self, HOLD_HEADER_REPEATED, start);
    self->tensor.seen |= seen;
    switch (seen) {
    case DTYPE:
        return scan_dtype(self);
    case SHAPE:
        return scan_shape(self);
    case OFFSETS:
        return scan_offsets(self);
    default:
        return fault_here(self, hold_json_skip(&self->json));
    }
}

/* As fault_at, about the tensor whose object was read. */
static int fault_tensor(hold_scan *self, int code, const uint8_t *at)
{
    const hold_scan_tensor *t = &self->tensor;
    hold_header_fault *fault = self->fault;

    fault->type = (int32_t)t->type;
    fault->begin = t->begin;
    fault->end = t->end;
    fault->dims = t->dims;
    fault->ndim = t->ndim;
    return fault_at(self, code, at);
}

/* Check the tensor whose object was read. `at` is where that begins. */
static int check_tensor(hold_scan *self, const uint8_t *at, uint64_t *nbytes)
{
    const hold_scan_tensor *t = &self->tensor;
    const hold_header_type *type = &self->types.rows[t->type];
    int64_t *dims = self->out->dims + t->dims;

    if (!(t->seen & DTYPE))
        return fault_at(self, HOLD_HEADER_NO_DTYPE, at);
    if (!(t->seen & SHAPE))
        return fault_at(self, HOLD_HEADER_NO_SHAPE, at);
    if (!(t->seen & OFFSETS))
        return fault_at(self, HOLD_HEADER_NO_OFFSETS, at);
    if (t->end < t->begin)
        return fault_tensor(self, HOLD_HEADER_BACKWARD, at);
    int code = hold_header_nbytes(type, dims, t->ndim, nbytes);
    if (code)
        return fault_tensor(self, code, at);
    if (*nbytes != t->end - t->begin) {
        self->fault->expected = *nbytes;
        self->fault->found = t->end - t->begin;
        return fault_tensor(self, HOLD_HEADER_SPAN, at);
    }
    if (type->pack > 1) {
        if (t->ndim == 0 || dims[t->ndim - 1] % type->pack)
            return fault_tensor(self, HOLD_HEADER_ODD, at);
        dims[t->ndim - 1] /= type->pack;
    }
    return HOLD_JSON_OK;
}

/* Append the row of the tensor whose object was read. */
static int keep_tensor(hold_scan *self, const uint8_t *at)
{
    const hold_scan_tensor *t = &self->tensor;
    hold_header *out = self->out;
    uint64_t nbytes;
    int code = check_tensor(self, at, &nbytes);

    if (code)
        return code;
    out->entries[out->n++] = (hold_header_entry){
        .offset = t->begin + self->nbytes,
        .nbytes = nbytes,
        .dims = (int64_t)t->dims,
        .dtype = (int16_t)t->type,
        .ndim = (int16_t)t->ndim,
    };
    if (t->end > out->nbytes)
        out->nbytes = t->end;
    return HOLD_JSON_OK;
}

/* Keep the name of the next tensor, without its escapes. */
static int keep_name(hold_scan *self, const hold_json_span *span)
{
    hold_header *out = self->out;
    hold_text text = {span->data, span->length};
    int code = hold_scan_room(self);

    if (code)
        return code;
    if (span->escaped) {
        if (out->arena == NULL) {
            /* Enough for all that may follow; names that point here keep it from moving. */
            out->arena_room = self->nbytes - (size_t)(span->data - self->bytes);
            out->arena = malloc(out->arena_room);
            if (out->arena == NULL)
                return fault_here(self, HOLD_HEADER_NOMEM);
        }
        assert(span->length <= out->arena_room - out->arena_used);
        text.data = out->arena + out->arena_used;
        text.length = hold_json_unescape(span, out->arena + out->arena_used);
        out->arena_used += text.length;
    }
    out->names[out->nnames++] = text;
    return HOLD_JSON_OK;
}

static int scan_tensor(hold_scan *self, const hold_json_span *name)
{
    hold_header *out = self->out;
    const uint8_t *start = self->json.at;
    bool first = true, done;
    size_t type = self->tensor.type;
    int code = keep_name(self, name);

    if (code)
        return code;
    self->fault->entry = (int64_t)out->n;
    self->tensor = (hold_scan_tensor){.type = type};
    code = fault_here(self, hold_json_byte(&self->json, '{', HOLD_JSON_OBJECT));
    while (!code) {
        code = fault_here(self, hold_json_next(&self->json, '}', &first, &done));
        if (code || done)
            break;
        code = scan_member(self);
    }
    if (!code)
        code = keep_tensor(self, start);
    if (!code)
        self->fault->entry = -1;
    return code;
}

static int scan_metadata(hold_scan *self, const uint8_t *start)
{
    hold_header *out = self->out;
    bool first = true, done;

    if (self->has_metadata)
        return fault_at(self, HOLD_HEADER_METADATA, start);
    self->has_metadata = true;
    int code = fault_here(self, hold_json_byte(&self->json, '{', HOLD_JSON_OBJECT));
    while (!code) {
        hold_header_pair pair;
        code = fault_here(self, hold_json_next(&self->json, '}', &first, &done));
        if (code || done)
            break;
        code = fault_here(self, hold_json_key(&self->json, &pair.key));
        if (!code)
            code = fault_here(self, hold_json_string(&self->json, &pair.value));
        if (!code && out->npairs == out->pairs_room)
            code = grow(self, &out->pairs, &out->pairs_room, out->npairs + 8, sizeof pair);
        if (!code)
            out->pairs[out->npairs++] = pair;
    }
    return code;
}

static int scan_object(hold_scan *self)
{
    bool first = true, done;

    hold_json_space(&self->json);
    int code = fault_here(self, hold_json_byte(&self->json, '{', HOLD_JSON_OBJECT));
    while (!code) {
        hold_json_span key;
        const uint8_t *start;
        code = fault_here(self, hold_json_next(&self->json, '}', &first, &done));
        if (code || done)
            break;
        start = self->json.at;
        code = hold_scan_compact(self);
        if (code || self->json.at != start)
            continue;
        code = fault_here(self, hold_json_key(&self->json, &key));
        if (code)
            break;
        if (hold_json_equals(&key, "__metadata__", 12))
            code = scan_metadata(self, start);
        else
            code = scan_tensor(self, &key);
    }
    if (code)
        return code;
    hold_json_space(&self->json);
    if (self->json.at < self->json.end)
        return fault_here(self, HOLD_HEADER_TRAILING);
    return HOLD_JSON_OK;
}

/* What the entries have to satisfy together. */
static int check_entries(hold_scan *self, const uint64_t key[2])
{
    hold_header *out = self->out;
    hold_header_fault *fault = self->fault;
    size_t duplicate = 0;
    int rc = hold_names_build(&out->index, out->names, out->n, key, &duplicate);

    if (rc == -EEXIST) {
        fault->code = HOLD_HEADER_DUPLICATE;
        fault->entry = (int64_t)duplicate;
    } else if (rc) {
        fault->code = HOLD_HEADER_NOMEM;
    } else {
        hold_header_tile(out, self->nbytes, fault);
    }
    return fault->code;
}

int hold_header_scan(const uint8_t *bytes, size_t nbytes, hold_header_types types,
                     const uint64_t key[2], hold_header *out, hold_header_fault *fault)
{
    assert(nbytes >= HOLD_HEADER_PREFIX && types.n > 0);
    *fault = (hold_header_fault){.entry = -1};
    *out = (hold_header){0};
    hold_scan self = {.json = {bytes + HOLD_HEADER_PREFIX, bytes + nbytes},
                 .bytes = bytes,
                 .nbytes = nbytes,
                 .types = types,
                 .out = out,
                 .fault = fault};
    int code = scan_object(&self);

    return code ? code : check_entries(&self, key);
}

void hold_header_free(hold_header *self)
{
    hold_names_free(&self->index);
    free(self->entries);
    free(self->names);
    free(self->dims);
    free(self->pairs);
    free(self->arena);
    *self = (hold_header){0};
}
