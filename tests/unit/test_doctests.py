"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import holdfast


def test_examples_run() -> None:
    tried = 0
    for module in pkgutil.walk_packages(holdfast.__path__, "holdfast."):
        if module.name.endswith("__main__"):
            continue  # runs the command
        try:
            found = importlib.import_module(module.name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] in ("torch", "oneflow", "cupy", "jax"):
                continue  # which this module is for, and which is not installed
            raise
        result = doctest.testmod(found)
        assert result.failed == 0, module.name
        tried += result.attempted
    tried += doctest.testmod(holdfast).attempted
    assert tried > 10
