/* rights.c - who may do what with a file. */
#include "rights.h"

#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>

#include "sys.h"

static const char *const NAMES[2] = {"system.posix_acl_access", "system.posix_acl_default"};

static int count(const struct stat *st)
{
    return S_ISDIR(st->st_mode) ? 2 : 1;
}

/* Whether there is no ACL, rather than that it could not be had. */
static bool has_none(ssize_t rc)
{
    return rc == -ENODATA || rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -ENOENT;
}

/* The mode without what the group could do and not everybody. */
static mode_t close_group(mode_t mode)
{
    return mode & (mode_t)(~S_IRWXG | ((mode & S_IRWXO) << 3));
}

/* One ACL of the file `name` of the folder `fd`, or of `fd` itself: how many bytes, or -errno. */
static ssize_t read_acl(int fd, const char *name, int i, char out[HOLD_ACL_MOST])
{
    char path[40 + NAME_MAX];
    if (name == NULL)
        return HOLD_RETRY(hold_sys_fgetxattr(fd, NAMES[i], out, HOLD_ACL_MOST));
    snprintf(path, sizeof path, "/proc/self/fd/%d/%s", fd, name);
    ssize_t n = HOLD_RETRY(hold_sys_getxattr(path, NAMES[i], out, HOLD_ACL_MOST));
    if (n != -ENOENT)
        return n;
    /* Where /proc is not mounted it takes the right to read. */
    const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK;
    const int file = HOLD_RETRY(hold_sys_openat(fd, name, flags, 0));
    if (file < 0)
        return file;
    n = read_acl(file, NULL, i, out);
    hold_sys_close(file);
    return n;
}

int hold_rights_read(int fd, const char *name, hold_rights *out)
{
    out->nbytes[0] = out->nbytes[1] = 0;
    for (int i = 0; i < count(&out->st); i++) {
        const ssize_t n = read_acl(fd, name, i, out->acl[i]);
        /* More than there is room for, or not to be seen: nobody but the owner, and everybody. */
        if (n == -ERANGE || n == -EACCES || n == -EPERM)
            out->st.st_mode = close_group(out->st.st_mode);
        else if (n < 0 && !has_none(n))
            return (int)n;
        else
            out->nbytes[i] = n < 0 ? 0 : (size_t)n;
    }
    return 0;
}

/* 1 where that changed something, 0 where not, -EPERM where it cannot be done, or another
 * -errno. */
static int give_acl(int fd, const hold_rights *model, int i)
{
    int rc = 0;
    if (model->nbytes[i] != 0) {
        rc = HOLD_RETRY(hold_sys_fsetxattr(fd, NAMES[i], model->acl[i], model->nbytes[i]));
    } else { /* one that the folder gave it */
        const ssize_t n = HOLD_RETRY(hold_sys_fgetxattr(fd, NAMES[i], NULL, 0));
        if (n <= 0)
            return n == 0 || has_none(n) ? 0 : (int)n;
        rc = HOLD_RETRY(hold_sys_fremovexattr(fd, NAMES[i]));
    }
    if (rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EINVAL)
        return -EPERM;
    return rc < 0 ? rc : 1;
}

/* Owner and group of the model, as far as they can be had; which mode goes with what there is
 * then. */
static mode_t give_owner(int fd, const struct stat *now, const struct stat *model)
{
    mode_t mode = model->st_mode & 07777;
    if (now->st_uid == model->st_uid && now->st_gid == model->st_gid)
        return mode;
    if (HOLD_RETRY(hold_sys_fchown(fd, model->st_uid, model->st_gid)) == 0)
        return mode;
    mode &= (mode_t) ~(S_ISUID | S_ISGID);
    if (now->st_gid != model->st_gid &&
        HOLD_RETRY(hold_sys_fchown(fd, (uid_t)-1, model->st_gid)) < 0)
        return close_group(mode);
    return mode;
}

int hold_rights_give(int fd, const hold_rights *model)
{
    struct stat now;
    int rc = HOLD_RETRY(hold_sys_fstat(fd, &now));
    if (rc < 0)
        return rc;
    mode_t mode = give_owner(fd, &now, &model->st);
    bool changed = now.st_uid != model->st.st_uid || now.st_gid != model->st.st_gid;
    for (int i = 0; i < count(&model->st); i++) {
        rc = give_acl(fd, model, i);
        if (rc == -EPERM && i == 0)
            mode = close_group(mode);
        else if (rc < 0 && rc != -EPERM)
            return rc;
        changed |= rc != 0;
    }
    if (!changed && (now.st_mode & 07777) == mode)
        return 0;
    return HOLD_RETRY(hold_sys_fchmod(fd, mode));
}
