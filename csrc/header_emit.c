#include "header.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "hold.h"

/* The longest decimal of 64 bits, and a comma. */
#define NUMBER_ROOM 21
/* The most that a tensor takes apart from its name, extents and offsets. */
#define TEXT_ROOM 72
/* The most that it takes apart from its name, and what is written beyond its end for speed. */
#define SLACK (TEXT_ROOM + NUMBER_ROOM * (HOLD_MAX_NDIM + 2) + 64)

/* Text that is written, in memory that has room for all of it. */
typedef struct sink {
    uint8_t *start, *at, *end;
    bool escapes;                /* whether some name needs them */
    hold_header_opening opening; /* of the type that `opened` is the code of */
    size_t opened;
} sink;

static const uint64_t POWERS[20] = {
    1u,
    10u,
    100u,
    1000u,
    10000u,
    100000u,
    1000000u,
    10000000u,
    100000000u,
    1000000000u,
    10000000000u,
    100000000000u,
    1000000000000u,
    10000000000000u,
    100000000000000u,
    1000000000000000u,
    10000000000000000u,
    100000000000000000u,
    1000000000000000000u,
    10000000000000000000u,
};

static const char PAIRS[] = "00010203040506070809101112131415161718192021222324252627282930313233"
                            "34353637383940414243444546474849505152535455565758596061626364656667"
                            "6869707172737475767778798081828384858687888990919293949596979899";

/* How many digits a number has. */
static inline unsigned digits_of(uint64_t value)
{
    value |= 1; /* as many digits, as the powers are even */
    unsigned bits = 64 - (unsigned)__builtin_clzll(value);
    unsigned digits = bits * 1233 >> 12; /* log10(2), from below */

    return digits + (value >= POWERS[digits]);
}

#define PUT(self, literal) put(self, literal, sizeof(literal) - 1)

static inline void put(sink *self, const void *text, size_t length)
{
    memcpy(self->at, text, length);
    self->at += length;
}

static inline void put_number(sink *self, uint64_t value)
{
    uint8_t *at = self->at + digits_of(value);

    self->at = at;
    for (; value >= 100; value /= 100) {
        at -= 2;
        memcpy(at, PAIRS + 2 * (value % 100), 2);
    }
    if (value >= 10)
        memcpy(at - 2, PAIRS + 2 * value, 2);
    else
        at[-1] = (uint8_t)('0' + value);
}

/* Append as it stands, mostly less than a call of memcpy() takes. */
static inline void put_short(sink *self, hold_text text)
{
    uint8_t *to = self->at;
    size_t at = 0;

    self->at += text.length;
    if (text.length > 64 || text.length < 8) {
        if (text.length)
            memcpy(to, text.data, text.length);
        return;
    }
    for (; at < text.length - 8; at += 8)
        memcpy(to + at, text.data + at, 8);
    memcpy(to + text.length - 8, text.data + text.length - 8, 8);
}

static inline bool is_plain(uint8_t byte)
{
    return byte >= 0x20 && byte != '"' && byte != '\\';
}

/* Move from `at` over what needs no escape. */
static inline const uint8_t *plain_end(const uint8_t *at, const uint8_t *end)
{
    for (;;) {
        while (end - at >= 8) {
            unsigned run = hold_json_plain(at);
            at += run;
            if (run < 8)
                break;
        }
        if (at == end || !is_plain(*at))
            return at;
        at++;
    }
}

/* What stands behind the backslash for `byte`, or NULL where that is u00 and its digits. */
static const char *short_escape(uint8_t byte)
{
    static const char values[] = "\"\\\b\f\n\r\t", names[] = "\"\\bfnrt";
    const char *found = memchr(values, byte, 7);

    return found ? names + (found - values) : NULL;
}

static void put_escape(sink *self, uint8_t byte)
{
    static const char digits[] = "0123456789abcdef";
    const char *name = short_escape(byte);

    if (name) {
        PUT(self, "\\");
        put(self, name, 1);
    } else {
        uint8_t text[6] = {'\\', 'u', '0', '0', (uint8_t)digits[byte >> 4],
                           (uint8_t)digits[byte & 15]};
        put(self, text, 6);
    }
}

/* How long a string is with its escapes. */
static size_t escaped_length(hold_text text)
{
    const uint8_t *at = text.data, *end = text.data + text.length;
    size_t length = text.length;

    while (at < end) {
        at = plain_end(at, end);
        if (at < end)
            length += short_escape(*at++) ? 1 : 5;
    }
    return length;
}

/* Append a string, without the quotes. */
static void put_escaped(sink *self, hold_text text)
{
    const uint8_t *at = text.data, *end = text.data + text.length;

    while (at < end) {
        const uint8_t *stop = plain_end(at, end);
        put(self, at, (size_t)(stop - at));
        at = stop;
        if (at < end)
            put_escape(self, *at++);
    }
}

static void put_metadata(const hold_header_source *source, sink *out, uint64_t *value_at)
{
    PUT(out, "\"__metadata__\":{\"");
    for (size_t i = 0; i < source->npairs; i++) {
        if (i)
            PUT(out, ",\"");
        put_escaped(out, source->pairs[2 * i]);
        PUT(out, "\":\"");
        value_at[i] = (uint64_t)(out->at - out->start);
        put_escaped(out, source->pairs[2 * i + 1]);
        PUT(out, "\"");
    }
    PUT(out, "}");
}

/* Check a view against the table, the extents and its own size. */
static int check_view(const hold_header_source *source, const hold_header_view *view)
{
    uint64_t nbytes;

    if (view->dtype < 0 || (size_t)view->dtype >= source->types.n || view->ndim < 0 ||
        view->ndim > HOLD_MAX_NDIM || view->dims < 0 ||
        (size_t)view->dims > source->ndims ||
        (size_t)view->ndim > source->ndims - (size_t)view->dims)
        return HOLD_HEADER_VIEW;
    hold_header_type type = source->types.rows[view->dtype];
    const int64_t *dims = source->dims + view->dims;
    for (int i = 0; i < view->ndim; i++)
        if (dims[i] < 0)
            return HOLD_HEADER_VIEW;
    if (view->ndim && dims[view->ndim - 1] > INT64_MAX / type.pack)
        return HOLD_HEADER_OVERFLOW;
    type.bits *= type.pack;
    int code = hold_header_nbytes(&type, dims, (size_t)view->ndim, &nbytes);
    if (!code && nbytes != view->nbytes)
        code = HOLD_HEADER_VIEW;
    return code;
}

/* Append what follows a name up to the offsets, the shape as the file counts it. */
static inline void put_type(const hold_header_source *source, const hold_header_view *view,
                            sink *out)
{
    const hold_header_type *type = &source->types.rows[view->dtype];
    bool as_bytes = type->tag.data == NULL || (type->pack > 1 && view->ndim == 0);
    size_t written = as_bytes ? source->bytes_type : (size_t)view->dtype;
    uint64_t last = as_bytes ? 1 : type->pack;

    if (written != out->opened || out->opening.length == 0) {
        hold_header_open(&source->types.rows[written], &out->opening);
        out->opened = written;
        assert(out->opening.length);
    }
    memcpy(out->at, out->opening.text, sizeof out->opening.text);
    out->at += out->opening.length;
    for (int axis = 0; axis < view->ndim; axis++) {
        uint64_t extent = (uint64_t)source->dims[view->dims + axis];
        if (axis)
            PUT(out, ",");
        put_number(out, axis + 1 == view->ndim ? extent * last : extent);
    }
    if (as_bytes) {
        if (view->ndim)
            PUT(out, ",");
        put_number(out, type->bits * type->pack / 8);
    }
}

static inline void put_offsets(sink *out, uint64_t begin, uint64_t end)
{
    PUT(out, "],\"data_offsets\":[");
    put_number(out, begin);
    PUT(out, ",");
    put_number(out, end);
    PUT(out, "]}");
}

static int put_tensor(const hold_header_source *source, size_t i, sink *out)
{
    const hold_header_view view = source->views[i];
    hold_text name = source->names[i];
    int code = check_view(source, &view);

    if (i + 8 < source->n)
        __builtin_prefetch(source->names[i + 8].data);
    if (!code && name.length == 12 && memcmp(name.data, "__metadata__", 12) == 0)
        code = HOLD_HEADER_METADATA;
    /* There is room, unless the views were changed after hold_header_measure(). */
    size_t length = out->escapes ? escaped_length(name) : name.length;
    if (!code && (size_t)(out->end - out->at) < length + SLACK)
        code = HOLD_HEADER_VIEW;
    if (code)
        return code;
    if (out->at[-1] != '{')
        PUT(out, ",");
    PUT(out, "\"");
    if (out->escapes)
        put_escaped(out, name);
    else
        put_short(out, name);
    put_type(source, &view, out);
    put_offsets(out, source->offsets[i], source->offsets[i] + view.nbytes);
    return HOLD_JSON_OK;
}

/* End the object, pad it, and write the length in front. */
static int finish(sink *out)
{
    if (out->end - out->at < HOLD_HEADER_ALIGN)
        return HOLD_HEADER_VIEW; /* as in put_tensor */
    PUT(out, "}");
    size_t padding = (size_t)(out->start - out->at) % HOLD_HEADER_ALIGN;
    memset(out->at, ' ', padding);
    out->at += padding;
    size_t length = (size_t)(out->at - out->start) - HOLD_HEADER_PREFIX;
    for (unsigned i = 0; i < HOLD_HEADER_PREFIX; i++)
        out->start[i] = (uint8_t)(length >> (8 * i));
    return HOLD_JSON_OK;
}

/* The first name that comes a second time is the fault. */
static int check_names(const hold_header_source *source, const uint64_t key[2],
                       hold_header_fault *fault)
{
    hold_names index = {0};
    size_t duplicate = 0;
    int rc = hold_names_build(&index, source->names, source->n, key, &duplicate);

    hold_names_free(&index);
    if (rc == -EEXIST) {
        fault->code = HOLD_HEADER_DUPLICATE;
        fault->entry = (int64_t)duplicate;
    } else if (rc) {
        fault->code = HOLD_HEADER_NOMEM;
    }
    return fault->code;
}

/* Digits of the largest extent, and of the largest offset. */
static void most_digits(const hold_header_source *source, unsigned *extent, unsigned *offset)
{
    uint64_t most = 0, end = 0;

    for (size_t i = 0; i < source->ndims; i++)
        most = (uint64_t)source->dims[i] > most ? (uint64_t)source->dims[i] : most;
    *extent = digits_of(most) + 1; /* ten times that, where elements are packed */
    for (size_t i = 0; i < source->n; i++) {
        uint64_t begin = source->offsets[i], stop = begin + source->views[i].nbytes;
        end = begin > end ? begin : end;
        end = stop > end ? stop : end;
    }
    *offset = digits_of(end);
}

int hold_header_measure(const hold_header_source *source, const uint64_t key[2],
                        hold_header_room *out, hold_header_fault *fault)
{
    size_t room = SLACK + HOLD_HEADER_ALIGN, written = 0, length = 0;
    unsigned extent, offset;

    *fault = (hold_header_fault){.entry = -1};
    if (check_names(source, key, fault))
        return fault->code;
    for (size_t i = 0; i < 2 * source->npairs; i++)
        room += escaped_length(source->pairs[i]) + 4; /* quotes, colon, comma */
    most_digits(source, &extent, &offset);
    for (size_t i = 0; i < source->n; i++) {
        int ndim = source->views[i].ndim;
        if (i + 8 < source->n)
            __builtin_prefetch(source->names[i + 8].data);
        length += source->names[i].length;
        written += escaped_length(source->names[i]);
        if (ndim > 0 && ndim <= HOLD_MAX_NDIM) /* others are refused */
            room += (size_t)ndim * (extent + 1);
    }
    out->nbytes = room + written + source->n * (TEXT_ROOM + 2 * offset);
    out->escapes = written != length;
    return HOLD_JSON_OK;
}

int hold_header_emit(const hold_header_source *source, hold_header_room room, uint8_t *out,
                     size_t *nbytes, uint64_t *value_at, hold_header_fault *fault)
{
    sink text = {.start = out, .at = out + HOLD_HEADER_PREFIX, .end = out + room.nbytes,
                 .escapes = room.escapes};

    *fault = (hold_header_fault){.entry = -1};
    PUT(&text, "{");
    if (source->npairs)
        put_metadata(source, &text, value_at);
    for (size_t i = 0; i < source->n && !fault->code; i++) {
        fault->code = put_tensor(source, i, &text);
        if (fault->code)
            fault->entry = (int64_t)i;
    }
    if (!fault->code)
        fault->code = finish(&text);
    *nbytes = (size_t)(text.at - out);
    return fault->code;
}

void hold_header_hex(const uint32_t *values, size_t n, uint8_t *out)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < n; i++)
        for (int shift = 28; shift >= 0; shift -= 4)
            *out++ = (uint8_t)digits[(values[i] >> shift) & 15];
}

bool hold_header_unhex(const uint8_t *text, size_t n, uint32_t *out)
{
    const uint64_t ones = HOLD_JSON_ONES;
    uint64_t differ = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t word = hold_json_word(text + 8 * i);
        uint64_t digits = (word & ones * 15) + ((word >> 6) & ones) * 9;
        /* Whatever that is made from: what it would be written as has to stand there. */
        uint64_t letters = ((digits + ones * 0x76) >> 7) & ones;
        differ |= word ^ (digits + ones * '0' + letters * ('a' - '9' - 1));
        differ |= digits & (ones * 0xF0); /* g and beyond */
        uint64_t bytes = (digits << 4 | digits >> 8) & 0x00FF00FF00FF00FFu;
        bytes = (bytes | bytes >> 8) & 0x0000FFFF0000FFFFu;
        out[i] = __builtin_bswap32((uint32_t)(bytes | bytes >> 16));
    }
    return differ == 0;
}

uint32_t hold_header_crc(const uint8_t *bytes, size_t nbytes, size_t at)
{
    assert(at + 8 <= nbytes);
    uint32_t crc = hold_crc32(0, bytes, at);
    crc = hold_crc32(crc, "00000000", 8);
    return hold_crc32(crc, bytes + at + 8, nbytes - at - 8);
}
