"""Write what is saved for OneFlow anew: `python tests/golden/generate_oneflow.py`.

Never called by a test. It needs no OneFlow, but what it wrote has to be opened by the real one
(`tests/real_oneflow`, with `HOLDFAST_ONEFLOW_PYTHON`) before it is kept: the digests of the tensors
in the manifest are what OneFlow 0.9.0 found.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WRITTEN = HERE / "oneflow" / "written"
sys.path.insert(0, str(HERE.parent))

from oneflow_files import samples, save  # noqa: E402 - it stands beside this folder


def flat(obj: object, name: str = "") -> dict[str, list[object]]:
    """What every tensor in an object is, as ``tests/real_oneflow/other_side.py`` says it."""
    if isinstance(obj, np.ndarray):
        sha = hashlib.sha256(np.ascontiguousarray(obj).tobytes()).hexdigest()
        return {name: ["Tensor", str(obj.dtype), list(obj.shape), sha]}
    pairs = obj.items() if isinstance(obj, dict) else ()
    if isinstance(obj, list | tuple):
        pairs = enumerate(obj)
    found: dict[str, list[object]] = {}
    for key, value in pairs:
        found.update(flat(value, f"{name}.{key}" if name else str(key)))
    return found


def main() -> None:
    shutil.rmtree(WRITTEN, ignore_errors=True)
    WRITTEN.mkdir(parents=True)
    tensors = {}
    for name, (obj, layout) in samples().items():
        save(obj, WRITTEN / name, layout)
        tensors[name] = flat(obj)
    files = {
        str(path.relative_to(WRITTEN)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(WRITTEN.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"tensors": tensors, "files": files}, indent=1)
    (WRITTEN / "manifest.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
