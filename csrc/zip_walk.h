/*
 * zip_walk.h - what zip_scan.c and zip_local.c share.
 */
#ifndef HOLD_ZIP_WALK_H
#define HOLD_ZIP_WALK_H

#include "zip.h"

/* Say what is wrong. fault->record is left as it is. Returns the code. */
int hold_zip_fail(hold_zip_fault *fault, int code, uint64_t position, uint64_t expected,
                  uint64_t found);

/*
 * Check the distance between the payload that was seen last and what follows it: the next local
 * header or the directory. Past the last one, note that no more bytes are wanted.
 */
int hold_zip_check_gap(hold_zip *self, hold_zip_fault *fault);

#endif
