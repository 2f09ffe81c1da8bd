"""CuPy's adapter with CuPy itself, over the memory of a CUDA device."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from conformance.test_cupy_adapter import CupySuite


@pytest.fixture(scope="module")
def cupy() -> Any:
    """CuPy, where it has a device."""
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"CuPy has no device: {error}")
    if count == 0 or module.cuda.runtime.is_hip:
        pytest.skip("CuPy has no CUDA device")
    return module


@pytest.mark.gpu
class TestCupy(CupySuite):
    @pytest.fixture(autouse=True)
    def _adapter(self, cupy: Any) -> None:
        from holdfast.adapters.cupy import CupyAdapter

        assert sys.modules["cupy"] is cupy
        self.cupy = cupy
        self.adapter = CupyAdapter()

    def test_bfloat16(self) -> None:
        """Where this CuPy has it, and where it says that it has not."""
        batch = self.batch([("bfloat16", (4, 2))])
        if self.has(batch[0].dtype):
            assert self.data(self.adapter.wrap(batch, {})[0]) == self.stored(batch, 0)
        else:
            with pytest.raises(TypeError, match="bfloat16: CuPy"):
                self.adapter.wrap(batch, {})
