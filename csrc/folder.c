/* folder.c - a folder appears under its name whole, or not at all. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "draft.h"
#include "hold.h"
#include "place.h"
#include "rights.h"
#include "sys.h"
#include "tree.h"

enum { LOCK_TRIES = 2000 }; /* one each PAUSE, of a ms */
static const struct timespec PAUSE = {.tv_nsec = 1000000};
enum { NAME_TRIES = 100 };

struct hold_folder {
    hold_place place;
    int fd;                    /* the new folder, locked until it has its name */
    int old_fd;                /* what has the name at commit, or -errno */
    bool old_locked;           /* so that nobody else removes it, and makes its name another's */
    pid_t owner;               /* a forked child must not remove what its parent fills */
    char temp[HOLD_TEMP_SIZE]; /* what is to be removed at the end; empty: nothing */
    bool replace;
    bool exact;                /* ... and nothing but what old_fd is */
    bool complete;             /* nothing is missing but the name */
    bool existed;              /* a folder had the name when this began ... */
    hold_rights old;           /* ... and had these */
};

/* How the new folder got its name. */
typedef enum { FREE_NAME, EXCHANGED, SET_ASIDE } manner;

static int open_folder(const hold_place *place, const char *name)
{
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_NONBLOCK;
    return HOLD_RETRY(hold_sys_openat(place->dirfd, name, flags, 0));
}

static int rename_in(const hold_place *place, const char *from, const char *to)
{
    return HOLD_RETRY(hold_sys_renameat(place->dirfd, from, place->dirfd, to));
}

/* The name under which an old folder is kept while `temp` takes its place in two steps. */
static void aside_name(const char *temp, char out[HOLD_TEMP_SIZE])
{
    memcpy(out, temp, HOLD_TEMP_SIZE);
    memcpy(out + strlen(out) - 3, "old", 3);
}

/* ---- the temporaries of others ------------------------------------------------------------ */

/* Remove the folder `name` if its owner is dead; or, with `back`, give it the target's name. */
static bool settle_dead(const hold_place *place, const char *name, bool back)
{
    struct stat st;
    bool done = false;
    if (HOLD_RETRY(hold_sys_fstatat(place->dirfd, name, &st, AT_SYMLINK_NOFOLLOW)) < 0 ||
        !S_ISDIR(st.st_mode))
        return false;
    const int fd = open_folder(place, name);
    if (fd < 0)
        return false;
    /* Its owner may have renamed it, and ended, since it was opened. */
    if (HOLD_RETRY(hold_sys_flock(fd, LOCK_EX | LOCK_NB)) == 0 &&
        hold_place_is(place, name, fd) == 1)
        done = (back ? rename_in(place, name, place->name) : hold_tree_remove(place->dirfd, name))
               == 0;
    hold_sys_close(fd);
    return done;
}

/* What a process that died between two renames has left: the old folder. Whether it is back. */
static bool recover(const hold_place *place)
{
    char temp[HOLD_TEMP_SIZE], aside[HOLD_TEMP_SIZE];
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(place, k, temp);
        aside_name(temp, aside);
        if (settle_dead(place, aside, true))
            return true;
    }
    return false;
}

static void sweep(const hold_place *place)
{
    char temp[HOLD_TEMP_SIZE], aside[HOLD_TEMP_SIZE];
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(place, k, temp);
        aside_name(temp, aside);
        (void)settle_dead(place, temp, false);
        (void)settle_dead(place, aside, false);
    }
}

/* ---- begin and abort ---------------------------------------------------------------------- */

void hold_folder_abort(hold_folder *self)
{
    if (self->temp[0] != '\0' && self->owner == getpid())
        (void)hold_tree_remove(self->place.dirfd, self->temp);
    if (self->fd >= 0)
        hold_sys_close(self->fd);
    if (self->old_fd >= 0)
        hold_sys_close(self->old_fd);
    hold_place_leave(&self->place);
    free(self);
}

/* -EEXIST where a folder with something in it has the name. */
static int check_empty(const hold_folder *self)
{
    const int fd = open_folder(&self->place, self->place.name);
    if (fd == -ENOENT || fd == -EACCES)
        return 0; /* the rename will tell */
    if (fd < 0)
        return fd;
    const int rc = hold_tree_is_empty(fd);
    hold_sys_close(fd);
    return rc == 0 ? -EEXIST : rc < 0 ? rc : 0;
}

/* May the folder that has the name be replaced? */
static int check_old(hold_folder *self)
{
    const hold_place *place = &self->place;
    if (!S_ISDIR(self->old.st.st_mode))
        return -ENOTDIR;
    int rc = hold_rights_read(place->dirfd, place->name, &self->old);
    /* Renaming takes no right to write to it: whoever took that right away meant it. */
    if (rc == 0)
        rc = HOLD_RETRY(hold_sys_faccessat(place->dirfd, place->name, W_OK | X_OK, AT_EACCESS));
    return rc < 0 || self->replace ? rc : check_empty(self);
}

static int find_target(hold_folder *self, const char *path)
{
    /* The links of /proc lead where their text does not: ask the kernel first. */
    int rc = HOLD_RETRY(hold_sys_fstatat(AT_FDCWD, path, &self->old.st, 0));
    if (rc == 0 && !S_ISDIR(self->old.st.st_mode))
        return -ENOTDIR;
    if (rc == -EACCES) /* it may be about a link that is not to be followed */
        return rc;
    rc = hold_place_find(path, true, &self->place, &self->old.st);
    if (rc == 0 && recover(&self->place))
        rc = hold_place_find(path, true, &self->place, &self->old.st);
    self->existed = rc == 1;
    return rc == 1 ? check_old(self) : rc;
}

/* The mode while it is being filled: what it will have, but never without the owner's rights. */
static int inherit(const hold_folder *self, mode_t more)
{
    hold_rights model = self->old;
    model.st.st_mode |= more;
    return hold_rights_give(self->fd, &model);
}

/* Make the new folder `self->temp`: 1, or 0 where that name is another's, or -errno. */
static int make_new(hold_folder *self)
{
    const hold_place *place = &self->place;
    /* Never more open than the folder it replaces, whose group it does not have yet. */
    const mode_t mode = self->existed ? 0700 : 0777;
    int rc = HOLD_RETRY(hold_sys_mkdirat(place->dirfd, self->temp, mode));
    if (rc < 0) {
        self->temp[0] = '\0';
        return rc == -EEXIST ? 0 : rc;
    }
    self->fd = open_folder(place, self->temp);
    if (self->fd == -ENOENT) { /* somebody took it for a dead one's, and removed it */
        self->temp[0] = '\0';
        return 0;
    }
    rc = self->fd < 0 ? self->fd : hold_lock_claim(place, self->temp, self->fd);
    if (rc == 0) {
        self->temp[0] = '\0';
        hold_sys_close(self->fd);
        self->fd = -1;
    }
    return rc;
}

static int create(hold_folder *self)
{
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(&self->place, k, self->temp);
        const int rc = make_new(self);
        if (rc == 1)
            return self->existed ? inherit(self, 0700) : 0;
        if (rc < 0)
            return rc;
    }
    return -EBUSY;
}

int hold_folder_begin(const char *path, bool replace, hold_folder **out)
{
    hold_folder *self = calloc(1, sizeof *self);
    if (self == NULL)
        return -ENOMEM;
    self->place.dirfd = self->fd = self->old_fd = -1;
    self->owner = getpid();
    self->replace = replace;

    int rc = find_target(self, path);
    if (rc == 0) {
        sweep(&self->place);
        rc = create(self);
    }
    if (rc < 0)
        hold_folder_abort(self);
    else
        *out = self;
    return rc;
}

int hold_folder_fd(const hold_folder *self)
{
    return self->fd;
}

/* ---- what may be replaced ------------------------------------------------------------------ */

int hold_folder_look(hold_folder *self)
{
    if (self->old_fd >= 0)
        hold_sys_close(self->old_fd);
    self->old_locked = false;
    self->old_fd = open_folder(&self->place, self->place.name);
    if (self->old_fd == -ELOOP)
        self->old_fd = -ENOTDIR;
    return self->old_fd;
}

int hold_folder_allow(hold_folder *self, bool replace)
{
    self->exact = true;
    self->replace = replace;
    /* Where there was none, the rename will tell whether one came since: it is to be asked
     * about. */
    if (replace || self->old_fd == -ENOENT)
        return 0;
    const int rc = check_empty(self);
    /* One that lost its name meanwhile was being removed when it was looked at: that told
     * nothing. */
    const bool lost =
        rc == -EEXIST && hold_place_is(&self->place, self->place.name, self->old_fd) == 0;
    return lost ? 1 : rc;
}

/* ---- commit ------------------------------------------------------------------------------- */

/* hold_place_is, which may fail once. */
static bool is_surely(const hold_place *place, const char *name, int fd)
{
    const int rc = hold_place_is(place, name, fd);
    return (rc < 0 ? hold_place_is(place, name, fd) : rc) == 1;
}

/* Rename to a name that nothing has, or an empty folder. */
static int take_free_name(hold_folder *self)
{
    const int rc = rename_in(&self->place, self->temp, self->place.name);
    if (rc == 0)
        self->temp[0] = '\0';
    if (rc != -ENOTEMPTY && rc != -EEXIST)
        return rc;
    /* What came since it was looked at, folder or file, has yet to be asked about. */
    return self->exact && (self->old_fd == -ENOENT || check_empty(self) == -EEXIST) ? 1 : -EEXIST;
}

/* Two renames, where no call exchanges two folders. */
static int take_in_two_steps(hold_folder *self)
{
    char aside[HOLD_TEMP_SIZE];
    aside_name(self->temp, aside);
    int rc = rename_in(&self->place, self->place.name, aside);
    if (rc < 0)
        return rc;
    rc = rename_in(&self->place, self->temp, self->place.name);
    if (rc < 0)
        (void)rename_in(&self->place, aside, self->place.name);
    else
        memcpy(self->temp, aside, sizeof aside);
    return rc;
}

/* Give the new folder its name. Afterwards self->temp is what is to be removed. */
static int take_name(hold_folder *self, manner *how)
{
    const hold_place *place = &self->place;
    *how = FREE_NAME;
    if (!self->replace || self->old_fd == -ENOENT)
        return take_free_name(self);
    *how = EXCHANGED;
    const int rc =
        HOLD_RETRY(hold_sys_exchange(place->dirfd, self->temp, place->dirfd, place->name));
    if (rc != -EINVAL && rc != -ENOSYS && rc != -EOPNOTSUPP)
        return rc;
    *how = SET_ASIDE;
    return take_in_two_steps(self);
}

/* An empty folder, as the one was over which the new one was renamed. */
static void make_empty(const hold_folder *self)
{
    const hold_place *place = &self->place;
    if (HOLD_RETRY(hold_sys_mkdirat(place->dirfd, place->name, self->old.st.st_mode & 0777)) < 0)
        return;
    const int fd = open_folder(place, place->name);
    if (fd < 0)
        return;
    (void)hold_rights_give(fd, &self->old);
    hold_sys_close(fd);
}

/*
 * Lock the folder that is to be replaced, if that can be had. Of all who ask about it only the one
 * that has the lock, and then still finds it by its name, goes on: false where another was first.
 */
static bool claim_old(hold_folder *self)
{
    const hold_place *place = &self->place;
    if (self->old_fd < 0)
        return true;
    if (!self->exact) {
        self->old_locked = hold_lock_own(self->old_fd) == 0;
        return true;
    }
    for (int tries = 0; tries < LOCK_TRIES; tries++) {
        const int rc = hold_lock_claim(place, place->name, self->old_fd);
        self->old_locked = rc == 1;
        if (rc != 0)
            return true;
        if (hold_place_is(place, place->name, self->old_fd) == 0)
            return false;
        nanosleep(&PAUSE, NULL);
    }
    return true;
}

/*
 * Whether the folder that had the name, now self->temp, is this process's to remove or to put back.
 * One that was published a moment ago is locked until its publisher has seen to its name; what is
 * locked for longer than that is left to the next sweep.
 */
static bool own_old(hold_folder *self)
{
    for (int tries = 0; !self->old_locked && tries < LOCK_TRIES && self->old_fd >= 0; tries++) {
        self->old_locked = hold_lock_own(self->old_fd) == 0;
        if (!self->old_locked)
            nanosleep(&PAUSE, NULL);
    }
    return self->old_locked && is_surely(&self->place, self->temp, self->old_fd);
}

/* Undo take_name: what was moved away gets its name back, and the new folder is `temp` again. */
static bool undo(hold_folder *self, const char *temp, manner how)
{
    const hold_place *place = &self->place;
    int rc;
    if (how == EXCHANGED)
        rc = HOLD_RETRY(hold_sys_exchange(place->dirfd, temp, place->dirfd, place->name));
    else
        rc = rename_in(place, place->name, temp);
    if (rc < 0)
        return false;
    if (how == SET_ASIDE)
        (void)rename_in(place, self->temp, place->name);
    if (how == FREE_NAME && self->existed)
        make_empty(self);
    memcpy(self->temp, temp, HOLD_TEMP_SIZE);
    (void)hold_place_sync(place, self->fd);
    return true;
}

/*
 * The name is in place but may not last: make it what it was, and the new folder what is to be
 * removed, or return false. The caller reports the failure that led here.
 */
static bool restore(hold_folder *self, const char *temp, manner how)
{
    const hold_place *place = &self->place;
    if (hold_place_is(place, place->name, self->fd) != 1)
        return false; /* another has published since: that stays */
    if (how != FREE_NAME && !own_old(self))
        return false; /* the old one is gone */
    return undo(self, temp, how);
}

/* What was moved away is none of what may be replaced: put it back. 1, to be tried again, or
 * -EBUSY, where others are faster still; then it stays where it is. */
static int put_back(hold_folder *self, const char *temp, manner how)
{
    const hold_place *place = &self->place;
    /* After an exchange with the folder of a third one, that must not be taken for the new one. */
    if (is_surely(place, place->name, self->fd) && undo(self, temp, how) &&
        is_surely(place, temp, self->fd))
        return 1;
    self->temp[0] = '\0';
    return -EBUSY;
}

/* Give the folder its name, for good where `durable`; 1: it is as it was, to be tried again. */
static int place_folder(hold_folder *self, bool durable)
{
    char temp[HOLD_TEMP_SIZE];
    manner how;
    int rc = -EEXIST;
    memcpy(temp, self->temp, sizeof temp);
    /* Whatever has the name may be replaced: also what came since it was looked at. */
    for (int tries = 0; rc == -EEXIST && tries < NAME_TRIES; tries++) {
        if (!self->exact)
            (void)hold_folder_look(self);
        if (self->old_fd < 0 && self->old_fd != -ENOENT && self->old_fd != -EACCES)
            return self->old_fd;
        if (!claim_old(self))
            return 1;
        rc = take_name(self, &how);
        if (self->exact || !self->replace)
            break;
    }
    /* What was looked at may have been removed since. */
    if (rc == -ENOENT && self->exact && self->old_fd >= 0 &&
        hold_place_is(&self->place, self->place.name, self->old_fd) == 0)
        return 1;
    if (rc != 0)
        return rc;
    if (self->exact && how != FREE_NAME && !is_surely(&self->place, self->temp, self->old_fd))
        return put_back(self, temp, how);
    rc = durable ? hold_place_sync(&self->place, self->fd) : 0;
    if (rc < 0) {
        if (restore(self, temp, how))
            return rc;
        self->temp[0] = '\0'; /* the new one may not last: the old one stays, if not by its name */
    }
    (void)HOLD_RETRY(hold_sys_flock(self->fd, LOCK_UN)); /* who replaces it waits for that */
    if (self->temp[0] != '\0' && !own_old(self))
        self->temp[0] = '\0';
    return rc;
}

int hold_folder_complete(hold_folder *self, bool durable)
{
    assert(self->fd >= 0);
    int rc = durable ? hold_tree_sync(self->fd) : 0;
    if (rc == 0 && self->existed) {
        rc = inherit(self, 0);
        if (rc == 0 && durable && (self->old.st.st_mode & 0700) != 0700)
            rc = HOLD_RETRY(hold_sys_fsync(self->fd)); /* only now it has its mode */
    }
    self->complete = rc == 0;
    return rc;
}

int hold_folder_commit(hold_folder *self, bool durable)
{
    assert(self->complete);
    const int rc = place_folder(self, durable);
    if (rc != 1)
        hold_folder_abort(self); /* of one that has its name, this removes what had it */
    return rc;
}
