"""A saver that is killed leaves the old file or the new one, whole, and nothing that lasts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = 1 << 18  # of eight bytes: files of 2 MiB
KILLS = 30  # for each way in which a file gets its name

#: Forks a saver for each line read, says its number, and says "dead" when it has ended.
#: Every file that a saver writes holds one number throughout, which grows from save to save.
SAVER = f"""
import os, sys
import numpy as np
from holdfast import _engine
from holdfast.layout import SEGMENT

def save(path, content, durable):
    segments = np.zeros(1, SEGMENT)
    segments["nbytes"] = content.nbytes
    segments["address"] = content.ctypes.data
    with _engine.Publication(path) as publication:
        _engine.write(publication.fd, segments, checksum=False, direct=False, filename=path)
        publication.commit(durable)

def save_for_ever(path, first, durable):
    for generation in range(first, 1 << 62):
        save(path, np.full({WORDS}, generation, np.uint64), durable)

for line in sys.stdin:
    path, first, durable, ban, error = line.split()
    pid = os.fork()
    if pid == 0:
        _engine.fault_ban(ban if ban != "-" else None, int(error))
        save_for_ever(path, int(first), durable == "1")
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.fixture(scope="module")
def savers() -> Iterator[subprocess.Popen[str]]:
    """A process that forks savers."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # forks, so it had better be alone
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def generation_of(target: Path) -> int:
    """The number that the file consists of, all of it."""
    content = target.read_bytes()
    assert len(content) == 8 * WORDS, "cut short"
    word = content[:8]
    assert content == word * WORDS, "a mixture"
    return int.from_bytes(word, sys.byteorder)


def run_and_kill(
    savers: subprocess.Popen[str], target: Path, first: int, durable: bool, ban: str, delay: float
) -> None:
    """Let a saver save over `target` again and again for `delay` seconds, then kill it."""
    assert savers.stdin is not None
    assert savers.stdout is not None
    refused, _, error = ban.partition(":")
    savers.stdin.write(f"{target} {first} {int(durable)} {refused} {error or 0}\n")
    savers.stdin.flush()
    pid = int(savers.stdout.readline())
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert savers.stdout.readline() == "dead\n"


@pytest.mark.parametrize("ban", ["-", "tmpfile:95"], ids=["unnamed", "named"])
def test_killed_at_any_moment(
    savers: subprocess.Popen[str], save: Callable[..., None], tmp_path: Path, ban: str
) -> None:
    chance = random.Random(2024)
    target = tmp_path / "target"
    save(target, bytes(8 * WORDS))
    last = moved = left = 0

    for kill in range(KILLS):
        run_and_kill(savers, target, last + 1, kill % 2 == 1, ban, chance.uniform(0.001, 0.04))

        generation = generation_of(target)
        assert generation >= last
        moved += generation > last
        last = generation
        names = sorted(os.listdir(tmp_path))
        assert len(names) <= 2, names
        left += len(names) - 1

        last += 1
        save(target, last.to_bytes(8, sys.byteorder) * WORDS)
        assert os.listdir(tmp_path) == [target.name]

    assert moved > 0, "the savers never came as far as to save"
    if ban == "-":
        assert left < KILLS / 2, "an unnamed file has a name for a moment only"
    else:
        assert left > 0, "no saver was killed while it wrote"
