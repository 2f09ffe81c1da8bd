/*
 * uncached.h - which bytes of a file are in the page cache, and a way to the others past it.
 *
 * An origin is a file that a call reads from: the caller's descriptor, and, once bytes are met that
 * are not in the page cache, a second one for the same file with O_DIRECT, opened through
 * /proc/self/fd. What cannot be had (no /proc, no permission, a file system that is not known to
 * do it well, no way to ask what is cached) is refused once and for the whole call; then all is
 * read through the page cache, as if this file did not exist. Asking brings nothing into the cache
 * and starts no readahead; that is why it is not preadv2(RWF_NOWAIT), which does both.
 *
 * A file that is loaded once need not be in the page cache; one that is loaded again should be.
 * Which it is the cache itself remembers: a load past it leaves one page there, alone in the midst
 * of the file (the mark), and the next load that finds it brings the file into the cache. With the
 * cache emptied, or short of room, the mark is gone and the file one that nobody has loaded.
 */
#ifndef HOLD_UNCACHED_H
#define HOLD_UNCACHED_H

#include <pthread.h>

#include "hold.h"

/* Asked about at a time where a range is cached in part; cached and uncached stretches begin at its
 * multiples. */
#define HOLD_UNCACHED_UNIT ((uint64_t)512 << 10)
/* Offsets and lengths may have to be multiples of this much, and of no more, in direct reads. */
#define HOLD_UNCACHED_ALIGN_MAX ((size_t)64 << 10)

typedef struct hold_origin {
    int fd;             /* the caller's */
    int direct;         /* the second one; -1 while it is not open */
    atomic_bool asked;  /* the fields below it and `direct` are what they will be */
    atomic_bool refused;
    atomic_bool again;  /* loaded before, as the mark says: refused, to be brought into the cache */
    atomic_uint_fast64_t passed; /* bytes that were read past the cache */
    uint64_t nbytes;    /* of the file */
    uint64_t wanted;    /* bytes that the call reads of it */
    size_t mem_align;   /* what direct reads ask of memory: a power of two, like ... */
    uint64_t align;     /* ... that of offsets and lengths; mem_align is no larger */
    atomic_bool mapped; /* cachestat(2) is missing: mincore(2) of this map, of */
    char *map;          /* [0, map_nbytes) */
    size_t map_nbytes;
} hold_origin;

typedef struct hold_origins {
    hold_origin *files; /* NULL: everything through the page cache */
    size_t n;
    bool loading; /* marks are looked for, and left */
    bool now;     /* what is missing is brought into the cache, whatever marks say */
    pthread_mutex_t lock; /* one at a time opens and maps */
} hold_origins;

/* Begin with n files. Where there is no memory, everything goes through the page cache. */
void hold_origins_begin(hold_origins *self, const int *fds, size_t n);
/* So many bytes of the file will be read to memory, or for their checksum alone; `fill` is a
 * HOLD_FILL_*. To be called before others ask. */
void hold_origins_want(hold_origins *self, uint32_t file, uint64_t nbytes, bool to_memory,
                       int fill);
/* Close and unmap what was opened; the fds are the caller's. */
void hold_origins_end(hold_origins *self);

/* So many bytes of the file are read directly. */
void hold_origins_pass(hold_origins *self, uint32_t file, uint64_t nbytes);

/* Leave a mark in each file of which at least half was read so. */
void hold_origins_mark(hold_origins *self);

/* Bring [begin, end) into the page cache, if the file is one to be brought there. 0 or -errno. */
int hold_origins_fill(hold_origins *self, uint32_t file, uint64_t begin, uint64_t end);

/*
 * The file, ready for direct reads, if the bytes from `begin` on are to be read so, else NULL.
 * *end, at most `stop`, is where that changes. Threads: any number at once.
 */
const hold_origin *hold_origins_ask(hold_origins *self, uint32_t file, uint64_t begin,
                                    uint64_t stop, uint64_t *end);

/* Read no more of this file directly: it was refused. */
void hold_origins_refuse(hold_origins *self, uint32_t file);

#endif
