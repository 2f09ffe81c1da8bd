"""Torch's formats before 1.6: sources of modules, views of storages, and the tar."""

from __future__ import annotations

import importlib.util
import io
import pickle
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
serialization = torch.serialization

BOTH = pytest.mark.parametrize("weights_only", [True, False])

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

MAGIC = 0x1950A86A20F9469CFC6C
INFO = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def saved(impl: Any, obj: Any) -> io.BytesIO:
    file = io.BytesIO()
    impl.save(obj, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    return file


class Reduced:
    """Pickled as a call of this function with these arguments, and perhaps a state."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


class Stored(pickle._Pickler):
    """A pickler to which tuples that begin with "storage" are persistent ids."""

    def persistent_id(self, obj: Any) -> Any:
        return obj if type(obj) is tuple and obj and obj[0] == "storage" else None


def stream(obj: Any, storages: dict[str, list[float]]) -> io.BytesIO:
    """A file of torch before 1.6 with float storages."""
    file = io.BytesIO()
    for part in (MAGIC, 1001, INFO):
        pickle.dump(part, file, 2)
    Stored(file, 2).dump(obj)
    pickle.dump(sorted(storages), file, 2)
    for key in sorted(storages):
        content = storages[key]
        file.write(struct.pack(f"<q{len(content)}f", len(content), *content))
    file.seek(0)
    return file


# Sources of modules.

NETWORK = """
import torch.nn as nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 20)
{more}
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Any]:
    """A module of Python's whose source can be changed."""
    name = "network_of_a_test"

    def make(more: str) -> Any:
        path = tmp_path / f"network{len(more)}.py"
        path.write_text(NETWORK.format(more=more))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield make
    sys.modules.pop(name, None)


@pytest.mark.parametrize("named", [True, False])
def test_a_source_that_has_changed(pair: Any, tmp_path: Path, network: Any, named: bool) -> None:
    module = network("")
    path = tmp_path / "net.pt"
    pair.save(module.Net(), path, _use_new_zipfile_serialization=False)

    def load() -> Any:
        source = path if named else io.BytesIO(path.read_bytes())
        return pair.load(source, weights_only=False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load()) is module.Net
    changed = network("        self.relu = nn.ReLU()")
    with pytest.warns(serialization.SourceChangeWarning, match="has changed") as caught:
        assert type(load()) is changed.Net
    assert len(caught) == 1


def test_a_source_that_cannot_be_had(impl: Any) -> None:
    namespace: dict[str, Any] = {"nn": nn, "__name__": __name__}
    exec("class Hidden(nn.Module): pass", namespace)
    hidden = namespace["Hidden"]
    module = sys.modules.get(__name__)
    if module is None:
        pytest.skip("this module cannot be found by its name")
    module.Hidden = hidden  # type: ignore[attr-defined]
    try:
        with pytest.warns(UserWarning, match="Couldn't retrieve source code for container"):
            file = saved(impl, hidden())
        assert type(impl.load(file, weights_only=False)) is hidden
    finally:
        del module.Hidden  # type: ignore[attr-defined]


# Files as they were written once.


@BOTH
def test_views_of_storages(impl: Any, weights_only: bool) -> None:
    """Torch 0.3 had storages that were views of others."""
    root = ("storage", torch.FloatStorage, "100", "cpu", 4)
    first, second = (*root, ("200", 0, 1)), (*root, ("300", 1, 3))
    file = stream((first, second), {"100": [5.0, 6.0, 7.0, 8.0]})
    one, two = impl.load(file, weights_only=weights_only)
    assert type(one) is type(two) is torch.storage.TypedStorage
    assert one.tolist() == [5] and two.tolist() == [6, 7, 8]
    assert two.data_ptr() == one.data_ptr() + 4


@BOTH
def test_tensors_of_the_first_versions(impl: Any, zipped: bool, weights_only: bool) -> None:
    """Tensors as a class with a state, and as a call without requires_grad."""
    x = torch.randn(30).as_strided([2, 3], [9, 3], 2)
    state = (x.storage(), x.storage_offset(), tuple(x.size()), x.stride())
    for old in (Reduced(torch.Tensor, (), state), Reduced(torch._utils._rebuild_tensor, state)):
        file = io.BytesIO()
        impl.save(old, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        got = impl.load(file, weights_only=weights_only)
        assert torch.equal(got, x)
        assert got.storage().tolist() == x.storage().tolist()
        assert got.storage_offset() == 2 and got.stride() == (9, 3)


@BOTH
def test_a_stream_made_by_hand(impl: Any, weights_only: bool) -> None:
    storage = ("storage", torch.FloatStorage, "7", "cpu", 6, None)
    arguments = (storage, 1, (2, 2), (2, 1), False, OrderedDict())
    tensor = Reduced(torch._utils._rebuild_tensor_v2, arguments)
    file = stream({"x": tensor}, {"7": [0, 1, 2, 3, 4, 5]})
    assert impl.load(file, weights_only=weights_only)["x"].tolist() == [[1, 2], [3, 4]]
    assert file.read() == b""


@BOTH
@pytest.mark.parametrize("part", ["magic", "version"])
def test_wrong_beginnings(impl: Any, weights_only: bool, part: str) -> None:
    file = io.BytesIO()
    for value in (1 if part == "magic" else MAGIC, 5, INFO, {}, []):
        pickle.dump(value, file, 2)
    file.seek(0)
    with pytest.raises(RuntimeError):
        impl.load(file, weights_only=weights_only)


def tar(path: Path) -> Any:
    """A file as torch before 0.1.11 wrote it, with the object that is in it."""
    import tarfile

    storages, tensors, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(1, storages, 2)
    pickle.dump((10, "cpu", torch.FloatStorage), storages, 2)
    storages.write(struct.pack("<q6f", 6, *range(6)))
    pickle.dump([], storages, 2)
    pickle.dump(2, tensors, 2)
    for key, shape, strides, offset in ((20, (2, 3), (3, 1), 0), (21, (2,), (2,), 1)):
        pickle.dump((key, 10, torch.FloatTensor), tensors, 2)
        tensors.write(struct.pack("<ii", len(shape), 0))
        tensors.write(struct.pack(f"<{len(shape)}q", *shape))
        tensors.write(struct.pack(f"<{len(strides)}q", *strides))
        tensors.write(struct.pack("<q", offset))

    class Named(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.parts[0] if isinstance(obj, Reduced) else None

    Named(pickled, 2).dump([Reduced(20), {"b": Reduced(21)}, Reduced(10)])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, member in (("storages", storages), ("tensors", tensors), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = member.tell()
            member.seek(0)
            archive.addfile(info, member)
    whole = torch.arange(6.0).reshape(2, 3)
    return [whole, {"b": whole.flatten()[1:4:2]}]


@BOTH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tars(impl: Any, tmp_path: Path, weights_only: bool) -> None:
    expected = tar(tmp_path / "x.pt")
    if impl.name == "torch" and weights_only:
        # Its unpickler for tars cannot be restricted. Ours reads them as it reads all others.
        with pytest.raises(RuntimeError, match="legacy .tar format"):
            impl.load(tmp_path / "x.pt", weights_only=True)
        return
    got = impl.load(tmp_path / "x.pt", weights_only=weights_only)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1]["b"], expected[1]["b"])
    assert type(got[2]) is torch.storage.TypedStorage
    assert got[2].tolist() == [0, 1, 2, 3, 4, 5]
    got[0].fill_(9)
    assert got[1]["b"].tolist() == [9, 9] and got[2][0] == 9
