"""docs/torch.md is true: its code runs, its table is the one that loads obey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import _safe_allowed, safe

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"

Key = tuple[str, str]

#: What the table calls names that come and go with releases -> whether a value is one of them.
KINDS: dict[str, Callable[[object], bool]] = {
    "scalar types": lambda value: isinstance(value, type) and issubclass(value, np.generic),
    "classes of dtypes": lambda value: isinstance(value, type) and issubclass(value, np.dtype),
    "dtypes": lambda value: _is(value, "dtype"),
    "layouts and schemes of quantization": lambda value: _is(value, "layout", "qscheme"),
    "classes of tensors": lambda value: _name(value).endswith("Tensor"),
}


def _is(value: object, *kinds: str) -> bool:
    """Whether this is a constant of torch's; without torch all of them are texts."""
    return type(value).__name__ in kinds or (type(value) is str and value.startswith("torch."))


def _name(value: object) -> str:
    return value.name if isinstance(value, safe.Rule) else getattr(value, "__name__", "")


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def blocks(page: str, *, torch: bool) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(found) == 6
    return [block for block in found if ("import torch" in block) is torch]


def run(block: str, folder: Path) -> None:
    """In another folder, where a relative path to the package would lead nowhere."""
    paths = [str(Path(holdfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", block]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=240)


def test_the_code_without_torch(page: str, tmp_path: Path) -> None:
    chosen = blocks(page, torch=False)
    assert len(chosen) == 3
    for block in chosen:
        run("import sys\nsys.modules['torch'] = None\n" + block, tmp_path)


def test_the_code_with_torch(page: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    chosen = blocks(page, torch=True)
    assert len(chosen) == 3
    for block in chosen:
        run(block, tmp_path)


def allowed(page: str) -> tuple[set[Key], dict[str, list[str]]]:
    """Names of the table, and for each module what it says besides names."""
    table = page.split("<!-- allow-list -->")[1].split("<!-- end -->")[0]
    names: set[Key] = set()
    kinds: dict[str, list[str]] = {}
    for module, text in re.findall(r"^\| `([\w.]+)` \| (.*) \|$", table, re.M):
        assert module not in kinds, f"{module} twice"
        found = re.findall(r"`(\w+)`", text)
        names.update((module, name) for name in found)
        rest = re.sub(r"(`\w+` ?)+,? ?", "", text)
        kinds[module] = [kind.strip() for kind in rest.split(",") if kind.strip()]
        assert set(kinds[module]) <= set(KINDS)
    assert len(names) > 80
    return names, kinds


@pytest.mark.parametrize("torch", [False, True])
def test_the_table_is_what_loads_obey(page: str, torch: bool) -> None:
    if torch:
        pytest.importorskip("torch")
    names, kinds = allowed(page)
    obeyed = safe._table(torch).names
    assert not names - set(obeyed)
    used: set[tuple[str, str]] = set()
    for (module, name), value in obeyed.items():
        if (module, name) in names:
            continue
        fits = [kind for kind in kinds.get(module, []) if KINDS[kind](value)]
        assert fits, f"{module}.{name} is allowed, and the page does not say so"
        used.update((module, kind) for kind in fits)
    said = {(module, kind) for module, texts in kinds.items() for kind in texts}
    # torch may be absent or built without CUDA, NumPy may be older, ml_dtypes may be absent.
    optional = {"torch.cuda", "torch.sparse", "torch.cuda.sparse", "ml_dtypes", "numpy.dtypes"}
    assert not {module for module, _ in said - used} - optional


def test_blocked_modules_are_those_of_the_page(page: str) -> None:
    said = re.search(r"((?:`\w+`,? (?:and )?)+)are blocked", page)
    assert said is not None
    assert set(re.findall(r"`(\w+)`", said[1])) == _safe_allowed.BLOCKED
