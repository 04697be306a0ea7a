"""Packing of wide values: there and back, how small it is, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding.wide import best_split, pack_digits, pack_wide, unpack_digits, unpack_wide
from waterfill.types import FormatError


@given(st.integers(0, 64), st.integers(0, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_there_and_back(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    values = values >> np.uint64(64 - width) if width else values & np.uint64(0)
    data = pack_wide(values, width)
    assert len(data) == -(-count * width // 8)
    assert int.from_bytes(data, "little") == sum(int(v) << i * width for i, v in enumerate(values))
    assert np.array_equal(unpack_wide(data, count, width), values)


@given(st.integers(1, 2**64), st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_digits_there_and_back(bound: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, bound, count, np.uint64)
    values[0] = bound - 1
    split = best_split(bound, count)
    data = pack_digits(values, split)
    assert len(data) == split.nbytes(count) <= -(-count * (bound - 1).bit_length() // 8)
    assert np.array_equal(unpack_digits(data, count, split), values)


@pytest.mark.parametrize("bound", [3, 5, 18, 1000, 2**40 + 1, 2**63 + 1])
def test_many_digits_take_little_more_than_their_information(bound: int) -> None:
    bits = 8 * best_split(bound, 10_000).nbytes(10_000) / 10_000
    assert np.log2(float(bound)) <= bits + 1e-9 < np.log2(float(bound)) + 0.12


def test_words_and_padding_that_lie_are_refused() -> None:
    split = best_split(18, 7)
    data = pack_digits(np.full(7, 17, np.uint64), split)
    assert (split.low, split.digits) == (0, 7)
    with pytest.raises(FormatError, match="beyond the digits"):
        unpack_digits((18**7).to_bytes(4, "little"), 7, split)
    with pytest.raises(FormatError, match="beyond the digits"):
        unpack_digits((18**6).to_bytes(4, "little"), 6, split)
    with pytest.raises(FormatError, match="padding"):
        unpack_digits(data[:3] + bytes([data[3] | 0x80]), 7, split)
    with pytest.raises(FormatError, match="bytes of packed"):
        unpack_digits(data + b"\0", 7, split)
