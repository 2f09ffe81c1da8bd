/* sys.c - the system calls, and the gate that can fail the n-th one. */
#include "sys.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "hold.h"

#ifndef FICLONE
#define FICLONE _IOW(0x94, 9, int)
#endif

/* ---- the gate ----------------------------------------------------------------------------- */

enum { PASS = 0, HALF = -1 }; /* verdicts of the gate beside an errno, which is > 0 */

static atomic_bool fault_armed; /* the slow way is to be taken: either of the two below */

static atomic_uint_fast64_t fault_at; /* fail the n-th call; 0: none */
static atomic_uint_fast64_t fault_count;
static atomic_int fault_error;
static _Atomic(const char *) fault_name;

static char banned_name[16]; /* fail every call of this name; empty: none */
static int banned_error;

uint64_t hold_fault_arm(uint64_t n, int error)
{
    atomic_store(&fault_armed, false);
    const uint64_t made = atomic_exchange(&fault_count, 0);
    atomic_store(&fault_name, NULL);
    atomic_store(&fault_at, n);
    atomic_store(&fault_error, error);
    atomic_store(&fault_armed, n != 0 || banned_name[0] != '\0');
    return made;
}

void hold_fault_ban(const char *name, int error)
{
    snprintf(banned_name, sizeof banned_name, "%s", name != NULL ? name : "");
    banned_error = error;
    atomic_store(&fault_armed, atomic_load(&fault_at) != 0 || banned_name[0] != '\0');
}

const char *hold_fault_hit(void)
{
    return atomic_load(&fault_name);
}

static __attribute__((noinline, cold)) int gate_armed(const char *name)
{
    atomic_thread_fence(memory_order_acquire);
    if (strcmp(name, banned_name) == 0)
        return banned_error;
    if (atomic_fetch_add(&fault_count, 1) + 1 != atomic_load(&fault_at))
        return PASS;
    atomic_store(&fault_name, name);
    const int error = atomic_load(&fault_error);
    if (error < 0) {
        const struct timespec late = {-error / 1000, -error % 1000 * 1000000L};
        (void)nanosleep(&late, NULL);
        return PASS;
    }
    return error > 0 ? error : HALF;
}

/* PASS: make the call; HALF: transfer half; else the errno to fail with. */
static inline int gate(const char *name)
{
    if (!atomic_load_explicit(&fault_armed, memory_order_relaxed))
        return PASS;
    return gate_armed(name);
}

/* The whole of a function: ask the gate, make the call, turn -1 into -errno. */
#define CALL(name, type, expression)                                                               \
    do {                                                                                           \
        const int verdict = gate(name);                                                            \
        if (verdict > 0)                                                                           \
            return -verdict;                                                                       \
        const type rc = (expression);                                                              \
        return rc < 0 ? -errno : rc;                                                               \
    } while (0)

/* The same where bytes move: `nbytes`, an lvalue that the expression reads, is cut for HALF. */
#define TRANSFER(name, nbytes, expression)                                                         \
    do {                                                                                           \
        const int verdict = gate(name);                                                            \
        if (verdict > 0)                                                                           \
            return -verdict;                                                                       \
        if (verdict == HALF)                                                                       \
            (nbytes) = half_of(nbytes);                                                            \
        const ssize_t rc = (expression);                                                           \
        return rc < 0 ? -errno : rc;                                                               \
    } while (0)

static size_t half_of(size_t nbytes)
{
    const size_t half = nbytes / 2;
    if (half >= 4096)
        return half & ~(size_t)4095;
    if (half >= 512)
        return half & ~(size_t)511;
    return half > 0 ? half : nbytes;
}

/* ---- files and descriptors ---------------------------------------------------------------- */

int hold_sys_openat(int dirfd, const char *path, int flags, mode_t mode)
{
    const bool unnamed = (flags & O_TMPFILE) == O_TMPFILE;
    CALL(unnamed ? "tmpfile" : "openat", int, openat(dirfd, path, flags | O_CLOEXEC, mode));
}

static long open_by_rules(int dirfd, const char *path, int flags, mode_t mode, uint64_t resolve)
{
    const long number = 437; /* as with cachestat below; struct open_how as numbers */
    uint64_t how[3] = {(uint64_t)(unsigned)flags, mode, resolve};
    return syscall(number, dirfd, path, how, sizeof how);
}

int hold_sys_openat2(int dirfd, const char *path, int flags, mode_t mode, uint64_t resolve)
{
    CALL("openat2", int, (int)open_by_rules(dirfd, path, flags | O_CLOEXEC, mode, resolve));
}

int hold_sys_close(int fd)
{
    const int verdict = gate("close");
    const int rc = close(fd) < 0 ? -errno : 0;
    return verdict > 0 ? -verdict : rc;
}

int hold_sys_fcntl(int fd, int cmd, long arg)
{
    CALL("fcntl", int, fcntl(fd, cmd, arg));
}

int hold_sys_flock(int fd, int operation)
{
    CALL("flock", int, flock(fd, operation));
}

int hold_sys_fstat(int fd, struct stat *out)
{
    CALL("fstat", int, fstat(fd, out));
}

int hold_sys_fstatfs(int fd, struct statfs *out)
{
    CALL("fstatfs", int, fstatfs(fd, out));
}

int hold_sys_fchmod(int fd, mode_t mode)
{
    CALL("fchmod", int, fchmod(fd, mode));
}

int hold_sys_fchown(int fd, uid_t uid, gid_t gid)
{
    CALL("fchown", int, fchown(fd, uid, gid));
}

ssize_t hold_sys_fgetxattr(int fd, const char *name, void *out, size_t nbytes)
{
    CALL("fgetxattr", ssize_t, fgetxattr(fd, name, out, nbytes));
}

int hold_sys_fsetxattr(int fd, const char *name, const void *value, size_t nbytes)
{
    CALL("fsetxattr", int, fsetxattr(fd, name, value, nbytes, 0));
}

int hold_sys_fremovexattr(int fd, const char *name)
{
    CALL("fremovexattr", int, fremovexattr(fd, name));
}

int hold_sys_fsync(int fd)
{
    CALL("fsync", int, fsync(fd));
}

int hold_sys_syncfs(int fd)
{
    CALL("syncfs", int, syncfs(fd));
}

int hold_sys_ftruncate(int fd, off_t nbytes)
{
    CALL("ftruncate", int, ftruncate(fd, nbytes));
}

int hold_sys_fallocate(int fd, int mode, off_t offset, off_t nbytes)
{
    CALL("fallocate", int, fallocate(fd, mode, offset, nbytes));
}

int hold_sys_fadvise(int fd, off_t offset, off_t nbytes, int advice)
{
    const int verdict = gate("fadvise");
    return verdict > 0 ? -verdict : -posix_fadvise(fd, offset, nbytes, advice);
}

static long statx_dio(int fd, uint32_t *words)
{
#ifdef SYS_statx
    const unsigned dio_mask = 0x2000; /* STATX_DIOALIGN, Linux 6.1 */
    return syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, dio_mask, words);
#else
    (void)fd, (void)words;
    errno = ENOSYS;
    return -1;
#endif
}

int hold_sys_statx_dio(int fd, uint32_t *mem_align, uint32_t *offset_align)
{
    /* struct statx as 32-bit words: the libc's may be older than the fields wanted. */
    uint32_t words[64] = {0};
    enum { MASK = 0, DIO_MEM_ALIGN = 0x98 / 4, DIO_OFFSET_ALIGN = 0x9c / 4 };

    *mem_align = *offset_align = 0;
    const int verdict = gate("statx");
    if (verdict > 0)
        return -verdict;
    if (statx_dio(fd, words) < 0)
        return errno == ENOSYS || errno == EINVAL || errno == EPERM ? 0 : -errno;
    if (words[MASK] & 0x2000) {
        *mem_align = words[DIO_MEM_ALIGN];
        *offset_align = words[DIO_OFFSET_ALIGN];
    }
    return 0;
}

int hold_sys_cachestat(int fd, uint64_t offset, uint64_t nbytes, uint64_t *pages)
{
    const long number = 451; /* the same on every architecture but alpha; libcs are older */
    uint64_t range[2] = {offset, nbytes}, counts[5] = {0};

    *pages = 0;
    const int verdict = gate("cachestat");
    if (verdict > 0)
        return -verdict;
    if (syscall(number, fd, range, counts, 0U) < 0)
        return -errno;
    *pages = counts[0];
    return 0;
}

/* ---- transfers ---------------------------------------------------------------------------- */

ssize_t hold_sys_pread(int fd, void *data, size_t nbytes, off_t offset)
{
    TRANSFER("pread", nbytes, pread(fd, data, nbytes, offset));
}

ssize_t hold_sys_pwrite(int fd, const void *data, size_t nbytes, off_t offset)
{
    TRANSFER("pwrite", nbytes, pwrite(fd, data, nbytes, offset));
}

typedef ssize_t vector_call(int fd, const struct iovec *iov, int iovcnt, off_t offset);

/* The call with the first half of the bytes of iov alone. */
static __attribute__((noinline, cold)) ssize_t halved(vector_call *call, int fd,
                                                      const struct iovec *iov, int iovcnt,
                                                      off_t offset)
{
    struct iovec cut[IOV_MAX];
    size_t total = 0;
    for (int i = 0; i < iovcnt; i++)
        total += iov[i].iov_len;

    size_t left = half_of(total);
    int n = 0;
    for (; n < iovcnt && n < IOV_MAX && left > 0; n++) {
        cut[n] = iov[n];
        if (cut[n].iov_len > left)
            cut[n].iov_len = left;
        left -= cut[n].iov_len;
    }
    return call(fd, cut, n, offset);
}

ssize_t hold_sys_preadv(int fd, const struct iovec *iov, int iovcnt, off_t offset)
{
    const int verdict = gate("preadv");
    if (verdict > 0)
        return -verdict;
    const ssize_t rc = verdict == HALF ? halved(preadv, fd, iov, iovcnt, offset)
                                       : preadv(fd, iov, iovcnt, offset);
    return rc < 0 ? -errno : rc;
}

ssize_t hold_sys_pwritev(int fd, const struct iovec *iov, int iovcnt, off_t offset)
{
    const int verdict = gate("pwritev");
    if (verdict > 0)
        return -verdict;
    const ssize_t rc = verdict == HALF ? halved(pwritev, fd, iov, iovcnt, offset)
                                       : pwritev(fd, iov, iovcnt, offset);
    return rc < 0 ? -errno : rc;
}

static ssize_t copy_range(int in, int64_t *in_offset, int out, int64_t *out_offset, size_t nbytes)
{
#ifdef SYS_copy_file_range
    return (ssize_t)syscall(SYS_copy_file_range, in, in_offset, out, out_offset, nbytes, 0U);
#else
    (void)in, (void)in_offset, (void)out, (void)out_offset, (void)nbytes;
    errno = ENOSYS;
    return -1;
#endif
}

ssize_t hold_sys_copy_file_range(int in, int64_t *in_offset, int out, int64_t *out_offset,
                                 size_t nbytes)
{
    TRANSFER("copy_file_range", nbytes, copy_range(in, in_offset, out, out_offset, nbytes));
}

int hold_sys_clone(int out, int in)
{
    CALL("ioctl", int, ioctl(out, FICLONE, in));
}

/* ---- names -------------------------------------------------------------------------------- */

int hold_sys_fstatat(int dirfd, const char *path, struct stat *out, int flags)
{
    CALL("fstatat", int, fstatat(dirfd, path, out, flags));
}

int hold_sys_faccessat(int dirfd, const char *path, int mode, int flags)
{
    CALL("faccessat", int, faccessat(dirfd, path, mode, flags));
}

ssize_t hold_sys_readlinkat(int dirfd, const char *path, char *out, size_t nbytes)
{
    CALL("readlinkat", ssize_t, readlinkat(dirfd, path, out, nbytes));
}

ssize_t hold_sys_getxattr(const char *path, const char *name, void *out, size_t nbytes)
{
    CALL("getxattr", ssize_t, getxattr(path, name, out, nbytes));
}

int hold_sys_linkat(int olddirfd, const char *oldpath, int newdirfd, const char *newpath,
                    int flags)
{
    CALL("linkat", int, linkat(olddirfd, oldpath, newdirfd, newpath, flags));
}

int hold_sys_renameat(int olddirfd, const char *oldpath, int newdirfd, const char *newpath)
{
    CALL("renameat", int, renameat(olddirfd, oldpath, newdirfd, newpath));
}

static long exchange(int olddirfd, const char *oldpath, int newdirfd, const char *newpath)
{
#ifdef SYS_renameat2
    const unsigned both = 2; /* RENAME_EXCHANGE */
    return syscall(SYS_renameat2, olddirfd, oldpath, newdirfd, newpath, both);
#else
    (void)olddirfd, (void)oldpath, (void)newdirfd, (void)newpath;
    errno = ENOSYS;
    return -1;
#endif
}

int hold_sys_exchange(int olddirfd, const char *oldpath, int newdirfd, const char *newpath)
{
    CALL("exchange", int, (int)exchange(olddirfd, oldpath, newdirfd, newpath));
}

int hold_sys_unlinkat(int dirfd, const char *path, int flags)
{
    CALL("unlinkat", int, unlinkat(dirfd, path, flags));
}

int hold_sys_mkdirat(int dirfd, const char *path, mode_t mode)
{
    CALL("mkdirat", int, mkdirat(dirfd, path, mode));
}

ssize_t hold_sys_getdents(int fd, void *out, size_t nbytes)
{
    CALL("getdents", ssize_t, (ssize_t)syscall(SYS_getdents64, fd, out, nbytes));
}

/* ---- memory ------------------------------------------------------------------------------- */

int hold_sys_mmap(void *hint, size_t nbytes, int prot, int flags, int fd, off_t offset, void **out)
{
    const int verdict = gate("mmap");
    if (verdict > 0)
        return -verdict;
    void *data = mmap(hint, nbytes, prot, flags, fd, offset);
    if (data == MAP_FAILED)
        return -errno;
    *out = data;
    return 0;
}

void hold_sys_munmap(void *data, size_t nbytes)
{
    munmap(data, nbytes);
}

int hold_sys_mprotect(void *data, size_t nbytes, int prot)
{
    CALL("mprotect", int, mprotect(data, nbytes, prot));
}

int hold_sys_madvise(void *data, size_t nbytes, int advice)
{
    CALL("madvise", int, madvise(data, nbytes, advice));
}

int hold_sys_mincore(void *data, size_t nbytes, unsigned char *out)
{
    CALL("mincore", int, mincore(data, nbytes, out));
}
