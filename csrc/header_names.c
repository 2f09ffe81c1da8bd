#include <assert.h>
#include <errno.h>
#include <string.h>

#include "header.h"
#include "header_memory.h"

/* Names that are hashed before the first of them is looked for, while its slot is fetched. */
#define BATCH 16
/* Slots that a search looks at, on average, before the hash is taken to be known to an enemy. */
#define PATIENCE 16

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint64_t load32(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

/* Both halves of a product of 128 bits. */
static inline uint64_t multiply(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/*
 * Sixteen bytes a multiplication. The key keeps a file from being made so that its names collide;
 * that nobody finds another way is not proven, so whoever uses this counts.
 */
static uint64_t quick_hash(const uint64_t key[2], hold_text text)
{
    const uint8_t *at = text.data;
    size_t length = text.length;
    uint64_t state = key[0], first, last;

    if (length > 16) {
        for (size_t left = length; left > 16; left -= 16, at += 16)
            state = multiply(load64(at) ^ key[1], load64(at + 8) ^ state);
        at = text.data + length; /* the last sixteen, whatever of them was read before */
        first = load64(at - 16);
        last = load64(at - 8);
    } else if (length >= 8) {
        first = load64(at);
        last = load64(at + length - 8);
    } else if (length >= 4) {
        first = load32(at);
        last = load32(at + length - 4);
    } else {
        first = 0;
        last = 0;
        for (size_t i = 0; i < length; i++)
            first = first << 8 | at[i];
    }
    state = multiply(first ^ key[1], last ^ state);
    return multiply(state ^ key[0], (uint64_t)length ^ 0x9e3779b97f4a7c15u);
}

static inline uint64_t rotate(uint64_t word, unsigned by)
{
    return (word << by) | (word >> (64 - by));
}

static inline void sip_round(uint64_t v[4])
{
    v[0] += v[1];
    v[1] = rotate(v[1], 13) ^ v[0];
    v[0] = rotate(v[0], 32);
    v[2] += v[3];
    v[3] = rotate(v[3], 16) ^ v[2];
    v[0] += v[3];
    v[3] = rotate(v[3], 21) ^ v[0];
    v[2] += v[1];
    v[1] = rotate(v[1], 17) ^ v[2];
    v[2] = rotate(v[2], 32);
}

/* SipHash-1-3: slower, and made to withstand who sees its results. */
static uint64_t sip_hash(const uint64_t key[2], hold_text text)
{
    uint64_t v[4] = {key[0] ^ 0x736f6d6570736575u, key[1] ^ 0x646f72616e646f6du,
                     key[0] ^ 0x6c7967656e657261u, key[1] ^ 0x7465646279746573u};
    const uint8_t *at = text.data;
    size_t left = text.length;
    uint64_t word;

    for (; left >= 8; at += 8, left -= 8) {
        word = load64(at);
        v[3] ^= word;
        sip_round(v);
        v[0] ^= word;
    }
    word = 0;
    if (left)
        memcpy(&word, at, left);
    word ^= (uint64_t)text.length << 56;
    v[3] ^= word;
    sip_round(v);
    v[0] ^= word;
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++)
        sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static inline uint64_t hash_of(const hold_names *self, hold_text text)
{
    return self->careful ? sip_hash(self->key, text) : quick_hash(self->key, text);
}

static inline bool same(hold_text a, hold_text b)
{
    return a.length == b.length && (a.length == 0 || memcmp(a.data, b.data, a.length) == 0);
}

/*
 * Slot of `wanted`, or the free slot where it would go. The table is never full, so a search ends.
 * *steps grows by what it took: slots, and words of names that only seemed to be the same.
 */
static inline size_t probe(const hold_names *self, const hold_text *names, hold_text wanted,
                           uint64_t hash, size_t *steps)
{
    size_t slot = hash & self->mask;

    for (; self->slots[slot]; slot = (slot + 1) & self->mask) {
        uint64_t held = self->slots[slot];
        ++*steps;
        if (held >> 32 == hash >> 32) {
            if (same(names[(held & UINT32_MAX) - 1], wanted))
                break;
            *steps += wanted.length / 8;
        }
    }
    return slot;
}

/* Put the names into the empty table. Also returns -EAGAIN, where that takes suspiciously long. */
static int fill(hold_names *self, const hold_text *names, size_t n, size_t *duplicate)
{
    uint64_t hashes[BATCH];
    size_t steps = 0;

    for (size_t start = 0; start < n; start += BATCH) {
        size_t count = n - start < BATCH ? n - start : BATCH;
        for (size_t i = 0; i < count; i++) {
            if (start + i + BATCH < n)
                __builtin_prefetch(names[start + i + BATCH].data);
            hashes[i] = hash_of(self, names[start + i]);
            __builtin_prefetch(&self->slots[hashes[i] & self->mask], 1);
        }
        for (size_t i = 0; i < count; i++) {
            size_t slot = probe(self, names, names[start + i], hashes[i], &steps);
            if (self->slots[slot]) {
                *duplicate = start + i;
                return -EEXIST;
            }
            self->slots[slot] = (hashes[i] & ~(uint64_t)UINT32_MAX) | (start + i + 1);
        }
        if (!self->careful && steps > PATIENCE * (start + 4 * BATCH))
            return -EAGAIN;
    }
    return 0;
}

int hold_names_build(hold_names *self, const hold_text *names, size_t n, const uint64_t key[2],
                     size_t *duplicate)
{
    size_t capacity = 8;

    assert(n < UINT32_MAX);
    while (capacity / 4 * 3 < n)
        capacity *= 2;
    self->slots = hold_grow_block(NULL, capacity * sizeof *self->slots);
    if (self->slots == NULL)
        return -ENOMEM;
    self->mask = capacity - 1;
    self->key[0] = key[0];
    self->key[1] = key[1];
    memset(self->slots, 0, capacity * sizeof *self->slots);
    int rc = fill(self, names, n, duplicate);
    if (rc == -EAGAIN) {
        self->careful = true;
        memset(self->slots, 0, capacity * sizeof *self->slots);
        rc = fill(self, names, n, duplicate);
    }
    return rc;
}

int64_t hold_names_find(const hold_names *self, const hold_text *names, hold_text wanted)
{
    size_t steps = 0;

    if (self->slots == NULL)
        return -1;
    size_t slot = probe(self, names, wanted, hash_of(self, wanted), &steps);
    return (int64_t)(self->slots[slot] & UINT32_MAX) - 1;
}

void hold_names_free(hold_names *self)
{
    free(self->slots);
    self->slots = NULL;
}
