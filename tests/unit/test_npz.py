"""Archives of NumPy's: how they are laid out, what is read of them and what is refused."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import zip_files
from holdfast.errors import FormatError
from holdfast.formats import _npz_emit, _zip, npz
from zip_files import Record, build


def member(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def load(data: bytes, **options: Any) -> Any:
    return holdfast.load(io.BytesIO(data), **options)


def saved(obj: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    holdfast.save(obj, out, format="npz", **options)
    return out.getvalue()


SAMPLE = {
    "w": np.arange(12.0).reshape(3, 4),
    "layer/b": np.arange(5, dtype="i2"),
    "é": np.array(7),
    "none": np.zeros((0, 3)),
    "W": np.ones(300, "u1"),
}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert list(a) == list(b)
    return all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (a[k] == b[k]).all() for k in a
    )


# -- layout --------------------------------------------------------------------------------------


def test_it_is_an_archive_as_zipfile_writes_them() -> None:
    data = saved(SAMPLE)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{name}.npy" for name in SAMPLE]
        for info, (name, array) in zip(archive.infolist(), SAMPLE.items(), strict=True):
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.flag_bits == (0 if name.isascii() else 0x800)
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.external_attr == 0o600 << 16
            assert archive.read(info) == member(array)
    assert same(load(data), SAMPLE)
    with np.load(io.BytesIO(data)) as theirs:
        assert same({name: theirs[name] for name in theirs.files}, SAMPLE)


def test_every_payload_is_aligned() -> None:
    names = {f"{'n' * i}": np.arange(i, dtype="f8") for i in range(1, 140)}
    data = saved(names)
    with holdfast.open(io.BytesIO(data)) as f:
        offsets = [f.info(name).offset for name in names]
    assert len(offsets) == 139 and all(offset % 64 == 0 for offset in offsets)
    # Headers agree with the directory, and nothing stands between records.
    assert zip_files.scan(data).names == [f"{name}.npy" for name in names]


def test_nothing_is_an_empty_archive_as_numpy_has_it() -> None:
    out = io.BytesIO()
    np.savez(out)
    assert saved({}) == out.getvalue()
    assert load(saved({})) == {}


def test_mapped_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    big = np.random.default_rng(0).random(1 << 16)
    holdfast.save({"big": big, **SAMPLE}, path)
    got = holdfast.load(path, mmap=True)
    assert same(got, {"big": big, **SAMPLE})
    addresses = {name: array.ctypes.data for name, array in got.items()}
    with holdfast.open(path) as f:
        infos = {name: f.info(name) for name in f}
    base = addresses["big"] - infos["big"].offset
    assert base % 4096 == 0
    for name, info in infos.items():
        if info.nbytes:
            assert addresses[name] - info.offset == base, name
    got["w"][0, 0] = 99  # private to the process
    assert holdfast.load(path)["w"][0, 0] == 0


def test_late_checksums_are_patched_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved(SAMPLE)
    monkeypatch.setattr(npz, "_EARLY", 100)
    assert saved(SAMPLE) == first
    for durable in (True, False):
        holdfast.save(SAMPLE, tmp_path / "x.npz", durable=durable)
        assert (tmp_path / "x.npz").read_bytes() == first
    holdfast.save(SAMPLE, tmp_path / "x.npz", checksum=False)
    assert (tmp_path / "x.npz").read_bytes() == first, "no reader takes it without checksums"


@pytest.mark.parametrize("size", [0xFFFFFFFF - 129, 0xFFFFFFFF - 128, 1 << 33])
def test_beyond_4_gib(size: int, tmp_path: Path) -> None:
    """A sparse file: the arrays are holes."""
    heads = [b"\x93NUMPY" + bytes(122)] * 3
    nbytes = np.array([10, size, 10], np.uint64)
    skeleton = _npz_emit.Skeleton(["a.npy", "b.npy", "c.npy"], heads, nbytes)
    skeleton.stamp(np.array([0, 2]), np.full(2, zlib.crc32(bytes(10)), np.uint32))
    path = tmp_path / "x.npz"
    with path.open("wb") as f:
        pieces = skeleton.pieces()
        for offset, length, start in zip(
            pieces.offset.tolist(), pieces.nbytes.tolist(), pieces.start.tolist(), strict=True
        ):
            f.seek(offset)
            f.write(pieces.data[start : start + length])
    assert path.stat().st_size == skeleton.size
    assert (skeleton.offsets % 64 == 0).all()
    with path.open("rb") as f:

        def read(offset: int, nbytes: int) -> bytes:
            f.seek(offset)
            return f.read(nbytes)

        rows = _zip.scan(read, skeleton.size, "x.npz").rows
        assert rows["size"].tolist() == [138, 128 + size, 138]
        assert (rows["offset"] + 128).tolist() == skeleton.offsets.tolist()
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()] == [138, 128 + size, 138]
        with archive.open("c.npy") as record:
            assert record.read() == heads[2] + bytes(10)


def test_more_records_than_16_bits_count() -> None:
    data = saved({str(i): np.array(i) for i in range(0x10001)})
    assert len(load(data)) == 0x10001
    with np.load(io.BytesIO(data)) as theirs:
        assert len(theirs.files) == 0x10001 and theirs["65536"] == 65536


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a.npy", "...", "a/..b", "é/ß", "x" * 60000, "file", "C:x", "#", "a/"]
)
def test_a_name(name: str) -> None:
    data = saved({name: np.arange(3)})
    assert load(data)[name].tolist() == [0, 1, 2]
    with np.load(io.BytesIO(data)) as theirs:
        assert theirs.files == [name] and theirs[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a\\b"], r"'a\\\\b': a record of a \.npz file has to be called by a relative path"),
        (["/a"], "'/a': a record"),
        (["a//b"], "'a//b': a record"),
        (["../a"], "'../a': a record"),
        (["a/./b"], "'a/./b': a record"),
        (["a\0b"], r"'a\\x00b': a record"),
        (["\ud800"], "the name cannot be written as UTF-8"),
        (["x" * 65532], "its name has 65536 bytes, at most 65535"),
        (["a", "b", "a.npy"], r"'a' and 'a\.npy': numpy\.load of a \.npz file takes the one name"),
    ],
)
def test_a_name_that_no_archive_has(names: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        holdfast.save({name: np.zeros(1) for name in names}, tmp_path / "x.npz")
    assert not isinstance(caught.value, FormatError)
    assert list(tmp_path.iterdir()) == []


def test_names_that_differ_in_case_alone() -> None:
    out = io.BytesIO()
    np.savez(out, A=np.arange(2), a=np.arange(3), Ä=np.arange(4), ä=np.arange(5))
    for data in (out.getvalue(), saved(load(out.getvalue()))):
        assert {name: len(x) for name, x in load(data).items()} == {"A": 2, "a": 3, "Ä": 4, "ä": 5}
        with holdfast.open(io.BytesIO(data)) as f:
            assert len(f["a"]) == 3 and "á" not in f


def test_a_name_twice() -> None:
    data = build([Record("a.npy", member(1)), Record("a.npy", member(2))])
    with pytest.raises(FormatError, match=r"'a\.npy': expected one record of this name"):
        load(data)
    twins = build([Record(f"{text}.npy", member(1)) for text in ("B", "b", "a", "B")])
    with pytest.raises(FormatError, match=r"'B\.npy': expected one record of this name"):
        load(twins)


# -- what is refused -----------------------------------------------------------------------------


def test_a_folder_is_passed_over() -> None:
    data = build([Record("a/", b""), Record("a/b.npy", member([1, 2]))])
    assert load(data)["a/b"].tolist() == [1, 2]


ARCHIVES = {
    "another file": (
        build([Record("a.npy", member(1)), Record("notes.txt", b"hello")]),
        r"record 'notes\.txt': expected arrays alone, whose records end in '\.npy'",
    ),
    "no array at all": (build([Record("notes.txt", b"hello")]), "or arrays '….npy', found 'notes"),
    "empty record": (build([Record("a.npy", b"")]), r"array 'a': expected an array of NumPy"),
    "half a magic": (
        build([Record("a.npy", b"\x93NUM")]), r"array 'a': expected an array of NumPy"),
    "empty, between others": (
        build([Record("a.npy", member(1)), Record("b.npy", b""), Record("c.npy", member(1))]),
        r"array 'b': expected an array of NumPy.* found b''",
    ),
    "no array": (build([Record("a.npy", b"x" * 200)]), "array 'a': expected an array of NumPy"),
    "short": (
        build([Record("a.npy", member(np.zeros(3))[:-1])]),
        "array 'a': expected 24 bytes of elements after 128 of the header at offset 35, found 23",
    ),
    "long": (build([Record("a.npy", member(np.zeros(3)) + b"x")]), "expected 24 .* found 25"),
    "header past the record": (
        build([Record("a.npy", member(np.zeros(3))[:100])]),
        "array 'a': header: needs 128 bytes at offset 35, found 100",
    ),
    "deflated and short": (
        build([Record("a.npy", member(np.zeros(3))[:-1], method=8)]), "expected 24 .* found 23"),
    "deflated, not even a header": (
        build([Record("a.npy", member(np.zeros(3))[:100], method=8)]),
        "array 'a': header: needs 128 bytes, its deflated data at offset 35 are 100",
    ),
    "deflated, no magic": (
        build([Record("a.npy", b"x" * 500, method=8)]), "array 'a': expected an array of NumPy"),
    "not deflated at all": (
        build([Record("a.npy", member(1), method=8, payload=b"\xff" * 120)]),
        "array 'a': is no deflated data",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "text"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_wrong(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=text) as caught:
        holdfast.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not holdfast.verify(path).ok


@pytest.mark.parametrize("more", [1, -1])
def test_what_is_deflated_has_to_have_its_size(more: int) -> None:
    whole = member(np.zeros(10000))
    sized = {"size": len(whole)}
    other = zip_files.deflate(whole + b"x" if more > 0 else whole[:-1])
    data = build([Record("a.npy", whole, method=8, payload=other, local=sized, central=sized)])
    with pytest.raises(FormatError, match="expected 80000 bytes, inflates to"):
        load(data)
    with holdfast.open(io.BytesIO(data)) as f:
        assert f.info("a").shape == (10000,)


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("where", ["header", "elements"])
def test_damage_is_told(method: int, where: str, tmp_path: Path) -> None:
    whole = member(np.arange(1000.0))
    # The header stays one, of the same shape; what it says of the elements is another thing.
    damaged = bytearray(whole)
    at = whole.index(b"<f8") if where == "header" else 5000
    damaged[at : at + 2] = b"<i" if where == "header" else b"??"
    payload = zip_files.deflate(bytes(damaged)) if method else bytes(damaged)
    data = build([Record("a.npy", whole, method=method, payload=payload)])
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    for options in ({"mmap": False}, {"mmap": True, "verify": True}):
        with pytest.raises(holdfast.ChecksumError, match="tensor 'a': the 8000 bytes .* damaged"):
            holdfast.load(path, **options)
    report = holdfast.verify(path)
    assert not report.ok and len(report.problems) == 1
    assert holdfast.load(path, mmap=False, verify=False)["a"].shape == (1000,)


def test_what_is_deflated_is_not_made_twice(tmp_path: Path) -> None:
    """Headers alone are inflated to open a file."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1 << 22), b=np.arange(5))
    with holdfast.open(path) as f:
        assert (f.info("a").nbytes, f.info("a").dtype) == (1 << 25, "float64")
        assert f["b"].tolist() == [0, 1, 2, 3, 4]
        assert f.slice("a")[5:7].tolist() == [0, 0]


# -- objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        ({"a": {"b": np.zeros(2)}}, r"\$\['a'\]: a dict; this format holds a flat dict of arrays"),
        ({"a": [np.zeros(2)]}, r"\$\['a'\]: a list; this format .*\.safetensors or \.pt"),
        ({"a": np.zeros(2), "epoch": 3}, r"\$\['epoch'\]: a int; this format"),
        ({"a": np.float32(1)}, r"\$\['a'\]: a float32; this format"),
        ({"a": "text"}, r"\$\['a'\]: a str; this format"),
        ({1: np.zeros(2)}, r"\$\[1\]: a key of type int; this format has names"),
        (np.zeros(2), r"\$: a ndarray; .*save\(\{'x': x\}\)"),
        ([np.zeros(2)], r"\$: a list; this format holds a flat dict"),
        (None, r"\$: a NoneType; this format holds a flat dict"),
    ],
)
def test_an_object_that_is_no_flat_dict(obj: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=text):
        holdfast.save(obj, tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


def test_any_mapping_of_tensors() -> None:
    array = np.arange(4)
    got = load(saved(OrderedDict(b=array, a=array[::-2], c=array)))
    assert list(got) == ["b", "a", "c"] and type(got) is dict
    assert got["a"].tolist() == [3, 1]
    got["b"][0] = 9
    assert got["c"][0] == 0, "what was one tensor is written for every name that it has"


def test_a_single_element_of_the_other_byte_order() -> None:
    for array in (np.array(258, ">i2"), np.array([1 + 2j], ">c16")):
        assert load(saved({"a": array}))["a"] == array


def test_metadata_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata have no place in a .npz file"):
        holdfast.save(SAMPLE, tmp_path / "x.npz", metadata={"a": "b"})
    holdfast.save(SAMPLE, tmp_path / "x.safetensors", metadata={"a": "b"})
    with pytest.warns(UserWarning, match=r"metadata \['a'\] are left out"):
        holdfast.convert(tmp_path / "x.safetensors", tmp_path / "x.npz")
    assert same(holdfast.load(tmp_path / "x.npz"), SAMPLE)


def test_load_some(tmp_path: Path) -> None:
    for savez in (np.savez, np.savez_compressed):
        savez(tmp_path / "x.npz", **SAMPLE)
        got = holdfast.load(tmp_path / "x.npz", keys=["l*", "w"])
        assert same(got, {name: SAMPLE[name] for name in ("w", "layer/b")})
        with pytest.raises(KeyError, match="no tensor is called 'v'"):
            holdfast.load(tmp_path / "x.npz", keys="v")


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed, holdfast.save])
def test_load_into(tmp_path: Path, savez: Any) -> None:
    path = tmp_path / "x.npz"
    arrays = {"w": np.arange(12.0).reshape(3, 4), "f": np.asfortranarray(np.eye(3, 4))}
    if savez is holdfast.save:
        savez(arrays, path)
    else:
        savez(path, **arrays)
    target = {"w": np.zeros((3, 4), "f4"), "f": np.zeros((3, 4))}
    holdfast.load_into(target, path)
    assert target["w"].tolist() == arrays["w"].tolist()
    assert target["f"].tolist() == arrays["f"].tolist()
    with pytest.raises(RuntimeError, match="size mismatch for w"):
        holdfast.load_into({"w": np.zeros(3)}, path, strict=False)


def test_load_dates_into(tmp_path: Path) -> None:
    dates = np.array(["2020-01-01", "2021-02-03"], "M8[D]")
    np.savez_compressed(tmp_path / "x.npz", d=dates)
    target = {"d": np.zeros(2, "M8[D]")}
    holdfast.load_into(target, tmp_path / "x.npz")
    assert (target["d"] == dates).all()
    with pytest.raises(RuntimeError, match="dtype mismatch for d"):
        holdfast.load_into({"d": np.zeros((2, 8), "u1")}, tmp_path / "x.npz")


def test_a_stream_that_cannot_seek() -> None:
    read, write = os.pipe()
    data = saved(SAMPLE)
    os.write(write, data)
    os.close(write)
    with open(read, "rb") as stream:
        assert same(holdfast.load(stream), SAMPLE)


def test_many_arrays_of_all_kinds_of_headers(tmp_path: Path) -> None:
    """Whose headers are read together, alike and not, and those among them that stand apart."""
    rng = np.random.default_rng(1)
    made: dict[str, np.ndarray] = {}
    for i in range(300):
        made[f"like{i}"] = rng.integers(0, 99, (3, 4), np.int32)
        made[f"shape{i}"] = rng.random((i % 7, 1 + i // 7))
        if i % 10 == 0:
            made[f"fortran{i}"] = np.asfortranarray(rng.random((4, 5)))
            made[f"swapped{i}"] = rng.random(5).astype(">f8")
            made[f"date{i}"] = np.array(["2020-01-01"] * 3, "M8[D]")
            made[f"empty{i}"] = np.zeros((0, i), "f2")
            made[f"scalar{i}"] = np.array(i)
            made[f"long{i}"] = np.zeros(2, [(f"a field {k}", "u1") for k in range(9)])
            made[f"large{i}"] = rng.integers(0, 9, 40_000, np.uint8)
    for savez in (np.savez, np.savez_compressed, holdfast.save):
        path = tmp_path / f"{savez.__name__}.npz"
        if savez is holdfast.save:
            holdfast.save(made, path)
        else:
            savez(path, **made)
        found = holdfast.load(path, framework="numpy")
        assert list(found) == list(made)
        for name, array in made.items():
            assert found[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("="), name
            assert found[name].shape == array.shape and np.array_equal(found[name], array), name
        with holdfast.open(path, framework="numpy") as f:
            assert np.array_equal(f["fortran290"], made["fortran290"])


@pytest.mark.parametrize("at", [0, 17, 199])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (b"\x93NUMPX\x01\x00" + bytes(200), "expected an array of NumPy"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(200), "header: needs 65545 bytes"),
        (b"\x93NUMPY\x07\x00" + bytes(200), r"expected version 1\.0"),
        (member(np.zeros(4))[:-1], "expected 32 bytes of elements"),
        (member(np.zeros(4)).replace(b"'<f8'", b"'<f7'"), "header: dtype"),
        (b"\x93NUM", "expected an array of NumPy"),
    ],
)
def test_the_one_of_many_that_is_wrong_is_named(at: int, wrong: bytes, text: str) -> None:
    records = [
        Record(f"a{i}.npy", wrong if i == at else member(np.full(4, float(i)))) for i in range(200)
    ]
    with pytest.raises(FormatError, match=rf"array 'a{at}': .*{text}|array 'a{at}': {text}"):
        load(build(records))
