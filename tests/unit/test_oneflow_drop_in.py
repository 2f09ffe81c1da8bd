"""``holdfast.oneflow``: what its arguments mean, where OneFlow is not imported."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow
from holdfast import adapters
from holdfast.errors import FormatError

X = {"x": np.arange(4, dtype="f4")}


def test_a_buffer_gets_a_single_file() -> None:
    file = io.BytesIO()
    holdfast.oneflow.save(X, file)
    file.seek(0)
    found = holdfast.oneflow.load(file)
    assert np.asarray(found["x"]).tolist() == [0, 1, 2, 3]


def test_external_data_is_a_folder_around_a_pickle(tmp_path: Path) -> None:
    holdfast.oneflow.save(X, tmp_path / "a", None, True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["pickled_data", "tensor_0"]
    with pytest.raises(ValueError, match="needs a path"):
        holdfast.oneflow.save(X, io.BytesIO(), save_as_external_data=True)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    holdfast.oneflow.save({"a": X["x"], "b": X["x"]}, tmp_path / "m")
    holdfast.oneflow.save({"a": X["x"]}, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["a", "snapshot_done"]
    holdfast.oneflow.save([X], tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["pickled_data", "tensor_0"]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no part of a checkpoint, and would be lost"):
        holdfast.oneflow.save(X, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_is_written_where_something_cannot_be_held(tmp_path: Path) -> None:
    for layout in ("snapshot", "pickle", "file"):
        with pytest.raises(TypeError, match="OneFlow cannot load elements of uint16: save x.int"):
            holdfast.oneflow.save({"x": np.zeros(2, "u2")}, tmp_path / "m", layout=layout)
        with pytest.raises(Exception, match=r"\$\['f'\]"):
            holdfast.oneflow.save({"f": (i for i in "x")}, tmp_path / "m", layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"layout": "zip"}, ValueError, "layout='zip': expected one of 'snapshot', 'pickle'"),
        ({"global_dst_rank": "0"}, TypeError, "global_dst_rank expected type int, but got"),
        ({"global_dst_rank": 1}, ValueError, r"in range of \[0, 1\), but got 1"),
    ],
)
def test_arguments_of_save(
    arguments: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        holdfast.oneflow.save(X, tmp_path / "m", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_rank_0_is_all_there_is(tmp_path: Path) -> None:
    holdfast.oneflow.save(X, tmp_path / "m", 0)
    assert list(holdfast.oneflow.load(tmp_path / "m", 0)) == ["x"]
    with pytest.raises(ValueError, match="global_src_rank out of range"):
        holdfast.oneflow.load(tmp_path / "m", 3)


def test_files_of_torch_on_request(tmp_path: Path) -> None:
    holdfast.save(X, tmp_path / "x.pt")
    assert list(holdfast.oneflow.load(tmp_path / "x.pt")) == ["x"]
    with pytest.raises(ValueError, match=r'Cannot load file ".*x\.pt"'):
        holdfast.oneflow.load(tmp_path / "x.pt", support_pytorch_format=False)


def test_a_file_that_cannot_seek() -> None:
    class Pipe(io.BytesIO):
        def seek(self, *_: Any) -> int:
            raise io.UnsupportedOperation("seek")

    with pytest.raises(io.UnsupportedOperation, match="only oneflow.load from a file that is seek"):
        holdfast.oneflow.load(Pipe())


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError):
        holdfast.oneflow.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        holdfast.oneflow.load(tmp_path / "b")


def test_a_folder_called_oneflow_is_not_oneflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapters.available("oneflow"):
        pytest.skip("OneFlow itself is installed")
    holdfast.oneflow.save(X, tmp_path / "oneflow")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert importlib.util.find_spec("oneflow") is not None
    assert not adapters.available("oneflow")
    assert list(holdfast.oneflow.load(tmp_path / "oneflow")) == ["x"]
    assert "oneflow" not in sys.modules
