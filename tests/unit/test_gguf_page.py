"""docs/gguf.md is true: its examples run, and its numbers are those of the code."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from holdfast.formats._gguf_types import DEQUANTIZED, TYPES

PAGE = Path(__file__).parents[2] / "docs" / "gguf.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def test_the_examples_run(page: str) -> None:
    found = doctest.DocTestParser().get_doctest(page, {}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 10
    assert doctest.DocTestRunner().run(found).failed == 0


def test_every_type_that_is_not_blocks_is_named(page: str) -> None:
    plain = [row.name for row in TYPES.values() if row.dtype is not None]
    assert len(plain) == 8 and len(DEQUANTIZED) == 5
    assert all(name in page for name in [*plain, *DEQUANTIZED])
