/*
 * header.h - the JSON header of a safetensors file, scanned and written. No I/O; no state.
 *
 * The scanner takes hostile bytes: it allocates in proportion to their number, reads each a
 * constant number of times, and never recurses. What it accepts is written in docs/format.md.
 * Threads: any number of callers, on different arguments.
 */
#ifndef HOLD_HEADER_H
#define HOLD_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "json.h"

#define HOLD_HEADER_ALIGN 4096 /* where the data of a file that is written begins */
#define HOLD_HEADER_PREFIX 8   /* bytes of the length in front of the JSON */

/* What is wrong with a header, beyond the codes of json.h. */
enum {
    HOLD_HEADER_NOMEM = HOLD_JSON_CODES,
    HOLD_HEADER_TRAILING,   /* bytes behind the object */
    HOLD_HEADER_METADATA,   /* __metadata__ twice; emit: a tensor of that name */
    HOLD_HEADER_REPEATED,   /* a key twice in one tensor's object */
    HOLD_HEADER_NO_DTYPE,   /* a tensor's object without this key */
    HOLD_HEADER_NO_SHAPE,   /* likewise */
    HOLD_HEADER_NO_OFFSETS, /* likewise */
    HOLD_HEADER_TAG,        /* unknown dtype */
    HOLD_HEADER_NDIM,       /* more than HOLD_MAX_NDIM extents */
    HOLD_HEADER_PAIR,       /* data_offsets are not two numbers */
    HOLD_HEADER_BACKWARD,   /* data_offsets end before they begin */
    HOLD_HEADER_OVERFLOW,   /* the size is beyond 64 bits */
    HOLD_HEADER_BITS,       /* the size is not a whole number of bytes */
    HOLD_HEADER_ODD,        /* the last extent does not fill the elements in memory */
    HOLD_HEADER_SPAN,       /* `expected` bytes are needed, the offsets span `found` */
    HOLD_HEADER_DUPLICATE,  /* a name twice */
    HOLD_HEADER_TILING,     /* a tensor begins at `found`, the one before it ends at `expected` */
    HOLD_HEADER_VIEW,       /* a view to be written contradicts itself */
};

/* A run of UTF-8 bytes that another owns. */
typedef struct hold_text {
    const uint8_t *data;
    size_t length;
} hold_text;

/* One element type, at the position that is its code. */
typedef struct hold_header_type {
    hold_text tag; /* data is NULL where safetensors has no such type */
    uint32_t bits;
    uint32_t pack; /* elements in the file for one in memory, along the last axis */
} hold_header_type;

typedef struct hold_header_types {
    const hold_header_type *rows;
    size_t n;
} hold_header_types;

/* What follows a tensor's name up to its first extent: `":{"dtype":"F32","shape":[`. */
typedef struct hold_header_opening {
    uint8_t length; /* 0 where there is none: no tag, or one of more than 16 bytes */
    uint8_t text[47];
} hold_header_opening;

/* Make the opening of a type: of 24 to 40 bytes, where there is one. */
void hold_header_open(const hold_header_type *type, hold_header_opening *out);

/* One tensor of a file: ENTRY in holdfast/layout.py. */
typedef struct hold_header_entry {
    uint64_t offset; /* from the start of the file */
    uint64_t nbytes;
    int64_t dims; /* index of the first extent */
    int16_t dtype;
    int16_t ndim;
    uint32_t file;
} hold_header_entry;

/* One tensor in memory: VIEW in holdfast/views.py. */
typedef struct hold_header_view {
    uint64_t address;
    uint64_t nbytes;
    int64_t dims;
    int32_t dtype;
    int16_t ndim;
    uint16_t flags;
} hold_header_view;

/* Where a header is wrong, and how. Fields that a code has no use for are 0. */
typedef struct hold_header_fault {
    int code;
    int32_t type;      /* of the tensor it is about, where that was read whole */
    int64_t entry;     /* the tensor it is about, or -1 */
    uint64_t position; /* in the bytes that were given; 0 where it is about none */
    uint64_t expected; /* meaning by code */
    uint64_t found;
    uint64_t begin; /* data_offsets of the tensor */
    uint64_t end;
    size_t dims; /* its extents, as the header has them */
    size_t ndim;
} hold_header_fault;

/* ---- names -------------------------------------------------------------------------------- */

/*
 * Positions of names by a hash that the writer of the file cannot know. It is a quick one; where
 * searches in it take longer than they should, the table is made anew with SipHash.
 */
typedef struct hold_names {
    uint64_t *slots; /* upper half of the hash, position + 1; 0 where free */
    size_t mask;
    uint64_t key[2];
    bool careful; /* SipHash */
} hold_names;

/*
 * Index n names, n < 2^32 - 1. Returns 0; -ENOMEM; or -EEXIST where two are equal, and the position
 * of the second in *duplicate. The table is freed by hold_names_free, after failures too.
 */
int hold_names_build(hold_names *self, const hold_text *names, size_t n, const uint64_t key[2],
                     size_t *duplicate);

/* Position of `wanted` among the names that were indexed, or -1; none are in a zeroed table. */
int64_t hold_names_find(const hold_names *self, const hold_text *names, hold_text wanted);

void hold_names_free(hold_names *self);

/* ---- scanning ----------------------------------------------------------------------------- */

typedef struct hold_header_pair {
    hold_json_span key;
    hold_json_span value;
} hold_header_pair;

/* A header that was scanned. Names and pairs point into the bytes that were given, or the arena. */
typedef struct hold_header {
    hold_header_entry *entries; /* n rows, in header order */
    hold_text *names;           /* n, or one more while a fault is about the last */
    int64_t *dims;              /* ndims extents, as in memory */
    hold_header_pair *pairs;    /* npairs of __metadata__, keys not checked for being unique */
    uint8_t *arena;             /* names that had escapes, without them */
    hold_names index;
    size_t n, nnames, ndims, npairs;
    size_t entries_room, names_room, dims_room, pairs_room, arena_room, arena_used;
    uint64_t nbytes; /* of the data */
} hold_header;

/*
 * Scan the first nbytes >= 8 bytes of a file, the length (not looked at) and the JSON. Fills
 * *out, which hold_header_free gives back, after failures too: there it holds what was read, for
 * the message. Keeps `bytes`. Returns 0 or fault->code.
 */
int hold_header_scan(const uint8_t *bytes, size_t nbytes, hold_header_types types,
                     const uint64_t key[2], hold_header *out, hold_header_fault *fault);

/* Check that the entries, in some order, tile [0, nbytes) of the data, which begins at `base`. */
int hold_header_tile(hold_header *self, uint64_t base, hold_header_fault *fault);

void hold_header_free(hold_header *self);

/*
 * Bytes of a tensor with these extents as a header counts them. Returns 0 or the code of what is
 * wrong: overflow (in the order of the extents, so that a later 0 does not mend it), or bits over.
 */
int hold_header_nbytes(const hold_header_type *type, const int64_t *dims, size_t ndim,
                       uint64_t *out);

/* ---- writing ------------------------------------------------------------------------------ */

/* What a header is written from; nothing is kept. */
typedef struct hold_header_source {
    hold_header_types types;
    size_t bytes_type; /* code of the type that stands in for those without a tag */
    const hold_text *names;
    const hold_header_view *views;
    const uint64_t *offsets; /* of the tensors, from the start of the data */
    const int64_t *dims;
    size_t n, ndims;
    const hold_text *pairs; /* key, value, key, value of __metadata__ */
    size_t npairs;
} hold_header_source;

/* What hold_header_emit needs to know beforehand. */
typedef struct hold_header_room {
    size_t nbytes; /* to write into: a little more than are written */
    bool escapes;  /* whether a name needs them */
} hold_header_room;

/*
 * Find how much room a header needs. Names are checked to be unique (`key` as in hold_names_build).
 * Returns 0 or fault->code.
 */
int hold_header_measure(const hold_header_source *source, const uint64_t key[2],
                        hold_header_room *out, hold_header_fault *fault);

/*
 * Write length, JSON and padding into the room.nbytes bytes at `out`: *nbytes, a multiple of
 * HOLD_HEADER_ALIGN. A type without a tag, and a 0-d tensor whose elements are packed, become bytes
 * with one more extent. Names are checked not to be that of the metadata, views to agree with the
 * table and with themselves. value_at[i] is where the text of the i-th value begins.
 * Returns 0 or fault->code.
 */
int hold_header_emit(const hold_header_source *source, hold_header_room room, uint8_t *out,
                     size_t *nbytes, uint64_t *value_at, hold_header_fault *fault);

/* Eight lower-case hexadecimal digits for each of n numbers. */
void hold_header_hex(const uint32_t *values, size_t n, uint8_t *out);

/* The inverse, of 8 * n bytes. Returns whether they are such digits; if not, *out is undefined. */
bool hold_header_unhex(const uint8_t *text, size_t n, uint32_t *out);

/* CRC-32 of a header whose eight digits at `at` count as '0'. at + 8 <= nbytes. */
uint32_t hold_header_crc(const uint8_t *bytes, size_t nbytes, size_t at);

#endif
