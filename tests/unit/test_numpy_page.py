"""docs/numpy.md is true: its examples run, and the header that it shows is the one written."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from holdfast.formats import _npy_header, _npz_emit

PAGE = Path(__file__).parents[2] / "docs" / "numpy.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def test_the_examples_run(page: str) -> None:
    found = doctest.DocTestParser().get_doctest(page, {}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 5
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_header_is_the_one_that_is_written(page: str) -> None:
    shown = re.findall(r"^(\{'descr'.*)$", page, re.M)
    head = _npy_header.emit("|V2", (4,), "bfloat16")
    assert shown == [head[10:].decode().rstrip()]
    assert f"0x{_npz_emit._PADDING:X}" in page
    assert _npy_header.MAX_HEADER == 1 << 20 and "1 MiB" in page
