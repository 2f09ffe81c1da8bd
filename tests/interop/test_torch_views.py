"""Tensors that share storages: opened, filled from, and taken to NumPy."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def sample() -> dict[str, Any]:
    torch.manual_seed(2)
    base = torch.arange(24.0)
    matrix = torch.randn(6, 5)
    c64 = torch.randn(4, 3, dtype=torch.complex64)
    return {
        "base": base,
        "part": base[3:9],
        "other": base[5:20],
        "again": base.detach(),
        "step": base[1::3],
        "T": matrix.T,
        "column": matrix[:, 2],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "conj": c64.conj(),
        "neg": torch._neg_view(torch.randn(3, 2)),
        "both": torch._neg_view(torch.randn(5, dtype=torch.complex128)).conj(),
        "imag": torch.randn(4, dtype=torch.complex64).conj().imag,
        "half": torch.randn(9).to(torch.bfloat16)[1:],
        "u2": torch.arange(700, 710).to(torch.uint16)[2:],
        "bool": torch.rand(5) > 0.5,
        "empty": torch.zeros(0, 3)[:, 1:],
        "scalar": base[7],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


def resolved(tensor: Any) -> Any:
    """The values of a tensor, dense, with nothing lazy."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def deflated(data: bytes) -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


@pytest.fixture(params=["holdfast", "torch", "legacy", "deflated"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "x.pt"
    if request.param == "torch":
        torch.save(sample(), path)
    elif request.param == "legacy":
        torch.save(sample(), path, _use_new_zipfile_serialization=False)
    else:
        holdfast.save(sample(), path)
        if request.param == "deflated":
            path.write_bytes(deflated(path.read_bytes()))
            assert torch.equal(torch.load(path)["part"], sample()["part"])
    return path


@pytest.fixture(params=["mapped", "read", "stream"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "read":
        monkeypatch.setattr(_engine, "filesystem", lambda fd: 0x6969)
    return request.param


def given(path: Path, where: str) -> Any:
    return io.BytesIO(path.read_bytes()) if where == "stream" else path


def test_open(path: Path, where: str) -> None:
    expected = sample()
    with holdfast.open(given(path, where)) as f:
        assert list(f) == list(expected)
        f.prefetch("s*")
        for name, tensor in expected.items():
            info = f.info(name)
            assert (info.shape, info.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
            assert torch.equal(f[name], tensor), name
            assert f[name].is_conj() == tensor.is_conj() and f[name].is_neg() == tensor.is_neg()
            assert type(f[name]) is type(tensor)
            if tensor.dim():
                assert torch.equal(f.slice(name)[1:], tensor[1:]), name
            if tensor.dim() and len(tensor):
                assert torch.equal(f.slice(name)[-1], tensor[-1]), name
        f.prefetch()


def test_numpy(path: Path, where: str) -> None:
    pytest.importorskip("ml_dtypes")
    expected = sample()
    found = holdfast.load(given(path, where), framework="numpy")
    with holdfast.open(given(path, where), framework="numpy") as f:
        for name, tensor in expected.items():
            for array in (found[name], f[name]):
                assert type(array) is np.ndarray and array.shape == tuple(tensor.shape), name
                assert str(array.dtype) == str(tensor.dtype)[6:]
                wanted = resolved(tensor)
                if name == "half":
                    array, wanted = array.view("i2"), wanted.view(torch.int16)
                assert np.array_equal(array, wanted.numpy()), name
    assert not found["expanded"].flags.writeable
    assert all(found[name].flags.writeable for name in expected if name != "expanded")
    # What shared memory shares it.
    for name in ("part", "other", "again", "step", "scalar"):
        assert np.shares_memory(found["base"], found[name]), name
    found["base"][...] = -1
    assert (found["part"] == -1).all() and found["scalar"] == -1
    assert not np.shares_memory(found["base"], found["T"])
    assert np.shares_memory(found["T"], found["column"])


def test_complex32_has_no_numpy(tmp_path: Path) -> None:
    obj = {"c": torch.zeros(3, dtype=torch.complex32), "x": torch.ones(2)}
    torch.save(obj, tmp_path / "x.pt")
    with pytest.raises(TypeError, match=r"x\.pt: complex32: NumPy has no such type"):
        holdfast.load(tmp_path / "x.pt", framework="numpy")
    assert holdfast.load(tmp_path / "x.pt", framework="numpy", keys="x")["x"].sum() == 2
    with holdfast.open(tmp_path / "x.pt", framework="numpy") as f:
        assert f["x"].sum() == 2
        with pytest.raises(TypeError, match="complex32"):
            f["c"]
    assert holdfast.load(tmp_path / "x.pt")["c"].dtype is torch.complex32


def test_keys(path: Path, where: str) -> None:
    expected = sample()
    found = holdfast.load(given(path, where), keys=["part", "e*", "?eg"])
    assert list(found) == ["part", "expanded", "neg", "empty"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    one = holdfast.load(given(path, where), keys="conj")
    assert torch.equal(one["conj"], expected["conj"])
    shared = holdfast.load(given(path, where), keys=["part", "other"])
    shared["part"][2:] = -5.0
    assert (shared["other"][:4] == -5).all()


def test_load_into(path: Path, where: str) -> None:
    """Entries that overlap in the file fill tensors that do not."""
    expected = sample()
    target = {
        name: torch.full(tuple(tensor.shape), 1).to(tensor.dtype)
        for name, tensor in expected.items()
    }
    target["base"] = torch.zeros(2, 24)[:, ::2].reshape(24)[:24].clone()
    target["T"] = torch.zeros(6, 5).T
    target["parameter"] = torch.nn.Parameter(torch.zeros(2, 2))
    keys = holdfast.load_into(target, given(path, where))
    assert keys == ([], [])
    for name, tensor in expected.items():
        assert torch.equal(target[name], tensor), name
    assert target["parameter"].requires_grad
    wide = {name: torch.zeros(tuple(expected[name].shape), dtype=torch.float64)
            for name in ("base", "part", "T", "step", "u2", "half", "neg")}  # fmt: skip
    holdfast.load_into(wide, given(path, where), strict=False)
    for name in wide:
        assert torch.equal(wide[name], resolved(expected[name]).double()), name


def test_load_into_arrays(path: Path) -> None:
    expected = sample()
    names = ["base", "other", "T", "conj", "neg", "both", "expanded", "u2", "step", "scalar"]
    target = {
        name: np.zeros(tuple(expected[name].shape), str(expected[name].dtype)[6:]) for name in names
    }
    holdfast.load_into(target, path, strict=False)
    for name in names:
        assert np.array_equal(target[name], resolved(expected[name]).numpy()), name


def network(tied: bool) -> Any:
    nn = torch.nn
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    if tied:
        net["head"].weight = net["embed"].weight
    return net


@pytest.mark.parametrize("by", ["holdfast", "torch"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_fill_modules(tmp_path: Path, by: str, tied: bool) -> None:
    """state_dict() has one storage under two names, whether the module filled ties them or not."""
    torch.manual_seed(1)
    net = network(True)
    save = holdfast.save if by == "holdfast" else torch.save
    save(net.state_dict(), tmp_path / "x.pt")
    other = network(tied)
    assert holdfast.load_into(other, tmp_path / "x.pt") == ([], [])
    assert torch.equal(other["head"].weight, net["embed"].weight)
    assert torch.equal(other["embed"].weight, net["embed"].weight)


def test_damage_in_what_is_shared(tmp_path: Path) -> None:
    """The checksum is that of the storage: whichever view is wanted, all of it is checked."""
    path = tmp_path / "x.pt"
    holdfast.save(sample(), path)
    data = bytearray(path.read_bytes())
    with holdfast.open(path) as f:
        at = f.info("base").offset
    data[at + 4 * 22] ^= 1  # in the base, not in the part
    path.write_bytes(data)
    report = holdfast.verify(path)
    assert len(report.problems) == 1 and "tensor 'base'" in report.problems[0]
    for target in ({"part": torch.zeros(6)}, {"part": torch.zeros(6).double()},
                   {"step": torch.zeros(8)}):  # fmt: skip
        before = {name: tensor.clone() for name, tensor in target.items()}
        with pytest.raises(holdfast.ChecksumError, match="tensor 'base'"):
            holdfast.load_into(target, path, strict=False)
        assert all(torch.equal(target[name], before[name]) for name in target)
    with pytest.raises(holdfast.ChecksumError, match="tensor 'base'"):
        holdfast.load(path, mmap=False, keys="part")
    assert torch.equal(holdfast.load(path, mmap=False, keys="T")["T"], sample()["T"])
    for mmap in (True, False):
        assert torch.equal(holdfast.load(path, verify=False, mmap=mmap)["part"], sample()["part"])


def big_endian(data: bytes, obj: dict[str, Any]) -> bytes:
    """What a machine of the other byte order would have written of tensors, each of a storage."""
    from zip_files import Record, build

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = []
        for name in archive.namelist():
            content = archive.read(name)
            if name == f"{root}/byteorder":
                content = b"big"
            elif name.startswith(f"{root}/data/"):
                tensor = list(obj.values())[int(name.rpartition("/")[2])]
                unit = tensor.element_size() // (2 if tensor.is_complex() else 1)
                content = np.frombuffer(content, f"u{unit}").byteswap().tobytes()
            records.append(Record(name, content))
    return build(records)


def test_the_other_byte_order() -> None:
    dtypes = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
        *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
        *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn),
    ]
    obj = {str(dtype): (torch.arange(1000, 1007) * 3).to(dtype) for dtype in dtypes}
    out = io.BytesIO()
    torch.save(obj, out)
    swapped = big_endian(out.getvalue(), obj)
    later = ("torch.uint16", "torch.uint32", "torch.uint64")  # of which torch swaps nothing
    by_torch = torch.load(io.BytesIO(swapped))
    for mmap in (None, False):
        found = holdfast.load(io.BytesIO(swapped), mmap=mmap)
        for name, tensor in obj.items():
            assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
            if name not in later:
                same = by_torch[name].view(torch.uint8).equal(tensor.view(torch.uint8))
                assert same, name
    assert holdfast.verify(io.BytesIO(swapped)).checked == len(dtypes)


def test_the_other_byte_order_of_mixed_views() -> None:
    """Bytes that are numbers of two sizes at once have no order that is right for both."""
    words = torch.arange(6).to(torch.uint32)
    obj = {"words": words, "halves": words.view(torch.uint16)}
    out = io.BytesIO()
    torch.save(obj, out)
    assert torch.equal(holdfast.load(io.BytesIO(out.getvalue()))["halves"], obj["halves"])
    swapped = big_endian(out.getvalue(), obj)
    with pytest.raises(holdfast.FormatError, match="'words' and 'halves'.*found 4 and 2 bytes"):
        holdfast.load(io.BytesIO(swapped))
