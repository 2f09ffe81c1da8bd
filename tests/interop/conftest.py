"""Fixtures of the tests that hold for torch's own save and load and for the drop-in alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def _modules() -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    import holdfast.torch

    return {"torch": torch, "holdfast": holdfast.torch}


@pytest.fixture(params=["torch", "holdfast"])
def impl(request: pytest.FixtureRequest) -> Any:
    """An implementation of ``save`` and ``load``: torch itself, which proves the test, and ours."""
    module = _modules()[request.param]
    return SimpleNamespace(save=module.save, load=module.load, name=request.param)


_PAIRS = {
    "by_torch": ("torch", "torch"),
    "by_holdfast": ("holdfast", "holdfast"),
    "torch_to_holdfast": ("torch", "holdfast"),
    "holdfast_to_torch": ("holdfast", "torch"),
}


@pytest.fixture(params=list(_PAIRS))
def pair(request: pytest.FixtureRequest) -> Any:
    """A ``save`` and a ``load`` that must understand each other."""
    saver, loader = (_modules()[name] for name in _PAIRS[request.param])
    return SimpleNamespace(save=saver.save, load=loader.load, name=request.param)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def zipped(request: pytest.FixtureRequest) -> bool:
    """Which of torch's two formats is written."""
    return bool(request.param)


@pytest.fixture
def again(pair: Any) -> Callable[..., Any]:
    """Save to memory and load: ``again(obj, zipped=True, **load_arguments)``."""

    def run(obj: Any, *, zipped: bool = True, **arguments: Any) -> Any:
        file = io.BytesIO()
        pair.save(obj, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        return pair.load(file, **arguments)

    return run
