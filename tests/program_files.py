"""Programs for tests, and the archives that older versions of torch.export wrote of them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FOLDER", "PROGRAMS", "digest", "expected", "intermediate", "old", "script", "trace"]

#: Programs that three versions of torch wrote, and what is in them.
FOLDER = Path(__file__).parent / "golden" / "programs"


def expected() -> dict[str, Any]:
    """What each golden program holds and computes, by the name of its file."""
    found: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("expected-programs-*.json")):
        found.update(json.loads(path.read_text()))
    return found


#: Paths of the golden programs.
PROGRAMS = [FOLDER / name for name in sorted(expected())]


def digest(tensor: Any) -> tuple[str, list[int], str]:
    """Dtype, shape and SHA-256 of the elements, as the expectations have them.

    There a scalar has the shape (1,), which ascontiguousarray gives it.
    """
    array = np.ascontiguousarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    return array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()


def script(module: Any) -> Any:
    """A module as TorchScript."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def trace(module: Any, *inputs: Any) -> Any:
    """A module as TorchScript, by what it does with `inputs`."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jit: Any = torch.jit
        return jit.trace(module, inputs)


def old(program: Any, path: Path, method: int = zipfile.ZIP_STORED) -> None:
    """An exported program as torch up to 2.7 saved it."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    made = serialize(program)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("serialized_exported_program.json", made.exported_program)
        archive.writestr("serialized_state_dict.pt", made.state_dict)
        archive.writestr("serialized_constants.pt", made.constants)
        archive.writestr("serialized_example_inputs.pt", made.example_inputs)
        archive.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
        archive.writestr("extra_files/note.txt", "old")


def intermediate(program: Any, path: Path) -> None:
    """An exported program as torch did between: its weights in one record."""
    import torch
    from torch._export.serde.serialize import serialize
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    made = serialize(program)
    with PT2ArchiveWriter(str(path)) as archive:
        for folder, part in (("weights", program.state_dict), ("constants", program.constants)):
            data = io.BytesIO()
            torch.save(part, data)
            archive.write_bytes(f"data/{folder}/model.pt", data.getvalue())
        archive.write_bytes("models/model.json", made.exported_program)
        archive.write_bytes("data/sample_inputs/model.pt", made.example_inputs)
