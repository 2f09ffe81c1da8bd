/* Memory with a count of owners: anonymous, or a private map of a file. */
#include "hold.h"

#include "kept.h"
#include "sys.h"
#include "threads.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE HOLD_HUGE
#define PREFETCH_STEP ((size_t)16 << 20)
#define RESIDENT_PAGES 4096 /* asked about at a time */
#define POPULATE_MIN ((size_t)64 << 20) /* faults on less are cheaper than threads */
/* Pages of each PREFETCH_STEP that are asked about, and how many may be out of the page cache.
 * To ask about 16 takes 1.3 ms of the 4.6 for 2 GiB in folios of 2 MiB. Of a piece that is half
 * missing, 8 seem nearly all there in 4 cases of 100. */
#define POPULATE_SAMPLES 8
#define POPULATE_MISSING 1

static atomic_size_t live;
static char nothing; /* where buffers of no bytes point */

size_t hold_buffer_count(void)
{
    return atomic_load(&live);
}

static void dispose(hold_buffer *self)
{
    if (self->base)
        hold_sys_munmap(self->base, self->span);
    free(self);
    atomic_fetch_sub(&live, 1);
}

static void dispose_huge(hold_buffer *self)
{
    if (self->forks == hold_kept_forks())
        hold_kept_put(self->base, self->span);
    else
        hold_sys_munmap(self->base, self->span);
    free(self);
    atomic_fetch_sub(&live, 1);
}

/* A buffer with one owner and no memory yet. NULL where there is no memory. */
static hold_buffer *make(size_t nbytes)
{
    hold_buffer *self = calloc(1, sizeof *self);
    if (self) {
        atomic_init(&self->owners, 1);
        self->data = &nothing;
        self->nbytes = nbytes;
        self->dispose = dispose;
        atomic_fetch_add(&live, 1);
    }
    return self;
}

static void dispose_lent(hold_buffer *self)
{
    self->let_go(self->base);
    free(self);
    atomic_fetch_sub(&live, 1);
}

int hold_buffer_lend(void *data, size_t nbytes, void *owner, void (*let_go)(void *owner),
                     hold_buffer **out)
{
    hold_buffer *self = make(nbytes);
    if (!self)
        return -ENOMEM;
    self->data = data;
    self->base = owner;
    self->let_go = let_go;
    self->dispose = dispose_lent;
    *out = self;
    return 0;
}

static size_t page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* `nbytes` up to a multiple of the power of two `unit`; 0 where that overflows. */
static size_t round_up(size_t nbytes, size_t unit)
{
    return (nbytes + unit - 1) & ~(unit - 1);
}

/*
 * Reserve address space of `span` bytes (a multiple of the page size) whose start is congruent to
 * `phase` modulo HUGE.
 */
static int reserve(size_t span, size_t phase, int prot, char **out)
{
    size_t room;
    void *base;
    if (__builtin_add_overflow(span, HUGE, &room))
        return -ENOMEM;
    int rc = HOLD_RETRY(hold_sys_mmap(NULL, room, prot,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &base));
    if (rc < 0)
        return rc;
    char *start = base;
    size_t lead = (phase - (uintptr_t)base) & (HUGE - 1);
    if (lead)
        hold_sys_munmap(start, lead);
    hold_sys_munmap(start + lead + span, HUGE - lead);
    *out = start + lead;
    return 0;
}

/* Memory of huge pages: what was kept, where something of it fits, or new. */
static int huge(hold_buffer *self, size_t span)
{
    char *data = hold_kept_take(span, &self->span);
    int rc = 0;
    if (!data) {
        rc = reserve(span, 0, PROT_READ | PROT_WRITE, &data);
        if (rc == -ENOMEM && hold_kept_give_back(SIZE_MAX))
            rc = reserve(span, 0, PROT_READ | PROT_WRITE, &data);
        if (rc < 0)
            return rc;
        /* a wish: without it the memory is only slower */
        (void)hold_sys_madvise(data, span, MADV_HUGEPAGE);
        self->span = span;
    }
    self->data = self->base = data;
    self->dispose = dispose_huge;
    self->forks = hold_kept_forks();
    return 0;
}

int hold_buffer_alloc(size_t nbytes, hold_buffer **out)
{
    size_t span = round_up(nbytes, page_size());
    if (span < nbytes)
        return -ENOMEM;
    hold_buffer *self = make(nbytes);
    int rc = self ? 0 : -ENOMEM;
    if (rc == 0 && nbytes >= HUGE) {
        rc = huge(self, span);
    } else if (rc == 0 && nbytes) {
        void *base;
        rc = HOLD_RETRY(hold_sys_mmap(NULL, span, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &base));
        if (rc == 0) {
            self->data = self->base = base;
            self->span = span;
        }
    }
    if (rc < 0) {
        if (self)
            hold_buffer_release(self);
        return rc;
    }
    *out = self;
    return 0;
}

int hold_buffer_map(int fd, uint64_t offset, size_t nbytes, bool shared, hold_buffer **out)
{
    uint64_t begin = offset & ~(uint64_t)(page_size() - 1);
    size_t lead = (size_t)(offset - begin), span;
    if (offset > INT64_MAX || __builtin_add_overflow(lead, nbytes, &span) ||
        round_up(span, page_size()) < span)
        return -EOVERFLOW;
    span = round_up(span, page_size());
    hold_buffer *self = make(nbytes);
    if (!self)
        return -ENOMEM;
    *out = self;
    if (nbytes == 0)
        return 0;
    /* Congruent to the offset modulo 2 MiB, so that large folios can be mapped as such. */
    char *place = NULL;
    int fixed = 0;
    int rc = 0;
    if (nbytes >= HUGE) {
        rc = reserve(span, (size_t)(begin & (HUGE - 1)), PROT_NONE, &place);
        fixed = MAP_FIXED;
    }
    void *base = NULL;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE) | fixed;
    if (rc == 0)
        rc = HOLD_RETRY(hold_sys_mmap(place, span, PROT_READ | PROT_WRITE, flags, fd, (off_t)begin,
                                      &base));
    if (rc < 0) {
        if (place)
            hold_sys_munmap(place, span);
        hold_buffer_release(self);
        *out = NULL;
        return rc;
    }
    self->base = base;
    self->span = span;
    self->data = (char *)base + lead;
    return 0;
}

int hold_filesystem(int fd, uint64_t *out)
{
    struct statfs st;
    int rc = HOLD_RETRY(hold_sys_fstatfs(fd, &st));
    *out = rc < 0 ? 0 : (uint64_t)st.f_type & UINT32_MAX;
    return rc < 0 ? rc : 0;
}

bool hold_filesystem_among(int fd, const uint32_t *kinds, size_t n)
{
    uint64_t kind;
    if (hold_filesystem(fd, &kind) != 0)
        return false;
    for (size_t i = 0; i < n; i++)
        if (kind == kinds[i])
            return true;
    return false;
}

/* ---- what of a map is in memory ------------------------------------------------------------ */

typedef struct {
    hold_job job;
    char *begin, *end; /* whole pages */
    atomic_size_t populated;
} prefetch;

/* The pages that piece `i` takes up. */
static size_t prefetch_piece(const prefetch *self, size_t i, char **from)
{
    *from = self->begin + i * PREFETCH_STEP;
    size_t left = (size_t)(self->end - *from);
    return left < PREFETCH_STEP ? left : PREFETCH_STEP;
}

static int prefetch_step(void *context, size_t i, hold_worker *worker)
{
    char *from;
    size_t nbytes = prefetch_piece(context, i, &from);
    (void)worker;
#ifdef MADV_POPULATE_READ
    int populated = HOLD_RETRY(hold_sys_madvise(from, nbytes, MADV_POPULATE_READ));
    if (populated != -EINVAL) /* which a kernel older than 5.14 says */
        return populated;
#endif
    int rc = HOLD_RETRY(hold_sys_madvise(from, nbytes, MADV_WILLNEED));
    for (size_t at = 0; rc >= 0 && at < nbytes; at += page_size())
        (void)*(volatile const char *)(from + at);
    return rc;
}

static int populate_step(void *context, size_t i, hold_worker *worker)
{
    prefetch *self = context;
    char *from;
    size_t nbytes = prefetch_piece(self, i, &from);
    size_t pages = nbytes / page_size();
    for (size_t sample = 0, missing = 0; sample < POPULATE_SAMPLES; sample++) {
        unsigned char in;
        /* One of each eighth, anywhere in it: what is missing may be every second folio. */
        size_t begin = sample * pages / POPULATE_SAMPLES;
        size_t room = (sample + 1) * pages / POPULATE_SAMPLES - begin;
        size_t mixed = (i * POPULATE_SAMPLES + sample + 1) * 2654435761u >> 7;
        size_t at = begin + (room ? mixed % room : 0);
        int rc = HOLD_RETRY(hold_sys_mincore(from + at * page_size(), page_size(), &in));
        if (rc < 0)
            return rc;
        missing += !(in & 1);
        if (missing > POPULATE_MISSING)
            return 0;
    }
    int rc = prefetch_step(self, i, worker);
    if (rc >= 0)
        atomic_fetch_add_explicit(&self->populated, nbytes, memory_order_relaxed);
    return rc;
}

static int prefetch_all(prefetch *self, hold_task task, const void *data, size_t nbytes,
                        int threads)
{
    static const hold_options quiet = {0};
    uintptr_t page = page_size();
    char *start = (char *)(uintptr_t)data;
    self->begin = start - (uintptr_t)start % page;
    self->end = start + nbytes;
    self->end += (page - (uintptr_t)self->end % page) % page;
    self->job = (hold_job){.task = task, .context = self, .options = &quiet};
    size_t steps = ((size_t)(self->end - self->begin) + PREFETCH_STEP - 1) / PREFETCH_STEP;
    return hold_job_run(&self->job, 0, steps, threads > 0 ? threads : hold_cpu_count() + 2);
}

int hold_prefetch(const void *data, size_t nbytes, int threads)
{
    prefetch self = {0};
    return nbytes == 0 ? 0 : prefetch_all(&self, prefetch_step, data, nbytes, threads);
}

int hold_populate_cached(const void *data, size_t nbytes, size_t most, int threads, size_t *out)
{
    prefetch self = {0};
    *out = 0;
    if (nbytes < POPULATE_MIN || nbytes > most)
        return 0;
    int rc = prefetch_all(&self, populate_step, data, nbytes, threads);
    *out = atomic_load(&self.populated);
    return rc;
}

/* Give advice on the pages that [data, data + nbytes) touches. */
static int advise(const void *data, size_t nbytes, int advice)
{
    uintptr_t page = page_size();
    uintptr_t from = (uintptr_t)data / page * page;
    uintptr_t end = ((uintptr_t)data + nbytes + page - 1) / page * page;
    if (nbytes == 0)
        return 0;
    int rc = HOLD_RETRY(hold_sys_madvise((char *)from, end - from, advice));
    return rc < 0 ? rc : 0;
}

int hold_expect(const void *data, size_t nbytes)
{
    int rc = advise(data, nbytes, MADV_HUGEPAGE);
    return rc == -EINVAL ? 0 : rc; /* a kernel without huge pages */
}

int hold_drop(const void *data, size_t nbytes)
{
    return advise(data, nbytes, MADV_DONTNEED);
}

int hold_resident(const void *data, size_t nbytes, uint64_t *out)
{
    unsigned char in[RESIDENT_PAGES];
    size_t page = page_size();
    char *from = (char *)(uintptr_t)data, *end = from + nbytes;
    uint64_t resident = 0;
    while (from < end) {
        char *base = from - (uintptr_t)from % page;
        size_t pages = ((size_t)(end - base) + page - 1) / page;
        if (pages > RESIDENT_PAGES)
            pages = RESIDENT_PAGES;
        int rc = HOLD_RETRY(hold_sys_mincore(base, pages * page, in));
        if (rc < 0)
            return rc;
        for (size_t i = 0; i < pages; i++) {
            char *next = base + (i + 1) * page;
            resident += in[i] & 1 ? (uint64_t)((next < end ? next : end) - from) : 0;
            from = next;
        }
    }
    *out = resident;
    return 0;
}
