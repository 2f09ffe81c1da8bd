/*
 * draft.h - a file that does not have its final name yet.
 *
 * A draft is unnamed (O_TMPFILE), or, where the file system has no such files, has a temporary name
 * beside the target (place.h). An unnamed draft has a temporary name too for the moment between
 * link and rename, as no call names a file over another. It is locked for as long as it lives.
 *
 * Errors      0 or -errno.
 * Threads     Different drafts may be used by different threads and processes at once, for the
 *             same target as well.
 */
#ifndef HOLD_DRAFT_H
#define HOLD_DRAFT_H

#include <stdbool.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "place.h"

typedef struct hold_draft {
    int fd;        /* open for reading and writing */
    pid_t owner;   /* a forked child must not remove what its parent writes */
    char temp[HOLD_TEMP_SIZE]; /* its temporary name; empty while it is unnamed */
} hold_draft;

/*
 * A new, empty, locked draft in the directory of `place`, of mode `mode & ~umask`. On success the
 * caller ends it with hold_draft_discard(); on failure nothing is left. EBUSY where all temporary
 * names of this target are in use.
 */
int hold_draft_create(const hold_place *place, mode_t mode, hold_draft *out);

/* Name an unnamed draft `place`, if nothing has that name: else EEXIST. */
int hold_draft_link(const hold_draft *self, const hold_place *place);

/*
 * Name the draft `place`, replacing what has that name. Where the file system makes unnamed files
 * but cannot name them, the draft becomes a named one by copying (flushed to the device where
 * `durable`). On failure no temporary name is left.
 */
int hold_draft_rename(hold_draft *self, const hold_place *place, bool durable);

/* Close the draft; if it still has a temporary name, remove that. */
void hold_draft_discard(hold_draft *self, const hold_place *place);

/* Remove the temporaries of `place` whose owners are dead. Failures are left to the next sweep. */
void hold_draft_sweep(const hold_place *place);

/* Copy all bytes of the file `from` into the empty file `to`, sharing them where that can be. */
int hold_file_copy(int from, int to);

#endif
