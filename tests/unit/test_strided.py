"""Memory that is not dense in C order, to a file and back, against NumPy's own copy."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import _engine
from holdfast.layout import SEGMENT

DTYPES = ["u1", "u2", "u4", "u8", "c16", "V3", "V12", "V33"]


@pytest.fixture(scope="module")
def fd() -> Iterator[int]:
    fd = os.memfd_create("strided")
    yield fd
    os.close(fd)


def noise(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer(bytearray(os.urandom(count)), dtype).reshape(shape)


def row(view: np.ndarray, offset: int = 0) -> np.ndarray:
    return np.array([(offset, view.nbytes, view.ctypes.data, 0, 0, 0)], SEGMENT)


def layout(view: np.ndarray, swap: int = 0) -> list[tuple]:
    return [(0, view.shape, view.strides, view.itemsize, swap)]


def image(view: np.ndarray, swap: int = 0) -> bytes:
    """What a file should hold of an array, by NumPy alone."""
    data = view.tobytes()
    if not swap:
        return data
    return np.frombuffer(data, np.uint8).reshape(-1, swap)[:, ::-1].tobytes()


def check_gather(fd: int, view: np.ndarray, swap: int = 0) -> None:
    segments = row(view)
    os.ftruncate(fd, 0)
    _engine.write(fd, segments, layouts=layout(view, swap))
    expected = image(view, swap)
    assert os.pread(fd, len(expected) + 1, 0) == expected
    assert segments["crc"][0] == zlib.crc32(expected)
    assert segments["layout"][0] == 0


def check_scatter(fd: int, view: np.ndarray, base: np.ndarray, swap: int = 0) -> None:
    """`view` is of `base`, and no two of its elements share memory."""
    expected = image(noise(view.shape, view.dtype.str), swap)
    os.ftruncate(fd, 0)
    os.pwrite(fd, image(np.frombuffer(expected, np.uint8), 0), 0)
    outside = base.copy()
    segments = row(view)
    _engine.read([fd], segments, layouts=layout(view, swap))
    assert image(view, swap) == expected
    assert segments["crc"][0] == zlib.crc32(expected)
    # What the view does not cover is as it was.
    covered = np.zeros(base.nbytes, bool)
    at = view.ctypes.data - base.ctypes.data
    steps = [np.arange(n) * s for n, s in zip(view.shape, view.strides, strict=True)]
    places = sum(np.ix_(*steps), np.array(at)) if steps else np.array(at)
    for byte in range(view.itemsize):
        covered[np.asarray(places).reshape(-1) + byte] = True
    before, after = (np.frombuffer(a.tobytes(), np.uint8) for a in (outside, base))
    assert (before[~covered] == after[~covered]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed(fd: int, dtype: str) -> None:
    base = noise((70, 133), dtype)
    check_gather(fd, base.T)
    check_scatter(fd, base.T, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reversed_and_stepped(fd: int, dtype: str) -> None:
    base = noise((12, 9, 14), dtype)
    for view in (base[::-1, ::2, ::-3], base[:, 4], base[..., 3:4], base[::5, ::-1].T):
        check_gather(fd, view)
        check_scatter(fd, view, base)


def test_axes_that_repeat(fd: int) -> None:
    for dtype in DTYPES:
        base = noise((5, 1, 6), dtype)
        check_gather(fd, np.broadcast_to(base, (3, 5, 4, 6)))
        check_gather(fd, np.broadcast_to(base[0, 0, :1], (1000,)))


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 2, 1, 0), (0, 2, 3, 1), (1, 3, 0, 2)])
def test_permuted(fd: int, order: tuple[int, ...]) -> None:
    base = noise((3, 17, 5, 19), "u4")
    check_gather(fd, base.transpose(order))
    check_scatter(fd, base.transpose(order), base)


@pytest.mark.parametrize("swap", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["u8", "c16", "V24"])
def test_swapped(fd: int, dtype: str, swap: int) -> None:
    base = noise((21, 30), dtype)
    for view in (base, base.T, base[::2, ::-2], base[3:4, 5:6]):
        check_gather(fd, view, swap)
        check_scatter(fd, view, base, swap)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (0, 3), (3, 0)])
def test_one_element_and_none(fd: int, shape: tuple[int, ...]) -> None:
    base = noise(shape, "u8")
    check_gather(fd, base, 8)
    check_scatter(fd, base, base, 8)


def test_as_many_axes_as_allowed(fd: int) -> None:
    # More than NumPy of old can have, so described by hand: 2 x 2 x ... over the axes that count.
    base = np.arange(64, dtype=np.uint16)
    shape = (1,) * 58 + (2,) * 6
    strides = (7,) * 58 + tuple(2 << k for k in range(6))
    segments = row(base)
    _engine.write(fd, segments, layouts=[(0, shape, strides, 2, 0)])
    assert os.pread(fd, 128, 0) == base.reshape((2,) * 6).T.tobytes()
    with pytest.raises(ValueError, match="segment 0"):
        _engine.write(fd, segments, layouts=[(0, (1, *shape), (0, *strides), 2, 0)])


@pytest.mark.parametrize("swap", [0, 4, 8])
def test_cut_by_chunks_inside_an_element(fd: int, swap: int) -> None:
    # The chunks of a transfer end at multiples of 1 MiB of the file: move the elements, of 24
    # bytes, against them.
    base = noise((300, 420), "V24")
    for shift in range(24):
        segments = row(base.T, offset=shift)
        _engine.write(fd, segments, layouts=layout(base.T, swap), threads=3)
        expected = image(base.T, swap)
        assert os.pread(fd, len(expected), shift) == expected, shift
        assert segments["crc"][0] == zlib.crc32(expected)
        back = np.zeros_like(base)
        segments["address"] = back.T.ctypes.data
        _engine.read([fd], segments, layouts=layout(back.T, swap), threads=3)
        assert back.tobytes() == base.tobytes(), shift


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """An array, and a view of it that any sequence of slices and transpositions can make."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    base = noise(shape, draw(st.sampled_from(DTYPES)))
    steps = st.sampled_from([1, 1, 2, 3, -1, -2])
    view = base[tuple(slice(None, None, draw(steps)) for _ in shape)]
    return base, view.transpose(draw(st.permutations(range(len(shape)))))


@settings(max_examples=150)
@given(pair=views())
def test_any_view(fd: int, pair: tuple[np.ndarray, np.ndarray]) -> None:
    base, view = pair
    check_gather(fd, view)
    check_scatter(fd, view, base)


@pytest.mark.parametrize(
    ("shape", "strides", "itemsize", "swap"),
    [
        ((5,), (2,), 2, 0),  # not the size of the segment
        ((-1, -10), (2, 2), 1, 0),
        ((10,), (1,), 1, 2),  # swaps more than an element has
        ((5,), (2,), 2, 3),
        ((2**40, 2**40, 10), (0, 0, 1), 1, 0),
        ((10, 0), (1, 1), 1, 0),
    ],
)
def test_refuses_what_does_not_fit(
    fd: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, swap: int
) -> None:
    base = np.zeros(10 if itemsize == 1 else 12, np.uint8)
    segments = row(base)
    with pytest.raises(ValueError, match=r"segment 0 of 1, 1[02] bytes at offset 0"):
        _engine.write(fd, segments, layouts=[(0, shape, strides, itemsize, swap)])
    assert segments["layout"][0] == 0
