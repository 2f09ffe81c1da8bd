"""Ranges of the elements of strided tensors, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.staging.boxes import boxes, coalesce

AXES = st.lists(st.tuples(st.integers(1, 5), st.integers(-30, 30)), max_size=5)


def elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Where each element is, in C order."""
    where = np.zeros(shape, np.int64)
    for axis, stride in enumerate(strides):
        index = np.arange(shape[axis]) * stride
        where += index.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return where.reshape(-1).tolist()


@given(axes=AXES, data=st.data())
def test_boxes_are_the_range(axes: list[tuple[int, int]], data: st.DataObject) -> None:
    shape = tuple(extent for extent, _ in axes)
    strides = tuple(stride for _, stride in axes)
    total = math.prod(shape)
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    found, n = [], 0
    for start, extents, steps in boxes(shape, strides, first, last):
        assert math.prod(extents) > 0
        found.extend(start + where for where in elements(extents, steps))
        n += 1
    assert found == elements(shape, strides)[first:last]
    assert n <= max(1, 2 * len(shape))


@given(axes=AXES)
def test_coalescing_keeps_order(axes: list[tuple[int, int]]) -> None:
    shape = tuple(extent for extent, _ in axes)
    strides = tuple(stride for _, stride in axes)
    extents, steps = coalesce(shape, strides)
    assert elements(tuple(extents), tuple(steps)) == elements(shape, strides)
    assert 1 not in extents


def test_what_is_dense_is_one_box() -> None:
    assert coalesce((4, 5, 6), (120, 24, 4)) == ([120], [4])
    assert list(boxes((4, 5, 6), (120, 24, 4), 7, 101)) == [(28, (94,), (4,))]


def test_a_range_outside() -> None:
    with pytest.raises(ValueError, match=r"elements \[3, 7\) of a tensor of 6"):
        list(boxes((2, 3), (1, 2), 3, 7))
