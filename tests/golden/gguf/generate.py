"""Write the golden files of GGUF anew: `python tests/golden/gguf/generate.py` (needs gguf 0.19).

Never called by a test. They are what ggml's own package writes, and the manifest has what it makes
of the quantized tensors.
"""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HERE = Path(__file__).parent

QUANTIZED = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
PLAIN = (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64)


def write(path: Path, alignment: int | None) -> dict[str, list[object]]:
    """One file; returned is what is in it: type, shape and digest of each tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("value.u8", 255)
    writer.add_int8("value.i8", -128)
    writer.add_uint16("value.u16", 65535)
    writer.add_int16("value.i16", -32768)
    writer.add_uint32("value.u32", 2**32 - 1)
    writer.add_int32("value.i32", -(2**31))
    writer.add_uint64("value.u64", 2**64 - 1)
    writer.add_int64("value.i64", -(2**63))
    writer.add_float32("value.f32", 0.5)
    writer.add_float64("value.f64", 1e-3)
    writer.add_bool("value.bool", True)
    writer.add_string("value.text", "größe")
    writer.add_array("list.texts", ["<s>", "</s>", "ü"])
    writer.add_array("list.ints", [1, -2, 3])
    writer.add_array("list.floats", [0.5, -1.5])
    writer.add_array("list.bools", [True, False])
    source = np.random.default_rng(4).standard_normal((6, 64)).astype(np.float32)
    found: dict[str, list[object]] = {}

    def add(name: str, array: np.ndarray, kind: Type | None, numbers: np.ndarray) -> None:
        writer.add_tensor(name, array, raw_dtype=kind)
        digest = hashlib.sha256(numbers.tobytes()).hexdigest()
        found[name] = ["" if kind is None else kind.name, list(numbers.shape), digest]

    for dtype in PLAIN:
        array = (source * 8).astype(dtype)[:2, :3].copy()
        add(np.dtype(dtype).name, array, None, array)
    bfloat16 = gguf.quants.quantize(source[:2], Type.BF16)
    add("bfloat16", bfloat16, Type.BF16, bfloat16.view(np.uint16))
    for kind in QUANTIZED:
        blocks = gguf.quants.quantize(source, kind)
        add(kind.name, blocks, kind, gguf.quants.dequantize(blocks, kind))
    raw = np.arange(2 * 144, dtype=np.uint8).reshape(2, 144)
    add("Q4_K", raw, Type.Q4_K, raw.reshape(2, 1, 144))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def main() -> None:
    """Write all of them, and the manifest."""
    manifest = {}
    for name, alignment in (("ggml.gguf", None), ("ggml-aligned.gguf", 256)):
        found = write(HERE / name, alignment)
        digest = hashlib.sha256((HERE / name).read_bytes()).hexdigest()
        manifest[name] = {"sha256": digest, "tensors": found}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
