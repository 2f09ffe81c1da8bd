"""Files of torch with tensors of CUDA devices: what torch.save writes, of tensors that pretend."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import holdfast  # noqa: E402
from holdfast import adapters, staging  # noqa: E402
from holdfast.adapters import _torch_load, _torch_storages  # noqa: E402
from holdfast.adapters._torch_storages import TorchStorages  # noqa: E402
from holdfast.adapters.torch import TorchAdapter  # noqa: E402
from holdfast.formats._pickle_emit import Emitter  # noqa: E402
from holdfast.staging.host import HostDevice  # noqa: E402
from holdfast.views import TensorBatch, device_code  # noqa: E402

CODE = device_code(2, 0)


class Elsewhere:
    """Tensors of the host that are taken for those of CUDA devices."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # by the address of torch's own structure
        self.kept: list[Any] = []

    def put(self, tensor: Any, number: int = 0) -> Any:
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        self.numbers[storage._cdata] = number
        return tensor

    def number(self, storage: Any) -> int:
        return self.numbers.get(storage._cdata, -1)

    def tag(self, storage: Any) -> str:
        """As torch makes the text: anew for each."""
        number = self.number(storage)
        return "cpu" if number < 0 else ":".join(["cuda", str(number)])


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    found, place = Elsewhere(), _torch_storages._place

    def placed(tensor: Any) -> Any:
        at = place(tensor)
        return None if at is None else (*at[:-1], found.number(tensor.untyped_storage()))

    def batch(self: TorchStorages) -> TensorBatch:
        views, dims = self.columns()
        devices = np.zeros(len(views), np.int32)
        devices[self.elsewhere] = CODE
        return TensorBatch(views, dims, list(self.storages), devices=devices)

    monkeypatch.setattr(_torch_storages, "_place", placed)
    monkeypatch.setattr(TorchStorages, "batch", batch)
    monkeypatch.setattr(torch.serialization, "location_tag", found.tag)
    without = TorchAdapter(exchange=False)
    monkeypatch.setattr(adapters, "by_name", lambda name: without)
    device = HostDevice("cuda:0", lazy=True)
    staging.register(CODE, device)
    try:
        yield found
    finally:
        staging.unregister(CODE)
        staging.release_pinned()


def checkpoint(elsewhere: Elsewhere) -> dict[str, Any]:
    base = elsewhere.put(torch.arange(120.0).reshape(10, 12))
    frozen = torch.nn.Parameter(torch.arange(9), requires_grad=False)
    return {
        "base": base,
        "row": base[3],
        "turned": base.T,
        "tie": base,
        "other": elsewhere.put(torch.ones(3, dtype=torch.bfloat16), 1),
        "host": torch.zeros(7),
        "host again": torch.ones(2, 0, 3),
        "parameter": torch.nn.Parameter(elsewhere.put(torch.rand(5))),
        "frozen": elsewhere.put(frozen),
        "empty": elsewhere.put(torch.zeros(0, 3)),
        "new": elsewhere.put(torch.arange(4).to(torch.uint16)),
        "list": [elsewhere.put(torch.tensor(2.5), 1), "cuda:0", elsewhere.put(torch.rand(2, 2))],
    }


def emitted(obj: Any, *, legacy: bool = False) -> tuple[bytes, TorchStorages]:
    storages = TorchStorages(None, legacy=legacy)
    emitter = Emitter(storages, TorchAdapter.plain_types, None, frozenset(), legacy)
    return emitter.dump(obj), storages


def pickled(obj: Any) -> bytes:
    """The pickle in what torch.save writes."""
    out = io.BytesIO()
    torch.save(obj, out)
    with zipfile.ZipFile(out) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))


def test_the_pickle_is_that_of_torch_byte_for_byte(elsewhere: Elsewhere) -> None:
    obj = checkpoint(elsewhere)
    data, storages = emitted(obj)
    assert data == pickled(obj)
    assert data.count(b"cuda:0") > 5 and data.count(b"cuda:1") == 2
    assert storages.places == ["cuda:0", "cuda:1"]
    assert [i for i in range(len(storages.keys)) if i not in storages.elsewhere] == [2, 3]


def test_the_legacy_stream_is_that_of_torch(elsewhere: Elsewhere) -> None:
    obj = checkpoint(elsewhere)
    data, storages = emitted(obj, legacy=True)
    out = io.BytesIO()
    torch.save(obj, out, _use_new_zipfile_serialization=False)
    theirs = out.getvalue()
    assert all(str(s._cdata).encode() in theirs for s in storages.storages)
    assert theirs.count(b"cuda:0") == data.count(b"cuda:0")
    assert theirs.count(b"cuda:1") == data.count(b"cuda:1")


def test_tensors_are_placed_without_being_pickled_in_their_own_way(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, protocol: int) -> Any:
        raise AssertionError("pickled in its own way")

    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", refuse)
    monkeypatch.setattr(torch.nn.Parameter, "__reduce_ex__", refuse)
    data, _ = emitted(checkpoint(elsewhere))
    assert data


def test_add_is_for_the_host_alone(elsewhere: Elsewhere) -> None:
    storages = TorchStorages(None)
    assert storages.add(elsewhere.put(torch.ones(3))) is None
    assert storages.add(torch.ones(3)) is not None


def test_where_others_say_where_storages_are_they_are_asked(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    obj = checkpoint(elsewhere)
    assert _torch_load.plain_cuda()
    registry = list(torch.serialization._package_registry)
    registry.insert(1, (15, lambda storage: None, lambda storage, tag: None))
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    assert not _torch_load.plain_cuda()
    data, storages = emitted(obj)
    assert storages.places == []
    assert data == pickled(obj)


def test_small_tensors_of_a_device_are_gathered_into_the_file(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    tensors = {f"t{i}": elsewhere.put(torch.rand(256)) for i in range(500)}
    device: Any = staging.device(CODE)
    holdfast.save(tensors, tmp_path / "x.pt")
    assert device.calls["gather"] >= 1
    assert device.calls["to_host"] <= 4
    found = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("legacy", [False, True])
def test_files_say_where_their_tensors_were(
    elsewhere: Elsewhere, tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in one step for each tensor, or opcode by opcode: alike."""
    obj = checkpoint(elsewhere)
    torch.save(obj, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    asked: list[str] = []

    def where(storage: Any, tag: str) -> Any:
        asked.append(tag)
        return storage

    found = holdfast.load(tmp_path / "x.pt", where)
    assert asked.count("cpu") == 2
    assert asked.count("cuda:1") == 2
    assert asked.count("cuda:0") == len(asked) - 4
    for name, tensor in itertools.islice(obj.items(), 11):
        assert torch.equal(found[name], tensor), name
    assert found["list"][1] == "cuda:0"
    assert found["tie"] is found["base"]


def test_the_name_of_a_device_that_is_used_again_is_found(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pickle of torch's does it, but one may."""
    tensors = [elsewhere.put(torch.arange(3.0) + i) for i in range(3)]
    torch.save({"tensors": tensors, "y": "zz"}, tmp_path / "x.pt")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("/data.pkl"))
    data, text = files[name], b"X\x06\x00\x00\x00cuda:0q"
    at = data.rindex(text) + len(text)
    again = data.index(b"X\x02\x00\x00\x00zz")
    files[name] = data[:again] + b"h" + data[at : at + 1] + data[again + 7 + 2 :]
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    found = holdfast.load(tmp_path / "y.pt", "cpu")
    assert found["y"] == "cuda:0"
    assert all(torch.equal(*pair) for pair in zip(found["tensors"], tensors, strict=True))


def test_versions_of_torch_that_name_the_function_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = torch.serialization
    registry = list(module._package_registry)

    def old(storage: Any) -> None:
        return None

    monkeypatch.setattr(module, "_cuda_tag", old, raising=False)
    for tagger, expected in ((old, True), (partial(old, "cuda"), False), (print, False)):
        changed = [registry[0], (20, tagger, None), *registry[2:]]
        monkeypatch.setattr(module, "_package_registry", changed)
        assert _torch_load.plain_cuda() is expected
