"""How far a file is trusted: what ``weights_only`` may be, and what False does without PyTorch."""

from __future__ import annotations

import collections
import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import UnsafeError


class Marker:
    """A class that only a trusted file may make."""

    def __init__(self) -> None:
        self.value = 3


@pytest.mark.parametrize("given", [None, 0, 1, "no", np.False_])
def test_nothing_but_a_bool_says_whether_a_file_is_trusted(tmp_path: Path, given: Any) -> None:
    """None means True in ``torch.load``: that it is false must not have code run."""
    holdfast.save({"made": Marker()}, tmp_path / "a.pt")
    with pytest.raises(TypeError, match="weights_only must be True or False, not"):
        holdfast.load(tmp_path / "a.pt", weights_only=given)


def test_a_trusted_file_may_make_anything(tmp_path: Path) -> None:
    holdfast.save({"made": Marker()}, tmp_path / "a.pt")
    with pytest.raises(UnsafeError, match="Marker"):
        holdfast.load(tmp_path / "a.pt")
    assert holdfast.load(tmp_path / "a.pt", weights_only=False)["made"].value == 3


class TestTrustedArrays:
    """Without ``weights_only``, a pickle's calls of PyTorch are answered with arrays."""

    @pytest.fixture
    def saved(self) -> dict[str, Any]:
        shared = np.arange(6, dtype=np.float32).reshape(2, 3)
        return {
            "shared": shared,
            "again": shared,
            "strided": np.arange(10)[::2],
            "nothing": np.empty((0, 3)),
            "scalar": np.array(2.5),
            "uint16": np.array([1, 2], np.uint16),
            "complex": np.array([1j, 2]),
            "ordered": collections.OrderedDict(when=datetime.date(2024, 2, 29)),
            "made": Marker(),
        }

    @pytest.mark.parametrize("form", ["torch", "torch_legacy"])
    @pytest.mark.parametrize("mmap", [True, False])
    def test_arrays_come_back(
        self, tmp_path: Path, saved: dict[str, Any], form: str, mmap: bool
    ) -> None:
        if form == "torch_legacy":
            del saved["uint16"]
        holdfast.save(saved, tmp_path / "a.pt", format=form)
        found = holdfast.load(tmp_path / "a.pt", weights_only=False, framework="numpy", mmap=mmap)
        assert list(found) == list(saved)
        assert found["made"].value == 3
        assert found["ordered"] == saved["ordered"]
        assert found["shared"].base is not None
        assert np.shares_memory(found["shared"], found["again"])
        for name, value in saved.items():
            if isinstance(value, np.ndarray):
                assert type(found[name]) is np.ndarray
                assert found[name].dtype == value.dtype
                assert found[name].shape == value.shape
                assert np.array_equal(found[name], value)

    @pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_types_of_ml_dtypes(self, tmp_path: Path, name: str) -> None:
        kind = getattr(pytest.importorskip("ml_dtypes"), name)
        array = np.arange(4).astype(kind)
        holdfast.save({"w": array}, tmp_path / "a.pt")
        found = holdfast.load(tmp_path / "a.pt", weights_only=False, framework="numpy")["w"]
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()

    def test_what_torch_saved(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        whole = torch.arange(12.0).reshape(3, 4)
        saved = {
            "view": whole.t()[1:],
            "expanded": torch.ones(1, 3).expand(2, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "conjugated": torch.tensor([1 + 2j]).conj(),
            "negated": torch.tensor([1 + 2j]).conj().imag,
            "size": torch.Size([2, 3]),
            "dtype": torch.float16,
        }
        torch.save(saved, tmp_path / "a.pt")
        for trusted in (False, True):
            found = holdfast.load(tmp_path / "a.pt", weights_only=not trusted, framework="numpy")
            for name in ("view", "expanded", "conjugated", "negated"):
                assert np.array_equal(found[name], saved[name].resolve_conj().resolve_neg())
            assert found["parameter"].tolist() == [1, 1]
            assert found["size"] == (2, 3)
            assert found["dtype"] == "torch.float16"

    def test_a_module_of_torch_is_no_array(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
        with pytest.raises(TypeError, match=r"a\.pt.*linear\.Linear.*framework='torch'"):
            holdfast.load(tmp_path / "a.pt", weights_only=False, framework="numpy")

    def test_without_torch(self, tmp_path: Path) -> None:
        holdfast.save({"w": np.arange(3), "call": len}, tmp_path / "a.pt")
        script = (
            "import sys; sys.modules['torch'] = None; import holdfast; "
            f"found = holdfast.load({str(tmp_path / 'a.pt')!r}, weights_only=False); "
            "print(found['w'].tolist(), found['call'] is len)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.stdout == "[0, 1, 2] True\n", done.stderr
