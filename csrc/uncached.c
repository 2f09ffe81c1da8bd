/* What is in the page cache, and reading what is not past it. */
#include "uncached.h"

#include "sys.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALIGN_UNSAID 4096u /* what any device takes */
#define MINCORE_PAGES 512  /* asked about at a time */
#define MARK_ALONE ((uint64_t)64 << 10) /* nothing else is cached so far to each side of a mark */
#define FOLIO ((uint64_t)2 << 20)

/* File systems known to read directly, for kernels that do not say what it asks of a file. */
static const uint32_t direct_kinds[] = {
    0xEF53,     /* ext4 */
    0x58465342, /* xfs */
    0x9123683E, /* btrfs */
};

void hold_origins_begin(hold_origins *self, const int *fds, size_t n)
{
    *self = (hold_origins){.files = calloc(n ? n : 1, sizeof *self->files), .n = n};
    if (!self->files)
        return;
    pthread_mutex_init(&self->lock, NULL);
    for (size_t i = 0; i < n; i++)
        self->files[i] = (hold_origin){.fd = fds[i], .direct = -1};
}

void hold_origins_want(hold_origins *self, uint32_t file, uint64_t nbytes, bool to_memory,
                       int fill)
{
    if (!self->files)
        return;
    self->files[file].wanted += nbytes;
    self->loading |= to_memory && fill == HOLD_FILL_AGAIN;
    self->now |= fill == HOLD_FILL_NOW;
}

void hold_origins_end(hold_origins *self)
{
    if (!self->files)
        return;
    for (size_t i = 0; i < self->n; i++) {
        if (self->files[i].direct >= 0)
            (void)hold_sys_close(self->files[i].direct);
        if (self->files[i].map)
            hold_sys_munmap(self->files[i].map, self->files[i].map_nbytes);
    }
    pthread_mutex_destroy(&self->lock);
    free(self->files);
    self->files = NULL;
}

void hold_origins_refuse(hold_origins *self, uint32_t file)
{
    atomic_store(&self->files[file].refused, true);
}

/* ---- what is cached ----------------------------------------------------------------------- */

static int map_file(hold_origins *self, hold_origin *o)
{
    int rc = 0;
    pthread_mutex_lock(&self->lock);
    if (!atomic_load(&o->mapped)) {
        struct stat st;
        void *map;
        rc = HOLD_RETRY(hold_sys_fstat(o->fd, &st));
        if (rc == 0 && (!S_ISREG(st.st_mode) || st.st_size <= 0))
            rc = -ENODEV;
        if (rc == 0)
            rc = HOLD_RETRY(hold_sys_mmap(NULL, (size_t)st.st_size, PROT_READ,
                                          MAP_SHARED | MAP_NORESERVE, o->fd, 0, &map));
        if (rc == 0) {
            o->map = map;
            o->map_nbytes = (size_t)st.st_size;
            atomic_store(&o->mapped, true);
        }
    }
    pthread_mutex_unlock(&self->lock);
    return rc;
}

/* How many of the pages `first` to `last` are cached, for kernels older than 6.5. */
static int mapped_pages(hold_origins *self, hold_origin *o, uint64_t first, uint64_t last,
                        uint64_t page, uint64_t *out)
{
    unsigned char in[MINCORE_PAGES];
    int rc = atomic_load(&o->mapped) ? 0 : map_file(self, o);
    *out = 0;
    uint64_t stop = rc ? 0 : (o->map_nbytes + page - 1) / page;
    if (last < stop)
        stop = last + 1;
    for (uint64_t at = first; rc == 0 && at < stop; ) {
        size_t n = stop - at < MINCORE_PAGES ? (size_t)(stop - at) : MINCORE_PAGES;
        rc = HOLD_RETRY(hold_sys_mincore(o->map + at * page, n * (size_t)page, in));
        for (size_t i = 0; i < n && rc == 0; i++)
            *out += in[i] & 1;
        at += n;
    }
    return rc;
}

/*
 * How much of the pages that [begin, end) touches is in the page cache: -1 nothing, 0 a part, 1
 * all; -2 where that cannot be told.
 */
static int cached(hold_origins *self, hold_origin *o, uint64_t begin, uint64_t end)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), found = 0;
    uint64_t first = begin / page, last = (end - 1) / page;
    int rc = -ENOSYS;
    if (!atomic_load_explicit(&o->mapped, memory_order_acquire))
        rc = HOLD_RETRY(hold_sys_cachestat(o->fd, begin, end - begin, &found));
    if (rc == -ENOSYS)
        rc = mapped_pages(self, o, first, last, page, &found);
    if (rc < 0)
        return -2;
    return found == 0 ? -1 : found >= last - first + 1 ? 1 : 0;
}

/* ---- marks -------------------------------------------------------------------------------- */

/* Where the mark of a file is: in its midst. */
static uint64_t mark_at(const hold_origin *o)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return o->nbytes / 8 * 5 / page * page;
}

/* How many pages of [begin, end) are cached; 0 also before Linux 6.5, where no mark is found. */
static uint64_t count(const hold_origin *o, uint64_t begin, uint64_t end)
{
    uint64_t found;
    return HOLD_RETRY(hold_sys_cachestat(o->fd, begin, end - begin, &found)) < 0 ? 0 : found;
}

/* Whether a file may bear a mark that is read so far. */
static bool is_load(const hold_origin *o)
{
    return o->nbytes >= HOLD_MARK_LEAST && o->wanted >= o->nbytes / 2;
}

/* Whether the page of the mark is cached and none beside it: nothing else leaves one alone. */
static bool is_marked(const hold_origin *o)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), at = mark_at(o);
    return count(o, at, at + page) == 1 && count(o, at - MARK_ALONE, at + MARK_ALONE) == 1;
}

/* One page, without those around it, which to read would bring in as well. */
static int mark(const hold_origin *o)
{
    return HOLD_RETRY(hold_sys_fadvise(o->fd, (off_t)mark_at(o), (off_t)sysconf(_SC_PAGESIZE),
                                       POSIX_FADV_WILLNEED));
}

/* The size of the file; 0 or -errno, -ENODATA for one that bears no mark. */
static int look(hold_origin *o)
{
    struct stat st;
    const int rc = HOLD_RETRY(hold_sys_fstat(o->fd, &st));
    if (rc < 0)
        return rc;
    o->nbytes = S_ISREG(st.st_mode) ? (uint64_t)st.st_size : 0;
    return o->nbytes >= HOLD_MARK_LEAST ? 0 : -ENODATA;
}

int hold_load_look(int fd, uint64_t nbytes)
{
    hold_origin o = {.fd = fd, .wanted = nbytes};
    uint64_t found;
    int rc = look(&o);
    if (rc == 0 && !is_load(&o))
        rc = -ENODATA;
    if (rc == 0)
        rc = HOLD_RETRY(hold_sys_cachestat(fd, 0, o.nbytes, &found));
    if (rc < 0)
        return rc == -ENOSYS || rc == -EPERM || rc == -EOPNOTSUPP ? -ENODATA : rc;
    if (found > o.nbytes / 2 / (uint64_t)sysconf(_SC_PAGESIZE))
        return -ENODATA;
    return is_marked(&o);
}

int hold_load_mark(int fd)
{
    hold_origin o = {.fd = fd};
    const int rc = look(&o);
    return rc < 0 ? rc : mark(&o);
}

/* ---- the second descriptor ---------------------------------------------------------------- */

static bool known_kind(int fd)
{
    return hold_filesystem_among(fd, direct_kinds, sizeof direct_kinds / sizeof *direct_kinds);
}

/* What direct reads ask of the file; false where they are not to be tried. */
static bool ask_alignment(hold_origin *o)
{
    struct stat st;
    uint32_t memory, offset;
    if (HOLD_RETRY(hold_sys_fstat(o->fd, &st)) < 0 || !S_ISREG(st.st_mode))
        return false;
    o->nbytes = (uint64_t)st.st_size;
    if (HOLD_RETRY(hold_sys_statx_dio(o->fd, &memory, &offset)) < 0)
        return false;
    if (!offset) {
        if (!known_kind(o->fd))
            return false;
        memory = offset = ALIGN_UNSAID;
    }
    /* Whole pages where less would do: the same blocks are then not read twice. */
    o->align = offset < ALIGN_UNSAID ? ALIGN_UNSAID : offset;
    o->mem_align = memory ? memory : 1;
    return (o->align & (o->align - 1)) == 0 && o->align <= HOLD_UNCACHED_ALIGN_MAX &&
           (o->mem_align & (o->mem_align - 1)) == 0 && o->mem_align <= o->align &&
           o->mem_align <= (size_t)sysconf(_SC_PAGESIZE);
}

/* Whether the file can be read directly, as far as that is known before it is tried. */
static bool open_direct(hold_origins *self, hold_origin *o)
{
    if (!atomic_load_explicit(&o->asked, memory_order_acquire)) {
        pthread_mutex_lock(&self->lock);
        if (!atomic_load(&o->asked)) {
            char path[32];
            snprintf(path, sizeof path, "/proc/self/fd/%d", o->fd);
            bool usable = ask_alignment(o);
            atomic_store(&o->again, usable && (self->now || (self->loading && is_load(o) &&
                                                             is_marked(o))));
            if (usable && !atomic_load(&o->again))
                o->direct = HOLD_RETRY(hold_sys_openat(AT_FDCWD, path, O_RDONLY | O_DIRECT, 0));
            if (o->direct < 0)
                atomic_store(&o->refused, true);
            atomic_store_explicit(&o->asked, true, memory_order_release);
        }
        pthread_mutex_unlock(&self->lock);
    }
    return !atomic_load_explicit(&o->refused, memory_order_relaxed);
}

/* ---- asking ------------------------------------------------------------------------------- */

static uint64_t unit_end(uint64_t begin, uint64_t stop)
{
    uint64_t end = (begin / HOLD_UNCACHED_UNIT + 1) * HOLD_UNCACHED_UNIT;
    return end < stop ? end : stop;
}

const hold_origin *hold_origins_ask(hold_origins *self, uint32_t file, uint64_t begin,
                                    uint64_t stop, uint64_t *end)
{
    *end = stop;
    if (!self->files || atomic_load_explicit(&self->files[file].refused, memory_order_relaxed))
        return NULL;
    hold_origin *o = &self->files[file];
    int state = cached(self, o, begin, stop);
    if (state == 0) { /* a unit that is not wholly cached counts as not cached */
        uint64_t at = unit_end(begin, stop);
        state = cached(self, o, begin, at);
        for (*end = at; at < stop; *end = at) {
            at = unit_end(at, stop);
            int next = cached(self, o, *end, at);
            if (next == -2 || (next == 1) != (state == 1))
                break;
        }
    }
    if (state == -2)
        hold_origins_refuse(self, file);
    if (state == 1 || state == -2 || !open_direct(self, o))
        return NULL;
    return o;
}

void hold_origins_pass(hold_origins *self, uint32_t file, uint64_t nbytes)
{
    atomic_fetch_add_explicit(&self->files[file].passed, nbytes, memory_order_relaxed);
}

void hold_origins_mark(hold_origins *self)
{
    for (size_t i = 0; self->files && self->loading && i < self->n; i++) {
        hold_origin *o = &self->files[i];
        if (o->nbytes >= HOLD_MARK_LEAST && atomic_load(&o->passed) >= o->nbytes / 2)
            (void)mark(o);
    }
}

/*
 * By a map that is marked for huge pages: what is missing is then read by folios of FOLIO, which
 * later loads copy fastest from, and maps take one entry of a page table for.
 */
int hold_origins_fill(hold_origins *self, uint32_t file, uint64_t begin, uint64_t end)
{
    hold_origin *o = self->files ? &self->files[file] : NULL;
    if (!o || !atomic_load_explicit(&o->again, memory_order_acquire) ||
        cached(self, o, begin, end) == 1)
        return 0;
    begin -= begin % FOLIO;
    end += (FOLIO - end % FOLIO) % FOLIO;
    if (end > o->nbytes)
        end = o->nbytes;
    hold_buffer *map;
    if (begin >= end)
        return -ENODATA;
    int rc = hold_buffer_map(o->fd, begin, (size_t)(end - begin), false, &map);
    if (rc < 0)
        return rc;
    if (sysconf(_SC_PAGESIZE) == 4096)
        (void)hold_expect(map->data, map->nbytes);
    rc = hold_prefetch(map->data, map->nbytes, 1);
    hold_buffer_release(map);
    return rc;
}
