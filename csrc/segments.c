/* Checking segments, cutting them into chunks, walking the pieces. */
#include "segments.h"

#include "strided.h"
#include "threads.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#define STEP_MAX ((uint64_t)4 << 20)
#define STEP_MIN ((uint64_t)1 << 20)
#define BUFFERS_MAX ((uint64_t)48 << 20) /* of all workers together: one step each */

int hold_segments_check(const hold_segment *segments, size_t n, size_t nfiles, bool gaps,
                        bool addressless, hold_report *report)
{
    const hold_segment *before = NULL; /* the last one that has bytes */
    for (size_t i = 0; i < n; i++) {
        const hold_segment *s = &segments[i];
        uint64_t end;
        bool bad = __builtin_add_overflow(s->offset, s->nbytes, &end) || end > INT64_MAX;
        bad |= nfiles && s->file >= nfiles;
        if (s->nbytes) {
            bad |= !s->data && !addressless;
            if (before && (!nfiles || before->file == s->file)) {
                uint64_t last = before->offset + before->nbytes;
                bad |= s->offset < last || (!gaps && s->offset > last);
            }
            bad |= nfiles && before && before->file > s->file;
            before = s;
        }
        if (bad || (s->layout && hold_layout_check(s->layout, s->nbytes) != 0)) {
            report->segment = (int64_t)i;
            report->offset = s->offset;
            report->file = s->file;
            return HOLD_ERULE;
        }
    }
    return 0;
}

/* Where the chunk that begins at `begin` has to end. */
static uint64_t limit(uint64_t begin, uint64_t step, const uint64_t cuts[2])
{
    uint64_t end = (begin / step + 1) * step;
    for (int i = 0; i < 2; i++)
        if (cuts[i] > begin && cuts[i] < end)
            end = cuts[i];
    return end;
}

static hold_chunk *append(hold_plan *plan, size_t *capacity)
{
    if (plan->n == *capacity) {
        *capacity = *capacity ? 2 * *capacity : 64;
        hold_chunk *grown = reallocarray(plan->chunks, *capacity, sizeof *grown);
        if (!grown)
            return NULL;
        plan->chunks = grown;
    }
    return &plan->chunks[plan->n++];
}

int hold_plan_make(hold_segment *segments, size_t n, bool files, uint64_t step,
                   const uint64_t cuts[2], bool checksum, hold_plan *out)
{
    hold_plan plan = {0};
    size_t capacity = 0;
    uint64_t stop = 0;
    hold_chunk *chunk = NULL;
    for (size_t i = 0; i < n; i++) {
        hold_segment *s = &segments[i];
        uint64_t end = s->offset + s->nbytes;
        if (checksum)
            s->crc = 0;
        plan.nbytes += s->nbytes;
        for (uint64_t at = s->offset; at < end; at = chunk->end) {
            if (!chunk || (files && chunk->file != s->file) || at >= stop) {
                chunk = append(&plan, &capacity);
                if (!chunk) {
                    hold_plan_free(&plan);
                    return -ENOMEM;
                }
                *chunk = (hold_chunk){.begin = at, .first = i, .file = s->file};
                stop = limit(at, step, cuts);
            }
            chunk->end = end < stop ? end : stop;
        }
    }
    *out = plan;
    return 0;
}

void hold_plan_free(hold_plan *plan)
{
    free(plan->chunks);
    *plan = (hold_plan){0};
}

void hold_plan_join_crcs(const hold_plan *plan, hold_segment *segments)
{
    for (size_t k = 0; k < plan->n; k++) {
        const hold_chunk *chunk = &plan->chunks[k];
        hold_segment *s = &segments[chunk->first];
        if (s->offset == chunk->begin)
            continue;
        uint64_t end = s->offset + s->nbytes;
        uint64_t nbytes = (end < chunk->end ? end : chunk->end) - chunk->begin;
        s->crc = hold_crc32_combine(s->crc, chunk->crc_head, nbytes);
    }
}

uint64_t hold_plan_step(uint64_t nbytes, int workers)
{
    uint64_t count = (uint64_t)(workers < HOLD_MAX_WORKERS ? workers : HOLD_MAX_WORKERS);
    uint64_t step = STEP_MAX;
    while (step > STEP_MIN && step * count * 2 > nbytes)
        step /= 2;
    while (step * count > BUFFERS_MAX)
        step /= 2;
    return step;
}

int64_t hold_segments_find(const hold_segment *segments, size_t n, const uint32_t *file,
                           uint64_t offset)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const hold_segment *s = &segments[middle];
        bool here = !file || s->file == *file;
        if (here ? s->offset <= offset : s->file < *file)
            low = middle + 1;
        else
            high = middle;
    }
    while (low > 0 && segments[low - 1].nbytes == 0)
        low--;
    return (int64_t)low - 1;
}

/* The piece of `segment` at or after `offset`; the first segment after it that has bytes, if none
 * is left of it. */
static hold_piece piece_at(hold_chunk *chunk, hold_segment *segment, uint64_t offset)
{
    hold_piece piece = {.segment = segment, .offset = offset};
    if (offset >= chunk->end)
        return piece;
    /* The byte at chunk->end - 1 is in a segment, so this walk meets one that has bytes. */
    while (segment->offset + segment->nbytes <= offset || segment->nbytes == 0)
        segment++;
    if (segment->offset > offset)
        offset = segment->offset;
    uint64_t end = segment->offset + segment->nbytes;
    assert(offset < chunk->end);
    piece.segment = segment;
    piece.offset = offset;
    piece.skipped = offset - segment->offset;
    piece.nbytes = (end < chunk->end ? end : chunk->end) - offset;
    piece.crc = segment->offset < chunk->begin ? &chunk->crc_head : &segment->crc;
    return piece;
}

hold_piece hold_chunk_begin(hold_chunk *chunk, hold_segment *segments)
{
    return piece_at(chunk, &segments[chunk->first], chunk->begin);
}

hold_piece hold_chunk_next(hold_chunk *chunk, const hold_piece *piece, uint64_t nbytes)
{
    assert(nbytes <= piece->nbytes);
    return piece_at(chunk, piece->segment, piece->offset + nbytes);
}
