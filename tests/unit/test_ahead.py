"""What of a map is to be read by 2 MiB at a time, as the kernel has it written down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine, ahead, maps
from holdfast.layout import SEGMENT
from holdfast.maps import Maps
from patience import within

MIB = 1 << 20
LARGE = 9 * MIB

pytestmark = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled")
    or os.sysconf("SC_PAGE_SIZE") != 4096,
    reason="the kernel has no huge pages of 2 MiB",
)


def maps_of(path: Path) -> int:
    """How many maps of a file the kernel has."""
    return Path("/proc/self/maps").read_text().count(f" {path}\n")


def expected(path: Path) -> int:
    """Bytes of the maps of a file that are to be read by huge pages (``hg`` in smaps)."""
    found, nbytes = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            nbytes = stop - start if fields[-1] == str(path) else 0
        elif fields[0] == "VmFlags:" and "hg" in fields[1:]:
            found += nbytes
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    tensors: dict[str, Any] = {f"small.{i}": np.full(1000, i, "u1") for i in range(50)}
    tensors |= {f"large.{i}": np.full(LARGE, i, "u1") for i in range(3)}
    holdfast.save(tensors, path, durable=False)
    return path


def test_all_of_what_is_loaded(path: Path) -> None:
    loaded = holdfast.load(path, framework="numpy")
    assert expected(path) >= os.path.getsize(path)
    assert loaded["large.2"][LARGE - 1] == 2


def test_what_is_loaded_by_its_keys(path: Path) -> None:
    loaded = holdfast.load(path, framework="numpy", keys="large.1")
    assert LARGE <= expected(path) < 2 * LARGE
    few = holdfast.load(path, framework="numpy", keys="small.*")
    assert LARGE <= expected(path) < 2 * LARGE
    del loaded
    assert expected(path) == 0
    assert few["small.7"][0] == 7


def test_opened_whole_tensors_and_not_slices(path: Path) -> None:
    with holdfast.open(path, framework="numpy") as f:
        assert f["small.3"][0] == 3
        assert f.slice("large.0")[5:7].tolist() == [0, 0]
        assert expected(path) == 0
        assert f["large.2"][5] == 2
        assert LARGE <= expected(path) < 2 * LARGE
        f.prefetch()
        assert expected(path) >= 3 * LARGE


def test_not_of_more_than_memory_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "EXPECT_MOST", 2 * LARGE)
    loaded = holdfast.load(path, framework="numpy")
    assert expected(path) == 0
    assert loaded["large.1"][0] == 1


def test_neighbours_count_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "EXPECT_LEAST", LARGE + 1)
    one = holdfast.load(path, framework="numpy", keys="large.0")
    assert expected(path) == 0
    two = holdfast.load(path, framework="numpy", keys=["large.0", "large.1"])
    assert expected(path) >= 2 * LARGE
    assert one["large.0"][0] == two["large.0"][0]


def test_files_side_by_side(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full(LARGE, i, "u1") for i in range(3)}
    folder = tmp_path / "folder"
    holdfast.save(tensors, folder, max_shard_size=LARGE, durable=False)
    loaded = holdfast.load(folder, framework="numpy", keys=["t0", "t2"])
    marked = [expected(shard) for shard in sorted(folder.glob("*.safetensors"))]
    assert [nbytes >= LARGE for nbytes in marked] == [True, False, True]
    assert loaded["t2"][0] == 2


def test_where_the_kernel_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "no")

    monkeypatch.setattr(_engine, "expect", refuse)
    assert holdfast.load(path, framework="numpy")["large.1"][3] == 1


@pytest.mark.parametrize(("between", "most"), [(MIB + MIB // 2, 3), (5 * MIB, 17)])
def test_tensors_taken_one_by_one(tmp_path: Path, between: int, most: int) -> None:
    """A process may have 65,530 maps: what is less than a folio apart is one of them."""
    sizes = {"large": LARGE, "less": between}
    path = tmp_path / "ckpt"
    tensors = {f"{i}.{name}": np.zeros(n, "u1") for i in range(8) for name, n in sizes.items()}
    holdfast.save(tensors, path, durable=False)
    with holdfast.open(path, framework="numpy") as f:
        taken = [f[name] for name in f if name.endswith("large")]
        assert most // 3 <= maps_of(path) <= most
        assert expected(path) >= 8 * LARGE
    assert len(taken) == 8


def test_no_more_stretches_than_a_process_may_have_maps(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MARKS", 2)
    with holdfast.open(path, framework="numpy") as f:
        taken = [f[name] for name in ("large.0", "large.1", "large.2", "large.0")]
        assert 2 * LARGE <= expected(path) < 3 * LARGE
        assert taken[2][-1] == 2


def test_one_file_of_many(path: Path) -> None:
    """What one tensor takes does not grow with the files that there are."""
    with open(path, "rb") as f:
        buffer = _engine.map_file(f.fileno(), 0, 3 * LARGE)
    many = Maps([buffer] * 20_000, np.arange(20_000))
    one = np.zeros(1, SEGMENT)
    one["nbytes"], one["file"] = LARGE, 19_999
    with within(1):
        for _ in range(50):
            ahead.expect(many, one)
    assert LARGE <= expected(path) < 2 * LARGE


def test_memory_is_what_the_control_group_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "LIMITS", ())
    machine = ahead.memory()
    assert machine > 1 << 28
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(ahead, "LIMITS", (str(tmp_path / "none"), str(limit)))
    for text, expected in (("max\n", machine), ("1048576\n", 1 << 20), (f"{1 << 63}", machine)):
        limit.write_text(text)
        assert ahead.memory() == expected
