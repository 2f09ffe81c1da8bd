"""Pickles of OneFlow that lie: refused, with file, tensor, what was expected and what was found."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import oneflow_states as files
from holdfast.errors import FormatError
from holdfast.formats import _oneflow_pickle_object
from holdfast.formats._oneflow_pickle_scan import Scanner
from holdfast.formats._torch_pickle import read_object
from holdfast.layout import Index
from patience import within
from pickle_files import call, items, name, number, numbers, pairs, text

FLOATS = np.arange(6, dtype="<f4").reshape(2, 3) + 0.5
ELEMENTS = FLOATS.tobytes()


def refused(data: bytes, problem: str) -> None:
    with pytest.raises(FormatError, match=problem) as caught:
        files.index_file(data)
    assert str(caught.value).startswith("x: ")
    assert len(str(caught.value)) < 400


def state(**parts: bytes) -> bytes:
    """A file of one tensor, its state changed."""
    found = {"data": files.of(FLOATS), "dtype": files.dtype(2), "device": text("cpu")}
    return files.saved(pairs({"w": files.tensor(pairs({**found, **parts}))}))


# -- the file around the object ------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 1 << 70])
def test_another_version(version: int) -> None:
    data = files.saved(b"N", version=number(version))
    refused(data, f"expected protocol_version 1, found {version}")


@pytest.mark.parametrize("version", [b"\x88", b"N", text("1"), b"G" + bytes(8)])
def test_a_version_that_is_no_number(version: bytes) -> None:
    refused(files.saved(b"N", version=version), "expected protocol_version 1, found ")


@pytest.mark.parametrize(
    "parts",
    [{"__oneflow__": b"N"}, {"__oneflow__": b"N", "data": b"N"},
     {"__oneflow__": b"N", "protocol_version": b"K\x01"}],
)  # fmt: skip
def test_keys_that_are_missing(parts: dict[str, bytes]) -> None:
    data = files.PROTO + pairs(parts) + b"."
    refused(data, "expected a dict with 'protocol_version' and 'data'.*found a dict")


def test_a_key_with_a_value_is_let_pass() -> None:
    parts = {"protocol_version": b"K\x01", "__oneflow__": text("nightly"), "data": b"N"}
    files.index_file(files.PROTO + pairs(parts) + b".")


@pytest.mark.parametrize("data", [b"N", b"]", b"K\x01", text("data"), files.beside("tensor_0")])
def test_a_folder_whose_pickle_is_no_dict(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pickled_data").write_bytes(files.PROTO + data + b".")
    with pytest.raises(FormatError, match="pickled_data: expected a dict with 'protocol_version'"):
        files.index_folder(tmp_path)


def test_a_folder_with_more_behind_its_pickle(tmp_path: Path) -> None:
    (tmp_path / "pickled_data").write_bytes(files.saved(b"N", magic=None) + b"more")
    with pytest.raises(FormatError, match=r"the pickle ends at \d+, the file at \d+"):
        files.index_folder(tmp_path)


def test_the_pickle_of_a_folder_alone() -> None:
    refused(files.saved(files.beside("tensor_0")), "sub-folder, 'tensor_0'.*'pickled_data' of a f")


# -- the pickle ----------------------------------------------------------------------------------


def test_every_cut_file() -> None:
    data = state()
    assert len(files.index_file(data)) == 1
    first = data.index(b"oneflow") + len(b"oneflow")  # shorter ones are not taken for it
    assert first < 60
    for size in range(first, len(data)):
        with pytest.raises(FormatError):
            files.index_file(data[:size])


def test_errors_say_where_in_the_file() -> None:
    good = files.inside(files.of(np.zeros(1000)), 3)
    data = files.saved(items(good, b"\x95" + bytes(8), b"h\xc8"))
    refused(data, rf"offset {data.index(bytes([0x68, 0xC8]))} \(BINGET\): memo index 200")


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d", b"\x95"])
@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_more_bytes_than_there_are(opcode: bytes, count: int) -> None:
    data = files.saved(items(opcode + count.to_bytes(8, "little")))
    refused(data, f"needs {count} more bytes, [0-9]+ are left")
    if opcode != b"\x95":  # of a stream, too, without asking for the memory; frames count nothing
        with pytest.raises(FormatError):
            files.index_file(data, -1)


@pytest.mark.parametrize(
    "opcodes",
    [b"Q", b"Px\n", b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0", b"\x97", b"\x98", b"Sx\n", b"g0\n",
     b"F1.0\n", b"Vx\n", b"p0\n", b"(ix\ny\n", b"\xff", b"\0"],
)  # fmt: skip
def test_opcodes_that_are_not_known(opcodes: bytes) -> None:
    data = files.saved(b"N" + opcodes)
    at = data.index(b"dataN") + 5 + (opcodes[:1] == b"(")
    refused(data, rf"offset {at}: the opcode 0x[0-9a-f]+ is not one that can be read")


@pytest.mark.parametrize(
    "opcodes", [b"0" * 9, b"t", b"N.", b"b", b"\x81", b"(", b"u", b"\x93", b"R"]
)
def test_stacks_that_do_not_fit(opcodes: bytes) -> None:
    with pytest.raises(FormatError):
        files.index_file(files.saved(b"N" + opcodes))


def test_lines_without_end() -> None:
    refused(files.saved(b"c" + b"x" * 5000 + b"\ny\n"), "a line has no end within 4096 bytes")


def test_too_much_besides_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_oneflow_pickle_object, "MOST", 400)
    refused(files.saved(text("x" * 500)), "a pickle of more than 400 bytes besides those of tens")
    refused(
        files.saved(files.binary(b"x" * 500)), "500 bytes at offset [0-9]+: expected at most 400"
    )
    monkeypatch.setattr(_oneflow_pickle_object, "MOST", 700)
    files.index_file(files.saved(files.inside(files.of(np.zeros(100)), 3)))


def test_windows_of_every_length() -> None:
    data = state() + b"tail"
    whole = Scanner("x", "", len(data), 1 << 20)
    assert whole.feed(data) == 0
    for step in range(1, 40):
        scanner, least = Scanner("x", "", -1, 1 << 20), 1
        while not scanner.done:
            end = scanner.pos + max(step, least)
            assert scanner.pos < len(data)
            least = max(scanner.feed(data[scanner.pos : end]), 1)
        assert scanner.pos == whole.pos == len(data) - 4
        assert scanner.condensed == whole.condensed
        assert scanner.blocks.tolist() == whole.blocks.tolist()


# -- time and memory -----------------------------------------------------------------------------


@pytest.fixture
def quickly() -> Iterator[None]:
    with within(10):
        yield


@pytest.mark.usefixtures("quickly")
def test_a_deep_object() -> None:
    for opener, closer in ((b"]", b"a"), (b"(", b"t"), (b"}K\0", b"s")):
        depth = 200_000
        data = files.saved(opener * depth + b"N" + closer * depth)
        if opener == b"(":
            data = files.saved(b"(" * depth + b"t" * depth)
        assert len(files.index_file(data)) == 0


@pytest.mark.usefixtures("quickly")
def test_a_billion_laughs() -> None:
    laugh = b"N" + b"".join(b"\x94h%c\x86" % i for i in range(200))
    assert len(files.index_file(files.saved(laugh))) == 0


@pytest.mark.usefixtures("quickly")
def test_a_tuple_in_itself_on_very_many_ways() -> None:
    n = 3000
    lists = b"".join(b"]" + b"r" + i.to_bytes(4, "little") for i in range(n))
    add = b"".join(b"j" + i.to_bytes(4, "little") + b"j" + n.to_bytes(4, "little") + b"a0"
                   for i in range(n))  # fmt: skip
    data = files.saved(b"(" + lists + b"tr" + n.to_bytes(4, "little") + add)
    refused(data, "part of itself on too many ways")


@pytest.mark.usefixtures("quickly")
def test_a_long_text_that_stands_everywhere() -> None:
    long = text("x" * 100_000) + b"\x940"
    data = files.saved(b"]" + long + b"(" + b"h\0" * 100_000 + b"e")
    assert len(files.index_file(data)) == 0
    big = b"\x8b" + (1000).to_bytes(4, "little") + b"\x7f" * 1000 + b"\x940"
    assert len(files.index_file(files.saved(b"]" + big + b"(" + b"h\0" * 100_000 + b"e"))) == 0


# -- tensors in the pickle -----------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 23, 25])
def test_elements_of_another_size(nbytes: int) -> None:
    data = files.array((2, 3), "<f4", bytes(nbytes))
    refused(
        state(data=data), rf"tensor 'w': float32 of shape \(2, 3\) needs 24 bytes, found {nbytes}"
    )


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (numbers((-1, 6)), "-1 as an extent"),
        (numbers((1 << 63,)), "9223372036854775808 as an extent"),
        (numbers((1 << 62, 1 << 62)), "too large for any memory"),
        (numbers((1 << 62, 1 << 62, 0)), "too large for any memory"),
        (items(text("6")), "'6' as an extent"),
        (items(b"\x88"), "True as an extent"),
        (numbers([1] * 65), "at most 64 extents"),
        (b"N", "at most 64 extents"),
    ],
)
def test_shapes_that_are_none(shape: bytes, problem: str) -> None:
    data = files.array((), "<f4", ELEMENTS).replace(numbers(()) + name("numpy", "dtype"),
                                                    shape + name("numpy", "dtype"))  # fmt: skip
    refused(state(data=data), f"tensor 'w': .*{problem}")


@pytest.mark.parametrize("descr", ["|O8", "|S4", "<U1", "|V4", "<M8", "<f3", "<i16", "!f4", "<f4,"])
def test_arrays_of_no_numbers(descr: str) -> None:
    refused(
        state(data=files.array((6,), descr, ELEMENTS)), "tensor 'w': an array of .*exp.*numbers"
    )


def test_fields() -> None:
    made = files.numpy_dtype("|V4").replace(b"NNN", b"N" + items(text("a")) + b"N")
    data = files.of(FLOATS).replace(files.numpy_dtype("<f4"), made)
    refused(state(data=data), "an array of fields")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (3, "expected elements of float64, found float32"),
        (6, "expected elements of int64, found float32"),
        (0, "a tensor of kInvalidDataType"),
        (8, "a tensor of kOFRecord"),
        (22, "a tensor of dtype 22"),
        (-1, "a tensor of dtype -1"),
    ],
)
def test_types_that_do_not_fit(code: int, problem: str) -> None:
    refused(state(dtype=files.dtype(code)), f"x: tensor 'w': {problem}")


@pytest.mark.parametrize("dtype", [b"N", number(2), name("oneflow", "float32"), text("kFloat"),
                                   name("mine", "dtype") + b")\x81K\x02b"])  # fmt: skip
def test_types_that_are_none(dtype: bytes) -> None:
    refused(state(dtype=dtype), "tensor 'w': expected a dtype of OneFlow's, found ")


@pytest.mark.parametrize(
    "data",
    [
        b"N", b"]", files.binary(ELEMENTS), call("mine", "array", files.binary(ELEMENTS)),
        call("numpy.core.multiarray", "_reconstruct", name("mine", "ndarray")),
        call("numpy.core.multiarray", "_reconstruct"),
        files.of(FLOATS).replace(files.binary(ELEMENTS), b"]"),
        files.of(FLOATS).replace(files.binary(ELEMENTS), text("x" * 24)),
        files.of(FLOATS).replace(b"(K\x01(", b"(K\x02("),
        files.of(FLOATS).replace(b"\x89" + files.binary(ELEMENTS), b"K\0" + files.binary(ELEMENTS)),
        files.of(FLOATS)[:-1] + b"0",
        files.tensor(b"}"),
    ],
)  # fmt: skip
def test_arrays_that_are_none(data: bytes) -> None:
    refused(state(data=data), "tensor 'w': (expected|an array)")


def test_elements_as_text() -> None:
    """As protocol 2 would have them: they are not in the file as they are."""
    encoded = call("_codecs", "encode", text("x" * 24), text("latin1"))
    data = files.of(FLOATS).replace(files.binary(ELEMENTS), encoded)
    refused(state(data=data), "found text, as pickles before protocol 3 have them")


@pytest.mark.parametrize(
    "state_of",
    [
        b"N",
        b"]",
        b"}",
        pairs({"elements": b"N"}),
        number(3),
        items(pairs({"path": text("a")}), b"N"),
    ],
)
def test_tensors_without_elements(state_of: bytes) -> None:
    refused(files.saved(pairs({"w": files.tensor(state_of)})), "tensor 'w': expected a state with")


def test_tensors_made_otherwise() -> None:
    cls = name("oneflow", "Tensor")
    refused(files.saved(items(cls + b")\x81")), "tensor '0': expected a state with .* found None")
    refused(files.saved(items(cls + items(number(1)) + b"\x81")), "made of arguments")
    refused(files.saved(items(cls + b")\x81" + number(1) + b"a")), "made of arguments or items")
    found = files.index_file(files.saved(items(cls + items(number(1)) + b"R")))
    assert len(found) == 0  # a call, which is refused when it is to be made


def test_tensors_of_torch() -> None:
    place = call("torch.storage", "_load_from_bytes", files.binary(b"x" * 24))
    args = place, number(0), numbers((6,)), numbers((1,)), b"\x89", b"N"
    refused(
        files.saved(call("torch._utils", "_rebuild_tensor_v2", *args)), "a tensor whose storage"
    )
    args = files.binary(b""), *args[1:]
    refused(files.saved(call("torch._utils", "_rebuild_tensor_v2", *args)), "x: ")


# -- tensors beside the pickle -------------------------------------------------------------------


def index_beside(folder: Path, path: bytes) -> Index:
    obj = pairs({"w": files.tensor(pairs({"path": path}))})
    files.pickle_folder(folder / "ckpt", obj, {"tensor_0": FLOATS})
    return files.index_folder(folder / "ckpt")


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../tensor_0", "tensor_0/", "/etc", "a/b", "a\\b", "C:", "C:\\x", "tensor_0\0",
     "\n", "x" * 256, "./tensor_0", "tensor_0/../tensor_0", "\ud800"],
)  # fmt: skip
def test_paths_that_leave_the_folder(tmp_path: Path, path: str) -> None:
    problem = "tensor 'w': expected the name of a sub-folder, found the path"
    with pytest.raises(FormatError, match=problem):
        index_beside(tmp_path, text(path))


@pytest.mark.parametrize("path", [b"N", number(0), files.binary(b"tensor_0"), b"]"])
def test_paths_that_are_none(tmp_path: Path, path: bytes) -> None:
    with pytest.raises(FormatError, match="expected the name of a sub-folder"):
        index_beside(tmp_path, path)


def test_a_sub_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"ckpt/tensor_1: tensor 'w': .* found no 'meta'"):
        index_beside(tmp_path, text("tensor_1"))
    (tmp_path / "ckpt" / "tensor_1").mkdir()
    (tmp_path / "ckpt" / "tensor_1" / "meta").write_bytes(files.meta((6,), "float32"))
    with pytest.raises(FormatError, match=r"ckpt/tensor_1: tensor 'w': .* found no 'out'"):
        files.index_folder(tmp_path / "ckpt")


@pytest.mark.parametrize("nbytes", [0, 12, 48])
def test_out_of_another_size(tmp_path: Path, nbytes: int) -> None:
    assert len(index_beside(tmp_path, text("tensor_0"))) == 1
    (tmp_path / "ckpt/tensor_0/out").write_bytes(bytes(nbytes))
    with pytest.raises(FormatError, match=rf"tensor 'w': .* needs 24 bytes, found {nbytes}"):
        files.index_folder(tmp_path / "ckpt")


def test_bfloat16_beside(tmp_path: Path) -> None:
    index_beside(tmp_path, text("tensor_0"))
    (tmp_path / "ckpt/tensor_0/meta").write_bytes(files.meta((6,), "bfloat16"))
    found = files.index_folder(tmp_path / "ckpt")
    got = files.folder_values(tmp_path / "ckpt", found)
    assert got["w"].tolist() == (FLOATS.reshape(-1).view("<u4") >> 16).tolist()
    (tmp_path / "ckpt/tensor_0/out").write_bytes(bytes(10))
    with pytest.raises(FormatError, match="needs 12 bytes, found 10"):
        files.index_folder(tmp_path / "ckpt")


@pytest.mark.parametrize("what", ["tensor_0", "tensor_0/meta", "tensor_0/out", "pickled_data"])
def test_symbolic_links(tmp_path: Path, what: str) -> None:
    index_beside(tmp_path, text("tensor_0"))
    place = tmp_path / "ckpt" / what
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=f"ckpt/{what}.*symbolic link"):
        files.index_folder(tmp_path / "ckpt")


@pytest.mark.parametrize("what", ["tensor_0/meta", "tensor_0/out", "pickled_data"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, what: str) -> None:
    index_beside(tmp_path, text("tensor_0"))
    (tmp_path / "ckpt" / what).unlink()
    os.mkfifo(tmp_path / "ckpt" / what)
    with pytest.raises(FormatError, match=re.escape(f"ckpt/{what}")):
        files.index_folder(tmp_path / "ckpt")


def test_folders_left_from_earlier_saves_are_not_looked_at(tmp_path: Path) -> None:
    index_beside(tmp_path, text("tensor_0"))
    (tmp_path / "ckpt" / "tensor_9").symlink_to("/")
    (tmp_path / "ckpt" / "tensor_8").mkdir()
    assert files.index_folder(tmp_path / "ckpt").files == ["tensor_0/out", "pickled_data"]


def test_a_huge_meta(tmp_path: Path) -> None:
    index_beside(tmp_path, text("tensor_0"))
    (tmp_path / "ckpt/tensor_0/meta").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(FormatError, match="tensor_0/meta.*at most 1048576 bytes"):
        files.index_folder(tmp_path / "ckpt")


def test_many_large_metas(tmp_path: Path) -> None:
    paths = [f"tensor_{i}" for i in range(40)]
    obj = pairs({path: files.beside(path) for path in paths})
    folder = files.pickle_folder(tmp_path / "ckpt", obj, dict.fromkeys(paths, FLOATS))
    for path in paths:
        with (folder / path / "meta").open("ab") as out:
            out.write(b"#".ljust(1 << 19))
    with pytest.raises(FormatError, match="at most 16941056 bytes in the 'meta' of 40 tensors"):
        files.index_folder(folder)


def test_a_huge_pickle_that_is_mostly_a_hole(tmp_path: Path) -> None:
    index_beside(tmp_path, text("tensor_0"))
    pickle = tmp_path / "ckpt" / "pickled_data"
    end = pickle.stat().st_size
    os.truncate(pickle, 256 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"the pickle ends at {end}, the file at 268435456"):
            files.index_folder(tmp_path / "ckpt")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# -- the machine underneath ----------------------------------------------------------------------


def test_a_storage_that_is_asked_for_again_and_again() -> None:
    """What a persistent id names, kept in the memo and taken out of it."""
    data = b"\x80\x02" + items(number(0) + b"Qq\x00", *[b"h\x00"] * 9) + b"."
    found = read_object(data, name="x", storages={0: (0, 10)}, tensors={})
    asked = []

    def storage(row: int, code: int) -> object:
        asked.append((row, code))
        return "the storage"

    assert found.structure.replay([], storage, None) == ("the storage",) * 10  # type: ignore[arg-type]
    assert asked == [(0, 10)]
