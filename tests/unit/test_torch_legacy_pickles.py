"""What the pickles in a legacy stream may hold: persistent ids, Python 2's opcodes, and attacks."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import torch_legacy as form
from holdfast.layout import Index


def index(data: bytes) -> Index:
    return form.index(files.reader(data), len(data), "x.pt", verify=True)


# Persistent ids


def test_classes_with_their_source_stay_names() -> None:
    source = "class Net(nn.Module):\n    pass\n"
    net = files.Persistent(("module", files.Named("net", "Net"), "/tmp/net.py", source))
    weight = files.tensor(files.storage(), (6,))
    state = {"_parameters": OrderedDict(w=weight), "_buffers": OrderedDict(), "_modules": {}}
    data = files.stream(Instance(net, state), {"7": np.arange(6, dtype="<f4")})
    found = index(data)
    assert found.names.tolist() == ["w"]
    np.testing.assert_array_equal(files.values(data, found)["w"], np.arange(6))
    assert "net.Net" in list(found.structure.globals)


class Instance:
    """An instance of a class that is a persistent id, made by NEWOBJ and BUILD."""

    def __init__(self, cls: object, state: object) -> None:
        self.cls = cls
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return files.Named("copy_reg", "__newobj__"), (self.cls,), self.state


@pytest.mark.parametrize(
    "pid",
    [
        (),
        ("storage",),
        ("module",),
        ("module", 3, "", ""),
        ("module", None, None, None),
        ("other", 1),
        "storage",
        7,
        None,
        ["storage", None],
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", 6),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", 6, None, None),
        ("storage", files.Named("torch", "FloatStorage"), None, "cpu", 6, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", 5, 6, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", -1, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", 1 << 63, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", 1 << 61, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", 1 << 300, None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", "6", None),
        ("storage", files.Named("torch", "FloatStorage"), "7", "cpu", None, None),
        ("storage", files.Named("torch", "NoStorage"), "7", "cpu", 6, None),
        ("storage", files.Named("os", "system"), "7", "cpu", 6, None),
        ("storage", "FloatStorage", "7", "cpu", 6, None),
    ],
    ids=repr,
)
def test_persistent_ids_that_are_refused(pid: object) -> None:
    obj = {"t": files.tensor(files.Persistent(pid), (1,))} if pid is not None else None
    data = files.stream(obj, {"7": np.arange(6, dtype="<f4")})
    with pytest.raises(FormatError, match="^x.pt: "):
        index(data)


@pytest.mark.parametrize(
    "other",
    [
        files.storage("7", 5),
        files.storage("7", 6, "IntStorage"),
        files.storage("7", 3, "DoubleStorage"),
    ],
)
def test_one_key_for_two_storages(other: files.Persistent) -> None:
    obj = [files.tensor(files.storage("7", 6), (1,)), files.tensor(other, (1,))]
    with pytest.raises(FormatError, match="^x.pt: .*7"):
        index(files.stream(obj, {"7": np.arange(6, dtype="<f4")}))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2,), (6,), 0),
        ((1,), (1,), -1),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((1 << 62, 1 << 62), (1, 1), 0),
        ((1 << 70,), (0,), 0),
        ((2,), (1 << 63,), 0),
        ((2,), (1, 1), 0),
        ((2, 2), (1,), 0),
        ((1.0,), (1,), 0),
        ((1,), (1,), 1 << 63),
        ((1,) * 65, (1,) * 65, 0),
    ],
)
def test_tensors_that_leave_their_storage(size: Any, stride: Any, offset: int) -> None:
    obj = {"t": files.tensor(files.storage(), size, stride, offset)}
    with pytest.raises(FormatError, match="^x.pt: "):
        index(files.stream(obj, {"7": np.arange(6, dtype="<f4")}))


# What Python 2 wrote, byte by byte


def u(text: str) -> bytes:
    """SHORT_BINSTRING: a str of Python 2."""
    return b"U" + bytes([len(text)]) + text.encode()


def python2_file(hooks: bytes = b"N") -> bytes:
    """A state dict as Python 2.7 and torch 0.3 pickled it, memo from 1 on, sizes as long."""
    storage = (
        b"(" + u("storage") + b"q\x03" + b"ctorch\nFloatStorage\nq\x04" + u("140234567890123")
        + b"q\x05" + u("cpu") + b"q\x06" + b"\x8a\x01\x06" + b"Ntq\x07" + b"Q"
    )  # fmt: skip
    sizes = b"\x8a\x01\x02\x8a\x01\x03\x86q\x08" + b"\x8a\x01\x03\x8a\x01\x01\x86q\x09"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x02(" + storage + b"\x8a\x00" + sizes
        + b"\x89" + hooks + b"tq\x0aRq\x0b"
    )  # fmt: skip
    obj = (
        b"\x80\x02}q\x01(" + u("state") + b"ccollections\nOrderedDict\nq\x0e]q\x0f]q\x10("
        + u("weight") + b"q\x11" + tensor.replace(b"q\x0b", b"q\x12") + b"ea\x85q\x13Rq\x14"
        + u("n") + b"K\x05" + u("set") + b"c__builtin__\nset\nq\x15]q\x16K\x01a\x85q\x17Rq\x18u."
    )  # fmt: skip
    info = (
        b"\x80\x02}q\x01(" + u("type_sizes") + b"q\x02}q\x03(" + u("int") + b"q\x04K\x04"
        + u("short") + b"q\x05K\x02" + u("long") + b"q\x06K\x04u" + u("protocol_version")
        + b"q\x07M\xe9\x03" + u("little_endian") + b"q\x08\x88u."
    )  # fmt: skip
    magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
    keys = b"\x80\x02]q\x01" + u("140234567890123") + b"q\x02a."
    tail = files.payload(np.arange(6, dtype="<f4"))
    return magic + b"\x80\x02M\xe9\x03." + info + obj + keys + tail


@pytest.mark.parametrize(
    "hooks", [b"N", b"ccollections\nOrderedDict\n)R", b"c__builtin__\nset\n]\x85R"]
)
def test_files_of_python_2(hooks: bytes) -> None:
    data = python2_file(hooks)
    assert form.sniff(data[:512], len(data))
    found = index(data)
    assert found.names.tolist() == ["state.weight"]
    assert list(found.locations) == ["cpu"]
    value = files.values(data, found)["state.weight"]
    np.testing.assert_array_equal(value, np.arange(6, dtype="f4").reshape(2, 3))


def test_python_2_files_are_what_python_2_means() -> None:
    """The bytes above are a pickle that Python itself reads so."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch._utils":
                return lambda *args: args
            return super().find_class(module, name) if module != "torch" else name

        def persistent_load(self, pid: Any) -> Any:
            return pid

    file = io.BytesIO(python2_file())
    head = [Reader(file).load() for _ in range(5)]
    assert head[:2] == [files.MAGIC, files.VERSION]
    assert head[2] == files.INFO
    where = ("storage", "FloatStorage", "140234567890123", "cpu", 6, None)
    assert head[3]["state"]["weight"] == (where, 0, (2, 3), (3, 1), False, None)
    assert head[3]["set"] == {1}
    assert head[4] == ["140234567890123"]


# What the pickles may not do


EVIL = [
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    b"\x80\x02cposix\nsystem\nU\x04true\x85R.",
]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", range(5))
def test_no_pickle_of_the_five_runs_anything(
    evil: bytes, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr("os.system", lambda *args: ran.append(args))
    monkeypatch.setattr("builtins.eval", lambda *args: ran.append(args))
    pickles = [files.dump(part) for part in (files.MAGIC, files.VERSION, files.INFO, {}, [])]
    pickles[place] = evil
    data = b"".join(pickles)
    if place == 3:  # the object: a record of the name and nothing else
        found = index(data)
        assert len(found) == 0
        assert list(found.structure.globals)
    else:
        with pytest.raises(FormatError, match="^x.pt: "):
            index(data)
    assert not ran


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02.",
        b"\x80\x02NN.",
        b"\x80\x02N(.",
        b"\x80\x02R.",
        b"\x80\x06N.",
        b"\xffN.",
        b"",
    ],
    ids=lambda text: text[:6].hex(),
)
def test_pickles_that_are_none(place: int, bomb: bytes) -> None:
    pickles = [files.dump(part) for part in (files.MAGIC, files.VERSION, files.INFO, {}, [])]
    pickles[place] = bomb
    with pytest.raises(FormatError, match="^x.pt: "):
        index(b"".join(pickles))
