"""What weights_only refuses, in which words, and what allows more."""

from __future__ import annotations

import datetime
import io
import os
import pickle
import subprocess
import sys
import zipfile
import zoneinfo
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
serialization = torch.serialization

from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

Again = Callable[..., Any]
BOTH = pytest.mark.parametrize("weights_only", [True, False])

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@pytest.fixture(autouse=True)
def registrations() -> Iterator[None]:
    """What is registered as safe, as it was afterwards."""
    before = serialization.get_safe_globals()
    yield
    serialization.clear_safe_globals()
    serialization.add_safe_globals(before)


# Classes that are pickled in one way each. They have to be found by name.
Point = namedtuple("Point", ["x", "y"])


class Outer:
    class Nested:
        pass


class Built:
    def __init__(self, num: int) -> None:
        self.num = num

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Built, (self.num,), {"foo": "bar"}


class Restored(Built):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return Restored, (self.num,), {"foo": "bar"}

    def __setstate__(self, state: Any) -> None:
        self.restored = state


@dataclass
class AllSlots:
    __slots__ = ["x", "y"]
    x: int
    y: int


@dataclass
class SomeSlots(AllSlots):
    x: int
    y: int
    c: str


class Wrapper(torch.Tensor):
    elem: Any
    __slots__ = ["elem"]

    @staticmethod
    def __new__(cls, elem: Any) -> Any:
        made = torch.Tensor._make_subclass(cls, elem.to("meta"), elem.requires_grad)
        made.elem = elem
        return made


class Stateful(torch.Tensor):
    elem: Any
    __slots__ = ["elem"]

    @staticmethod
    def __new__(cls, elem: Any) -> Any:
        made = torch.Tensor._make_subclass(cls, elem.to("meta"), elem.requires_grad)
        made.elem = elem
        return made

    def __getstate__(self) -> Any:
        return ("mark", getattr(self, "elem", None), self.__dict__)

    def __setstate__(self, state: Any) -> None:
        mark, self.elem, self.__dict__ = state
        self.reloaded = mark == "mark"


class Empty(torch.Tensor):
    pass


class Packed(torch.Tensor):
    """Four-bit elements, two in a byte."""

    @staticmethod
    def __new__(cls, elem: Any) -> Any:
        shape = (*elem.shape[:-1], elem.shape[-1] * 2)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint4)

    def __init__(self, elem: Any) -> None:
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return None


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of this module are found by its name, as pickle needs it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())


def _this() -> Any:
    from types import ModuleType

    module = ModuleType(__name__)
    module.__dict__.update(globals())
    return module


def saved(impl: Any, obj: Any, **arguments: Any) -> io.BytesIO:
    file = io.BytesIO()
    impl.save(obj, file, **arguments)
    file.seek(0)
    return file


def reload(impl: Any, file: io.BytesIO, **arguments: Any) -> Any:
    file.seek(0)
    return impl.load(file, **arguments)


CALLED: list[str] = []


class Calls:
    """Reduces to a call that leaves a trace."""

    def __reduce__(self) -> Any:
        return CALLED.append, ("called",)


class Prints:
    def __reduce__(self) -> Any:
        return print, ("Hello World!",)


def test_a_call_is_refused_and_not_made(
    impl: Any, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(impl, Prints(), _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global: GLOBAL print"):
        reload(impl, file, weights_only=True)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        reload(impl, file)
    assert capsys.readouterr().out == ""
    with serialization.safe_globals([print]):
        assert reload(impl, file, weights_only=True) is None
    assert capsys.readouterr().out == "Hello World!\n"
    assert reload(impl, file, weights_only=False) is None
    assert capsys.readouterr().out == "Hello World!\n"


@pytest.mark.parametrize("name", ["execv", "system", "remove"])
def test_modules_that_nothing_allows(impl: Any, zipped: bool, name: str) -> None:
    function = getattr(os, name)
    file = saved(impl, function, _use_new_zipfile_serialization=zipped)
    words = f"{name} whose module posix is blocked"
    with pytest.raises(pickle.UnpicklingError, match=words):
        reload(impl, file, weights_only=True)
    with (
        serialization.safe_globals([function]),
        pytest.raises(pickle.UnpicklingError, match=words),
    ):
        reload(impl, file, weights_only=True)
    assert reload(impl, file, weights_only=False) is function


@pytest.mark.parametrize(
    "obj",
    [Point(1, 2), Built(2), AllSlots(2, 3), SomeSlots(2, 3, "foo")],
    ids=lambda obj: type(obj).__name__,
)
def test_classes_have_to_be_allowed(pair: Any, zipped: bool, obj: Any) -> None:
    file = saved(pair, obj, _use_new_zipfile_serialization=zipped)
    cls = type(obj)
    words = f"GLOBAL {__name__}.{cls.__name__} was not an allowed global by default"
    with pytest.raises(pickle.UnpicklingError, match=words):
        reload(pair, file, weights_only=True)
    with serialization.safe_globals([cls]):
        got = reload(pair, file, weights_only=True)
    assert type(got) is cls
    if cls is Built:
        assert (got.num, got.foo) == (2, "bar")
    else:
        assert got == obj
    with pytest.raises(pickle.UnpicklingError, match=words):
        reload(pair, file, weights_only=True)


def test_the_error_says_what_allows_it(impl: Any) -> None:
    file = saved(impl, {"t": TwoTensor(torch.randn(2), torch.randn(2))})
    with pytest.raises(pickle.UnpicklingError) as caught:
        impl.load(file, weights_only=True)
    text = str(caught.value)
    full = "torch.testing._internal.two_tensor.TwoTensor"
    assert f"Unsupported global: GLOBAL {full}" in text
    assert "weights_only" in text and "False" in text
    assert f"add_safe_globals([{full}])" in text or f"safe_globals=[{full}]" in text
    assert f"safe_globals([{full}])" in text or f"safe_globals=[{full}]" in text


def test_states_are_set_by_their_class(pair: Any) -> None:
    file = saved(pair, Restored(4))
    with serialization.safe_globals([Restored]):
        got = reload(pair, file, weights_only=True)
    assert got.num == 4 and got.restored == {"foo": "bar"}
    assert not hasattr(got, "foo")


def test_nested_classes(pair: Any) -> None:
    """Protocol 2 writes a nested class as a call of getattr."""
    file = saved(pair, {"a": Outer.Nested(), "b": [Outer.Nested]})
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        reload(pair, file, weights_only=True)
    with (
        serialization.safe_globals([Outer, getattr]),
        pytest.raises(pickle.UnpicklingError, match="Nested"),
    ):
        reload(pair, file, weights_only=True)
    with serialization.safe_globals([Outer, getattr, Outer.Nested]):
        got = reload(pair, file, weights_only=True)
    assert type(got["a"]) is Outer.Nested and got["b"] == [Outer.Nested]


def test_methods_have_to_be_allowed_by_themselves(pair: Any) -> None:
    zone = zoneinfo.ZoneInfo("UTC")
    data = {"a": torch.ones(3), "b": datetime.datetime(2025, 1, 1, 12, 0, tzinfo=zone)}
    file = saved(pair, data)
    allowed: list[Any] = [datetime.datetime, getattr, zoneinfo.ZoneInfo]
    with (
        serialization.safe_globals(allowed),
        pytest.raises(pickle.UnpicklingError, match=r"_unpickle.*zoneinfo\.ZoneInfo"),
    ):
        reload(pair, file)
    with serialization.safe_globals([*allowed, zoneinfo.ZoneInfo._unpickle]):
        assert reload(pair, file)["b"] == data["b"]


def test_registrations(impl: Any) -> None:
    t = TwoTensor(torch.randn(2, 3), torch.randn(2, 3))
    file = saved(impl, OrderedDict(t=t, p=nn.Parameter(t)))
    words = "Unsupported global: GLOBAL torch.testing._internal.two_tensor.TwoTensor"
    with pytest.raises(pickle.UnpicklingError, match=words):
        reload(impl, file)
    serialization.add_safe_globals([TwoTensor])
    got = reload(impl, file)
    assert torch.equal(got["t"].a, t.a) and torch.equal(got["p"].b, t.b)
    assert type(got["p"]) is TwoTensor or isinstance(got["p"], nn.Parameter)
    serialization.clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError, match=words):
        reload(impl, file)
    serialization.add_safe_globals([(TwoTensor, "torch.testing._internal.two_tensor.TwoTensor")])
    assert torch.equal(reload(impl, file)["t"].a, t.a)


def test_names_under_which_a_class_is_allowed(impl: Any) -> None:
    file = saved(impl, Point(1, 2))
    with (
        serialization.safe_globals([(Point, "elsewhere.Point")]),
        pytest.raises(pickle.UnpicklingError, match="Point"),
    ):
        reload(impl, file)
    with serialization.safe_globals([(Built, f"{__name__}.Point")]):
        assert type(reload(impl, file)) is Built


@BOTH
def test_subclasses_of_tensor(pair: Any, weights_only: bool) -> None:
    for cls in (Wrapper, Stateful):
        tensor = cls(torch.rand(2))
        tensor.note = "text"
        file = saved(pair, tensor)
        if weights_only:
            with pytest.raises(pickle.UnpicklingError, match=cls.__name__):
                reload(pair, file)
        with serialization.safe_globals([cls]):
            got = reload(pair, file, weights_only=weights_only)
        assert type(got) is cls
        assert torch.equal(got.elem, tensor.elem)
        assert got.note == "text"
        assert getattr(got, "reloaded", cls is Wrapper)


@pytest.mark.parametrize("make", [lambda: Empty([1.0]), lambda: Empty()], ids=["one", "none"])
def test_subclasses_without_anything(pair: Any, make: Any) -> None:
    tensor = make()
    file = saved(pair, {"x": tensor})
    with serialization.safe_globals([Empty]):
        got = reload(pair, file)["x"]
    assert type(got) is Empty and got.tolist() == tensor.tolist()


def test_wrapper_subclasses(pair: Any) -> None:
    tensor = TwoTensor(torch.randn(2, 3), torch.randn(2, 3))
    file = saved(pair, {"t": tensor})
    with serialization.safe_globals([TwoTensor]):
        for arguments in ({}, {"map_location": "cpu"}, {"weights_only": False}):
            got = reload(pair, file, **arguments)["t"]
            assert type(got) is TwoTensor
            assert torch.equal(got.a, tensor.a) and torch.equal(got.b, tensor.b)
    packed = Packed(torch.tensor([[1, 0x23, 0x45], [0x67, 0x89, 0xAB]], dtype=torch.uint8))
    file = saved(pair, packed)
    with serialization.safe_globals([Packed]):
        got = reload(pair, file)
    assert got.dtype == torch.uint4 and got.shape == (2, 6)
    assert torch.equal(got.elem, packed.elem)


def test_what_torch_finds_in_our_files(impl: Any) -> None:
    file = saved(impl, TwoTensor(torch.ones(2), torch.ones(2)))
    found = serialization.get_unsafe_globals_in_checkpoint
    assert found(file) == ["torch.testing._internal.two_tensor.TwoTensor"]
    file.seek(0)
    with serialization.safe_globals([TwoTensor]):
        assert found(file) == []


class Spoofed:
    """Pickled as a sparse tensor with components that do not fit."""

    def __init__(self, layout: Any, parts: Any) -> None:
        self.layout, self.parts = layout, parts

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_sparse_tensor, (self.layout, self.parts)


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_sparse_tensors_are_checked_where_asked_for(impl: Any, weights_only: bool) -> None:
    x = torch.zeros(3, 3)
    x[1][1] = 1
    coo, csr = x.to_sparse(), x.to_sparse_csr()
    indices = coo._indices().clone()
    indices[0][0] = 3
    rows = csr.crow_indices().clone()
    rows[0] = 3
    bad = [
        (torch.sparse_coo, (indices, coo._values(), coo.size()), "size is inconsistent|extent"),
        (torch.sparse_csr, (rows, csr.col_indices(), csr.values(), csr.size()), "indices"),
    ]
    for layout, parts, words in bad:
        file = saved(impl, {"spoofed": Spoofed(layout, parts)})
        with (
            torch.sparse.check_sparse_tensor_invariants(),
            pytest.raises(RuntimeError, match=words),
        ):
            impl.load(file, weights_only=weights_only)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(impl: Any, tmp_path: Path) -> None:
    program = torch.jit.script(nn.Linear(3, 4))
    torch.jit.save(program, tmp_path / "x.pt")
    words = "Cannot use ``weights_only=True`` with TorchScript archives passed to ``torch.load``"
    for arguments in ({}, {"weights_only": True}):
        for source in (tmp_path / "x.pt", io.BytesIO((tmp_path / "x.pt").read_bytes())):
            with (
                pytest.warns(UserWarning, match="looks like a TorchScript archive") as caught,
                pytest.raises(RuntimeError, match=words),
            ):
                impl.load(source, **arguments)
            assert caught[0].filename == __file__
    x = torch.randn(2, 3)
    for source in (tmp_path / "x.pt", io.BytesIO((tmp_path / "x.pt").read_bytes())):
        with pytest.warns(UserWarning, match="looks like a TorchScript archive"):
            got = impl.load(source, weights_only=False)
        assert isinstance(got, torch.jit.ScriptModule)
        assert torch.equal(got(x), program(x))


@BOTH
def test_nested_jagged_tensors_need_their_modules(
    impl: Any, tmp_path: Path, weights_only: bool
) -> None:
    """The allow-list has their classes only once the modules are imported."""
    jagged = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    impl.save(jagged, tmp_path / "x.pt")
    script = (
        "import torch, holdfast.torch\n"
        f"load = {'holdfast.torch' if impl.name == 'holdfast' else 'torch'}.load\n"
        f"got = load({str(tmp_path / 'x.pt')!r}, weights_only={weights_only})\n"
        "assert [t.numel() for t in got.unbind()] == [3, 2]\n"
    )
    without = "import sys, torch\nassert 'torch._dynamo' not in sys.modules\n"
    for preamble, words in ((without, "must be imported to load"), ("import torch._dynamo\n", "")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", preamble + script], capture_output=True,
            text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        if weights_only and words:
            assert done.returncode != 0 and words in done.stderr, done.stderr
        else:
            assert done.returncode == 0, done.stderr


def test_nothing_is_called_while_refusing(impl: Any, zipped: bool) -> None:
    file = saved(impl, [torch.ones(2), Calls()], _use_new_zipfile_serialization=zipped)
    CALLED.clear()
    with pytest.raises(pickle.UnpicklingError):
        reload(impl, file)
    assert CALLED == []


def test_a_zip_that_is_not_torchs(impl: Any) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b.txt", "text")
    file.seek(0)
    with pytest.raises(RuntimeError):
        impl.load(file)
