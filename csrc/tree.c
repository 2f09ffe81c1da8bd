/* tree.c - a folder with all that is in it: emptied, or brought to the device. */
#include "tree.h"

#include <dirent.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "beneath.h"
#include "closing.h"
#include "sys.h"
#include "threads.h"

/* ---- entries ------------------------------------------------------------------------------ */

enum { ENTRIES = 1 << 15, SYNC_WORKERS = 8 };

/*
 * Up to so many files and folders are synced each by itself. One fsync waits for the device a few
 * times; syncfs does once, but for whatever anybody else has written as well.
 */
#define SYNC_EACH 256

/* Entries of which it is asked whether they are large: a folder of more has mostly small ones. */
#define LOOK_MOST 1024

/* As getdents64(2) lays it out. */
typedef struct {
    uint64_t inode;
    int64_t next;
    unsigned short nbytes;
    unsigned char type;
    char name[];
} entry;

/* A folder being listed. */
typedef struct {
    int fd;
    size_t at, end;
    _Alignas(8) char data[ENTRIES];
} listing;

/* The next entry but "." and "..": 1, 0 at the end, or -errno. */
static int next_entry(listing *self, const entry **out)
{
    for (;;) {
        if (self->at == self->end) {
            const ssize_t n = HOLD_RETRY(hold_sys_getdents(self->fd, self->data, ENTRIES));
            if (n <= 0)
                return (int)n;
            self->at = 0;
            self->end = (size_t)n;
        }
        const entry *e = (const entry *)(const void *)(self->data + self->at);
        self->at += e->nbytes;
        if (strcmp(e->name, ".") != 0 && strcmp(e->name, "..") != 0) {
            *out = e;
            return 1;
        }
    }
}

static int open_folder(int dirfd, const char *name)
{
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_NONBLOCK;
    return HOLD_RETRY(hold_sys_openat(dirfd, name, flags, 0));
}

int hold_tree_is_empty(int fd)
{
    const entry *e = NULL;
    listing *list = malloc(sizeof *list);
    if (list == NULL)
        return -ENOMEM;
    list->at = list->end = 0;
    list->fd = open_folder(fd, "."); /* `fd` has a position, which others may use */
    int rc = list->fd < 0 ? list->fd : next_entry(list, &e);
    if (list->fd >= 0)
        hold_sys_close(list->fd);
    free(list);
    return rc < 0 ? rc : !rc;
}

/* ---- removing ----------------------------------------------------------------------------- */

/*
 * A tree being removed. Folders in the root are emptied one by one; a folder in one of those is
 * moved up into the root and has its turn later, so that depth costs neither stack nor descriptors.
 */
typedef struct {
    listing root, inner;
    unsigned moved; /* how many have been moved up */
    unsigned looked; /* how many may have been large */
    bool again;     /* the root has more to be done than was there when it was listed */
    int error;      /* the first one of this pass */
} remover;

static void note(remover *r, int rc)
{
    if (rc < 0 && rc != -ENOENT && r->error == 0)
        r->error = rc;
}

static void move_up(remover *r, const char *name)
{
    char above[48];
    int rc = -EEXIST;
    for (int tries = 0; tries < 1000 && (rc == -EEXIST || rc == -ENOTEMPTY); tries++) {
        snprintf(above, sizeof above, "holdfast-%d-%u", (int)getpid(), r->moved++);
        rc = HOLD_RETRY(hold_sys_renameat(r->inner.fd, name, r->root.fd, above));
    }
    r->again |= rc == 0;
    note(r, rc);
}

/* Hold on to a large file, so that nobody waits for the end of it: a descriptor, or < 0. */
static int hold_large(remover *r, int dirfd, const entry *e)
{
    struct stat st;
    if (r->looked++ >= LOOK_MOST || (e->type != DT_REG && e->type != DT_UNKNOWN))
        return -ENOENT;
    if (HOLD_RETRY(hold_sys_fstatat(dirfd, e->name, &st, AT_SYMLINK_NOFOLLOW)) < 0 ||
        !S_ISREG(st.st_mode))
        return -ENOENT;
    return hold_close_hold(dirfd, e->name, st.st_size);
}

/* Remove an entry that is no folder, or say that it is one. */
static bool is_folder(remover *r, int dirfd, const entry *e)
{
    if (e->type == DT_DIR)
        return true;
    int large = hold_large(r, dirfd, e);
    int rc = HOLD_RETRY(hold_sys_unlinkat(dirfd, e->name, 0));
    if (large >= 0)
        hold_close_later(large);
    if (e->type == DT_UNKNOWN && (rc == -EISDIR || rc == -EPERM))
        return true;
    note(r, rc);
    return false;
}

static void remove_inner(remover *r, const char *name)
{
    const entry *e = NULL;
    int rc = open_folder(r->root.fd, name);
    if (rc >= 0) {
        r->inner.fd = rc;
        r->inner.at = r->inner.end = 0;
        while ((rc = next_entry(&r->inner, &e)) == 1)
            if (is_folder(r, r->inner.fd, e))
                move_up(r, e->name);
        hold_sys_close(r->inner.fd);
    }
    note(r, rc);
    note(r, HOLD_RETRY(hold_sys_unlinkat(r->root.fd, name, AT_REMOVEDIR)));
}

/* Go once through what is in the root. */
static void pass(remover *r, int dirfd, const char *name)
{
    const entry *e = NULL;
    r->again = false;
    r->error = 0;
    int rc = open_folder(dirfd, name);
    if (rc < 0) {
        note(r, rc);
        return;
    }
    r->root.fd = rc;
    r->root.at = r->root.end = 0;
    while ((rc = next_entry(&r->root, &e)) == 1)
        if (is_folder(r, r->root.fd, e))
            remove_inner(r, e->name);
    note(r, rc);
    hold_sys_close(r->root.fd);
}

int hold_tree_remove(int dirfd, const char *name)
{
    remover *r = calloc(1, sizeof *r);
    if (r == NULL)
        return -ENOMEM;
    int rc, failures = 0;
    do {
        pass(r, dirfd, name);
        rc = HOLD_RETRY(hold_sys_unlinkat(dirfd, name, AT_REMOVEDIR));
        if (r->error != 0)
            rc = r->error;
        /* Listing may pass over what comes after something that was removed: look again. */
    } while (rc < 0 && rc != -ENOENT && (r->again || failures++ < 2));
    free(r);
    return rc == -ENOENT ? 0 : rc;
}

/* ---- syncing ------------------------------------------------------------------------------ */

/* The files and folders of a tree, as paths from its root. */
typedef struct {
    char *path;
    bool folder;
} item;

typedef struct {
    int root;
    item *items;
    size_t n, room, most;
    listing list;
} inventory;

static int is_item(const inventory *v, const entry *e, bool *folder)
{
    struct stat st;
    int rc = 0;
    *folder = e->type == DT_DIR;
    if (e->type != DT_UNKNOWN)
        return e->type == DT_DIR || e->type == DT_REG;
    rc = HOLD_RETRY(hold_sys_fstatat(v->list.fd, e->name, &st, AT_SYMLINK_NOFOLLOW));
    if (rc < 0)
        return rc;
    *folder = S_ISDIR(st.st_mode);
    return *folder || S_ISREG(st.st_mode);
}

/* 1 where there are too many. */
static int add(inventory *v, const char *folder, const entry *e)
{
    const size_t n = strlen(folder) + strlen(e->name) + 2;
    item new;
    const int rc = is_item(v, e, &new.folder);
    if (rc <= 0)
        return rc;
    if (v->n == v->most)
        return 1;
    if (v->n == v->room) {
        const size_t room = v->room != 0 ? 2 * v->room : 64;
        item *items = realloc(v->items, room * sizeof *items);
        if (items == NULL)
            return -ENOMEM;
        v->items = items;
        v->room = room;
    }
    new.path = malloc(n);
    if (new.path == NULL)
        return -ENOMEM;
    snprintf(new.path, n, "%s%s%s", folder, *folder ? "/" : "", e->name);
    v->items[v->n++] = new;
    return 0;
}

static int list_folder(inventory *v, const char *path)
{
    const entry *e = NULL;
    v->list.fd = *path ? hold_beneath_open(v->root, path, O_RDONLY | O_DIRECTORY, 0, false)
                       : open_folder(v->root, ".");
    if (v->list.fd < 0)
        return v->list.fd;
    v->list.at = v->list.end = 0;
    int rc = 0, more = 1;
    while (rc == 0 && (more = next_entry(&v->list, &e)) == 1)
        rc = add(v, path, e);
    hold_sys_close(v->list.fd);
    return more < 0 ? more : rc;
}

/* Everything in the tree. 1 where that is more than `most`, 0, or -errno. */
static int take_inventory(inventory *v, size_t most)
{
    v->most = most;
    int rc = list_folder(v, "");
    for (size_t i = 0; i < v->n && rc == 0; i++)
        if (v->items[i].folder)
            rc = list_folder(v, v->items[i].path);
    return rc;
}

static void forget(inventory *v)
{
    for (size_t i = 0; i < v->n; i++)
        free(v->items[i].path);
    free(v->items);
    v->items = NULL;
    v->n = v->room = 0;
}

static int sync_one(void *context, size_t i, hold_worker *worker)
{
    const inventory *v = context;
    (void)worker;
    const int fd = hold_beneath_open(v->root, v->items[i].path, O_RDONLY | O_NONBLOCK, 0, false);
    if (fd < 0)
        return fd;
    const int rc = HOLD_RETRY(hold_sys_fsync(fd));
    hold_sys_close(fd);
    return rc == -EINVAL && v->items[i].folder ? 0 : rc;
}

static int sync_each(inventory *v)
{
    const hold_options options = {0};
    hold_job job = {.task = sync_one, .context = v, .options = &options};
    const int rc = hold_job_run(&job, 0, v->n, SYNC_WORKERS);
    return rc ? rc : HOLD_RETRY(hold_sys_fsync(v->root));
}

/* Before Linux 5.8 syncfs(2) says nothing of writes that failed. */
static bool syncfs_tells(void)
{
    struct utsname system;
    int major = 0, minor = 0;
    if (uname(&system) < 0 || sscanf(system.release, "%d.%d", &major, &minor) != 2)
        return false;
    return major > 5 || (major == 5 && minor >= 8);
}

int hold_tree_sync(int fd)
{
    inventory *v = calloc(1, sizeof *v);
    if (v == NULL)
        return -ENOMEM;
    v->root = fd;
    int rc = take_inventory(v, SYNC_EACH);
    if (rc == 1) {
        forget(v);
        rc = syncfs_tells() ? HOLD_RETRY(hold_sys_syncfs(fd)) : -ENOSYS;
        if (rc == -ENOSYS) {
            rc = take_inventory(v, SIZE_MAX);
            rc = rc == 0 ? sync_each(v) : rc;
        }
    } else if (rc == 0) {
        rc = sync_each(v);
    }
    forget(v);
    free(v);
    return rc;
}
