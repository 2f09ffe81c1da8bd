"""Archives of TorchScript and torch.export, read without torch: names, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import program_files as files
from holdfast.formats import _zip, pt2, torchscript
from holdfast.formats._records import NameList, Records
from holdfast.formats._script_pickle import rename_storages

EXPECTED = files.expected()
_STORAGE = b"X\x07\x00\x00\x00storage"


def _archive(records: dict[str, bytes], root: str = "m/") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, payload in records.items():
            archive.writestr(zipfile.ZipInfo(root + name), payload)
    return data.getvalue()


def _records(data: bytes) -> Records:
    def read(offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= len(data)
        return data[offset : offset + nbytes]

    return Records(read, "m.pt", _zip.scan(read, len(data), "m.pt"))


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _module(cls: str, state: bytes) -> bytes:
    module, _, name = cls.rpartition(".")
    return f"c{module}\n{name}\n".encode() + b")\x81}(" + state + b"ub"


def _tensor(key: str, numel: int) -> bytes:
    """A float32 vector that is all of a storage."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + _STORAGE
        + b"ctorch\nFloatStorage\n"
        + _text(key)
        + _text("cpu")
        + b"K"
        + bytes([numel])
        + b"tQK\x00(K"
        + bytes([numel])
        + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtR"
    )


def _script(state: bytes, code: str = "", **more: bytes) -> bytes:
    """A TorchScript archive whose module has these attributes."""
    records = {
        "data.pkl": b"\x80\x02" + _module("__torch__.M", state) + b".",
        "constants.pkl": b"\x80\x02).",
        "code/__torch__.py": code.encode(),
        "version": b"3\n",
    }
    return _archive(records | {name.replace("__", "/"): data for name, data in more.items()})


@pytest.mark.parametrize("path", files.PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("mmap", [True, False])
def test_every_era_without_torch(path: Path, mmap: bool) -> None:
    state = EXPECTED[path.name]["state"]
    found = holdfast.load(path, framework="numpy", mmap=mmap)
    assert set(found) == set(state) and len(found) >= 10
    for name, array in found.items():
        want = state[name]
        assert files.digest(array) == (want["dtype"], want["shape"], want["sha256"])


def test_names_are_those_of_the_state_dict() -> None:
    code = """class M(Module):
  __parameters__ = ["w", "odd\\"name", ]
  __buffers__ = ["b", ]
  plain : Tensor
  def forward(self: __torch__.M) -> Tensor:
    return self.w
class Plain(object):
  w : Tensor
"""
    child = _module("__torch__.M", _text("w") + _tensor("1", 2) + _text("b") + _tensor("2", 3))
    state = (
        _text("b") + _tensor("0", 1) + _text("plain") + _tensor("1", 2)
        + _text("child") + child + _text("w") + _tensor("1", 2)
        + _text('odd"name') + _tensor("2", 3)
        + _text("training") + b"\x88" + _text("nothing") + b"N"
        + _text("object") + _module("__torch__.Plain", _text("w") + _tensor("0", 1))
        + _text("list") + b"](" + _tensor("0", 1) + b"e"
    )  # fmt: skip
    data = _script(state, code, data__0=b"\0" * 4, data__1=b"\1" * 8, data__2=b"\2" * 12)
    found = holdfast.load(io.BytesIO(data), framework="numpy")
    assert list(found) == ["w", 'odd"name', "b", "child.w", "child.b"]
    assert found["child.w"].tobytes() == b"\1" * 8
    assert np.shares_memory(found["child.w"], found["w"])


def test_without_lists_every_tensor_of_a_module_is_shown() -> None:
    state = _text("x") + _tensor("0", 1) + _text("training") + b"\x89"
    for code in ("", "class M(Module):\n  __parameters__ = []\n  x : Tensor\n"):
        data = _script(state, code, data__0=b"\0" * 4)
        assert list(holdfast.load(io.BytesIO(data), framework="numpy")) == ["x"]


@pytest.mark.parametrize(
    ("state", "payload", "message"),
    [
        (_text("x") + _tensor("0", 1), b"\0" * 8, "expected 4 bytes"),
        (_text("x") + _tensor("9", 1), b"\0" * 4, "data/9"),
        (_text("x") + _tensor("../0", 1), b"\0" * 4, "'../0'"),
        (_text("x") + b"cos\nsystem\n(X\x04\x00\x00\x00true" + b"tR", b"", None),
        (
            _text("x.y")
            + _tensor("0", 1)
            + _text("x")
            + _module("__torch__.M", _text("y") + _tensor("0", 1)),
            b"\0" * 4,
            "one name",
        ),
    ],
)
def test_refused_trees(state: bytes, payload: bytes, message: str | None) -> None:
    data = io.BytesIO(_script(state, data__0=payload))
    if message is None:  # what no tensor hangs on is not looked at, and never called
        assert holdfast.load(data, framework="numpy") == {}
        return
    with pytest.raises(holdfast.FormatError, match=re.escape(message)):
        holdfast.load(data, framework="numpy")


def test_a_module_in_itself_and_too_many() -> None:
    loop = b"\x80\x02c__torch__\nM\n)\x81q\x00}(" + _text("me") + b"h\x00ub."
    with pytest.raises(holdfast.FormatError, match="contains itself"):
        holdfast.load(io.BytesIO(_archive({"data.pkl": loop, "constants.pkl": b"\x80\x02)."})))
    # 40 modules, each twice in the next: 2**40 places.
    inner = _module("__torch__.M", b"") + b"q\x00"
    pickled = inner
    for level in range(1, 41):
        twice = _text("a") + pickled + _text("b") + b"h" + bytes([level - 1])
        pickled = _module("__torch__.M", twice) + b"q" + bytes([level])
    data = _archive({"data.pkl": b"\x80\x02" + pickled + b".", "constants.pkl": b"\x80\x02)."})
    with pytest.raises(holdfast.FormatError, match="too many"):
        holdfast.load(io.BytesIO(data))


# -- renaming ------------------------------------------------------------------------------------


class _Named(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        return f"{module}.{name}"


def _unpickled(data: bytes) -> Any:
    pickletools.dis(data, io.StringIO())
    return _Named(io.BytesIO(data)).load()


def _pid(key: bytes, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + _STORAGE + kind + key + _text("cpu") + b"K\x01tQ"


def test_keys_are_renamed_and_nothing_else() -> None:
    # The key "0" is taken from the memo where a string put it, and put there for a string to get.
    first = _text("0") + b"q\x01"
    data = (
        b"\x80\x02(" + first + _pid(b"h\x01") + _pid(_text("1") + b"q\x02") + b"h\x02"
        + _pid(_text("2"), b"ctorch\nLongStorage\nq\x03") + _pid(b"h\x02", b"h\x03") + b"h\x01"
        + b"J\x01\x00\x00\x00\x8a\x02\x01\x01G" + struct.pack(">d", 0.5) + b"]N\x88t."
    )  # fmt: skip
    before, after = _unpickled(data), _unpickled(rename_storages(data, "c.", "x.pt"))
    assert len(before) == len(after) == 13
    changed = [
        (a[2], b[2]) if isinstance(a, tuple) else None for a, b in zip(before, after, strict=True)
    ]
    assert [pair for pair in changed if pair] == [("0", "c.0"), ("1", "c.1"), ("2", "c.2"), ("1", "c.1")]  # fmt: skip # noqa: E501
    for a, b in zip(before, after, strict=True):
        assert a == b or (a[:2] + a[3:] == b[:2] + b[3:] and a[0] == "storage")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02(" + _STORAGE + b"tQ.",
        b"\x80\x02" + _text("x") + b"Q.",
        b"\x80\x02(" + _STORAGE + b"NNNNtQ.",
        b"\x80\x02\x8c\x01x.",
        b"\x80\x02" + _text("a") + b"q\x00" + _text("b") + b"q\x000.",
    ],
)
def test_pickles_that_torchscript_does_not_write(data: bytes) -> None:
    with pytest.raises(holdfast.FormatError, match=r"x\.pt: pickle of a TorchScript"):
        rename_storages(data, "c.", "x.pt")


def test_slim_tells_keys_of_both_pickles_apart() -> None:
    constants = b"\x80\x02" + _tensor("0", 1) + _tensor("1", 1) + b"\x86."
    for keys, prefix in ((("0",), "constant."), (("5",), "")):
        state = b"".join(_text(f"x{key}") + _tensor(key, 1) for key in keys)
        records = {
            "data.pkl": b"\x80\x02" + _module("__torch__.M", state) + b".",
            "constants.pkl": constants,
            "version": b"3\n",
            "constants/0": b"aaaa",
            "constants/1": b"bbbb",
            "bytecode.pkl": b"",
            "extra/x": b"",
        } | {f"data/{key}": b"cccc" for key in keys}
        found = _records(_archive(records))
        slim = torchscript.slim(found)
        assert set(slim.records) == {"data.pkl", "constants.pkl", "version"}
        where = {key: found.directory.names[row] for key, row in slim.storages.items()}
        assert where == {key: f"m/data/{key}" for key in keys} | {
            f"{prefix}{key}": f"m/constants/{key}" for key in "01"
        }
        pickled = slim.records["constants.pkl"]
        texts = [arg for op, arg, _ in pickletools.genops(pickled) if op.name == "BINUNICODE"]
        assert {f"{prefix}0", f"{prefix}1"} <= set(texts)


# -- exported programs ---------------------------------------------------------------------------


def _meta(**changes: Any) -> dict[str, Any]:
    tensor = {
        "dtype": 7,
        "sizes": [{"as_int": 2}, {"as_int": 3}],
        "strides": [{"as_int": 3}, {"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
    entry = {"path_name": "weight_0", "is_param": True, "use_pickle": False}
    entry |= {key: value for key, value in changes.items() if key in entry}
    tensor |= {key: value for key, value in changes.items() if key not in entry}
    return entry | {"tensor_meta": tensor}


def _export(config: Any) -> io.BytesIO:
    records = {
        "archive_format": b"pt2",
        "models/model.json": b"{}",
        "data/weights/weight_0": np.arange(6, dtype=np.float32).tobytes(),
        "data/weights/model_weights_config.json": (
            config if isinstance(config, bytes) else json.dumps({"config": config}).encode()
        ),
    }
    return io.BytesIO(_archive(records))


def test_views_of_an_exported_program() -> None:
    turned = _meta(sizes=[{"as_int": 3}, {"as_int": 2}], strides=[{"as_int": 1}, {"as_int": 3}])
    part = _meta(sizes=[{"as_int": 2}], strides=[{"as_int": 2}], storage_offset={"as_int": 1})
    empty = _meta(sizes=[{"as_int": 0}, {"as_int": 5}], storage_offset={"as_int": 99})
    scalar = _meta(sizes=[], strides=[], storage_offset={"as_int": 5})
    odd = _meta(dtype=1, sizes=[{"as_int": 4}], strides=[{"as_int": 1}])
    config = {"w": _meta(), "t": turned, "p": part, "e": empty, "s": scalar, "bytes": odd}
    found = holdfast.load(_export(config), framework="numpy")
    assert list(found) == list(config)
    assert found["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["p"].tolist() == [1, 3]
    assert found["e"].shape == (0, 5)
    assert found["s"].tolist() == 5.0 and found["s"].shape == ()
    assert found["bytes"].tolist() == [0, 0, 0, 0] and found["bytes"].dtype == np.uint8
    assert np.shares_memory(found["w"], found["p"])


def test_several_programs_in_one_archive() -> None:
    other = _meta(path_name="weight_1", dtype=5)
    records = {
        "archive_format": b"pt2",
        "models/a.json": b"{}",
        "models/b.json": b"{}",
        "data/weights/weight_0": np.arange(6, dtype=np.float32).tobytes(),
        "data/weights/weight_1": np.arange(6).tobytes(),
        "data/weights/a_weights_config.json": json.dumps({"config": {"w": _meta()}}).encode(),
        "data/weights/b_weights_config.json": json.dumps({"config": {"w": other}}).encode(),
    }
    found = holdfast.load(io.BytesIO(_archive(records)), framework="numpy")
    assert set(found) == {"a.w", "b.w"}
    assert found["b.w"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b.w"].dtype == np.int64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "the object 'config'"),
        (b'{"config": []}', "the object 'config'"),
        (b"\xff", "UTF-8"),
        ({"w": 3}, "an object"),
        ({"w": _meta(path_name=3)}, "path_name"),
        ({"w": _meta(path_name="weight_9")}, "data/weights/weight_9"),
        ({"w": _meta(path_name="../../x")}, "no record"),
        ({"w": _meta(use_pickle=1)}, "use_pickle"),
        ({"w": _meta(use_pickle=True)}, "record"),
        ({"w": _meta() | {"tensor_meta": None}}, "tensor_meta"),
        ({"w": _meta(dtype=0)}, "dtype"),
        ({"w": _meta(dtype=True)}, "dtype"),
        ({"w": _meta(layout=2)}, "strided"),
        ({"w": _meta(sizes=[{"as_int": -1}, {"as_int": 3}])}, "sizes"),
        ({"w": _meta(sizes=[{"as_expr": "s0"}, {"as_int": 3}])}, "sizes"),
        ({"w": _meta(sizes=[{"as_int": 1 << 63}, {"as_int": 0}])}, "sizes"),
        ({"w": _meta(sizes=[{"as_int": 2}])}, "strides"),
        ({"w": _meta(sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 1}] * 65)}, "at most 64"),
        ({"w": _meta(sizes=[{"as_int": 3}, {"as_int": 3}])}, "needs 36 bytes"),
        ({"w": _meta(storage_offset={"as_int": 1})}, "needs 28 bytes"),
        ({"w": _meta(strides=[{"as_int": 1 << 62}, {"as_int": 1}])}, "needs"),
        ({"w": _meta(dtype=11)}, "needs 96 bytes"),
        ({"w": _meta(sizes=[{"as_int": (1 << 62)}] * 2, strides=[{"as_int": 0}] * 2)}, "2**63"),
    ],
)
def test_refused_tables(config: Any, message: str) -> None:
    with pytest.raises(holdfast.FormatError, match=re.escape(message)):
        holdfast.load(_export(config), framework="numpy")


def test_which_archives_are_claimed() -> None:
    def claimed(records: dict[str, bytes], root: str = "m/") -> tuple[bool, bool]:
        directory = _records(_archive(records, root)).directory
        return torchscript.claims(directory), pt2.claims(directory)

    assert claimed({"data.pkl": b"", "constants.pkl": b""}) == (True, False)
    assert claimed({"data.pkl": b"", "version": b""}) == (False, False)
    assert claimed({"archive_format": b"pt2"}) == (False, True)
    assert claimed({"models/model.json": b""}) == (False, True)
    assert claimed({pt2.OLD: b"", "version": b""}, "") == (False, True)
    with pytest.raises(holdfast.FormatError, match="archive_format"):
        holdfast.load(io.BytesIO(_archive({"archive_format": b"other", "version": b""})))


def test_compiled_code_alone_is_refused() -> None:
    records = {"archive_format": b"pt2", "data/aotinductor/model/x.so": b""}
    with pytest.raises(holdfast.FormatError, match="AOTInductor"):
        holdfast.load(io.BytesIO(_archive(records)))
    assert holdfast.load(io.BytesIO(_archive({"archive_format": b"pt2", "extra/x": b""}))) == {}


def test_names_of_a_list() -> None:
    names = NameList(["a", "b"])
    assert (len(names), names.tolist(), names.find("b"), names.find("c")) == (2, ["a", "b"], 1, -1)
