"""The CUDA kernel that gathers small pieces, run by the processor: its text is C but for a word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from holdfast.staging import cupy as staging

#: Not the sanitizers' libraries, which are for what is tested beside this.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
CC = shutil.which("cc") or shutil.which("gcc")

#: Every thread of every block in turn; threads of a block never touch what another one writes.
#: Accesses that are not aligned for their type, as a GPU refuses them, stop the program.
_AROUND = r"""
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z, w; } __attribute__((aligned(16))) uint4;
static struct { unsigned x; } threadIdx, blockIdx, blockDim;

%s

int main(void)
{
    unsigned long long n, size, rows[3];
    if (fread(&n, 8, 1, stdin) != 1 || fread(&size, 8, 1, stdin) != 1)
        return 2;
    unsigned long long *table = malloc(24 * n + 1);
    unsigned char *from = aligned_alloc(64, size), *to = aligned_alloc(64, size);
    for (unsigned long long i = 0; i < n; i++) {
        if (fread(rows, 24, 1, stdin) != 1)
            return 2;
        table[3 * i] = rows[0] + (size_t)from;
        table[3 * i + 1] = rows[1] + (size_t)to;
        table[3 * i + 2] = rows[2];
    }
    if (fread(from, 1, size, stdin) != size)
        return 2;
    memset(to, 0xEE, size);
    blockDim.x = %d;
    for (blockIdx.x = 0; blockIdx.x < n; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
            holdfast_move(table);
    fwrite(to, 1, size, stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CC is None:
        pytest.skip("there is no C compiler")
    text = re.sub(r'extern "C" __global__', "static", staging._MOVE)
    assert text != staging._MOVE
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "move.c").write_text(_AROUND % (text, staging.THREADS))
    made = subprocess.run(
        [CC, "-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-Wall"]
        + ["-Werror", "-o", str(folder / "move"), str(folder / "move.c")],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "sanitize" in made.stderr:
        pytest.skip(f"the compiler has no sanitizer: {made.stderr[:200]}")
    assert made.returncode == 0, made.stderr
    return folder / "move"


def _move(kernel: Path, table: np.ndarray, source: np.ndarray) -> np.ndarray:
    head = np.array([len(table), len(source)], np.uint64).tobytes()
    done = subprocess.run(
        [str(kernel)],
        input=head + table.tobytes() + source.tobytes(),
        env=_ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.returncode
    return np.frombuffer(done.stdout, np.uint8)


def _pieces(rng: np.random.Generator, count: int, most: int) -> np.ndarray:
    """Source, target and size of pieces, the targets end to end but for a few bytes."""
    nbytes = rng.integers(0, most, count)
    nbytes[: count // 4] = rng.integers(0, 40, count // 4)
    rng.shuffle(nbytes)
    gaps = rng.integers(0, 33, count)
    target = np.cumsum(nbytes + gaps) - nbytes
    apart = rng.choice([0, 0, 16, 64, 4, 8, 20, 1, 2, 3, 7, 15], count)
    return np.stack([target + apart, target, nbytes], 1).astype(np.uint64)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_all_sizes_and_places(kernel: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = _pieces(rng, 400, 5000)
    size = (int(pieces[:, :2].max()) + 5000) // 64 * 64 + 64
    source = rng.integers(0, 256, size, np.uint8)
    found = _move(kernel, pieces, source)
    expected = np.full(size, 0xEE, np.uint8)
    for begin, to, nbytes in pieces.tolist():
        expected[to : to + nbytes] = source[begin : begin + nbytes]
    assert np.array_equal(found, expected)
    assert len({(a ^ b) % 16 for a, b, _ in pieces.tolist()}) > 4


def test_each_short_size_at_each_place(kernel: Path) -> None:
    rows = []
    at = 0
    for apart in (0, 4, 8, 12, 1):
        for lead in range(16):
            for nbytes in (*range(36), 64):
                rows.append((at + lead + apart, at + lead, nbytes))
                at += 128
    pieces = np.array(rows, np.uint64)
    source = np.random.default_rng(9).integers(0, 256, at + 128, np.uint8)
    found = _move(kernel, pieces, source)
    expected = np.full(len(source), 0xEE, np.uint8)
    for begin, to, nbytes in rows:
        expected[to : to + nbytes] = source[begin : begin + nbytes]
    assert np.array_equal(found, expected)


def test_the_table_of_large_pieces(kernel: Path) -> None:
    """Cut to what one block of threads moves, as a save cuts them."""
    nbytes = np.array([5, 0, staging.CHUNK, staging.CHUNK + 1, 3 * staging.CHUNK - 7], np.uint64)
    begin = np.cumsum(nbytes) - nbytes
    total = int(nbytes.sum())
    source = np.random.default_rng(3).integers(0, 256, -(-(total + 100) // 64) * 64, np.uint8)
    table = staging._chunks(begin + np.uint64(3), begin, nbytes)
    assert table[:, 2].max() == staging.CHUNK
    found = _move(kernel, table, source)
    assert np.array_equal(found[:total], source[3 : total + 3])
    assert (found[total:] == 0xEE).all()
