"""Look into a checkpoint without loading it: `python examples/inspect_weights.py FILE`."""

import sys

import holdfast


def main(path: str) -> None:
    """Print each tensor's name, dtype and shape, and the ten with the most bytes."""
    with holdfast.open(path, framework="numpy") as f:
        infos = [f.info(name) for name in f]
        for info in infos:
            print(f"{info.name}: {info.dtype} {info.shape}")
        print("\nlargest:")
        for info in sorted(infos, key=lambda info: -info.nbytes)[:10]:
            print(f"{info.nbytes:>14,}  {info.name}")


if __name__ == "__main__":
    main(sys.argv[1])
