/* A read lease on a file, and its pages mapped meanwhile. */
#include "lease.h"

#include "sys.h"

#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif
#ifndef F_SETSIG
#define F_SETSIG 10
#endif

#define HUGE ((uint64_t)2 << 20) /* what one entry of a page table maps, at most */
#define MISSES 16 /* stretches in a row that were not mapped so, and the others are not tried */

void hold_lease_begin(hold_lease *self)
{
    *self = (hold_lease){.fd = -1, .pagemap = -1};
    pthread_mutex_init(&self->lock, NULL);
}

void hold_lease_end(hold_lease *self)
{
    if (self->map)
        hold_buffer_release(self->map);
    if (self->pagemap >= 0)
        (void)hold_sys_close(self->pagemap);
    if (self->fd >= 0)
        (void)hold_sys_close(self->fd);
    pthread_mutex_destroy(&self->lock);
}

/* A descriptor of its own for the file of `fd`, and a map: 0 or -errno. */
static int prepare(hold_lease *self, int fd)
{
    char path[32];
    struct stat st;
    int rc = HOLD_RETRY(hold_sys_fstat(fd, &st));
    if (rc < 0)
        return rc;
    /* The kernel asks for no less; whom it would refuse, security modules would write down. */
    if (!S_ISREG(st.st_mode) || (st.st_uid != geteuid() && geteuid() != 0))
        return -EACCES;
    if ((uint64_t)st.st_size < HUGE)
        return -EOPNOTSUPP;
    self->pagemap = HOLD_RETRY(hold_sys_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY, 0));
    if (self->pagemap < 0)
        return self->pagemap;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    self->fd = HOLD_RETRY(hold_sys_openat(AT_FDCWD, path, O_RDONLY, 0));
    if (self->fd < 0)
        return self->fd;
    return hold_buffer_map(self->fd, 0, (size_t)st.st_size, false, &self->map);
}

static void give_back(hold_lease *self)
{
    /* It cannot fail but where it is not held; and closing the descriptor ends it, too. */
    (void)HOLD_RETRY(hold_sys_fcntl(self->fd, F_SETLEASE, F_UNLCK));
}

/* Have the lease, and the file as long as its map. */
static bool take(hold_lease *self)
{
    struct stat st;
    /* Before each lease: the default, SIGIO, ends a process; and the end of a lease restores it. */
    int rc = HOLD_RETRY(hold_sys_fcntl(self->fd, F_SETSIG, SIGURG));
    if (rc == 0)
        rc = HOLD_RETRY(hold_sys_fcntl(self->fd, F_SETLEASE, F_RDLCK));
    if (rc == -EAGAIN) /* somebody has it open for writing, for now */
        return false;
    if (rc == 0) {
        rc = HOLD_RETRY(hold_sys_fstat(self->fd, &st));
        if (rc == 0 && (uint64_t)st.st_size >= self->map->nbytes)
            return true;
        give_back(self);
    }
    self->refused = true;
    return false;
}

/* The lock is held. */
static bool enter(hold_lease *self, int fd)
{
    if (!self->refused && !self->map && prepare(self, fd) < 0)
        self->refused = true;
    if (self->refused)
        return false;
    if (self->users == 0 ? !take(self)
                         : HOLD_RETRY(hold_sys_fcntl(self->fd, F_GETLEASE, 0)) != F_RDLCK)
        return false;
    self->users++;
    return true;
}

/* The same. */
static void leave(hold_lease *self)
{
    if (--self->users == 0)
        give_back(self);
}

void hold_lease_leave(hold_lease *self)
{
    pthread_mutex_lock(&self->lock);
    leave(self);
    pthread_mutex_unlock(&self->lock);
}

/* Up to where the units of the map, from that of `begin` to that before `stop`, are mapped whole. */
static uint64_t mapped_whole(hold_lease *self, uint64_t begin, uint64_t stop)
{
    char *base = self->map->data;
    uint64_t found = begin & ~(HUGE - 1);
    /* The first unit tells whether it is worth to map more of them. */
    const uint64_t ends[2] = {found + HUGE, (stop + HUGE - 1) & ~(HUGE - 1)};
    for (int i = 0; i < 2 && (i == 0 || found == ends[0]); i++) {
        uint64_t whole;
        for (uint64_t at = found; at < ends[i]; at += HUGE)
            if (HOLD_RETRY(hold_sys_madvise(base + at, 1, MADV_POPULATE_READ)) < 0)
                return found;
        if (HOLD_RETRY(hold_sys_mapped_huge(self->pagemap, base + found, (size_t)(ends[i] - found),
                                            &whole)) < 0)
            return found;
        found += whole;
    }
    return found;
}

const char *hold_lease_enter(hold_lease *self, int fd, uint64_t begin, uint64_t stop,
                             uint64_t *end)
{
    pthread_mutex_lock(&self->lock);
    bool entered = enter(self, fd);
    pthread_mutex_unlock(&self->lock);
    if (!entered)
        return NULL;
    if (stop > self->map->nbytes)
        stop = self->map->nbytes;
    *end = mapped_whole(self, begin, stop);
    if (*end > stop)
        *end = stop;
    bool hit = *end > begin;
    pthread_mutex_lock(&self->lock);
    self->misses = hit ? 0 : self->misses + 1;
    self->refused |= self->misses >= MISSES;
    if (!hit)
        leave(self);
    pthread_mutex_unlock(&self->lock);
    return hit ? self->map->data : NULL;
}
