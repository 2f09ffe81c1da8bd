"""The tar that torch before 0.2 wrote: read as it was, and refused where it is not that."""

from __future__ import annotations

import struct
import tarfile
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import torch_tar as form
from holdfast.layout import Index

FLOATS = np.arange(6, dtype="<f4") + 0.5
LONGS = np.arange(4, dtype="<i8") * 1000


def index(data: bytes, size: int | None = None) -> Index:
    return form.index(
        files.reader(data, "x.tar"), len(data) if size is None else size, "x.tar", verify=True
    )


def check_sample(data: bytes, found: Index) -> None:
    """The tensors of ``files.tar_members``, wherever they stand."""
    values = files.values(data, found)
    assert found.structure is not None
    paths = dict(found.structure.paths())
    assert paths == {"weight": 0, "part": 1, "nested.longs": 2, "scalar": 3, "tied": 0}
    assert list(values) == ["weight", "part", "nested.longs", "scalar"]
    np.testing.assert_array_equal(values["weight"], FLOATS.reshape(2, 3))
    np.testing.assert_array_equal(values["part"], FLOATS[2:4])
    np.testing.assert_array_equal(values["nested.longs"], LONGS.reshape(2, 2).T)
    assert values["scalar"].shape == () and values["scalar"] == 5.5


def with_member(name: str, data: bytes) -> bytes:
    return files.tar({**files.tar_members(), name: data})


def refused(data: bytes, match: str) -> None:
    for size in (len(data), -1):
        with pytest.raises(FormatError, match=match) as caught:
            index(data, size)
        assert str(caught.value).startswith("x.tar: ")


# What they are


@pytest.mark.parametrize("size", [None, -1])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol(protocol: int, size: int | None) -> None:
    data = files.tar(files.tar_members(protocol))
    assert form.sniff(data[:512], len(data))
    found = index(data, size)
    check_sample(data, found)
    assert found.framework == "torch"
    assert found.end <= len(data)


@pytest.mark.parametrize(
    "order", [("pickle", "tensors", "storages"), ("tensors", "storages", "pickle")]
)
def test_members_in_any_order(order: tuple[str, ...]) -> None:
    members = files.tar_members()
    data = files.tar([(name, members[name]) for name in order])
    check_sample(data, index(data))


def test_pax_headers_and_other_members() -> None:
    heads = []
    for name, data in {**files.tar_members(), "readme": b"x" * 1000}.items():
        head = tarfile.TarInfo(name)
        head.mtime = 1480000000.25  # type: ignore[assignment]
        heads.append((head, data))
    data = files.tar(heads, format=tarfile.PAX_FORMAT)
    assert b"mtime=1480000000.25" in data
    assert form.sniff(data[:512], len(data))
    check_sample(data, index(data))


def test_locations() -> None:
    found = index(files.tar(files.tar_members()))
    assert found.locations is not None and found.storages is not None
    assert found.storage is not None
    assert [found.locations[row] for row in found.storage] == ["cpu", "cpu", "cuda:0", "cpu"]
    assert found.storages["nbytes"][found.storage].tolist() == [24, 24, 32, 24]


def test_classes_with_their_source_stay_names() -> None:
    net = files.Persistent((files.Named("net", "Net"), "net.py", "class Net:\n    pass\n"))
    obj = OrderedDict(cls=net, w=files.Persistent(2001))
    data = with_member("pickle", files.dump(obj))
    found = index(data)
    values = files.values(data, found)
    np.testing.assert_array_equal(values["w"], FLOATS.reshape(2, 3))


def test_storages_of_the_gpu_and_every_kind() -> None:
    classes = ("Double", "Float", "Half", "Long", "Int", "Short", "Char", "Byte")
    kinds = [f"{name}Storage" for name in classes]
    rows: list[Any] = []
    tensors: list[Any] = []
    for i, kind in enumerate(kinds):
        rows.append((i, "cuda:1", kind, np.arange(5).astype("<" + files.KINDS[kind])))
        tensors.append((100 + i, i, (5,), (1,), 0))
    storages = files.tar_storages(rows).replace(b"ctorch\n", b"ctorch.cuda\n")
    obj = OrderedDict((kind, files.Persistent(100 + i)) for i, kind in enumerate(kinds))
    data = files.tar(
        {"storages": storages, "tensors": files.tar_tensors(tensors), "pickle": files.dump(obj)}
    )
    values = files.values(data, index(data))
    for kind in kinds:
        np.testing.assert_array_equal(values[kind], np.arange(5))
        assert values[kind].dtype == np.dtype(files.KINDS[kind])


def test_nothing_at_all() -> None:
    data = files.tar(
        {
            "storages": files.tar_storages([]),
            "tensors": files.tar_tensors([]),
            "pickle": files.dump({"lr": 0.5}),
        }
    )
    assert len(index(data)) == 0


def test_empty_tensors() -> None:
    rows: list[Any] = [(1, "cpu", "FloatStorage", FLOATS[:0])]
    tensors: list[Any] = [(2, 1, (0,), (1,), 0), (3, 1, (), (), 0), (4, 1, (3, 0), (1, 1), 77)]
    obj = {"a": files.Persistent(2), "c": files.Persistent(4)}
    members = {"storages": files.tar_storages(rows), "pickle": files.dump(obj)}
    members["tensors"] = files.tar_tensors([tensors[0], tensors[2]])
    data = files.tar(members)
    values = files.values(data, index(data))
    assert values["a"].shape == (0,) and values["c"].shape == (3, 0)
    members["tensors"] = files.tar_tensors(tensors)
    refused(files.tar(members), r"tensor 3 at offset .*end at element 0, its storage has 0")


def test_views_of_views() -> None:
    rows: list[Any] = [(1, "cpu", "FloatStorage", FLOATS)]
    storages = files.tar_storages(rows, [(2, 1, 1, 4), (3, 2, 1, 2), (4, 1, 6, 0)])
    tensors = files.tar_tensors([(9, 3, (2,), (1,), 0), (8, 2, (2,), (2,), 1)])
    obj = OrderedDict(inner=files.Persistent(9), outer=files.Persistent(8))
    data = files.tar({"storages": storages, "tensors": tensors, "pickle": files.dump(obj)})
    values = files.values(data, index(data))
    np.testing.assert_array_equal(values["inner"], FLOATS[2:4])
    np.testing.assert_array_equal(values["outer"], FLOATS[[2, 4]])


def test_storages_that_are_no_tensors() -> None:
    obj = {"s": files.Persistent(1001), "v": files.Persistent(1003), "w": files.Persistent(2001)}
    data = with_member("pickle", files.dump(obj))
    found = index(data)
    # Those that the object does not have are entries all the same.
    assert list(found.structure.paths()) == ["w", "#1", "#2", "#3"]  # type: ignore[union-attr]
    assert found.structure.outline(lambda entry: entry)["w"] == 0  # type: ignore[union-attr,index]


def test_many_tensors_take_few_reads() -> None:
    count = 5000
    rows: list[Any] = [(i, "cpu", "FloatStorage", FLOATS) for i in range(count)]
    tensors: list[Any] = [(count + i, i, (6,), (1,), 0) for i in range(count)]
    obj = {f"t{i}": files.Persistent(count + i) for i in range(count)}
    data = files.tar(
        {
            "storages": files.tar_storages(rows),
            "tensors": files.tar_tensors(tensors),
            "pickle": files.dump(obj),
        }
    )
    log: list[tuple[int, int]] = []
    found = form.index(files.reader(data, log=log), len(data), "x", verify=False)
    assert len(found) == count
    assert len(log) < 400
    assert sum(nbytes for _, nbytes in log) < 2 * len(data)


def test_payloads_are_not_read() -> None:
    big = np.arange(1 << 20, dtype="<f4")
    rows: list[Any] = [(i, "cpu", "FloatStorage", big) for i in range(4)]
    tensors: list[Any] = [(10 + i, i, (1 << 20,), (1,), 0) for i in range(4)]
    obj = {f"t{i}": files.Persistent(10 + i) for i in range(4)}
    data = files.tar(
        {
            "storages": files.tar_storages(rows),
            "tensors": files.tar_tensors(tensors),
            "pickle": files.dump(obj),
        }
    )
    log: list[tuple[int, int]] = []
    found = form.index(files.reader(data, log=log), len(data), "x", verify=False)
    assert len(found) == 4
    assert sum(nbytes for _, nbytes in log) < 100_000


# What they are not


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_member_is_missing(member: str) -> None:
    members = files.tar_members()
    members[f"./{member}"] = members.pop(member)
    refused(files.tar(members), f"a tar, but not one of torch.save: it has no member '{member}'")


def test_an_empty_tar() -> None:
    refused(files.tar({}), "no member 'storages'")
    assert not form.sniff(files.tar({})[:512], -1)
    assert not form.sniff(b"", 0)


@pytest.mark.parametrize("size", ["known", "unknown"])
def test_cut_anywhere(size: str) -> None:
    members = files.tar_members()
    data = files.tar(members)
    end = index(data).end
    assert data[:end].endswith(members["pickle"])
    for length in range(end):
        with pytest.raises(FormatError, match=r"^x\.tar: "):
            index(data[:length], -1 if size == "unknown" else None)
    assert len(index(data[:end])) == 4


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_members_cut_anywhere(member: str) -> None:
    whole = files.tar_members()[member]
    for length in range(len(whole)):
        data = with_member(member, whole[:length])
        with pytest.raises(FormatError, match=r"^x\.tar: .*offset"):
            index(data)


@pytest.mark.parametrize("count", [-1, 3, 1 << 62, 1 << 80, 2.0, "2", True, [2]])
@pytest.mark.parametrize("member", ["storages", "tensors"])
def test_counts_that_are_wrong(member: str, count: object) -> None:
    rows: list[Any] = [(1, "cpu", "FloatStorage", FLOATS)]
    storages = files.tar_storages(rows, count=count if member == "storages" else None)
    tensors = files.tar_tensors(
        [(2, 1, (6,), (1,), 0)], count=count if member == "tensors" else None
    )
    members = {"storages": storages, "tensors": tensors, "pickle": files.dump(None)}
    refused(files.tar(members), r"^x\.tar: .*offset")


def storages(*heads: object, numel: int = 6, views: object = ()) -> bytes:
    """A file whose table of storages has these rows."""
    parts = [files.dump(len(heads))]
    for head in heads:
        parts.append(files.dump(head) + files.payload(FLOATS, numel))
    member = b"".join(parts) + files.dump(views if views != () else [])
    return files.tar(
        {"storages": member, "tensors": files.tar_tensors([]), "pickle": files.dump(None)}
    )


FLOAT = files.Named("torch", "FloatStorage")


@pytest.mark.parametrize(
    "head",
    [
        (),
        (1, "cpu"),
        (1, "cpu", FLOAT, None),
        ("1", "cpu", FLOAT),
        (True, "cpu", FLOAT),
        (1, 2, FLOAT),
        (1, "cpu", "FloatStorage"),
        (1, "cpu", files.Named("os", "system")),
        (1, "cpu", files.Named("torch", "FloatTensor")),
        (1, "cpu", files.Named("torch", "NoStorage")),
        (1, "cpu", files.Named("evil", "FloatStorage")),
        {1: 2},
        7,
        files.Persistent(7),
        files.Call(files.Named("os", "system"), "true"),
    ],
    ids=repr,
)
def test_storages_that_are_none(head: object) -> None:
    refused(storages(head), r"^x\.tar: .*offset")


def test_storages_of_one_key() -> None:
    head = (1, "cpu", FLOAT)
    assert len(index(storages(head))) == 0
    refused(storages(head, head), "storage 1 at offset .*found a second one")


@pytest.mark.parametrize("numel", [-1, -(1 << 63), (1 << 63) - 1, 1 << 61, 1 << 40])
def test_storages_of_a_wrong_length(numel: int) -> None:
    match = "expected none or more, found -" if numel < 0 else "needs .* member 'storages' ends at"
    refused(storages((1, "cpu", FLOAT), numel=numel), match)


@pytest.mark.parametrize(
    "views",
    [
        None,
        {},
        7,
        [7],
        [(2, 1, 0)],
        [(2, 1, 0, 1, 1)],
        [("2", 1, 0, 1)],
        [(2, 1, 0.0, 1)],
        [(2, 1, True, 1)],
        [(1, 1, 0, 1)],
        [(2, 3, 0, 1)],
        [(2, 2, 0, 1)],
        [(2, 1, 0, 7)],
        [(2, 1, 6, 1)],
        [(2, 1, -1, 1)],
        [(2, 1, 1, -1)],
        [(2, 1, 7, 0)],
        [(2, 1, 1 << 70, 0)],
        [(2, 1, 0, 1 << 70)],
        [(2, 1, 0, 1), (2, 1, 0, 1)],
        [(2, 1, 0, 2), (3, 2, 1, 2)],
    ],
    ids=repr,
)
def test_views_that_are_none(views: object) -> None:
    refused(storages((1, "cpu", FLOAT), views=views), r"^x\.tar: view.*offset")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2,), (6,), 0),
        ((), (), 6),
        ((1,), (1,), -1),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((1,), (1,), (1 << 63) - 1),
        (((1 << 63) - 1,) * 8, (0,) * 8, 0),
        (((1 << 61),), (0,), 0),
        ((0, 1), (1, (1 << 63) - 1), 0),
    ],
)
def test_tensors_that_leave_their_storage(size: Any, stride: Any, offset: int) -> None:
    data = with_member("tensors", files.tar_tensors([(2001, 1001, size, stride, offset)]))
    refused(data, r"^x\.tar: tensor 2001 at offset ")


def test_expanded_tensors() -> None:
    members = files.tar_members()
    members["tensors"] = files.tar_tensors([(2001, 1001, (4, 3), (0, 1), 1)])
    members["pickle"] = files.dump({"t": files.Persistent(2001)})
    data = files.tar(members)
    values = files.values(data, index(data))
    np.testing.assert_array_equal(values["t"], np.broadcast_to(FLOATS[1:4], (4, 3)))


@pytest.mark.parametrize("ndim", [-1, 65, 1 << 30, -(1 << 31), (1 << 31) - 1])
def test_numbers_of_dimensions(ndim: int) -> None:
    row = files.dump((2001, 1001, files.Named("torch", "FloatTensor")))
    member = files.dump(1) + row + struct.pack("<ii", ndim, 0) + bytes(5000)
    refused(with_member("tensors", member), f"tensor 2001 .*0 to 64 dimensions, found {ndim}")


@pytest.mark.parametrize(
    "head",
    [
        (2001, 1001),
        (2001, 1001, "FloatTensor"),
        (2001, 9999, FLOAT),
        (2001, "1001", FLOAT),
        ("2001", 1001, FLOAT),
        (2001, None, FLOAT),
        (1001, 1001, FLOAT),
        (2001, 2001, FLOAT),
        [2001],
        None,
    ],
    ids=repr,
)
def test_tensors_that_are_none(head: object) -> None:
    member = files.dump(1) + files.dump(head) + struct.pack("<iiqqq", 1, 0, 6, 1, 0)
    refused(with_member("tensors", member), r"^x\.tar: .*offset")


def test_tensors_of_one_key() -> None:
    row = (2001, 1001, (6,), (1,), 0)
    refused(with_member("tensors", files.tar_tensors([row, row])), "tensor 2001 .*a second one")


@pytest.mark.parametrize(
    "pid",
    [9999, -1, 1 << 80, None, "x", (), (1, 2), (files.Named("a", "b"),), 2001.0, [2001], True],
    ids=repr,
)
def test_persistent_ids_that_are_refused(pid: object) -> None:
    if pid is None:
        return
    refused(with_member("pickle", files.dump({"t": files.Persistent(pid)})), r"^x\.tar: ")


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
@pytest.mark.parametrize(
    "bomb",
    [
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02" + b"(" * 1000 + b".",
        b"",
    ],
    ids=lambda text: text[:6].hex(),
)
def test_no_pickle_runs_anything(member: str, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr("os.system", lambda *args: ran.append(args))
    data = with_member(member, bomb)
    if member == "pickle" and bomb[:1] == b"c":  # a record of the name and nothing else
        assert list(index(data).structure.globals)  # type: ignore[union-attr]
    else:
        refused(data, r"^x\.tar: ")
    assert not ran
