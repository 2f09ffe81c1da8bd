"""``rename=`` of ``load_into``: names in a file, made those of the target."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .reader import Reader

__all__ = ["Rules", "apply", "renamed", "rules_of"]

#: Patterns and what to put in place of what they find, applied in this order.
Rules = list[tuple[re.Pattern[str], str]]


def rules_of(rename: Mapping[str, str] | None) -> Rules:
    """The patterns of `rename`, compiled."""
    if rename is not None and not isinstance(rename, Mapping):
        raise TypeError(f"rename must be a dict of patterns, not {type(rename).__name__}")
    rules = []
    for pattern, text in (rename or {}).items():
        if not isinstance(pattern, str) or not isinstance(text, str):
            raise TypeError(f"rename must map str to str, found {pattern!r}: {text!r}")
        try:
            rules.append((re.compile(pattern), text))
        except re.error as error:
            raise ValueError(f"rename: {pattern!r} is no regular expression: {error}") from None
    return rules


def apply(name: str, rules: Rules) -> str:
    """What the rules make of a name."""
    for pattern, text in rules:
        try:
            name = pattern.sub(text, name)
        except re.error as error:
            raise ValueError(f"rename: {text!r}: {error}") from None
    return name


def renamed(reader: Reader, rules: Rules) -> dict[str, int]:
    """Every name in a file, after `rules`, and its entry."""
    if not rules:
        return reader.paths()
    found: dict[str, int] = {}
    before: dict[str, str] = {}
    for name, row in reader.paths().items():
        new = apply(name, rules)
        if found.setdefault(new, row) != row:
            raise ValueError(
                f"{reader.source.name}: rename makes {new!r} of both {before[new]!r} and {name!r}"
            )
        before.setdefault(new, name)
    return found
