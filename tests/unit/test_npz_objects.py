"""Archives of NumPy's that hold arrays of Python objects besides others."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import numpy_files as files
from holdfast import cli
from holdfast.errors import FormatError
from zip_files import Record, build


def member(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


@pytest.fixture(params=[np.savez, np.savez_compressed])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "mixed.npz"
    classes = np.array([{"run": 7}, "x" * 5000], object)
    request.param(path, a=np.arange(5.0), meta=np.array({"lr": 0.1}), b=np.ones(3, "u1"),
                  classes=classes)  # fmt: skip
    return path


OBJECTS = r"array 'meta': header: dtype '\|O' is Python objects.*allow_pickle"


def test_the_others_are_read_by_their_names(mixed: Path) -> None:
    for keys in ("a", ["b", "a"], "[ab]"):
        for mmap in (True, False):
            found = holdfast.load(mixed, keys=keys, mmap=mmap)
            assert sorted(found) == (["a"] if keys == "a" else ["a", "b"])
            assert found["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keys", [None, "meta", "m*", "*", ["a", "meta"]])
def test_what_is_asked_for_and_cannot_be_read(mixed: Path, keys: Any) -> None:
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.load(mixed, keys=keys)


def test_it_opens(mixed: Path) -> None:
    with holdfast.open(mixed) as f:
        assert list(f) == ["a", "b", "meta", "classes"] and len(f) == 4
        assert "meta" in f and "other" not in f
        assert f["b"].tolist() == [1, 1, 1] and f.get("a")[2] == 2 and f.get("other") is None
        for use in (f.__getitem__, f.get, f.info, f.slice, f.prefetch):
            with pytest.raises(FormatError, match=OBJECTS):
                use("meta")
        with pytest.raises(FormatError, match=OBJECTS):
            f.tree()
        with pytest.raises(KeyError, match="no tensor is called 'other'"):
            f["other"]
        f.prefetch()


def test_names_are_guessed_among_all(mixed: Path) -> None:
    text = r"'met' \(4 are here\); did you mean 'meta'"
    with holdfast.open(mixed) as f, pytest.raises(KeyError, match=text):
        f["met"]


def test_what_has_another_prefix_is_no_matter(mixed: Path) -> None:
    target = {"x": np.zeros(5)}
    holdfast.load_into(target, mixed, prefix="a", rename={"^a$": "ax"})
    assert target["x"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.load_into({"ta": np.zeros(5)}, mixed, prefix="me", strict=False)


def test_a_shard(mixed: Path) -> None:
    """Its index need not name what cannot be read: then nobody would hear of it."""
    folder = mixed.parent / "folder"
    folder.mkdir()
    mixed.rename(folder / "m-1.npz")
    index = {"metadata": {}, "weight_map": {"a": "m-1.npz", "b": "m-1.npz"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.load(folder)


def test_the_command_lists_them(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(mixed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a  float64  5  40 bytes at")
    assert lines[2].startswith("meta  cannot be read: ") and "Python objects" in lines[2]
    assert cli.main(["info", "--json", str(mixed)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["name"] for entry in found] == ["a", "b", "meta", "classes"]
    assert "Python objects" in found[3]["error"] and found[1]["nbytes"] == 3


def test_it_is_filled_from(mixed: Path) -> None:
    target = {"a": np.zeros(5), "other": np.zeros(())}
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.load_into(target, mixed)
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.load_into(target | {"meta": np.zeros(())}, mixed, strict=False)
    assert not target["a"].any()
    keys = holdfast.load_into(target, mixed, strict=False)
    assert target["a"].tolist() == [0, 1, 2, 3, 4]
    assert keys.missing_keys == ["other"] and keys.unexpected_keys == ["b"]


def test_it_is_not_converted(mixed: Path) -> None:
    with pytest.raises(FormatError, match=OBJECTS):
        holdfast.convert(mixed, mixed.with_suffix(".safetensors"))
    assert list(mixed.parent.iterdir()) == [mixed]


def test_their_bytes_are_verified(mixed: Path) -> None:
    report = holdfast.verify(mixed)
    assert report.ok and report.checked == 2
    data = bytearray(mixed.read_bytes())
    with zipfile.ZipFile(mixed) as archive:
        info = archive.getinfo("classes.npy")
    data[info.header_offset + 61 + info.compress_size // 2] ^= 1
    mixed.write_bytes(data)
    report = holdfast.verify(mixed)
    assert not report.ok and "classes.npy" in report.problems[0]
    assert holdfast.load(mixed, keys="a", mmap=False)["a"][4] == 4


def test_very_many_of_them() -> None:
    records = [Record(f"{i}.npy", member(i)) for i in range(40)]
    head = files.npy(files.literal("'|O'"), bytes(60))
    records[5:35:3] = [Record(f"{i}.npy", head) for i in range(5, 35, 3)]
    data = build(records)
    assert holdfast.load(io.BytesIO(data), keys=["4", "39"])["39"] == 39
    with pytest.raises(FormatError, match=r"array '20': header: dtype '\|O'"):
        holdfast.load(io.BytesIO(data), keys=["4", "20"])
    with holdfast.open(io.BytesIO(data)) as f:
        assert len(f) == 40 and [f[str(i)] for i in range(0, 39, 3)] == list(range(0, 39, 3))
