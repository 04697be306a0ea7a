"""Fixed-width packing: there and back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill.coding.packing import pack, unpack
from waterfill.types import FormatError


@given(st.integers(1, 8), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_there_and_back(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count).astype(np.uint8)
    data = pack(values, width)
    assert len(data) == -(-count * width // 8)
    assert int.from_bytes(data, "little") == sum(int(v) << i * width for i, v in enumerate(values))
    assert np.array_equal(unpack(data, count, width), values)


@pytest.mark.parametrize("width", [1, 3, 5, 7])
def test_padding_that_is_not_zero_is_refused(width: int) -> None:
    data = bytearray(pack(np.zeros(9, np.uint8), width))
    assert np.array_equal(unpack(bytes(data), 9, width), np.zeros(9, np.uint8))
    data[-1] |= 0x80
    with pytest.raises(FormatError, match="padding"):
        unpack(bytes(data), 9, width)


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(FormatError, match="bytes of packed values"):
        unpack(b"\0\0", 9, 3)
