"""The suite of all adapters, for OneFlow; in an interpreter that has it (see ``test_real.py``)."""

from __future__ import annotations

import ctypes
import gc
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import _engine
from holdfast.dtypes import BY_NAME, DType

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from test_adapters import AdapterSuite, batch_of, stored_bytes

oneflow = pytest.importorskip("oneflow")


class TestOneFlow(AdapterSuite):
    column = "torch"  # OneFlow calls what it has as torch does
    fewest = 8

    @pytest.fixture(autouse=True)
    def _adapter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from holdfast.adapters.oneflow import OneFlowAdapter

        self.adapter = OneFlowAdapter()
        collect = gc.collect

        def settled() -> int:
            # Tensors are let go of by the thread that computes.
            found = collect()
            oneflow._oneflow_internal.eager.Sync()
            return found

        count = _engine.live_buffers
        monkeypatch.setattr(gc, "collect", settled)
        monkeypatch.setattr(_engine, "live_buffers", lambda: (settled(), count())[1])
        settled()

    def have(self) -> list[DType]:
        # Those of bfloat16 are copies: see below.
        return [row for row in super().have() if row.name != "bfloat16"]

    def has(self, row: DType) -> bool:
        return isinstance(getattr(oneflow, row.name, None), oneflow.dtype)

    def test_memory_is_not_leaked(self) -> None:
        # OneFlow itself keeps a few KB more with time; a leak would be that of 3200 tensors.
        tensors = [*self.layouts().values(), *self.kinds()]
        batch = batch_of([("int32", (3,))] * 64)
        sizes = []
        tracemalloc.start()
        try:
            for _ in range(3):
                for _ in range(50):
                    self.adapter.describe(tensors, ["t"] * len(tensors))
                    self.adapter.wrap(batch, {})
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert sizes[2] - sizes[1] < 20_000

    def make(self, array: np.ndarray) -> Any:
        return oneflow.from_numpy(array.copy())

    def layouts(self) -> dict[str, Any]:
        base = oneflow.from_numpy(np.arange(60, dtype=np.int32).reshape(5, 12))
        return {
            "transposed": base.T,
            "step": base[::2, 1::3],
            "expanded": base[:, :1].expand(5, 4),
            "diagonal": base.as_strided((4, 2), (13, 1), 0),
        }

    def data(self, tensor: Any) -> bytes:
        array = tensor.detach().numpy()
        if tensor.dtype == oneflow.bfloat16:
            array = (array.view(np.uint32) >> 16).astype(np.uint16)
        return bytes(np.ascontiguousarray(array).tobytes())

    def zero(self, tensor: Any) -> None:
        tensor.detach().numpy()[...] = 0

    def address(self, tensor: Any) -> int:
        return int(tensor.detach().numpy().ctypes.data)

    def unholdable(self) -> dict[str, Any]:
        world = oneflow.placement("cpu", [0])
        kind = type("Unit", (oneflow.Tensor,), {})
        return {
            "a global tensor": oneflow.zeros(2, placement=world, sbp=oneflow.sbp.broadcast),
            "x.clone()": kind(oneflow.zeros(2)),
        }

    def kinds(self) -> list[Any]:
        return [
            oneflow.nn.Parameter(oneflow.arange(6, dtype=oneflow.float32).reshape(2, 3)),
            oneflow.nn.Parameter(oneflow.arange(4), requires_grad=False),
            oneflow.ones(3, requires_grad=True),
        ]

    def same(self, a: Any, b: Any) -> bool:
        return bool(
            type(a) is type(b)
            and a.requires_grad == b.requires_grad
            and (a.dtype, tuple(a.shape)) == (b.dtype, tuple(b.shape))
            and (a.detach().numpy() == b.detach().numpy()).all()
        )


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (4, 5)])
def test_bfloat16_is_copied_exactly(shape: tuple[int, ...]) -> None:
    from holdfast.adapters.oneflow import OneFlowAdapter

    adapter = OneFlowAdapter()
    batch = batch_of([("bfloat16", shape)])
    (tensor,) = adapter.wrap(batch, {})
    assert tensor.dtype == oneflow.bfloat16
    again, _ = adapter.describe([tensor], ["t"])
    assert again[0].shape == shape
    nbytes = again[0].nbytes
    assert nbytes == batch[0].nbytes
    found = ctypes.string_at(again[0].address, nbytes) if nbytes else b""
    assert found == stored_bytes(batch, 0)


def test_many_small_tensors_are_looked_at_together() -> None:
    from holdfast.adapters.oneflow import OneFlowAdapter

    dtypes = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")
    tensors = [
        oneflow.from_numpy(np.full((i % 3, 2), i % 100).astype(name)) for i in range(100)
        for name in dtypes
    ]  # fmt: skip
    tensors.append(oneflow.from_numpy(np.arange(12.0).reshape(3, 4)).T)
    batch, kinds = OneFlowAdapter().describe(tensors, [""] * len(tensors))
    assert not kinds
    made = OneFlowAdapter()
    suite = TestOneFlow()
    suite.adapter = made
    checked = 0
    for i, tensor in enumerate(tensors[:-1]):
        view = batch[i]
        assert view.shape == tuple(tensor.shape)
        assert view.dtype is BY_NAME[str(tensor.dtype).removeprefix("oneflow.")]
        if view.nbytes:
            assert ctypes.string_at(view.address, view.nbytes) == suite.data(tensor)
            checked += 1
    assert checked > 500


def test_what_is_computed_still_is_waited_for() -> None:
    from holdfast.adapters.oneflow import OneFlowAdapter

    result = oneflow.ones(300, 300)
    for _ in range(30):
        result = oneflow.matmul(result, oneflow.eye(300))
    batch, _ = OneFlowAdapter().describe([result], ["x"])
    data = ctypes.string_at(batch[0].address, batch[0].nbytes)
    assert np.frombuffer(data, np.float32).tolist() == [1.0] * 90_000


def test_modules_that_load_themselves(tmp_path: Path) -> None:
    import holdfast
    from holdfast.adapters.oneflow import OneFlowAdapter

    net = oneflow.nn.Sequential(oneflow.nn.Conv2d(1, 2, 1), oneflow.nn.BatchNorm2d(2))
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    assert OneFlowAdapter().own_loader(net, state) is None
    assert OneFlowAdapter().own_loader({}, state) is None
    holdfast.save({"m": {"old": state.pop("0.weight"), **state}}, tmp_path / "x.safetensors")

    def rename(state: Any, prefix: str, *_: Any) -> None:
        state["0.weight"] = state.pop("old")

    net._load_state_dict_pre_hooks[0] = rename
    keys = holdfast.load_into(net, tmp_path / "x.safetensors", prefix="m.")
    assert keys == ([], [])
    assert all((net.state_dict()[name].numpy() == state[name].numpy()).all() for name in state)
