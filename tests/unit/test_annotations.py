"""What the annotations of public functions name can be looked up."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import holdfast
from holdfast.verification import Report


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """The functions of a module, and the methods of its classes."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            yield name, value
            for own, member in vars(value).items():
                member = member.fget if isinstance(member, property) else member
                if inspect.isfunction(member):
                    yield f"{name}.{own}", member


@pytest.mark.parametrize(
    ("module", "least"),
    [
        ("holdfast", 30),
        ("holdfast.oneflow", 2),
        ("holdfast.torch", 3),
        ("holdfast.torch.jit", 2),
        ("holdfast.torch.export", 2),
    ],
)
def test_hints_of_all_that_is_public(module: str, least: int) -> None:
    if module.startswith("holdfast.torch"):
        pytest.importorskip("torch")
    found = list(public(importlib.import_module(module)))
    for name, value in found:
        try:
            typing.get_type_hints(value)
        except NameError as error:
            pytest.fail(f"{module}.{name}: {error}")
    assert len(found) >= least


def test_hints_name_the_classes() -> None:
    assert typing.get_type_hints(holdfast.verify)["return"] is Report
    hint = typing.get_type_hints(holdfast.save)["staging"]
    assert set(typing.get_args(hint)) == {holdfast.Staging, type(None)}
