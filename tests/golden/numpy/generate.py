"""Write the golden files of NumPy anew: `python tests/golden/numpy/generate.py`.

Never called by a test. ``numpy-*`` are what NumPy writes, ``holdfast-*`` what holdfast does: a file
of these that changes is a change of the format. Needs ml_dtypes.
"""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np

import holdfast

HERE = Path(__file__).parent


def plain() -> dict[str, np.ndarray]:
    """What NumPy can write and read by itself."""
    record = np.zeros(2, np.dtype([("x", "<f4"), ("y", "<U2"), ("z", "|i1", (3,))], align=True))
    record["x"], record["y"], record["z"] = [1.5, 2.5], ["ab", "é"], [[1, 2, 3], [4, 5, 6]]
    numbers = [np.dtype(code) for code in "?bBhHiIqQefdFD"]
    return {
        **{f"number/{dtype.name}": np.arange(3).astype(dtype) for dtype in numbers},
        "matrix": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype="<i4").reshape(2, 3)),
        "big": np.arange(4, dtype=">f8"),
        "none": np.zeros((0, 3), "f4"),
        "scalar": np.array(7),
        "dates": np.array(["2020-01-01", "NaT"], "M8[s]"),
        "texts": np.array(["a", "ßü"]),
        "bytes": np.array([b"a", b"bcd"]),
        "record": record,
        "é": np.arange(2),
    }


def hinted() -> dict[str, np.ndarray]:
    """What holdfast alone restores."""
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4")
    return {name: np.arange(1, 5).astype(getattr(ml_dtypes, name)) for name in names}


def digest(array: np.ndarray) -> list[object]:
    """Dtype, shape and SHA-256 of the bytes in C order and the machine's byte order."""
    array = array.astype(array.dtype.newbyteorder("<")) if array.dtype.kind in "biufc" else array
    data = hashlib.sha256(array.tobytes()).hexdigest()
    return [array.dtype.name, list(array.shape), data]


def main() -> None:
    """Write all of them, and the manifest."""
    np.savez(HERE / "numpy-savez.npz", **plain())
    np.savez_compressed(HERE / "numpy-compressed.npz", **plain())
    np.save(HERE / "numpy-fortran.npy", plain()["fortran"])
    holdfast.save({**plain(), **hinted()}, HERE / "holdfast.npz")
    holdfast.save(hinted()["bfloat16"], HERE / "holdfast-bfloat16.npy")
    manifest: dict[str, object] = {}
    for path in sorted([*HERE.glob("*.np[yz]")]):
        found = holdfast.load(path)
        arrays = found if isinstance(found, dict) else {"tensor": found}
        manifest[path.name] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "arrays": {name: digest(array) for name, array in arrays.items()},
        }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
