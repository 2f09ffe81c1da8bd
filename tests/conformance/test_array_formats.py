"""The formats of NumPy under the suite of all formats."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from holdfast.errors import FormatError
from holdfast.formats import archive, npy, npz
from holdfast.layout import CHECKED, Plan
from holdfast.views import TensorBatch, TensorView

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_formats import CASES, FormatSuite, Tensors

from torch_files import put


def sums(views: list[TensorView]) -> np.ndarray:
    return np.array(
        [zlib.crc32(bytes(view.owner)) for view in views],  # type: ignore[call-overload]
        np.uint32,
    )


def write(
    module: ModuleType, names: list[str], views: list[TensorView], **options: Any
) -> tuple[Plan, bytes]:
    """Plan and bytes of a file; every byte is written once at first, and then patched."""
    settings = {"framework": "numpy", "metadata": None, "structure": {}, "checksum": True}
    batch = TensorBatch.of(views)
    plan = module.plan(names, batch, stem="", **{**settings, **options})
    crcs = sums(views)
    out, filled = bytearray(plan.size), np.zeros(plan.size, np.int8)
    for view, offset in zip(views, plan.offsets.tolist(), strict=True):
        out[offset : offset + view.nbytes] = bytes(view.owner)  # type: ignore[call-overload]
        filled[offset : offset + view.nbytes] += 1
    if plan.early is not None:
        put(out, filled, module.seal(plan, np.where(plan.early, crcs, 0), early=True))
        assert (filled == 1).all(), "pieces and tensors cover the file, each byte once"
    put(out, filled, module.seal(plan, crcs))
    assert (filled >= 1).all()
    return plan, bytes(out)


class TestNpz(FormatSuite):
    module, reader = npz, archive

    def tensors(self, case: str) -> Tensors:
        found = super().tensors(case)
        bad = [name for name in found if set(name) & {"\0", "\\"}]
        for name in bad:
            del found[name]
        return found

    def make(self, tensors: Tensors, **options: Any) -> tuple[Plan, bytes, TensorBatch]:
        views = self.views(tensors)
        plan, data = write(npz, list(tensors), views, **options)
        return plan, data, TensorBatch.of(views)

    @pytest.mark.parametrize("early", [0, 1 << 30])
    def test_checksums_whenever_they_are_known(
        self, early: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(npz, "_EARLY", early)
        _, data, batch = self.make(CASES["odd sizes"])
        storages = self.read(data).storages
        assert storages is not None and len(storages) == len(batch) == 40
        assert ((storages["flags"] & CHECKED) != 0).all()
        assert storages["crc"].tolist() == sums(list(batch)).tolist()

    def test_checksums_have_to_be_given(self) -> None:
        plan, _, _ = self.make(CASES["one"])
        for wrong in (None, np.zeros(0, np.uint32), np.zeros(2, np.uint32)):
            with pytest.raises(ValueError, match="checksums"):
                npz.seal(plan, wrong)
        with pytest.raises(ValueError, match="without checksums"):
            self.make(CASES["one"], checksum=False)

    @pytest.mark.parametrize("case", CASES)
    def test_elements_are_aligned(self, case: str) -> None:
        plan, _, _ = self.make(self.tensors(case))
        assert (plan.offsets % 64 == 0).all()

    def test_a_file_too_long_is_refused(self) -> None:
        _, data, _ = self.make(CASES["one"])
        for more in (b"\0", b"PK\x05\x06", data):
            with pytest.raises(FormatError, match="file"):
                self.read(data + more)


class TestNpy(FormatSuite):
    """Each tensor of a case in a file of its own."""

    module = reader = npy

    def make(self, tensors: Tensors, **options: Any) -> tuple[Plan, bytes, TensorBatch]:
        (view,) = self.views(tensors)
        plan, data = write(npy, ["tensor"], [view], **options)
        return plan, data, TensorBatch.of([view])

    @pytest.mark.parametrize("case", [case for case in CASES if CASES[case]])
    def test_round_trip(self, case: str) -> None:
        for name, row in self.tensors(case).items():
            plan, data, batch = self.make({name: row})
            assert npy.sniff(data[:512], len(data))
            index = self.read(data)
            assert index.names.tolist() == ["tensor"] and index.tree == [0]
            assert (index.dtype(0), index.shape(0)) == (batch[0].dtype, batch[0].shape)
            assert index.entries["offset"].tolist() == plan.offsets.tolist()
            assert int(plan.offsets[0]) % 64 == 0
            content = bytes(batch[0].owner)  # type: ignore[call-overload]
            assert data[int(plan.offsets[0]) :] == content
            assert index.end == plan.size == len(data)
            assert (index.framework, index.metadata) == ("numpy", {})

    @pytest.mark.parametrize("case", ["one", "every type"])
    def test_a_file_cut_short_is_refused(self, case: str) -> None:
        for name, row in self.tensors(case).items():
            _, data, _ = self.make({name: row})
            for length in {0, 1, 7, 8, 9, 11, 12, 100, 127, 128, len(data) - 1}:
                with pytest.raises(FormatError, match="file"):
                    self.read(data[:length])

    def test_the_same_gives_the_same(self) -> None:
        assert self.make(CASES["one"])[1] == self.make(CASES["one"])[1]

    def test_a_file_too_long_is_refused(self) -> None:
        _, data, _ = self.make(CASES["one"])
        with pytest.raises(FormatError, match=r"file: expected 48 bytes .* found 49"):
            self.read(data + b"\0")

    def test_a_stream_ends_where_its_index_says(self) -> None:
        _, data, _ = self.make(CASES["one"])
        assert self.read(data + b"more", -1).end == len(data)
