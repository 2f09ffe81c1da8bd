"""Folders of OneFlow's variables: of every era, and with everything that can be wrong with them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from holdfast.dtypes import BY_NAME
from holdfast.errors import FormatError
from holdfast.folder import FolderSource
from holdfast.formats import oneflow_pickle, oneflow_snapshot
from holdfast.reader import Reader
from oneflow_states import assert_same, folder_values, index_folder, meta, snapshot, variable

WEIGHT = np.arange(6, dtype="<f4").reshape(2, 3)
ARRAYS = {"l1.weight": WEIGHT, "l1.bias": np.arange(3, dtype="<i8"), "mask": np.array([True])}


def check(folder: Path, expected: dict[str, np.ndarray], *, strict: bool = True) -> None:
    """A folder has these tensors, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = index_folder(folder, strict=strict)
    assert found.framework == "oneflow"
    assert found.format == "oneflow"
    got = folder_values(folder, found)
    assert list(got) == sorted(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert_same(got[name], value)


# -- what there is -------------------------------------------------------------------------------


def test_a_snapshot(tmp_path: Path) -> None:
    check(snapshot(tmp_path / "ckpt", ARRAYS), ARRAYS)


def test_types_of_every_kind(tmp_path: Path) -> None:
    names = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64"
    arrays = {name: np.ones((2, 2), name) for name in [*names.split(), "complex64", "complex128"]}
    check(snapshot(tmp_path / "ckpt", arrays), arrays)


def test_without_dimensions_and_without_elements(tmp_path: Path) -> None:
    arrays = {"scalar": np.array(2.5), "empty": np.zeros((0, 3), "<f4")}
    check(snapshot(tmp_path / "ckpt", arrays), arrays)


def test_nested_names(tmp_path: Path) -> None:
    arrays = {name: np.full(2, i) for i, name in enumerate(("a/b", "a/c/d", "a", "e/f/g/h", "z"))}
    check(snapshot(tmp_path / "ckpt", arrays), arrays)


def test_nested_names_alone_are_recognised(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"a/b/c": WEIGHT}, done=False)
    with pytest.warns(UserWarning, match="interrupted"):
        assert list(folder_values(folder, index_folder(folder))) == ["a/b/c"]


def test_names_that_differ_in_case_alone(tmp_path: Path) -> None:
    arrays = {"Weight": np.zeros(2), "weight": np.ones(2), "WEIGHT/x": np.ones(1)}
    folder = snapshot(tmp_path / "ckpt", arrays)
    if len(list(folder.iterdir())) == 4:  # not where the file system knows one of them only
        check(folder, arrays)


def test_names_of_any_kind(tmp_path: Path) -> None:
    arrays = {name: np.ones(1) for name in ("with space", "pickled_data", "-x", "é", "a\nb", "..x")}
    check(snapshot(tmp_path / "ckpt", arrays), arrays)


def test_stray_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", ARRAYS)
    (folder / "README.md").write_text("hello")
    (folder / "l1.weight" / "notes").write_text("hello")
    (folder / "logs" / "events").mkdir(parents=True)
    (folder / "logs" / "log.txt").write_text("hello")
    os.mkfifo(folder / "fifo")
    check(folder, ARRAYS)


def test_a_single_variable(tmp_path: Path) -> None:
    variable(tmp_path / "w", (2, 3), "float32", WEIGHT.tobytes())
    check(tmp_path / "w", {"tensor": WEIGHT})


@pytest.mark.parametrize("mark", ["model.mlir", "job"])
def test_a_graph(tmp_path: Path, mark: str) -> None:
    folder = snapshot(tmp_path / "graph", {"model.a": WEIGHT}, done=False)
    (folder / mark).write_bytes(b"module {}")
    (folder / "one_embedding_options.json").write_text("{}")
    check(folder, {"model.a": WEIGHT})


def test_a_text_written_by_another_hand(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT})
    (folder / "w" / "meta").write_text("data_type: 2 # kFloat\nshape < dim: [0x2, 3] >")
    check(folder, {"w": WEIGHT})


def test_bfloat16_as_float32_and_as_it_is(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"plain": WEIGHT})
    numbers = np.array([1.5, -2, 3.25, 0], "<f4")
    upper = (numbers.view("<u4") >> 16).astype("<u2")
    variable(folder / "wide", (2, 2), "bfloat16", numbers.tobytes())
    variable(folder / "thin", (2, 2), "bfloat16", upper.tobytes())
    variable(folder / "scalar", (), "bfloat16", numbers[:1].tobytes())
    variable(folder / "none", (0, 2), "bfloat16", b"")
    found = index_folder(folder, strict=True)
    assert [found.dtype(i).name for i in range(5)] == ["bfloat16"] * 1 + ["float32"] + [
        "bfloat16"
    ] * 3
    got = folder_values(folder, found)
    assert got["wide"].tolist() == got["thin"].tolist() == upper.reshape(2, 2).tolist()
    assert got["scalar"] == upper[0]
    assert got["none"].shape == (0, 2)
    np.testing.assert_array_equal(got["plain"], WEIGHT)
    assert found.storages is not None
    assert found.storages["nbytes"].tolist() == [0, 24, 4, 8, 16]


# -- from before there was meta ------------------------------------------------------------------


def test_the_oldest_snapshots(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    step = "System-Train-TrainStep-train_job"
    contents = {"conv1-weight": WEIGHT.tobytes(), "linear.bias": bytes(8), "odd": b"abc", "no": b""}
    for name, data in {**contents, step: (7).to_bytes(8, "little")}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "out").write_bytes(data)
    (folder / "snapshot_done").write_bytes(b"")
    found = index_folder(folder, strict=True)
    assert found.guess is not None
    with pytest.warns(UserWarning, match="neither types nor shapes of the 5 tensors") as warned:
        Reader(FolderSource(folder)).source.close()
    assert len(warned) == 1
    assert str(warned[0].message) == found.guess.warning
    assert str(folder) in found.guess.warning
    got = folder_values(folder, found)
    assert_same(got["conv1-weight"], WEIGHT.reshape(-1))
    assert (got["linear.bias"].dtype, got["linear.bias"].tolist()) == ("<f4", [0, 0])
    assert (got["odd"].dtype, got["odd"].tobytes()) == ("u1", b"abc")
    assert (got["no"].dtype, got["no"].shape) == ("<f4", (0,))
    assert (got[step].dtype, got[step].tolist()) == ("<i8", [7])


def test_the_oldest_snapshots_once_told_what_they_hold(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    contents = {"a": WEIGHT.tobytes(), "b": bytes(range(6)), "c": bytes(8), "wide": bytes(8)}
    for name, data in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "out").write_bytes(data)
    (folder / "snapshot_done").write_bytes(b"")
    found = index_folder(folder, strict=True)
    assert found.guess is not None
    kinds = {0: ("float32", (2, 3)), 1: ("uint8", (3, 2, 1)), 3: ("bfloat16", (4,))}
    told = found.guess.told({row: (BY_NAME[name], shape) for row, (name, shape) in kinds.items()})
    assert told.guess is None
    assert told.files == found.files
    for row, (name, shape) in kinds.items():
        assert (told.dtype(row).name, told.shape(row)) == (name, shape)
    assert (told.dtype(2).name, told.shape(2)) == ("float32", (2,))
    got = folder_values(folder, told)
    assert_same(got["a"], WEIGHT)
    assert got["b"].tobytes() == contents["b"]
    assert told.storages is None  # bfloat16 stands there as it is


def test_a_variable_that_alone_has_no_meta(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", ARRAYS)
    (folder / "l1.bias" / "meta").unlink()
    with pytest.raises(FormatError, match=r"ckpt: tensor 'l1\.bias': has no 'meta', though others"):
        index_folder(folder)


# -- what is wrong with it -----------------------------------------------------------------------


def test_an_interrupted_save(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", ARRAYS, done=False)
    with pytest.warns(UserWarning, match="ckpt: has no 'snapshot_done': the save was interrupted"):
        assert len(index_folder(folder)) == 3
    with pytest.raises(FormatError, match="ckpt: has no 'snapshot_done': the save was interrupted"):
        index_folder(folder, strict=True)
    (folder / "snapshot_done").mkdir()  # which is no mark
    with pytest.warns(UserWarning, match="interrupted"):
        index_folder(folder)


def test_no_variable(tmp_path: Path) -> None:
    check(snapshot(tmp_path / "ckpt", {}), {})
    (tmp_path / "ckpt" / "snapshot_done").rename(tmp_path / "ckpt" / "model.mlir")
    folder = tmp_path / "ckpt"
    with pytest.raises(FormatError, match="ckpt: expected sub-folders with 'out', found no var"):
        index_folder(folder)


@pytest.mark.parametrize("inside", [[], ["readme"], [".metadata", "__0_0.distcp"], ["sub/x"]])
def test_folders_of_others(tmp_path: Path, inside: list[str]) -> None:
    for name in inside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = FolderSource(tmp_path)
    try:
        assert not oneflow_snapshot.sniff_folder(source)
        assert not oneflow_pickle.sniff_folder(source)
    finally:
        source.close()


def test_a_variable_without_out(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", ARRAYS)
    (folder / "mask" / "out").unlink()
    with pytest.raises(FormatError, match=r"tensor 'mask': expected a file 'out', found none"):
        index_folder(folder)
    (folder / "mask" / "out").mkdir()
    with pytest.raises(FormatError, match=r"'mask': expected a file 'out', found what is no reg"):
        index_folder(folder)


@pytest.mark.parametrize("nbytes", [0, 23, 25, 48])
def test_out_of_another_size(tmp_path: Path, nbytes: int) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT, "x": WEIGHT})
    (folder / "x" / "out").write_bytes(bytes(nbytes))
    text = rf"tensor 'x': float32 of shape \(2, 3\) needs 24 bytes, 'out' has {nbytes}"
    with pytest.raises(FormatError, match=text):
        index_folder(folder)


@pytest.mark.parametrize(
    ("dims", "shown"),
    [
        ((2**62, 2**62), "needs 85070591730234615865843651857942052864 bytes"),
        ((2**63 - 1,), "needs 36893488147419103228 bytes"),
        ((2**32, 2**32, 0), "too large for any memory"),
        ((0,) + (2**63 - 1,) * 63, "too large for any memory"),
        ((2**31, 2**31), "needs 18446744073709551616 bytes"),
    ],
)
def test_shapes_too_large(tmp_path: Path, dims: tuple[int, ...], shown: str) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT})
    variable(folder / "x", dims, "float32", b"")
    with pytest.raises(FormatError, match=rf"tensor 'x'.*{shown}"):
        index_folder(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"shape { dim: -2 } data_type: kFloat", "an extent of -2"),
        (b"shape { dim: 6 } data_type: kFloot", "'kFloot', not known"),
        (b"shape { dim: 6 } data_type: 77", "a number not known"),
        (b"shape { dim: 6 }", "expected 'data_type'"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "expected 'shape'"),
    ],
)
def test_a_meta_that_is_none(tmp_path: Path, text: bytes, problem: str) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT, "x": WEIGHT})
    (folder / "x" / "meta").write_bytes(text)
    with pytest.raises(FormatError, match=rf"ckpt: tensor 'x'.*{problem}"):
        index_folder(folder)


def test_a_huge_meta(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT})
    (folder / "w" / "meta").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(FormatError, match=r"w/meta.*at most 1048576 bytes, found 1048577"):
        index_folder(folder)


def test_many_large_metas(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {f"w{i:02}": WEIGHT for i in range(40)})
    for i in range(40):
        text = folder / f"w{i:02}" / "meta"
        text.write_bytes(text.read_bytes() + b"#".ljust((1 << 19) - (i == 0)))
        if i == 20:
            assert len(index_folder(folder)) == 40  # a few may be as large as they like
    with pytest.raises(FormatError, match=r"at most 16941056 bytes in the 'meta' of 40 tensors"):
        index_folder(folder)


@pytest.mark.parametrize("known", [True, False])
def test_a_variable_that_vanishes(tmp_path: Path, known: bool) -> None:
    folder = snapshot(tmp_path / "ckpt", {"v": WEIGHT, "w": WEIGHT})
    if not known:
        for name in "vw":
            (folder / name / "meta").unlink()

    class Vanishing(FolderSource):
        def entries(self, path: str = "") -> Mapping[str, str]:
            found = super().entries(path)
            if path == "w":
                (folder / "w" / "out").unlink()
            return found

    source = Vanishing(folder)
    try:
        with pytest.raises(FormatError, match="tensor 'w': 'out' is gone"):
            oneflow_snapshot.index_folder(source, verify=True, strict=True)
    finally:
        source.close()


@pytest.mark.parametrize("what", ["w", "w/meta", "w/out", "link", "w/link", "snapshot_done"])
def test_symbolic_links(tmp_path: Path, what: str) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT, "v": WEIGHT})
    place = folder / what
    if place.exists():
        place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=f"{re.escape(what)}.*symbolic link"):
        index_folder(folder)


@pytest.mark.parametrize("what", ["w/meta", "w/out"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, what: str) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT, "v": WEIGHT})
    (folder / what).unlink()
    os.mkfifo(folder / what)
    with pytest.raises(FormatError, match="'w'|w/meta"):  # and does not wait for a writer
        index_folder(folder)


def test_folders_too_deep(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w": WEIGHT})
    (folder / "/".join(["d"] * 70)).mkdir(parents=True)
    with pytest.raises(FormatError, match="folders in more than 64 levels"):
        index_folder(folder)


def test_meta_as_a_name(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "ckpt", {"w/meta": WEIGHT, "v/out": WEIGHT})
    assert (folder / "w/meta/meta").read_bytes() == meta((2, 3), "float32")
    check(folder, {"w/meta": WEIGHT, "v/out": WEIGHT})
