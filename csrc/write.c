/* Writing segments: gathered chunk by chunk, or straight from where they are. */
#include "hold.h"

#include "closing.h"
#include "segments.h"
#include "strided.h"
#include "sys.h"
#include "threads.h"

#include <assert.h>
#include <string.h>
#include <time.h>

#define DIRECT_MIN ((uint64_t)4 << 20)   /* less than this is not worth O_DIRECT */
#define PREALLOCATE_MIN ((uint64_t)1 << 20)
#define PREALLOCATE_TRIES 4
#define ALIGN_MIN 4096u                  /* of offsets and lengths under O_DIRECT */
#define FOLIO ((uint64_t)2 << 20)        /* written at a time through the page cache */
#define DIRECT_WORKERS 12  /* a device is as fast as it has bytes to write: 4 MiB from each ... */
#define DIRECT_FEW 6       /* ... and if it is less than MANY altogether, from these */
#define MANY ((uint64_t)96 << 20)
#define BUFFERED_WORKERS 2

/* Written at once through the page cache, and past it, to learn how fast that is ... */
static const uint64_t probe[2] = {(uint64_t)16 << 20, (uint64_t)64 << 20};
/* ... and before it is judged again. */
static const uint64_t batch[2] = {(uint64_t)64 << 20, (uint64_t)192 << 20};

typedef struct {
    hold_job job;
    int fd;
    hold_segment *segments;
    size_t n;
    hold_plan plan;
    bool checksum;
    atomic_bool direct;  /* O_DIRECT is set on fd */
    size_t mem_align;    /* of memory under O_DIRECT; a power of two, like ... */
    uint64_t align;      /* ... that of offsets and lengths */
    uint64_t begin, end; /* the range of the file */
    bool padded;         /* the last chunk is written up to a multiple of align */
    hold_report *report;
} writer;

/* ---- one chunk ---------------------------------------------------------------------------- */

static int fail(writer *w, int error, uint64_t offset)
{
    if (hold_job_fail(&w->job, error)) {
        w->report->segment = hold_segments_find(w->segments, w->n, NULL, offset);
        w->report->offset = offset;
    }
    return error;
}

static void sum(const writer *w, const hold_piece *piece, const void *data, size_t nbytes)
{
    if (w->checksum)
        *piece->crc = hold_crc32(*piece->crc, data, nbytes);
}

/* Go on without O_DIRECT. Whichever worker is refused first does it for all. */
static int drop_direct(writer *w)
{
    int flags = HOLD_RETRY(hold_sys_fcntl(w->fd, F_GETFL, 0));
    int rc = flags < 0 ? flags : HOLD_RETRY(hold_sys_fcntl(w->fd, F_SETFL, flags & ~O_DIRECT));
    if (rc >= 0)
        atomic_store(&w->direct, false);
    return rc < 0 ? rc : 0;
}

/* Write all of it. Bytes past the end of the segments are padding and do not count as done. */
static int put(writer *w, hold_worker *worker, const char *data, size_t nbytes, uint64_t offset)
{
    unsigned closed = hold_close_ended();
    while (nbytes) {
        bool direct = atomic_load(&w->direct);
        ssize_t put = hold_sys_pwrite(w->fd, data, nbytes, (off_t)offset);
        if (put == -EINTR)
            continue;
        if (hold_close_wait(put, &closed))
            continue;
        int rc = put < 0 ? (int)put : put == 0 ? HOLD_ESTALL : 0;
        if (rc == -EINVAL && direct && (rc = drop_direct(w)) == 0)
            continue;
        if (rc)
            return fail(w, rc, offset);
        uint64_t left = offset < w->end ? w->end - offset : 0;
        rc = hold_job_advance(&w->job, worker, left < (uint64_t)put ? left : (size_t)put);
        if (rc)
            return rc;
        data += put;
        offset += (uint64_t)put;
        nbytes -= (size_t)put;
    }
    return 0;
}

/* Copy the first `nbytes` of a piece to `out`, and sum them. */
static void gather(const writer *w, const hold_piece *piece, size_t nbytes, char *out)
{
    const hold_segment *s = piece->segment;
    if (s->layout) {
        hold_strided_gather(s->layout, s->data, piece->skipped, piece->skipped + nbytes, out);
        sum(w, piece, out, nbytes);
        return;
    }
    if (w->checksum)
        *piece->crc = hold_crc32_copy(*piece->crc, out, hold_piece_data(piece), nbytes);
    else
        memcpy(out, hold_piece_data(piece), nbytes);
}

/*
 * Through the page cache, by windows that end at multiples of FOLIO: so it holds the file in folios
 * of that size, even where tensors meet. To map those later takes one entry of a page table for
 * each, where smaller ones take one for every page. What fills a window is written from where it
 * is.
 */
static int put_buffered(writer *w, hold_chunk *chunk, hold_worker *worker)
{
    char *buffer = NULL;
    size_t filled = 0, take;
    hold_piece piece = hold_chunk_begin(chunk, w->segments);
    for (; piece.nbytes; piece = hold_chunk_next(chunk, &piece, take)) {
        uint64_t end = (piece.offset / FOLIO + 1) * FOLIO;
        if (end > chunk->end)
            end = chunk->end;
        bool last = piece.nbytes >= end - piece.offset;
        take = last ? (size_t)(end - piece.offset) : (size_t)piece.nbytes;
        if (last && !filled && hold_piece_dense(&piece)) {
            sum(w, &piece, hold_piece_data(&piece), take);
            int rc = put(w, worker, hold_piece_data(&piece), take, piece.offset);
            if (rc)
                return rc;
            continue;
        }
        int rc = hold_worker_buffer(&w->job, worker, &buffer);
        if (rc)
            return fail(w, rc, piece.offset);
        gather(w, &piece, take, buffer + filled);
        filled += take;
        if (last) {
            rc = put(w, worker, buffer, filled, end - filled);
            if (rc)
                return rc;
            filled = 0;
        }
    }
    return 0;
}

/* With O_DIRECT: whole chunks, of which all but the last of the file has an aligned length. */
static int put_direct(writer *w, hold_chunk *chunk, hold_worker *worker)
{
    hold_piece piece = hold_chunk_begin(chunk, w->segments);
    if (hold_piece_dense(&piece) && (uintptr_t)hold_piece_data(&piece) % w->mem_align == 0) {
        /* What of the chunk this one segment fills, straight from where it is. */
        size_t n = (size_t)(piece.nbytes & ~(w->align - 1));
        if (n && n == ((chunk->end - chunk->begin) & ~(w->align - 1))) {
            sum(w, &piece, hold_piece_data(&piece), n);
            int rc = put(w, worker, hold_piece_data(&piece), n, piece.offset);
            if (rc)
                return rc;
            piece = hold_chunk_next(chunk, &piece, n);
        }
    }
    if (!piece.nbytes)
        return 0;
    uint64_t begin = piece.offset;
    char *buffer;
    int rc = hold_worker_buffer(&w->job, worker, &buffer);
    if (rc)
        return fail(w, rc, begin);
    for (; piece.nbytes; piece = hold_chunk_next(chunk, &piece, piece.nbytes))
        gather(w, &piece, (size_t)piece.nbytes, buffer + (piece.offset - begin));
    size_t nbytes = (size_t)(chunk->end - begin);
    size_t padding = (size_t)(-nbytes & (w->align - 1));
    assert(nbytes + padding <= w->job.buffer_nbytes && (!padding || w->padded));
    memset(buffer + nbytes, 0, padding);
    return put(w, worker, buffer, nbytes + padding, begin);
}

/* Let go of the pages of mappings that the chunk came from. */
static int release_chunk(writer *w, hold_chunk *chunk)
{
    hold_piece piece = hold_chunk_begin(chunk, w->segments);
    for (; piece.nbytes; piece = hold_chunk_next(chunk, &piece, piece.nbytes)) {
        int rc = hold_piece_dense(&piece) && piece.segment->file == HOLD_RELEASE
                     ? hold_drop(hold_piece_data(&piece), (size_t)piece.nbytes)
                     : 0;
        if (rc)
            return fail(w, rc, piece.offset);
    }
    return 0;
}

static int put_chunk(void *context, size_t i, hold_worker *worker)
{
    writer *w = context;
    hold_chunk *chunk = &w->plan.chunks[i];
    int rc = (atomic_load(&w->direct) ? put_direct : put_buffered)(w, chunk, worker);
    return rc ? rc : release_chunk(w, chunk);
}

/* ---- the whole ---------------------------------------------------------------------------- */

/* What O_DIRECT asks of the file, or false where it is of no use. */
static bool ask_direct(writer *w, const hold_options *options)
{
    uint32_t memory = 0, offset = 0;
    if (options->direct == HOLD_DIRECT_NEVER || w->plan.nbytes < DIRECT_MIN)
        return false;
    if (hold_sys_statx_dio(w->fd, &memory, &offset) < 0 || !offset)
        memory = offset = ALIGN_MIN; /* not said: what any device takes */
    w->mem_align = memory ? memory : 1;
    w->align = offset < ALIGN_MIN ? ALIGN_MIN : offset;
    return (w->align & (w->align - 1)) == 0 && w->align <= (uint64_t)1 << 20;
}

/*
 * Room on the device for all of it, if the file system can tell beforehand: of the whole file,
 * where its size is known. A block that is left out gets its place when the file takes the name of
 * another one, and ext4 then starts to write back all the others before the rename returns. A file
 * that has this size has the room: tmpfs would look at every page, for each part that is written.
 */
static int preallocate(writer *w, uint64_t end, uint64_t size, uint64_t found)
{
    uint64_t begin = size ? 0 : w->begin;
    unsigned closed = hold_close_ended();
    if (w->plan.nbytes < PREALLOCATE_MIN || (size && size <= found && end <= found))
        return 0;
    if (end < size)
        end = size;
    int rc = -EINTR;
    /* tmpfs, interrupted, undoes all of it: where signals come faster than it ends it never
     * would. */
    for (int tries = 0; rc == -EINTR && tries < PREALLOCATE_TRIES; tries++)
        rc = hold_sys_fallocate(w->fd, 0, (off_t)begin, (off_t)(end - begin));
    while (hold_close_wait(rc, &closed)) /* what an earlier save replaced was still there */
        rc = HOLD_RETRY(hold_sys_fallocate(w->fd, 0, (off_t)begin, (off_t)(end - begin)));
    if (rc == -EINTR || rc == -EOPNOTSUPP || rc == -ENOTSUP || rc == -EINVAL || rc == -ENOSYS)
        return 0;
    return rc < 0 ? rc : 0;
}

static int buffered_workers(const hold_options *options)
{
    return options->threads > 0 ? options->threads : BUFFERED_WORKERS;
}

static int direct_workers(const writer *w, const hold_options *options)
{
    if (options->threads > 0)
        return options->threads;
    return w->plan.nbytes < MANY ? DIRECT_FEW : DIRECT_WORKERS;
}

static int set_direct(writer *w, int flags, bool direct)
{
    int rc = HOLD_RETRY(hold_sys_fcntl(w->fd, F_SETFL, direct ? flags | O_DIRECT : flags));
    if (rc < 0 && !(rc == -EINVAL && direct))
        return fail(w, rc, w->begin);
    atomic_store(&w->direct, direct && rc == 0);
    return 0;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/*
 * Chunks [first, stop) in whichever way is faster: through the page cache, which copies as fast as
 * memory does until the kernel has to find pages or to write back, or past it, which is as fast as
 * the device. Which it is changes from minute to minute, so both are tried, once the cache is not
 * fast enough, and the slower one is left as soon as it is seen to be that. Away from the cache, it
 * is tried again now and then, half as often each time in vain: it may have had a bad moment.
 */
static int put_faster(writer *w, size_t first, size_t stop, int flags, const hold_options *options)
{
    double rate[2] = {0, 0}; /* last seen, of the page cache and of O_DIRECT, in bytes a second */
    bool direct = false, used = false;
    uint64_t away = 0, patience = batch[1]; /* bytes since the cache was tried, and until it is */
    while (first < stop) {
        if (direct && away >= patience) {
            direct = false;
            rate[0] = 0;
            patience *= 2;
        }
        uint64_t most = (rate[direct] == 0 ? probe : batch)[direct];
        size_t next = first + 1;
        while (next < stop && w->plan.chunks[next].end - w->plan.chunks[first].begin <= most)
            next++;
        bool wanted = direct;
        int rc = set_direct(w, flags, wanted);
        if (rc)
            return rc;
        direct = atomic_load(&w->direct);
        double begun = seconds();
        rc = hold_job_run(&w->job, first, next,
                          direct ? direct_workers(w, options) : buffered_workers(options));
        if (rc)
            return rc;
        uint64_t moved = w->plan.chunks[next - 1].end - w->plan.chunks[first].begin;
        rate[direct] = (double)moved / (seconds() - begun + 1e-9);
        away = direct ? away + moved : 0;
        used |= direct && atomic_load(&w->direct);
        if (wanted && !atomic_load(&w->direct))
            rate[1] = 1; /* it was refused: never again */
        bool fast = options->enough > 0 && rate[0] >= options->enough;
        direct = rate[1] == 0 ? !fast : rate[1] > rate[0];
        first = next;
    }
    w->report->direct = used;
    return 0;
}

/*
 * The chunks before the first multiple of align and after the last go through the page cache, the
 * others past it; all do where O_DIRECT is refused.
 */
static int put_all(writer *w, const hold_options *options, bool direct, const uint64_t cuts[2])
{
    size_t first = 0, stop = w->plan.n;
    int workers = buffered_workers(options);
    if (!direct)
        return hold_job_run(&w->job, 0, stop, workers);
    if (stop && w->plan.chunks[0].end == cuts[0])
        first = 1;
    if (stop > first && w->plan.chunks[stop - 1].begin == cuts[1])
        stop--;
    int rc = hold_job_run(&w->job, 0, first, 1);
    if (rc == 0)
        rc = hold_job_run(&w->job, stop, w->plan.n, 1);
    if (rc)
        return rc;
    int flags = HOLD_RETRY(hold_sys_fcntl(w->fd, F_GETFL, 0));
    if (flags < 0)
        return fail(w, flags, w->begin);
    int done;
    if (options->direct == HOLD_DIRECT_FASTER) {
        done = put_faster(w, first, stop, flags, options);
    } else {
        rc = set_direct(w, flags, true);
        if (rc)
            return rc;
        if (atomic_load(&w->direct))
            workers = direct_workers(w, options);
        done = hold_job_run(&w->job, first, stop, workers);
        w->report->direct = atomic_load(&w->direct);
    }
    rc = HOLD_RETRY(hold_sys_fcntl(w->fd, F_SETFL, flags));
    return done ? done : rc < 0 ? fail(w, rc, w->begin) : 0;
}

static int begin_write(writer *w, const hold_options *options, bool *direct, uint64_t cuts[2])
{
    struct stat st;
    int rc = HOLD_RETRY(hold_sys_fstat(w->fd, &st));
    if (rc < 0)
        return rc;
    *direct = ask_direct(w, options);
    uint64_t end = w->end, mask = w->align - 1;
    if (*direct) {
        cuts[0] = (w->begin + mask) & ~mask;
        if (cuts[0] == w->begin)
            cuts[0] = 0;
        w->padded = (uint64_t)st.st_size <= w->end && (w->end & mask);
        if (w->padded)
            end = (w->end + mask) & ~mask;
        else if (w->end & mask)
            cuts[1] = w->end & ~mask;
    }
    return preallocate(w, end, options->size, (uint64_t)st.st_size);
}

int hold_write(int fd, hold_segment *segments, size_t n, const hold_options *options,
               hold_report *report)
{
    writer w = {.fd = fd, .segments = segments, .n = n, .report = report, .align = ALIGN_MIN};
    uint64_t cuts[2] = {0, 0};
    bool direct;
    *report = (hold_report){.segment = -1};
    int rc = hold_segments_check(segments, n, 0, false, false, report);
    if (rc)
        return rc;
    size_t low = 0, high = n;
    while (high && segments[high - 1].nbytes == 0)
        high--;
    while (low < high && segments[low].nbytes == 0)
        low++;
    if (low < high) {
        w.begin = segments[low].offset;
        w.end = segments[high - 1].offset + segments[high - 1].nbytes;
    }
    w.plan.nbytes = w.end - w.begin;
    w.checksum = options->checksum;
    rc = begin_write(&w, options, &direct, cuts);
    if (rc)
        return rc;
    uint64_t step = hold_plan_step(w.plan.nbytes, direct_workers(&w, options));
    rc = hold_plan_make(segments, n, false, step, cuts, options->checksum, &w.plan);
    if (rc)
        return rc;
    w.job = (hold_job){.task = put_chunk, .context = &w, .options = options,
                       .buffer_nbytes = (size_t)step};
    rc = put_all(&w, options, direct, cuts);
    if (rc == 0 && w.padded)
        rc = HOLD_RETRY(
            hold_sys_ftruncate(fd, (off_t)(w.end < options->size ? options->size : w.end)));
    if (rc == 0)
        rc = hold_job_finish(&w.job);
    if (rc == 0 && options->checksum)
        hold_plan_join_crcs(&w.plan, segments);
    hold_plan_free(&w.plan);
    return rc < 0 ? rc : 0;
}
