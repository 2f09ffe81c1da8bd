/*
 * Reading segments: chunks of all files in one queue, straight to where the bytes belong. What is
 * in the page cache is copied from there; what is not is read past it, where that can be had.
 */
#include "hold.h"

#include "segments.h"
#include "strided.h"
#include "sys.h"
#include "threads.h"
#include "uncached.h"

#include <string.h>

#define BLOCK ((size_t)512 << 10)       /* read, then summed and placed, while it is in cache */
#define STRAIGHT_MIN ((size_t)32 << 10) /* from here on a piece is read to where it belongs */
#define GAP_MAX ((uint64_t)64 << 10)    /* read through rather than read again behind it */
#define WORKERS_MIN 2
#define WORKERS_MAX 8
#define DIRECT_MIN ((uint64_t)8 << 20)  /* a call for less leaves all to the page cache */
#define DIRECT_WORKERS 6                /* what keeps a device busy while others sum */
#define SAMPLES 16                      /* chunks asked about to choose the number of workers */

typedef struct {
    hold_job job;
    const int *fds;
    hold_segment *segments;
    size_t n;
    hold_plan plan;
    size_t step; /* of the plan */
    bool checksum;
    hold_origins origins;
    hold_report *report;
} reader;

/* A part of a chunk whose bytes all come the same way. */
typedef struct {
    hold_chunk *chunk;
    hold_worker *worker;
    const hold_origin *direct; /* NULL: through the page cache */
    uint64_t end;
} stretch;

/* The first segment that has bytes at `offset` or behind it: what lacks them if the file ends
 * there. */
static int64_t lacking(const reader *r, uint32_t file, uint64_t offset)
{
    int64_t found = hold_segments_find(r->segments, r->n, &file, offset);
    size_t i = found < 0 ? 0 : (size_t)found;
    while (i + 1 < r->n && (r->segments[i].nbytes == 0 || r->segments[i].file != file ||
                            r->segments[i].offset + r->segments[i].nbytes <= offset))
        i++;
    return (int64_t)i;
}

static int fail(reader *r, int error, uint32_t file, uint64_t offset)
{
    if (hold_job_fail(&r->job, error)) {
        r->report->segment = error == HOLD_ESHORT
                                 ? lacking(r, file, offset)
                                 : hold_segments_find(r->segments, r->n, &file, offset);
        r->report->offset = offset;
        r->report->file = file;
    }
    return error;
}

static void sum(const reader *r, const hold_piece *piece, const void *data, size_t nbytes)
{
    if (r->checksum)
        *piece->crc = hold_crc32(*piece->crc, data, nbytes);
}

static int get(reader *r, uint32_t file, char *data, size_t nbytes, uint64_t offset)
{
    while (nbytes) {
        ssize_t got = hold_sys_pread(r->fds[file], data, nbytes, (off_t)offset);
        if (got == -EINTR)
            continue;
        if (got <= 0)
            return fail(r, got ? (int)got : HOLD_ESHORT, file, offset);
        data += got;
        offset += (uint64_t)got;
        nbytes -= (size_t)got;
    }
    return 0;
}

/*
 * The same past the page cache. offset, data and room, which is at least nbytes, are aligned as
 * the file asks; of the first `lead` bytes nobody wants to know. Whatever direct reads do not
 * give, be it that they are refused or that the file ends there, is left to get().
 */
static int get_direct(reader *r, const stretch *s, char *data, size_t nbytes, size_t room,
                      uint64_t offset, size_t lead)
{
    uint32_t file = s->chunk->file;
    size_t done = 0;
    while (done < nbytes && done % s->direct->align == 0) {
        ssize_t got = hold_sys_pread(s->direct->direct, data + done, room - done,
                                     (off_t)(offset + done));
        if (got == -EINTR)
            continue;
        if (got == -EINVAL || got == -EOPNOTSUPP)
            hold_origins_refuse(&r->origins, file);
        else if (got < 0)
            return fail(r, (int)got, file, offset + (done < lead ? lead : done));
        if (got <= 0)
            break;
        done += (size_t)got;
    }
    if (done < lead)
        done = lead;
    return done < nbytes ? get(r, file, data + done, nbytes - done, offset + done) : 0;
}

/*
 * How many bytes from the start of `piece` on, at most `most`, lie side by side in the file and in
 * memory alike: this piece's, and the next ones' where they continue it.
 */
static size_t straight_run(hold_chunk *chunk, hold_piece piece, size_t most)
{
    if (!hold_piece_dense(&piece))
        return 0;
    const char *data = hold_piece_data(&piece);
    uint64_t begin = piece.offset;
    for (;;) {
        uint64_t nbytes = piece.offset + piece.nbytes - begin;
        if (nbytes >= most)
            return most;
        piece = hold_chunk_next(chunk, &piece, piece.nbytes);
        if (!piece.nbytes || piece.offset != begin + nbytes || !hold_piece_dense(&piece) ||
            hold_piece_data(&piece) != data + nbytes)
            return (size_t)nbytes;
    }
}

/* Read a run to where it belongs. Moves *piece past it. */
static int get_straight(reader *r, const stretch *s, hold_piece *piece, size_t run)
{
    char *data = hold_piece_data(piece);
    int rc = s->direct ? get_direct(r, s, data, run, run, piece->offset, 0)
                       : get(r, s->chunk->file, data, run, piece->offset);
    if (rc)
        return rc;
    for (size_t n, left = run; left; left -= n, data += n) {
        n = piece->nbytes < left ? (size_t)piece->nbytes : left;
        sum(r, piece, data, n);
        *piece = hold_chunk_next(s->chunk, piece, n);
    }
    return hold_job_advance(&r->job, s->worker, run);
}

/*
 * Where to stop reading through the buffer from `piece` on: behind the last piece, of those that
 * follow closely and are not better read straight, that begins within `room`.
 */
static uint64_t buffered_end(hold_chunk *chunk, hold_piece piece, uint64_t room)
{
    uint64_t begin = piece.offset, end = begin;
    uint64_t known = 0; /* up to here no run is long enough */
    while (piece.nbytes && piece.offset <= end + GAP_MAX && piece.offset < begin + room) {
        if (end > begin && piece.offset >= known) {
            size_t run = straight_run(chunk, piece, STRAIGHT_MIN);
            if (run >= STRAIGHT_MIN)
                break;
            known = piece.offset + run;
        }
        end = piece.offset + piece.nbytes;
        piece = hold_chunk_next(chunk, &piece, piece.nbytes);
    }
    return end < begin + room ? end : begin + room;
}

/* Read [begin, end) to the worker's buffer; *out is where the byte at begin is in it. */
static int fill_buffer(reader *r, const stretch *s, uint64_t begin, uint64_t end, char **out)
{
    char *buffer;
    int rc = hold_worker_buffer(&r->job, s->worker, &buffer);
    if (rc)
        return fail(r, rc, s->chunk->file, begin);
    size_t nbytes = (size_t)(end - begin);
    *out = buffer;
    if (!s->direct)
        return get(r, s->chunk->file, buffer, nbytes, begin);
    size_t mask = (size_t)s->direct->align - 1, lead = (size_t)begin & mask;
    *out = buffer + lead;
    return get_direct(r, s, buffer, lead + nbytes, (lead + nbytes + mask) & ~mask, begin - lead,
                      lead);
}

/* Read pieces, and small gaps between them, to the buffer and place them. Moves *piece past. */
static int get_buffered(reader *r, const stretch *s, hold_piece *piece, size_t room)
{
    char *from = NULL;
    uint64_t begin = piece->offset, moved = 0;
    if (room > s->end - begin)
        room = (size_t)(s->end - begin);
    uint64_t end = buffered_end(s->chunk, *piece, room);
    int rc = fill_buffer(r, s, begin, end, &from);
    if (rc)
        return rc;
    while (piece->nbytes && piece->offset < end) {
        const hold_segment *to = piece->segment;
        char *data = from + (piece->offset - begin);
        uint64_t n = end - piece->offset < piece->nbytes ? end - piece->offset : piece->nbytes;
        if (r->checksum && hold_piece_dense(piece))
            *piece->crc = hold_crc32_copy(*piece->crc, hold_piece_data(piece), data, (size_t)n);
        else if (hold_piece_dense(piece))
            memcpy(hold_piece_data(piece), data, (size_t)n);
        else
            sum(r, piece, data, (size_t)n);
        if (to->data && to->layout)
            hold_strided_scatter(to->layout, to->data, piece->skipped, piece->skipped + n, data);
        moved += n;
        *piece = hold_chunk_next(s->chunk, piece, n);
    }
    return hold_job_advance(&r->job, s->worker, (size_t)moved);
}

/* Whether something else that goes through the buffer follows a short run closely. */
static bool has_neighbour(hold_chunk *chunk, const hold_piece *piece, size_t run)
{
    uint64_t end = piece->offset + run;
    if (end >= chunk->end)
        return false;
    hold_piece next = *piece;
    while (next.nbytes && next.offset < end)
        next = hold_chunk_next(chunk, &next, next.nbytes);
    return next.nbytes && next.offset <= end + GAP_MAX;
}

/* One step through the page cache. Moves *piece past what was read. */
static int get_cached(reader *r, const stretch *s, hold_piece *piece)
{
    size_t most = s->end - piece->offset < BLOCK ? (size_t)(s->end - piece->offset) : BLOCK;
    size_t run = straight_run(s->chunk, *piece, most);
    if (run >= STRAIGHT_MIN || (run && !has_neighbour(s->chunk, piece, run)))
        return get_straight(r, s, piece, run);
    /* A strided tensor is best placed in one go: its cache lines then take more at a time. */
    size_t room = piece->segment->layout ? r->step : BLOCK;
    return get_buffered(r, s, piece, room < r->step ? room : r->step);
}

/*
 * One step past it: as much as there is at a time. What is not aligned goes through the buffer: the
 * whole run, or, where memory and file are aligned at the same bytes, what lies before and after.
 */
static int get_uncached(reader *r, const stretch *s, hold_piece *piece)
{
    uint64_t mask = s->direct->align - 1;
    size_t head = (size_t)(-piece->offset & mask);
    size_t run = straight_run(s->chunk, *piece, (size_t)(s->end - piece->offset));
    if (run >= head + STRAIGHT_MIN &&
        ((uintptr_t)hold_piece_data(piece) + head) % s->direct->mem_align == 0)
        return head ? get_buffered(r, s, piece, head)
                    : get_straight(r, s, piece, run & ~(size_t)mask);
    return get_buffered(r, s, piece, r->step);
}

static int get_chunk(void *context, size_t i, hold_worker *worker)
{
    reader *r = context;
    stretch s = {.chunk = &r->plan.chunks[i], .worker = worker};
    hold_piece piece = hold_chunk_begin(s.chunk, r->segments);
    int rc = 0;
    while (rc == 0 && piece.nbytes) {
        if (piece.offset >= s.end) {
            s.direct = hold_origins_ask(&r->origins, s.chunk->file, piece.offset, s.chunk->end,
                                        &s.end);
            if (s.direct)
                hold_origins_pass(&r->origins, s.chunk->file, s.end - piece.offset);
            else /* what that fails at, the read that follows finds out, too */
                (void)hold_origins_fill(&r->origins, s.chunk->file, piece.offset, s.end);
        }
        rc = (s.direct ? get_uncached : get_cached)(r, &s, &piece);
    }
    return rc;
}

/*
 * Through the page cache as many as there are CPUs to copy with: more of them only make the
 * kernel's readahead, which watches each file for one sequential reader, lose the thread. Past it
 * no fewer than DIRECT_WORKERS. A sample of the chunks tells which it will mostly be.
 */
static int choose_workers(reader *r)
{
    int n = hold_cpu_count();
    size_t asked = r->plan.n < SAMPLES ? r->plan.n : SAMPLES, direct = 0;
    n = n < WORKERS_MIN ? WORKERS_MIN : n > WORKERS_MAX ? WORKERS_MAX : n;
    for (size_t i = 0; r->origins.files && i < asked; i++) {
        const hold_chunk *chunk = &r->plan.chunks[i * r->plan.n / asked];
        uint64_t end;
        if (hold_origins_ask(&r->origins, chunk->file, chunk->begin, chunk->end, &end) ||
            atomic_load(&r->origins.files[chunk->file].again))
            direct++;
    }
    return n < DIRECT_WORKERS && direct * 4 > asked ? DIRECT_WORKERS : n;
}

int hold_read(const int *fds, size_t nfds, hold_segment *segments, size_t n,
              const hold_options *options, hold_report *report)
{
    static const uint64_t no_cuts[2] = {0, 0};
    reader r = {.fds = fds, .segments = segments, .n = n, .checksum = options->checksum,
                .report = report};
    *report = (hold_report){.segment = -1};
    int rc = hold_segments_check(segments, n, nfds, true, true, report);
    if (rc)
        return rc;
    uint64_t nbytes = 0;
    for (size_t i = 0; i < n; i++)
        nbytes += segments[i].nbytes;
    r.step = (size_t)hold_plan_step(nbytes, options->threads > 0 ? options->threads
                                                                 : DIRECT_WORKERS);
    rc = hold_plan_make(segments, n, true, r.step, no_cuts, options->checksum, &r.plan);
    if (rc)
        return rc;
    if (nbytes >= DIRECT_MIN)
        hold_origins_begin(&r.origins, fds, nfds);
    for (size_t i = 0; r.origins.files && i < n; i++)
        hold_origins_want(&r.origins, segments[i].file, segments[i].nbytes,
                          segments[i].data != NULL, options->fill);
    r.job = (hold_job){.task = get_chunk, .context = &r, .options = options};
    r.job.buffer_nbytes = r.step + (r.origins.files ? 2 * HOLD_UNCACHED_ALIGN_MAX : 0);
    rc = hold_job_run(&r.job, 0, r.plan.n,
                      options->threads > 0 ? options->threads : choose_workers(&r));
    if (rc == 0)
        rc = hold_job_finish(&r.job);
    if (rc == 0 && options->checksum)
        hold_plan_join_crcs(&r.plan, segments);
    if (rc == 0)
        hold_origins_mark(&r.origins);
    hold_origins_end(&r.origins);
    hold_plan_free(&r.plan);
    return rc;
}
