/*
 * dlpack_abi.h - the structures of DLPack 1.x that cross between us and a framework.
 *
 * The layout is fixed by the DLPack specification for every version whose major number is 1, so
 * no header of a framework is needed to build. Only what this library touches is declared.
 */
#ifndef HOLD_DLPACK_ABI_H
#define HOLD_DLPACK_ABI_H

#include <stdint.h>

#define HOLD_DLPACK_MAJOR 1
#define HOLD_DLPACK_CPU 1
#define HOLD_DLPACK_CUDA 2

/* Lists the element type: kind of number, bits of one lane, lanes. */
typedef struct hold_dl_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} hold_dl_dtype;

/* Where memory is: a kind of device, and which one of its kind. */
typedef struct hold_dl_device {
    int32_t type;
    int32_t id;
} hold_dl_device;

/* A strided array. `strides` count elements; both arrays have ndim items and may be NULL at 0. */
typedef struct hold_dl_tensor {
    void *data;
    hold_dl_device device;
    int32_t ndim;
    hold_dl_dtype dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} hold_dl_tensor;

typedef struct hold_dl_version {
    uint32_t major;
    uint32_t minor;
} hold_dl_version;

/* An array with an owner: whoever has it calls deleter(self) once, from any thread. */
typedef struct hold_dl_managed hold_dl_managed;
struct hold_dl_managed {
    hold_dl_version version;
    void *manager_ctx;
    void (*deleter)(hold_dl_managed *self);
    uint64_t flags;
    hold_dl_tensor tensor;
};

/*
 * What a framework offers in the capsule "dlpack_exchange_api" of its tensor type. Each function
 * is called with the GIL and returns 0, or -1 with a Python exception set. Pointers of Python
 * objects are void * here so that this header needs no Python.h.
 */
typedef struct hold_dl_exchange {
    hold_dl_version version;
    struct hold_dl_exchange *prev; /* an older table, or NULL */
    void *allocate;
    void *export_managed;
    /* Make an object of `managed`, which is the framework's from then on; a new reference. */
    int (*import_managed)(hold_dl_managed *managed, void **object);
    /* Describe `object`; shape and strides belong to it. May be NULL. */
    int (*describe)(void *object, hold_dl_tensor *out);
    void *current_stream;
} hold_dl_exchange;

#endif
