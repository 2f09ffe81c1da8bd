"""Storages that cannot be used as they stand: deflated, in the other byte order, misaligned."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast import _engine
from holdfast.layout import CHECKED, FOREIGN
from torch_archives import archive, damaged, rewritten
from torch_files import assemble

NUMPY: dict[str, Any] = {"framework": "numpy"}


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(11)
    return {
        "f4": rng.random((40, 30), "f4"),
        "u1": rng.integers(0, 255, 1001).astype("u1"),
        "bool": rng.random(77) > 0.5,
        "f8": rng.random((3, 1, 5)),
        "empty": np.zeros((0, 7), "i8"),
        "scalar": np.array(-5, "i2"),
        "c16": rng.random(9) + 1j * rng.random(9),
        "zeros": np.zeros(300_000, "i4"),
        "step": 3,
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype, name
            assert np.array_equal(found[name], value), name
        else:
            assert found[name] == value
    return True


MAKE = {
    "plain": lambda obj: archive(obj),
    "deflated": lambda obj: archive(obj, method=8),
    "rewritten": lambda obj: rewritten(assemble(obj)),
    "little": lambda obj: archive(obj, byteorder="little"),
    "big": lambda obj: archive(obj, byteorder="big"),
    "big, deflated": lambda obj: archive(obj, byteorder="big", method=8),
    "odd": lambda obj: archive(obj, odd=True),
    "odd, big": lambda obj: archive(obj, odd=True, byteorder="big"),
    "unchecked": lambda obj: archive(obj, checksum=False),
}


@pytest.fixture(params=MAKE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(MAKE[request.param](sample()))
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_load(made: Path, mmap: bool) -> None:
    found = holdfast.load(made, mmap=mmap, **NUMPY)
    assert same(found, sample())
    for array in found.values():
        if isinstance(array, np.ndarray):
            assert array.flags.aligned and array.flags.writeable
            array[...] = 0  # private: neither the file nor another load sees it
    assert same(holdfast.load(made, mmap=mmap, **NUMPY), sample())
    assert same(holdfast.load(io.BytesIO(made.read_bytes()), **NUMPY), sample())


def test_the_archives_are_what_they_should_be() -> None:
    """What the others here test is there to be tested."""
    from holdfast.formats import archive as form

    def storages(kind: str) -> np.ndarray:
        data = MAKE[kind](sample())
        found = form.index(lambda at, n: data[at : at + n], len(data), "x").storages
        assert found is not None and len(found) == 8
        return found

    assert (storages("plain")["packed"] == 0).all()
    assert (storages("plain")["flags"] == CHECKED).all()
    assert (storages("unchecked")["flags"] == np.where(storages("unchecked")["nbytes"], 0, 1)).all()
    for kind in ("deflated", "rewritten"):
        assert (storages(kind)["packed"] > 0).all()
        assert storages(kind)["packed"][7] < 3000
    assert (storages("big")["flags"] & FOREIGN).all()
    assert not (storages("little")["flags"] & FOREIGN).any()
    assert (storages("odd")["offset"] % 2 == 1).all()


def test_open(made: Path) -> None:
    expected = sample()
    with holdfast.open(made, **NUMPY) as f:
        assert list(f) == [name for name in expected if name != "step"]
        for name in f:
            info = f.info(name)
            assert info.shape == expected[name].shape and info.nbytes == expected[name].nbytes
            assert np.array_equal(f[name], expected[name])
        assert np.array_equal(f.slice("f4")[3:7, ::2], expected["f4"][3:7, ::2])
        assert np.array_equal(f.slice("zeros")[-1:], [0])
        f.prefetch()
        f.prefetch("z*")
        assert f["f8"].shape == (3, 1, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_open_without_a_map(made: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "filesystem", lambda fd: 0x6969)
    source: Any = io.BytesIO(made.read_bytes()) if stream else made
    expected = sample()
    with holdfast.open(source, **NUMPY) as f:
        assert np.array_equal(f.slice("f4")[3:7, ::2], expected["f4"][3:7, ::2])
        assert np.array_equal(f.slice("c16")[2], expected["c16"][2])
        assert np.array_equal(f["scalar"], expected["scalar"])
        f.prefetch("f*")
        f.prefetch()
        assert np.array_equal(f["f8"], expected["f8"])
        with pytest.raises(IndexError, match="index 40"):
            f.slice("f4")[40]


def test_keys(made: Path) -> None:
    expected = sample()
    found = holdfast.load(made, keys=["c*", "u1"], **NUMPY)
    assert list(found) == ["u1", "c16"]
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    with pytest.raises(KeyError, match="no tensor is called 'nothing'"):
        holdfast.load(made, keys="nothing", **NUMPY)


def test_load_into(made: Path) -> None:
    expected = sample()
    target = {
        name: np.ones(value.shape, value.dtype)
        for name, value in expected.items()
        if isinstance(value, np.ndarray)
    }
    target["f4"] = np.ones((30, 40), "f4").T  # strided
    target["u1"] = np.ones(1001)  # converted
    target["f8"] = np.ones((3, 1, 5), ">f8")
    keys = holdfast.load_into(target, made)
    assert keys == ([], [])
    assert all(np.array_equal(target[name], expected[name]) for name in target)


def test_verify(made: Path, request: pytest.FixtureRequest) -> None:
    report = holdfast.verify(made)
    assert report.ok
    unchecked = "unchecked" in request.node.name
    assert (report.checked, report.unchecked) == ((1, 7) if unchecked else (8, 0))


def test_convert(made: Path, tmp_path: Path) -> None:
    holdfast.convert(made, tmp_path / "model.safetensors")
    assert same(holdfast.load(tmp_path / "model.safetensors", **NUMPY), sample())
    holdfast.convert(made, tmp_path / "again.pt")
    assert same(holdfast.load(tmp_path / "again.pt", **NUMPY), sample())


@pytest.mark.parametrize("kind", ["plain", "big", "odd"])
@pytest.mark.parametrize("stream", [True, False])
def test_damage(kind: str, stream: bool, tmp_path: Path) -> None:
    obj = sample()
    order = ">" if kind == "big" else "<"
    data = damaged(MAKE[kind](obj), obj["f8"].astype(f"{order}f8").tobytes())
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    source: Any = io.BytesIO(data) if stream else path
    report = holdfast.verify(source)
    assert len(report.problems) == 1 and not report
    assert "tensor 'f8'" in report.problems[0] and "120 bytes at offset" in report.problems[0]
    if stream:
        source.seek(0)
    with pytest.raises(holdfast.ChecksumError, match=r"tensor 'f8'.*expected CRC-32 .*, found"):
        holdfast.load(source, mmap=False, **NUMPY)
    if not stream:
        with pytest.raises(holdfast.ChecksumError, match="tensor 'f8'"):
            holdfast.load(path, mmap=True, verify=True, **NUMPY)
        target = {"f8": np.zeros((3, 1, 5))}
        with pytest.raises(holdfast.ChecksumError, match="tensor 'f8'"):
            holdfast.load_into(target, path, strict=False)
        for name in ("out.pt", "out.safetensors"):
            with pytest.raises(holdfast.ChecksumError, match="tensor 'f8'"):
                holdfast.convert(path, tmp_path / name)
            assert not (tmp_path / name).exists()
        half = {"f8": np.zeros((3, 1, 5), "f4")}
        with pytest.raises(holdfast.ChecksumError, match="tensor 'f8'"):
            holdfast.load_into(half, path, strict=False)
        found = holdfast.load(path, keys="f4", mmap=False, **NUMPY)
        assert np.array_equal(found["f4"], obj["f4"])
    # What is mapped is not read, so nothing is said.
    assert holdfast.load(path, verify=False, **NUMPY)["step"] == 3


def test_damage_where_deflated(tmp_path: Path) -> None:
    """Every bit of a deflated storage: told by the checksum, or by what inflates it."""
    value = np.arange(40, dtype="u1") % 7
    whole = bytearray(archive({"x": value}, method=8))
    path = tmp_path / "x.pt"
    path.write_bytes(whole)
    with holdfast.open(path, **NUMPY) as f:
        start = f.info("x").offset
    flips = unseen = 0
    stop = bytes(whole).index(b"PK\x03\x04", start)
    for place in range(start, stop):
        for bit in range(8):
            whole[place] ^= 1 << bit
            if holdfast.verify(io.BytesIO(whole)).ok:
                unseen += 1  # the bits after the end of what is deflated
                found = holdfast.load(io.BytesIO(whole), mmap=False, **NUMPY)
                assert np.array_equal(found["x"], value), (place, bit)
            else:
                with pytest.raises(holdfast.FormatError, match=r"BytesIO.*offset"):
                    holdfast.load(io.BytesIO(whole), **NUMPY)
            whole[place] ^= 1 << bit
            flips += 1
    assert flips >= 80 and unseen < 8


@pytest.mark.parametrize("order", ["middle", "", "bi", "BIG"])
def test_an_order_that_is_none(order: str) -> None:
    data = archive({"x": np.ones(3)}, byteorder=order)
    with pytest.raises(holdfast.FormatError, match="'a/byteorder': expected 'little' or 'big'"):
        holdfast.load(io.BytesIO(data), **NUMPY)


def test_untyped_storages_have_the_order_of_their_tensors() -> None:
    """Types that came after torch's storage classes are in storages of bytes."""
    obj = {"u2": np.arange(500, 510, dtype="u2"), "u8": np.arange(3, dtype="u8") << np.uint64(40)}
    data = archive(obj, byteorder="big", units={0: 2, 1: 8})
    assert (np.array([500], ">u2").tobytes() + np.array([501], ">u2").tobytes()) in data
    assert same(holdfast.load(io.BytesIO(data), **NUMPY), obj)
    assert np.array_equal(holdfast.load(io.BytesIO(data), keys="u8", **NUMPY)["u8"], obj["u8"])


def test_untyped_storages_are_aligned_for_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    obj = {"u4": np.arange(3, dtype="u4"), "u2": np.arange(7, dtype="u2")}
    path.write_bytes(archive(obj, odd=True))
    for keys in (None, "u4"):
        found = holdfast.load(path, mmap=True, keys=keys, **NUMPY)
        assert found["u4"].flags.aligned and np.array_equal(found["u4"], obj["u4"])


def test_no_more_is_inflated_than_is_said() -> None:
    """The directory says 100 bytes; what is inflated there is a thousand times that, or less."""
    from zip_files import deflate

    value = np.zeros(100, "u1")
    honest = archive({"x": value}, method=8)
    small = deflate(bytes(100))
    for other in (deflate(bytes(100_000)), deflate(bytes(99)), deflate(b"")):
        assert honest.count(small) == 1
        payload = other + bytes(max(0, len(small) - len(other)))
        data = _with_payload(honest, small, payload)
        for mmap in (None, False):
            with pytest.raises(holdfast.FormatError, match=r"expected 100 bytes|CRC|more than"):
                holdfast.load(io.BytesIO(data), mmap=mmap, **NUMPY)
        assert not holdfast.verify(io.BytesIO(data)).ok


def _with_payload(data: bytes, old: bytes, new: bytes) -> bytes:
    """An archive in which the packed bytes of a record are others, all offsets and sizes set."""
    import struct

    at, more = data.index(old), len(new) - len(old)
    out = bytearray(data.replace(old, new))
    start = out.index(b"PK\x01\x02")
    end = out.rindex(b"PK\x05\x06")
    struct.pack_into("<I", out, end + 16, start)
    place = start
    while place < end:
        (header,) = struct.unpack_from("<I", out, place + 42)
        (packed,) = struct.unpack_from("<I", out, place + 20)
        if header > at:
            struct.pack_into("<I", out, place + 42, header + more)
        elif packed == len(old) and out[place + 10] == 8:
            struct.pack_into("<I", out, place + 20, len(new))
            struct.pack_into("<I", out, header + 18, len(new))
        lengths = struct.unpack_from("<HHH", out, place + 28)
        place += 46 + sum(lengths)
    return bytes(out)
