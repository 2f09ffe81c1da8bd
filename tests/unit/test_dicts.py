"""Dicts made of two lists at once."""

from __future__ import annotations

import sys

import pytest

from holdfast._dicts import from_lists


@pytest.mark.parametrize("count", [0, 1, 5, 6, 1000, 21844, 21846, 150_000])
def test_the_same_as_from_pairs(count: int) -> None:
    keys = [f"layers.{i}.weight" for i in range(count)]
    values = [object() for _ in keys]
    made, expected = from_lists(keys, values), dict(zip(keys, values, strict=True))
    assert type(made) is dict
    assert list(made) == keys
    assert all(found is value for found, value in zip(made.values(), values, strict=True))
    assert sys.getsizeof(made) <= sys.getsizeof(expected)


def test_keys_of_any_characters() -> None:
    keys = ["", "a", "ä", "名前", "\U0001f600", "\udcff"]
    assert from_lists(keys, list(range(6))) == dict(zip(keys, range(6), strict=True))


def test_the_last_of_two_equal_keys_stays() -> None:
    assert from_lists(["a", "b", "a"], [1, 2, 3]) == {"a": 3, "b": 2}


def test_it_is_the_caller_s_own() -> None:
    keys, values = ["a", "b"], [[], []]
    first, second = from_lists(keys, values), from_lists(keys, values)
    first["c"] = first.pop("a")
    assert second == {"a": [], "b": []}
    assert (keys, values) == (["a", "b"], [[], []])
    assert from_lists([], []) is not from_lists([], [])


def test_nothing_is_kept() -> None:
    keys, values = [f"{i:06}" for i in range(100)], [object() for _ in range(100)]
    before = [sys.getrefcount(x) for x in keys + values]
    made = from_lists(keys, values)
    del made
    assert [sys.getrefcount(x) for x in keys + values] == before


def test_lists_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="2 keys, 1 values"):
        from_lists(["a", "b"], [1])
