/* draft.c - files that do not have their final name yet. */
#include "draft.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "rights.h"
#include "sys.h"

/* ---- the temporaries of others ----------------------------------------------------------- */

static void remove_if_dead(const hold_place *place, const char *name)
{
    /* For writing: NFS makes of flock a lock of its own, which asks for that. */
    const int flags = O_WRONLY | O_NOFOLLOW | O_NONBLOCK;
    const int fd = HOLD_RETRY(hold_sys_openat(place->dirfd, name, flags, 0));
    if (fd < 0)
        return;
    /* Its owner may have renamed it, and ended, since it was opened. */
    if (HOLD_RETRY(hold_sys_flock(fd, LOCK_EX | LOCK_NB)) == 0 &&
        hold_place_is(place, name, fd) == 1)
        (void)HOLD_RETRY(hold_sys_unlinkat(place->dirfd, name, 0));
    hold_sys_close(fd);
}

void hold_draft_sweep(const hold_place *place)
{
    char temp[HOLD_TEMP_SIZE];
    struct stat st;
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(place, k, temp);
        if (HOLD_RETRY(hold_sys_fstatat(place->dirfd, temp, &st, AT_SYMLINK_NOFOLLOW)) == 0 &&
            S_ISREG(st.st_mode))
            remove_if_dead(place, temp);
    }
}

/* ---- creating ----------------------------------------------------------------------------- */

static int create_unnamed(const hold_place *place, mode_t mode, hold_draft *out)
{
    out->temp[0] = '\0';
    out->fd = HOLD_RETRY(hold_sys_openat(place->dirfd, ".", O_TMPFILE | O_RDWR, mode));
    if (out->fd < 0)
        return out->fd;
    const int rc = hold_lock_own(out->fd);
    if (rc < 0)
        hold_draft_discard(out, place);
    return rc;
}

static int create_named(const hold_place *place, mode_t mode, hold_draft *out)
{
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(place, k, out->temp);
        out->fd = HOLD_RETRY(hold_sys_openat(place->dirfd, out->temp,
                                             O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, mode));
        if (out->fd == -EEXIST)
            continue;
        if (out->fd < 0)
            return out->fd;
        const int rc = hold_lock_claim(place, out->temp, out->fd);
        if (rc == 1)
            return 0;
        if (rc == 0)
            out->temp[0] = '\0';
        hold_draft_discard(out, place);
        if (rc < 0)
            return rc;
    }
    return -EBUSY;
}

int hold_draft_create(const hold_place *place, mode_t mode, hold_draft *out)
{
    out->owner = getpid();
    const int rc = create_unnamed(place, mode, out);
    switch (rc) {
    case -EOPNOTSUPP: /* the file system has none */
    case -EINVAL:
    case -EISDIR: /* the kernel has none */
    case -ENOENT:
        return create_named(place, mode, out);
    default:
        return rc;
    }
}

void hold_draft_discard(hold_draft *self, const hold_place *place)
{
    if (self->temp[0] != '\0' && self->owner == getpid())
        (void)HOLD_RETRY(hold_sys_unlinkat(place->dirfd, self->temp, 0));
    self->temp[0] = '\0';
    if (self->fd >= 0)
        hold_sys_close(self->fd);
    self->fd = -1;
}

/* ---- naming ------------------------------------------------------------------------------- */

static int link_as(const hold_draft *self, const hold_place *place, const char *name)
{
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", self->fd);
    const int rc =
        HOLD_RETRY(hold_sys_linkat(AT_FDCWD, path, place->dirfd, name, AT_SYMLINK_FOLLOW));
    if (rc != -ENOENT)
        return rc;
    /* Where /proc is not mounted; takes a capability or a kernel from 6.10 on. */
    return HOLD_RETRY(hold_sys_linkat(self->fd, "", place->dirfd, name, AT_EMPTY_PATH));
}

int hold_draft_link(const hold_draft *self, const hold_place *place)
{
    return link_as(self, place, place->name);
}

/* Whether an unnamed file may be one that cannot be given a name here. */
static bool link_is_impossible(int rc)
{
    return rc == -ENOENT || rc == -EPERM || rc == -EXDEV || rc == -EOPNOTSUPP || rc == -ENOSYS ||
           rc == -EINVAL;
}

/* Make a named draft of an unnamed one. */
static int name_by_copy(hold_draft *self, const hold_place *place, bool durable)
{
    hold_draft copy = {.fd = -1, .owner = self->owner};
    hold_rights rights;
    int rc = HOLD_RETRY(hold_sys_fstat(self->fd, &rights.st));
    if (rc == 0)
        rc = hold_rights_read(self->fd, NULL, &rights);
    if (rc == 0)
        rc = create_named(place, rights.st.st_mode & 0700, &copy);
    if (rc < 0)
        return rc;
    rc = hold_file_copy(self->fd, copy.fd);
    if (rc == 0)
        rc = hold_rights_give(copy.fd, &rights);
    if (rc == 0 && durable)
        rc = HOLD_RETRY(hold_sys_fsync(copy.fd));
    if (rc < 0) {
        hold_draft_discard(&copy, place);
        return rc;
    }
    hold_draft_discard(self, place);
    *self = copy;
    return 0;
}

static int rename_named(hold_draft *self, const hold_place *place)
{
    const int rc =
        HOLD_RETRY(hold_sys_renameat(place->dirfd, self->temp, place->dirfd, place->name));
    if (rc < 0)
        (void)HOLD_RETRY(hold_sys_unlinkat(place->dirfd, self->temp, 0));
    self->temp[0] = '\0';
    return rc;
}

/* *linked is whether it came as far as the rename. */
static int link_and_rename(hold_draft *self, const hold_place *place, bool *linked)
{
    for (unsigned k = 0; k < HOLD_TEMPS; k++) {
        hold_place_temp(place, k, self->temp);
        const int rc = link_as(self, place, self->temp);
        /* A process killed here leaves the name to the next sweep: no call may come between. */
        *linked = rc == 0;
        if (rc == 0)
            return rename_named(self, place);
        self->temp[0] = '\0';
        if (rc != -EEXIST)
            return rc;
    }
    return -EBUSY;
}

int hold_draft_rename(hold_draft *self, const hold_place *place, bool durable)
{
    if (self->temp[0] == '\0') {
        bool linked = false;
        int rc = link_and_rename(self, place, &linked);
        if (linked || !link_is_impossible(rc))
            return rc;
        rc = name_by_copy(self, place, durable);
        if (rc < 0)
            return rc;
    }
    return rename_named(self, place);
}

/* ---- content ------------------------------------------------------------------------------ */

static int copy_block(int from, int to, int64_t offset, int64_t nbytes)
{
    char block[1 << 16];
    const size_t want = nbytes < (int64_t)sizeof block ? (size_t)nbytes : sizeof block;
    const ssize_t got = HOLD_RETRY(hold_sys_pread(from, block, want, offset));
    if (got <= 0)
        return got < 0 ? (int)got : -EIO; /* it has shrunk */
    for (ssize_t done = 0; done < got;) {
        const ssize_t put = HOLD_RETRY(
            hold_sys_pwrite(to, block + done, (size_t)(got - done), offset + done));
        if (put <= 0)
            return put < 0 ? (int)put : -EIO;
        done += put;
    }
    return (int)got;
}

int hold_file_copy(int from, int to)
{
    if (HOLD_RETRY(hold_sys_clone(to, from)) == 0)
        return 0;
    struct stat st;
    const int rc = HOLD_RETRY(hold_sys_fstat(from, &st));
    if (rc < 0)
        return rc;

    int64_t in = 0;
    int64_t out = 0;
    ssize_t moved = 1;
    while (in < st.st_size && moved > 0) {
        const int64_t left = st.st_size - in;
        const size_t want = left < (1 << 30) ? (size_t)left : (size_t)1 << 30;
        moved = HOLD_RETRY(hold_sys_copy_file_range(from, &in, to, &out, want));
    }
    while (in < st.st_size) { /* where the kernel could not, or stopped */
        const int n = copy_block(from, to, in, st.st_size - in);
        if (n < 0)
            return n;
        in += n;
    }
    return 0;
}
