"""Save a training run, and resume it exactly: `python examples/training.py` (needs torch)."""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch

import holdfast


def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Train a little; returns the last loss."""
    loss = torch.tensor(0.0)
    for _ in range(steps):
        x = torch.randn(32, 16)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Train, save, go on; then load and go on from there, to the same loss."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, 20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt"
        holdfast.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
            },
            path,
        )
        went_on = run(model, optimizer, 20)

        checkpoint = holdfast.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"][0])
        np.random.set_state(checkpoint["rng"][1])
        random.setstate(checkpoint["rng"][2])
        resumed = run(model, optimizer, 20)
    print(f"went on to {went_on:.9f}, resumed to {resumed:.9f}")
    assert went_on == resumed


if __name__ == "__main__":
    main()
