"""bfloat16 in OneFlow's single file: float32 in the pickle, of which OneFlow makes it again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.oneflow

torch = pytest.importorskip("torch")


def tensors() -> dict[str, Any]:
    torch.manual_seed(3)
    whole = torch.randn(40, 50).to(torch.bfloat16)
    odd = torch.tensor([float("inf"), float("nan"), -0.0, 1e-40, 3.4e38]).to(torch.bfloat16)
    return {
        "plain": whole,
        "float32": torch.randn(3, 2),
        "turned": whole.T,
        "part": whole[3:30:4, ::7],
        "expanded": whole[:1].expand(3, 50),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3, dtype=torch.bfloat16),
        "odd": odd,
        "weight": torch.nn.Parameter(whole[:3].clone()),
    }


def bits(tensor: Any) -> list[Any]:
    assert tensor.dtype is torch.bfloat16
    found: list[Any] = tensor.detach().contiguous().view(torch.int16).tolist()
    return found


@pytest.mark.parametrize("mmap", [True, False])
def test_comes_back(tmp_path: Path, mmap: bool) -> None:
    obj = tensors()
    holdfast.oneflow.save({"model": obj, "n": 1}, tmp_path / "x", layout="file")
    found = holdfast.load(tmp_path / "x", mmap=mmap, framework="torch")["model"]
    assert list(found) == list(obj)
    assert torch.equal(found.pop("float32"), obj["float32"])
    for name, tensor in found.items():
        assert tensor.shape == obj[name].shape
        assert bits(tensor) == bits(obj[name]), name
    stream = io.BytesIO()
    holdfast.oneflow.save(obj, stream)
    stream.seek(0)
    assert bits(holdfast.load(stream, framework="torch")["turned"]) == bits(obj["turned"])


def test_arrays(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(-4, 4).astype(ml_dtypes.bfloat16)
    holdfast.oneflow.save({"x": values, "y": values[::-2]}, tmp_path / "x", layout="file")
    found = holdfast.load(tmp_path / "x", framework="numpy")
    assert found["x"].dtype == values.dtype
    assert found["x"].tolist() == values.tolist()
    assert found["y"].tolist() == values[::-2].tolist()


def test_folders_refuse_it_and_say_what_to_do(tmp_path: Path) -> None:
    obj = {"x": torch.ones(2, dtype=torch.bfloat16)}
    words = r"tensor 'x': OneFlow cannot load elements of bfloat16: save x.float\(\); layout='file'"
    for layout in ("snapshot", "pickle"):
        with pytest.raises(TypeError, match=words):
            holdfast.oneflow.save(obj, tmp_path / "x", layout=layout)
    assert not (tmp_path / "x").exists()
