/*
 * gguf.h - the header of a GGUF file: key-value pairs, tensor infos, and where the tensors stand.
 * No I/O; no state.
 *
 * The scanner takes hostile bytes: it allocates nothing, reads each a constant number of times
 * and never recurses. All numbers in the file are little-endian, on any machine.
 * Threads: any number of callers, on different arguments.
 */
#ifndef HOLD_GGUF_H
#define HOLD_GGUF_H

#include <stddef.h>
#include <stdint.h>

#define HOLD_GGUF_MAX_DIMS 4           /* extents that a tensor may have */
#define HOLD_GGUF_MAX_NAME 63          /* bytes of a tensor's name */
#define HOLD_GGUF_MAX_COUNT (1u << 30) /* bytes of a string, elements of an array */
#define HOLD_GGUF_MIN_PAIR 14          /* bytes that a pair takes at least */
#define HOLD_GGUF_MIN_TENSOR 24        /* bytes that a tensor info takes at least */
#define HOLD_GGUF_MAX_SHAPE 5          /* extents in memory: blocks have one for their bytes */

/* Types of values. */
enum {
    HOLD_GGUF_BOOL = 7,
    HOLD_GGUF_STRING = 8,
    HOLD_GGUF_ARRAY = 9,
    HOLD_GGUF_KINDS = 13,
};

/* What is wrong with a header. */
enum {
    HOLD_GGUF_END = 1,    /* the bytes end: `expected` are needed from the start of the file on */
    HOLD_GGUF_KEY,        /* an empty key */
    HOLD_GGUF_KIND,       /* a value of type `found` */
    HOLD_GGUF_NESTED,     /* an array of arrays */
    HOLD_GGUF_TRUTH,      /* a bool that is `found`, neither 0 nor 1 */
    HOLD_GGUF_COUNT,      /* a string of `found` bytes, or an array of as many elements */
    HOLD_GGUF_NAME,       /* a tensor's name of `found` bytes */
    HOLD_GGUF_NDIM,       /* a tensor of `found` extents */
    HOLD_GGUF_EXTENT,     /* a negative extent: `found`, as an int64 */
    HOLD_GGUF_TYPE,       /* a tensor of type `found`, as an int32, which is not in the table */
    HOLD_GGUF_ROW,        /* rows of `found` elements, which are no whole blocks of `expected` */
    HOLD_GGUF_OVERFLOW,   /* 2^63 elements or bytes, or more */
    HOLD_GGUF_UNALIGNED,  /* a tensor at `found`, no multiple of `expected` */
    HOLD_GGUF_TILING,     /* a tensor at `found`, where it should stand at `expected` */
    HOLD_GGUF_SHORT,      /* a tensor that ends at `expected`, in a file of `found` bytes */
};

/* One key and its value: PAIR in formats/_gguf.pyx. Positions are those in the bytes scanned. */
typedef struct hold_gguf_pair {
    uint64_t key;
    uint64_t key_length;
    uint64_t value;  /* of an array or string: of the first byte of what it holds */
    uint64_t count;  /* elements of an array, bytes of a string; else 1 */
    uint64_t nbytes; /* from `value` on */
    int32_t kind;    /* type of the value */
    int32_t element; /* type of the elements of an array, else -1 */
} hold_gguf_pair;

/* One tensor: TENSOR in formats/_gguf.pyx. hold_gguf_tensors() fills all but the last four. */
typedef struct hold_gguf_tensor {
    uint64_t name;   /* position of its first byte */
    uint64_t offset; /* from the start of the data; from that of the file, once laid */
    int64_t extents[HOLD_GGUF_MAX_DIMS]; /* the first is that along which elements are adjacent */
    uint32_t name_length;
    uint32_t ndim;
    int32_t type;
    int32_t dtype;       /* code in the dtype table */
    uint64_t nbytes;
    int64_t dims;        /* index of the first extent in memory */
    uint64_t shape_ndim; /* how many extents there are in memory */
} hold_gguf_tensor;

/* One type of tensors, at the position that is its number. */
typedef struct hold_gguf_type {
    uint32_t elements; /* of a block; 0 where there is no such type */
    uint32_t nbytes;   /* of a block */
    int32_t dtype;     /* code in the dtype table of what is in memory */
    uint32_t raw;      /* not 0: blocks stay as they are, with an axis for their bytes */
} hold_gguf_type;

/* Where a header is wrong, and how. Fields that a code has no use for are 0. */
typedef struct hold_gguf_fault {
    int code;
    uint64_t row;      /* the pair or tensor that it is about */
    uint64_t position; /* in the bytes scanned */
    uint64_t expected;
    uint64_t found;
} hold_gguf_fault;

/* Bytes being scanned. */
typedef struct hold_gguf_bytes {
    const uint8_t *data;
    uint64_t nbytes;
    uint64_t at; /* where the next call goes on */
} hold_gguf_bytes;

/*
 * Scan `n` pairs, or tensor infos, into `rows`. Returns 0, or the code in `fault`; bytes->at is
 * behind the last row on success, and anywhere else.
 */
int hold_gguf_pairs(hold_gguf_bytes *bytes, hold_gguf_pair *rows, uint64_t n,
                    hold_gguf_fault *fault);
int hold_gguf_tensors(hold_gguf_bytes *bytes, hold_gguf_tensor *rows, uint64_t n,
                      hold_gguf_fault *fault);

/* Where the data of a file stand. */
typedef struct hold_gguf_data {
    uint64_t start;     /* from the start of the file; less than 2^32 */
    uint64_t alignment; /* of tensors; a power of two, less than 2^32 */
    int64_t size;       /* of the file; -1 where nobody knows */
} hold_gguf_data;

/*
 * Say where tensors stand and what shape they have in memory. Each has to follow the one before
 * it, at the next multiple of the alignment.
 * `dims` has room for HOLD_GGUF_MAX_SHAPE * n; *ndims: how many it got. Returns as above.
 */
int hold_gguf_lay(hold_gguf_tensor *rows, uint64_t n, const hold_gguf_type *types, uint64_t ntypes,
                  const hold_gguf_data *data, int64_t *dims, uint64_t *ndims,
                  hold_gguf_fault *fault);

/* Positions and lengths of the `n` strings that follow. Returns as above. */
int hold_gguf_strings(hold_gguf_bytes *bytes, uint64_t *starts, uint64_t *lengths, uint64_t n,
                      hold_gguf_fault *fault);

#endif
