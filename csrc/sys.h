/*
 * sys.h - every system call that the engine makes, behind one gate.
 *
 * Each function makes one call and returns its result, which is >= 0, or -errno. Nothing is
 * retried here: a caller repeats after -EINTR (HOLD_RETRY) and resumes after a short transfer.
 *
 * Gate        Before each call the gate is asked whether hold_fault_arm() (hold.h) chose this one
 *             to fail. Disarmed, that costs one relaxed load. Armed, calls of all threads are
 *             counted in the order in which they pass the gate. A chosen call with an errno is not
 *             made; with 0, one that transfers bytes moves about half of what it was asked to (at
 *             least one byte, a multiple of 4096 or 512 where that is possible, so that O_DIRECT
 *             still takes it) and any other is made as usual.
 * Releases    hold_sys_close() is counted, and closes even when it was chosen to fail: there is
 *             nothing to repeat, whatever it returns. hold_sys_munmap() is not counted and never
 *             fails: it is only used for whole mappings that exist.
 * EINTR       May be injected into every counted call except hold_sys_close, so every one wants
 *             HOLD_RETRY, mmap too.
 * Threads     Any number at once.
 */
#ifndef HOLD_SYS_H
#define HOLD_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <sys/uio.h>

/* Repeat `call`, an expression that returns >= 0 or -errno, until no signal interrupts it. */
#define HOLD_RETRY(call)                                                                           \
    __extension__({                                                                                \
        __typeof__(call) hold_retry_rc_;                                                           \
        do                                                                                         \
            hold_retry_rc_ = (call);                                                               \
        while (hold_retry_rc_ == -EINTR);                                                          \
        hold_retry_rc_;                                                                            \
    })

/* Files and descriptors. O_CLOEXEC is added to the flags of hold_sys_openat and -openat2. */
int hold_sys_openat(int dirfd, const char *path, int flags, mode_t mode);
/* The way there: no magic links (those of /proc), no symbolic links, nothing outside the folder. */
enum { HOLD_NO_MAGIC = 0x02, HOLD_NO_LINKS = 0x04, HOLD_BENEATH = 0x08 };
/* With such rules (RESOLVE_*; Linux 5.6, -ENOSYS before). mode: 0 without O_CREAT. */
int hold_sys_openat2(int dirfd, const char *path, int flags, mode_t mode, uint64_t resolve);
int hold_sys_close(int fd);
int hold_sys_fcntl(int fd, int cmd, long arg);
int hold_sys_flock(int fd, int operation);
int hold_sys_fstat(int fd, struct stat *out);
int hold_sys_fstatfs(int fd, struct statfs *out);
int hold_sys_fchmod(int fd, mode_t mode);
int hold_sys_fchown(int fd, uid_t uid, gid_t gid);
ssize_t hold_sys_fgetxattr(int fd, const char *name, void *out, size_t nbytes);
int hold_sys_fsetxattr(int fd, const char *name, const void *value, size_t nbytes);
int hold_sys_fremovexattr(int fd, const char *name);
int hold_sys_fsync(int fd);
int hold_sys_syncfs(int fd);
int hold_sys_ftruncate(int fd, off_t nbytes);
int hold_sys_fallocate(int fd, int mode, off_t offset, off_t nbytes);
int hold_sys_fadvise(int fd, off_t offset, off_t nbytes, int advice);

/*
 * What O_DIRECT asks of this file: alignment of memory, and of offsets and lengths, in bytes; both
 * 0 where the kernel or the file system does not say, or the file takes no direct I/O.
 */
int hold_sys_statx_dio(int fd, uint32_t *mem_align, uint32_t *offset_align);

/*
 * Pages of [offset, offset + nbytes) that are in the page cache (cachestat(2), Linux 6.5, -ENOSYS
 * before). Nothing is read. nbytes is not 0.
 */
int hold_sys_cachestat(int fd, uint64_t offset, uint64_t nbytes, uint64_t *pages);

/* Transfers: bytes moved, which may be fewer than asked. iovcnt is at most IOV_MAX. */
ssize_t hold_sys_pread(int fd, void *data, size_t nbytes, off_t offset);
ssize_t hold_sys_pwrite(int fd, const void *data, size_t nbytes, off_t offset);
ssize_t hold_sys_preadv(int fd, const struct iovec *iov, int iovcnt, off_t offset);
ssize_t hold_sys_pwritev(int fd, const struct iovec *iov, int iovcnt, off_t offset);
/* In the kernel, at explicit offsets, which are advanced; -ENOSYS where the libc has no number. */
ssize_t hold_sys_copy_file_range(int in, int64_t *in_offset, int out, int64_t *out_offset,
                                 size_t nbytes);
/* All of `in` shared into the empty file `out` (FICLONE). */
int hold_sys_clone(int out, int in);

/* Names. */
int hold_sys_fstatat(int dirfd, const char *path, struct stat *out, int flags);
int hold_sys_faccessat(int dirfd, const char *path, int mode, int flags);
ssize_t hold_sys_readlinkat(int dirfd, const char *path, char *out, size_t nbytes);
ssize_t hold_sys_getxattr(const char *path, const char *name, void *out, size_t nbytes);
int hold_sys_linkat(int olddirfd, const char *oldpath, int newdirfd, const char *newpath,
                    int flags);
int hold_sys_renameat(int olddirfd, const char *oldpath, int newdirfd, const char *newpath);
/* Both names change places (RENAME_EXCHANGE); -EINVAL or -ENOSYS where that cannot be had. */
int hold_sys_exchange(int olddirfd, const char *oldpath, int newdirfd, const char *newpath);
int hold_sys_unlinkat(int dirfd, const char *path, int flags);
int hold_sys_mkdirat(int dirfd, const char *path, mode_t mode);
/* Entries of a folder, as getdents64(2) lays them out: bytes of them, 0 at the end. */
ssize_t hold_sys_getdents(int fd, void *out, size_t nbytes);

/* Memory. On success *out is the mapping. */
int hold_sys_mmap(void *hint, size_t nbytes, int prot, int flags, int fd, off_t offset,
                  void **out);
void hold_sys_munmap(void *data, size_t nbytes);
int hold_sys_mprotect(void *data, size_t nbytes, int prot);
int hold_sys_madvise(void *data, size_t nbytes, int advice);
int hold_sys_mincore(void *data, size_t nbytes, unsigned char *out);

#endif
