/*
 * json.h - tokens of strict JSON (RFC 8259), read from hostile bytes. No allocation, no recursion.
 *
 * A cursor walks over bytes that the caller keeps. Each function starts at the cursor and, on
 * success (0), leaves it behind what it read; on failure it returns a code and leaves the cursor at
 * the byte that is wrong (at the end, where the bytes end too early). Strings are checked to be
 * UTF-8, and their escapes to name Unicode characters. Threads: no state, any number of callers.
 */
#ifndef HOLD_JSON_H
#define HOLD_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* How deep a skipped value may be nested. */
#define HOLD_JSON_DEPTH 128

typedef enum hold_json_code {
    HOLD_JSON_OK,
    HOLD_JSON_END,       /* the bytes end inside of the JSON */
    HOLD_JSON_VALUE,     /* no JSON value begins here */
    HOLD_JSON_OBJECT,    /* an object was expected */
    HOLD_JSON_ARRAY,     /* an array was expected */
    HOLD_JSON_STRING,    /* a string was expected */
    HOLD_JSON_INTEGER,   /* a non-negative integer was expected */
    HOLD_JSON_RANGE,     /* an integer above 2^63 - 1 */
    HOLD_JSON_COLON,     /* ':' was expected */
    HOLD_JSON_SEPARATOR, /* ',' or the closing bracket was expected */
    HOLD_JSON_CONTROL,   /* a control character inside of a string */
    HOLD_JSON_ESCAPE,    /* an escape that JSON does not have */
    HOLD_JSON_SURROGATE, /* an escape that is half of a surrogate pair */
    HOLD_JSON_UTF8,      /* bytes that are not UTF-8 */
    HOLD_JSON_NESTING,   /* nested deeper than HOLD_JSON_DEPTH */
    HOLD_JSON_CODES,     /* how many codes there are */
} hold_json_code;

typedef struct hold_json {
    const uint8_t *at;
    const uint8_t *end;
} hold_json;

/* The bytes of a string between its quotes, as they stand. */
typedef struct hold_json_span {
    const uint8_t *data;
    size_t length;
    bool escaped; /* contains a backslash */
} hold_json_span;

/* ---- eight bytes at a time --------------------------------------------------------------- */

#define HOLD_JSON_ONES 0x0101010101010101u
#define HOLD_JSON_HIGH 0x8080808080808080u

/* The 8 bytes at `at`, the first of them lowest. */
static inline uint64_t hold_json_word(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* How many bytes stand before the lowest of some flags, each the high bit of a byte; 8 if none. */
static inline unsigned hold_json_before(uint64_t flags)
{
    return flags ? (unsigned)__builtin_ctzll(flags) / 8 : 8;
}

/*
 * How many of the next 8 bytes, from the first on, are plain: no quote, backslash, control, or
 * non-ASCII. (Of the flags the lowest is exact; those above it need not be.)
 */
static inline unsigned hold_json_plain(const uint8_t *at)
{
    uint64_t word = hold_json_word(at);
    uint64_t quote = word ^ (HOLD_JSON_ONES * '"'), backslash = word ^ (HOLD_JSON_ONES * '\\');
    uint64_t stops = ((quote - HOLD_JSON_ONES) & ~quote) |
                     ((backslash - HOLD_JSON_ONES) & ~backslash) |
                     ((word - HOLD_JSON_ONES * 0x20) & ~word) | word;

    return hold_json_before(stops & HOLD_JSON_HIGH);
}

/* ---- tokens ------------------------------------------------------------------------------- */

/* Move over white space. */
static inline void hold_json_space(hold_json *json)
{
    while (json->at < json->end &&
           (*json->at == ' ' || *json->at == '\n' || *json->at == '\r' || *json->at == '\t'))
        json->at++;
}

/* The next byte, or 0 at the end (where no JSON has a 0, an error follows by itself). */
static inline uint8_t hold_json_peek(const hold_json *json)
{
    return json->at < json->end ? *json->at : 0;
}

/* `code`, or HOLD_JSON_END where the cursor stands at the end. */
static inline int hold_json_fail(const hold_json *json, int code)
{
    return json->at < json->end ? code : HOLD_JSON_END;
}

/* Read the byte `expected`, or fail with `code`. */
static inline int hold_json_byte(hold_json *json, uint8_t expected, int code)
{
    if (hold_json_peek(json) != expected)
        return hold_json_fail(json, code);
    json->at++;
    return HOLD_JSON_OK;
}

/*
 * Step through the members of an object or array: called after its opening bracket (*first true)
 * and after each member. Reads white space and the comma between members, or the closing bracket,
 * and then sets *done. Leaves the cursor at the first byte of the next member.
 */
static inline int hold_json_next(hold_json *json, uint8_t closing, bool *first, bool *done)
{
    hold_json_space(json);
    uint8_t byte = hold_json_peek(json);
    *done = byte == closing;
    if (*done) {
        json->at++;
    } else if (!*first) {
        if (byte != ',')
            return hold_json_fail(json, HOLD_JSON_SEPARATOR);
        json->at++;
        hold_json_space(json);
    }
    *first = false;
    return HOLD_JSON_OK;
}

/* Read a string, quotes and all. `out` points into the bytes under the cursor. */
int hold_json_string(hold_json *json, hold_json_span *out);

/* Read a key, the colon behind it and white space around that. */
int hold_json_key(hold_json *json, hold_json_span *out);

/* Read an integer without sign, fraction or exponent, 0 .. 2^63 - 1. */
int hold_json_integer(hold_json *json, uint64_t *out);

/* Read any value and forget it. */
int hold_json_skip(hold_json *json);

/*
 * The characters that a string read by hold_json_string stands for, as UTF-8. `out` has room for
 * `span->length` bytes, which always suffice. Returns how many were written.
 */
size_t hold_json_unescape(const hold_json_span *span, uint8_t *out);

/* Whether the string stands for the `length` bytes of `text` (ASCII, at most 16). */
bool hold_json_equals(const hold_json_span *span, const char *text, size_t length);

#endif
