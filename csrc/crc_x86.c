/*
 * The CRC-32 by carry-less multiplication, for x86-64.
 *
 * A block of D bits that stands D bits before another is folded onto it: its halves, multiplied
 * by x^(D+32) and x^(D-32) modulo the polynomial, have the same remainder at the later place.
 * Several accumulators run side by side; at the end one of 128 bits is left, and its remainder is
 * what the tables give for its sixteen bytes.
 */
#include "crc.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

/* The two factors for a fold over `bits`, each reversed and shifted by one, as the product of
 * reversed operands asks. Low: x^(bits + 32); high: x^(bits - 32). */
#define FOLD_128_LOW 0x1751997d0
#define FOLD_128_HIGH 0x0ccaa009e
#define FOLD_512_LOW 0x154442bd4
#define FOLD_512_HIGH 0x1c6e41596
#define FOLD_1024_LOW 0x1e88ef372
#define FOLD_1024_HIGH 0x14a7fe880
#define FOLD_2048_LOW 0x11542778a
#define FOLD_2048_HIGH 0x1322d1430

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define TARGET_128 __attribute__((target("pclmul,sse4.1")))
#define TARGET_256 __attribute__((target("vpclmulqdq,pclmul,avx2")))
#define TARGET_512 __attribute__((target("vpclmulqdq,pclmul,avx512f")))

TARGET_128 static inline __m128i fold128(__m128i x, __m128i k, __m128i next)
{
    __m128i low = _mm_clmulepi64_si128(x, k, 0x00);
    __m128i high = _mm_clmulepi64_si128(x, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Fold what is left from `at` on, sixteen bytes at a time, and take the remainder. */
TARGET_128 static uint32_t finish(__m128i x, const uint8_t *data, size_t at, size_t nbytes,
                                  uint8_t *to)
{
    const __m128i k = _mm_set_epi64x(FOLD_128_HIGH, FOLD_128_LOW);
    if (to) {
        memcpy(to + at, data + at, nbytes - at);
        data = to; /* what is summed is what was stored */
    }
    for (; nbytes - at >= 16; at += 16)
        x = fold128(x, k, _mm_loadu_si128((const __m128i *)(data + at)));
    uint8_t bytes[16];
    _mm_storeu_si128((__m128i *)bytes, x);
    return hold_crc_portable(hold_crc_portable(0, bytes, 16), data + at, nbytes - at);
}

/* `count` accumulators of 128 bits, end to end, into one. */
TARGET_128 static __m128i join(const uint8_t *accumulators, int count)
{
    const __m128i k = _mm_set_epi64x(FOLD_128_HIGH, FOLD_128_LOW);
    __m128i x = _mm_load_si128((const __m128i *)accumulators);
    for (int i = 1; i < count; i++)
        x = fold128(x, k, _mm_load_si128((const __m128i *)accumulators + i));
    return x;
}

/*
 * Below, `to` is NULL or where the bytes go; it is known where these are inlined, so that a sum
 * without a copy does not ask. The stores go through the caches: fresh memory, which the kernel has
 * just zeroed, is still in them.
 */
TARGET_128 static ALWAYS_INLINE __m128i take128(const uint8_t *data, uint8_t *to, size_t at)
{
    __m128i x = _mm_loadu_si128((const __m128i *)(data + at));
    if (to)
        _mm_storeu_si128((__m128i *)(to + at), x);
    return x;
}

TARGET_128 static ALWAYS_INLINE uint32_t run128(uint32_t state, const uint8_t *data, size_t nbytes,
                                                uint8_t *to)
{
    __m128i seed = _mm_cvtsi32_si128((int)state);
    if (nbytes < 16) {
        if (to)
            data = memcpy(to, data, nbytes);
        return hold_crc_portable(state, data, nbytes);
    }
    if (nbytes < 64)
        return finish(_mm_xor_si128(seed, take128(data, to, 0)), data, 16, nbytes, to);
    const __m128i k = _mm_set_epi64x(FOLD_512_HIGH, FOLD_512_LOW);
    _Alignas(16) __m128i x[4];
    for (size_t i = 0; i < 4; i++)
        x[i] = take128(data, to, 16 * i);
    x[0] = _mm_xor_si128(x[0], seed);
    size_t at = 64;
    for (; nbytes - at >= 64; at += 64)
        for (size_t i = 0; i < 4; i++)
            x[i] = fold128(x[i], k, take128(data, to, at + 16 * i));
    return finish(join((const uint8_t *)x, 4), data, at, nbytes, to);
}

TARGET_256 static inline __m256i fold256(__m256i x, __m256i k, __m256i next)
{
    __m256i low = _mm256_clmulepi64_epi128(x, k, 0x00);
    __m256i high = _mm256_clmulepi64_epi128(x, k, 0x11);
    return _mm256_xor_si256(_mm256_xor_si256(low, high), next);
}

TARGET_256 static ALWAYS_INLINE __m256i take256(const uint8_t *data, uint8_t *to, size_t at)
{
    __m256i x = _mm256_loadu_si256((const __m256i *)(data + at));
    if (to)
        _mm256_storeu_si256((__m256i *)(to + at), x);
    return x;
}

TARGET_256 static ALWAYS_INLINE uint32_t run256(uint32_t state, const uint8_t *data, size_t nbytes,
                                                uint8_t *to)
{
    if (nbytes < 256)
        return run128(state, data, nbytes, to);
    const __m256i k = _mm256_set_epi64x(FOLD_1024_HIGH, FOLD_1024_LOW, FOLD_1024_HIGH,
                                        FOLD_1024_LOW);
    _Alignas(32) __m256i x[4];
    for (size_t i = 0; i < 4; i++)
        x[i] = take256(data, to, 32 * i);
    x[0] = _mm256_xor_si256(x[0], _mm256_set_epi32(0, 0, 0, 0, 0, 0, 0, (int)state));
    size_t at = 128;
    for (; nbytes - at >= 128; at += 128)
        for (size_t i = 0; i < 4; i++)
            x[i] = fold256(x[i], k, take256(data, to, at + 32 * i));
    return finish(join((const uint8_t *)x, 8), data, at, nbytes, to);
}

TARGET_512 static inline __m512i fold512(__m512i x, __m512i k, __m512i next)
{
    __m512i low = _mm512_clmulepi64_epi128(x, k, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(x, k, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* the three of them, xor */
}

TARGET_512 static ALWAYS_INLINE __m512i take512(const uint8_t *data, uint8_t *to, size_t at)
{
    __m512i x = _mm512_loadu_si512(data + at);
    if (to)
        _mm512_storeu_si512(to + at, x);
    return x;
}

TARGET_512 static ALWAYS_INLINE uint32_t run512(uint32_t state, const uint8_t *data, size_t nbytes,
                                                uint8_t *to)
{
    if (nbytes < 512)
        return run128(state, data, nbytes, to);
    const __m512i k = _mm512_broadcast_i32x4(_mm_set_epi64x(FOLD_2048_HIGH, FOLD_2048_LOW));
    _Alignas(64) __m512i x[4];
    for (size_t i = 0; i < 4; i++)
        x[i] = take512(data, to, 64 * i);
    x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    size_t at = 256;
    for (; nbytes - at >= 256; at += 256)
        for (size_t i = 0; i < 4; i++)
            x[i] = fold512(x[i], k, take512(data, to, at + 64 * i));
    return finish(join((const uint8_t *)x, 16), data, at, nbytes, to);
}

/* The two of a variant: with `to` and without. */
#define VARIANT(width)                                                                             \
    TARGET_##width static uint32_t update##width(uint32_t state, const uint8_t *data,              \
                                                 size_t nbytes)                                    \
    {                                                                                              \
        return run##width(state, data, nbytes, NULL);                                              \
    }                                                                                              \
    TARGET_##width static uint32_t copy##width(uint32_t state, const uint8_t *data, size_t nbytes, \
                                               uint8_t *to)                                        \
    {                                                                                              \
        return run##width(state, data, nbytes, to);                                                \
    }

VARIANT(128)
VARIANT(256)
VARIANT(512)

size_t hold_crc_variants_x86(hold_crc_way out[HOLD_CRC_VARIANTS])
{
    size_t n = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("sse4.1"))
        return 0;
    out[n++] = (hold_crc_way){update128, copy128};
    if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2"))
        out[n++] = (hold_crc_way){update256, copy256};
    if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f"))
        out[n++] = (hold_crc_way){update512, copy512};
    return n;
}

#else

size_t hold_crc_variants_x86(hold_crc_way out[HOLD_CRC_VARIANTS])
{
    (void)out;
    return 0;
}

#endif
