/* header_scan.h - what the two parts of the scanner share. Not for others. */
#ifndef HOLD_HEADER_SCAN_H
#define HOLD_HEADER_SCAN_H

#include "header.h"
#include "hold.h"

/* Types that are read compactly, those with the lowest codes. */
#define HOLD_SCAN_TYPES 64

/* The tensor that is being read. */
typedef struct hold_scan_tensor {
    unsigned seen; /* keys */
    size_t type;   /* code */
    size_t dims;   /* index of the first extent */
    size_t ndim;
    uint64_t begin, end;
} hold_scan_tensor;

typedef struct hold_scan {
    hold_json json;
    const uint8_t *bytes;
    size_t nbytes;
    hold_header_types types;
    hold_header_opening openings[HOLD_SCAN_TYPES]; /* by type, once something was read compactly */
    size_t nopenings;
    size_t opened; /* type that was last read compactly */
    hold_header *out;
    hold_header_fault *fault;
    hold_scan_tensor tensor;
    bool has_metadata;
} hold_scan;

/* Allocate for hold_scan_room. */
int hold_scan_grow(hold_scan *self);

/* Make room for one more tensor, with HOLD_MAX_NDIM extents. Returns 0 or the code. */
static inline int hold_scan_room(hold_scan *self)
{
    const hold_header *out = self->out;

    if (out->nnames < out->names_room && out->dims_room - out->ndims >= HOLD_MAX_NDIM)
        return HOLD_JSON_OK;
    return hold_scan_grow(self);
}

/*
 * Read the members of the header from the cursor on that are tensors as nearly every writer puts
 * them: without white space or escapes, dtype, shape and data_offsets in this order, all sound.
 * Stops behind the last of them, where the cursor stays if there is none; what does not look so is
 * for the other part to read, or to say what is wrong with it. Returns 0 or the code.
 */
int hold_scan_compact(hold_scan *self);

#endif
