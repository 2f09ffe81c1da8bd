"""docs/shards.md is true: its examples run, and the index that it shows is the one written."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

import holdfast

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text()


def test_the_examples_run(page: str) -> None:
    found = doctest.DocTestParser().get_doctest(page, {}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 6
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_index_is_the_one_that_is_written(page: str, tmp_path: Path) -> None:
    weights = {f"layer.{i}": np.full(250, i, np.float32) for i in range(3)}
    holdfast.save({"model": weights, "epoch": 3}, tmp_path / "m", max_shard_size="2KB")
    text = (tmp_path / "m" / "model.safetensors.index.json").read_text()
    shown = re.search(r'"crc32": "([0-9a-f]{8})"', page)
    written = re.search(r'"crc32": "([0-9a-f]{8})"', text)
    assert shown and written and shown[1] == written[1]
    for line in ('"total_size": 3000', '"model.layer.0": "model-00001-of-00002.safetensors"'):
        assert line in text and line in page
