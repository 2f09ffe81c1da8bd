/* files.c - many small files, each read or written whole. */
#include <limits.h>
#include <string.h>

#include "beneath.h"
#include "closing.h"
#include "hold.h"
#include "sys.h"
#include "threads.h"

enum {
    /* Of cold files each worker waits for the device; of cached ones they get in nobody's way. */
    READERS = 16,
    /* Names of one folder are made one after the other, whoever asks: more would only wait. */
    WRITERS = 4
};

typedef struct {
    int dirfd;
    hold_job job;
    hold_report *report;
    /* reading */
    hold_file *files;
    bool links;
    /* writing */
    const hold_batch *batch;
} mover;

static int fail(mover *m, int error, int64_t file, size_t folder)
{
    if (hold_job_fail(&m->job, error))
        *m->report = (hold_report){.segment = file, .file = (uint32_t)folder};
    return error;
}

/* ---- reading ------------------------------------------------------------------------------ */

/* Up to `room` bytes of a file; *got is how many there were. */
static int get(int fd, char *data, uint64_t room, uint64_t *got)
{
    const uint64_t most = (uint64_t)SSIZE_MAX & ~(uint64_t)4095;
    *got = 0;
    while (*got < room) {
        const uint64_t left = room - *got;
        const ssize_t n = HOLD_RETRY(
            hold_sys_pread(fd, data + *got, (size_t)(left < most ? left : most), (off_t)*got));
        if (n <= 0)
            return (int)n;
        *got += (uint64_t)n;
    }
    return 0;
}

static int read_one(void *context, size_t i, hold_worker *worker)
{
    mover *m = context;
    hold_file *file = &m->files[i];
    struct stat st;
    uint64_t got = 0;
    const int fd = hold_beneath_regular(m->dirfd, file->path, m->links, &st);
    file->size = fd < 0 ? fd : st.st_size;
    if (fd == HOLD_ERULE)
        return fail(m, fd, (int64_t)i, 0);
    if (fd < 0)
        return 0;
    const uint64_t want = (uint64_t)st.st_size < file->room ? (uint64_t)st.st_size : file->room;
    const int rc = want != 0 ? get(fd, file->data, want, &got) : 0;
    if (rc == 0 && got < want)
        file->size = (int64_t)got; /* it has shrunk */
    hold_sys_close(fd);
    return rc < 0 ? fail(m, rc, (int64_t)i, 0) : hold_job_advance(&m->job, worker, (size_t)got);
}

int hold_files_read(int dirfd, hold_file *files, size_t n, bool links, const hold_options *options,
                    hold_report *report)
{
    mover m = {.dirfd = dirfd, .files = files, .links = links, .report = report};
    *report = (hold_report){.segment = -1};
    m.job = (hold_job){.task = read_one, .context = &m, .options = options};
    const int rc = hold_job_run(&m.job, 0, n, options->threads > 0 ? options->threads : READERS);
    return rc ? rc : hold_job_finish(&m.job);
}

/* ---- writing ------------------------------------------------------------------------------ */

static int put(int fd, const char *data, uint64_t nbytes)
{
    const uint64_t most = (uint64_t)SSIZE_MAX & ~(uint64_t)4095;
    uint64_t done = 0;
    unsigned closed = hold_close_ended();
    while (done < nbytes) {
        const uint64_t left = nbytes - done;
        const ssize_t n = HOLD_RETRY(
            hold_sys_pwrite(fd, data + done, (size_t)(left < most ? left : most), (off_t)done));
        if (hold_close_wait(n, &closed))
            continue;
        if (n <= 0)
            return n < 0 ? (int)n : HOLD_ESTALL;
        done += (uint64_t)n;
    }
    return 0;
}

/* Create a file and write it. `path` begins with `at` bytes that name its folder. */
static int write_one(const mover *m, char *path, size_t at, const hold_file *file)
{
    const size_t n = strlen(file->path);
    if (strchr(file->path, '/') != NULL)
        return HOLD_ERULE;
    if (n >= PATH_MAX - at)
        return -ENAMETOOLONG;
    memcpy(path + at, file->path, n + 1);
    const int flags = O_WRONLY | O_CREAT | O_EXCL;
    const int fd = hold_beneath_open(m->dirfd, path, flags, 0666, false);
    if (fd < 0)
        return fd;
    const int rc = put(fd, file->data, file->room);
    const int closed = hold_sys_close(fd); /* network file systems may fail here */
    return rc ? rc : closed < 0 && closed != -EINTR ? closed : 0;
}

static int write_folder(void *context, size_t i, hold_worker *worker)
{
    mover *m = context;
    const hold_batch *batch = m->batch;
    const char *folder = batch->folders[i];
    const size_t n = strlen(folder);
    char path[PATH_MAX];
    size_t at = 0;
    uint64_t moved = 0;

    if (n != 0) { /* "" is dirfd itself */
        if (n >= sizeof path - 1)
            return fail(m, -ENAMETOOLONG, -1, i);
        const int rc = hold_beneath_folder(m->dirfd, folder);
        if (rc < 0)
            return fail(m, rc, -1, i);
        memcpy(path, folder, n);
        path[n] = '/';
        at = n + 1;
    }
    for (int64_t k = batch->first[i]; k < batch->first[i + 1]; k++) {
        const int rc = write_one(m, path, at, &batch->files[k]);
        if (rc < 0)
            return fail(m, rc, k, i);
        moved += batch->files[k].room;
    }
    return hold_job_advance(&m->job, worker, (size_t)moved);
}

int hold_files_write(int dirfd, const hold_batch *batch, const hold_options *options,
                     hold_report *report)
{
    mover m = {.dirfd = dirfd, .batch = batch, .report = report};
    *report = (hold_report){.segment = -1};
    m.job = (hold_job){.task = write_folder, .context = &m, .options = options};
    const int workers = options->threads > 0 ? options->threads : WRITERS;
    const int rc = hold_job_run(&m.job, 0, batch->n, workers);
    return rc ? rc : hold_job_finish(&m.job);
}

/* ---- one ---------------------------------------------------------------------------------- */

int hold_file_open(int dirfd, const char *path, bool links)
{
    struct stat st;
    return hold_beneath_regular(dirfd, path, links, &st);
}

int hold_file_create(int dirfd, const char *path)
{
    const int flags = O_RDWR | O_CREAT | O_EXCL;
    int fd = hold_beneath_open(dirfd, path, flags, 0666, false);
    const char *slash = strrchr(path, '/');
    if (fd != -ENOENT || slash == NULL)
        return fd;
    char folder[PATH_MAX];
    const size_t n = (size_t)(slash - path);
    if (n >= sizeof folder)
        return -ENAMETOOLONG;
    memcpy(folder, path, n);
    folder[n] = '\0';
    const int rc = hold_beneath_folder(dirfd, folder);
    return rc < 0 ? rc : hold_beneath_open(dirfd, path, flags, 0666, false);
}
