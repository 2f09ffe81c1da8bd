"""The old containers against torch itself: what it writes is read, and read as it reads it."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import legacy_files as files
from holdfast.errors import FormatError
from holdfast.formats import torch_legacy, torch_tar

torch = pytest.importorskip("torch")


def flat(obj: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of nested dicts, by their names joined by dots."""
    found: dict[str, np.ndarray] = {}
    for key, value in obj.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value.detach().numpy()
    return found


def check(form: Any, data: bytes, expected: dict[str, np.ndarray]) -> None:
    """Every tensor that torch has is one of the index, and the same."""
    assert expected
    found = form.index(files.reader(data), len(data), "x.pt", verify=True)
    values = files.values(data, found)
    names = found.names.tolist()
    paths = found.structure.paths()
    for name, value in expected.items():
        ours = values[names[paths[name]]]
        assert ours.shape == value.shape and ours.dtype == value.dtype, name
        np.testing.assert_array_equal(ours, value)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_the_sample_is_one(protocol: int) -> None:
    data = files.sample(protocol)
    expected = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    assert len(flat(expected)) == 6
    check(torch_legacy, data, flat(expected))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_the_tar_is_one(protocol: int, tmp_path: Path) -> None:
    data = files.tar(files.tar_members(protocol))
    (tmp_path / "x.tar").write_bytes(data)
    expected = torch.load(tmp_path / "x.tar", map_location="cpu", weights_only=False)
    assert len(flat(expected)) == 5
    check(torch_tar, data, flat(expected))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_what_torch_writes(protocol: int) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    layer = torch.nn.Linear(3, 2)
    obj = OrderedDict(
        base=base,
        turned=base.T[1:3],
        tied=base,
        expanded=torch.arange(3.0)[:, None].expand(3, 4),
        kinds={
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (
                torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128,
            )
        },
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        layer=layer.state_dict(),
        parameter=layer.weight,
        step=7,
    )  # fmt: skip
    file = io.BytesIO()
    torch.save(obj, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    check(torch_legacy, file.getvalue(), flat(obj))


def test_a_whole_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = io.BytesIO()
    torch.save(module, file, _use_new_zipfile_serialization=False)
    found = torch_legacy.index(files.reader(file.getvalue()), -1, "x.pt", verify=True)
    assert set(found.names.tolist()) == set(module.state_dict())
    check(torch_legacy, file.getvalue(), flat(module.state_dict()))


def test_a_model_with_many_tensors() -> None:
    obj = {f"t{i}": torch.full((i % 7,), float(i)) for i in range(3000)}
    file = io.BytesIO()
    torch.save(obj, file, _use_new_zipfile_serialization=False)
    check(torch_legacy, file.getvalue(), flat(obj))


def test_what_torch_refuses_is_refused() -> None:
    """Of the files with one byte of the tail changed, none that torch refuses is read."""
    data = files.sample()
    start = torch_legacy.index(files.reader(data), len(data), "x", verify=True).storages
    first = int(start["offset"].min()) - 8
    refused = 0
    for at in range(first, len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            torch.load(io.BytesIO(changed), map_location="cpu", weights_only=False)
        except Exception:
            refused += 1
            with pytest.raises(FormatError):
                torch_legacy.index(files.reader(changed), len(changed), "x", verify=True)
        else:
            torch_legacy.index(files.reader(changed), len(changed), "x", verify=True)
    assert refused == 4 * 8
