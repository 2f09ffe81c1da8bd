/* Blocks of quantized numbers to float32. */
#include "dequantize.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

#define CHUNK 16384 /* blocks that a worker takes at once: 2 MiB of numbers */

#define INLINE static inline __attribute__((always_inline))

/* The value of a float16 whose bytes are at `p`. */
INLINE float half(const uint8_t *p)
{
    uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu, out;
    float value;
    if (rest >= 0x7c00u) { /* infinite or not a number */
        out = 0x7f800000u | rest << 13;
    } else if (rest >= 0x0400u) {
        out = (rest << 13) + ((127u - 15u) << 23);
    } else { /* subnormal: so many times 2^-24 */
        value = (float)rest * 0x1p-24f;
        memcpy(&out, &value, sizeof out);
    }
    out |= sign;
    memcpy(&value, &out, sizeof value);
    return value;
}

INLINE uint32_t word(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

INLINE void block_q8_0(const uint8_t *in, float *restrict out)
{
    float scale = half(in);
    for (int i = 0; i < HOLD_BLOCK; i++)
        out[i] = (float)(int8_t)in[2 + i] * scale;
}

INLINE void block_q4_0(const uint8_t *in, float *restrict out)
{
    float scale = half(in);
    for (int i = 0; i < HOLD_BLOCK / 2; i++) {
        out[i] = (float)((in[2 + i] & 15) - 8) * scale;
        out[i + HOLD_BLOCK / 2] = (float)((in[2 + i] >> 4) - 8) * scale;
    }
}

INLINE void block_q4_1(const uint8_t *in, float *restrict out)
{
    float scale = half(in), offset = half(in + 2);
    for (int i = 0; i < HOLD_BLOCK / 2; i++) {
        out[i] = (float)(in[4 + i] & 15) * scale + offset;
        out[i + HOLD_BLOCK / 2] = (float)(in[4 + i] >> 4) * scale + offset;
    }
}

/* Number i of a block of five bits each. */
INLINE int five(uint32_t low, uint32_t high, int i)
{
    return (int)(low | (high >> i & 1) << 4);
}

INLINE void block_q5_0(const uint8_t *in, float *restrict out)
{
    float scale = half(in);
    uint32_t high = word(in + 2);
    for (int i = 0; i < HOLD_BLOCK / 2; i++) {
        out[i] = (float)(five(in[6 + i] & 15u, high, i) - 16) * scale;
        out[i + HOLD_BLOCK / 2] =
            (float)(five(in[6 + i] >> 4, high, i + HOLD_BLOCK / 2) - 16) * scale;
    }
}

INLINE void block_q5_1(const uint8_t *in, float *restrict out)
{
    float scale = half(in), offset = half(in + 2);
    uint32_t high = word(in + 4);
    for (int i = 0; i < HOLD_BLOCK / 2; i++) {
        out[i] = (float)five(in[8 + i] & 15u, high, i) * scale + offset;
        out[i + HOLD_BLOCK / 2] =
            (float)five(in[8 + i] >> 4, high, i + HOLD_BLOCK / 2) * scale + offset;
    }
}

INLINE void convert(const hold_blocks *run)
{
    const uint8_t *in = run->data;
    float *out = run->out;
    const float *end = out + run->count * HOLD_BLOCK;
    switch (run->type) {
    case HOLD_Q8_0:
        for (; out < end; in += 34, out += HOLD_BLOCK)
            block_q8_0(in, out);
        break;
    case HOLD_Q4_0:
        for (; out < end; in += 18, out += HOLD_BLOCK)
            block_q4_0(in, out);
        break;
    case HOLD_Q4_1:
        for (; out < end; in += 20, out += HOLD_BLOCK)
            block_q4_1(in, out);
        break;
    case HOLD_Q5_0:
        for (; out < end; in += 22, out += HOLD_BLOCK)
            block_q5_0(in, out);
        break;
    default:
        for (; out < end; in += 24, out += HOLD_BLOCK)
            block_q5_1(in, out);
    }
}

typedef void (*converter)(const hold_blocks *run);

static void convert_portable(const hold_blocks *run)
{
    convert(run);
}

/* The same code for wider registers. Without fma: a product is rounded before it is added to. */
#if defined(__x86_64__)
__attribute__((target("avx2"))) static void convert_avx2(const hold_blocks *run)
{
    convert(run);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void
convert_avx512(const hold_blocks *run)
{
    convert(run);
}
#endif

/* Slowest first. Filled when the library is loaded, before any thread can call. */
static converter variants[3] = {convert_portable};
static size_t variant_count = 1;

__attribute__((constructor)) static void prepare(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        variants[variant_count++] = convert_avx2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        variants[variant_count++] = convert_avx512;
#endif
}

size_t hold_block_size(int type)
{
    switch (type) {
    case HOLD_Q4_0:
        return 18;
    case HOLD_Q4_1:
        return 20;
    case HOLD_Q5_0:
        return 22;
    case HOLD_Q5_1:
        return 24;
    case HOLD_Q8_0:
        return 34;
    default:
        return 0;
    }
}

bool hold_dequantize_variant(size_t which, const hold_blocks *run)
{
    if (which >= variant_count)
        return false;
    variants[which](run);
    return true;
}

typedef struct {
    const hold_blocks *runs;
    const uint64_t *first; /* chunks before each run, and at [n] all of them */
    size_t n;
} work;

/* The run that chunk i is of. */
static size_t find(const work *self, uint64_t i)
{
    size_t low = 0, high = self->n; /* first[low] <= i < first[high] */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (self->first[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static int convert_chunk(void *context, size_t i, hold_worker *worker)
{
    const work *self = context;
    size_t row = find(self, i);
    const hold_blocks *run = &self->runs[row];
    uint64_t begin = (i - self->first[row]) * CHUNK;
    uint64_t left = run->count - begin;
    (void)worker;
    hold_blocks part = {
        .data = run->data + begin * hold_block_size(run->type),
        .out = run->out + begin * HOLD_BLOCK,
        .count = left < CHUNK ? left : CHUNK,
        .type = run->type,
    };
    variants[variant_count - 1](&part);
    return 0;
}

int hold_dequantize(const hold_blocks *runs, size_t n, int threads)
{
    for (size_t i = 0; i < n; i++)
        if (hold_block_size(runs[i].type) == 0)
            return -EINVAL;
    uint64_t *first = calloc(n + 1, sizeof *first);
    if (!first)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        first[i + 1] = first[i] + runs[i].count / CHUNK + (runs[i].count % CHUNK != 0);
    work self = {.runs = runs, .first = first, .n = n};
    hold_job job = {.task = convert_chunk, .context = &self};
    int workers = threads > 0 ? threads : hold_cpu_count();
    int rc = first[n] ? hold_job_run(&job, 0, first[n], workers) : 0;
    free(first);
    return rc;
}
