"""The command ``holdfast``: look into a checkpoint, verify one, measure this machine."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Sequence

from . import FormatError, __version__, convert, open, verify

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 1 for a bad file, 2 for a bad call."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may be what it cannot encode
    warnings.showwarning = _tell  # type: ignore[assignment]
    try:
        return int(options.run(options))
    except BrokenPipeError:
        return 0
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"holdfast: {error}", file=sys.stderr)
        return 1


def _tell(message: Warning | str, *_: object) -> None:
    """Show a warning as the errors are shown, without the line of a program."""
    print(f"holdfast: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="holdfast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    bench = commands.add_parser(
        "bench", help="save, verify and load a nested checkpoint, beside the rivals installed"
    )
    bench.add_argument("--dir", help="where to write (default: the temporary directory)")
    bench.add_argument("--size", type=_size, default=256 << 20, help="such as 256M (the default)")
    bench.set_defaults(run=_bench)

    check = commands.add_parser("verify", help="check every byte against the checksums")
    check.add_argument("paths", nargs="+", metavar="path")
    check.set_defaults(run=_verify)

    change = commands.add_parser(
        "convert",
        help="write what is in one file to another, in the format that its name means, "
        "or to a folder of shards",
    )
    change.add_argument("src")
    change.add_argument("dst")
    change.add_argument("--format", help="whatever the name of dst says")
    change.add_argument(
        "--max-shard-size",
        type=_shard_size,
        metavar="SIZE",
        help="make dst a folder of safetensors files of at most so many bytes of tensors, "
        "such as 5GB, with an index",
    )
    change.add_argument(
        "--dequantize",
        action="store_true",
        help="make float32 of the blocks of a GGUF file, where their type is known",
    )
    change.set_defaults(run=_convert)

    info = commands.add_parser("info", help="list the tensors of a file; only its header is read")
    info.add_argument("path")
    info.add_argument("--json", action="store_true", help="one JSON object for each tensor")
    info.set_defaults(run=_info)
    return parser


def _size(text: str) -> int:
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits = text.upper().removesuffix("B").removesuffix("I")
    unit = digits[-1:] if digits[-1:] in ("K", "M", "G") else ""
    try:
        size = int(float(digits.removesuffix(unit)) * units[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size")
    return size


def _shard_size(text: str) -> int:
    """A size as ``max_shard_size=`` takes it; digits alone are bytes."""
    from .sharding import size_of

    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bench(options: argparse.Namespace) -> int:
    from ._bench import run

    return run(options.dir, options.size)


def _verify(options: argparse.Namespace) -> int:
    status = 0
    for path in options.paths:
        try:
            report = verify(path)
        except OSError as error:  # the other files are still to be looked at
            print(f"holdfast: {error}", file=sys.stderr)
            status = 1
            continue
        for problem in report.problems:
            print(problem)
        if not report.ok:
            status = 1
        elif report.unchecked:
            print(f"{path}: structure is sound; {report.unchecked} tensors have no checksum")
        else:
            print(f"{path}: ok, {report.checked} tensors checked")
    return status


def _convert(options: argparse.Namespace) -> int:
    convert(
        options.src,
        options.dst,
        options.format,
        max_shard_size=options.max_shard_size,
        dequantize=options.dequantize,
    )
    return 0


def _printable(text: str) -> str:
    """`text` without what a terminal would obey: a file may hold any name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _short(value: object) -> str:
    """A value of the metadata, of which a list may be as long as a vocabulary."""
    if not isinstance(value, list) or len(value) <= 8:
        return str(value)
    return f"{str(value[:8])[:-1]}, ... ({len(value)} in all)]"


def _info(options: argparse.Namespace) -> int:
    with open(options.path, framework="numpy") as checkpoint:
        entries, refused = [], {}
        for name in checkpoint:
            try:
                entries.append(checkpoint.info(name))
            except FormatError as error:
                refused[name] = str(error)
        if options.json:
            for entry in entries:
                fields = ("name", "dtype", "shape", "nbytes", "offset", "file", "encoding")
                print(json.dumps({field: getattr(entry, field) for field in fields}))
            for name, reason in refused.items():
                print(json.dumps({"name": name, "error": reason}))
            return 0
        for key, value in checkpoint.metadata.items():
            print(f"# {_printable(key)}: {_printable(_short(value))}")
        several = len({entry.file for entry in entries}) > 1
        for entry in entries:
            shape = "x".join(map(str, entry.shape)) or "scalar"
            print(
                f"{_printable(entry.name)}  {entry.encoding or entry.dtype}  {shape}  "
                f"{entry.nbytes} bytes at {entry.offset}"
                + (f" of {_printable(entry.file)}" if several else "")
            )
        for name, reason in refused.items():
            print(f"{_printable(name)}  cannot be read: {_printable(reason)}")
        total = sum(entry.nbytes for entry in entries)
        print(f"{len(entries)} tensors, {total} bytes")
    return 0
