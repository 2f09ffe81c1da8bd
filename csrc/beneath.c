/* beneath.c - names inside a folder, from paths that a stranger may have chosen. */
#include "beneath.h"

#include <limits.h>
#include <string.h>

#include "hold.h"
#include "sys.h"

bool hold_path_plain(const char *path)
{
    for (;;) {
        const size_t n = strcspn(path, "/");
        if (n == 0 || (n == 1 && path[0] == '.') || (n == 2 && path[0] == '.' && path[1] == '.'))
            return false;
        if (path[n] == '\0')
            return true;
        path += n + 1;
    }
}

/* What failed with ENOTDIR: because it is a link, as O_NOFOLLOW alone would say? */
static int tell_link(int dirfd, const char *name)
{
    struct stat st;
    const int rc = HOLD_RETRY(hold_sys_fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW));
    return rc == 0 && S_ISLNK(st.st_mode) ? -ELOOP : -ENOTDIR;
}

static int open_last(int dirfd, const char *name, int flags, mode_t mode)
{
    const int fd = HOLD_RETRY(hold_sys_openat(dirfd, name, flags, mode));
    return fd == -ENOTDIR && (flags & O_DIRECTORY) ? tell_link(dirfd, name) : fd;
}

static int open_stepwise(int dirfd, const char *path, int flags, mode_t mode)
{
    char name[NAME_MAX + 1];
    int at = dirfd, fd;
    for (;;) {
        const size_t n = strcspn(path, "/");
        const bool last = path[n] == '\0';
        if (n > NAME_MAX) {
            fd = -ENAMETOOLONG;
        } else {
            memcpy(name, path, n);
            name[n] = '\0';
            fd = last ? open_last(at, name, flags, mode)
                      : open_last(at, name, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0);
        }
        if (at != dirfd)
            hold_sys_close(at);
        if (last || fd < 0)
            return fd;
        at = fd;
        path += n + 1;
    }
}

int hold_beneath_open(int dirfd, const char *path, int flags, mode_t mode, bool links)
{
    if (!hold_path_plain(path))
        return HOLD_ERULE;
    if (links)
        return HOLD_RETRY(hold_sys_openat(dirfd, path, flags, 0));
    const uint64_t rules = HOLD_NO_MAGIC | HOLD_NO_LINKS | HOLD_BENEATH;
    const int fd = HOLD_RETRY(hold_sys_openat2(dirfd, path, flags, mode, rules));
    switch (fd) {
    case -ENOSYS:
    case -EPERM:  /* sandboxes say so of calls that they do not know */
    case -EAGAIN: /* the kernel could not tell, since somebody renames */
        return open_stepwise(dirfd, path, flags | O_NOFOLLOW, mode);
    default:
        return fd;
    }
}

int hold_beneath_regular(int dirfd, const char *path, bool links, struct stat *found)
{
    const int flags = O_RDONLY | O_NONBLOCK | O_NOCTTY;
    const int fd = hold_beneath_open(dirfd, path, flags, 0, links);
    if (fd < 0)
        return fd == -ENXIO ? -EINVAL : fd; /* a socket, or a device that is not there */
    int rc = HOLD_RETRY(hold_sys_fstat(fd, found));
    if (rc == 0 && !S_ISREG(found->st_mode))
        rc = S_ISDIR(found->st_mode) ? -EISDIR : -EINVAL;
    if (rc == 0)
        return fd;
    hold_sys_close(fd);
    return rc;
}

/* ---- folders ------------------------------------------------------------------------------ */

/* Make the folder that the first n bytes of `path` name; the one that it is in exists. */
static int make_one(int dirfd, const char *path, size_t n)
{
    char text[PATH_MAX];
    if (n >= sizeof text)
        return -ENAMETOOLONG;
    memcpy(text, path, n);
    text[n] = '\0';

    char *slash = strrchr(text, '/');
    int at = dirfd;
    if (slash != NULL) {
        *slash = '\0';
        at = hold_beneath_open(dirfd, text, O_PATH | O_DIRECTORY, 0, false);
        if (at < 0)
            return at;
    }
    const char *name = slash != NULL ? slash + 1 : text;
    const int rc = HOLD_RETRY(hold_sys_mkdirat(at, name, 0777));
    if (at != dirfd)
        hold_sys_close(at);
    return rc == -EEXIST ? 0 : rc;
}

int hold_beneath_folder(int dirfd, const char *path)
{
    if (!hold_path_plain(path))
        return HOLD_ERULE;
    const size_t n = strlen(path);
    int rc = make_one(dirfd, path, n);
    if (rc != -ENOENT)
        return rc;
    for (size_t at = strcspn(path, "/"); at < n; at += 1 + strcspn(path + at + 1, "/")) {
        rc = make_one(dirfd, path, at);
        if (rc < 0)
            return rc;
    }
    return make_one(dirfd, path, n);
}
