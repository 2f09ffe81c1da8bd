/*
 * header.h - the JSON header of a safetensors file, scanned and written. No I/O; no state.
 *
 * The scanner takes hostile bytes: it allocates in proportion to their number, reads each a
 * constant number of times, and never recurses. What it accepts is written in docs/format.md.
 */
#ifndef HOLD_HEADER_H
#define HOLD_HEADER_H

#include <stddef.h>
#include <stdint.h>

#endif
