/* publish.c - a file appears under its name whole, or not at all. */
#include <assert.h>
#include <stdlib.h>

#include "closing.h"
#include "draft.h"
#include "hold.h"
#include "rights.h"
#include "sys.h"

struct hold_publication {
    hold_place place;
    hold_draft draft;
    bool existed;    /* a regular file had the name when this began ... */
    hold_rights old; /* ... and had these */
};

/* ---- finding the target ------------------------------------------------------------------- */

static int check_kind(const struct stat *st)
{
    if (S_ISDIR(st->st_mode))
        return -EISDIR;
    return S_ISREG(st->st_mode) ? 0 : -ESPIPE;
}

/*
 * Whether a path leads, by a link of /proc, to a file without a name. What another saver is just
 * taking the name from has none either; that is found by its name, and in the next moment another
 * is.
 */
static bool is_nameless(const char *path, const struct stat *st)
{
    if (st->st_nlink)
        return false;
    const int fd = HOLD_RETRY(hold_sys_openat2(AT_FDCWD, path, O_PATH, 0, HOLD_NO_MAGIC));
    if (fd >= 0)
        (void)hold_sys_close(fd);
    return fd == -ELOOP || fd == -ENOSYS || fd == -EPERM; /* or the kernel does not tell */
}

static int find_writable_target(hold_publication *self, const char *path)
{
    /* The links of /proc (/dev/stdout) lead where their text does not: ask the kernel first. */
    struct stat st;
    int rc = HOLD_RETRY(hold_sys_fstatat(AT_FDCWD, path, &st, 0));
    const bool nameless = rc == 0 && is_nameless(path, &st);
    if (rc == 0)
        rc = check_kind(&st);
    if (rc == -EISDIR || rc == -ESPIPE || rc == -EACCES)
        return rc; /* EACCES may be about a link that is not to be followed */

    rc = hold_place_find(path, false, &self->place, &self->old.st);
    self->existed = rc == 1;
    /* A file that has no name any more, or never had one, is none that can be replaced. */
    if (nameless && !(self->existed && hold_same_file(&st, &self->old.st)))
        return -ESPIPE;
    if (rc <= 0)
        return rc;
    rc = check_kind(&self->old.st);
    if (rc == 0)
        rc = hold_rights_read(self->place.dirfd, self->place.name, &self->old);
    if (rc < 0)
        return rc;
    /* Replacing a file takes no right to write to it: whoever took that right away meant it. */
    return HOLD_RETRY(
        hold_sys_faccessat(self->place.dirfd, self->place.name, W_OK, AT_EACCESS));
}

/* ---- begin and abort ---------------------------------------------------------------------- */

void hold_publish_abort(hold_publication *self)
{
    hold_draft_discard(&self->draft, &self->place);
    hold_place_leave(&self->place);
    free(self);
}

int hold_publish_begin(const char *path, hold_publication **out)
{
    hold_publication *self = calloc(1, sizeof *self);
    if (self == NULL)
        return -ENOMEM;
    self->place.dirfd = -1;
    self->draft.fd = -1;

    int rc = find_writable_target(self, path);
    if (rc == 0) {
        hold_draft_sweep(&self->place);
        /* Never more open than the file it replaces, whose group it does not have yet. */
        const mode_t mode = self->existed ? self->old.st.st_mode & 0700 : 0666;
        rc = hold_draft_create(&self->place, mode, &self->draft);
    }
    if (rc < 0)
        hold_publish_abort(self);
    else
        *out = self;
    return rc;
}

int hold_publish_fd(const hold_publication *self)
{
    return self->draft.fd;
}

/* ---- commit ------------------------------------------------------------------------------- */

/* Network file systems report failed writes at close: ask while the old file is still there. */
static int collect_write_errors(int fd)
{
    const int copy = hold_sys_fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? copy : hold_sys_close(copy);
}

/* All that can fail before the name changes hands. */
static int settle(const hold_publication *self, bool durable)
{
    const int fd = self->draft.fd;
    if (self->existed) {
        const int rc = hold_rights_give(fd, &self->old);
        if (rc < 0)
            return rc;
    }
    return durable ? HOLD_RETRY(hold_sys_fsync(fd)) : HOLD_RETRY(collect_write_errors(fd));
}

/* Make the new name last. */
static int sync_name(const hold_publication *self, bool unnamed)
{
    int rc = 0;
    if (unnamed) /* btrfs writes no metadata of a file without a name: only now it will */
        rc = HOLD_RETRY(hold_sys_fsync(self->draft.fd));
    return rc < 0 ? rc : hold_place_sync(&self->place, self->draft.fd);
}

static int put_back(const hold_place *place, int old)
{
    hold_draft copy;
    hold_rights rights;
    int rc = HOLD_RETRY(hold_sys_fstat(old, &rights.st));
    if (rc == 0)
        rc = hold_rights_read(old, NULL, &rights);
    if (rc == 0)
        rc = hold_draft_create(place, rights.st.st_mode & 0700, &copy);
    if (rc < 0)
        return rc;
    rc = hold_file_copy(old, copy.fd);
    if (rc == 0)
        rc = hold_rights_give(copy.fd, &rights);
    if (rc == 0) {
        (void)HOLD_RETRY(hold_sys_fsync(copy.fd));
        rc = hold_draft_rename(&copy, place, true);
    }
    hold_draft_discard(&copy, place);
    return rc;
}

/*
 * The name is in place but may not last: make it what it was. `old` is the file that had it, or
 * -ENOENT where none had. Does what it can: the caller reports the failure that led here.
 */
static void restore(const hold_publication *self, int old)
{
    const hold_place *place = &self->place;
    if (hold_place_is(place, place->name, self->draft.fd) != 1)
        return; /* another has published since: that stays */
    if (old >= 0)
        (void)put_back(place, old);
    else if (old == -ENOENT)
        (void)HOLD_RETRY(hold_sys_unlinkat(place->dirfd, place->name, 0));
    (void)hold_place_sync(place, self->draft.fd);
}

/* Hold on to what has the name: a descriptor, -ENOENT if nothing, -EACCES if unreadable. */
static int open_old(const hold_place *place)
{
    const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK;
    return HOLD_RETRY(hold_sys_openat(place->dirfd, place->name, flags, 0));
}

/*
 * The same of a large file, not to look into it: with the last descriptor its blocks go, which the
 * rename had to wait for otherwise.
 */
static int hold_large(const hold_publication *self)
{
    if (!self->existed)
        return -ENOENT;
    return hold_close_hold(self->place.dirfd, self->place.name, self->old.st.st_size);
}

static void let_go(const hold_publication *self, int old)
{
    if (self->existed && self->old.st.st_size >= HOLD_CLOSE_LATER_MIN)
        hold_close_later(old);
    else
        hold_sys_close(old);
}

/* Give the draft its name, for good where `durable`. */
static int place_draft(hold_publication *self, bool durable)
{
    const bool unnamed = self->draft.temp[0] == '\0';
    int old = -ENOENT;
    int rc = -EEXIST;

    if (unnamed && !self->existed)
        rc = hold_draft_link(&self->draft, &self->place);
    if (rc < 0) { /* something has the name by now, or the rename finds out what is wrong */
        old = durable ? open_old(&self->place) : hold_large(self);
        if (durable && old < 0 && old != -ENOENT && old != -EACCES)
            return old;
        rc = hold_draft_rename(&self->draft, &self->place, durable);
    }
    if (rc == 0 && durable) {
        rc = sync_name(self, unnamed);
        if (rc < 0)
            restore(self, old);
    }
    if (old >= 0)
        let_go(self, old);
    return rc;
}

int hold_publish_commit(hold_publication *self, bool durable)
{
    assert(self->draft.fd >= 0);
    int rc = settle(self, durable);
    if (rc == 0)
        rc = place_draft(self, durable);
    hold_publish_abort(self); /* of a draft that has its name, this closes the file alone */
    return rc;
}
