"""Real torch objects: what goes in comes out."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
import holdfast.dtypes

torch = pytest.importorskip("torch")
nn = torch.nn


def equal(a: Any, b: Any) -> bool:
    """Equality that looks at types, dtypes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.requires_grad == b.requires_grad
            and bytes(a.detach().contiguous().flatten().view(torch.uint8).numpy())
            == bytes(b.detach().contiguous().flatten().view(torch.uint8).numpy())
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.drop(self.embed(tokens)))


def train(net: Any, optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 50, (4, 7))
        noise = random.random() + float(np.random.rand())
        loss = nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()) * noise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def make() -> tuple[Any, Any, Any]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_training_run_resumes_exactly(tmp_path: Path, mmap: bool) -> None:
    torch.manual_seed(0)
    net, optimizer, scheduler = make()
    train(net, optimizer, scheduler, 5)
    holdfast.save(
        {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": {
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state(),
                "python": random.getstate(),
            },
            "epoch": 3,
        },
        tmp_path / "ckpt",
    )
    wanted = train(net, optimizer, scheduler, 5)

    ckpt = holdfast.load(tmp_path / "ckpt", mmap=mmap)
    assert ckpt["epoch"] == 3
    other, optimizer, scheduler = make()
    other.load_state_dict(ckpt["model"])
    optimizer.load_state_dict(ckpt["optimizer"])
    scheduler.load_state_dict(ckpt["scheduler"])
    torch.set_rng_state(ckpt["rng"]["torch"])
    np.random.set_state(ckpt["rng"]["numpy"])
    random.setstate(ckpt["rng"]["python"])
    assert train(other, optimizer, scheduler, 5) == wanted


def test_state_dict_with_its_metadata(tmp_path: Path) -> None:
    state = Net().state_dict()
    holdfast.save(state, tmp_path / "x")
    got = holdfast.load(tmp_path / "x")
    assert equal(got, state)
    assert got._metadata == state._metadata
    assert got["embed.weight"].data_ptr() == got["head.weight"].data_ptr()
    got["embed.weight"][0, 0] = 7
    assert got["head.weight"][0, 0] == 7


DTYPES = [row.torch for row in holdfast.dtypes.DTYPES if row.torch and hasattr(torch, row.torch)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path: Path, name: str, mmap: bool) -> None:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2 if name == "bool" else 256, (240,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(3, -1)
    obj = {"a": tensor, "one": tensor[0, 0].clone(), "none": tensor[:, :0], "dtype": dtype}
    holdfast.save(obj, tmp_path / "x")
    got = holdfast.load(tmp_path / "x", mmap=mmap)
    for key in ("a", "one", "none"):
        assert got[key].dtype == dtype and got[key].shape == obj[key].shape
        assert equal(got[key].reshape(-1).view(torch.uint8), obj[key].reshape(-1).view(torch.uint8))
    assert got["dtype"] is dtype
    with holdfast.open(tmp_path / "x") as f:
        assert f.info("a").dtype == name and f.info("a").shape == tensor.shape


def test_layouts(tmp_path: Path) -> None:
    base = torch.arange(120.0).reshape(4, 5, 6)
    obj = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1::2],
        "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 5),
        "view": base[1, 2, 3:5],
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conj": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "neg": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "0-d": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "grad": torch.ones(3, requires_grad=True),
        "nonleaf": torch.ones(3, requires_grad=True) * 2,
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
    }
    holdfast.save(obj, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 9000
    got = holdfast.load(tmp_path / "x")
    for name, tensor in obj.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].requires_grad == tensor.requires_grad, name
        assert type(got[name]) is type(tensor), name


def test_values(tmp_path: Path) -> None:
    obj = {
        "size": torch.Size([1, 2]),
        "dtypes": [torch.float32, torch.bfloat16],
        "device": torch.device("cuda", 1),
        "mixed": {"np": np.arange(3), "pt": torch.arange(3), "scalar": np.float32(1.5)},
    }
    holdfast.save(obj, tmp_path / "x")
    assert equal(holdfast.load(tmp_path / "x"), obj)
    got = holdfast.load(tmp_path / "x", framework="numpy")
    assert type(got["mixed"]["pt"]) is np.ndarray


@pytest.mark.parametrize(
    "make_bad",
    [
        lambda: nn.Linear(2, 2),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.optim.SGD([torch.ones(1)], lr=0.1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_held(tmp_path: Path, make_bad: Any) -> None:
    with pytest.raises(TypeError, match="bad"):
        holdfast.save({"fine": torch.ones(2), "bad": make_bad()}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_map_location(tmp_path: Path) -> None:
    holdfast.save({"x": torch.ones(2)}, tmp_path / "x")
    for location in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda tensor, where: None):
        assert holdfast.load(tmp_path / "x", location)["x"].device.type == "cpu"
    assert holdfast.load(tmp_path / "x", "meta")["x"].device.type == "meta"


def test_tensor_outlives_everything(tmp_path: Path) -> None:
    holdfast.save({"x": torch.arange(1e5), "y": torch.ones(3)}, tmp_path / "x")
    for mmap in (True, False):
        tensor = holdfast.load(tmp_path / "x", mmap=mmap)["x"]
        view = tensor[5:9]
        del tensor
        assert view.tolist() == [5, 6, 7, 8]
    with holdfast.open(tmp_path / "x") as f:
        tensor = f["x"]
    assert tensor[99_999] == 99_999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("counted", [True, False])
def test_load_into_counts_as_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, format: str, counted: bool
) -> None:
    """A gradient that needs what was there before is refused, rather than computed of the new."""
    if not counted:  # PyTorch before 2.1
        monkeypatch.delattr(torch.autograd.graph, "increment_version", raising=False)
    holdfast.save({"w": torch.ones(3), "t": torch.ones(2, 3)}, tmp_path / "x", format=format)
    model = {
        "w": torch.full((3,), 5.0, dtype=dtype, requires_grad=True),
        "t": torch.zeros(3, 2, dtype=dtype).t(),
    }
    loss = (model["w"] * model["w"]).sum()
    holdfast.load_into(model, tmp_path / "x")
    assert model["t"]._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kept = {"w": torch.zeros(3, dtype=dtype), "t": torch.zeros(2, 3, dtype=dtype)}
        holdfast.load_into(kept, tmp_path / "x")
    assert kept["w"].tolist() == [1, 1, 1]


def test_torch_may_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed is asked for each load: it may be by now, or be forbidden."""
    holdfast.save({"size": torch.Size([2, 3]), "x": np.zeros(2)}, tmp_path / "ckpt")
    for _ in range(2):
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, "torch", None)
            assert type(holdfast.load(tmp_path / "ckpt")["size"]) is tuple
        assert type(holdfast.load(tmp_path / "ckpt")["size"]) is torch.Size


def test_torch_may_come_before_it_was_imported(tmp_path: Path) -> None:
    """Nor does one load know from another whether it can be: in a process that has not yet."""
    holdfast.save({"size": torch.Size([2, 3]), "x": np.zeros(2)}, tmp_path / "ckpt")
    program = (
        "import sys, holdfast\n"
        "kind = lambda: type(holdfast.load(sys.argv[1])['size']).__name__\n"
        "sys.modules['torch'] = None\n"
        "assert kind() == 'tuple'\n"
        "del sys.modules['torch']\n"
        "assert kind() == 'Size'\n"
        "sys.modules['torch'] = None\n"
        "assert kind() == 'tuple'\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "ckpt"], check=True, timeout=100)
