/*
 * zip.h - the container of PyTorch's and NumPy's files: its directory read, its headers written.
 * No I/O: the caller brings the bytes; no inflating either.
 *
 * The reader takes hostile bytes. It allocates in proportion to those it is given, reads each a
 * constant number of times, and takes an archive only where every reader of zip files sees the
 * same records at the same places: the headers tile the file from its first byte to its last, and
 * what is said twice (directory and local header, 32 and 64 bits) is the same both times.
 * Threads: any number of callers, on different arguments.
 */
#ifndef HOLD_ZIP_H
#define HOLD_ZIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "header.h"

#define HOLD_ZIP_LOCAL 30   /* bytes of a local header, before name and extra field */
#define HOLD_ZIP_CENTRAL 46 /* bytes of an entry of the directory, likewise */
#define HOLD_ZIP_END 22     /* bytes of the end record, before its comment */
#define HOLD_ZIP_LOCATOR 20 /* bytes of the zip64 locator */
#define HOLD_ZIP_END64 56   /* bytes of the zip64 end record */
/* The most bytes at the end of a file that say where its directory is. */
#define HOLD_ZIP_TAIL (HOLD_ZIP_END + 0xffff + HOLD_ZIP_LOCATOR + HOLD_ZIP_END64)
#define HOLD_ZIP_EXPANSION 1032u          /* bytes that deflate makes of one, at most */
#define HOLD_ZIP_MOST ((uint64_t)1 << 29) /* bytes that a directory may have */

#define HOLD_ZIP_STORED 0
#define HOLD_ZIP_DEFLATED 8

/* What is wrong with an archive; in parentheses what fault.expected and fault.found are. */
enum {
    HOLD_ZIP_OK,
    HOLD_ZIP_NOMEM,
    HOLD_ZIP_NO_END,    /* no end record */
    HOLD_ZIP_TRAILING,  /* the end record's comment does not end the file (file size, its end) */
    HOLD_ZIP_AMBIGUOUS, /* a second end record could be meant, at (offset) `found` */
    HOLD_ZIP_DISKS,     /* more than one disk (0 or 1, the number) */
    HOLD_ZIP_LOCATOR_BAD, /* the zip64 locator points elsewhere (where it should, where it does) */
    HOLD_ZIP_END64_BAD, /* no zip64 end record before its locator, or not of 56 bytes (44, found) */
    HOLD_ZIP_CONTRARY,  /* end record and zip64 end record differ (zip64, 32 bits) */
    HOLD_ZIP_PLACE,     /* the directory does not end where the end records begin (that, its end) */
    HOLD_ZIP_HUGE,      /* the directory is beyond HOLD_ZIP_MOST (that, its size) */
    HOLD_ZIP_COUNT,     /* the directory has no room for (number) `found` entries of 47 bytes */
    HOLD_ZIP_ENTRY,     /* no entry of the directory where one should be */
    HOLD_ZIP_SHORT,     /* the entry runs past the directory */
    HOLD_ZIP_REST,      /* bytes of the directory after its last entry (0, number) */
    HOLD_ZIP_VERSION,   /* a newer version is needed (63, needed) */
    HOLD_ZIP_FLAGS,     /* a flag beyond those known (0, those flags) */
    HOLD_ZIP_METHOD,    /* neither stored nor deflated (0, method) */
    HOLD_ZIP_STORED_SIZE, /* stored, but of two sizes (size, packed) */
    HOLD_ZIP_RATIO,       /* deflated, but `found` bytes do not come from `expected` */
    HOLD_ZIP_NAME,        /* empty, or NUL, backslash, absolute, an empty, "." or ".." part */
    HOLD_ZIP_OTHER_NAME,  /* the extra field gives another name */
    HOLD_ZIP_FOLDER,      /* the name of a folder, with bytes (0, number) */
    HOLD_ZIP_EXTRA,       /* the extra field is cut off, or has zip64 twice */
    HOLD_ZIP_EXTRA64,     /* the zip64 field has the wrong length (expected, found) */
    HOLD_ZIP_HEADER,      /* the local header is not before the directory (directory, header) */
    HOLD_ZIP_TWICE,       /* a name twice; `found` is the other record */
    HOLD_ZIP_PREFIX,      /* bytes before the first record (0, number) */
    HOLD_ZIP_OVERLAP,     /* begins before the one before it ends (that end, its begin) */
    HOLD_ZIP_GAP,         /* bytes of nobody after the payload (number allowed, number) */
    HOLD_ZIP_LOCAL_BAD,   /* no local header where the directory says */
    HOLD_ZIP_LOCAL_FLAGS, /* local header and directory differ (directory, local) */
    HOLD_ZIP_LOCAL_METHOD,
    HOLD_ZIP_LOCAL_CRC,
    HOLD_ZIP_LOCAL_SIZE,
    HOLD_ZIP_LOCAL_PACKED,
    HOLD_ZIP_LOCAL_NAME,
    HOLD_ZIP_PAST,       /* the payload runs past the directory's start (that, its end) */
    HOLD_ZIP_DESCRIPTOR, /* the descriptor after the payload has no signature */
    HOLD_ZIP_DESCRIPTOR_CRC, /* ... or says something else than the directory (directory, found) */
    HOLD_ZIP_DESCRIPTOR_SIZE,
    HOLD_ZIP_DESCRIPTOR_PACKED,
    HOLD_ZIP_LONG,     /* emit: a name of more than 65535 bytes with the root (65535, length) */
    HOLD_ZIP_TOO_LARGE /* emit: the file would have 2^63 bytes or more */
};

/* Where an archive is wrong, and how. */
typedef struct hold_zip_fault {
    int code;
    int64_t record;    /* position in the directory, or -1 */
    uint64_t position; /* from the start of the file */
    uint64_t expected; /* meaning by code */
    uint64_t found;
} hold_zip_fault;

/* One record: RECORD in holdfast/formats/_zip.pyx. */
typedef struct hold_zip_record {
    uint64_t header; /* where its local header begins */
    uint64_t offset; /* where its payload begins */
    uint64_t packed; /* bytes of the payload in the file */
    uint64_t size;   /* ... and once inflated */
    uint32_t crc;    /* 0 may mean that there is none */
    uint16_t method;
    uint16_t flags;
} hold_zip_record;

/* ---- reading ------------------------------------------------------------------------------ */

/* Where the directory stands. */
typedef struct hold_zip_tail {
    uint64_t start; /* of the directory */
    uint64_t size;  /* of it */
    uint64_t count; /* of its entries */
} hold_zip_tail;

/*
 * Find the directory from `bytes`, the last nbytes of a file of `size` bytes; nbytes is `size` or
 * HOLD_ZIP_TAIL, whichever is less. Returns 0 or fault->code.
 */
int hold_zip_find(const uint8_t *bytes, size_t nbytes, uint64_t size, hold_zip_tail *out,
                  hold_zip_fault *fault);

/* A directory that was read. */
typedef struct hold_zip {
    hold_zip_record *records; /* n, in the order of the directory */
    hold_text *names;         /* n, in the bytes of the directory */
    hold_text *folded;        /* n, ASCII letters in lower case, in `arena`; `names` if `twins` */
    uint32_t *order;          /* rows by ascending header */
    uint8_t *arena;
    hold_names index; /* of `folded` */
    size_t n;
    size_t root;     /* length of what stands before the first slash, the same in all; or 0 */
    size_t foreign;  /* names that are not ASCII */
    bool twins;      /* names differ in case alone: those of the records in `twin` are the first */
    size_t twin[2];
    uint64_t start;  /* of the directory */
    /* How far hold_zip_walk() came: */
    size_t next;     /* in `order` */
    uint64_t end;    /* of the payload before */
    uint64_t needed; /* bytes from there that it is known to want */
} hold_zip;

/*
 * Read the entries of a directory, tail->size bytes at `bytes`, which are kept. `key` as in
 * hold_names_build(). Fills *out but for `offset`; hold_zip_free() gives it back, after failures
 * too: n then counts the records that may be spoken of. Returns 0 or fault->code.
 */
int hold_zip_read(const uint8_t *bytes, const hold_zip_tail *tail, const uint64_t key[2],
                  hold_zip *out, hold_zip_fault *fault);

/*
 * The bytes of the file that hold_zip_walk() wants next, up to about 1 MiB of them: local headers,
 * and payloads between headers that are near each other. *nbytes is 0 when all were looked at.
 */
void hold_zip_want(const hold_zip *self, uint64_t *offset, uint64_t *nbytes);

/*
 * Compare the local headers and descriptors in the bytes that hold_zip_want() asked for with the
 * directory, and set `offset` of their records. Repeat until it wants no more. Nobody else may
 * change the bytes meanwhile. Returns 0 or fault->code.
 */
int hold_zip_walk(hold_zip *self, const uint8_t *bytes, hold_zip_fault *fault);

/* Row of the record of exactly this name, or -1. `room` holds wanted.length bytes. */
int64_t hold_zip_lookup(const hold_zip *self, hold_text wanted, uint8_t *room);

void hold_zip_free(hold_zip *self);

/* Code of what is wrong with a name (HOLD_ZIP_NAME), or 0. */
int hold_zip_check_name(hold_text name);

/* Copy a name to `out`, ASCII letters in lower case. */
void hold_zip_fold(hold_text name, uint8_t *out);

/* ---- writing ------------------------------------------------------------------------------ */

/* A record to be written, and where it goes. */
typedef struct hold_zip_item {
    hold_text name;          /* without the root */
    uint64_t size;           /* of the payload */
    const uint8_t *payload;  /* where that is written along with the headers; else NULL */
    uint64_t header, offset; /* out: in the file */
    uint64_t descriptor;     /* out: in the data, of the CRC-32 in the descriptor; 0: none */
    uint64_t central;        /* out: in the data, of the CRC-32 in the directory */
} hold_zip_item;

/* What is written around payloads that stand elsewhere in memory. */
typedef struct hold_zip_plan {
    hold_zip_item *items; /* n */
    size_t n;
    hold_text root;
    uint64_t alignment; /* of payloads in the file: 1 .. 32768 */
    uint64_t size;      /* out: of the file */
    uint64_t nbytes;    /* out: of the data */
    size_t npieces;     /* out: runs of the data that are together in the file */
} hold_zip_plan;

/* A run of the data. */
typedef struct hold_zip_piece {
    uint64_t offset; /* in the file */
    uint64_t nbytes;
    uint64_t start; /* in the data */
} hold_zip_piece;

/*
 * Find where everything goes. Names are checked as hold_zip_read() does. Returns 0 or fault->code.
 */
int hold_zip_measure(hold_zip_plan *plan, const uint64_t key[2], hold_zip_fault *fault);

/*
 * Write plan->nbytes bytes at `out`, of a plan that was measured, and plan->npieces pieces. CRC-32s
 * are those of the payloads that are there, and 0.
 */
void hold_zip_emit(const hold_zip_plan *plan, uint8_t *out, hold_zip_piece *pieces);

/* Set the CRC-32 at `descriptor` (where that is not 0) and at `central` in the data. */
void hold_zip_stamp(uint8_t *data, uint64_t descriptor, uint64_t central, uint32_t crc);

#endif
