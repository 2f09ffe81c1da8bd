"""A range of the elements of a strided tensor as boxes.

The dense bytes of a tensor are those of its elements in C order. Which elements a range of them
is can be said with few boxes (an address, a shape and the tensor's strides), each of which a
device copies in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["boxes", "coalesce"]

Box = tuple[int, tuple[int, ...], tuple[int, ...]]


def coalesce(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same elements in the same order, with as few dimensions as possible.

    Dimensions of one element vanish; two of which one steps over what the other walks become one.

    Examples
    --------
    >>> coalesce((2, 1, 3, 4), (96, 7, 16, 4))
    ([2, 12], [96, 4])
    >>> coalesce((2, 3), (4, 8))
    ([2, 3], [4, 8])
    """
    extents: list[int] = []
    steps: list[int] = []
    for extent, step in zip(shape, strides, strict=True):
        if extent == 1:
            continue
        if extents and steps[-1] == extent * step:
            extents[-1] *= extent
            steps[-1] = step
        else:
            extents.append(extent)
            steps.append(step)
    return extents, steps


def boxes(shape: Sequence[int], strides: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """Boxes that together, end to end, are the elements [first, last) in C order.

    Parameters
    ----------
    shape : sequence of int
    strides : sequence of int
        In bytes; zero or negative ones too.
    first, last : int
        Positions among the elements of the tensor.

    Yields
    ------
    start, shape, strides
        `start` in bytes from the element with index zero everywhere. At most two boxes for each
        dimension, none without elements.

    Examples
    --------
    >>> list(boxes((4, 3), (100, 10), 2, 8))
    [(20, (1,), (10,)), (100, (1, 3), (100, 10)), (200, (2,), (10,))]
    """
    extents, steps = coalesce(shape, strides)
    sizes = [1]
    for extent in reversed(extents):
        sizes.append(sizes[-1] * extent)
    sizes.reverse()  # sizes[d]: elements of one step of the dimension before d
    if not 0 <= first <= last <= sizes[0]:
        raise ValueError(f"elements [{first}, {last}) of a tensor of {sizes[0]}")
    at = first
    while at < last:
        # The outermost dimension along which whole steps begin here and fit.
        d = 0
        while d < len(extents) and (at % sizes[d + 1] or at + sizes[d + 1] > last):
            d += 1
        if d == len(extents):  # a tensor of one element
            yield 0, (), ()
            return
        start, rest = 0, at
        for k, step in enumerate(steps):
            start += rest // sizes[k + 1] * step
            rest %= sizes[k + 1]
        index = at % sizes[d] // sizes[d + 1]
        count = min(extents[d] - index, (last - at) // sizes[d + 1])
        yield start, (count, *extents[d + 1 :]), tuple(steps[d:])
        at += count * sizes[d + 1]
