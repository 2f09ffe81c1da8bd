/* place.c - a name in a directory. */
#include "place.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "sys.h"

enum { MAX_LINKS = 40 }; /* symbolic links followed one after another, as in the kernel */

/* ---- finding ------------------------------------------------------------------------------ */

/* Open the directory `path`, relative to that of `place`, and make it that of `place`. */
static int enter_directory(hold_place *place, const char *path)
{
    const int flags = O_RDONLY | O_DIRECTORY;
    int fd = HOLD_RETRY(hold_sys_openat(place->dirfd, path, flags, 0));
    place->readable = fd != -EACCES;
    if (!place->readable) /* files can be made in it all the same */
        fd = HOLD_RETRY(hold_sys_openat(place->dirfd, path, O_PATH | O_DIRECTORY, 0));
    if (fd < 0)
        return fd;
    hold_place_leave(place);
    place->dirfd = fd;
    return 0;
}

/* Take `path`, which is cut apart, relative to the directory of `place`, as the new place. */
static int enter(hold_place *place, char *path, bool folder)
{
    size_t n = strlen(path);
    if (n == 0)
        return -ENOENT;
    const bool slash = path[n - 1] == '/';
    while (n > 0 && path[n - 1] == '/')
        path[--n] = '\0';

    char *last = strrchr(path, '/');
    const char *name = last != NULL ? last + 1 : path;
    const char *directory = last != NULL ? path : ".";
    if (strlen(name) > NAME_MAX)
        return -ENAMETOOLONG;
    strcpy(place->name, name);
    if (n == 0 || last == path)
        directory = "/";
    else if (last != NULL)
        *last = '\0';

    const int rc = enter_directory(place, directory);
    if (rc < 0)
        return rc;
    const bool dots = strcmp(place->name, ".") == 0 || strcmp(place->name, "..") == 0;
    if (folder)
        return n == 0 || dots ? -EBUSY : 0;
    return slash || dots ? -EISDIR : 0;
}

/*
 * May a link be followed? Not one that another user has put into a folder of everybody's (/tmp):
 * the kernel, which is not asked to follow it here, refuses that too where fs.protected_symlinks is
 * set.
 */
static int check_link(const hold_place *place, const struct stat *link)
{
    const mode_t everybodys = S_ISVTX | S_IWOTH;
    struct stat folder;
    if (link->st_uid == geteuid())
        return 0;
    const int rc = HOLD_RETRY(hold_sys_fstat(place->dirfd, &folder));
    if (rc < 0 || (folder.st_mode & everybodys) != everybodys || folder.st_uid == link->st_uid)
        return rc;
    return -EACCES;
}

int hold_place_find(const char *path, bool folder, hold_place *out, struct stat *found)
{
    char text[PATH_MAX];
    out->dirfd = AT_FDCWD;
    if (strlen(path) >= sizeof text)
        return -ENAMETOOLONG;
    strcpy(text, path);

    for (int links = 0; links <= MAX_LINKS; links++) {
        int rc = enter(out, text, folder);
        if (rc < 0)
            return rc;
        rc = HOLD_RETRY(hold_sys_fstatat(out->dirfd, out->name, found, AT_SYMLINK_NOFOLLOW));
        if (rc < 0)
            return rc == -ENOENT ? 0 : rc;
        if (!S_ISLNK(found->st_mode))
            return 1;
        rc = check_link(out, found);
        if (rc < 0)
            return rc;
        const ssize_t n = HOLD_RETRY(hold_sys_readlinkat(out->dirfd, out->name, text, sizeof text));
        if (n < 0)
            return (int)n;
        if ((size_t)n == sizeof text)
            return -ENAMETOOLONG;
        text[n] = '\0';
    }
    return -ELOOP;
}

void hold_place_leave(hold_place *self)
{
    if (self->dirfd >= 0)
        hold_sys_close(self->dirfd);
    self->dirfd = -1;
}

int hold_place_is(const hold_place *place, const char *name, int fd)
{
    struct stat file;
    struct stat named;
    int rc = HOLD_RETRY(hold_sys_fstat(fd, &file));
    if (rc == 0)
        rc = HOLD_RETRY(hold_sys_fstatat(place->dirfd, name, &named, AT_SYMLINK_NOFOLLOW));
    if (rc < 0)
        return rc == -ENOENT ? 0 : rc;
    return file.st_nlink > 0 && hold_same_file(&file, &named);
}

void hold_place_temp(const hold_place *place, unsigned k, char out[HOLD_TEMP_SIZE])
{
    uint32_t hash = 2166136261U; /* FNV-1a */
    for (const char *c = place->name; *c != '\0'; c++)
        hash = (hash ^ (unsigned char)*c) * 16777619U;
    snprintf(out, HOLD_TEMP_SIZE, ".holdfast-%08x-%u.tmp", (unsigned)hash, k);
}

int hold_place_sync(const hold_place *place, int fd)
{
    const int rc = HOLD_RETRY(place->readable ? hold_sys_fsync(place->dirfd)
                                              : hold_sys_syncfs(fd));
    /* File systems that need it know it. */
    return rc == -EINVAL || rc == -EOPNOTSUPP ? 0 : rc;
}

/* ---- locks -------------------------------------------------------------------------------- */

int hold_lock_own(int fd)
{
    const int rc = HOLD_RETRY(hold_sys_flock(fd, LOCK_EX | LOCK_NB));
    switch (rc) {
    case -EOPNOTSUPP:
    case -ENOLCK:
    case -ENOSYS:
    case -EINVAL:
    case -EBADF: /* NFS wants the right to write, which nobody has on a folder's descriptor */
        return 0;
    default:
        return rc;
    }
}

int hold_lock_claim(const hold_place *place, const char *name, int fd)
{
    const int rc = hold_lock_own(fd);
    if (rc == -EWOULDBLOCK)
        return 0;
    return rc < 0 ? rc : hold_place_is(place, name, fd);
}
