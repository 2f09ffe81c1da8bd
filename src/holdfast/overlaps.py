"""Which tensors in memory show the same bytes, and which may share some."""

from __future__ import annotations

from collections.abc import Sequence

from .views import TensorView

__all__ = ["Place", "entangled", "place_of"]

#: The bytes that a tensor shows: the address of the first one, and steps in bytes with how often
#: each is done, the shortest step first.
Place = tuple[int, tuple[tuple[int, int], ...]]


def place_of(view: TensorView) -> Place | None:
    """Where the bytes of a tensor are: equal for tensors that show just the same ones.

    None for a tensor without any.

    Examples
    --------
    >>> from holdfast.dtypes import BY_NAME
    >>> square = TensorView(BY_NAME["uint8"], (2, 2), 4096, None)
    >>> turned = TensorView(BY_NAME["uint8"], (2, 2), 4096, None, strides=(1, 2))
    >>> place_of(square) == place_of(turned) == (4096, ((1, 4),))
    True
    """
    nbytes = view.nbytes
    if not nbytes:
        return None
    if view.strides is None:
        return view.address, ((1, nbytes),)
    axes = [axis for axis in zip(view.strides, view.shape, strict=True) if axis[1] > 1]
    address = view.address + sum(step * (extent - 1) for step, extent in axes if step < 0)
    runs = [(1, view.dtype.itemsize)]
    for step, extent in sorted((abs(step), extent) for step, extent in axes):
        last, count = runs[-1]
        if step == last * count:
            runs[-1] = last, count * extent
        else:
            runs.append((step, extent))
    return address, tuple(runs)


def entangled(places: Sequence[Place | None]) -> list[int]:
    """Positions of the tensors between whose first and last byte there are some of another one.

    Examples
    --------
    >>> entangled([(at, ((1, 4),)) for at in (0, 4, 6, 10)])
    [1, 2]
    """
    spans = []
    for i, place in enumerate(places):
        if place is not None:
            address, runs = place
            reach = sum([step * (count - 1) for step, count in runs]) + 1
            spans.append((address, address + reach, i))
    spans.sort()
    found: set[int] = set()
    end, furthest = 0, -1
    for start, stop, i in spans:
        if start < end:
            found.update((furthest, i))
        if stop > end:
            end, furthest = stop, i
    return sorted(found)
