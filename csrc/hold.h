/*
 * hold.h - what the engine offers; the only header that the Cython glue sees.
 *
 * The engine moves bytes between files and memory. It knows nothing of tensors' meaning, of
 * formats, of Python.
 *
 * Errors      Functions that can fail return 0, or -errno of the failed system call, or one of
 *             the HOLD_E* codes below; never -1. On failure the out parameters say where.
 * Units       Sizes and offsets are bytes. Offsets count from the start of the file.
 * Ownership   Said with each function. Nothing is kept after a function returns unless it says so.
 * Threads     Every function may be called from any number of threads at once, on different
 *             arguments. Worker threads are started by a call and joined before it returns, so
 *             nothing is left behind for fork() to break.
 */
#ifndef HOLD_H
#define HOLD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Own error codes, beyond any errno. */
#define HOLD_ESHORT (-4001)  /* the file ends before the bytes that were asked for */
#define HOLD_ESTALL (-4002)  /* a transfer made no progress */
#define HOLD_EABORT (-4003)  /* the progress callback asked to stop */
#define HOLD_ERULE (-4004)   /* a segment breaks the rules that the call states */

#define HOLD_MAX_NDIM 64

/* ---- memory ------------------------------------------------------------------------------- */

/*
 * Memory with a count of owners. The count starts at 1; hold_buffer_release() by the last owner
 * gives the memory back. Both may be called from any thread, without the GIL.
 */
typedef struct hold_buffer hold_buffer;
struct hold_buffer {
    atomic_size_t owners;
    void *data;
    size_t nbytes;
    void *base;  /* what is given back: the mapping's start ... */
    size_t span; /* ... and length */
    unsigned forks; /* as hold_kept_forks() said when it was allocated */
    void (*dispose)(hold_buffer *self);
    void (*let_go)(void *owner); /* of lent memory: gives `base`, its owner, back */
};

static inline void hold_buffer_retain(hold_buffer *self)
{
    atomic_fetch_add_explicit(&self->owners, 1, memory_order_relaxed);
}

static inline void hold_buffer_release(hold_buffer *self)
{
    if (atomic_fetch_sub_explicit(&self->owners, 1, memory_order_acq_rel) == 1)
        self->dispose(self);
}

/*
 * Anonymous memory, page-aligned; from 2 MiB on aligned to 2 MiB, with huge pages asked for, and
 * what an earlier buffer left in it (hold_keep()). nbytes may be 0. On success *out has one owner.
 * Returns 0 or -errno (ENOMEM, if not injected).
 */
int hold_buffer_alloc(size_t nbytes, hold_buffer **out);

/*
 * The bytes [offset, offset + nbytes) of a file, mapped readable and writable: private, so that
 * writes stay in this process, or, with `shared` and fd open for writing too, so that they go to
 * the file. offset need not be page-aligned. The caller has checked that the file is that long; fd
 * may be closed afterwards. nbytes may be 0. Returns 0 or -errno.
 */
int hold_buffer_map(int fd, uint64_t offset, size_t nbytes, bool shared, hold_buffer **out);

/*
 * Memory that `owner` keeps alive, on whatever device: it is never touched here. The last owner of
 * the buffer calls let_go(owner), from any thread, without the GIL. Returns 0 or -ENOMEM.
 */
int hold_buffer_lend(void *data, size_t nbytes, void *owner, void (*let_go)(void *owner),
                     hold_buffer **out);

/* How many buffers are alive in this process. */
size_t hold_buffer_count(void);

/*
 * Keep at most so many bytes of memory whose last owner has let it go, for buffers that come later
 * (kept.h); 0, as at first: none. What is kept above it is given back at once.
 */
void hold_keep(size_t most);

/* How many bytes are kept. */
size_t hold_kept(void);

/* Give all of it back. Returns how many bytes that was. */
size_t hold_kept_release(void);

/* The kind of file system that the file is on: the magic number of statfs(2). 0 or -errno. */
int hold_filesystem(int fd, uint64_t *out);

/* Whether that is one of these; false where it cannot be told. */
bool hold_filesystem_among(int fd, const uint32_t *kinds, size_t n);

/*
 * Say that all of [data, data + nbytes) of a mapping of a file is going to be used: what of it is
 * not in the page cache is then read by folios of 2 MiB, and ahead (MADV_HUGEPAGE, as Linux takes
 * it since 5.18; before, and without huge pages, nothing changes). 0 or -errno.
 */
int hold_expect(const void *data, size_t nbytes);

/*
 * Bring the pages of [data, data + nbytes) of a mapping into memory and into the page tables
 * (MADV_POPULATE_READ in `threads` threads; where the kernel lacks it, MADV_WILLNEED and a touch).
 */
int hold_prefetch(const void *data, size_t nbytes, int threads);

/*
 * hold_prefetch() of each 16 MiB of which, by a sample, nearly all is in the page cache: where
 * it is no more than a matter of page tables, and of pages here and there that the kernel took
 * back, which are read sooner so than by the faults that would ask for them. Nothing where nbytes
 * is more than `most`, for page tables cost memory (8 bytes a page) and time (some 2 ms for a GiB)
 * even where nobody looks at the data; nor where there is so little that faults are as cheap.
 * *out is how many bytes were brought in.
 */
int hold_populate_cached(const void *data, size_t nbytes, size_t most, int threads, size_t *out);

/*
 * Let go of the pages that [data, data + nbytes) of a mapping touches: what was written to them in
 * this process is lost, and the next access reads them anew. 0 or -errno.
 */
int hold_drop(const void *data, size_t nbytes);

/* Bytes of [data, data + nbytes) of a mapping that are in the page cache (mincore). */
int hold_resident(const void *data, size_t nbytes, uint64_t *out);

/* ---- checksums ---------------------------------------------------------------------------- */

/* The zip CRC-32 (reflected 0xEDB88320) of data, continuing `crc` (0 to begin). */
uint32_t hold_crc32(uint32_t crc, const void *data, size_t nbytes);

/* The same of bytes that are copied on the way; `to` does not overlap them. */
uint32_t hold_crc32_copy(uint32_t crc, void *to, const void *from, size_t nbytes);

/* CRC-32 of A followed by B, from those of A and of B and the length of B. */
uint32_t hold_crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b);

/* ---- moving bytes ------------------------------------------------------------------------- */

/* How the elements of a segment lie in memory, where that is not densely in C order. */
typedef struct hold_layout {
    const int64_t *shape;   /* ndim extents, none negative */
    const int64_t *strides; /* ndim strides in bytes, of any sign */
    int32_t ndim;           /* 0 .. HOLD_MAX_NDIM */
    int32_t itemsize;       /* bytes of an element */
    int32_t swap;           /* unit whose bytes are reversed on the way: 0 (none), 2, 4, 8 */
    int32_t reserved;
} hold_layout;

/*
 * In `file` of a segment that is written: its memory is of a mapping that nobody has changed, and
 * its pages are to be let go of once they have been written, as hold_drop() does.
 */
#define HOLD_RELEASE 1u

/* A run of bytes of a file and its place in memory. SEGMENT in holdfast/layout.py. */
typedef struct hold_segment {
    uint64_t offset;
    uint64_t nbytes;
    union {
        void *data; /* of the element with index zero everywhere; NULL in a read: checksum only */
        uint64_t address;
    };
    union {
        const hold_layout *layout; /* NULL: dense */
        uint64_t layout_address;
    };
    uint32_t file; /* read: index in fds; write: 0, or HOLD_RELEASE */
    uint32_t crc;  /* out: CRC-32 of the bytes in the file, where checksums were asked for */
} hold_segment;

/*
 * Called now and then from the thread that called hold_write or hold_read, with the bytes moved so
 * far. A return other than 0 stops the work: the call returns HOLD_EABORT.
 */
typedef int (*hold_progress)(void *context, uint64_t done);

/* Whether to write past the page cache, with O_DIRECT, where the file takes that. */
#define HOLD_DIRECT_NEVER 0
#define HOLD_DIRECT_ALWAYS 1
#define HOLD_DIRECT_FASTER 2 /* whichever way turns out to be faster, tried as it goes on */

/* Whether to bring into the page cache what is missing there of files. */
#define HOLD_FILL_NEVER 0
#define HOLD_FILL_AGAIN 1 /* ... that are loaded again, each by one call */
#define HOLD_FILL_NOW 2

typedef struct hold_options {
    int threads;            /* workers; 0: the engine chooses */
    bool checksum;          /* fill in segment.crc */
    int direct;             /* write: HOLD_DIRECT_*; read: ignored, hold_read() sees for itself */
    double enough;          /* ... FASTER: bytes a second through the page cache that make it
                             * needless to try past it; 0: both ways are tried in any case */
    uint64_t size;          /* write: of the file once all of it is written; 0: not known */
    int fill;               /* read: HOLD_FILL_* */
    hold_progress progress; /* may be NULL */
    void *context;
} hold_options;

/* Where a transfer failed. */
typedef struct hold_report {
    int64_t segment; /* index of the segment, -1 where it is not about one */
    uint64_t offset; /* in the file, of the first byte not moved */
    uint32_t file;   /* index in fds */
    bool direct;     /* out, write: O_DIRECT was really used */
} hold_report;

/*
 * Write segments, sorted by offset, without overlap and without gaps between the first and the
 * last. Bytes of the file outside of them are left alone; a file that was shorter ends where the
 * last segment does, or behind it, with zeros in between, at options->size.
 * fd is open for writing, without O_APPEND. Its O_DIRECT flag is changed and restored.
 */
int hold_write(int fd, hold_segment *segments, size_t n, const hold_options *options,
               hold_report *report);

/*
 * Read segments, sorted by (file, offset), without overlap; gaps between them are skipped.
 * All files are in one queue of chunks. The file position of the fds is not used or changed.
 *
 * What is in the page cache is copied from there, in stretches of 512 KiB. From 8 MiB on for a
 * call, the rest is read past it, with O_DIRECT, by a second descriptor that the call opens
 * through /proc/self/fd and closes: straight to where the bytes belong where memory and offset are
 * aligned alike (page-aligned memory for page-aligned offsets always is), else through a worker's
 * buffer. So reading a cold file leaves the page cache as it was. With HOLD_FILL_AGAIN, and where
 * at least half of a file goes to memory, that is so for the first time; the second time brings the
 * file into the page cache (uncached.h says how that is told). Who loads a file by several calls
 * asks hold_load_look() before, and calls hold_load_mark() after them. Everything goes through the
 * page cache, with its readahead, where that cannot be had: where neither cachestat(2) nor
 * mincore(2) tells what is cached (many kernels tell it only to those who own or may write the
 * file), where there is no /proc, and on file systems that neither say what O_DIRECT asks of a file
 * (statx) nor are ext4, XFS or btrfs: NFS, FUSE, tmpfs.
 */
int hold_read(const int *fds, size_t nfds, hold_segment *segments, size_t n,
              const hold_options *options, hold_report *report);

/* Smaller files bear no mark. */
#define HOLD_MARK_LEAST ((uint64_t)8 << 20)

/*
 * Of a file of which so many bytes are going to be loaded, in several calls: 1 if it was loaded
 * before, as the page cache remembers; 0 if not, so that it is to be marked afterwards; -ENODATA
 * where there is no use in either: most of it is in the page cache, or little of it is wanted, or
 * it is small, or what is cached cannot be told. Or another -errno.
 */
int hold_load_look(int fd, uint64_t nbytes);
int hold_load_mark(int fd);

/*
 * Fill in the crc of segments, sorted by offset and without overlap, from where they are in memory;
 * nothing is written. Of the options, threads is used. 0, HOLD_ERULE or -ENOMEM.
 */
int hold_checksum(hold_segment *segments, size_t n, const hold_options *options,
                  hold_report *report);

/* ---- publishing --------------------------------------------------------------------------- */

/*
 * A file being written that will appear under its name whole or not at all.
 *
 * Begun, it is an unnamed file (O_TMPFILE) in the target's directory, or, where the file system
 * has none, a temporary name created with O_EXCL and locked with flock; temporaries of the same
 * target whose owner is dead are removed. It is the owner's alone until it is committed where a
 * regular file has the target's name, the mode of which it gets then; or else 0666 & ~umask.
 */
typedef struct hold_publication hold_publication;

/*
 * Begin to publish `path` (a symbolic link is followed: the file it points to is replaced, or
 * created). EISDIR if it is a directory, EACCES if it is a file that this process may not write,
 * ESPIPE if it is there and neither (a FIFO, a device, a socket, or what /proc leads to and has no
 * name: a file that was removed, memory): such a one is written in place, as a stream. The
 * directory is held open: later renames and chdir() change nothing.
 * On success *out is owned by the caller, who ends it with hold_publish_commit or _abort.
 */
int hold_publish_begin(const char *path, hold_publication **out);

/* The descriptor to write to; owned by the publication. */
int hold_publish_fd(const hold_publication *self);

/*
 * Give the file its name, replacing what had it: fsync, link, rename, fsync of the directory
 * (durable), or link and rename alone. On failure the old file is what it was and nothing is left
 * behind; where only the last fsync failed, the old content is put back under the name as far as
 * the device still obeys (an old file that this process may not read cannot be). Owner, group
 * and ACLs are kept where this process may set them (rights.h). Ends the publication either way.
 */
int hold_publish_commit(hold_publication *self, bool durable);

/* Forget the file: nothing is left of it. Ends the publication. */
void hold_publish_abort(hold_publication *self);

/* ---- many files ---------------------------------------------------------------------------- */

/* A file inside a folder, and its place in memory. */
typedef struct hold_file {
    const char *path; /* plain (beneath.h): relative, without empty components, "." and ".." */
    void *data;
    uint64_t room; /* bytes there: read at most so many; write all of them */
    int64_t size;  /* out, read: size of the file, or -errno where it could not be opened */
} hold_file;

/*
 * Read files inside the folder `dirfd`, from the start of each min(size, room) bytes. Symbolic
 * links are not followed unless `links`: -ELOOP. Regular files alone: -EISDIR, -EINVAL. One that
 * shrinks meanwhile has the size that it was found to have. Only so many are open at once as there
 * are workers. HOLD_ERULE where a path is not plain; report->segment is which file failed.
 */
int hold_files_read(int dirfd, hold_file *files, size_t n, bool links, const hold_options *options,
                    hold_report *report);

/* Files to be made: those of folder i are files[first[i]] to files[first[i + 1]], exclusive. */
typedef struct hold_batch {
    const char *const *folders; /* plain paths, or "" for the folder that all are in */
    const int64_t *first;       /* n + 1 of them, ascending */
    const hold_file *files;     /* paths are names in their folder */
    size_t n;
} hold_batch;

/*
 * Make folders inside the folder `dirfd` (those that are there stay) and in each its files, which
 * must not exist (-EEXIST), of mode 0777 and 0666 & ~umask. Nothing that was made is removed on
 * failure: report->segment is which file it is about, or -1 where it is about folder report->file.
 */
int hold_files_write(int dirfd, const hold_batch *batch, const hold_options *options,
                     hold_report *report);

/* A regular file inside a folder, opened for reading: a descriptor, or as in hold_files_read(). */
int hold_file_open(int dirfd, const char *path, bool links);

/* A new file, opened for reading and writing; the folders on the way to it are made. */
int hold_file_create(int dirfd, const char *path);

/* ---- publishing a folder ------------------------------------------------------------------- */

/*
 * A folder being filled that will appear under its name whole or not at all.
 *
 * Begun, it is an empty folder with a temporary name beside the target, locked with flock;
 * temporaries of the same target whose owner is dead are removed, with all that is in them. Mode,
 * ACLs, and owner and group where this process may set them, are those of the folder that has the
 * name, or else 0777 & ~umask.
 */
typedef struct hold_folder hold_folder;

/*
 * Begin to publish `path` (a symbolic link is followed; slashes may end it). -ENOTDIR where that is
 * no folder, -EACCES where this process may not write to it, -EBUSY for "/", "." and "..", and,
 * unless `replace`, -EEXIST where it is a folder with something in it. The directory that it is in
 * is held open. On success *out is the caller's, who ends it with hold_folder_commit or _abort.
 */
int hold_folder_begin(const char *path, bool replace, hold_folder **out);

/* The descriptor of the new folder; owned by the publication. */
int hold_folder_fd(const hold_folder *self);

/* All is in it: give it its mode, and bring it to the device if `durable`. Once, before commit. */
int hold_folder_complete(hold_folder *self, bool durable);

/*
 * Hold open what has the name now, for the caller to look at: its descriptor, owned by the
 * publication until the next look; -ENOENT where nothing has it, or another -errno.
 */
int hold_folder_look(hold_folder *self);

/*
 * From now on nothing is replaced but what the last look has found, and that only with `replace`;
 * without it, -EEXIST if by now there is a folder with something in it, or 1 if that is another:
 * the caller looks again. An empty one always is replaced.
 */
int hold_folder_allow(hold_folder *self, bool replace);

/*
 * Give the completed folder its name (unless `replace`, -EEXIST if by now there is a folder with
 * something in it), bring the directory to the device where `durable`, and remove what had the
 * name, without following links. A folder takes another's place in one step (RENAME_EXCHANGE);
 * where the file system cannot do that, in two, between which there is none of that name: a process
 * that dies right there leaves the old one under a temporary name, and the next hold_folder_begin
 * gives it its name back.
 * On failure the old folder is what it was and nothing is left behind; what of the old one could
 * not be removed is left to the next begin. Where the directory cannot be brought to the device,
 * nor the old folder get its name back, it stays under a temporary one until then.
 *
 * After hold_folder_allow, where another folder has the name than the last look found, that gets
 * it back, and the result is 1: nothing has happened, and the caller looks again; likewise where
 * nothing has the name any more, or an empty folder is no longer empty. -EBUSY where yet
 * another has taken the name meanwhile. All but 1 end the publication.
 */
int hold_folder_commit(hold_folder *self, bool durable);

/* Forget the folder: nothing is left of it. Ends the publication. */
void hold_folder_abort(hold_folder *self);

/* ---- tests -------------------------------------------------------------------------------- */

/*
 * Make the n-th system call from now (1 is the next) fail with `error` (an errno), or, where
 * `error` is 0, transfer only half of what it was asked to (a no-op for calls that transfer
 * nothing), or, where it is negative, come so many milliseconds late. n = 0 disarms. Counts calls
 * of all threads. Returns how many calls were made since it was last armed. For the fault-injection
 * tests alone.
 */
uint64_t hold_fault_arm(uint64_t n, int error);

/*
 * As hold_crc32, or, unless `to` is NULL, as hold_crc32_copy, by one of the variants that this
 * machine can run: 0 is the portable one, the last that which they use. False where there is no
 * such variant. For tests alone.
 */
bool hold_crc32_variant(size_t which, uint32_t *crc, void *to, const void *data, size_t nbytes);

/*
 * Make every call of this name fail with `error` (an errno), besides: a file system that lacks it.
 * Such calls are not counted. NULL: none. Names are those of the calls ("linkat"), with "tmpfile"
 * for openat(O_TMPFILE), "ioctl" for FICLONE. To be called while no other call of the engine runs.
 */
void hold_fault_ban(const char *name, int error);

/* Name of the call that the last armed fault hit ("pwrite"), or NULL where it hit none. */
const char *hold_fault_hit(void);

#endif
