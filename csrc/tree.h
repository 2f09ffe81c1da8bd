/*
 * tree.h - a folder with all that is in it.
 *
 * Errors      0 or -errno, where nothing else is said.
 * Threads     Different trees may be worked on at once; of one, removal by several comes out right.
 */
#ifndef HOLD_TREE_H
#define HOLD_TREE_H

/* Whether the folder `fd`, open for reading, has nothing in it: 1 or 0, or -errno. */
int hold_tree_is_empty(int fd);

/*
 * Remove the folder `name` of the folder `dirfd`, however deep it is, with a fixed number of
 * descriptors. Links are removed, not followed. What is gone meanwhile is no failure; after one,
 * as much as can be is removed.
 */
int hold_tree_remove(int dirfd, const char *name);

/*
 * Bring all files and folders of the folder `fd` to the device, itself too: each by itself where
 * they are few, else all that the file system has. What is no file or folder is passed over.
 */
int hold_tree_sync(int fd);

#endif
