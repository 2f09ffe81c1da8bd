"""The CRC-32 in every variant that this machine has, against zlib."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import _engine

NOISE = os.urandom(3 << 12)


def test_the_check_value_of_the_standard() -> None:
    assert _engine.crc32(b"123456789") == 0xCBF43926


def test_every_length_that_an_inner_loop_can_end_with() -> None:
    # The widest variant takes 512 bytes before it starts and 256 at a step.
    checked = 0
    for nbytes in range(1100):
        data = memoryview(NOISE)[:nbytes]
        expected = zlib.crc32(data, 77)
        found = _engine.crc32_variants(data, 77)
        assert set(found) == {expected}, nbytes
        assert _engine.crc32(data, 77) == expected
        checked += len(found)
    assert checked >= 1100


def test_a_copy_on_the_way() -> None:
    for nbytes in [*range(1, 1100), 5_000_011]:
        data = memoryview(NOISE * (nbytes // len(NOISE) + 1))[3 : 3 + nbytes]
        found = _engine.crc32_copies(data, 77)
        assert len(found) == len(_engine.crc32_variants(data))
        assert {crc for crc, _ in found} == {zlib.crc32(data, 77)}, nbytes
        assert all(copy == data for _, copy in found), nbytes


@pytest.mark.parametrize("nbytes", [1, 15, 16, 17, 63, 64, 255, 256, 511, 512, 513, 4096, 9001])
def test_every_alignment(nbytes: int) -> None:
    block = np.frombuffer(NOISE, np.uint8)
    for shift in range(65):
        data = block[shift : shift + nbytes]
        assert set(_engine.crc32_variants(data)) == {zlib.crc32(data)}, shift


def test_a_large_block() -> None:
    data = os.urandom(5_000_011)
    assert set(_engine.crc32_variants(data)) == {zlib.crc32(data)}


@given(a=st.binary(max_size=2000), b=st.binary(max_size=2000), seed=st.integers(0, 2**32 - 1))
def test_continuing_and_combining(a: bytes, b: bytes, seed: int) -> None:
    whole = zlib.crc32(a + b, seed)
    assert _engine.crc32(b, _engine.crc32(a, seed)) == whole
    assert _engine.crc32_combine(zlib.crc32(a, seed), zlib.crc32(b), len(b)) == whole


def test_combining_over_terabytes() -> None:
    # A row of n zero bytes, doubled again and again: combining must agree with itself.
    crc, nbytes = zlib.crc32(b"\0"), 1
    while nbytes < 1 << 44:
        if nbytes <= 1 << 20:
            assert crc == zlib.crc32(bytes(nbytes))
        crc, nbytes = _engine.crc32_combine(crc, crc, nbytes), 2 * nbytes
    third = _engine.crc32_combine(crc, zlib.crc32(b"\0" * 3), 3)
    assert third == _engine.crc32(b"\0" * 3, crc)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.array])
def test_takes_any_bytes(kind: type) -> None:
    data = np.frombuffer(b"abc", np.uint8) if kind is np.array else kind(b"abc")
    assert _engine.crc32(data) == zlib.crc32(b"abc")
    assert _engine.crc32(b"") == 0


def test_refuses_what_is_not_bytes() -> None:
    with pytest.raises(TypeError):
        _engine.crc32("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mismatch"):
        _engine.crc32(np.zeros(3, np.float32))
