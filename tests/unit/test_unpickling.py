"""Unpickling what is trusted: the remaps, the keywords, the persistent ids."""

from __future__ import annotations

import collections
import io
import pickle
import subprocess
import sys
import types
import warnings
from typing import Any

import pytest

from holdfast.unpickling import StorageType, unpickle


class Whole:
    """Something that only a trusted file makes."""

    def __init__(self, value: int) -> None:
        self.value = value


def no(pid: Any) -> object:
    raise AssertionError(f"asked for {pid!r}")


def pickled(obj: Any, pids: dict[int, Any], protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return pids.get(id(obj))

    file = io.BytesIO()
    Pickler(file, protocol).dump(obj)
    return file.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_whole_objects(kind: Any, protocol: int) -> None:
    data = kind(pickle.dumps([Whole(3)], protocol) + b"what stands behind it")
    (found,) = unpickle(data, None, no, name="a.pt")
    assert type(found) is Whole and found.value == 3


def test_the_callers_module_is_used() -> None:
    seen: list[Any] = []

    class Unpickler(pickle.Unpickler):
        def __init__(self, file: Any, **keywords: Any) -> None:
            seen.append(keywords)
            super().__init__(file, **keywords)

        def find_class(self, module: str, name: str) -> Any:
            seen.append((module, name))
            return super().find_class(module, name)

    module = types.SimpleNamespace(Unpickler=Unpickler)
    data = pickle.dumps(collections.OrderedDict(), 2)
    assert unpickle(data, module, no, name="a.pt", errors="replace") == {}
    assert seen == [{"encoding": "utf-8", "errors": "replace"}, ("collections", "OrderedDict")]


def test_encodings() -> None:
    data = b"\x80\x02U\x02\xc3\xa4."  # as Python 2 writes a str
    assert unpickle(data, None, no, name="a.pt") == "\u00e4"
    assert unpickle(data, None, no, name="a.pt", encoding="latin1") == "\u00c3\u00a4"
    assert unpickle(data, None, no, name="a.pt", encoding="bytes") == b"\xc3\xa4"
    with pytest.raises(UnicodeDecodeError):
        unpickle(data, None, no, name="a.pt", encoding="ascii")


def test_storages() -> None:
    obj = [object(), object()]
    pids = {
        id(obj[0]): ("storage", collections.OrderedDict, "0", "cpu", 3),
        id(obj[1]): 5,
    }
    data = pickled(obj, pids).replace(b"ccollections\nOrderedDict", b"ctorch\nFloatStorage")
    asked: list[Any] = []
    assert unpickle(data, None, lambda pid: asked.append(pid) or len(asked), name="a.pt") == [1, 2]
    assert asked[0][0] == "storage" and asked[0][2:] == ("0", "cpu", 3) and asked[1] == 5
    assert asked[0][1].name == "FloatStorage" and asked[0][1].module == "torch"
    python2 = b"\x80\x02(U\x07storagectorch\nHalfStorage\nU\x010U\x03cpuK\x03tQ."
    assert unpickle(python2, None, lambda pid: pid[0], name="a.pt", encoding="bytes") == "storage"


def test_classes_of_storages() -> None:
    with pytest.raises(KeyError):
        StorageType("WrongStorage")
    assert StorageType("UntypedStorage").module == "torch.storage"
    torch = pytest.importorskip("torch")
    assert StorageType("QInt8Storage").dtype is torch.qint8
    for name in ("FloatStorage", "BFloat16Storage", "QUInt4x2Storage"):
        assert StorageType(name).dtype is torch.serialization.StorageType(name).dtype


def test_classes_with_their_source() -> None:
    import inspect

    source = inspect.getsource(Whole)
    for pid, said in [
        (("module", Whole, __file__, source), None),
        (("module", Whole, None, None), None),
        (("module", Whole, __file__, "class Whole: pass"), "source code of class .* has changed"),
        (("module", dict, "x.py", "class dict: pass"), "couldn't retrieve source code"),
    ]:
        obj = [object()]
        data = pickled(obj, {id(obj[0]): pid})
        if said is None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert unpickle(data, None, no, name="a.pt") == [pid[1]]
        else:
            serialization = sys.modules.get("torch.serialization")
            category = getattr(serialization, "SourceChangeWarning", UserWarning)
            with pytest.warns(category, match=said):
                assert unpickle(data, None, no, name="a.pt") == [pid[1]]


def test_names_that_moved() -> None:
    torch = pytest.importorskip("torch")
    data = b"\x80\x02ctorch.tensor\n_rebuild_from_type_v2\n."
    assert unpickle(data, None, no, name="a.pt") is torch._tensor._rebuild_from_type_v2


def test_what_torch_keeps_for_a_load() -> None:
    torch = pytest.importorskip("torch")
    state = torch.serialization._serialization_tls
    seen: list[Any] = []

    def load(pid: Any) -> object:
        seen.append(state.map_location)
        torch._utils._sparse_tensors_to_validate.append(pid)
        if pid == 2:
            raise LookupError("none")
        return pid

    obj = [object()]
    with pytest.raises(LookupError):
        unpickle(pickled(obj, {id(obj[0]): 2}), None, load, name="a.pt", map_location="meta")
    assert seen == ["meta"] and state.map_location is None
    assert torch._utils._sparse_tensors_to_validate == []


def test_without_torch_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
from holdfast.unpickling import unpickle
data = b"\\x80\\x02ctorch.nn.modules.linear\\nLinear\\n."
try:
    unpickle(data, None, lambda pid: None, name="a.pt")
except ImportError as error:
    assert str(error).startswith("a.pt: ") and "pip install torch" in str(error), str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
