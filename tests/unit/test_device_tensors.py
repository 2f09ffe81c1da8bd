"""Tensors in the memory of devices, saved and loaded: over a device that is simulated."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device_arrays
import holdfast
from device_arrays import CODE, DeviceArray, put
from holdfast import ChecksumError, _engine, staging
from holdfast.staging.host import HostDevice

RING = staging.Staging(block_size=1 << 16, blocks=3)
FORMATS = ["a.safetensors", "a.npz", "shards", "folder"]


@pytest.fixture(params=[False, True], ids=["prompt", "lazy"])
def devices(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[HostDevice, HostDevice]]:
    with device_arrays.installed(monkeypatch, lazy=request.param) as found:
        yield found


def values(name: str = "") -> dict[str, np.ndarray]:
    """Arrays of odd and even sizes: some larger than the ring, many that are tiny, some empty."""
    rng = np.random.default_rng(0)
    sizes = [700_001, 65_536, 4096, 4095, 1, 0, *rng.integers(1, 3000, 60).tolist()]
    found = {f"t{i}": rng.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
    found["f4"] = rng.standard_normal((123, 77)).astype(np.float32)
    found["c8"] = (rng.standard_normal(999) + 1j).astype(np.complex64)
    if name == "folder":
        found["c8"] = found["c8"].real.copy()  # OneFlow has no complex numbers
    found["scalar"] = np.array(3.5)
    found["bool"] = rng.integers(0, 2, 77).astype(bool)
    return found


def save(obj: Any, path: Path, **how: Any) -> None:
    """Save in the format that the name stands for."""
    if path.name == "shards":
        how["max_shard_size"] = 100_000
    elif path.name == "folder":
        how["format"] = "oneflow"
    holdfast.save(obj, path, staging=RING, **how)


def same(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        array = found[name].get() if isinstance(found[name], DeviceArray) else found[name]
        assert array.dtype == value.dtype
        assert array.shape == value.shape
        assert array.tobytes() == value.tobytes(), name


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("durable", [False, True])
def test_what_is_saved_is_what_the_host_would_have_saved(
    tmp_path: Path, name: str, durable: bool
) -> None:
    expected = values(name)
    mixed = {k: v if i % 5 == 4 else put(v) for i, (k, v) in enumerate(expected.items())}
    save(mixed, tmp_path / name, durable=durable)
    assert holdfast.verify(tmp_path / name).ok
    found = holdfast.load(tmp_path / name, framework="numpy")
    same({k: found[k] for k in expected}, expected)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_the_file_is_the_same_byte_for_byte(tmp_path: Path, name: str) -> None:
    expected = values()
    holdfast.save(expected, tmp_path / ("host-" + name))
    mixed = {k: v if i % 3 == 1 else put(v) for i, (k, v) in enumerate(expected.items())}
    save(mixed, tmp_path / name)
    host, device = (tmp_path / ("host-" + name)).read_bytes(), (tmp_path / name).read_bytes()
    if name.endswith(".npz"):
        assert host == device
        return
    split = [8 + int.from_bytes(data[:8], "little") for data in (host, device)]
    assert host[split[0] :] == device[split[1] :]
    headers = [json.loads(data[8:at]) for data, at in zip((host, device), split, strict=True)]
    for header in headers:
        del header["__metadata__"]  # it says whose arrays they were
    assert headers[0] == headers[1]


@pytest.mark.usefixtures("devices")
def test_file_objects(tmp_path: Path) -> None:
    expected = values()
    stream = io.BytesIO()
    holdfast.save({k: put(v) for k, v in expected.items()}, stream, staging=RING)
    stream.seek(0)
    same(holdfast.load(stream, "device:0", framework="device", staging=RING), expected)
    (tmp_path / "x").write_bytes(stream.getvalue())
    assert holdfast.verify(tmp_path / "x").ok


@pytest.mark.parametrize("name", [*FORMATS, "a.pt"])
def test_loads_to_a_device(
    tmp_path: Path, devices: tuple[HostDevice, HostDevice], name: str
) -> None:
    expected = values(name)
    save(expected, tmp_path / name)
    before = devices[1].used
    found = holdfast.load(tmp_path / name, "device:1", framework="device", staging=RING)
    assert {array.device for array in found.values()} == {CODE + 1}
    same({k: found[k] for k in expected}, expected)
    # Beside the arrays only what aligns them, and the scratch of one block that is gone again.
    nbytes = sum(v.nbytes for v in expected.values())
    assert devices[1].used - before <= nbytes + 256 * len(expected)
    del found


@pytest.mark.parametrize("name", FORMATS)
def test_a_dict_says_where_what_was_the_hosts_goes(
    tmp_path: Path, devices: tuple[HostDevice, HostDevice], name: str
) -> None:
    """By its ``"cpu"``: these files do not tell where tensors were. And through the ring."""
    expected = values(name)
    save(expected, tmp_path / name)
    where = {"cpu": "device:1", "device:1": "device:0"}
    found = holdfast.load(tmp_path / name, where, framework="device", staging=RING)
    assert {array.device for array in found.values()} == {CODE + 1}
    same({k: found[k] for k in expected}, expected)
    assert devices[1].calls["copy"]
    with holdfast.open(tmp_path / name, framework="device", map_location=where) as f:
        assert f["f4"].device == CODE + 1
    here = holdfast.load(tmp_path / name, {"device:1": "device:0"}, framework="numpy")
    same({k: here[k] for k in expected}, expected)


@pytest.mark.usefixtures("devices")
def test_some_of_the_tensors(tmp_path: Path) -> None:
    expected = values()
    save(expected, tmp_path / "x")
    found = holdfast.load(tmp_path / "x", "device:0", framework="device", keys=["t0", "f4"])
    same(found, {k: expected[k] for k in ("t0", "f4")})


@pytest.mark.usefixtures("devices")
def test_a_tree_of_arrays_here_and_there(tmp_path: Path) -> None:
    expected = values()
    tree = {"a": [put(expected["f4"]), expected["t0"]], "n": 3, "text": "x" * 5000,
            "tie": None}  # fmt: skip
    tree["tie"] = tree["a"][0]
    tree["b"] = (put(expected["t1"]), put(expected["t2"]))
    holdfast.save(tree, tmp_path / "x", staging=RING)
    found = holdfast.load(tmp_path / "x", "device:0", staging=RING)
    assert found["tie"] is found["a"][0]
    assert found["text"] == "x" * 5000
    assert isinstance(found["a"][1], np.ndarray)  # as it was saved
    assert found["a"][1].tobytes() == expected["t0"].tobytes()
    same({"f4": found["a"][0]}, {"f4": expected["f4"]})
    same({"t1": found["b"][0]}, {"t1": expected["t1"]})
    plain = holdfast.load(tmp_path / "x", framework="numpy")
    same({"f4": plain["a"][0]}, {"f4": expected["f4"]})


@pytest.mark.usefixtures("devices")
def test_arrays_that_are_not_dense(tmp_path: Path) -> None:
    value = np.random.default_rng(0).standard_normal((300, 411)).astype(np.float32)
    holdfast.save({"x": put(value).T, "y": value.T, "z": put(value)}, tmp_path / "x", staging=RING)
    found = holdfast.load(tmp_path / "x", framework="numpy")
    assert (found["x"] == value.T).all()
    assert (found["y"] == value.T).all()
    assert (found["z"] == value).all()


def test_two_devices_and_the_host(tmp_path: Path, devices: tuple[HostDevice, HostDevice]) -> None:
    expected = values()
    spread = {
        name: value if i % 3 == 0 else put(value, CODE + i % 3 - 1)
        for i, (name, value) in enumerate(expected.items())
    }
    holdfast.save(spread, tmp_path / "x", staging=RING)
    same(holdfast.load(tmp_path / "x", framework="numpy"), expected)
    assert devices[0].calls["begin"] == devices[1].calls["begin"] == 1


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", [*FORMATS, "a.pt"])
def test_fills_arrays_of_a_device(tmp_path: Path, name: str) -> None:
    expected = values(name)
    save(expected, tmp_path / name)
    target: dict[str, Any] = {
        k: np.empty_like(v) if i % 7 == 0 else put(np.empty_like(v))
        for i, (k, v) in enumerate(expected.items())
    }
    turned = put(np.empty((77, 123), np.float32)).T
    target["f4"] = turned
    target["c8"] = put(np.zeros(999, "f8" if name == "folder" else "c16"))
    holdfast.load_into(target, tmp_path / name, staging=RING)
    assert (target.pop("c8").get() == expected["c8"]).all()
    same(target, {k: v for k, v in expected.items() if k != "c8"})


@pytest.mark.usefixtures("devices")
def test_opens_on_a_device(tmp_path: Path) -> None:
    expected = values()
    for name in ("x", "x.npz", "x.pt"):
        holdfast.save(expected, tmp_path / name)
        where = {"framework": "device", "map_location": "device:1", "staging": RING}
        with holdfast.open(tmp_path / name, **where) as f:
            one, part = f["f4"], f.slice("f4")[5:9] if name == "none" else None
            assert part is None
            assert isinstance(one, DeviceArray) and one.device == CODE + 1
            assert (one.get() == expected["f4"]).all()
            f.prefetch(["t0", "t1"])
            assert f["t0"] is f["t0"]
            assert (f["t0"].get() == expected["t0"]).all()


@pytest.mark.parametrize("flip", [0, 1, 350_000, 699_999])
@pytest.mark.usefixtures("devices")
def test_damage_is_seen_on_the_way(tmp_path: Path, flip: int) -> None:
    save({"x": put(values()["t0"]), "y": put(values()["t1"])}, tmp_path / "x")
    with holdfast.open(tmp_path / "x") as f:
        at = f.info("x").offset + flip
    data = bytearray((tmp_path / "x").read_bytes())
    data[at] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ChecksumError, match="tensor 'x'"):
        holdfast.load(tmp_path / "x", "device:0", staging=RING)
    with pytest.raises(ChecksumError, match="tensor 'x'"):
        holdfast.load_into({"x": put(np.empty(700_001, np.uint8))}, tmp_path / "x", strict=False)


@pytest.mark.parametrize("call", ["begin", "copy", "run", "record", "wait"])
def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, devices: tuple[HostDevice, HostDevice], call: str
) -> None:
    expected = values()
    mine = {k: put(v) for k, v in expected.items()}
    mine["large"] = put(np.zeros(64 << 20, np.uint8))  # less would not be pinned
    holdfast.save({"old": np.ones(3)}, tmp_path / "x")
    failed = 0
    for n in (1, 2, 3, 5, 8):
        before = devices[0].calls[call]
        devices[0].fail(call, n)
        try:
            holdfast.save(mine, tmp_path / "x", staging=staging.Staging(blocks=2))
        except RuntimeError:
            failed += 1
            assert list(holdfast.load(tmp_path / "x")) == ["old"]
        else:
            assert devices[0].calls[call] - before < n
            devices[0]._faults.clear()
            holdfast.save({"old": np.ones(3)}, tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        staging.release_pinned()
        assert not devices[0].pinned
    assert failed


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pt"])
def test_bytes_of_bool_that_are_neither_0_nor_1(tmp_path: Path, name: str) -> None:
    value = np.arange(200_000, dtype=np.uint8).view(np.bool_)
    expected = value.view(np.uint8) > 0
    holdfast.save({"b": value, "u": value.view(np.uint8)}, tmp_path / name)
    found = holdfast.load(tmp_path / name, "device:0", framework="device", staging=RING)
    assert found["b"].device == CODE
    assert (found["b"].get().view(np.uint8) == expected).all()
    assert (found["u"].get() == value.view(np.uint8)).all()
    target = {"b": put(np.zeros_like(value)), "u": put(np.zeros(200_000, np.uint8))}
    holdfast.load_into(target, tmp_path / name, staging=RING)
    assert (target["b"].get().view(np.uint8) == expected).all()


@pytest.mark.usefixtures("devices")
def test_blocks_are_not_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory of a map is: a device would go on writing to the pages that they had."""
    real, said = _engine.write, []

    def spy(fd: int, segments: np.ndarray, **how: Any) -> bool:
        said.extend(segments["file"].tolist())
        return real(fd, segments, **how)

    monkeypatch.setattr(_engine, "write", spy)
    for name in FORMATS:
        expected = values(name)
        save({k: put(v) for k, v in expected.items()}, tmp_path / name)
    assert said
    assert not any(said)


def test_a_device_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holdfast.save({"x": np.zeros(1 << 20, np.uint8)}, tmp_path / "x")
    refused = pytest.raises(MemoryError, match="device:0: cannot allocate")
    with device_arrays.installed(monkeypatch, capacity=1 << 19), refused:
        holdfast.load(tmp_path / "x", "device:0", framework="device")


@pytest.mark.usefixtures("devices")
def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    expected = values()
    seen: list[tuple[int, int]] = []
    mine = {k: put(v) for k, v in expected.items()}
    save(mine, tmp_path / "x", progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    total = sum(v.nbytes for v in expected.values())
    assert seen[-1][0] == seen[-1][1] >= total
    seen.clear()
    holdfast.load(tmp_path / "x", "device:0", staging=RING, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_an_unknown_device_is_told(tmp_path: Path, devices: tuple[HostDevice, HostDevice]) -> None:
    array = put(np.ones(3))
    holdfast.save({"old": np.ones(3)}, tmp_path / "x")
    staging.unregister(CODE)
    try:
        with pytest.raises(RuntimeError, match="kind 12"):
            holdfast.save({"x": array}, tmp_path / "x")
    finally:
        staging.register(CODE, devices[0])
    assert list(holdfast.load(tmp_path / "x")) == ["old"]
