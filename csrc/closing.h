/*
 * closing.h - closing files that have lost their names, without waiting for the device.
 *
 * With the last descriptor of such a file its blocks are given back, and a file system that tells
 * the device of it (`discard`) waits for the answer: 0.17 s for 1 GiB on a virtual disk. Nobody
 * needs to.
 */
#ifndef HOLD_CLOSING_H
#define HOLD_CLOSING_H

#include <stdbool.h>
#include <stdint.h>

/* From so many bytes on it is worth a thread. */
#define HOLD_CLOSE_LATER_MIN ((int64_t)16 << 20)

/*
 * Hold on to a large file whose name is about to go: a descriptor that opens nothing (O_PATH), or
 * -errno where it is not worth it, or on a file system that is not known to forget a name that is
 * held (NFS gives the file another one first).
 */
int hold_close_hold(int dirfd, const char *name, int64_t size);

/*
 * Close `fd` in a thread of its own that nobody waits for, or at once where there are many already
 * or none can be started. A process that ends waits for them, as the kernel has it.
 */
void hold_close_later(int fd);

/* How many have been closed so since the process began. */
unsigned hold_close_ended(void);

/*
 * For who is told that there is no room (`rc` is -ENOSPC or -EDQUOT; with others nothing happens):
 * wait for what is being closed. True where any of it was closed since *seen, a hold_close_ended()
 * of before the attempt, which is brought up to date: try again.
 */
bool hold_close_wait(int64_t rc, unsigned *seen);

#endif
