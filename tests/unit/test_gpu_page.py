"""docs/gpu.md is true as far as it can be shown without a GPU: examples run, names exist."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

import holdfast
from holdfast.staging import ring

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def test_the_examples_run(page: str) -> None:
    found = doctest.DocTestParser().get_doctest(page, {}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 7
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_calls_are_as_they_are_shown(page: str) -> None:
    """What needs a device is not run: functions and the names of their arguments are looked up."""
    shown = [text for text in re.findall(r"```python\n(.*?)```", page, re.S) if ">>>" not in text]
    calls = [
        node
        for text in shown
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("holdfast.")
    ]
    assert len(calls) >= 5
    for call in calls:
        taken = inspect.signature(getattr(holdfast, ast.unparse(call.func).split(".")[1]))
        taken.bind(*call.args, **{word.arg: word.value for word in call.keywords if word.arg})


def test_the_numbers_are_those_of_the_code(page: str) -> None:
    settings = holdfast.Staging()
    assert f"{settings.block_size * settings.blocks >> 20} MiB as it is" in page
    assert f"moves less than\n{ring.PIN_FROM >> 20} MiB pins nothing" in page
    for call in (holdfast.save, holdfast.load, holdfast.open, holdfast.load_into):
        assert "staging" in inspect.signature(call).parameters
