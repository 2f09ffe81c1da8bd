/*
 * rights.h - who may do what with a file: mode, owner, group, and POSIX ACLs.
 *
 * What replaces a file is never more open than that was. Where a file has an ACL, the group's bits
 * of its mode are those of the ACL's mask: without it they would be the group's own.
 *
 * Errors      0 or -errno.
 */
#ifndef HOLD_RIGHTS_H
#define HOLD_RIGHTS_H

#include <stddef.h>
#include <sys/stat.h>

#define HOLD_ACL_MOST 4096 /* bytes of an ACL: 511 entries */

typedef struct hold_rights {
    struct stat st;   /* of which mode, owner and group are looked at */
    size_t nbytes[2]; /* of the ACL, and of a folder's for what is made in it; 0: none */
    char acl[2][HOLD_ACL_MOST];
} hold_rights;

/*
 * The ACLs of the file `name` of the folder `fd`, or, where `name` is NULL, of the file `fd`
 * itself; out->st is what stat says of it, and then without the rights of the group where there may
 * be an ACL that cannot be seen: where /proc is not mounted, that of a file which may not be read.
 */
int hold_rights_read(int fd, const char *name, hold_rights *out);

/*
 * Give `fd` the mode and ACLs of `model` and, where this process may, its owner and group; where it
 * may not, without the set-user-ID and set-group-ID bits, and what the group of `model` could do
 * another group can only so far as everybody could.
 */
int hold_rights_give(int fd, const hold_rights *model);

#endif
