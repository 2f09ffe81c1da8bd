"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import holdfast


def test_examples_run() -> None:
    tried = 0
    for module in pkgutil.walk_packages(holdfast.__path__, "holdfast."):
        if module.name.endswith(("torch", "_dlpack", "__main__")):
            continue  # needs torch, or runs the command
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        tried += result.attempted
    tried += doctest.testmod(holdfast).attempted
    assert tried > 10
