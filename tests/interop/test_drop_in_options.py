"""What the arguments of save and load, and the settings of torch, change."""

from __future__ import annotations

import inspect
import io
import mmap
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
serialization = torch.serialization

BOTH = pytest.mark.parametrize("weights_only", [True, False])

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@pytest.fixture
def config() -> Iterator[Any]:
    """Torch's settings, which are as they were afterwards."""
    module = pytest.importorskip("torch.utils.serialization").config
    kept = [
        ("load", "mmap"), ("load", "endianness"), ("load", "mmap_flags"),
        ("load", "calculate_storage_offsets"), ("save", "compute_crc32"),
        ("save", "storage_alignment"),
    ]  # fmt: skip
    before = {(part, name): getattr(getattr(module, part), name) for part, name in kept}
    yield module
    for (part, name), value in before.items():
        setattr(getattr(module, part), name, value)


def saved(impl: Any, obj: Any, **arguments: Any) -> io.BytesIO:
    file = io.BytesIO()
    impl.save(obj, file, **arguments)
    file.seek(0)
    return file


def test_signatures() -> None:
    import holdfast.torch

    for name in ("save", "load"):
        ours = inspect.signature(getattr(holdfast.torch, name)).parameters.values()
        theirs = inspect.signature(getattr(torch, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [
            (p.name, p.kind, p.default) for p in theirs
        ]


# Pickling.


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5, -1])
def test_protocols(pair: Any, zipped: bool, protocol: int) -> None:
    obj = {"w": torch.ones(3), "s": "text", "b": b"bytes"}
    file = saved(pair, obj, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    got = pair.load(file, weights_only=False)
    assert torch.equal(got["w"], obj["w"]) and got["s"] == "text" and got["b"] == b"bytes"


def test_protocols_that_do_not_exist(impl: Any, zipped: bool) -> None:
    with pytest.raises(ValueError, match="protocol"):
        saved(impl, torch.ones(3), pickle_protocol=99, _use_new_zipfile_serialization=zipped)


class Throwing(pickle.Unpickler):
    def load(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("rumpelstiltskin")


def test_the_callers_unpickler_is_used(impl: Any, zipped: bool) -> None:
    module = SimpleNamespace(Unpickler=Throwing, load=Throwing.load, __name__="throwing")
    file = saved(impl, torch.eye(3), _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match="rumpelstiltskin"):
        impl.load(file, pickle_module=module, weights_only=False)
    file.seek(0)
    with pytest.raises(RuntimeError, match="rumpelstiltskin"):
        impl.load(file, None, module)  # a pickle_module alone asks for weights_only=False
    file.seek(0)
    assert torch.equal(impl.load(file), torch.eye(3))


def test_the_callers_pickler_is_used(pair: Any, zipped: bool) -> None:
    class Upper(pickle.Pickler):
        dispatch_table = {complex: lambda z: (complex, (9.0, z.imag))}

    module = SimpleNamespace(
        Pickler=Upper, Unpickler=pickle.Unpickler, dump=pickle.dump, load=pickle.load,
        __name__="upper",
    )  # fmt: skip
    obj = [torch.ones(2), 1j]
    file = saved(pair, obj, pickle_module=module, _use_new_zipfile_serialization=zipped)
    got = pair.load(file, pickle_module=module, weights_only=False)
    assert torch.equal(got[0], obj[0])
    assert got[1] == 9 + 1j


def test_versions_of_dill(impl: Any) -> None:
    old = SimpleNamespace(__name__="dill", __version__="0.3.0", Pickler=pickle.Pickler)
    with pytest.raises(ValueError, match="supports dill >= 0.3.1"):
        impl.save(1, io.BytesIO(), pickle_module=old)
    with pytest.raises(ValueError, match="supports dill >= 0.3.1"):
        impl.load(saved(impl, 1), pickle_module=old, weights_only=False)
    new = SimpleNamespace(**vars(pickle))
    new.__name__, new.__version__ = "dill", "0.3.10"
    file = saved(impl, torch.ones(2), pickle_module=new)
    assert impl.load(file, pickle_module=new, weights_only=False).tolist() == [1, 1]


@BOTH
@pytest.mark.filterwarnings("ignore:pickle_load_args only works")
def test_strings_of_python_2(impl: Any, weights_only: bool) -> None:
    """A ``str`` of Python 2 is bytes, which ``encoding`` says what to make of."""
    text = "żąąóżż"
    raw = text.encode()
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    body = b"\x80\x02]q\x01U" + bytes([len(raw)]) + raw + b"q\x02a."
    data = b"".join(head) + body + pickle.dumps([], 2)
    load = impl.load
    assert load(io.BytesIO(data), weights_only=weights_only, encoding="utf-8") == [text]
    assert load(io.BytesIO(data), weights_only=weights_only) == [text]
    assert load(io.BytesIO(data), weights_only=weights_only, encoding="bytes") == [raw]
    assert load(io.BytesIO(data), weights_only=weights_only, encoding="latin1") == [
        raw.decode("latin1")
    ]
    with pytest.raises(UnicodeDecodeError):
        load(io.BytesIO(data), weights_only=weights_only, encoding="ascii")


def test_arguments_for_the_unpickler(impl: Any) -> None:
    file = saved(impl, {"w": torch.ones(2)})
    assert impl.load(file, weights_only=False, errors="strict", fix_imports=True)["w"][0] == 1
    for weights_only in (True, False):
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TypeError, match="bogus"):
                impl.load(file, weights_only=weights_only, bogus=1)
    file.seek(0)
    with pytest.warns(UserWarning, match="pickle_load_args only works if `weights_only=False`"):
        impl.load(file, weights_only=True, encoding="utf-8")


# weights_only.


@pytest.fixture
def module_file(impl: Any, tmp_path: Path) -> Path:
    path = tmp_path / "module.pt"
    impl.save(nn.Linear(3, 5), path)
    return path


def test_weights_only_is_the_default(impl: Any, module_file: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        impl.load(module_file)
    assert type(impl.load(module_file, weights_only=False)) is nn.Linear
    assert type(impl.load(module_file, pickle_module=pickle)) is nn.Linear
    with pytest.raises(RuntimeError, match="explicit pickle_module"):
        impl.load(module_file, pickle_module=pickle, weights_only=True)


@pytest.mark.parametrize("value", ["1", "y", "YES", "True"])
def test_variable_that_forces_it(
    impl: Any, module_file: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
    for weights_only in (False, None, True):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            impl.load(module_file, weights_only=weights_only)
    with pytest.raises(RuntimeError, match="pickle_module"):
        impl.load(module_file, pickle_module=pickle)


def test_variable_that_forbids_it(
    impl: Any, module_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        impl.load(module_file, weights_only=True)
    with pytest.warns(UserWarning, match="forcing weights_only=False") as caught:
        assert type(impl.load(module_file)) is nn.Linear
    assert caught[0].filename == __file__
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        impl.load(module_file)


def test_variables_that_contradict_each_other(
    impl: Any, module_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    for weights_only in (True, False, None):
        with pytest.raises(RuntimeError, match="Only one of"):
            impl.load(module_file, weights_only=weights_only)


# Mapping.


@BOTH
@pytest.mark.parametrize("kind", [str, Path])
def test_mmap(pair: Any, tmp_path: Path, kind: Any, weights_only: bool) -> None:
    path = kind(tmp_path / "x.pt")
    net = nn.Sequential(nn.Linear(3, 1024), nn.Linear(1024, 5))
    pair.save(net.state_dict(), path)
    mapped = pair.load(path, mmap=True, weights_only=weights_only)
    read = pair.load(path, mmap=False, weights_only=weights_only)
    assert list(mapped) == list(read) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(mapped[name], tensor) and torch.equal(read[name], tensor)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(3, 1024), nn.Linear(1024, 5))
    other.load_state_dict(mapped, assign=True)
    x = torch.randn(4, 3)
    assert torch.equal(other(x), net(x))
    mapped["0.weight"].zero_()  # reaches neither the file nor another map of it
    assert torch.equal(pair.load(path, mmap=True)["0.weight"], net[0].weight)


def test_mmap_of_views_and_storages(pair: Any, tmp_path: Path) -> None:
    base = torch.arange(100.0)
    pair.save([base, base[3:9:2], base.reshape(10, 10).t()], tmp_path / "x.pt")
    got = pair.load(tmp_path / "x.pt", mmap=True)
    assert got[1].tolist() == [3, 5, 7]
    assert got[2].stride() == (1, 10)
    got[0].zero_()
    assert not got[1].any() and not got[2].any()


def test_mmap_needs_a_path_and_an_archive(impl: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="f must be a file path in order to use the mmap"):
        impl.load(saved(impl, torch.ones(2)), mmap=True)
    legacy = saved(impl, torch.ones(2), _use_new_zipfile_serialization=False)
    (tmp_path / "x").write_bytes(legacy.getvalue())
    for source in (str(tmp_path / "x"), tmp_path / "x", legacy):
        with pytest.raises(RuntimeError, match="mmap can only be used with files saved with"):
            impl.load(source, mmap=True)


def test_mmap_by_setting(impl: Any, tmp_path: Path, config: Any) -> None:
    config.load.mmap = True
    with pytest.raises(ValueError, match="mmap"):
        impl.load(saved(impl, torch.ones(2)))
    assert impl.load(saved(impl, torch.ones(2)), mmap=False).tolist() == [1, 1]


def test_shared_maps_write_the_file(impl: Any, tmp_path: Path, config: Any) -> None:
    path = tmp_path / "x.pt"
    state = nn.Linear(3, 5).state_dict()
    impl.save(state, path)
    with serialization.set_default_mmap_options(mmap.MAP_SHARED):
        first = impl.load(path, mmap=True)
        first["weight"][0][0] = 1234.5
        second = impl.load(path, mmap=True)
        assert second["weight"][0][0] == 1234.5
        assert torch.equal(second["weight"], first["weight"])
    assert serialization.get_default_mmap_options() == mmap.MAP_PRIVATE
    private = impl.load(path, mmap=True)
    assert private["weight"][0][0] == 1234.5
    private["weight"].zero_()
    assert impl.load(path, mmap=True)["weight"].any()


@pytest.mark.parametrize("kind", [str, Path])
def test_offsets_that_torch_computes_are_right(
    pair: Any, tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch checks them itself then
    config.load.calculate_storage_offsets = True
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    empty = {"none": torch.empty(0), "odd": torch.ones(3, dtype=torch.uint8)}
    path = kind(tmp_path / "x.pt")
    pair.save([empty, net.state_dict()], path)
    for mapped in (True, False):
        got = pair.load(path, mmap=mapped)[1]
        assert all(torch.equal(got[k], v) for k, v in net.state_dict().items())


# What is written.


@pytest.mark.parametrize("named", [True, False])
def test_checksums_of_records(impl: Any, tmp_path: Path, config: Any, named: bool) -> None:
    state = nn.Linear(3, 5).state_dict()
    for wanted in (True, False):
        serialization.set_crc32_options(wanted)
        path = tmp_path / f"{wanted}.pt"
        if named:
            impl.save(state, path)
        else:
            path.write_bytes(saved(impl, state).getvalue())
        assert torch.equal(impl.load(path)["weight"], state["weight"])
        with zipfile.ZipFile(path) as archive:
            assert (archive.testzip() is None) == wanted


def test_alignment_of_storages(impl: Any, config: Any) -> None:
    state = nn.Linear(10, 10).state_dict()
    for alignment, name in ((64, "data/0"), (4096, "data/1"), (256, "data/1")):
        config.save.storage_alignment = alignment
        file = saved(impl, state)
        reader = torch._C.PyTorchFileReader(file)
        assert reader.get_record_offset(name) % alignment == 0
        assert reader.get_record(".storage_alignment") == str(alignment).encode()
        file.seek(0)
        assert torch.equal(impl.load(file)["bias"], state["bias"])


def test_offsets_are_those_of_torch(impl: Any, config: Any) -> None:
    for alignment, expected in ((64, (832, 1344)), (4096, (20480, 24576))):
        config.save.storage_alignment = alignment
        reader = torch._C.PyTorchFileReader(saved(impl, nn.Linear(10, 10).state_dict()))
        found = tuple(reader.get_record_offset(f"data/{i}") for i in range(2))
        assert found == expected


def test_no_setting_is_left_behind(impl: Any) -> None:
    impl.load(saved(impl, torch.ones(2)), map_location="cpu")
    with pytest.raises(pickle.UnpicklingError):
        impl.load(saved(impl, nn.Linear(2, 2)), map_location="cpu")
    impl.load(saved(impl, torch.ones(2)))
    assert serialization._serialization_tls.map_location is None
    assert not serialization._serialization_tls.skip_data
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
