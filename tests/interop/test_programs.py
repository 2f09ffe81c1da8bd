"""TorchScript modules and exported programs: loaded, mapped, run and saved, beside torch itself."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import holdfast  # noqa: E402
import holdfast.torch.export  # noqa: E402
import holdfast.torch.jit  # noqa: E402
import program_files as files  # noqa: E402

EXPECTED = files.expected()
SCRIPTS = [path for path in files.PROGRAMS if path.suffix == ".pt"]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")


class Inner(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Every way in which a module can hold a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0).reshape(2, 2))
        self.tied = self.weight
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("buffer", torch.arange(3))
        self.register_buffer("fleeting", torch.ones(2), persistent=False)
        base = torch.arange(10.0)
        self.register_buffer("view", base[2:6])
        self.plain = torch.full((3,), 7.0)
        self.list = [torch.ones(1), torch.full((2,), 2.0)]
        self.many = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(n)) for n in (1, 2)])
        self.register_parameter("none", None)

    def forward(self, x):  # type: ignore[no-untyped-def]
        sums = self.weight.sum() + self.tied.sum() + self.frozen.sum() + self.fleeting.sum()
        return x + sums + self.buffer.sum() + self.view.sum() + self.plain.sum() + self.list[1][0]


class Outer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Modules in modules, one of them twice, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Inner()
        self.b = self.a
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        self.last = torch.nn.Linear(3, 3)
        self.last.weight = self.layers[0].weight

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.layers(self.a(x)) + self.b(x) + self.last(x)


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A model with weights large enough to be seen in the process's memory."""

    def __init__(self, width: int = 2048, layers: int = 4) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(layers)])
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.constant = torch.full((width,), 0.25)

    def forward(self, x):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            x = torch.relu(layer(x)) * self.scale + self.constant
        return x


def _same(a: Any, b: Any) -> None:
    """Both have the same tensors under the same names, and those that share memory share it."""
    left, right = dict(a.state_dict()), dict(b.state_dict())
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name])
    assert _ties(left) == _ties(right)


def _ties(tensors: dict[str, Any]) -> list[list[int]]:
    where = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    return [[i for i, other in enumerate(where) if other == at] for at in where]


@pytest.mark.parametrize("path", files.PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("mmap", [True, False])
def test_weights_of_every_era(path: Path, mmap: bool) -> None:
    state = EXPECTED[path.name]["state"]
    found = holdfast.load(path, mmap=mmap)
    assert set(found) == set(state) and len(found) >= 10
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad
        want = state[name]
        assert files.digest(tensor) == (want["dtype"], want["shape"], want["sha256"])
    with holdfast.open(path) as f:
        assert set(f) == set(state)
        assert f.info("fc.weight").shape == (5, 256)


@pytest.mark.parametrize("path", files.PROGRAMS, ids=lambda path: path.name)
@pytest.mark.parametrize("mmap", [True, False])
def test_programs_of_every_era_run(path: Path, mmap: bool) -> None:
    program = holdfast.load(path, weights_only=False, mmap=mmap)
    runnable = program.module() if path.suffix == ".pt2" else program
    x = torch.tensor(EXPECTED[path.name]["input"])
    want = torch.tensor(EXPECTED[path.name]["output"])
    torch.testing.assert_close(runnable(x), want)
    if path.suffix == ".pt":
        reference = torch.jit.load(path)
        _same(program, reference)
        assert torch.equal(program(x), reference(x))
        assert type(program) is type(reference) and program.training == reference.training
        assert [n for n, _ in program.named_modules()] == [n for n, _ in reference.named_modules()]
        assert program.code == reference.code


@pytest.mark.parametrize("mmap", [True, False])
def test_script_with_everything_in_it(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "m.pt"
    module = files.script(Outer())
    holdfast.save(module, path)
    reference = torch.jit.load(path)
    found = holdfast.torch.jit.load(path, mmap=mmap)
    _same(found, reference)
    for (name, a), (_, b) in zip(
        found.named_parameters(remove_duplicate=False),
        reference.named_parameters(remove_duplicate=False),
        strict=True,
    ):
        assert a.requires_grad == b.requires_grad, name
    assert found.a.plain.tolist() == [7.0] * 3
    assert [t.tolist() for t in found.a.list] == [[1.0], [2.0, 2.0]]
    assert found.a.view.tolist() == [2.0, 3.0, 4.0, 5.0]
    x = torch.ones(3)
    assert torch.equal(found(x), reference(x))
    weights = holdfast.load(path, mmap=mmap)
    assert list(weights) == list(reference.state_dict())
    assert _ties(weights) == _ties(dict(reference.state_dict()))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_training_goes_on_in_a_mapped_module(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    files.script(Net(16, 2)).save(str(path))
    before = path.read_bytes()
    module = holdfast.torch.jit.load(path, mmap=True)
    module(torch.ones(1, 16)).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert path.read_bytes() == before
    path.unlink()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_constants_are_handed_over_too(tmp_path: Path, frozen: bool, mmap: bool) -> None:
    """A traced module has constants beside its weights, a frozen one nothing else."""
    path = tmp_path / "m.pt"
    module = files.trace(Net(16, 2).eval(), torch.ones(1, 16))
    if frozen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.freeze(module)
    module.save(str(path))
    names = zipfile.ZipFile(path).namelist()
    assert any("/constants/" in name for name in names)
    if not frozen:
        assert {"m/data/0", "m/constants/0"} <= set(names), "one key in both pickles"
    found = holdfast.torch.jit.load(path, mmap=mmap)
    x = torch.randn(3, 16)
    assert torch.equal(found(x), torch.jit.load(path)(x))
    assert len(holdfast.load(path)) == len(found.state_dict())


def test_functions(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    holdfast.save(files.script(_double), path)
    assert holdfast.load(path, weights_only=False)(torch.ones(2)).tolist() == [2, 2]
    assert holdfast.load(path) == {}


class Special(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Tensors that are more than their elements, beside others of rare kinds."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
        self.register_buffer("quantized", whole)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
        self.register_buffer("brief", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.quantized.dequantize() + x + self.conjugate.real + self.brief.sum()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_special_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    module = files.script(Special())
    holdfast.save(module, path)
    for mmap in (True, False):
        found = holdfast.torch.jit.load(path, mmap=mmap)
        assert torch.equal(found(torch.ones(4)), module(torch.ones(4)))
        assert torch.equal(found.quantized.int_repr(), module.quantized.int_repr())
        assert torch.equal(found.sparse.to_dense(), torch.eye(3))
        with pytest.raises(TypeError, match=r"m\.pt: tensor 'quantized' is quantized, sparse"):
            holdfast.load(path, mmap=mmap)
        some = holdfast.load(path, mmap=mmap, keys=["conjugate", "e*"])
        assert some["conjugate"].tolist() == [1 - 2j] and some["empty"].shape == (0, 3)
    with holdfast.open(path) as f:
        assert list(f) == ["conjugate", "brief", "eighth", "empty"]
        assert f["brief"].tolist() == [1, 1, 1]


def _double(x):  # type: ignore[no-untyped-def]
    return x * 2


@pytest.mark.parametrize("kind", ["path", "file"])
def test_jit_signatures(tmp_path: Path, kind: str) -> None:
    module = files.script(Net(16, 1))
    extra = {"a.txt": b"bytes\xff", "folder/b": "text"}
    path = tmp_path / "m.pt"
    target: Any = path if kind == "path" else io.BytesIO(b"before")
    if kind == "file":
        target.seek(6)
    holdfast.torch.jit.save(module, target, extra)
    if kind == "file":
        target.seek(6)
    asked: dict[str, Any] = {"a.txt": "", "folder/b": "", "absent": "replaced"}
    found = holdfast.torch.jit.load(target, "cpu", asked)
    assert asked == {"a.txt": b"bytes\xff", "folder/b": b"text", "absent": b""}
    _same(found, module)
    if kind == "path":
        theirs: dict[str, Any] = {"a.txt": "", "folder/b": "", "absent": "replaced"}
        torch.jit.load(path, _extra_files=theirs)
        assert theirs == asked
        assert zipfile.ZipFile(path).testzip() is None
        assert zipfile.ZipFile(path).namelist()[0].startswith("m/")


def test_map_location(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    files.script(Net(16, 1)).save(str(path))
    meta = holdfast.torch.jit.load(path, map_location=torch.device("cpu"))
    assert all(p.device.type == "cpu" for p in meta.parameters())
    with pytest.raises(ValueError, match="map_location"):
        holdfast.torch.jit.load(path, map_location={"cpu": "cuda"})
    with pytest.raises(ValueError, match="move it with"):
        holdfast.load(files.FOLDER / "export-torch2.13.0.pt2", "cpu", weights_only=False)


def test_shapes_are_restored_by_torch() -> None:
    path = files.FOLDER / "trace-torch2.13.0.pt"
    found = holdfast.torch.jit.load(path, _restore_shapes=True)
    x = torch.tensor(EXPECTED[path.name]["input"])
    assert torch.equal(found(x), torch.jit.load(path)(x))
    with pytest.raises(ValueError, match="torch itself"):
        holdfast.torch.jit.load(path, _restore_shapes=True, mmap=True)


_MEMORY = """
import gc, sys, warnings
warnings.simplefilter("ignore")
import torch
import holdfast, holdfast.torch.jit, holdfast.torch.export

def private():
    # What of the process is in memory that no file backs, and what of the file it has changed.
    anonymous = file = dirty = 0
    mine = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0]:
            mine = sys.argv[1] in line
        key, _, value = line.partition(":")
        if key == "Anonymous":
            if mine:
                dirty += int(value.split()[0]) << 10
            else:
                anonymous += int(value.split()[0]) << 10
        elif key == "Rss" and mine:
            file += int(value.split()[0]) << 10
    return anonymous, file, dirty

x = torch.ones(1, int(sys.argv[3]))
script = sys.argv[2] == "script"
load = holdfast.torch.jit.load if script else holdfast.torch.export.load
load(sys.argv[4], mmap=True)  # whatever the first load of all needs
gc.collect()
before = private()[0]
program = load(sys.argv[1], mmap=True)
run = program if script else program.module()
with torch.no_grad():
    y = run(x)
after, file, dirty = private()
print(after - before, file, dirty)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="no /proc")
@pytest.mark.parametrize("kind", ["script", "frozen", "export"])
def test_mapped_weights_are_not_copied(tmp_path: Path, kind: str) -> None:
    width = 1024
    paths = [tmp_path / name for name in ("big.pt2", "small.pt2")]
    for path, layers in zip(paths, (12, 1), strict=True):
        net = Net(width, layers).eval()
        if kind == "export":
            torch.export.save(torch.export.export(net, (torch.ones(1, width),)), path)
        else:
            made = files.trace(net, torch.ones(1, width)) if kind == "frozen" else files.script(net)
            if kind == "frozen":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    made = torch.jit.freeze(made, optimize_numerics=False)
            made.save(str(path))
    size = paths[0].stat().st_size
    assert size > 48 << 20
    how = "export" if kind == "export" else "script"
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, paths[0], how, str(width), paths[1]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, file, dirty = map(int, done.stdout.split())
    assert file > size * 0.9, "the weights were used where the file is mapped"
    assert dirty == 0, "and not written to"
    assert grown < size / 4, "and nothing like them is in memory besides"


# -- exported programs ---------------------------------------------------------------------------


@pytest.fixture
def program() -> Any:
    return torch.export.export(Net(16, 2).eval(), (torch.ones(1, 16),))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("era", ["now", "old", "deflated", "intermediate"])
def test_exported_programs(tmp_path: Path, program: Any, era: str, mmap: bool) -> None:
    path = tmp_path / "p.pt2"
    if era == "now":
        holdfast.save(program, path)
    elif era == "intermediate":
        files.intermediate(program, path)
    else:
        files.old(program, path, 8 if era == "deflated" else 0)
    extra: dict[str, Any] = {}
    found = holdfast.torch.export.load(path, mmap=mmap, extra_files=extra)
    assert extra == ({"note.txt": "old"} if era in ("old", "deflated") else {})
    x = torch.randn(1, 16)
    assert torch.equal(found.module()(x), program.module()(x))
    assert list(found.state_dict) == list(program.state_dict)
    for name, tensor in program.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor)
        assert type(found.state_dict[name]) is type(tensor)
    if era == "deflated":
        with pytest.raises(holdfast.FormatError, match="deflated"):
            holdfast.load(path)
        return
    weights = holdfast.load(path, mmap=mmap)
    assert list(weights) == list(program.state_dict)
    for name, tensor in weights.items():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad
        assert torch.equal(tensor, program.state_dict[name])


def test_export_signatures(tmp_path: Path, program: Any) -> None:
    path = tmp_path / "p.pt2"
    holdfast.torch.export.save(program, path, extra_files={"note.txt": "text"})
    for load in (torch.export.load, holdfast.torch.export.load):
        extra = {"note.txt": ""}
        found = load(path, extra_files=extra)
        assert extra == {"note.txt": "text"}
        assert torch.equal(found.state_dict["scale"], program.state_dict["scale"])
    assert zipfile.ZipFile(path).namelist()[0].startswith("p/")
    buffer = io.BytesIO()
    holdfast.torch.export.save(program, buffer)
    buffer.seek(0)
    assert list(holdfast.torch.export.load(buffer).state_dict) == list(program.state_dict)
    with pytest.raises(TypeError, match="must be an instance of 'ExportedProgram'"):
        holdfast.torch.export.save(Net(2, 1), path)


def test_tied_weights_of_an_exported_program(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(4, 4)
            self.b = torch.nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("base", torch.arange(8.0))
            self.register_buffer("part", self.base[3:7])
            self.register_buffer("turned", self.base.view(2, 4).t())

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.a(x) + self.b(x) + self.base.sum() + self.part + self.turned.sum()

    path = tmp_path / "t.pt2"
    holdfast.save(torch.export.export(Tied(), (torch.ones(4),)), path)
    reference = torch.export.load(path)
    for mmap in (True, False):
        found = holdfast.torch.export.load(path, mmap=mmap)
        x = torch.randn(4)
        assert torch.equal(found.module()(x), reference.module()(x))
        assert _ties(dict(found.state_dict)) == _ties(dict(reference.state_dict))
        weights = holdfast.load(path, mmap=mmap)
        assert _ties(weights) == _ties(dict(reference.state_dict))
        for name, tensor in reference.state_dict.items():
            assert torch.equal(weights[name], tensor), name


# -- saving --------------------------------------------------------------------------------------


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    holdfast.save(files.script(Net(16, 1)), path)
    path.chmod(0o640)
    first = path.read_bytes()

    with pytest.raises(TypeError, match="must be a ScriptModule"):
        holdfast.torch.jit.save(torch.nn.Linear(2, 2), path)
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["m.pt"]
    holdfast.save(files.script(Net(16, 2)), path)
    assert path.read_bytes() != first and os.listdir(tmp_path) == ["m.pt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(RuntimeError) as error:
        holdfast.torch.jit.save(files.script(Net(16, 1)), tmp_path / "none" / "m.pt")
    assert isinstance(error.value, FileNotFoundError)


def test_saving_to_a_full_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch that stops half way leaves the old file."""
    path = tmp_path / "m.pt"
    module = files.script(Net(16, 1))
    holdfast.save(module, path)
    first = path.read_bytes()
    real = torch.jit.RecursiveScriptModule.save

    def cut(self: Any, f: str, **options: Any) -> None:
        real(self, f, **options)
        os.truncate(f, 1000)

    monkeypatch.setattr(torch.jit.RecursiveScriptModule, "save", cut)
    with pytest.raises(OSError, match="only a part"):
        holdfast.save(module, path)
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["m.pt"]


def test_which_format_holds_a_program(tmp_path: Path, program: Any) -> None:
    for path in ("m.safetensors", "m.npz"):
        with pytest.raises((TypeError, ValueError), match=r"\.pt"):
            holdfast.save(files.script(Net(2, 1)), tmp_path / path)
    with pytest.raises((TypeError, ValueError), match=r"\.pt2"):
        holdfast.save(program, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    module = files.script(Net(16, 1))
    module.save(str(path))
    data = bytearray(path.read_bytes())
    at = data.index(module.layers[0].weight.detach().numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(holdfast.ChecksumError):
        holdfast.torch.jit.load(path)
    with pytest.raises(holdfast.ChecksumError):
        holdfast.load(path, weights_only=False, mmap=True, verify=True)
    holdfast.torch.jit.load(path, mmap=True)
    for bad in (b"", b"PK\x03\x04", b"nonsense", bytes(data[:-40])):
        path.write_bytes(bad)
        with pytest.raises(RuntimeError) as error:
            holdfast.torch.jit.load(path)
        assert isinstance(error.value, holdfast.FormatError)
