/*
 * threads.h - work shared among threads that live as long as one call.
 *
 * A job is a row of items, taken one by one by the workers; the calling thread is one of them and
 * the one from which the progress callback is called. The first failure stops the rest.
 */
#ifndef HOLD_THREADS_H
#define HOLD_THREADS_H

#include "hold.h"

#include <signal.h>

#define HOLD_MAX_WORKERS 64

/* What is one worker's own. */
typedef struct hold_worker {
    int rank;            /* 0: the calling thread */
    hold_buffer *buffer; /* page-aligned; NULL until hold_worker_buffer() is first called */
} hold_worker;

typedef struct hold_job hold_job;

/* Do item i. Returns 0, or an error, which stops the job. */
typedef int (*hold_task)(void *context, size_t i, hold_worker *worker);

struct hold_job {
    hold_task task;
    void *context;
    const hold_options *options; /* progress, and nothing else */
    size_t buffer_nbytes;        /* of a worker's buffer */

    atomic_size_t next;
    size_t stop;
    atomic_uint_fast64_t done; /* bytes moved */
    atomic_int error;          /* the first one; 0 while all is well */
    uint64_t called;           /* when the progress callback was called last, in ns */
};

/*
 * Do items [first, stop) with up to `workers` threads, the calling one among them, and return when
 * all have ended. Where threads cannot be started, fewer do the work. Returns 0 or the first
 * error. May be called again for more items; after a failure it does nothing but return it.
 */
int hold_job_run(hold_job *job, size_t first, size_t stop, int workers);

/* *out: job->buffer_nbytes bytes of the worker's own, until the job ends. 0 or -errno. */
int hold_worker_buffer(hold_job *job, hold_worker *worker, char **out);

/* True, once, for the caller whose error is the first of the job and is to be reported. */
bool hold_job_fail(hold_job *job, int error);

/*
 * Note that `nbytes` more were moved, and from the calling thread call progress where it is time.
 * Returns 0, or the job's error, HOLD_EABORT where progress asks to stop.
 */
int hold_job_advance(hold_job *job, const hold_worker *worker, size_t nbytes);

/* The last call of progress, from the calling thread, when all is done. 0 or HOLD_EABORT. */
int hold_job_finish(hold_job *job);

/* CPUs that this thread may run on; at least 1. */
int hold_cpu_count(void);

/*
 * What a thread of the engine blocks. Signals are for the program's own threads; here they would
 * only cut transfers short. But what a worker itself brings about, as by a touch of a map whose
 * file was cut, is told where it happens: blocked, it would end the process without a word of
 * whoever handles it (faulthandler).
 */
void hold_signals_of_others(sigset_t *out);

#endif
