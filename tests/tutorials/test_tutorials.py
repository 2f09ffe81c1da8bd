"""What the tutorials do, with holdfast in the place of the framework's own save and load.

Each runs with torch and with OneFlow, whichever is installed: their modules are alike.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

import holdfast
import holdfast.oneflow

FRAMEWORKS = [name for name in ("torch", "oneflow") if importlib.util.find_spec(name) is not None]


@pytest.fixture(params=FRAMEWORKS or [pytest.param("none", marks=pytest.mark.skip)])
def flow(request: pytest.FixtureRequest) -> Any:
    """The framework that the tutorials call ``flow``, or ``torch``."""
    return importlib.import_module(request.param)


def values(tensor: Any) -> Any:
    return tensor.detach().numpy()


def same(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and (values(a) == values(b)).all())


def test_a_linear_layer_into_another(flow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    m = flow.nn.Linear(2, 3)
    myparams = {"weight": flow.ones(3, 2), "bias": flow.zeros(3)}
    m.load_state_dict(myparams)
    holdfast.oneflow.save(m.state_dict(), "./model")
    params = holdfast.oneflow.load("./model")
    assert sorted(params) == ["bias", "weight"]
    assert all(isinstance(value, flow.Tensor) for value in params.values())
    m2 = flow.nn.Linear(2, 3)
    m2.load_state_dict(params)
    assert values(m2.weight).tolist() == [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert values(m2.bias).tolist() == [0.0, 0.0, 0.0]
    x = flow.randn(4, 2)
    assert same(m(x), m2(x))


class Layers:
    """The network of the snapshot listing; made for the framework in use."""

    @staticmethod
    def of(flow: Any) -> Any:
        class Net(flow.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.l1 = flow.nn.Linear(784, 64)
                self.l2 = flow.nn.Linear(64, 32)
                self.l3 = flow.nn.Linear(32, 10)

            def forward(self, x: Any) -> Any:
                x = flow.nn.functional.relu(self.l1(x))
                return self.l3(flow.nn.functional.relu(self.l2(x)))

        return Net()


def test_a_network_for_mnist_trained_and_saved(flow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flow.manual_seed(1)
    net = Layers.of(flow)
    loss_of = flow.nn.CrossEntropyLoss()
    optimizer = flow.optim.SGD(net.parameters(), lr=0.1)
    images, labels = flow.randn(32, 784), flow.arange(32) % 10
    losses = []
    for _ in range(5):
        loss = loss_of(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(values(loss)))
    assert losses[-1] < losses[0]
    holdfast.oneflow.save(net.state_dict(), "./mnist_model")
    listing = sorted(
        str(path.relative_to("mnist_model")) for path in Path("mnist_model").rglob("*")
    )
    assert listing == [
        *("l1.bias", "l1.bias/meta", "l1.bias/out"),
        *("l1.weight", "l1.weight/meta", "l1.weight/out"),
        *("l2.bias", "l2.bias/meta", "l2.bias/out"),
        *("l2.weight", "l2.weight/meta", "l2.weight/out"),
        *("l3.bias", "l3.bias/meta", "l3.bias/out"),
        *("l3.weight", "l3.weight/meta", "l3.weight/out"),
        "snapshot_done",
    ]
    assert Path("mnist_model/snapshot_done").stat().st_size == 0
    assert Path("mnist_model/l1.weight/out").stat().st_size == 784 * 64 * 4
    again = Layers.of(flow)
    again.load_state_dict(holdfast.oneflow.load("./mnist_model"))
    assert same(net(images), again(images))
    # Saved once more, what is there is replaced.
    holdfast.oneflow.save(net.state_dict(), "./mnist_model")
    into = Layers.of(flow)
    keys = holdfast.load_into(into, "./mnist_model")
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same(net(images), into(images))


def test_a_single_tensor(flow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    x = flow.arange(4)
    holdfast.oneflow.save({"x": x}, "x-file")
    assert sorted(path.name for path in Path("x-file").iterdir()) == ["snapshot_done", "x"]
    x2 = holdfast.oneflow.load("x-file")
    assert list(x2) == ["x"]
    assert same(x2["x"], x)


def test_a_dict_of_two(flow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = flow.arange(4), flow.zeros(4)
    holdfast.oneflow.save({"x": x, "y": y}, "mydict")
    mydict2 = holdfast.oneflow.load("mydict")
    assert list(mydict2) == ["x", "y"]
    assert same(mydict2["x"], x)
    assert same(mydict2["y"], y)
    holdfast.oneflow.save([x, y], "x-files")
    x2, y2 = holdfast.oneflow.load("x-files")
    assert same(x2, x)
    assert same(y2, y)


class Perceptron:
    @staticmethod
    def of(flow: Any) -> Any:
        class MLP(flow.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.hidden = flow.nn.Linear(20, 256)
                self.output = flow.nn.Linear(256, 10)

            def forward(self, x: Any) -> Any:
                return self.output(flow.nn.functional.relu(self.hidden(x)))

        return MLP()


@pytest.mark.parametrize("layout", ["snapshot", "pickle", "file"])
def test_a_perceptron_and_its_clone(
    flow: Any, tmp_path: Path, monkeypatch: Any, layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    net = Perceptron.of(flow)
    x = flow.randn(2, 20)
    y = net(x)
    holdfast.oneflow.save(net.state_dict(), "mlp.params", layout=layout)
    clone = Perceptron.of(flow)
    clone.load_state_dict(holdfast.oneflow.load("mlp.params"))
    clone.eval()
    assert (values(clone(x)) == values(y)).all()


def test_training_goes_on_where_it_was(flow: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flow.manual_seed(2)
    net = Perceptron.of(flow)
    optimizer = flow.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x = flow.randn(8, 20)

    def step(net: Any, optimizer: Any) -> None:
        (net(x) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(net, optimizer)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
    holdfast.oneflow.save(state, "checkpoint")
    resumed = holdfast.oneflow.load("checkpoint")
    assert resumed["epoch"] == 1
    other = Perceptron.of(flow)
    again = flow.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(resumed["model"])
    again.load_state_dict(copy.deepcopy(resumed["optimizer"]))
    step(net, optimizer)
    step(other, again)
    assert same(net(x), other(x))
