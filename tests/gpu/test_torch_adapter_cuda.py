"""torch's adapter over tensors of a CUDA device: the suite that every adapter passes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conformance.test_adapters import TorchSuite, batch_of
from holdfast import _engine
from holdfast.dtypes import BY_NAME
from holdfast.views import TensorBatch, TensorView, device_code

CODE = device_code(2, 0)


class TestTorchCuda(TorchSuite):
    @pytest.fixture(autouse=True)
    def _adapter(self, torch: Any) -> None:
        from holdfast.adapters.torch import TorchAdapter

        self.torch = torch
        self.adapter = TorchAdapter()
        if self.adapter._exchange is None:
            pytest.skip("this PyTorch has no exchange API")

    # -- where its memory is

    def batch(self, rows: Sequence[tuple[str, tuple[int, ...]]], apart: bool = False) -> Any:
        """The batch of the host, in memory of the device."""
        host = batch_of(rows, apart)
        lent = []
        for i, buffer in enumerate(host.owners):
            held = self.torch.from_numpy(np.frombuffer(memoryview(buffer), np.uint8).copy()).cuda()
            # As a stranger's: what PyTorch itself has lent becomes its own again.
            there = _engine.lend(held.data_ptr(), len(buffer), [held], CODE)
            mine = slice(None) if host.owner is None else host.owner == i
            # An unsigned column: what it is moved by may be less than nothing.
            shift = (there.address - buffer.address) % 2**64
            host.views["address"][mine] += np.uint64(shift)
            lent.append(there)
        return TensorBatch(host.views, host.dims, lent, owner=host.owner)

    def stored(self, batch: TensorBatch, i: int) -> bytes:
        return self.peek(batch[i].address, batch[i].nbytes)

    def peek(self, address: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""

        class Memory:
            __cuda_array_interface__ = {
                "data": (address, False),
                "shape": (nbytes,),
                "typestr": "|u1",
                "version": 2,
            }

        tensor = self.torch.as_tensor(Memory(), device="cuda")
        assert tensor.data_ptr() == address
        return bytes(tensor.cpu().numpy().tobytes())

    def live(self) -> int:
        gc.collect()
        return _engine.live_buffers()

    # -- in torch's terms

    def make(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array.copy()).cuda()

    def layouts(self) -> dict[str, Any]:
        base = self.torch.arange(60, dtype=self.torch.int32, device="cuda").reshape(5, 12)
        last = self.torch.arange(120, dtype=self.torch.int32, device="cuda").reshape(2, 3, 4, 5)
        return {
            "transposed": base.T,
            "step": base[::2, 1::3],
            "expanded": base[:, :1].expand(5, 4),
            "channels last": last.contiguous(memory_format=self.torch.channels_last),
            "diagonal": base.as_strided((4, 2), (13, 1)),
        }

    def data(self, tensor: Any) -> bytes:
        return super().data(tensor.detach().cpu())

    def unholdable(self) -> dict[str, Any]:
        torch = self.torch
        freed = torch.zeros(3, device="cuda")
        freed.untyped_storage().resize_(0)
        return {
            "to_dense": torch.eye(3, device="cuda").to_sparse(),
            "no memory": freed,
            "as_subclass": torch.zeros(2, device="cuda").as_subclass(
                type("Unit", (torch.Tensor,), {})
            ),
        }

    def kinds(self) -> list[Any]:
        torch = self.torch
        return [
            torch.nn.Parameter(torch.arange(6.0, device="cuda").reshape(2, 3)),
            torch.nn.Parameter(torch.arange(4, device="cuda"), requires_grad=False),
            torch.ones(3, requires_grad=True, device="cuda"),
            torch.nn.Parameter(torch.zeros(0, 2, dtype=torch.complex64, device="cuda")),
        ]

    def test_kinds_come_back(self) -> None:
        tensors = self.kinds()
        described, kinds = self.adapter.describe(tensors, [str(i) for i in range(len(tensors))])
        assert sorted(kinds) == list(range(len(tensors)))
        batch = self.batch([(described[i].dtype.name, described[i].shape) for i in kinds])
        back = self.adapter.wrap(batch, kinds)
        for mine, other in zip(tensors, back, strict=True):
            with self.torch.no_grad():
                other.copy_(mine)
        assert all(map(self.same, back, tensors))
        assert self.adapter.describe(back, [str(i) for i in kinds])[1] == kinds

    # -- what is CUDA's alone

    def test_batches_say_their_device(self) -> None:
        tensors = [self.make(np.zeros(3)), self.torch.zeros(4), self.make(np.zeros(0))]
        batch, _ = self.adapter.describe(tensors, ["a", "b", "c"])
        assert batch.devices is not None
        assert batch.devices.tolist()[:2] == [CODE, 0]

    def test_older_versions_describe_alike(self) -> None:
        from holdfast.adapters.torch import TorchAdapter

        tensors = [*self.layouts().values(), *self.kinds(), self.torch.zeros(3)]
        names = [str(i) for i in range(len(tensors))]
        ours, kinds = self.adapter.describe(tensors, names)
        theirs, again = TorchAdapter(exchange=False).describe(tensors, names)
        assert kinds == again
        assert ours.devices is not None and theirs.devices is not None
        for i in range(len(tensors)):
            if ours[i].nbytes:
                assert ours[i] == theirs[i]
                assert ours.devices[i] == theirs.devices[i]

    def test_what_torch_has_lent_is_its_own_again(self) -> None:
        held = self.torch.arange(24, dtype=self.torch.uint8, device="cuda")
        start = self.live()
        lent = _engine.lend(held.data_ptr(), 24, held, CODE)
        row = TensorView(BY_NAME["float32"], (2, 3), held.data_ptr(), None)
        batch = TensorBatch.of([row])
        batch.owners = [lent]
        tensor = self.adapter.wrap(batch, {})[0]
        del lent, batch
        assert self.live() == start
        assert (tensor.dtype, tuple(tensor.shape)) == (self.torch.float32, (2, 3))
        assert tensor.untyped_storage()._cdata == held.untyped_storage()._cdata
        assert self.data(tensor) == bytes(range(24))

    def test_destinations(self) -> None:
        torch = self.torch
        current = torch.cuda.current_device()
        for location in ("cuda:0", torch.device("cuda", 0), 0, b"cuda:0"):
            assert self.adapter.destination(location) == CODE
        for location in ("cuda", torch.device("cuda")):
            assert self.adapter.destination(location) == device_code(2, current)
        assert self.adapter.destination(f"cuda:{torch.cuda.device_count()}") == 0
