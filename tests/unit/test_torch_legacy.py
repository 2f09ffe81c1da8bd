"""The stream that torch 1.0 to 1.5 wrote: read as it was, and refused where it is not that."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import torch_legacy as form
from holdfast.layout import Index

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
SAMPLES = [
    *(f"{kind}-torch{v}.pt" for v in ("1.0.0", "1.5.1") for kind in
      ("dtypes", "module", "state_dict", "training", "views")),
    "legacy-torch1.9.1.pt",
    "legacy-torch2.13.0.pt",
]  # fmt: skip


def index(data: bytes, size: int | None = None, name: str = "x.pt") -> Index:
    found: Index = form.index(
        files.reader(data, name), len(data) if size is None else size, name, verify=True
    )
    return found


def check_sample(data: bytes, found: Index) -> None:
    """The tensors of ``files.sample``, wherever they stand."""
    values = files.values(data, found)
    assert list(values) == ["weight", "column", "nested.count", "empty", "scalar"]
    floats = files.sample_data()["100"]
    np.testing.assert_array_equal(values["weight"], floats.reshape(2, 3))
    np.testing.assert_array_equal(values["column"], floats[1::3])
    np.testing.assert_array_equal(values["nested.count"], files.sample_data()["94"])
    assert values["empty"].shape == (0, 3)
    assert values["scalar"].shape == () and values["scalar"] == 2.25
    assert found.structure is not None
    assert found.structure.paths()["tied"] == 0


# What real ones are


@pytest.mark.parametrize("size", ["known", "unknown"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_files_of_torch(sample: str, size: str) -> None:
    data = (GOLDEN / sample).read_bytes()
    version = sample.rpartition("-torch")[2].removesuffix(".pt")
    expected = json.loads((GOLDEN / f"expected-torch{version}.json").read_text())[sample]
    assert form.sniff(data[:512], len(data))
    found = index(data, -1 if size == "unknown" else None)
    values = files.values(data, found)
    seen = {name: values[found.names.tolist()[i]] for name, i in found.structure.paths().items()}
    assert len(expected) >= 5 or "views" in sample
    for name, row in expected.items():
        value = np.ascontiguousarray(seen[name])
        assert value.dtype.name == row["dtype"], name
        assert list(seen[name].shape) == row["shape"], name
        assert hashlib.sha256(value.tobytes()).hexdigest() == row["sha256"], name
    assert found.end <= len(data)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [None, -1])
def test_every_protocol(protocol: int, size: int | None) -> None:
    data = files.sample(protocol)
    assert (b"\x95" in data[:20]) == (protocol >= 4)
    assert form.sniff(data[:512], len(data))
    check_sample(data, index(data, size))


def test_frames_hold_the_object() -> None:
    data = files.sample(5)
    assert data.count(b"\x80\x05\x95") >= 2
    check_sample(data, index(data))


def test_columns() -> None:
    data = files.sample()
    found = index(data)
    assert found.names.tolist() == ["weight", "column", "nested.count", "empty", "scalar"]
    assert found.end == len(data)
    assert len(found.storages) == 4
    assert found.storages["nbytes"].sum() == 24 + 32 + 8
    assert not found.storages["packed"].any()
    assert not found.storages["flags"].any()
    assert not found.storages["file"].any()
    assert found.crcs is None and found.tree is None
    assert found.framework == "torch"
    rows = dict(zip(found.locations, found.storages["nbytes"].tolist(), strict=False))
    assert rows["cuda:0"] == 32
    assert bytes(found.structure.data) == files.dump(pickle_of_sample(), 2), (
        "the pickle that a program may run is not the one in the file"
    )


def pickle_of_sample() -> object:
    """The object of :func:`files.sample`, by way of a stream of it alone."""
    caught: list[object] = []

    def stream(obj: object, *args: object, **kwargs: object) -> bytes:
        caught.append(obj)
        return b""

    original, files.stream = files.stream, stream  # type: ignore[assignment]
    try:
        files.sample()
    finally:
        files.stream = original
    return caught[0]


def test_bytes_behind_the_end_are_none_of_ours() -> None:
    data = files.sample()
    found = index(data + b"garbage" * 1000)
    assert found.end == len(data)
    check_sample(data, found)
    two = index(data + files.sample(5))
    assert two.end == len(data)


def test_no_tensor_at_all() -> None:
    data = files.stream({"lr": 0.5}, {})
    found = index(data)
    assert len(found) == 0
    assert found.end == len(data)


def test_one_tensor_without_a_container() -> None:
    data = files.stream(files.tensor(files.storage(), (6,)), {"7": np.arange(6, dtype="<f4")})
    found = index(data)
    assert len(found) == 1
    values = list(files.values(data, found).values())
    np.testing.assert_array_equal(values[0], np.arange(6))


def test_storages_stand_in_the_order_of_their_keys_as_text() -> None:
    obj = {f"t{i}": files.tensor(files.storage(str(i), 1), (1,)) for i in range(12)}
    data = files.stream(obj, {str(i): np.array([i], "<f4") for i in range(12)})
    found = index(data)
    values = files.values(data, found)
    assert [float(values[f"t{i}"][0]) for i in range(12)] == list(range(12))
    order = found.entries["offset"].argsort()
    assert order.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_the_order_of_the_list_counts_whatever_it_is() -> None:
    obj = {key: files.tensor(files.storage(key, 2), (2,)) for key in "abc"}
    arrays = {key: np.full(2, i, "<f4") for i, key in enumerate("abc")}
    tail = b"".join(files.payload(arrays[key]) for key in "cab")
    data = files.stream(obj, arrays, keys=list("cab"), tail=tail)
    for key, value in files.values(data, index(data)).items():
        np.testing.assert_array_equal(value, arrays[key])


@pytest.mark.parametrize("count", [1, 20_000])
def test_small_and_many_storages_take_few_reads(count: int) -> None:
    obj = {f"t{i}": files.tensor(files.storage(str(i), 2), (2,)) for i in range(count)}
    data = files.stream(obj, {str(i): np.array([i, i], "<f4") for i in range(count)})
    log: list[tuple[int, int]] = []
    found = form.index(files.reader(data, log=log), len(data), "x.pt", verify=False)
    assert len(found) == count
    assert len(log) < 40
    assert all(nbytes <= 8 << 20 for _, nbytes in log)


def test_payloads_of_large_storages_are_not_read() -> None:
    obj = {f"t{i}": files.tensor(files.storage(str(i), 1 << 20), (1 << 20,)) for i in range(8)}
    data = files.stream(obj, {str(i): np.full(1 << 20, i, "<f4") for i in range(8)})
    log: list[tuple[int, int]] = []
    found = form.index(files.reader(data, log=log), len(data), "x.pt", verify=False)
    assert sum(nbytes for _, nbytes in log) < 1 << 20
    values = files.values(data, found)
    assert [float(values[f"t{i}"][-1]) for i in range(8)] == list(range(8))


def test_a_long_pickle_is_read_in_windows_that_grow() -> None:
    obj = {"text": "x" * 3_000_000, "t": files.tensor(files.storage(), (6,))}
    data = files.stream(obj, {"7": np.arange(6, dtype="<f4")})
    for size in (len(data), -1):
        found = form.index(files.reader(data), size, "x.pt", verify=False)
        assert found.names.tolist() == ["t"]
        np.testing.assert_array_equal(files.values(data, found)["t"], np.arange(6))


# Byte order


@pytest.mark.parametrize("kind", sorted(files.KINDS))
def test_big_endian_files(kind: str) -> None:
    """Their counts may be big-endian; their data never are."""
    array = np.array([1, 0, 1, 1, 0, 1]).astype(np.dtype(files.KINDS[kind]))
    obj = {"t": files.tensor(files.storage("7", 6, kind), (6,))}
    info = {**files.INFO, "little_endian": False}
    data = files.stream(obj, {"7": array}, info=info, big=True)
    found = index(data)
    assert not found.storages["flags"].any()
    np.testing.assert_array_equal(files.values(data, found)["t"], array)


def test_what_later_releases_wrote_on_big_endian_machines_is_little() -> None:
    array = np.arange(6, dtype="<f4")
    obj = {"t": files.tensor(files.storage(), (6,))}
    found = index(files.stream(obj, {"7": array}, info={**files.INFO, "little_endian": False}))
    assert not found.storages["flags"].any()


@pytest.mark.parametrize("info", [{}, {"little_endian": True}, {"protocol_version": 1001}])
def test_what_does_not_say_big_is_little(info: dict[str, Any]) -> None:
    data = files.sample(info=info)
    found = index(data)
    assert not found.storages["flags"].any()
    check_sample(data, found)


@pytest.mark.parametrize("info", [None, [], "x", {"little_endian": 1}, {"little_endian": None}])
def test_a_system_that_is_none(info: object) -> None:
    with pytest.raises(FormatError, match="x.pt: .*offset"):
        index(files.sample(info=info))


# Views of storages


def test_views_of_a_storage() -> None:
    whole = files.storage("7", 6)
    part = files.storage("7", 6, view=("8", 2, 3))
    rest = files.storage("7", 6, view=("9", 6, 0))
    obj = {
        "whole": files.tensor(whole, (6,)),
        "part": files.tensor(part, (3,)),
        "inner": files.tensor(part, (1,), offset=2),
        "again": files.tensor(files.storage("7", 6, view=("8", 2, 3)), (2,), offset=1),
        "rest": files.tensor(rest, (0,)),
    }
    data = files.stream(obj, {"7": np.arange(6, dtype="<f4")})
    values = files.values(data, index(data))
    expected = {"whole": [0, 1, 2, 3, 4, 5], "part": [2, 3, 4], "inner": [4], "again": [3, 4]}
    assert {k: v.tolist() for k, v in values.items()} == {**expected, "rest": []}


@pytest.mark.parametrize(
    "view",
    [
        ("8", 2, 5),
        ("8", -1, 2),
        ("8", 2, -1),
        ("8", 1 << 62, 1 << 62),
        ("8", 1 << 70, 1),
        ("8", 7, 0),
        ("8", 2.0, 1),
        ("8", 2),
        ("8", 2, 3, 4),
        ("8",),
        (),
        "823",
        7,
        (8, None, 3),
        [("8", 2, 3)],
    ],
)
def test_views_that_are_none(view: object) -> None:
    obj = {"t": files.tensor(files.storage("7", 6, view=view), (1,))}
    with pytest.raises(FormatError, match="^x.pt: "):
        index(files.stream(obj, {"7": np.arange(6, dtype="<f4")}))


def test_a_tensor_may_not_leave_the_view_that_it_names() -> None:
    part = files.storage("7", 6, view=("8", 2, 3))
    for size, offset in [((4,), 0), ((3,), 1), ((1,), 3)]:
        obj = {"t": files.tensor(part, size, offset=offset)}
        with pytest.raises(FormatError, match="^x.pt: .*'?t'?"):
            index(files.stream(obj, {"7": np.arange(6, dtype="<f4")}))


def test_one_view_key_for_two_parts() -> None:
    obj = [
        files.tensor(files.storage("7", 6, view=("8", 0, 3)), (3,)),
        files.tensor(files.storage("7", 6, view=("8", 3, 3)), (3,)),
    ]
    with pytest.raises(FormatError, match="^x.pt: .*8"):
        index(files.stream(obj, {"7": np.arange(6, dtype="<f4")}))


# The tail


def refused(match: str, **kwargs: Any) -> None:
    data = files.sample(**kwargs)
    for size in (len(data), -1):
        with pytest.raises(FormatError, match=match):
            index(data, size)


KEYS = ["100", "12", "13", "94"]


def test_a_key_that_the_object_does_not_name() -> None:
    refused("x.pt: .*storage '95'.* no tensor|unknown.*'95'|'95'", keys=["100", "12", "13", "95"])
    refused("'95'", keys=[*KEYS, "95"])


def test_a_key_twice() -> None:
    refused("'94'.*twice", keys=[*KEYS, "94"])


def test_a_key_that_is_missing() -> None:
    refused("'94'", keys=KEYS[:3])
    refused("4 storages|'100'", keys=[])


@pytest.mark.parametrize("keys", [None, "100", {}, 7, ("100", "12", "13", "94"), [100, 12, 13, 94],
                                  ["100", "12", "13", ["94"]], {"100": 1}])  # fmt: skip
def test_keys_that_are_no_list_of_text(keys: object) -> None:
    data = files.stream(None, {}, keys=keys if keys is not None else 0)
    with pytest.raises(FormatError, match="x.pt: .*offset"):
        index(data)
    if keys:
        refused("x.pt: ", keys=keys)


@pytest.mark.parametrize("numel", [5, 7, 0, -1, 24, 1 << 62, -(1 << 63)])
def test_another_count_than_the_pickle_says(numel: int) -> None:
    obj = {"t": files.tensor(files.storage(), (6,))}
    array = np.arange(6, dtype="<f4")
    data = files.stream(obj, {}, keys=["7"], tail=files.payload(array, numel) + bytes(1000))
    where = len(data) - 1000 - 32
    with pytest.raises(
        FormatError, match=f"^x.pt: storage '7': .*offset {where}.*expected 6.*found {numel}"
    ):
        index(data)


def test_a_count_in_the_other_byte_order() -> None:
    obj = {"t": files.tensor(files.storage(), (6,))}
    tail = struct.pack(">q", 6) + np.arange(6, dtype=">f4").tobytes()
    with pytest.raises(FormatError, match="storage '7'.*expected 6"):
        index(files.stream(obj, {}, keys=["7"], tail=tail))
    mixed = files.payload(np.zeros(6, "<f4")) + tail
    obj = {"t": files.tensor(files.storage(), (6,)), "u": files.tensor(files.storage("8"), (6,))}
    info = {**files.INFO, "little_endian": False}
    with pytest.raises(FormatError, match="storage '8'.*expected 6"):
        index(files.stream(obj, {}, keys=["7", "8"], tail=mixed, info=info))


def test_the_second_of_two_counts() -> None:
    obj = [files.tensor(files.storage(key, 2), (2,)) for key in "ab"]
    array = np.zeros(2, "<f4")
    tail = files.payload(array) + files.payload(array, 3)
    with pytest.raises(FormatError, match="storage 'b'.*expected 2.*found 3"):
        index(files.stream(obj, {}, keys=["a", "b"], tail=tail))


@pytest.mark.parametrize("size", ["known", "unknown"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_cut_anywhere(protocol: int, size: str) -> None:
    data = files.sample(protocol)
    for length in range(len(data)):
        with pytest.raises(FormatError, match="^x.pt: ") as caught:
            index(data[:length], -1 if size == "unknown" else None)
        assert "offset" in str(caught.value)


def test_sizes_that_overflow_when_added() -> None:
    obj = [files.tensor(files.storage(str(i), (1 << 60) - 1), (1,)) for i in range(9)]
    tail = struct.pack("<q", (1 << 60) - 1) + bytes(100)
    with pytest.raises(FormatError, match="^x.pt: .*storage '0'.*ends at"):
        index(files.stream(obj, {}, keys=[str(i) for i in range(9)], tail=tail))


# The head


@pytest.mark.parametrize("magic", [files.MAGIC + 1, 0, "x", None, -files.MAGIC, [files.MAGIC]])
def test_another_magic(magic: object) -> None:
    with pytest.raises(FormatError, match="x.pt: .*offset 0"):
        index(files.sample(magic=magic))


@pytest.mark.parametrize("version", [1000, 1002, 0, "1001", None, 1001.0, True])
def test_another_version(version: object) -> None:
    with pytest.raises(FormatError, match=r"x.pt: .*offset 15.*1001"):
        index(files.sample(version=version))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_pickle_alone_is_not_this(protocol: int) -> None:
    for obj in ({"a": 1}, files.MAGIC - 1, [files.MAGIC], "text"):
        assert not form.sniff(files.dump(obj, protocol), -1)
    assert form.sniff(files.dump(files.MAGIC, protocol), -1)


def test_sniff_needs_the_whole_magic() -> None:
    for protocol in range(1, 6):
        magic = files.dump(files.MAGIC, protocol)
        for length in range(len(magic)):
            assert not form.sniff(magic[:length], -1)
    assert not form.sniff(b"", 0)
    assert not form.sniff(b"PK\x03\x04" + bytes(508), 512)
    assert not form.sniff(bytes(512), 512)
