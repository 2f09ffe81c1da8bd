"""``python -m holdfast.torch script.py args…``: run a program with torch's save and load replaced.

The program runs as ``python script.py args…`` would run it: as ``__main__``, with the same
``sys.argv`` and ``sys.path``, and it ends with the same status.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
from types import CodeType, ModuleType
from typing import Any, NoReturn

from . import _patch

USAGE = """\
usage: python -m holdfast.torch [--durable] script.py [args…]
       python -m holdfast.torch [--durable] -m module [args…]

Run a program whose torch.save and torch.load are those of holdfast.torch.

  --durable   torch.save to a path returns only when the data are on the device
  -m module   run a module, as python -m does
"""


def main(argv: list[str]) -> None:
    """Run what the arguments name; does not return before the program ends."""
    arguments = list(argv)
    durable = module = False
    while arguments and arguments[0].startswith("-") and not module:
        option = arguments.pop(0)
        if option in ("-h", "--help"):
            sys.stdout.write(USAGE)
            return
        if option == "--durable":
            durable = True
        elif option == "-m":
            module = True
        else:
            _usage(f"unknown option {option}")
    if not arguments:
        _usage("a script or a module is missing")
    _patch.patch_when_imported(durable)
    if module:
        _run_module(arguments[0], arguments[1:])
    else:
        _run_script(arguments[0], arguments[1:])


def _usage(problem: str) -> NoReturn:
    sys.stderr.write(f"{USAGE}\nholdfast.torch: {problem}\n")
    raise SystemExit(2)


def _run_script(path: str, arguments: list[str]) -> None:
    """As ``python path arguments…``."""
    sys.argv = [path, *arguments]
    full = os.path.abspath(path)
    if os.path.isdir(full) or _is_archive(full):
        if not _safe_path():
            del sys.path[0]  # the directory that ``-m`` put there
        sys.path.insert(0, full)
        spec = importlib.machinery.PathFinder.find_spec("__main__", [full])
        if spec is None:
            _fail(f"can't find '__main__' module in {full!r}")
        _execute(_code_of(spec), spec.origin, spec.loader, spec)
        return
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as error:
        sys.stderr.write(f"holdfast.torch: can't open file {full!r}: {error.strerror}\n")
        raise SystemExit(2) from None
    if not _safe_path():
        # The directory of the file itself, where the path is a symbolic link.
        sys.path[0] = os.path.dirname(os.path.realpath(full))
    loader = importlib.machinery.SourceFileLoader("__main__", full)
    _execute(compile(source, full, "exec", dont_inherit=True), full, loader, None)


def _safe_path() -> bool:
    """Whether Python was told not to put a directory of the program's on the path."""
    return bool(getattr(sys.flags, "safe_path", False)) or bool(sys.flags.isolated)


def _is_archive(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and zipfile.is_zipfile(path)


def _run_module(name: str, arguments: list[str]) -> None:
    """As ``python -m name arguments…``; the working directory is first on the path already."""
    sys.argv = ["-m", *arguments]
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            package, name = name, f"{name}.__main__"
            spec = importlib.util.find_spec(name)
            if spec is None:
                _fail(f"No module named {name}; {package!r} is a package and cannot be run")
    except (ImportError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        _fail(f"Error while finding module specification for {name!r} ({problem})")
    if spec is None:
        _fail(f"No module named {name}")
    code = _code_of(spec)
    sys.argv[0] = spec.origin or name
    _execute(code, spec.origin, spec.loader, spec)


def _code_of(spec: importlib.machinery.ModuleSpec) -> CodeType:
    get_code = getattr(spec.loader, "get_code", None)
    code = None if get_code is None else get_code(spec.name)
    if not isinstance(code, CodeType):
        _fail(f"No code object available for {spec.name}")
    return code


def _fail(problem: str) -> NoReturn:
    sys.stderr.write(f"{sys.executable}: {problem}\n")
    raise SystemExit(1)


def _execute(
    code: CodeType, file: str | None, loader: Any, spec: importlib.machinery.ModuleSpec | None
) -> None:
    """Run `code` as the module ``__main__``, which stays that: its classes are pickled by name."""
    main_module = ModuleType("__main__")
    main_module.__dict__.update(
        __file__=file,
        __cached__=None if spec is None else spec.cached,
        __loader__=loader,
        __spec__=spec,
        __package__=None if spec is None else spec.parent,
        __builtins__=builtins,
    )
    global _keep  # else the first __main__, this module, would be cleared while it runs
    _keep = sys.modules["__main__"]
    sys.modules["__main__"] = main_module
    exec(code, main_module.__dict__)  # noqa: S102


_keep: ModuleType | None = None

if __name__ == "__main__":
    main(sys.argv[1:])
