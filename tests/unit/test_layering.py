"""The three axes know the waist and the standard library, and nothing of each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast

PACKAGE = Path(holdfast.__file__).parent
CSRC = Path(__file__).parents[2] / "csrc"
TREE = {"tree", "_tree_decode", "_tree_flatten", "_tree_json"}
WAIST = {"dtypes", "views", "layout", "structure", "errors", "_buffer", "_dicts", "_placed"} | TREE
IO = {"os", "io", "mmap", "shutil", "tempfile", "pathlib", "socket", "subprocess", "ctypes"}
FRAMEWORKS = {"torch", "cupy", "jax", "oneflow", "tensorflow", "ml_dtypes"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, those of this package from its root ("formats._header")."""
    found = set()
    if path.suffix == ".pyx":
        for match in re.finditer(
            r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", path.read_text(), re.M
        ):
            found.add((match[1] or match[2]).removeprefix("holdfast."))
        return found
    package = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("holdfast.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if node.level and node.module is None:
                found.update(".".join([*base, alias.name]) for alias in node.names)
            else:
                found.add(module.removeprefix("holdfast."))
    return {name for name in found if name != "__future__"}


def own(names: set[str]) -> set[str]:
    """Those of `names` that are modules of this package."""
    tops = {path.stem for path in PACKAGE.iterdir()} | {"adapters", "formats"}
    tops -= {"numpy", "torch", "oneflow"}  # which the frameworks are called, too
    return {name for name in names if name.split(".")[0].split("-")[0] in tops}


def sources(folder: str) -> list[Path]:
    found = sorted(p for p in (PACKAGE / folder).iterdir() if p.suffix in (".py", ".pyx"))
    assert len(found) >= 3, f"too few files in {folder}: is the installed package complete?"
    return found


@pytest.mark.parametrize("path", sources("formats"), ids=lambda p: p.name)
def test_formats_know_the_waist_alone(path: Path) -> None:
    names = imports(path)
    assert names, "nothing was imported: the test reads the wrong thing"
    strangers = {n for n in own(names) if n.split(".")[0] not in WAIST | {"formats"}}
    assert not strangers
    assert not {n.split(".")[0] for n in names} & (IO | FRAMEWORKS)


@pytest.mark.parametrize("path", sources("adapters"), ids=lambda p: p.name)
def test_adapters_know_the_waist_and_their_framework(path: Path) -> None:
    names = imports(path)
    strangers = {n for n in own(names) if n.split(".")[0] not in WAIST | {"adapters"}}
    assert not strangers
    framework = path.stem.strip("_").split("_")[0]
    allowed = {framework, "ml_dtypes" if framework == "numpy" else ""}
    assert not {n.split(".")[0] for n in names} & ((IO - {"ctypes"}) | FRAMEWORKS) - allowed


@pytest.mark.parametrize("path", sources("staging"), ids=lambda p: p.name)
def test_staging_knows_the_waist_and_the_engine(path: Path) -> None:
    names = imports(path)
    assert names, "nothing was imported: the test reads the wrong thing"
    strangers = {n for n in own(names) if n.split(".")[0] not in WAIST | {"_engine", "staging"}}
    assert not strangers
    # What moves bytes through a library imports it in a function, when a device is asked for.
    mine = {path.stem} & FRAMEWORKS
    assert {n.split(".")[0] for n in names} & FRAMEWORKS == mine
    first = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
    assert not {alias.name for node in first for alias in node.names} & FRAMEWORKS


def test_none_but_staging_and_an_adapter_knows_cupy() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx")]
        if "cupy" in {name.split(".")[0] for name in imports(path)}
    }
    assert "staging/cupy.py" in found
    assert found <= {"staging/cupy.py", "adapters/cupy.py"}


@pytest.mark.parametrize("name", sorted(WAIST - {"_buffer", "_dicts", "_placed"}))
def test_the_waist_knows_only_itself(name: str) -> None:
    names = imports(PACKAGE / f"{name}.py")
    assert not {n for n in own(names) if n.split(".")[0] not in WAIST}
    assert not {n.split(".")[0] for n in names} & (IO | FRAMEWORKS)


@pytest.mark.skipif(not CSRC.exists(), reason="the C sources are not beside the tests")
def test_the_engine_knows_neither_python_nor_frameworks() -> None:
    files = sorted(CSRC.glob("*.[ch]"))
    assert len(files) > 8
    for path in files:
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"]Python", text), path
        assert not re.search(r"#include\s*[<\"](cuda|torch|numpy)", text), path


def test_no_file_is_too_long() -> None:
    root = Path(__file__).parents[2]
    found = [
        path
        for folder in ("src", "csrc", "tests", "benchmarks")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".c", ".h", ".pyi")
    ]
    assert len(found) > 30
    lengths = {str(path): len(path.read_text().splitlines()) for path in found}
    assert not {path: n for path, n in lengths.items() if n > 500}


def test_no_line_of_c_is_too_wide() -> None:
    paths = sorted(CSRC.glob("*.[ch]"))
    if not paths:
        pytest.skip("no sources beside the tests")
    wide = [
        f"{path.name}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide


def test_import_brings_in_numpy_at_most() -> None:
    code = """
import sys
before = set(sys.modules)
import holdfast, holdfast.staging
new = {name.split(".")[0] for name in set(sys.modules) - before}
import numpy
heavy = {"torch", "cupy", "jax", "ml_dtypes", "tqdm", "safetensors", "asyncio", "multiprocessing"}
assert "numpy" in new and not new & heavy, sorted(new & heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_loads_comes_with_its_first_use() -> None:
    """`import holdfast` is paid by every program that may load something."""
    code = (
        "import sys, holdfast\n"
        "late = ['loading', 'checkpoint', 'saving', 'fill', 'adapters', 'formats', '_dicts']\n"
        "assert not [name for name in late if f'holdfast.{name}' in sys.modules]\n"
        "assert holdfast.Checkpoint is sys.modules['holdfast.checkpoint'].Checkpoint\n"
        "assert vars(holdfast)['Checkpoint'] is holdfast.Checkpoint\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
