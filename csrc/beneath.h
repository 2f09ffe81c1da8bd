/*
 * beneath.h - names inside a folder, from paths that a stranger may have chosen.
 *
 * A path is relative to the folder `dirfd`; its components are plain: not empty, "." or "..". On
 * the way no symbolic link is followed, unless `links` says so (then any, wherever they lead): such
 * a one gives -ELOOP. What a folder's owner renames meanwhile changes nothing of that.
 *
 * Kernels     openat2(2) asks all that in one call (Linux 5.6). Where there is none, the folders on
 *             the way are opened one by one.
 * Errors      A descriptor, or 0, or -errno. HOLD_ERULE: the path is none of these.
 * Threads     Any number at once.
 */
#ifndef HOLD_BENEATH_H
#define HOLD_BENEATH_H

#include <stdbool.h>
#include <sys/stat.h>
#include <sys/types.h>

/* Whether `path` is as said above. */
bool hold_path_plain(const char *path);

/* Open `path` with `flags` (O_CLOEXEC is added; no O_CREAT with `links`). */
int hold_beneath_open(int dirfd, const char *path, int flags, mode_t mode, bool links);

/*
 * Open a regular file for reading; *found is what fstat says of it. -EISDIR for a folder, -EINVAL
 * for what is neither. A FIFO is not waited for.
 */
int hold_beneath_regular(int dirfd, const char *path, bool links, struct stat *found);

/* Make the folder `path`, and those on the way to it. 0 where it, or anything, is there already. */
int hold_beneath_folder(int dirfd, const char *path);

#endif
