/* Checksums of segments that are in memory, without writing them. */
#include "hold.h"

#include "segments.h"
#include "strided.h"
#include "threads.h"

#define BLOCK ((size_t)128 << 10)  /* of a strided tensor, gathered at a time */
#define BATCH ((uint64_t)1 << 20)  /* segments that one item takes: about this many bytes */
#define FEW ((uint64_t)256 << 10)  /* below this, threads cost more than they save */

typedef struct {
    hold_job job;
    hold_segment *segments;
    size_t n;
    size_t per_item;
} summer;

static int sum_strided(summer *self, hold_segment *s, hold_worker *worker)
{
    char *buffer;
    int rc = hold_worker_buffer(&self->job, worker, &buffer);
    if (rc)
        return rc;
    for (uint64_t at = 0; at < s->nbytes; at += BLOCK) {
        uint64_t end = s->nbytes - at < BLOCK ? s->nbytes : at + BLOCK;
        hold_strided_gather(s->layout, s->data, at, end, buffer);
        s->crc = hold_crc32(s->crc, buffer, (size_t)(end - at));
    }
    return 0;
}

static int sum_segment(summer *self, hold_segment *s, hold_worker *worker)
{
    s->crc = 0;
    if (s->layout)
        return sum_strided(self, s, worker);
    s->crc = hold_crc32(0, s->data, (size_t)s->nbytes);
    return s->file == HOLD_RELEASE ? hold_drop(s->data, (size_t)s->nbytes) : 0;
}

static int sum_item(void *context, size_t i, hold_worker *worker)
{
    summer *self = context;
    size_t first = i * self->per_item;
    size_t n = self->n - first < self->per_item ? self->n - first : self->per_item;
    for (size_t k = first; k < first + n; k++) {
        int rc = sum_segment(self, &self->segments[k], worker);
        if (rc) {
            hold_job_fail(&self->job, rc);
            return rc;
        }
    }
    return 0;
}

int hold_checksum(hold_segment *segments, size_t n, const hold_options *options,
                  hold_report *report)
{
    report->segment = -1;
    report->file = 0;
    report->offset = 0;
    int rc = hold_segments_check(segments, n, 0, true, false, report);
    if (rc || n == 0)
        return rc;
    uint64_t nbytes = 0;
    for (size_t i = 0; i < n; i++)
        nbytes += segments[i].nbytes;
    static const hold_options quiet = {0};
    summer self = {.segments = segments, .n = n};
    self.job = (hold_job){
        .task = sum_item, .context = &self, .options = &quiet, .buffer_nbytes = BLOCK};
    uint64_t items = nbytes / BATCH + 1;
    self.per_item = items < n ? (size_t)(n / items) + 1 : 1;
    int workers = nbytes < FEW ? 1 : options->threads > 0 ? options->threads : hold_cpu_count();
    return hold_job_run(&self.job, 0, (n + self.per_item - 1) / self.per_item, workers);
}
