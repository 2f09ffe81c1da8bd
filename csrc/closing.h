/*
 * closing.h - closing files that have lost their names, without waiting for the device.
 *
 * With the last descriptor of such a file its blocks are given back, and a file system that tells the
 * device of it (`discard`) waits for the answer: 0.17 s for 1 GiB on a virtual disk. Nobody needs to.
 */
#ifndef HOLD_CLOSING_H
#define HOLD_CLOSING_H

#include <stdbool.h>
#include <stdint.h>

/* From so many bytes on it is worth a thread. */
#define HOLD_CLOSE_LATER_MIN ((int64_t)16 << 20)

/*
 * Close `fd` in a thread of its own that nobody waits for, or at once where there are many already or
 * none can be started. A process that ends waits for them, as the kernel has it.
 */
void hold_close_later(int fd);

/*
 * Wait until what is being closed is closed: for who has found the device full. False: there was
 * nothing to wait for, or it did not end in time.
 */
bool hold_close_wait(void);

#endif
