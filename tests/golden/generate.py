"""Write the golden files anew: `python tests/golden/generate.py` (needs torch and safetensors).

Never called by a test. A file that changes here is a change of the format: it has to be meant, and
the old files stay beside the new ones, for they have to be read for ever.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

import holdfast

HERE = Path(__file__).parent


def nested() -> object:
    """NumPy arrays and most kinds of values."""
    weight = np.arange(24, dtype="f4").reshape(4, 6)
    return {
        "model": OrderedDict(
            [("fc.weight", weight), ("fc.bias", np.arange(4.0)), ("tied", weight)]
        ),
        "optimizer": {"state": {0: {"step": np.array(7, "i8")}}, "lr": 1e-3, "betas": (0.9, 0.999)},
        "values": [None, True, 1 << 80, -0.0, float("inf"), 1 + 2j, b"\0\xff", "\u00e9", {1, 2}],
        "stored as bytes": np.array([1 + 2j, 3 - 4j]),
        "scalar": np.float32(1.5),
        "long": bytes(range(256)) * 5,
    }


def state_dict() -> object:
    """A state dict of PyTorch, with the types that NumPy lacks."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(2, 3))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    state = layer.state_dict()
    state["half"] = torch.arange(5).to(torch.bfloat16)
    state["eighth"] = torch.arange(5).to(torch.float8_e4m3fn)
    return state


def digests(checkpoint: holdfast.Checkpoint) -> dict[str, object]:
    """What the tests compare: dtype, shape and SHA-256 of the bytes of each tensor."""
    path = Path(checkpoint.info(next(iter(checkpoint))).file)
    data = path.read_bytes()
    found = {}
    for name in checkpoint:
        info = checkpoint.info(name)
        raw = data[info.offset : info.offset + info.nbytes]
        found[name] = [info.dtype, list(info.shape), hashlib.sha256(raw).hexdigest()]
    return found


def main() -> None:
    """Write the files and the manifest."""
    holdfast.save(nested(), HERE / "nested-v1.safetensors", metadata={"who": "golden"})
    holdfast.save(state_dict(), HERE / "state_dict-v1.safetensors")
    arrays = {"b": np.arange(3, dtype="u1"), "a": np.arange(6, dtype="f8").reshape(2, 3)}
    safetensors.numpy.save_file(arrays, HERE / "foreign-0.8.safetensors", metadata={"k": "v"})
    manifest = {}
    for path in sorted(HERE.glob("*.safetensors")):
        with holdfast.open(path, framework="numpy") as checkpoint:
            manifest[path.name] = {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "tensors": digests(checkpoint),
            }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (HERE / "manifest.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
