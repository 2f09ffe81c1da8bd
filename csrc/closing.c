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

/* How many there are, and whose: a child made by fork() has none of its parent's threads. */
static atomic_int closing;
static _Atomic pid_t owner;

static int count(void)
{
    pid_t self = getpid(), last = atomic_load(&owner);
    if (last != self && atomic_compare_exchange_strong(&owner, &last, self))
        atomic_store(&closing, 0);
    return atomic_load(&closing);
}

static void *finish(void *argument)
{
    (void)hold_sys_close((int)(intptr_t)argument);
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
    bool room = count() < MOST;
    if (room)
        atomic_fetch_add(&closing, 1);
    if (room && start(fd))
        return;
    if (room)
        atomic_fetch_sub(&closing, 1);
    (void)hold_sys_close(fd);
}

bool hold_close_wait(void)
{
    if (count() == 0)
        return false;
    for (int i = 0; i < WAIT_STEPS && count() > 0; i++)
        nanosleep(&(struct timespec){.tv_nsec = WAIT_STEP}, NULL);
    return count() == 0;
}
