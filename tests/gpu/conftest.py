"""Tests of real CUDA devices: skipped with the reason where there is none."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast import staging
from holdfast.views import device_code

# Before JAX asks for its devices: by itself it takes three quarters of their memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).parent
CODE = device_code(2, 0)


@functools.cache
def why_no_torch() -> str:
    """Why torch has no tensors on a CUDA device here, or ``""``."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.hip or not torch.version.cuda:
        return f"torch {torch.__version__} was not built for CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def why_no_cupy() -> str:
    """Why CuPy has no arrays here, or ``""``."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that it does not find
            cupy: Any = importlib.import_module("cupy")
        if cupy.cuda.runtime.is_hip:
            return "this CuPy was built for ROCm"
        return "" if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no CUDA device"
    except Exception as error:
        return f"CuPy cannot be used: {error}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # torch and CuPy say of types and functions of theirs that they are experimental.
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    """A device, whoever has it; what is pinned is given back after each test."""
    if why_no_torch() and why_no_cupy():
        pytest.skip(f"no CUDA device: {why_no_torch()}, {why_no_cupy()}")
    yield
    gc.collect()
    staging.release_pinned()


@pytest.fixture
def torch(cuda: None) -> Any:
    """torch, with a CUDA device."""
    if why_no_torch():
        pytest.skip(why_no_torch())
    return importlib.import_module("torch")


@pytest.fixture
def cupy(cuda: None) -> Any:
    """CuPy, with a CUDA device."""
    if why_no_cupy():
        pytest.skip(why_no_cupy())
    return importlib.import_module("cupy")


@pytest.fixture(params=["cupy", "torch"])
def copies(request: pytest.FixtureRequest, torch: Any) -> Iterator[Any]:
    """What moves the bytes of device 0: CuPy and torch, each in its turn."""
    if request.param == "cupy":
        if why_no_cupy():
            pytest.skip(why_no_cupy())
        device = importlib.import_module("holdfast.staging.cupy").CupyDevice(0)
    else:
        device = importlib.import_module("holdfast.staging.torch").TorchDevice(0)
    staging.register(CODE, device)
    yield device
    torch.cuda.synchronize()
    gc.collect()
    staging.release_pinned()
    staging.unregister(CODE)
