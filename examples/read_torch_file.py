"""Look into a file of torch.save, and take the weights out, without torch and without trust.

python examples/read_torch_file.py FILE [OUT.safetensors]
"""

import sys

import holdfast


def main(path: str, out: str | None = None) -> None:
    """List the tensors, say whether the object itself can be loaded, and convert the file."""
    with holdfast.open(path, framework="numpy") as f:  # nothing of the file is run or imported
        for name in f:
            info = f.info(name)
            print(f"{name}: {info.dtype} {info.shape}")
        if len(f):
            first = next(iter(f))
            print(f"{first} begins with {f[first].reshape(-1)[:3]}")
    try:
        print(f"holds a {type(holdfast.load(path, framework='numpy')).__name__} of values")
    except holdfast.UnsafeError as error:
        print(f"holds more than values: {error}")
    if out is not None:
        holdfast.convert(path, out)
        print(f"{out}: {holdfast.verify(out).checked} tensors with checksums")


if __name__ == "__main__":
    main(*sys.argv[1:])
