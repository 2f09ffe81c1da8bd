"""docs/oneflow.md is true: its examples run, and its limits are those of the code."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import pytest

from holdfast import folder, oneflow_saving
from holdfast.formats import _oneflow_meta

PAGE = Path(__file__).parents[2] / "docs" / "oneflow.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def test_the_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the arrays shown are NumPy's
    monkeypatch.setitem(sys.modules, "oneflow", None)
    found = doctest.DocTestParser().get_doctest(page, {}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 5
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_limits_are_those_of_the_code(page: str) -> None:
    assert folder.SMALL == 64 << 10 and "below 64 KiB" in page
    assert _oneflow_meta.MOST == 1 << 20 and "larger than 1 MiB" in page
    for layout in oneflow_saving.LAYOUTS:
        assert f'`"{layout}"`' in page
