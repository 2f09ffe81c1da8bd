/* The arithmetic that a header has to satisfy: sizes of tensors, and that they tile the data. */
#include "header.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* One for each power of two that sizes are sorted by, and some. */
#define CHAINS 16
#define DIGIT_BITS 11
#define DIGIT_VALUES (1u << DIGIT_BITS)

int hold_header_nbytes(const hold_header_type *type, const int64_t *dims, size_t ndim,
                       uint64_t *out)
{
    uint64_t count = 1;

    for (size_t i = 0; i < ndim; i++) {
        assert(dims[i] >= 0);
        if (__builtin_mul_overflow(count, (uint64_t)dims[i], &count))
            return HOLD_HEADER_OVERFLOW;
    }
    if (__builtin_mul_overflow(count, (uint64_t)type->bits, &count))
        return HOLD_HEADER_OVERFLOW;
    if (count % 8)
        return HOLD_HEADER_BITS;
    *out = count / 8;
    return HOLD_JSON_OK;
}

void hold_header_open(const hold_header_type *type, hold_header_opening *out)
{
    static const char before[] = "\":{\"dtype\":\"", after[] = "\",\"shape\":[";
    size_t length = type->tag.length;

    out->length = 0;
    if (type->tag.data == NULL || length == 0 || length > 16)
        return;
    memcpy(out->text, before, sizeof before - 1);
    memcpy(out->text + sizeof before - 1, type->tag.data, length);
    memcpy(out->text + sizeof before - 1 + length, after, sizeof after - 1);
    out->length = (uint8_t)(sizeof before - 1 + length + sizeof after - 1);
    assert(out->length <= sizeof out->text);
}

/* A tensor, as the sorting sees it. */
typedef struct hold_span {
    uint64_t begin;
    uint64_t entry;
} hold_span;

/* Stable sort by the digit at `shift`; `from` to `to`. Returns false where all share the digit. */
static bool sort_digit(const hold_span *from, hold_span *to, size_t n, unsigned shift)
{
    size_t starts[DIGIT_VALUES] = {0};
    size_t start = 0;

    for (size_t i = 0; i < n; i++)
        starts[(from[i].begin >> shift) % DIGIT_VALUES]++;
    if (starts[(from[0].begin >> shift) % DIGIT_VALUES] == n)
        return false;
    for (size_t digit = 0; digit < DIGIT_VALUES; digit++) {
        size_t count = starts[digit];
        starts[digit] = start;
        start += count;
    }
    for (size_t i = 0; i < n; i++)
        to[starts[(from[i].begin >> shift) % DIGIT_VALUES]++] = from[i];
    return true;
}

/* Radix sort by `begin`, stable. Returns which of the two arrays holds the result. */
static hold_span *sort_spans(hold_span *spans, hold_span *scratch, size_t n)
{
    uint64_t largest = 0;

    for (size_t i = 0; i < n; i++)
        if (spans[i].begin > largest)
            largest = spans[i].begin;
    for (unsigned shift = 0; shift < 64 && largest >> shift; shift += DIGIT_BITS) {
        if (sort_digit(spans, scratch, n, shift)) {
            hold_span *swap = spans;
            spans = scratch;
            scratch = swap;
        }
    }
    return spans;
}

/* Tensors that lie end to end, in the order of the header, though others stand between them. */
typedef struct hold_chain {
    uint64_t begin, end;
} hold_chain;

/* Put the entries into chains, `most` at most. Returns how many; 0 where these are not enough. */
static size_t find_chains(const hold_header *self, hold_chain *chains, size_t most)
{
    size_t n = 0, next = 0;

    for (size_t i = 0; i < self->n; i++) {
        uint64_t offset = self->entries[i].offset;
        for (size_t tried = 0; tried < n && chains[next].end != offset; tried++)
            next = next + 1 == n ? 0 : next + 1;
        if (n == 0 || chains[next].end != offset) {
            if (n == most)
                return 0;
            next = n++;
            chains[next] = (hold_chain){offset, offset};
        }
        /* Offsets are below 2^63 + base, so this does not wrap. */
        chains[next].end += self->entries[i].nbytes;
    }
    return n;
}

/*
 * Whether the entries tile the data, where they are a few chains, as a writer makes them that keeps
 * the order of the names but sorts the data by size or type. False says nothing.
 */
static bool tile_in_chains(const hold_header *self, uint64_t base)
{
    hold_chain chains[CHAINS];
    size_t n = find_chains(self, chains, CHAINS);
    uint64_t end = base;

    if (n == 0)
        return self->n == 0;
    while (n > 0) {
        size_t found = n;
        /* An empty one stands before the one that begins where it does. */
        for (size_t i = 0; i < n; i++)
            if (chains[i].begin == end && (found == n || chains[i].end == end))
                found = i;
        if (found == n)
            return false;
        end = chains[found].end;
        chains[found] = chains[--n];
    }
    return true;
}

int hold_header_tile(hold_header *self, uint64_t base, hold_header_fault *fault)
{
    size_t n = self->n, filled = 0;
    hold_span *spans = NULL, *sorted;
    uint64_t end = base;

    if (tile_in_chains(self, base))
        return HOLD_JSON_OK;
    spans = malloc(2 * n * sizeof *spans);
    if (spans == NULL) {
        fault->code = HOLD_HEADER_NOMEM;
        goto out;
    }
    /* Empty tensors first: they stand before the one that begins where they do. */
    for (int empty = 1; empty >= 0; empty--)
        for (size_t i = 0; i < n; i++)
            if ((self->entries[i].nbytes == 0) == empty)
                spans[filled++] = (hold_span){self->entries[i].offset - base, i};
    sorted = sort_spans(spans, spans + n, n);
    for (size_t i = 0; i < n; i++) {
        const hold_header_entry *entry = &self->entries[sorted[i].entry];
        if (entry->offset != end) {
            fault->code = HOLD_HEADER_TILING;
            fault->entry = (int64_t)sorted[i].entry;
            fault->expected = end - base;
            fault->found = entry->offset - base;
            break;
        }
        end += entry->nbytes;
    }
out:
    free(spans);
    return fault->code;
}
