/* Strided copies: a range of the image is cut into boxes, and a box is copied tile by tile. */
#include "strided.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/*
 * A layout made simple: axes of extent 1 dropped, axes that continue each other merged, a dense
 * innermost axis taken into the element, whose size is then that of the whole run.
 */
typedef struct {
    int ndim;
    int64_t itemsize;
    int64_t shape[HOLD_MAX_NDIM];
    int64_t strides[HOLD_MAX_NDIM]; /* in the tensor's memory */
    int64_t pitch[HOLD_MAX_NDIM];   /* in the image; the last is itemsize */
} box;

int hold_layout_check(const hold_layout *layout, uint64_t nbytes)
{
    if (layout->ndim < 0 || layout->ndim > HOLD_MAX_NDIM || layout->itemsize <= 0)
        return -EINVAL;
    int swap = layout->swap;
    if ((swap != 0 && swap != 2 && swap != 4 && swap != 8) ||
        (swap && layout->itemsize % swap != 0))
        return -EINVAL;
    uint64_t product = (uint64_t)layout->itemsize;
    for (int d = 0; d < layout->ndim; d++)
        if (layout->shape[d] < 0)
            return -EINVAL;
        else if (layout->shape[d] == 0)
            return nbytes == 0 ? 0 : -EINVAL;
    for (int d = 0; d < layout->ndim; d++)
        if (__builtin_mul_overflow(product, (uint64_t)layout->shape[d], &product))
            return -EINVAL;
    return product == nbytes ? 0 : -EINVAL;
}

static void simplify(const hold_layout *layout, box *out)
{
    int n = 0;
    for (int d = 0; d < layout->ndim; d++) {
        int64_t extent = layout->shape[d];
        if (extent == 1)
            continue;
        if (n && out->strides[n - 1] == layout->strides[d] * extent) {
            out->shape[n - 1] *= extent;
            out->strides[n - 1] = layout->strides[d];
        } else {
            out->shape[n] = extent;
            out->strides[n] = layout->strides[d];
            n++;
        }
    }
    out->itemsize = layout->itemsize;
    if (n && out->strides[n - 1] == out->itemsize) {
        n--;
        out->itemsize *= out->shape[n];
    }
    out->ndim = n;
    int64_t pitch = out->itemsize;
    for (int d = n - 1; d >= 0; d--) {
        out->pitch[d] = pitch;
        pitch *= out->shape[d];
    }
}

/* ---- one plane of a box: two axes --------------------------------------------------------- */

/*
 * Elements [0, np) x [0, nq): axis q is the innermost of the image, p the one that is finest in
 * memory. `memory` strides are sp and sq; the image is dense along q, with pitch dp along p.
 */
typedef struct {
    char *memory;
    char *image;
    int64_t np, nq, sp, sq, dp;
} plane;

/*
 * Tiles of a cache line by a cache line go through a small dense array, so that every line of
 * either side is touched once, whatever the strides do to the cache's sets. `size` and `tile` are
 * constants where these are inlined, and the inner memcpy a single move.
 */
#define INLINE static inline __attribute__((always_inline))
#define TILE_BYTES 4096 /* tile * tile * size at most */

INLINE void gather_tile(const plane *s, char *local, int64_t size, int64_t tile, int64_t p,
                        int64_t q)
{
    int64_t rows = s->np - p < tile ? s->np - p : tile;
    int64_t columns = s->nq - q < tile ? s->nq - q : tile;
    for (int64_t j = 0; j < columns; j++) {
        const char *from = s->memory + p * s->sp + (q + j) * s->sq;
        for (int64_t i = 0; i < rows; i++)
            memcpy(local + (i * tile + j) * size, from + i * s->sp, (size_t)size);
    }
    for (int64_t i = 0; i < rows; i++)
        memcpy(s->image + (p + i) * s->dp + q * size, local + i * tile * size,
               (size_t)(columns * size));
}

INLINE void scatter_tile(const plane *s, char *local, int64_t size, int64_t tile, int64_t p,
                         int64_t q)
{
    int64_t rows = s->np - p < tile ? s->np - p : tile;
    int64_t columns = s->nq - q < tile ? s->nq - q : tile;
    for (int64_t i = 0; i < rows; i++)
        memcpy(local + i * tile * size, s->image + (p + i) * s->dp + q * size,
               (size_t)(columns * size));
    for (int64_t j = 0; j < columns; j++) {
        char *to = s->memory + p * s->sp + (q + j) * s->sq;
        for (int64_t i = 0; i < rows; i++)
            memcpy(to + i * s->sp, local + (i * tile + j) * size, (size_t)size);
    }
}

INLINE void copy_elements(const plane *s, int64_t size, int64_t tile, bool gather)
{
    char local[TILE_BYTES];
    assert(tile * tile * size <= TILE_BYTES);
    if (s->np == 1 && gather)
        for (int64_t q = 0; q < s->nq; q++)
            memcpy(s->image + q * size, s->memory + q * s->sq, (size_t)size);
    else if (s->np == 1)
        for (int64_t q = 0; q < s->nq; q++)
            memcpy(s->memory + q * s->sq, s->image + q * size, (size_t)size);
    else
        for (int64_t p = 0; p < s->np; p += tile)
            for (int64_t q = 0; q < s->nq; q += tile)
                if (gather)
                    gather_tile(s, local, size, tile, p, q);
                else
                    scatter_tile(s, local, size, tile, p, q);
}

/* Elements of any other size: runs, mostly, for which a call of memcpy is nothing. */
static void copy_runs(const plane *s, int64_t itemsize, bool gather)
{
    for (int64_t p = 0; p < s->np; p++)
        for (int64_t q = 0; q < s->nq; q++) {
            char *memory = s->memory + p * s->sp + q * s->sq;
            char *image = s->image + p * s->dp + q * itemsize;
            memcpy(gather ? image : memory, gather ? memory : image, (size_t)itemsize);
        }
}

static void copy_plane(const plane *s, int64_t itemsize, bool gather)
{
    switch (itemsize) {
    case 1:
        copy_elements(s, 1, 64, gather);
        break;
    case 2:
        copy_elements(s, 2, 32, gather);
        break;
    case 4:
        copy_elements(s, 4, 16, gather);
        break;
    case 8:
        copy_elements(s, 8, 8, gather);
        break;
    case 16:
        copy_elements(s, 16, 8, gather);
        break;
    default:
        copy_runs(s, itemsize, gather);
    }
}

/* ---- boxes -------------------------------------------------------------------------------- */

static int64_t magnitude(int64_t stride)
{
    return stride < 0 ? -stride : stride;
}

/* The axis that is finest in memory, where that is not the last; else -1. */
static int finest_axis(const box *b, int first, int64_t extent)
{
    int best = -1;
    int64_t least = magnitude(b->strides[b->ndim - 1]);
    for (int d = first; d < b->ndim - 1; d++) {
        int64_t stride = magnitude(b->strides[d]);
        if ((d == first ? extent : b->shape[d]) > 1 && stride < least) {
            least = stride;
            best = d;
        }
    }
    return best;
}

/* All elements of axes `first` and on, the first of them cut to `extent`. */
static void copy_box(const box *b, int first, int64_t extent, char *memory, char *image,
                     bool gather)
{
    assert(first < b->ndim);
    int last = b->ndim - 1;
    int p = finest_axis(b, first, extent);
    plane s = {.np = 1, .nq = last == first ? extent : b->shape[last], .sq = b->strides[last]};
    if (p >= 0) {
        s.np = p == first ? extent : b->shape[p];
        s.sp = b->strides[p];
        s.dp = b->pitch[p];
    }
    int64_t index[HOLD_MAX_NDIM] = {0};
    for (;;) {
        s.memory = memory;
        s.image = image;
        copy_plane(&s, b->itemsize, gather);
        int d = last - 1;
        for (; d >= first; d--) {
            if (d == p)
                continue;
            memory += b->strides[d];
            image += b->pitch[d];
            if (++index[d] < (d == first ? extent : b->shape[d]))
                break;
            memory -= b->strides[d] * index[d];
            image -= b->pitch[d] * index[d];
            index[d] = 0;
        }
        if (d < first)
            return;
    }
}

/* Part [begin, end) of one element. */
static void copy_part(char *memory, char *image, int64_t begin, int64_t end, bool gather)
{
    memcpy(gather ? image : memory + begin, gather ? memory + begin : image,
           (size_t)(end - begin));
}

/*
 * Bytes [begin, end) of the part of the image that axes `d` and on make up. It is a piece of one
 * index of axis d, then whole ones, then a piece of another: the whole ones are a box, the pieces
 * are the same thing one axis further in. `image` is where byte `begin` is.
 */
static void copy_range(const box *b, int d, char *memory, char *image, int64_t begin, int64_t end,
                       bool gather)
{
    while (begin < end) {
        if (d == b->ndim) {
            copy_part(memory, image, begin, end, gather);
            return;
        }
        int64_t pitch = b->pitch[d];
        int64_t i = begin / pitch, within = begin % pitch;
        int64_t whole = end / pitch - i;
        char *place = memory + i * b->strides[d];
        if (within == 0 && whole > 0) {
            copy_box(b, d, whole, place, image, gather);
            begin += whole * pitch;
            image += whole * pitch;
            continue;
        }
        int64_t stop = end - begin < pitch - within ? within + end - begin : pitch;
        copy_range(b, d + 1, place, image, within, stop, gather);
        image += stop - within;
        begin += stop - within;
    }
}

/* ---- byte order --------------------------------------------------------------------------- */

#define DEFINE_SWAP(bits)                                                                          \
    static void swap_##bits(char *p, size_t nbytes)                                                \
    {                                                                                              \
        for (char *end = p + nbytes; p < end; p += (bits) / 8) {                                   \
            uint##bits##_t v;                                                                      \
            memcpy(&v, p, sizeof v);                                                               \
            v = __builtin_bswap##bits(v);                                                          \
            memcpy(p, &v, sizeof v);                                                               \
        }                                                                                          \
    }

DEFINE_SWAP(16)
DEFINE_SWAP(32)
DEFINE_SWAP(64)

static void swap_units(char *data, uint64_t nbytes, int unit)
{
    (unit == 2 ? swap_16 : unit == 4 ? swap_32 : swap_64)(data, (size_t)nbytes);
}

/*
 * A range that swaps: the units cut by its ends byte for byte, where byte i of a unit of u bytes
 * is byte u - 1 - i of the memory's; what is between them all at once.
 */
static void copy_swapped(const box *b, int unit, char *memory, char *image, uint64_t begin,
                         uint64_t end, bool gather)
{
    uint64_t u = (uint64_t)unit;
    while (begin < end) {
        uint64_t nbytes = 1;
        if (begin % u == 0 && end - begin >= u) {
            nbytes = (end - begin) / u * u;
            if (!gather)
                swap_units(image, nbytes, unit);
            copy_range(b, 0, memory, image, (int64_t)begin, (int64_t)(begin + nbytes), gather);
            if (gather)
                swap_units(image, nbytes, unit);
        } else {
            uint64_t other = begin - begin % u + (u - 1 - begin % u);
            copy_range(b, 0, memory, image, (int64_t)other, (int64_t)other + 1, gather);
        }
        begin += nbytes;
        image += nbytes;
    }
}

static void copy_image(const hold_layout *layout, char *memory, uint64_t begin, uint64_t end,
                       char *image, bool gather)
{
    box b;
    simplify(layout, &b);
    if (layout->swap)
        copy_swapped(&b, layout->swap, memory, image, begin, end, gather);
    else
        copy_range(&b, 0, memory, image, (int64_t)begin, (int64_t)end, gather);
}

void hold_strided_gather(const hold_layout *layout, const void *base, uint64_t begin, uint64_t end,
                         void *out)
{
    /* Gathering never writes to the tensor's memory; one copy routine serves both ways. */
    copy_image(layout, (char *)(uintptr_t)base, begin, end, out, true);
}

void hold_strided_scatter(const hold_layout *layout, void *base, uint64_t begin, uint64_t end,
                          void *in)
{
    copy_image(layout, base, begin, end, in, false);
}
