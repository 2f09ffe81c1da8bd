/*
 * segments.h - rows of segments, cut into the chunks that workers take.
 *
 * A chunk is a range of one file between two multiples of a step; what it holds of the segments
 * are pieces. Chunks are in the order of the segments, and each is one worker's alone. So a
 * segment's checksum is begun by the worker of the chunk in which it begins, in segment.crc; what
 * later chunks hold of it goes into their crc_head and is joined when all are done.
 */
#ifndef HOLD_SEGMENTS_H
#define HOLD_SEGMENTS_H

#include "hold.h"

typedef struct hold_chunk {
    uint64_t begin, end; /* in the file; a byte of a segment is at begin and at end - 1 */
    size_t first;        /* index of the segment that holds the byte at begin */
    uint32_t file;
    uint32_t crc_head; /* of the bytes of segment `first`, where it began in an earlier chunk */
} hold_chunk;

typedef struct hold_plan {
    hold_chunk *chunks; /* owned; NULL where n is 0 */
    size_t n;
    uint64_t nbytes; /* of all segments */
} hold_plan;

/*
 * Check segments for a transfer: sorted by (file, offset), no overlap, no gap unless `gaps`, files
 * below nfiles (which is 0 where all are in one file, whatever they say), sizes that fit a file
 * offset, sound layouts, an address unless `addressless`. Returns 0, or HOLD_ERULE with
 * report->segment, ->offset and ->file those of the culprit.
 */
int hold_segments_check(const hold_segment *segments, size_t n, size_t nfiles, bool gaps,
                        bool addressless, hold_report *report);

/*
 * Cut checked segments into chunks at the multiples of `step`, where `files` is set at the borders
 * of files, and besides at the offsets cuts[0] and cuts[1] (0 for none). Sets the crc of every
 * segment to that of no bytes where `checksum`. On success the caller ends the plan with
 * hold_plan_free. Returns 0 or -ENOMEM.
 */
int hold_plan_make(hold_segment *segments, size_t n, bool files, uint64_t step,
                   const uint64_t cuts[2], bool checksum, hold_plan *out);
void hold_plan_free(hold_plan *plan);

/* Join the checksums of segments that lie in several chunks. Once, when all chunks are done. */
void hold_plan_join_crcs(const hold_plan *plan, hold_segment *segments);

/*
 * The step for so many bytes and workers: a power of two, 4 MiB at most, so that every worker gets
 * more than one chunk where there is enough, and buffers of a step each stay within 48 MiB.
 */
uint64_t hold_plan_step(uint64_t nbytes, int workers);

/*
 * The segment that holds the byte at `offset` of *file, or the last before it; -1 for none. `file`
 * is NULL where all are in one file.
 */
int64_t hold_segments_find(const hold_segment *segments, size_t n, const uint32_t *file,
                           uint64_t offset);

/*
 * A walk over the pieces of a chunk. Segments without bytes are passed over.
 */
typedef struct hold_piece {
    hold_segment *segment;
    uint32_t *crc;    /* where its checksum grows */
    uint64_t offset;  /* in the file */
    uint64_t skipped; /* bytes of the segment before it */
    uint64_t nbytes;  /* 0: the chunk is at its end */
} hold_piece;

/* The first piece. */
hold_piece hold_chunk_begin(hold_chunk *chunk, hold_segment *segments);

/* The piece that starts `nbytes` further on, in this segment or (nbytes its rest) the next. */
hold_piece hold_chunk_next(hold_chunk *chunk, const hold_piece *piece, uint64_t nbytes);

/* Whether the segment's memory is plain bytes. */
static inline bool hold_piece_dense(const hold_piece *piece)
{
    return piece->segment->layout == NULL && piece->segment->data != NULL;
}

/* Where a dense segment's piece is in memory. */
static inline char *hold_piece_data(const hold_piece *piece)
{
    return (char *)piece->segment->data + piece->skipped;
}

#endif
