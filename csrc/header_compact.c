#include "header_scan.h"

#include <assert.h>
#include <string.h>

/* The most extents that are read here. */
#define DIMS 8
/* More than a tensor takes behind its name, and than is looked at beyond what is taken. */
#define TAIL 320

/* What precedes the offsets. */
static const char OFFSETS[] = "],\"data_offsets\":[";

/* Whether the `length` bytes at `a` and `b`, 24 to 40, are the same. */
static inline bool same_text(const uint8_t *a, const uint8_t *b, size_t length)
{
    const size_t places[5] = {0, 8, 16, length - 16, length - 8};
    uint64_t differ = 0;

    assert(length >= 24 && length <= 40);
    for (int i = 0; i < 5; i++)
        differ |= hold_json_word(a + places[i]) ^ hold_json_word(b + places[i]);
    return differ == 0;
}

/* The number that 8 digits, less '0', stand for, the first of them lowest. */
static inline uint64_t number_of(uint64_t digits)
{
    digits = ((digits * (1 + (10 << 8))) >> 8) & 0x00FF00FF00FF00FFu;
    digits = ((digits * (1 + (100ull << 16))) >> 16) & 0x0000FFFF0000FFFFu;
    return (digits * (1 + (10000ull << 32))) >> 32;
}

/* Read a number of at most 15 digits. Returns where it ends; NULL where none such stands here. */
static inline const uint8_t *read_number(const uint8_t *at, uint64_t *out)
{
    static const uint32_t powers[8] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000};
    uint64_t value = 0;

    if (at[0] == '0') {
        *out = 0;
        return at + 1; /* a digit here is no bracket or comma: refused by the caller */
    }
    for (int word = 0; word < 2; word++) {
        uint64_t digits = hold_json_word(at) ^ (HOLD_JSON_ONES * '0');
        uint64_t stops = ((digits + HOLD_JSON_ONES * 0x76) | digits) & HOLD_JSON_HIGH;
        unsigned n = hold_json_before(stops);
        at += n;
        if (n < 8) {
            *out = n ? value * powers[n] + number_of(digits << (64 - 8 * n)) : value;
            return n || word ? at : NULL;
        }
        value = number_of(digits);
    }
    return NULL;
}

/* Read a name, the opening quote of which stands at `at`, up to the other. `limit`: see TAIL. */
static inline const uint8_t *read_name(const uint8_t *at, const uint8_t *limit, hold_text *out)
{
    const uint8_t *start = ++at;

    while (at < limit) {
        unsigned run = hold_json_plain(at);
        at += run;
        if (run < 8) {
            *out = (hold_text){start, (size_t)(at - start)};
            bool metadata = out->length == 12 && memcmp(start, "__metadata__", 12) == 0;
            return *at == '"' && !metadata ? at : NULL;
        }
    }
    return NULL;
}

static void make_openings(hold_scan *self)
{
    size_t n = self->types.n < HOLD_SCAN_TYPES ? self->types.n : HOLD_SCAN_TYPES;

    for (size_t type = 0; type < n; type++)
        hold_header_open(&self->types.rows[type], &self->openings[type]);
    self->nopenings = n;
}

/* Move over the opening at `at`, of the type that it names. Returns NULL where none is here. */
static inline const uint8_t *read_opening(hold_scan *self, const uint8_t *at)
{
    size_t type = self->opened;

    /* Most tensors have the type of the one before. */
    for (size_t tried = 0; tried < self->nopenings; tried++) {
        const hold_header_opening *opening = &self->openings[type];
        /* The tag is what they differ in. */
        if (opening->length && hold_json_word(at + 12) == hold_json_word(opening->text + 12) &&
            same_text(at, opening->text, opening->length)) {
            self->opened = type;
            return at + opening->length;
        }
        type = type + 1 == self->nopenings ? 0 : type + 1;
    }
    return NULL;
}

/* Read the extents up to the bracket that ends them, and what they make times the bits. */
static inline const uint8_t *read_shape(hold_scan *self, const uint8_t *at, uint64_t *bits)
{
    hold_header *out = self->out;
    int64_t *dims = out->dims + out->ndims;
    size_t ndim = 0;
    bool beyond = false;

    *bits = 1;
    while (*at != ']') {
        uint64_t extent;
        at = read_number(at, &extent);
        if (at == NULL || ndim == DIMS)
            return NULL;
        dims[ndim++] = (int64_t)extent;
        beyond |= __builtin_mul_overflow(*bits, extent, bits);
        if (*at == ',' && at[1] != ']')
            at++;
        else if (*at != ']')
            return NULL;
    }
    self->tensor.ndim = ndim;
    beyond |= __builtin_mul_overflow(*bits, (uint64_t)self->types.rows[self->opened].bits, bits);
    return beyond || *bits % 8 ? NULL : at;
}

/* Read a tensor's object from the quote that ends its name. Returns where it ends, or NULL. */
static inline const uint8_t *read_object(hold_scan *self, const uint8_t *at)
{
    uint64_t bits, begin, end;

    at = read_opening(self, at);
    if (at == NULL || self->types.rows[self->opened].pack > 1)
        return NULL;
    at = read_shape(self, at, &bits);
    if (at == NULL || memcmp(at, OFFSETS, sizeof OFFSETS - 1) != 0)
        return NULL;
    at = read_number(at + sizeof OFFSETS - 1, &begin);
    if (at == NULL || *at != ',')
        return NULL;
    at = read_number(at + 1, &end);
    if (at == NULL || at[0] != ']' || at[1] != '}' || end < begin || end - begin != bits / 8)
        return NULL;
    self->tensor.begin = begin;
    self->tensor.end = end;
    return at + 2;
}

int hold_scan_compact(hold_scan *self)
{
    hold_header *out = self->out;
    const uint8_t *at = self->json.at;

    if (self->json.end - at <= TAIL || *at != '"')
        return HOLD_JSON_OK;
    const uint8_t *limit = self->json.end - TAIL;
    if (self->nopenings == 0)
        make_openings(self);
    while (at < limit) {
        int code = hold_scan_room(self);
        if (code)
            return code;
        const uint8_t *end = read_name(at, limit, &out->names[out->nnames]);
        end = end ? read_object(self, end) : NULL;
        if (end == NULL)
            break;
        out->entries[out->n++] = (hold_header_entry){
            .offset = self->tensor.begin + self->nbytes,
            .nbytes = self->tensor.end - self->tensor.begin,
            .dims = (int64_t)out->ndims,
            .dtype = (int16_t)self->opened,
            .ndim = (int16_t)self->tensor.ndim,
        };
        out->nnames++;
        out->ndims += self->tensor.ndim;
        if (self->tensor.end > out->nbytes)
            out->nbytes = self->tensor.end;
        self->tensor.type = self->opened;
        self->json.at = end;
        if (end[0] != ',' || end[1] != '"')
            break;
        at = end + 1;
    }
    return HOLD_JSON_OK;
}
