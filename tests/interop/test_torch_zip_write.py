"""What is written as torch's files is what torch itself writes, and torch reads it."""

from __future__ import annotations

import io
import pickle
import pickletools
import shutil
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.formats import _torch_legacy_write, torch_zip
from holdfast.pickling import pickle_object
from holdfast.views import TensorBatch
from torch_files import assemble

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def theirs(obj: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(obj, out, **options)
    return out.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def same(a: Any, b: Any) -> None:
    """Assert that two objects are equal, types included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        assert a.is_nested == b.is_nested and (a.is_nested or a.shape == b.shape)
        assert a.layout == b.layout and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()
        if a.layout == torch.strided and not a.is_nested:
            assert a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
        if a.is_nested:
            same(list(a.unbind()), list(b.unbind()))
        elif a.device.type != "meta":
            if a.layout != torch.strided:
                a, b = a.to_dense(), b.to_dense()
            if a.is_quantized:
                assert torch.equal(a.int_repr(), b.int_repr()) and a.qscheme() == b.qscheme()
            elif a.element_size() == 1 or a.dtype == torch.complex32:
                kind = torch.uint8 if a.element_size() == 1 else torch.int32
                assert torch.equal(a.view(kind), b.view(kind))
            else:
                assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    else:
        assert a == b


def training() -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 30)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def views() -> list[Any]:
    x = torch.arange(1000.0)
    tied = torch.nn.Parameter(torch.ones(4))
    return [
        *(x, x[5:], x.view(10, 100).t(), x, x[1000:], x.expand(3, 1000), tied, tied),
        *(torch.empty(0), torch.tensor(5), torch.zeros(1, 2, 3, 4), torch.zeros(2, 3)[:, 0:0]),
        *(torch.empty_strided((1, 3), (77, 1)).zero_(), torch.empty_strided((0, 3), (5, 9))),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.ones(3, requires_grad=True),
        torch.ones(3, requires_grad=True) * 2,
    ]


def dtypes() -> dict[str, Any]:
    names = [
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
        *("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64"),
        *("float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz"),
        "float8_e8m0fnu",
    ]
    return {
        name: torch.arange(96, dtype=torch.uint8).remainder(2).view(getattr(torch, name))
        for name in names
    }


def values() -> dict[str, Any]:
    return {
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:1"),
        "dtype": torch.float32,
        "numbers": [1, -1, 2**40, 1.5, 1j, True, None],
        "text": ["cpu", "storage", "0", "\u00e9"],
        "bytes": [b"", b"\xff", bytearray(b"x")],
        "sets": {1, "a"},
        "dict": OrderedDict(a=torch.ones(2)),
    }


def special() -> dict[str, Any]:
    state = torch.ones(2)
    state.note = "kept"
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "kept"
    return {
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "neg": torch.randn(4, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "tensor": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "channels": torch.quantize_per_channel(
            torch.ones(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.long), 0, torch.qint32
        ),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
        "meta": torch.empty(3, device="meta"),
        "state": state,
        "parameter": parameter,
        "storage": torch.arange(3.0).untyped_storage(),
    }


def objects_of_classes() -> list[Any]:
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.TransformerEncoderLayer(8, 2))
    return [model, torch.optim.SGD(model.parameters(), 0.1), np.arange(4), np.float32(2)]


OBJECTS = {
    "training": training,
    "views": views,
    "dtypes": dtypes,
    "values": values,
    "special": special,
    "classes": objects_of_classes,
    "nothing": lambda: None,
    "tensor": lambda: torch.ones(3),
}
#: Those that torch itself reads with weights_only.
PLAIN = ["training", "views", "dtypes", "values", "nothing", "tensor"]


@pytest.mark.parametrize("early", [None, 0, 100])
@pytest.mark.parametrize("name", OBJECTS)
def test_the_file_is_that_of_torch_but_for_its_identity(name: str, early: int | None) -> None:
    obj = OBJECTS[name]()
    if name == "values":
        obj["bytes"].remove(b"")  # see test_pickling
    expected = theirs(obj)
    found = assemble(obj, early=early, framework="torch")
    assert len(found) == len(expected)
    ours, other = records(found), records(expected)
    assert list(ours) == list(other)
    identity = "archive/.data/serialization_id"
    assert {key for key in ours if ours[key] != other[key]} == {identity}
    # Headers, paddings, descriptors and the directory too; the identity and its two CRCs.
    start = found.index(ours[identity])
    assert found[:start] == expected[:start]
    different = sum(a != b for a, b in zip(found, expected, strict=True))
    assert 0 < different <= 40 + 2 * 4


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("calculate", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_torch_reads_it_with_weights_only(
    name: str, calculate: bool, mmap: bool, tmp_path: Path
) -> None:
    obj = OBJECTS[name]()
    path = tmp_path / "model.pt"
    path.write_bytes(assemble(obj, stem="model"))
    with torch.utils.serialization.config.patch({"load.calculate_storage_offsets": calculate}):
        same(torch.load(path, weights_only=True, mmap=mmap), obj)


def test_torch_reads_the_special_ones() -> None:
    obj = special()
    del obj["storage"]
    same(torch.load(io.BytesIO(assemble(obj)), weights_only=True), obj)


def test_a_whole_module_runs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    back = torch.load(io.BytesIO(assemble(model)), weights_only=False)
    x = torch.randn(2, 3)
    assert torch.equal(back(x), model(x))


def test_memory_that_is_shared_stays_shared() -> None:
    found = torch.load(io.BytesIO(assemble(views())), weights_only=True)
    first = found[0].untyped_storage()
    assert all(tensor.untyped_storage()._cdata == first._cdata for tensor in found[:6])
    assert found[6] is found[7] and found[0] is found[3]


def test_no_checksums() -> None:
    obj = {"w": torch.arange(3.0), "empty": torch.empty(0)}
    with zipfile.ZipFile(io.BytesIO(assemble(obj, checksum=False))) as archive:
        crcs = {info.filename: info.CRC for info in archive.infolist()}
    assert crcs["archive/data/0"] == 0 and crcs["archive/data.pkl"] != 0
    same(torch.load(io.BytesIO(assemble(obj, checksum=False))), obj)


@pytest.mark.parametrize(
    ("stem", "root"),
    [
        ("model", "model"),
        ("a.b", "a.b"),
        ("my model-1", "my model-1"),
        ("", "archive"),
        (".hidden", "archive"),
        ("..", "archive"),
        ("a/b", "archive"),
        ("a\\b", "archive"),
        ("a:b", "archive"),
        ("a\nb", "archive"),
        ("modèle", "archive"),
    ],
)
def test_the_folder_of_the_records(stem: str, root: str) -> None:
    data = assemble(torch.ones(3), stem=stem)
    assert {name.partition("/")[0] for name in records(data)} == {root}
    same(torch.load(io.BytesIO(data)), torch.ones(3))


def test_options_of_the_plan() -> None:
    found = pickle_object(torch.ones(3))
    given: dict[str, Any] = {"framework": "torch", "metadata": None, "structure": found.data}
    given |= {"checksum": True, "stem": "x"}
    plan = torch_zip.plan(found.keys, found.batch, **given, alignment=4096)
    assert plan.offsets[0] % 4096 == 0
    assert b".storage_alignmentFB" in bytes(torch_zip.seal(plan, np.zeros(1, np.uint32), True).data)
    plan = torch_zip.plan(found.keys, found.batch, **given, byteorder_record=False)
    data = bytes(torch_zip.seal(plan, np.zeros(1, np.uint32), True).data)
    assert 0 < data.index(b"x/version") < data.index(b"x/byteorder")
    plan = torch_zip.plan(found.keys, found.batch, **given, data=False)
    assert plan.early is not None and not plan.early.any()
    torch_zip.seal(plan, None, True)
    assert len(torch_zip.seal(plan, None).offset) == 0
    with pytest.raises(ValueError, match="alignment"):
        torch_zip.plan(found.keys, found.batch, **given, alignment=0)


def test_metadata_and_the_framework_are_beside_what_torch_reads() -> None:
    obj = {"w": np.arange(6.0).reshape(2, 3).T}
    data = assemble(obj, metadata={"é": "1"})
    names = list(records(data))
    assert names[-3:] == ["archive/version", "archive/.holdfast", "archive/.data/serialization_id"]
    assert records(data)["archive/.holdfast"] == (
        b'{"framework":"numpy","metadata":{"\\u00e9":"1"}}'
    )
    back = torch.load(io.BytesIO(data), weights_only=True)["w"]
    assert back.dtype == torch.float64 and back.tolist() == obj["w"].tolist()
    assert "archive/.holdfast" not in records(assemble({"w": torch.ones(2)}))
    with pytest.raises(TypeError, match="metadata"):
        assemble(obj, metadata={"a": 1})  # type: ignore[dict-item]


def test_arrays_become_tensors_unless_there_are_tensors() -> None:
    x = np.arange(6, dtype=np.float32)
    base = np.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "x": x, "tie": x, "view": x[:], "part": x[2:], "f": base.transpose(2, 0, 1),
        "negative": base[::-1, :, ::2], "zero": np.broadcast_to(x[:1], (2, 3)),
        "swapped": x.astype(">f4")[::-1], "scalar": np.array(5), "empty": np.zeros((0, 3)),
        "bool": np.array([True, False]), "u2": np.arange(3, dtype=np.uint16),
        "half": np.ones(2, np.float16), "complex": np.ones(2, np.complex64) * 1j,
    }  # fmt: skip
    found = torch.load(io.BytesIO(assemble(arrays)), weights_only=True)
    for name, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert found[name].is_contiguous() and found[name].numpy().dtype == native.dtype
        assert found[name].numpy().tolist() == array.tolist() and found[name].shape == array.shape
    assert found["x"] is found["tie"]
    assert found["view"].data_ptr() == found["x"].data_ptr() != found["part"].data_ptr()
    for mixed in ({"a": x, "t": torch.ones(2)}, {"t": torch.ones(2), "a": x}):
        assert pickle_object(mixed).framework == "torch"
        assert (
            records(assemble(mixed))["archive/data.pkl"]
            == (records(theirs(mixed))["archive/data.pkl"])
        )
    assert type(torch.load(io.BytesIO(assemble(mixed)), weights_only=False)["a"]) is np.ndarray


def test_types_that_share_memory_are_refused_as_torch_does() -> None:
    x = torch.arange(4.0)
    mixed = {"a": x, "b": [x.view(torch.int32)]}
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        theirs(mixed)
    with pytest.raises(RuntimeError, match=r"^\$\['b'\]\[0\]: .*same data as different types"):
        pickle_object(mixed)
    fine = [x.view(torch.uint8), x.view(torch.uint16), x.view(torch.uint32)]
    assert records(theirs(fine)) == {
        **records(assemble(fine)),
        "archive/.data/serialization_id": records(theirs(fine))["archive/.data/serialization_id"],
    }


@pytest.mark.skipif(not hasattr(torch, "uint3"), reason="this torch has no such type")
def test_types_that_torch_has_and_cannot_save() -> None:
    with pytest.raises(KeyError, match="uint3 is not recognized"):
        theirs({"x": torch.empty(4, dtype=torch.uint3)})
    with pytest.raises(TypeError, match=r"\['x'\].*torch.uint3 is one that torch.save cannot hold"):
        pickle_object({"x": torch.empty(4, dtype=torch.uint3)})


def test_hooks_are_warned_of() -> None:
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="backward hook"):
        pickle_object({"x": x})


def test_inside_a_function_transform() -> None:
    def save(x: Any) -> Any:
        pickle_object({"a": [x]})
        return x

    with pytest.raises(Exception, match="."):
        torch.vmap(save)(torch.ones(3))


def test_without_the_exchange_interface() -> None:
    from holdfast.adapters.torch import TorchAdapter
    from holdfast.formats._pickle_emit import Emitter

    for make in OBJECTS.values():
        obj = make()
        storages = TorchAdapter(exchange=False).storages()
        emitter = Emitter(storages, TorchAdapter.plain_types, None, frozenset(), False)
        assert emitter.dump(obj) == pickle_object(obj, framework="torch").data
        other = pickle_object(obj, framework="torch").batch
        assert storages.batch().views["nbytes"].tolist() == other.views["nbytes"].tolist()


class Module:
    """A pickle module of someone's own."""

    Pickler = pickle._Pickler  # type: ignore[attr-defined]
    dump = staticmethod(pickle.dump)


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("name", ["training", "views", "special", "classes"])
def test_another_pickle_module(name: str, protocol: int) -> None:
    obj = OBJECTS[name]()
    expected = theirs(obj, pickle_module=Module, pickle_protocol=protocol)
    found = assemble(obj, pickle_module=Module, protocol=protocol, framework="torch")
    assert records(found)["archive/data.pkl"] == records(expected)["archive/data.pkl"]


def test_unzip_accepts_it(tmp_path: Path) -> None:
    unzip = shutil.which("unzip")
    if unzip is None:
        pytest.skip("unzip is not installed")
    path = tmp_path / "a.pt"
    path.write_bytes(assemble(training(), stem="a"))
    done = subprocess.run([unzip, "-t", path], capture_output=True, text=True)
    assert done.returncode == 0 and "No errors" in done.stdout


# -- the legacy stream ---------------------------------------------------------------------------


def operations(data: bytes) -> list[list[tuple[str, Any]]]:
    """The pickles at the beginning of a stream: each text in full, storage keys by their order.

    (Where torch makes a new text of the same key for each tensor, ours refers to the first.)
    """
    stream = io.BytesIO(data)
    found: list[list[tuple[str, Any]]] = []
    keys: dict[Any, str] = {}
    for _ in range(5):
        ops: list[tuple[str, Any]] = []
        memo: dict[int, int] = {}
        for op, arg, _ in pickletools.genops(stream):
            if op.name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = len(ops) - 1
            elif op.name in ("BINGET", "LONG_BINGET"):
                at = memo[arg]
                ops.append(ops[at] if ops[at][0] == "BINUNICODE" else ("GET", at))
            else:
                ops.append((op.name, arg))
        for i in range(2, len(ops)):
            if ops[i - 2] == ("BINUNICODE", "storage"):
                ops[i] = ("KEY", keys.setdefault(ops[i][1], str(len(keys))))
        found.append(ops)
    return found


@pytest.mark.parametrize("name", ["training", "views", "classes", "tensor", "nothing"])
def test_the_legacy_stream_is_that_of_torch(name: str) -> None:
    obj = OBJECTS[name]()
    expected = theirs(obj, _use_new_zipfile_serialization=False)
    found = assemble(obj, legacy=True, framework="torch")
    ours, other = operations(found), operations(expected)
    assert ours[:4] == other[:4]
    assert len(ours[4]) == len(other[4])  # the keys; theirs are addresses, sorted as text
    if name in ("tensor", "nothing"):
        back = torch.load(io.BytesIO(found), weights_only=True)
        same(back, obj)


@pytest.mark.parametrize("name", ["training", "views", "values"])
def test_torch_reads_the_legacy_stream(name: str) -> None:
    obj = OBJECTS[name]()
    same(torch.load(io.BytesIO(assemble(obj, legacy=True)), weights_only=True), obj)


def test_torch_reads_a_legacy_module_and_many_storages() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 3) for _ in range(12)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.serialization.SourceChangeWarning)
        back = torch.load(io.BytesIO(assemble(model, legacy=True)), weights_only=False)
    same(dict(back.state_dict()), dict(model.state_dict()))
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint32)
    same(torch.load(io.BytesIO(assemble([quantized], legacy=True)))[0], quantized)


def test_the_legacy_stream_has_no_place_for_metadata() -> None:
    with pytest.raises(ValueError, match="metadata"):
        assemble(torch.ones(2), legacy=True, metadata={"a": "b"})
    assert _torch_legacy_write.STRUCTURE == "legacy pickle"


# -- many ----------------------------------------------------------------------------------------


def test_many_tensors() -> None:
    obj = {f"layer.{i}": torch.full((3,), float(i)) for i in range(3000)}
    for legacy in (False, True):
        data = assemble(obj, legacy=legacy)
        same(torch.load(io.BytesIO(data), weights_only=True), obj)


def test_a_batch_keeps_its_storages_alive() -> None:
    found = pickle_object([torch.full((1000,), float(i)) for i in range(50)])
    torch.zeros(100_000)  # would reuse what was freed
    assert isinstance(found.batch, TensorBatch)
    kept = [torch.tensor(owner)[:4].tolist() for owner in found.batch.owners[:1]]
    assert kept == [[0, 0, 0, 0]]
    assert all(owner.nbytes() == 4000 for owner in found.batch.owners)
