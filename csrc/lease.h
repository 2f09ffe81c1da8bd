/*
 * lease.h - the cached pages of a file as memory to copy from, while nobody can cut them off.
 *
 * Copying out of a map is faster than read(2), which copies page by page, where the page cache
 * holds the file in folios of 2 MiB that are mapped as such; with smaller ones, making and undoing
 * the page tables costs what is gained (docs/decisions/0013). And a file that is cut short while it
 * is copied from a map is a SIGBUS. So a map is only used under a read lease (fcntl(2), F_SETLEASE):
 * the kernel grants it while no one has the file open for writing, and makes who then wants to open
 * it so, or to truncate it, wait until the lease is given back. It is held while pieces of some MiB
 * are copied and not longer, by a descriptor that is the lease's own; a new writer waits for
 * milliseconds, and no more pieces are begun once there is one. What the kernel sends to tell so is
 * SIGURG, which is ignored unless a program wants it.
 */
#ifndef HOLD_LEASE_H
#define HOLD_LEASE_H

#include <pthread.h>

#include "hold.h"

typedef struct hold_lease {
    pthread_mutex_t lock; /* of all that follows */
    hold_buffer *map;     /* of the whole file; NULL until it is first wanted */
    int fd;               /* which has the lease; -1 */
    int pagemap;          /* asked how the map is mapped; -1 */
    int users;            /* the lease is held while there are any */
    int misses;           /* in a row */
    bool refused;         /* it cannot be had, or is of no use */
} hold_lease;

/* Begin without any of it; hold_lease_end when no user is left. */
void hold_lease_begin(hold_lease *self);
void hold_lease_end(hold_lease *self);

/*
 * The first byte of the file that `fd` is open for, in memory, if those from `begin` on can be
 * copied from there until hold_lease_leave(); else NULL. *end, at most `stop`, is how far. `begin`
 * to `stop` is in the page cache. Threads: any number at once.
 */
const char *hold_lease_enter(hold_lease *self, int fd, uint64_t begin, uint64_t stop,
                             uint64_t *end);
void hold_lease_leave(hold_lease *self);

#endif
