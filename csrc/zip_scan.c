#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "header_memory.h"
#include "zip.h"
#include "zip_bytes.h"
#include "zip_walk.h"

#define VERSION_MOST 63  /* the newest version that a record may need */
#define ENTRY_LEAST (HOLD_ZIP_CENTRAL + 1)

int hold_zip_fail(hold_zip_fault *fault, int code, uint64_t position, uint64_t expected,
                  uint64_t found)
{
    fault->code = code;
    fault->position = position;
    fault->expected = expected;
    fault->found = found;
    return code;
}

/* ---- the end of the file ------------------------------------------------------------------ */

/* The last signature of an end record that begins before `n`, or NULL. */
static const uint8_t *last_end(const uint8_t *bytes, size_t n)
{
    const uint8_t *at;

    while ((at = memrchr(bytes, 'P', n)) != NULL) {
        if (get32(at) == SIGNATURE_END)
            return at;
        n = (size_t)(at - bytes);
    }
    return NULL;
}

/*
 * The one end record, whose comment ends the file. A reader that looks for another, from the other
 * end or without a look at the comment's length, must not find one.
 */
static int find_end(const uint8_t *bytes, size_t nbytes, uint64_t size, size_t *out,
                    hold_zip_fault *fault)
{
    uint64_t base = size - nbytes;
    const uint8_t *at = nbytes < HOLD_ZIP_END ? NULL : last_end(bytes, nbytes - 3);

    if (at && (size_t)(at - bytes) > nbytes - HOLD_ZIP_END) {
        uint64_t cut = base + (uint64_t)(at - bytes);
        if (last_end(bytes, (size_t)(at - bytes)) != NULL)
            return hold_zip_fail(fault, HOLD_ZIP_AMBIGUOUS, cut, 0, cut);
        at = NULL;
    }
    if (at == NULL)
        return hold_zip_fail(fault, HOLD_ZIP_NO_END, base, 0, 0);
    *out = (size_t)(at - bytes);
    size_t stop = *out + HOLD_ZIP_END + get16(at + 20);
    if (stop != nbytes)
        return hold_zip_fail(fault, HOLD_ZIP_TRAILING, base + *out, size, base + stop);
    for (size_t n = *out; (at = last_end(bytes, n)) != NULL;) {
        n = (size_t)(at - bytes);
        if (n + HOLD_ZIP_END + get16(at + 20) == nbytes)
            return hold_zip_fail(fault, HOLD_ZIP_AMBIGUOUS, base + *out, 0, base + n);
    }
    return HOLD_ZIP_OK;
}

/* Read the zip64 end record in front of the locator that `end` follows; compare it with `end`. */
static int read_end64(const uint8_t *bytes, uint64_t base, size_t end, hold_zip_tail *out,
                      hold_zip_fault *fault)
{
    const uint8_t *locator = bytes + end - HOLD_ZIP_LOCATOR, *narrow = bytes + end;
    uint64_t place = base + end - HOLD_ZIP_LOCATOR, points = get64(locator + 8);

    if (get32(locator + 4) != 0)
        return hold_zip_fail(fault, HOLD_ZIP_DISKS, place + 4, 0, get32(locator + 4));
    if (get32(locator + 16) > 1)
        return hold_zip_fail(fault, HOLD_ZIP_DISKS, place + 16, 1, get32(locator + 16));
    if (end < HOLD_ZIP_LOCATOR + HOLD_ZIP_END64)
        return hold_zip_fail(fault, HOLD_ZIP_END64_BAD, place, HOLD_ZIP_END64 - 12, 0);
    place -= HOLD_ZIP_END64;
    if (points != place)
        return hold_zip_fail(fault, HOLD_ZIP_LOCATOR_BAD, place + HOLD_ZIP_END64 + 8, place,
                             points);
    const uint8_t *wide = locator - HOLD_ZIP_END64;
    if (get32(wide) != SIGNATURE_END64 || get64(wide + 4) != HOLD_ZIP_END64 - 12)
        return hold_zip_fail(fault, HOLD_ZIP_END64_BAD, place, HOLD_ZIP_END64 - 12,
                             get64(wide + 4));
    for (int at = 16; at <= 20; at += 4)
        if (get32(wide + at) != 0)
            return hold_zip_fail(fault, HOLD_ZIP_DISKS, place + (uint64_t)at, 0, get32(wide + at));
    *out = (hold_zip_tail){get64(wide + 48), get64(wide + 40), get64(wide + 32)};
    if (get64(wide + 24) != out->count)
        return hold_zip_fail(fault, HOLD_ZIP_DISKS, place + 24, out->count, get64(wide + 24));
    uint64_t has[3] = {out->count, out->size, out->start};
    uint64_t had[3] = {get16(narrow + 10), get32(narrow + 12), get32(narrow + 16)};
    for (int i = 0; i < 3; i++)
        if (had[i] != has[i] && had[i] != (i ? UINT32_MAX : UINT16_MAX))
            return hold_zip_fail(fault, HOLD_ZIP_CONTRARY,
                                 base + end + (i == 0 ? 10u : i == 1 ? 12u : 16u), has[i], had[i]);
    return HOLD_ZIP_OK;
}

int hold_zip_find(const uint8_t *bytes, size_t nbytes, uint64_t size, hold_zip_tail *out,
                  hold_zip_fault *fault)
{
    uint64_t base = size - nbytes, stop;
    size_t end;

    assert(nbytes <= size && (nbytes == size || nbytes == HOLD_ZIP_TAIL));
    *fault = (hold_zip_fault){.record = -1};
    int code = find_end(bytes, nbytes, size, &end, fault);
    if (code)
        return code;
    const uint8_t *at = bytes + end;
    bool wide = end >= HOLD_ZIP_LOCATOR && get32(at - HOLD_ZIP_LOCATOR) == SIGNATURE_LOCATOR;
    for (int i = 4; i <= 6; i += 2)
        if (get16(at + i) != 0 && !(wide && get16(at + i) == UINT16_MAX))
            return hold_zip_fail(fault, HOLD_ZIP_DISKS, base + end + (uint64_t)i, 0, get16(at + i));
    if (get16(at + 8) != get16(at + 10))
        return hold_zip_fail(fault, HOLD_ZIP_DISKS, base + end + 8, get16(at + 10), get16(at + 8));
    *out = (hold_zip_tail){get32(at + 16), get32(at + 12), get16(at + 10)};
    stop = base + end;
    if (wide) {
        code = read_end64(bytes, base, end, out, fault);
        if (code)
            return code;
        stop -= HOLD_ZIP_LOCATOR + HOLD_ZIP_END64;
    }
    if (out->start > stop || stop - out->start != out->size)
        return hold_zip_fail(fault, HOLD_ZIP_PLACE, base + end, stop, out->start + out->size);
    if (out->size > HOLD_ZIP_MOST)
        return hold_zip_fail(fault, HOLD_ZIP_HUGE, base + end, HOLD_ZIP_MOST, out->size);
    if (out->count > out->size / ENTRY_LEAST)
        return hold_zip_fail(fault, HOLD_ZIP_COUNT, base + end, out->size, out->count);
    return HOLD_ZIP_OK;
}

/* ---- names -------------------------------------------------------------------------------- */

int hold_zip_check_name(hold_text name)
{
    const uint8_t *at = name.data, *end = name.data + name.length;

    if (name.length == 0 || memchr(at, '\0', name.length) || memchr(at, '\\', name.length))
        return HOLD_ZIP_NAME;
    while (at < end) {
        const uint8_t *slash = memchr(at, '/', (size_t)(end - at));
        size_t length = (size_t)((slash ? slash : end) - at);
        if (length == 0 || (at[0] == '.' && (length == 1 || (length == 2 && at[1] == '.'))))
            return HOLD_ZIP_NAME;
        at += slash ? length + 1 : length;
    }
    return HOLD_ZIP_OK;
}

void hold_zip_fold(hold_text name, uint8_t *out)
{
    for (size_t i = 0; i < name.length; i++) {
        uint8_t byte = name.data[i];
        out[i] = (uint8_t)(byte >= 'A' && byte <= 'Z' ? byte + 32 : byte);
    }
}

/* Keep what stands before the first slash as the root of all, while it is. */
static void keep_root(hold_zip *self, hold_text name)
{
    const uint8_t *slash = memchr(name.data, '/', name.length);
    size_t length = slash ? (size_t)(slash - name.data) : 0;

    if (self->n == 1)
        self->root = length;
    else if (self->root != length || memcmp(self->names[0].data, name.data, length) != 0)
        self->root = 0;
}

static bool is_ascii(hold_text name)
{
    uint8_t all = 0;

    for (size_t i = 0; i < name.length; i++)
        all |= name.data[i];
    return all < 0x80;
}

static bool same_text(hold_text a, hold_text b)
{
    return a.length == b.length && memcmp(a.data, b.data, a.length) == 0;
}

/*
 * Index the names, without case: two that differ in that alone are told of in `twins`, and then
 * they are indexed as they are.
 */
static int index_names(hold_zip *self, const uint64_t key[2], hold_zip_fault *fault)
{
    size_t second = 0, first = 0;
    int rc = hold_names_build(&self->index, self->folded, self->n, key, &second);

    if (rc == -EEXIST) {
        while (!same_text(self->folded[first], self->folded[second]))
            first++;
        self->twins = true;
        self->twin[0] = first;
        self->twin[1] = second;
        hold_names_free(&self->index);
        memcpy(self->folded, self->names, self->n * sizeof *self->folded);
        rc = hold_names_build(&self->index, self->folded, self->n, key, &second);
    }
    if (rc == -ENOMEM)
        return hold_zip_fail(fault, HOLD_ZIP_NOMEM, 0, 0, 0);
    if (rc == 0)
        return HOLD_ZIP_OK;
    for (first = 0; !same_text(self->names[first], self->names[second]);)
        first++;
    fault->record = (int64_t)second;
    return hold_zip_fail(fault, HOLD_ZIP_TWICE, self->start, 0, first);
}

int64_t hold_zip_lookup(const hold_zip *self, hold_text wanted, uint8_t *room)
{
    if (self->twins)
        memcpy(room, wanted.data, wanted.length);
    else
        hold_zip_fold(wanted, room);
    int64_t row = hold_names_find(&self->index, self->folded, (hold_text){room, wanted.length});

    if (row >= 0 && memcmp(self->names[row].data, wanted.data, wanted.length) != 0)
        row = -1;
    return row;
}

/* ---- the directory ------------------------------------------------------------------------ */

/* Replace what a zip64 field says by it: sizes, place and disk, each if 32 bits do not say it. */
static int widen(hold_zip_record *record, uint32_t *disk, const zip_extra *extra, uint64_t position,
                 hold_zip_fault *fault)
{
    uint64_t *fields[3] = {&record->size, &record->packed, &record->header};
    const uint8_t *at = extra->zip64;
    size_t length = 0;

    if (at == NULL)
        return HOLD_ZIP_OK;
    for (int i = 0; i < 3; i++)
        length += *fields[i] == UINT32_MAX ? 8 : 0;
    length += *disk == UINT16_MAX ? 4 : 0;
    if (extra->zip64_length != length)
        return hold_zip_fail(fault, HOLD_ZIP_EXTRA64, position, length, extra->zip64_length);
    for (int i = 0; i < 3; i++) {
        if (*fields[i] == UINT32_MAX) {
            *fields[i] = get64(at);
            at += 8;
        }
    }
    if (*disk == UINT16_MAX)
        *disk = get32(at);
    return HOLD_ZIP_OK;
}

/* Check what an entry says of how its payload is kept. `position` is where the entry begins. */
static int check_kind(const hold_zip_record *record, uint64_t position, hold_zip_fault *fault)
{
    unsigned known = FLAG_DEFLATE | FLAG_DESCRIPTOR | FLAG_UTF8;

    if (record->method != HOLD_ZIP_STORED && record->method != HOLD_ZIP_DEFLATED)
        return hold_zip_fail(fault, HOLD_ZIP_METHOD, position + 10, 0, record->method);
    if (record->flags & ~known)
        return hold_zip_fail(fault, HOLD_ZIP_FLAGS, position + 8, 0, record->flags & ~known);
    if (record->method == HOLD_ZIP_STORED && record->packed != record->size)
        return hold_zip_fail(fault, HOLD_ZIP_STORED_SIZE, position + 20, record->size,
                             record->packed);
    if (record->method == HOLD_ZIP_DEFLATED && record->size / HOLD_ZIP_EXPANSION > record->packed)
        return hold_zip_fail(fault, HOLD_ZIP_RATIO, position + 24, record->packed, record->size);
    return HOLD_ZIP_OK;
}

/* Read the entry at `at`, of which `left` bytes are there, as the next record. */
static int read_entry(hold_zip *self, const uint8_t *at, size_t left, uint64_t position,
                      size_t *taken, hold_zip_fault *fault)
{
    zip_extra extra;

    fault->record = -1;
    if (left < HOLD_ZIP_CENTRAL || get32(at) != SIGNATURE_CENTRAL)
        return hold_zip_fail(fault, HOLD_ZIP_ENTRY, position, 0, 0);
    size_t name = get16(at + 28), more = get16(at + 30), comment = get16(at + 32);
    *taken = HOLD_ZIP_CENTRAL + name + more + comment;
    if (left < *taken)
        return hold_zip_fail(fault, HOLD_ZIP_SHORT, position, *taken, left);
    hold_text text = {at + HOLD_ZIP_CENTRAL, name};
    hold_zip_record *record = &self->records[self->n];
    fault->record = (int64_t)self->n;
    self->names[self->n++] = text;
    if (hold_zip_check_name(text))
        return hold_zip_fail(fault, HOLD_ZIP_NAME, position + HOLD_ZIP_CENTRAL, 0, 0);
    keep_root(self, text);
    self->foreign += !is_ascii(text);
    if (at[6] > VERSION_MOST)
        return hold_zip_fail(fault, HOLD_ZIP_VERSION, position + 6, VERSION_MOST, at[6]);
    *record = (hold_zip_record){.header = get32(at + 42),
                                .packed = get32(at + 20),
                                .size = get32(at + 24),
                                .crc = get32(at + 16),
                                .method = get16(at + 10),
                                .flags = get16(at + 8)};
    uint32_t disk = get16(at + 34);
    uint64_t place = position + HOLD_ZIP_CENTRAL + name;
    if (!zip_extra_read(at + HOLD_ZIP_CENTRAL + name, more, text.data, name, &extra))
        return hold_zip_fail(fault, HOLD_ZIP_EXTRA, place, 0, 0);
    if (extra.renames)
        return hold_zip_fail(fault, HOLD_ZIP_OTHER_NAME, place, 0, 0);
    int code = widen(record, &disk, &extra, place, fault);
    if (code == HOLD_ZIP_OK)
        code = check_kind(record, position, fault);
    if (code)
        return code;
    if (disk != 0)
        return hold_zip_fail(fault, HOLD_ZIP_DISKS, position + 34, 0, disk);
    if (text.data[name - 1] == '/' && record->size)
        return hold_zip_fail(fault, HOLD_ZIP_FOLDER, position + 24, 0, record->size);
    if (record->header > self->start || self->start - record->header < HOLD_ZIP_LOCAL + name)
        return hold_zip_fail(fault, HOLD_ZIP_HEADER, position + 42, self->start, record->header);
    return HOLD_ZIP_OK;
}

typedef struct placed {
    uint64_t header;
    uint32_t row;
} placed;

static int compare_placed(const void *a, const void *b)
{
    const placed *x = a, *y = b;

    if (x->header != y->header)
        return x->header < y->header ? -1 : 1;
    return x->row < y->row ? -1 : 1;
}

/* Fill `order`. As a rule the directory has it already. */
static int sort_rows(hold_zip *self, hold_zip_fault *fault)
{
    bool sorted = true;

    for (size_t i = 0; i < self->n; i++) {
        self->order[i] = (uint32_t)i;
        sorted &= i == 0 || self->records[i - 1].header < self->records[i].header;
    }
    if (sorted)
        return HOLD_ZIP_OK;
    placed *rows = malloc(self->n * sizeof *rows);
    if (rows == NULL)
        return hold_zip_fail(fault, HOLD_ZIP_NOMEM, 0, 0, 0);
    for (size_t i = 0; i < self->n; i++)
        rows[i] = (placed){self->records[i].header, (uint32_t)i};
    qsort(rows, self->n, sizeof *rows, compare_placed);
    for (size_t i = 0; i < self->n; i++)
        self->order[i] = rows[i].row;
    free(rows);
    return HOLD_ZIP_OK;
}

int hold_zip_read(const uint8_t *bytes, const hold_zip_tail *tail, const uint64_t key[2],
                  hold_zip *out, hold_zip_fault *fault)
{
    size_t n = (size_t)tail->count, size = (size_t)tail->size, used = 0, letters = 0, taken;
    int code = HOLD_ZIP_OK;

    assert(tail->size <= HOLD_ZIP_MOST && n <= size / ENTRY_LEAST);
    *fault = (hold_zip_fault){.record = -1};
    *out = (hold_zip){.start = tail->start};
    /* One byte more each, for none may be had of none. */
    out->records = hold_grow_block(NULL, n * sizeof *out->records + 1);
    out->names = hold_grow_block(NULL, n * sizeof *out->names + 1);
    out->folded = hold_grow_block(NULL, n * sizeof *out->folded + 1);
    out->order = hold_grow_block(NULL, n * sizeof *out->order + 1);
    out->arena = hold_grow_block(NULL, size + 1);
    if (!out->records || !out->names || !out->folded || !out->order || !out->arena)
        return hold_zip_fail(fault, HOLD_ZIP_NOMEM, 0, 0, 0);
    while (out->n < n && code == HOLD_ZIP_OK) {
        size_t row = out->n;
        code = read_entry(out, bytes + used, size - used, tail->start + used, &taken, fault);
        if (code)
            return code;
        used += taken;
        hold_text name = out->names[row];
        hold_zip_fold(name, out->arena + letters);
        out->folded[row] = (hold_text){out->arena + letters, name.length};
        letters += name.length;
    }
    fault->record = -1;
    if (used != size)
        return hold_zip_fail(fault, HOLD_ZIP_REST, tail->start + used, 0, size - used);
    code = index_names(out, key, fault);
    if (code == HOLD_ZIP_OK)
        code = sort_rows(out, fault);
    return code ? code : hold_zip_check_gap(out, fault);
}

void hold_zip_free(hold_zip *self)
{
    hold_names_free(&self->index);
    free(self->records);
    free(self->names);
    free(self->folded);
    free(self->order);
    free(self->arena);
    *self = (hold_zip){0};
}
