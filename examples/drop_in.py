"""Code written for torch, not a line of it changed, on holdfast: `python examples/drop_in.py`."""

import tempfile
from pathlib import Path

import torch

import holdfast
import holdfast.torch


def train(folder: Path) -> Path:
    """What a library or a trainer does; it has never heard of holdfast."""
    model = torch.nn.Linear(64, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path = folder / "last.ckpt"
    for epoch in range(3):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, path
        )
    return path


def main() -> None:
    """Train with torch.save and torch.load replaced; torch itself reads what that wrote."""
    with tempfile.TemporaryDirectory() as folder:
        with holdfast.torch.patch(durable=True):  # without `with`: from here on
            path = train(Path(folder))
            assert torch.load(path)["epoch"] == 2
        assert torch.load(path)["epoch"] == 2  # torch's own function again
        report = holdfast.verify(path)
    print(f"{path.name}: {report.checked} tensors, {'whole' if report.ok else report.problems}")


if __name__ == "__main__":
    main()
