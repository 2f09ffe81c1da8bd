/* Workers: plain threads, started and joined within one call. */
#include "threads.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define PROGRESS_INTERVAL 50000000u /* ns */

typedef struct {
    hold_job *job;
    hold_worker worker;
    pthread_t thread;
} seat;

static void work(hold_job *job, hold_worker *worker)
{
    while (!atomic_load_explicit(&job->error, memory_order_relaxed)) {
        size_t i = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (i >= job->stop)
            break;
        int error = job->task(job->context, i, worker);
        if (error)
            hold_job_fail(job, error);
    }
    if (worker->buffer)
        hold_buffer_release(worker->buffer);
    worker->buffer = NULL;
}

static void *enter(void *argument)
{
    seat *self = argument;
    work(self->job, &self->worker);
    return NULL;
}

void hold_signals_of_others(sigset_t *out)
{
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP};
    sigfillset(out);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        sigdelset(out, own[i]);
}

/* Who works for a call. */
typedef struct {
    hold_job *job;
    seat seats[HOLD_MAX_WORKERS];
    int started;
    bool over; /* the calling thread has come to the end of its work */
} crew;

static void start(crew *self, int threads)
{
    sigset_t others, old;
    hold_signals_of_others(&others);
    pthread_sigmask(SIG_SETMASK, &others, &old);
    for (; self->started < threads; self->started++) {
        seat *s = &self->seats[self->started];
        *s = (seat){.job = self->job, .worker = {.rank = self->started + 1}};
        if (pthread_create(&s->thread, NULL, enter, s) != 0)
            break;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Wait for all; where the calling thread ends in the midst of it, they are to end as well. */
static void dismiss(void *argument)
{
    crew *self = argument;
    if (!self->over)
        hold_job_fail(self->job, HOLD_EABORT);
    for (int i = 0; i < self->started; i++)
        pthread_join(self->seats[i].thread, NULL);
}

/*
 * A callback that wants Python's lock while the interpreter ends does not return: its thread is
 * ended by pthread_exit(), and with it the stack on which all this is.
 */
static void work_together(crew *self, int threads)
{
    pthread_cleanup_push(dismiss, self);
    if (threads > 0)
        start(self, threads);
    work(self->job, &(hold_worker){.rank = 0});
    self->over = true;
    pthread_cleanup_pop(true);
}

int hold_job_run(hold_job *job, size_t first, size_t stop, int workers)
{
    crew all;
    all.job = job;
    all.started = 0;
    all.over = false;
    atomic_store(&job->next, first);
    job->stop = stop;
    if (workers > HOLD_MAX_WORKERS)
        workers = HOLD_MAX_WORKERS;
    if (workers > 1 && (size_t)workers > stop - first)
        workers = (int)(stop - first);
    work_together(&all, workers - 1);
    return atomic_load(&job->error);
}

int hold_worker_buffer(hold_job *job, hold_worker *worker, char **out)
{
    assert(job->buffer_nbytes > 0);
    int rc = worker->buffer ? 0 : hold_buffer_alloc(job->buffer_nbytes, &worker->buffer);
    *out = rc == 0 ? worker->buffer->data : NULL;
    return rc;
}

bool hold_job_fail(hold_job *job, int error)
{
    int none = 0;
    return atomic_compare_exchange_strong(&job->error, &none, error);
}

static int call_progress(hold_job *job)
{
    uint64_t done = atomic_load_explicit(&job->done, memory_order_relaxed);
    if (job->options->progress(job->options->context, done) != 0)
        hold_job_fail(job, HOLD_EABORT);
    return atomic_load(&job->error);
}

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int hold_job_advance(hold_job *job, const hold_worker *worker, size_t nbytes)
{
    atomic_fetch_add_explicit(&job->done, nbytes, memory_order_relaxed);
    if (worker->rank == 0 && job->options->progress) {
        uint64_t now = clock_ns();
        if (job->called == 0) /* not at once: most calls are over before it is time */
            job->called = now;
        if (now - job->called >= PROGRESS_INTERVAL) {
            job->called = now;
            return call_progress(job);
        }
    }
    return atomic_load_explicit(&job->error, memory_order_relaxed);
}

int hold_job_finish(hold_job *job)
{
    return job->options->progress ? call_progress(job) : 0;
}

int hold_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than a cpu_set_t has room for */
    return n < 1 ? 1 : (int)n;
}
