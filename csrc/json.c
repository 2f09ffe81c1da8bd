#include "json.h"

#include <assert.h>
#include <string.h>

static int hex_digit(uint8_t byte)
{
    if (byte >= '0' && byte <= '9')
        return byte - '0';
    byte |= 0x20;
    return byte >= 'a' && byte <= 'f' ? byte - 'a' + 10 : -1;
}

/* The number of a \uXXXX at `at`, or -1 where none stands there. */
static int32_t read_unit(const uint8_t *at, const uint8_t *end)
{
    int32_t unit = 0;

    if (end - at < 6 || at[0] != '\\' || at[1] != 'u')
        return -1;
    for (int i = 2; i < 6; i++) {
        int digit = hex_digit(at[i]);
        if (digit < 0)
            return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

static bool is_high(int32_t unit)
{
    return unit >= 0xD800 && unit < 0xDC00;
}

static bool is_low(int32_t unit)
{
    return unit >= 0xDC00 && unit < 0xE000;
}

/* Move over the escape at the cursor. */
static int skip_escape(hold_json *json)
{
    if (json->end - json->at < 2) {
        json->at = json->end;
        return HOLD_JSON_END;
    }
    if (json->at[1] != 'u') {
        if (memchr("\"\\/bfnrt", json->at[1], 8) == NULL)
            return HOLD_JSON_ESCAPE;
        json->at += 2;
        return HOLD_JSON_OK;
    }
    int32_t unit = read_unit(json->at, json->end);
    if (unit < 0)
        return HOLD_JSON_ESCAPE;
    if (is_low(unit))
        return HOLD_JSON_SURROGATE;
    if (is_high(unit)) {
        if (!is_low(read_unit(json->at + 6, json->end)))
            return HOLD_JSON_SURROGATE;
        json->at += 6;
    }
    json->at += 6;
    return HOLD_JSON_OK;
}

/* Move over the UTF-8 character of more than one byte at the cursor. */
static int skip_utf8(hold_json *json)
{
    const uint8_t *at = json->at;
    uint8_t lead = at[0], low = 0x80, high = 0xBF;
    ptrdiff_t length;

    if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2;
    } else if ((lead & 0xF0) == 0xE0) {
        length = 3;
        if (lead == 0xE0)
            low = 0xA0; /* shorter forms exist */
        else if (lead == 0xED)
            high = 0x9F; /* surrogates */
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4;
        if (lead == 0xF0)
            low = 0x90;
        else if (lead == 0xF4)
            high = 0x8F; /* beyond U+10FFFF */
    } else {
        return HOLD_JSON_UTF8;
    }
    if (json->end - at < length || at[1] < low || at[1] > high)
        return HOLD_JSON_UTF8;
    for (ptrdiff_t i = 2; i < length; i++)
        if ((at[i] & 0xC0) != 0x80)
            return HOLD_JSON_UTF8;
    json->at += length;
    return HOLD_JSON_OK;
}

int hold_json_string(hold_json *json, hold_json_span *out)
{
    if (hold_json_peek(json) != '"')
        return hold_json_fail(json, HOLD_JSON_STRING);
    const uint8_t *start = ++json->at;
    out->escaped = false;
    for (;;) {
        while (json->end - json->at >= 8) {
            unsigned run = hold_json_plain(json->at);
            json->at += run;
            if (run < 8)
                break;
        }
        if (json->at == json->end)
            return HOLD_JSON_END;
        uint8_t byte = *json->at;
        int code = HOLD_JSON_OK;
        if (byte == '"')
            break;
        if (byte == '\\') {
            out->escaped = true;
            code = skip_escape(json);
        } else if (byte < 0x20) {
            code = HOLD_JSON_CONTROL;
        } else if (byte >= 0x80) {
            code = skip_utf8(json);
        } else {
            json->at++;
        }
        if (code)
            return code;
    }
    out->data = start;
    out->length = (size_t)(json->at - start);
    json->at++;
    return HOLD_JSON_OK;
}

int hold_json_key(hold_json *json, hold_json_span *out)
{
    int code = hold_json_string(json, out);
    if (code)
        return code;
    hold_json_space(json);
    code = hold_json_byte(json, ':', HOLD_JSON_COLON);
    hold_json_space(json);
    return code;
}

static bool is_digit(uint8_t byte)
{
    return byte >= '0' && byte <= '9';
}

int hold_json_integer(hold_json *json, uint64_t *out)
{
    const uint8_t *at = json->at, *end = json->end;
    uint64_t value = 0;

    if (at == end || !is_digit(*at))
        return hold_json_fail(json, HOLD_JSON_INTEGER);
    for (; at < end && is_digit(*at); at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        if (value >= INT64_MAX / 10 && (value > INT64_MAX / 10 || digit > INT64_MAX % 10))
            return HOLD_JSON_RANGE;
        value = value * 10 + digit;
    }
    if (*json->at == '0' && at - json->at > 1)
        return HOLD_JSON_INTEGER;
    if (at < end && (*at == '.' || *at == 'e' || *at == 'E'))
        return HOLD_JSON_INTEGER;
    json->at = at;
    *out = value;
    return HOLD_JSON_OK;
}

/* One digit or more. */
static int skip_digits(hold_json *json)
{
    if (!is_digit(hold_json_peek(json)))
        return hold_json_fail(json, HOLD_JSON_VALUE);
    while (is_digit(hold_json_peek(json)))
        json->at++;
    return HOLD_JSON_OK;
}

static int skip_number(hold_json *json)
{
    int code = HOLD_JSON_OK;

    if (hold_json_peek(json) == '-')
        json->at++;
    if (hold_json_peek(json) == '0')
        json->at++; /* a digit behind it is no separator: refused by the caller */
    else
        code = skip_digits(json);
    if (!code && hold_json_peek(json) == '.') {
        json->at++;
        code = skip_digits(json);
    }
    if (!code && (hold_json_peek(json) | 0x20) == 'e') {
        json->at++;
        if (hold_json_peek(json) == '+' || hold_json_peek(json) == '-')
            json->at++;
        code = skip_digits(json);
    }
    return code;
}

/* Move over a value that is no object and no array. */
static int skip_scalar(hold_json *json)
{
    static const struct {
        const char *text;
        size_t length;
    } words[] = {{"true", 4}, {"false", 5}, {"null", 4}};
    hold_json_span ignored;
    uint8_t byte = hold_json_peek(json);

    if (byte == '"')
        return hold_json_string(json, &ignored);
    if (byte == '-' || is_digit(byte))
        return skip_number(json);
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if ((size_t)(json->end - json->at) >= words[i].length &&
            memcmp(json->at, words[i].text, words[i].length) == 0) {
            json->at += words[i].length;
            return HOLD_JSON_OK;
        }
    }
    return hold_json_fail(json, HOLD_JSON_VALUE);
}

int hold_json_skip(hold_json *json)
{
    uint8_t closing[HOLD_JSON_DEPTH];
    size_t depth = 0;
    hold_json_span key;

    for (;;) {
        /* A value begins here. */
        int code = HOLD_JSON_OK;
        bool first = false, done = true;
        uint8_t byte = hold_json_peek(json);
        if (byte == '{' || byte == '[') {
            if (depth == HOLD_JSON_DEPTH)
                return HOLD_JSON_NESTING;
            closing[depth++] = byte == '{' ? '}' : ']';
            json->at++;
            first = true;
        } else {
            code = skip_scalar(json);
        }
        /* Close what ends here, up to the next member. */
        while (!code && depth > 0 && done) {
            code = hold_json_next(json, closing[depth - 1], &first, &done);
            if (!code && done)
                depth--;
        }
        if (code || depth == 0)
            return code;
        if (closing[depth - 1] == '}')
            code = hold_json_key(json, &key);
        if (code)
            return code;
    }
}

/* Write the UTF-8 of a character below U+110000. Returns its length. */
static size_t put_utf8(int32_t character, uint8_t *out)
{
    if (character < 0x80) {
        out[0] = (uint8_t)character;
        return 1;
    }
    if (character < 0x800) {
        out[0] = (uint8_t)(0xC0 | (character >> 6));
        out[1] = (uint8_t)(0x80 | (character & 0x3F));
        return 2;
    }
    if (character < 0x10000) {
        out[0] = (uint8_t)(0xE0 | (character >> 12));
        out[1] = (uint8_t)(0x80 | ((character >> 6) & 0x3F));
        out[2] = (uint8_t)(0x80 | (character & 0x3F));
        return 3;
    }
    out[0] = (uint8_t)(0xF0 | (character >> 18));
    out[1] = (uint8_t)(0x80 | ((character >> 12) & 0x3F));
    out[2] = (uint8_t)(0x80 | ((character >> 6) & 0x3F));
    out[3] = (uint8_t)(0x80 | (character & 0x3F));
    return 4;
}

/* The character of the escape at `at`, which skip_escape accepted; *next is behind it. */
static int32_t read_escape(const uint8_t *at, const uint8_t *end, const uint8_t **next)
{
    static const char names[] = "bfnrt", values[] = "\b\f\n\r\t";

    *next = at + 2;
    if (at[1] != 'u') {
        const char *found = memchr(names, at[1], 5);
        return found ? values[found - names] : at[1];
    }
    int32_t unit = read_unit(at, end);
    *next = at + 6;
    if (is_high(unit)) {
        int32_t low = read_unit(at + 6, end);
        *next = at + 12;
        unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
    }
    return unit;
}

size_t hold_json_unescape(const hold_json_span *span, uint8_t *out)
{
    const uint8_t *at = span->data, *end = span->data + span->length;
    uint8_t *to = out;

    while (at < end) {
        const uint8_t *stop = memchr(at, '\\', (size_t)(end - at));
        size_t run = (size_t)((stop ? stop : end) - at);
        memcpy(to, at, run);
        to += run;
        at += run;
        if (stop)
            to += put_utf8(read_escape(at, end, &at), to);
    }
    assert((size_t)(to - out) <= span->length);
    return (size_t)(to - out);
}

bool hold_json_equals(const hold_json_span *span, const char *text, size_t length)
{
    uint8_t plain[16 * 6];

    assert(length <= 16);
    if (!span->escaped)
        return span->length == length && memcmp(span->data, text, length) == 0;
    /* Written with an escape for each character it is six times as long. */
    return span->length <= sizeof plain && hold_json_unescape(span, plain) == length &&
           memcmp(plain, text, length) == 0;
}
