"""Where to and where from: paths, file objects, positions, and files that are not sound."""

from __future__ import annotations

import gzip
import io
import os
import pathlib
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

BOTH = pytest.mark.parametrize("weights_only", [True, False])

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


class Recorder:
    """A file object with no more than these methods; it notes which of them are called."""

    def __init__(self, data: bytes, *methods: str) -> None:
        self.called: set[str] = set()
        self.file = io.BytesIO(data)
        for name in methods:
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Callable[..., Any]:
        if name == "fileno":

            def fileno() -> int:
                raise io.UnsupportedOperation("no file of the system")

            return fileno
        method = getattr(self.file, name)

        def call(*args: Any) -> Any:
            self.called.add(name)
            return method(*args)

        return call


READING = ("read", "readline", "seek", "tell")
WRITING = ("write", "flush")


def saved(impl: Any, obj: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    impl.save(obj, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@BOTH
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_paths(pair: Any, tmp_path: Path, zipped: bool, kind: Any, weights_only: bool) -> None:
    path = kind(tmp_path / "x.pt")
    obj = {"w": torch.randn(20, 30), "step": 3}
    assert pair.save(obj, path, _use_new_zipfile_serialization=zipped) is None
    got = pair.load(path, weights_only=weights_only)
    assert torch.equal(got["w"], obj["w"]) and got["step"] == 3
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("name", ["x.pt", "no extension", "a.b.c", "x.safetensors", "数据 ö.pt"])
def test_names_say_nothing_about_the_content(impl: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "非ASCIIパス"
    folder.mkdir()
    impl.save({"w": torch.ones(3)}, folder / name)
    assert zipfile.is_zipfile(folder / name)
    if name == "x.safetensors" and impl.name == "torch":
        return  # torch itself takes this name for the content and cannot read what it wrote
    assert impl.load(folder / name)["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "root"),
    [("m.pt", "m"), ("a.b.c", "a.b"), ("noext", "noext"), ("sp ace.pt", "sp ace")],
)
def test_root_of_the_archive(impl: Any, tmp_path: Path, name: str, root: str) -> None:
    impl.save({"w": torch.ones(3)}, tmp_path / name)
    names = zipfile.ZipFile(tmp_path / name).namelist()
    assert {entry.split("/")[0] for entry in names} == {root}
    with open(tmp_path / "m", "wb") as file:
        impl.save({"w": torch.ones(3)}, file)
    names = zipfile.ZipFile(tmp_path / "m").namelist()
    assert {entry.split("/")[0] for entry in names} == {"archive"}
    impl.save(1, tmp_path / "ü.pt")
    assert zipfile.ZipFile(tmp_path / "ü.pt").namelist()[0] == "archive/data.pkl"


def test_records_and_their_order(impl: Any, tmp_path: Path) -> None:
    impl.save({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        names = [name.removeprefix("x/") for name in archive.namelist()]
        assert archive.read("x/.format_version") == b"1"
        assert archive.read("x/.storage_alignment") == b"64"
        assert archive.read("x/byteorder") == b"little"
        assert archive.read("x/version") == b"3\n"
        assert archive.testzip() is None
    assert names == [
        "data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0", "data/1",
        "version", ".data/serialization_id",
    ]  # fmt: skip


def test_byteorder_record_can_come_last(impl: Any, tmp_path: Path) -> None:
    """Torch's writer adds the record when it closes, where it was not to be written before."""
    impl.save(torch.ones(3), tmp_path / "x.pt", _disable_byteorder_record=True)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        names = [name.removeprefix("x/") for name in archive.namelist()]
        assert archive.read("x/byteorder") == b"little"
    assert names == [
        "data.pkl", ".format_version", ".storage_alignment", "data/0", "version", "byteorder",
        ".data/serialization_id",
    ]  # fmt: skip
    assert impl.load(tmp_path / "x.pt").tolist() == [1, 1, 1]


@BOTH
def test_file_objects(pair: Any, zipped: bool, weights_only: bool) -> None:
    obj = [torch.randn(5, 5), "text"]
    with tempfile.NamedTemporaryFile() as file:
        pair.save(obj, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        got = pair.load(file, weights_only=weights_only)
    assert torch.equal(got[0], obj[0])
    data = saved(pair, obj, zipped)
    assert torch.equal(pair.load(io.BytesIO(data), weights_only=weights_only)[0], obj[0])


@pytest.mark.parametrize("more", [(), ("readinto",), ("fileno",), ("readinto", "fileno")])
def test_file_objects_with_few_methods(pair: Any, zipped: bool, more: tuple[str, ...]) -> None:
    obj = torch.randn(300, 10)
    target = Recorder(b"", *WRITING)
    pair.save(obj, target, _use_new_zipfile_serialization=zipped)
    assert target.called == set(WRITING)
    origin = Recorder(target.file.getvalue(), *READING, *more)
    assert torch.equal(pair.load(origin), obj)


def test_readinto_is_used_where_it_is_there(impl: Any) -> None:
    origin = Recorder(saved(impl, torch.randn(500, 40)), *READING, "readinto")
    impl.load(origin)
    assert "readinto" in origin.called


def test_large_tensors_through_file_objects(pair: Any, zipped: bool) -> None:
    obj = torch.randn(11 * 2**9 + 1, 2**9)  # 11 MB, and no multiple of any block
    for more in ((), ("readinto",)):
        origin = Recorder(saved(pair, obj, zipped), *READING, *more)
        assert torch.equal(pair.load(origin), obj)


@BOTH
def test_several_objects_in_one_file(pair: Any, tmp_path: Path, weights_only: bool) -> None:
    first, second = torch.randn(5, 5), torch.randn(1024, 512)
    for opened in (partial(open, tmp_path / "x", "w+b"), io.BytesIO, tempfile.NamedTemporaryFile):
        with opened() as file:
            pickle.dump(41, file)
            pair.save(first, file, _use_new_zipfile_serialization=False)
            pickle.dump(43, file)
            pair.save([second, first], file, _use_new_zipfile_serialization=False)
            pair.save({}, file, _use_new_zipfile_serialization=False)
            end = file.tell()
            file.write(b"tail")
            file.seek(0)
            assert pickle.load(file) == 41
            assert torch.equal(pair.load(file, weights_only=weights_only), first)
            assert pickle.load(file) == 43
            got = pair.load(file, weights_only=weights_only)
            assert torch.equal(got[0], second) and torch.equal(got[1], first)
            assert pair.load(file, weights_only=weights_only) == {}
            assert file.tell() == end
            assert file.read() == b"tail"


@pytest.mark.parametrize("header", [b"header", pickle.dumps(41), bytes(4099)])
def test_an_archive_behind_something_else(pair: Any, tmp_path: Path, header: bytes) -> None:
    obj = torch.randn(30, 3)
    for opened in (partial(open, tmp_path / "x", "w+b"), io.BytesIO):
        with opened() as file:
            file.write(header)
            pair.save(obj, file)
            file.seek(len(header))
            assert torch.equal(pair.load(file), obj)


def test_gzip(pair: Any, tmp_path: Path, zipped: bool) -> None:
    obj = torch.randn(40, 5)
    with open(tmp_path / "plain", "wb") as file:
        pickle.dump(41, file)
        pair.save(obj, file, _use_new_zipfile_serialization=zipped)
    with open(tmp_path / "plain", "rb") as plain, gzip.open(tmp_path / "x.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    with gzip.open(tmp_path / "x.gz", "rb") as packed:
        assert pickle.load(packed) == 41
        assert torch.equal(pair.load(packed), obj)
    with gzip.open(tmp_path / "y.gz", "wb") as packed:
        pair.save(obj, packed, _use_new_zipfile_serialization=zipped)
    with gzip.open(tmp_path / "y.gz", "rb") as packed:
        assert torch.equal(pair.load(packed), obj)


def test_data_that_look_like_the_end_of_a_zip(pair: Any) -> None:
    tensor = torch.tensor([*b"PK\x05\x06", *bytes(100)], dtype=torch.uint8)
    data = saved(pair, tensor, zipped=False)
    assert zipfile.is_zipfile(io.BytesIO(data))
    assert torch.equal(pair.load(io.BytesIO(data)), tensor)


def test_records_that_were_never_written(pair: Any, tmp_path: Path) -> None:
    """A record with room and no content, which is written later or not at all."""
    state = torch.nn.Linear(3, 5).state_dict()
    with torch.serialization.skip_data():
        pair.save(state, tmp_path / "x.pt")
    got = pair.load(tmp_path / "x.pt")
    assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in state.items()}
    assert not any(t.any() for t in got.values())


def test_targets_that_are_none(impl: Any) -> None:
    tensor = torch.rand(10)
    for target in (tensor, torch.CharStorage([1, 2]), np.ones((3, 3)), 5, None, b"bytes"):
        with pytest.raises(AttributeError, match="'write' attribute"):
            impl.save("foo", target)
    tensor.write = tensor.flush = "text"
    with pytest.raises(TypeError, match="no callable attribute 'write'"):
        impl.save("foo", tensor)
    tensor.write = tensor.flush = str.__add__
    with pytest.raises(TypeError):
        impl.save("foo", tensor)


def test_errors_of_a_target_come_through(impl: Any, zipped: bool) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "no space")

        def flush(self) -> None:
            pass

    with pytest.raises(OSError, match="no space") as caught:
        impl.save(torch.ones(3), Full(), _use_new_zipfile_serialization=zipped)
    assert caught.value.errno == 28


def test_paths_that_cannot_be_written(impl: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "x.pt", tmp_path):
        with pytest.raises(RuntimeError):
            impl.save(torch.ones(3), path)
    with pytest.raises(FileNotFoundError):
        impl.save(torch.ones(3), tmp_path / "none" / "x.pt", _use_new_zipfile_serialization=False)


def test_ours_raise_what_the_system_said_too(tmp_path: Path) -> None:
    import holdfast.torch

    with pytest.raises(FileNotFoundError) as caught:
        holdfast.torch.save(1, tmp_path / "none" / "x.pt")
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.filename and "none" in str(caught.value)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value) and isinstance(copied, RuntimeError)
    with pytest.raises(IsADirectoryError):
        holdfast.torch.save(1, tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, zipped: bool) -> None:
    import holdfast.torch

    path = tmp_path / "x.pt"
    holdfast.torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        holdfast.torch.save(
            {"w": torch.ones(9), "f": lambda: 1}, path, _use_new_zipfile_serialization=zipped
        )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pt"]


@BOTH
def test_sources_that_cannot_seek(impl: Any, weights_only: bool) -> None:
    words = "You can only torch.load from a file that is seekable.*io.BytesIO and try to load"
    lacking = Recorder(b"data", "read", "readline")
    for source in (lacking, 5, b"bytes"):
        with pytest.raises(AttributeError, match=words):
            impl.load(source, weights_only=weights_only)
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read, "rb") as pipe, pytest.raises((io.UnsupportedOperation, OSError)):
        impl.load(pipe, weights_only=weights_only)


def test_sources_that_are_not_there(impl: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        impl.load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        impl.load(tmp_path)


@BOTH
def test_an_empty_file(impl: Any, tmp_path: Path, weights_only: bool) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(EOFError):
        impl.load(tmp_path / "x", weights_only=weights_only)
    with pytest.raises(EOFError):
        impl.load(io.BytesIO(), weights_only=weights_only)


@BOTH
@pytest.mark.parametrize("cut", [0.3, 0.7, 0.9])
def test_a_file_that_is_cut(
    impl: Any, tmp_path: Path, zipped: bool, weights_only: bool, cut: float
) -> None:
    data = saved(impl, {"w": torch.randn(1000), "v": torch.ones(4)}, zipped)
    path = tmp_path / "x.pt"
    path.write_bytes(data[: int(len(data) * cut)])
    expected: tuple[type[Exception], ...] = (RuntimeError, EOFError, pickle.UnpicklingError)
    if impl.name == "torch":
        expected += (OSError, ValueError)  # it seeks to before the file, where its end is cut
    with pytest.raises(expected):
        impl.load(path, weights_only=weights_only)
    with pytest.raises(expected):
        impl.load(io.BytesIO(path.read_bytes()), weights_only=weights_only)


@BOTH
def test_what_is_no_file_of_torch(impl: Any, weights_only: bool) -> None:
    with pytest.raises(RuntimeError):  # a sound pickle, and no magic number
        impl.load(io.BytesIO(pickle.dumps({"a": 1}, 2)), weights_only=weights_only)
    noise = random.Random(3).randbytes(2000)
    expected = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, IndexError)
    with pytest.raises(expected):
        impl.load(io.BytesIO(noise), weights_only=weights_only)


def test_ours_name_the_file(tmp_path: Path) -> None:
    import holdfast
    import holdfast.torch

    path = tmp_path / "model.pt"
    path.write_bytes(saved(holdfast.torch, torch.ones(30))[:-100])
    with pytest.raises(holdfast.FormatError, match=r"model\.pt") as caught:
        holdfast.torch.load(path)
    assert isinstance(caught.value, RuntimeError | pickle.UnpicklingError)
    path.write_bytes(b"")
    with pytest.raises(holdfast.FormatError, match=r"model\.pt") as caught:
        holdfast.torch.load(path)
    assert isinstance(caught.value, EOFError)


def test_ours_find_damage(tmp_path: Path) -> None:
    import holdfast
    import holdfast.torch

    path = tmp_path / "model.pt"
    holdfast.torch.save({"w": torch.zeros(1000, dtype=torch.int32)}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo("model/data/0").header_offset + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(holdfast.ChecksumError) as caught:
        holdfast.torch.load(path)
    assert isinstance(caught.value, RuntimeError)


def test_unreadable_objects_name_no_file_left_open(impl: Any, tmp_path: Path) -> None:
    impl.save(torch.ones(3), tmp_path / "x.pt")
    before = set(os.listdir("/proc/self/fd"))
    impl.load(tmp_path / "x.pt")
    with pytest.raises((RuntimeError, ValueError)):
        impl.load(tmp_path / "x.pt", weights_only=True, pickle_module=pickle)
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)
