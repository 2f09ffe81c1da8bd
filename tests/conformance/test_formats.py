"""What every format has to hold; each is a subclass that names its module."""

from __future__ import annotations

import math
import zlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from holdfast.dtypes import BY_NAME, DTYPES
from holdfast.errors import ChecksumError, FormatError
from holdfast.formats import archive, safetensors, torch_legacy, torch_zip
from holdfast.layout import CHECKED, Index, Plan
from holdfast.pickling import Pickle, pickle_around
from holdfast.views import TensorBatch, TensorView
from torch_files import put

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
    reader: ModuleType
    options: dict[str, Any] = {}  # what its plan takes besides
    says_framework = True  # whether it has a place for the name of who saved it

    def tensors(self, case: str) -> Tensors:
        """Those of a case whose types the format has."""
        found = {name: row for name, row in CASES[case].items() if self.stores(row[0])}
        assert len(found) > len(CASES[case]) // 2 or case == "nothing"
        return found

    def stores(self, dtype: str) -> bool:
        return True

    def views(self, tensors: Tensors) -> list[TensorView]:
        """The tensors in memory, whose bytes all differ from zero."""
        rng = np.random.default_rng(len(tensors))
        views = []
        for name, shape in tensors.values():
            row = next(row for row in DTYPES if row.name == name)
            content = rng.integers(1, 256, row.nbytes(shape)).astype(np.uint8)
            views.append(TensorView(row, shape, content.ctypes.data, content))
        return views

    def make(self, tensors: Tensors, **options: Any) -> tuple[Plan, bytes, TensorBatch]:
        """Plan and bytes of a file, and the tensors, whose bytes all differ from zero."""
        views = self.views(tensors)
        batch = TensorBatch.of(views)
        settings = {"framework": "numpy", "metadata": None, "structure": None, "checksum": True}
        plan = self.module.plan(list(tensors), batch, **{**settings, **options})
        crcs = np.arange(1, len(views) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
        head = self.module.seal(plan, crcs if options.get("checksum", True) else None).data
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
        return self.reader.index(read, size, "file", **{"verify": True, **options})

    @pytest.mark.parametrize("case", CASES)
    def test_round_trip(self, case: str) -> None:
        tensors = self.tensors(case)
        plan, data, batch = self.make(tensors)
        assert self.reader.sniff(data[:512], len(data))
        index = self.read(data)
        assert index.names.tolist() == list(tensors)
        assert len(index) == len(index.names) == len(batch)
        assert index.entries["offset"].tolist() == plan.offsets.tolist()
        assert index.entries["nbytes"].tolist() == batch.views["nbytes"].tolist()
        for i, name in enumerate(tensors):
            assert (index.dtype(i), index.shape(i)) == (batch[i].dtype, batch[i].shape)
            assert index.names.find(name) == i
            start = int(plan.offsets[i])
            content = bytes(batch[i].owner)  # type: ignore[call-overload]
            assert data[start : start + batch[i].nbytes] == content
        assert index.end == plan.size == len(data)
        assert index.metadata == {}
        assert index.tree is None
        assert index.framework == ("numpy" if self.says_framework else "torch")

    def test_the_same_gives_the_same(self) -> None:
        first = self.make(self.tensors("every type"), **self.options)[1]
        assert self.make(self.tensors("every type"), **self.options)[1] == first

    @pytest.mark.parametrize("case", ["one", "every type"])
    def test_a_file_cut_short_is_refused(self, case: str) -> None:
        _, data, _ = self.make(self.tensors(case))
        lengths = {0, 1, 7, 8, 9, 100, 4095, 4096, len(data) // 2, len(data) - 1}
        for length in (n for n in lengths if n < len(data)):
            with pytest.raises(FormatError, match="file"):
                self.read(data[:length])


class TestSafetensors(FormatSuite):
    module = reader = safetensors
    options = {"metadata": {"a": "b"}, "structure": [1]}

    @pytest.mark.parametrize("case", CASES)
    def test_the_plan_covers_the_file(self, case: str) -> None:
        plan, data, batch = self.make(self.tensors(case))
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
        plan, _, batch = self.make(self.tensors(case))
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

    def test_metadata_and_tree(self) -> None:
        metadata = {"b": "", "a": 'é\n\\"\0', "": "x" * 5000, "format": "mine", "é": "{}"}
        tree = {"k": [1, -2.5, None, True, "é\U0001f600"], "": {}}
        _, data, _ = self.make(CASES["one"], metadata=metadata, structure=tree)
        index = self.read(data)
        assert list(index.metadata.items()) == list(metadata.items())
        assert index.tree == tree

    @pytest.mark.parametrize("name", ["a", "__metadata__", "\ud800"])
    def test_names_that_no_file_holds(self, name: str) -> None:
        batch = TensorBatch.of([TensorView(DTYPES[1], (1,), 0, None)] * 2)
        with pytest.raises(ValueError, match=r"'a'|'__metadata__'|surrogate"):
            self.module.plan(
                ["a", name], batch, framework=None, metadata=None, structure=None, checksum=False
            )

    def test_a_file_too_long_is_refused(self) -> None:
        _, data, _ = self.make(CASES["one"])
        with pytest.raises(FormatError, match="file"):
            self.read(data + b"\0")

    def test_a_stream_ends_where_its_index_says(self) -> None:
        _, data, _ = self.make(CASES["odd sizes"])
        assert self.read(data + b"more", -1).end == len(data)

    @pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "cupy", None])
    def test_framework(self, framework: str | None) -> None:
        _, data, _ = self.make(CASES["one"], framework=framework)
        index = self.read(data)
        assert (index.framework, index.metadata) == (framework, {})

    def test_a_damaged_header_is_a_checksum_error(self) -> None:
        _, data, _ = self.make(CASES["one"], metadata={"note": "hi"})
        with pytest.raises(ChecksumError, match=r"file: .* verify=False"):
            self.read(data.replace(b'"hi"', b'"ho"'))


class Ref:
    """Stands for a tensor in an object that is pickled."""

    def __init__(self, row: int) -> None:
        self.row = row


class Refs:
    """What pickling asks for where tensors are, each the whole of a storage of its own."""

    name = "torch"

    def __init__(self, views: list[TensorView]) -> None:
        self.views = views
        self.keys: list[str] = []

    def add(self, ref: Ref) -> Any:
        view = self.views[ref.row]
        self.keys.append(str(len(self.keys)))
        strides = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
        return self.keys[-1], view.dtype.code, view.nbytes, 0, view.shape, tuple(strides), 0

    def persistent(self, obj: Any) -> None:
        return None

    def batch(self) -> TensorBatch:
        return TensorBatch.of(self.views)


class PickleSuite(FormatSuite):
    """Formats in which an object is a pickle around its tensors' storages."""

    legacy = False

    def stores(self, dtype: str) -> bool:
        return BY_NAME[dtype].torch is not None

    def tensors(self, case: str) -> Tensors:
        found = super().tensors(case)
        found.pop("", None)  # a name made of no text is that of a tensor by itself
        return found

    def pickled(self, obj: Any, refs: Refs) -> Pickle:
        found, _ = pickle_around(
            obj, lambda numpy: refs, frozenset({Ref}), frozenset(), legacy=self.legacy
        )
        return found

    def make(self, tensors: Tensors, **options: Any) -> tuple[Plan, bytes, TensorBatch]:
        views = self.views(tensors)
        obj = {name: Ref(row) for row, name in enumerate(tensors)}
        found = self.pickled(obj, Refs(views))
        settings = {"framework": "numpy", "metadata": None, "checksum": True, "stem": "x"}
        plan = self.module.plan(
            found.keys, found.batch, **{**settings, "structure": found.data, **options}
        )
        out, filled = bytearray(plan.size), np.zeros(plan.size, np.int8)
        contents = [bytes(view.owner) for view in views]  # type: ignore[call-overload]
        for offset, content in zip(plan.offsets.tolist(), contents, strict=True):
            out[offset : offset + len(content)] = content
            filled[offset : offset + len(content)] += 1
        sums = np.array([zlib.crc32(content) for content in contents], np.uint32)
        crcs = sums if options.get("checksum", True) else None
        assert plan.early is not None and len(plan.early) == len(views)
        put(out, filled, self.module.seal(plan, crcs, early=True))
        assert (filled == 1).all(), "pieces and tensors cover the file, each byte once"
        put(out, filled, self.module.seal(plan, crcs))
        return plan, bytes(out), found.batch

    def test_ties_and_views(self) -> None:
        """One storage, two tensors of it."""
        views = self.views({"a": ("float32", (6, 2))})
        refs = Refs(views)
        whole = Ref(0)
        placed = refs.add(whole)
        part = (*placed[:3], 2, (5,), (2,), 0)
        ways = iter([placed, part])
        refs.add = lambda ref: next(ways)  # type: ignore[method-assign]
        obj = {"a": whole, "b": Ref(0), "again": whole}
        found = self.pickled(obj, refs)
        plan = self.module.plan(
            found.keys, found.batch, framework=None, metadata=None, structure=found.data,
            checksum=False, stem="x",
        )  # fmt: skip
        out, filled = bytearray(plan.size), np.zeros(plan.size, np.int8)
        put(out, filled, self.module.seal(plan, None, early=True))
        index = self.read(bytes(out))
        assert index.names.tolist() == ["a", "b"]
        assert index.storage is not None and index.storages is not None
        assert index.storage.tolist() == [0, 0] and len(index.storages) == 1
        assert index.strides is not None and index.structure is not None
        assert index.shape(1) == (5,) and index.strides.tolist() == [8, 4, 8]
        assert index.entries["offset"].tolist() == [plan.offsets[0], plan.offsets[0] + 8]
        assert dict(index.structure.paths()) == {"a": 0, "b": 1, "again": 0}


class TestTorch(PickleSuite):
    module, reader = torch_zip, archive
    options = {"metadata": {"a": "b"}}

    @pytest.mark.parametrize("case", CASES)
    def test_elements_are_aligned(self, case: str) -> None:
        plan, _, _ = self.make(self.tensors(case))
        assert (plan.offsets % 64 == 0).all()

    @pytest.mark.parametrize("checksum", [True, False])
    def test_checksums(self, checksum: bool) -> None:
        _, data, batch = self.make(CASES["odd sizes"], checksum=checksum)
        storages = self.read(data).storages
        assert storages is not None and len(storages) == len(batch)
        has = (storages["flags"] & CHECKED) != 0
        if checksum:
            assert has.all()
            assert storages["crc"].tolist() == [
                zlib.crc32(bytes(view.owner))
                for view in batch  # type: ignore[call-overload]
            ]
        else:
            assert (storages["crc"] == 0).all()
            assert has.tolist() == [view.nbytes == 0 for view in batch]

    @pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "cupy"])
    def test_framework(self, framework: str) -> None:
        _, data, _ = self.make(CASES["one"], framework=framework)
        index = self.read(data)
        assert (index.framework, index.metadata, index.format) == (framework, {}, "torch")

    def test_metadata(self) -> None:
        metadata = {"b": "", "a": 'é\n\\"\0', "": "x" * 5000, "format": "mine", "é": "{}"}
        _, data, _ = self.make(CASES["one"], metadata=metadata)
        assert list(self.read(data).metadata.items()) == list(metadata.items())
        with pytest.raises(TypeError, match="metadata: expected str to str"):
            self.make(CASES["one"], metadata={"a": 1})

    def test_a_file_too_long_is_refused(self) -> None:
        _, data, _ = self.make(CASES["one"])
        for more in (b"\0", b"PK\x05\x06", data):
            with pytest.raises(FormatError, match="file"):
                self.read(data + more)


class TestTorchLegacy(PickleSuite):
    module = reader = torch_legacy
    legacy = True
    says_framework = False

    def test_checksums_there_are_none(self) -> None:
        _, data, _ = self.make(CASES["odd sizes"])
        index = self.read(data)
        assert index.crcs is None and index.storages is not None
        assert not (index.storages["flags"] & CHECKED).any()

    @pytest.mark.parametrize("size", [None, -1])
    def test_a_stream_ends_where_its_index_says(self, size: int | None) -> None:
        _, data, _ = self.make(CASES["odd sizes"])
        assert self.read(data + b"more", size).end == len(data)
