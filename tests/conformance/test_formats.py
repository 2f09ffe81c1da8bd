"""What every format has to hold; each is a subclass that names its module."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from holdfast.dtypes import DTYPES
from holdfast.errors import ChecksumError, FormatError
from holdfast.formats import safetensors
from holdfast.layout import Index, Plan
from holdfast.views import TensorBatch, TensorView

Tensors = dict[str, tuple[str, tuple[int, ...]]]

STORABLE = [row for row in DTYPES if row.itemsize]
CASES: dict[str, Tensors] = {
    "nothing": {},
    "one": {"w": ("float32", (3, 4))},
    "every type": {row.name: (row.name, (3, 2)) for row in STORABLE},
    "every type, no dimension": {row.name: (row.name, ()) for row in STORABLE},
    "every type, no element": {row.name: (row.name, (0, 4)) for row in STORABLE},
    "sizes of every power": {f"p{i}": ("uint8", (1 << (i * 5 % 17),)) for i in range(17)},
    "odd sizes": {f"o{i}": ("uint8", (i % 7,)) for i in range(40)},
    "many dimensions": {"d": ("int64", (1,) * 64), "e": ("int16", (2,) * 10)},
    "names": dict.fromkeys(("", " ", "é/..", '"\\', "\0", "x" * 9000), ("uint8", (1,))),
}


class FormatSuite:
    """Plan, seal and parse are one another's inverse, and nothing else reads as a file."""

    module: ModuleType

    def make(self, tensors: Tensors, **options: Any) -> tuple[Plan, bytes, TensorBatch]:
        """Plan and bytes of a file, and the tensors, whose bytes all differ from zero."""
        rng = np.random.default_rng(len(tensors))
        views = []
        for name, shape in tensors.values():
            row = next(row for row in DTYPES if row.name == name)
            content = rng.integers(1, 256, row.nbytes(shape)).astype(np.uint8)
            views.append(TensorView(row, shape, content.ctypes.data, content))
        batch = TensorBatch.of(views)
        settings = {"framework": "numpy", "metadata": None, "tree": None, "checksum": True}
        plan = self.module.plan(list(tensors), batch, **{**settings, **options})
        crcs = np.arange(1, len(views) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
        head = self.module.seal(plan, crcs if options.get("checksum", True) else None)
        data = bytearray(plan.size)
        data[: len(head)] = head
        for view, offset in zip(views, plan.offsets.tolist(), strict=True):
            data[offset : offset + view.nbytes] = bytes(view.owner)  # type: ignore[call-overload]
        return plan, bytes(data), batch

    def read(self, data: bytes, size: int | None = None, **options: Any) -> Index:
        """The index of a file in memory, which a reader may not ask beyond its end for."""

        def read(offset: int, nbytes: int) -> bytes:
            if offset + nbytes > len(data):
                raise FormatError(f"file: {nbytes} bytes at {offset}, file ends at {len(data)}")
            return data[offset : offset + nbytes]

        size = len(data) if size is None else size
        return self.module.index(read, size, "file", **options)

    @pytest.mark.parametrize("case", CASES)
    def test_round_trip(self, case: str) -> None:
        plan, data, batch = self.make(CASES[case])
        assert self.module.sniff(data[:512], len(data))
        index = self.read(data)
        assert index.names.tolist() == list(CASES[case])
        assert len(index) == len(index.names) == len(batch)
        assert index.entries["offset"].tolist() == plan.offsets.tolist()
        assert index.entries["nbytes"].tolist() == batch.views["nbytes"].tolist()
        for i, name in enumerate(CASES[case]):
            assert (index.dtype(i), index.shape(i)) == (batch[i].dtype, batch[i].shape)
            assert index.names.find(name) == i
            start = int(plan.offsets[i])
            content = bytes(batch[i].owner)  # type: ignore[call-overload]
            assert data[start : start + batch[i].nbytes] == content
        assert index.end == plan.size == len(data)
        assert index.metadata == {}
        assert index.tree is None
        assert index.framework == "numpy"

    @pytest.mark.parametrize("case", CASES)
    def test_the_plan_covers_the_file(self, case: str) -> None:
        plan, data, batch = self.make(CASES[case])
        head = len(data) - int(batch.views["nbytes"].sum())
        spans = sorted(
            (offset, offset + view.nbytes)
            for offset, view in zip(plan.offsets.tolist(), batch, strict=True)
        )
        end = head
        for begin, stop in spans:
            assert begin == end
            end = stop
        assert end == plan.size

    @pytest.mark.parametrize("case", CASES)
    def test_elements_are_aligned(self, case: str) -> None:
        plan, _, batch = self.make(CASES[case])
        for i, view in enumerate(batch):
            assert int(plan.offsets[i]) % math.gcd(view.nbytes or 4096, 4096) == 0
            assert int(plan.offsets[i]) % view.dtype.unit == 0

    @pytest.mark.parametrize("checksum", [True, False])
    def test_checksums(self, checksum: bool) -> None:
        _, data, batch = self.make(CASES["odd sizes"], checksum=checksum)
        crcs = self.read(data).crcs
        if checksum:
            expected = np.arange(1, len(batch) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
            assert crcs is not None
            assert crcs.dtype == np.uint32
            assert crcs.tolist() == expected.tolist()
        else:
            assert crcs is None

    def test_checksums_have_to_be_as_planned(self) -> None:
        plan, _, _ = self.make(CASES["one"])
        for wrong in (None, np.zeros(0, np.uint32), np.zeros(2, np.uint32)):
            with pytest.raises(ValueError, match="checksums"):
                self.module.seal(plan, wrong)
        plan, _, _ = self.make(CASES["one"], checksum=False)
        with pytest.raises(ValueError, match="checksums"):
            self.module.seal(plan, np.zeros(1, np.uint32))

    @pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "cupy", None])
    def test_framework(self, framework: str | None) -> None:
        _, data, _ = self.make(CASES["one"], framework=framework)
        index = self.read(data)
        assert (index.framework, index.metadata) == (framework, {})

    def test_metadata_and_tree(self) -> None:
        metadata = {"b": "", "a": 'é\n\\"\0', "": "x" * 5000, "format": "mine", "é": "{}"}
        tree = {"k": [1, -2.5, None, True, "é\U0001f600"], "": {}}
        _, data, _ = self.make(CASES["one"], metadata=metadata, tree=tree)
        index = self.read(data)
        assert list(index.metadata.items()) == list(metadata.items())
        assert index.tree == tree

    def test_the_same_gives_the_same(self) -> None:
        options: dict[str, Any] = {"metadata": {"a": "b"}, "tree": [1]}
        first = self.make(CASES["every type"], **options)[1]
        assert self.make(CASES["every type"], **options)[1] == first

    @pytest.mark.parametrize("name", ["a", "__metadata__", "\ud800"])
    def test_names_that_no_file_holds(self, name: str) -> None:
        batch = TensorBatch.of([TensorView(DTYPES[1], (1,), 0, None)] * 2)
        with pytest.raises(ValueError, match=r"'a'|'__metadata__'|surrogate"):
            self.module.plan(
                ["a", name], batch, framework=None, metadata=None, tree=None, checksum=False
            )

    @pytest.mark.parametrize("case", ["one", "every type"])
    def test_a_file_cut_short_is_refused(self, case: str) -> None:
        _, data, _ = self.make(CASES[case])
        for length in {0, 1, 7, 8, 9, 100, 4095, 4096, len(data) // 2, len(data) - 1}:
            with pytest.raises(FormatError, match="file"):
                self.read(data[:length])
            assert length < len(data)

    def test_a_file_too_long_is_refused(self) -> None:
        _, data, _ = self.make(CASES["one"])
        with pytest.raises(FormatError, match="file"):
            self.read(data + b"\0")

    def test_a_stream_ends_where_its_index_says(self) -> None:
        _, data, _ = self.make(CASES["odd sizes"])
        assert self.read(data + b"more", -1).end == len(data)


class TestSafetensors(FormatSuite):
    module = safetensors

    def test_a_damaged_header_is_a_checksum_error(self) -> None:
        _, data, _ = self.make(CASES["one"], metadata={"note": "hi"})
        with pytest.raises(ChecksumError, match=r"file: .* verify=False"):
            self.read(data.replace(b'"hi"', b'"ho"'))
