"""Small files that would take much: memory, or time, out of proportion to their size."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import FormatError
from patience import within

pytest.importorskip("numpy")

#: What a file of a few kilobytes may take at most on any machine, in seconds.
PATIENCE = 5.0


def archive(path: Path, records: dict[str, bytes], *, deflated: bool = True) -> Path:
    """An archive with these records."""
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in records.items():
            out.writestr(f"archive/{name}", data)
    return path


def pickled(path: Path, pickle: bytes, *, deflated: bool = True) -> Path:
    """An archive of ``torch.save`` with this pickle."""
    return archive(path, {"data.pkl": pickle, "version": b"3\n"}, deflated=deflated)


class TestDeflated:
    """What is parsed takes a hundred times its size, so deflation must not multiply that."""

    @pytest.mark.parametrize("call", [holdfast.load, holdfast.open, holdfast.load_into])
    @pytest.mark.parametrize("opcode", [b"]", b"}", b")", b"N", b"K\0"])
    def test_pickles_of_one_opcode(self, tmp_path: Path, call: object, opcode: bytes) -> None:
        bomb = pickled(tmp_path / "m.pt", b"\x80\x02(" + opcode * (4 << 20) + b"t.")
        assert bomb.stat().st_size < 1 << 20
        with pytest.raises(FormatError, match=r"data\.pkl.*expected at most \d+ bytes, found"):
            call({}, bomb) if call is holdfast.load_into else call(bomb)  # type: ignore[operator]

    def test_convert_and_verify(self, tmp_path: Path) -> None:
        bomb = pickled(tmp_path / "m.pt", b"\x80\x02(" + b"]" * (4 << 20) + b"t.")
        with pytest.raises(FormatError, match="expected at most"):
            holdfast.convert(bomb, tmp_path / "m.safetensors")
        assert not holdfast.verify(bomb).ok

    def test_the_pickle_of_a_program(self, tmp_path: Path) -> None:
        bomb = b"\x80\x02(" + b"]" * (4 << 20) + b"t."
        records = {"data.pkl": bomb, "constants.pkl": b"\x80\x02).", "version": b"3\n"}
        with pytest.raises(FormatError, match="expected at most"):
            holdfast.load(archive(tmp_path / "m.pt", records))

    def test_the_table_of_an_exported_program(self, tmp_path: Path) -> None:
        table = b'{"config":[' + b"[]," * (2 << 20) + b"[]]}"
        records = {
            "archive_format": b"pt2",
            "models/model.json": b"{}",
            "data/weights/model_weights_config.json": table,
        }
        with pytest.raises(FormatError, match="expected at most") as raised:
            holdfast.load(archive(tmp_path / "m.pt2", records))
        assert "not JSON" not in str(raised.value)

    def test_what_people_deflate_loads(self, tmp_path: Path) -> None:
        """An archive that was unpacked and packed again, with a long history beside its tensors."""
        history = {"loss": [1 / (i + 1) for i in range(150_000)], "steps": list(range(150_000))}
        holdfast.save(history, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as given:
            records = {name.partition("/")[2]: given.read(name) for name in given.namelist()}
        assert len(records["data.pkl"]) > 1 << 20
        assert holdfast.load(archive(tmp_path / "b.pt", records)) == history

    def test_a_small_pickle_may_deflate_to_nothing(self, tmp_path: Path) -> None:
        values = [0.0] * 100_000
        holdfast.save(values, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as given:
            records = {name.partition("/")[2]: given.read(name) for name in given.namelist()}
        assert holdfast.load(archive(tmp_path / "b.pt", records)) == values


class TestCode:
    """The classes of a TorchScript archive are found in text that anyone may have written."""

    @pytest.mark.parametrize(
        "text",
        [
            b"class " + b"a" * 1_000_000 + b"\n",
            b"class " + b"a" * 1_000_000,
            b"class M(Module):\n  __" + b"_" * 1_000_000 + b"\n",
            b"class M(Module):\n  __parameters__ = [" + b'\\"' * 500_000 + b"]\n",
            b"class M(Module):\n  __parameters__ = [" + b'\\"' * 500_000 + b"\\]\n",
            b"class M(Module):\n  __parameters__ = [" + b'"' * 999_999 + b"]\n",
            b"class M(Module):\n  __parameters__ = [" + b'"' * 3_000_000 + b"]\n",
            b"class M(Module):\n" + b"  __buffers__ = []\n" * 50_000,
        ],
    )
    def test_it_takes_no_more_than_its_length(self, tmp_path: Path, text: bytes) -> None:
        with within(PATIENCE):
            assert holdfast.load(self.program(tmp_path / "m.pt", text)) == {}

    def test_more_classes_than_any_program_has(self, tmp_path: Path) -> None:
        path = self.program(tmp_path / "m.pt", b"class a\n" * 1_000_000)
        with pytest.raises(FormatError, match=r"code/__torch__\.py.*at most \d+ classes"):
            holdfast.load(path)

    @staticmethod
    def program(path: Path, text: bytes) -> Path:
        """A module M without attributes, and its code."""
        records = {
            "data.pkl": b"\x80\x02c__torch__\nM\n)\x81}b.",
            "code/__torch__.py": text,
            "constants.pkl": b"\x80\x02).",
            "version": b"3\n",
        }
        return archive(path, records)


class TestRecords:
    """A dtype of NumPy whose fields share a part is small in a pickle, and endless to walk."""

    @staticmethod
    def nested(levels: int, fields: int) -> bytes:
        """Opcodes that leave a record of records on the stack, and their last place in the memo."""

        def text(value: bytes) -> bytes:
            return b"X" + len(value).to_bytes(4, "little") + value

        def dtype(code: bytes, names: bytes, parts: bytes, rest: bytes) -> bytes:
            made = b"cnumpy\ndtype\n(" + text(code) + b"K\0K\1tR"
            return made + b"(K\3" + text(b"|") + b"N" + names + parts + rest + b"tb"

        names = [b"f%d" % i for i in range(fields)]
        listed = b"(" + b"".join(map(text, names)) + b"t"
        made = dtype(b"i1", b"N", b"N", b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0") + b"q\1"
        for level in range(1, levels + 1):
            part = b"h" + bytes([level]) + b"K\0\x86"
            parts = b"}(" + b"".join(text(name) + part for name in names) + b"u"
            made += b"0" + dtype(b"V1", listed, parts, b"K\1K\1K\x10") + b"q" + bytes([level + 1])
        return made

    @pytest.mark.parametrize("use", [b".", b"}h\x0fNs.", b"h\x0f\x86."])
    def test_shared_parts_are_counted(self, tmp_path: Path, use: bytes) -> None:
        pickle = b"\x80\x02" + self.nested(14, 6) + (b"0" + use if use[:1] == b"}" else use)
        refused = pytest.raises(FormatError, match="records nest deeper than 16, or have over")
        with within(PATIENCE), refused:
            holdfast.load(pickled(tmp_path / "m.pt", pickle), framework="numpy")

    def test_records_in_records_load(self, tmp_path: Path) -> None:
        pickle = b"\x80\x02" + self.nested(8, 2) + b"."
        found = holdfast.load(pickled(tmp_path / "m.pt", pickle), framework="numpy")
        assert found.itemsize == 1
        assert found.names == ("f0", "f1")


class TestCopies:
    """Views of one storage, each of which becomes a copy."""

    ELEMENTS = 1 << 20

    @staticmethod
    def text(value: bytes) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value

    def tensor(self, kind: bytes, numel: int, size: int, step: int, marks: bytes = b"") -> bytes:
        """Opcodes that make a tensor with one axis, of the storage 0."""
        key = b"(" + self.text(b"storage") + b"ctorch\n" + kind + b"\n" + self.text(b"0")
        key += self.text(b"cpu") + b"J" + numel.to_bytes(4, "little") + b"tQ"
        shape = b"K\0\x8a\x06" + size.to_bytes(6, "little") + b"\x85K" + bytes([step]) + b"\x85\x89"
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + key + shape + hooks + marks + b"tR"

    def saved(self, path: Path, pickle: bytes, nbytes: int) -> Path:
        records = {"data.pkl": b"\x80\x02" + pickle + b".", "data/0": bytes(nbytes)}
        return archive(path, {**records, "version": b"3\n"})

    @pytest.mark.parametrize("mark", [b"conj", b"neg"])
    def test_an_element_that_is_shown_many_times(self, tmp_path: Path, mark: bytes) -> None:
        marks = b"}" + self.text(mark) + b"\x88s"
        one = self.tensor(b"ComplexFloatStorage", 1, 1 << 40, 0, marks)
        path = self.saved(tmp_path / "m.pt", one, 8)
        found = holdfast.load(path, framework="numpy")
        assert found.shape == (1 << 40,)
        assert found.strides == (0,)
        assert not found.flags.writeable
        with holdfast.open(path, framework="numpy") as opened:
            assert opened["tensor"].shape == (1 << 40,)

    def test_windows_over_one_another(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        whole = torch.randn(10, dtype=torch.complex64)
        windows = whole.as_strided((4, 6), (1, 1), 1).conj()
        torch.save(windows, tmp_path / "m.pt")
        found = holdfast.load(tmp_path / "m.pt", framework="numpy")
        assert found.tolist() == windows.resolve_conj().tolist()

    def test_conjugated_views_of_one_storage(self, tmp_path: Path) -> None:
        n = self.ELEMENTS
        view = self.tensor(b"ComplexFloatStorage", n, n, 1, b"}" + self.text(b"conj") + b"\x88s")
        path = self.saved(tmp_path / "m.pt", b"](" + view * 200 + b"e", 8 * n)
        with pytest.raises(FormatError, match=r"m\.pt: more than \d+ bytes of copies"):
            holdfast.load(path, framework="numpy")

    @pytest.mark.parametrize("framework", ["numpy", "torch"])
    def test_values_for_another_device(self, tmp_path: Path, framework: str) -> None:
        pytest.importorskip(framework)
        n = self.ELEMENTS
        one = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        one += self.tensor(b"ByteStorage", n, n, 1)
        one += b"ctorch\ncomplex128\n" + self.text(b"cpu") + b"\x89tR"
        path = self.saved(tmp_path / "m.pt", b"](" + one * 100 + b"e", n)
        with pytest.raises(FormatError, match=r"more than \d+ bytes of copies"):
            holdfast.load(path, framework=framework)


class TestConvert:
    """A pickle's parts may stand at many places; in a tree, each of them is written out."""

    @staticmethod
    def doubled(levels: int) -> bytes:
        """A list that has a list twice, which has a list twice, and so on."""
        made = b"\x80\x02]q\1"
        for level in range(1, levels + 1):
            part = b"h" + bytes([level])
            made += b"0](" + part + part + b"eq" + bytes([level + 1])
        return made + b"."

    def test_a_tree_out_of_proportion(self, tmp_path: Path) -> None:
        path = pickled(tmp_path / "m.pt", self.doubled(60), deflated=False)
        with pytest.raises(FormatError, match=r"m\.pt: expected an object of at most \d+ items"):
            holdfast.convert(path, tmp_path / "m.safetensors")
        holdfast.convert(path, tmp_path / "n.pt")
        found = holdfast.load(tmp_path / "n.pt")
        assert found[0] is found[1]

    def test_a_tree_in_proportion(self, tmp_path: Path) -> None:
        path = pickled(tmp_path / "m.pt", self.doubled(10), deflated=False)
        holdfast.convert(path, tmp_path / "m.safetensors")
        assert holdfast.load(tmp_path / "m.safetensors") == holdfast.load(path)

    def test_what_contains_itself(self, tmp_path: Path) -> None:
        path = pickled(tmp_path / "m.pt", b"\x80\x02]q\1h\1a.", deflated=False)
        with pytest.raises(ValueError, match="contains itself"):
            holdfast.convert(path, tmp_path / "m.safetensors")
