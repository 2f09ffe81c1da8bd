/* Ranges that are kept: a table in the order of their addresses, neighbours joined. */
#include "kept.h"

#include "sys.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

#define RANGES_MAX 512
#define PATIENCE 4096 /* looks at a busy table */

typedef struct {
    char *base;
    size_t span; /* ends at a multiple of HOLD_HUGE, unless nothing kept continues it */
} range;

static struct {
    atomic_flag busy;
    atomic_size_t most, bytes;
    size_t n;
    range ranges[RANGES_MAX];
} kept = {.busy = ATOMIC_FLAG_INIT};

static atomic_uint forks;

static void forked(void)
{
    atomic_fetch_add(&forks, 1);
}

static void forked_child(void)
{
    forked();
    if (atomic_flag_test_and_set(&kept.busy)) {
        kept.n = 0;
        atomic_store(&kept.bytes, 0);
    }
    atomic_flag_clear(&kept.busy);
}

static void watch_forks(void)
{
    (void)pthread_atfork(NULL, forked, forked_child);
}

unsigned hold_kept_forks(void)
{
    return atomic_load(&forks);
}

static bool enter(void)
{
    for (int i = 0; i < PATIENCE; i++) {
        if (!atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire))
            return true;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    return false;
}

static void leave(void)
{
    atomic_flag_clear_explicit(&kept.busy, memory_order_release);
}

static void count(size_t more, size_t fewer)
{
    size_t bytes = atomic_load_explicit(&kept.bytes, memory_order_relaxed);
    atomic_store_explicit(&kept.bytes, bytes + more - fewer, memory_order_relaxed);
}

/* Take `nbytes` from the start or the end of range i, or all of it where it has no more. */
static range cut(size_t i, size_t nbytes, bool start)
{
    range *from = &kept.ranges[i], taken = *from;
    if (nbytes < from->span) {
        taken.span = nbytes;
        from->span -= nbytes;
        if (start)
            from->base += nbytes;
        else
            taken.base += from->span;
    } else {
        kept.n--;
        memmove(from, from + 1, (kept.n - i) * sizeof *from);
    }
    count(0, taken.span);
    return taken;
}

size_t hold_kept_give_back(size_t nbytes)
{
    size_t done = 0;
    while (done < nbytes && atomic_load_explicit(&kept.bytes, memory_order_relaxed)) {
        range found = {0};
        while (!enter())
            sched_yield();
        if (kept.n) {
            size_t last = kept.n - 1, span = kept.ranges[last].span;
            /* The start stays a multiple of HOLD_HUGE long, so that what is put there joins it. */
            size_t rest = span > nbytes - done ? (span - (nbytes - done)) & ~(HOLD_HUGE - 1) : 0;
            found = cut(last, span - rest, false);
        }
        leave();
        if (!found.span)
            break;
        hold_sys_munmap(found.base, found.span);
        done += found.span;
    }
    return done;
}

void *hold_kept_take(size_t nbytes, size_t *span)
{
    range found = {0};
    if (!atomic_load_explicit(&kept.bytes, memory_order_relaxed))
        return NULL;
    if (enter()) {
        size_t best = kept.n;
        for (size_t i = 0; i < kept.n; i++)
            if (kept.ranges[i].span >= nbytes &&
                (best == kept.n || kept.ranges[i].span < kept.ranges[best].span))
                best = i;
        if (best < kept.n)
            found = cut(best, (nbytes + HOLD_HUGE - 1) & ~(HOLD_HUGE - 1), true);
        leave();
    }
    if (!found.span) {
        hold_kept_give_back(nbytes);
        return NULL;
    }
    /* As new, whatever its last owner had the kernel do with it. */
    if (HOLD_RETRY(hold_sys_madvise(found.base, found.span, MADV_KEEPONFORK)) < 0 ||
        HOLD_RETRY(hold_sys_madvise(found.base, found.span, MADV_DOFORK)) < 0 ||
        HOLD_RETRY(hold_sys_mprotect(found.base, found.span, PROT_READ | PROT_WRITE)) < 0) {
        hold_sys_munmap(found.base, found.span);
        return NULL;
    }
    *span = found.span;
    return found.base;
}

/* Into its place, joined with the neighbours that it continues; false where there is no room. */
static bool insert(range new)
{
    size_t most = atomic_load_explicit(&kept.most, memory_order_relaxed);
    size_t bytes = atomic_load_explicit(&kept.bytes, memory_order_relaxed);
    if (new.span > most || bytes > most - new.span)
        return false;
    size_t i = kept.n;
    while (i > 0 && kept.ranges[i - 1].base > new.base)
        i--;
    range *at = &kept.ranges[i];
    bool behind = i > 0 && at[-1].base + at[-1].span == new.base;
    bool before = i < kept.n && new.base + new.span == at->base;
    if (behind) {
        at[-1].span += new.span;
        if (before) {
            at[-1].span += at->span;
            kept.n--;
            memmove(at, at + 1, (kept.n - i) * sizeof *at);
        }
    } else if (before) {
        *at = (range){new.base, new.span + at->span};
    } else {
        if (kept.n == RANGES_MAX)
            return false;
        memmove(at + 1, at, (kept.n - i) * sizeof *at);
        *at = new;
        kept.n++;
    }
    count(new.span, 0);
    return true;
}

void hold_kept_put(void *base, size_t span)
{
    bool done = false;
    if (span <= atomic_load_explicit(&kept.most, memory_order_relaxed) &&
        HOLD_RETRY(hold_sys_madvise(base, span, MADV_WIPEONFORK)) >= 0 &&
        HOLD_RETRY(hold_sys_madvise(base, span, MADV_FREE)) >= 0 && enter()) {
        done = insert((range){base, span});
        leave();
    }
    if (!done)
        hold_sys_munmap(base, span);
}

void hold_keep(size_t most)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, watch_forks);
    atomic_store_explicit(&kept.most, most, memory_order_relaxed);
    size_t bytes = atomic_load_explicit(&kept.bytes, memory_order_relaxed);
    if (bytes > most)
        hold_kept_give_back(bytes - most);
}

size_t hold_kept(void)
{
    return atomic_load_explicit(&kept.bytes, memory_order_relaxed);
}

size_t hold_kept_release(void)
{
    return hold_kept_give_back(SIZE_MAX);
}
