/* Threads that close one file each. */
#include "closing.h"

#include "sys.h"
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define MOST 8                    /* closed at a time */
#define WAIT_STEP 1000000         /* ns */
#define WAIT_STEPS (30 * 1000)
#define STACK ((size_t)64 << 10)

/* File systems whose files lose their names at once, whoever holds them open. */
static const uint32_t local_kinds[] = {
    0xEF53,     /* ext4 */
    0x58465342, /* xfs */
    0x9123683E, /* btrfs */
    0xF2F52010, /* f2fs */
    0x01021994, /* tmpfs */
};

static atomic_int closing;
static atomic_uint ended;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* A child made by fork() has none of its parent's threads. */
static void forget(void)
{
    atomic_store(&closing, 0);
}

static void watch_forks(void)
{
    (void)pthread_atfork(NULL, NULL, forget);
}

static bool is_local(int fd)
{
    return hold_filesystem_among(fd, local_kinds, sizeof local_kinds / sizeof *local_kinds);
}

int hold_close_hold(int dirfd, const char *name, int64_t size)
{
    if (size < HOLD_CLOSE_LATER_MIN)
        return -ENOENT;
    int fd = HOLD_RETRY(hold_sys_openat(dirfd, name, O_PATH | O_NOFOLLOW, 0));
    if (fd >= 0 && !is_local(fd)) {
        (void)hold_sys_close(fd);
        fd = -ENOENT;
    }
    return fd;
}

static void *finish(void *argument)
{
    (void)hold_sys_close((int)(intptr_t)argument);
    atomic_fetch_add(&ended, 1);
    atomic_fetch_sub(&closing, 1);
    return NULL;
}

static bool start(int fd)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t others, old;
    if (pthread_attr_init(&attributes) != 0)
        return false;
    (void)pthread_attr_setstacksize(&attributes, STACK);
    bool done = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0;
    hold_signals_of_others(&others);
    pthread_sigmask(SIG_SETMASK, &others, &old);
    done = done && pthread_create(&thread, &attributes, finish, (void *)(intptr_t)fd) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    return done;
}

void hold_close_later(int fd)
{
    (void)pthread_once(&once, watch_forks);
    bool room = atomic_fetch_add(&closing, 1) < MOST;
    if (room && start(fd))
        return;
    atomic_fetch_sub(&closing, 1);
    (void)hold_sys_close(fd);
}

unsigned hold_close_ended(void)
{
    return atomic_load(&ended);
}

bool hold_close_wait(int64_t rc, unsigned *seen)
{
    if (rc != -ENOSPC && rc != -EDQUOT)
        return false;
    for (int i = 0; i < WAIT_STEPS && atomic_load(&closing) > 0; i++)
        nanosleep(&(struct timespec){.tv_nsec = WAIT_STEP}, NULL);
    unsigned now = atomic_load(&ended), before = *seen;
    *seen = now;
    return now != before;
}
