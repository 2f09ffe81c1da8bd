/*
 * place.h - a name in a directory: how a path leads to it, and what may stand beside it meanwhile.
 *
 * Whatever is written before it has its final name has a temporary one in the same directory,
 * `.holdfast-<8 hex digits>-<k>.tmp`, of a length that does not depend on the target's. The digits
 * are a hash of the target's name and 0 <= k < HOLD_TEMPS.
 *
 * Locks       What has a temporary name is locked with flock for as long as its owner lives. So one
 *             whose lock can be taken has lost its owner, and who takes the lock may remove it.
 *             Whoever creates a name first and locks it then must look whether the name is still
 *             there (hold_lock_claim). Without flock nobody's temporaries are removed.
 * Errors      0 or -errno, where nothing else is said.
 */
#ifndef HOLD_PLACE_H
#define HOLD_PLACE_H

#include <limits.h>
#include <stdbool.h>
#include <sys/stat.h>

enum { HOLD_TEMPS = 32 }; /* temporary names for one target */

#define HOLD_TEMP_SIZE 40 /* bytes of a temporary name, its end included */

/* A name in a directory, which need not exist. */
typedef struct hold_place {
    int dirfd;     /* O_RDONLY, or O_PATH where the directory may not be read */
    bool readable; /* which of the two */
    char name[NAME_MAX + 1];
} hold_place;

static inline bool hold_same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/*
 * Find where `path` leads, through symbolic links. `folder`: it is to be one, so that slashes may
 * follow, and "." or ".." give -EBUSY; else those and slashes give -EISDIR. A link of another
 * user's in a sticky folder that everybody may write to gives -EACCES. Returns 1 where that exists,
 * and *found is it (never a link), or 0 where it does not. The caller ends `out` with
 * hold_place_leave(), on failure too.
 */
int hold_place_find(const char *path, bool folder, hold_place *out, struct stat *found);

/* Close the directory, unless that was done. */
void hold_place_leave(hold_place *self);

/* Whether `name` in the directory of `place` is the file or folder `fd`: 1 or 0, or -errno. */
int hold_place_is(const hold_place *place, const char *name, int fd);

/* The k-th temporary name. */
void hold_place_temp(const hold_place *place, unsigned k, char out[HOLD_TEMP_SIZE]);

/* Make the names in the directory last. `fd` is something open on the same file system. */
int hold_place_sync(const hold_place *place, int fd);

/* Lock `fd`; 0 where the file system has no locks, too. -EWOULDBLOCK: another has it. */
int hold_lock_own(int fd);

/* Lock what was just created as `name`: 1 if it is ours, 0 if another removed it, or -errno. */
int hold_lock_claim(const hold_place *place, const char *name, int fd);

#endif
