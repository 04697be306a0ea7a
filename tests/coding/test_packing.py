"""Fixed-width packing: there and back, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON, PATHS
from waterfill.coding import native
from waterfill.coding.packing import pack, unpack
from waterfill.types import FormatError


@COMMON
@given(width=st.integers(1, 8), count=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_there_and_back(simd: Any, width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count).astype(np.uint8)
    for path in PATHS:
        simd(path)
        data = pack(values, width)
        assert len(data) == -(-count * width // 8)
        number = sum(int(v) << i * width for i, v in enumerate(values))
        assert int.from_bytes(data, "little") == number
        assert np.array_equal(unpack(data, count, width), values)


@pytest.mark.parametrize("width", range(1, 8))
def test_threads_share_what_is_long(simd: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("WATERFILL_THREADS", "3")
    values = np.random.default_rng(width).integers(0, 1 << width, (1 << 20) + 13).astype(np.uint8)
    simd("numpy")
    want = pack(values, width)
    for path in PATHS:
        simd(path)
        assert pack(values.reshape(-1, 1), width) == want
        assert np.array_equal(unpack(memoryview(want), values.size, width), values)


def test_bits_beyond_the_width_are_left_out(simd: Any) -> None:
    for path in PATHS:
        simd(path)
        assert pack(np.array([0xFF, 0x80], np.uint8), 3) == b"\x07"


@pytest.mark.parametrize("path", [path for path in PATHS if path != "numpy"])
def test_the_core_checks_lengths(simd: Any, path: str) -> None:
    simd(path)
    core = native.core()
    assert core is not None
    three = np.zeros(3, np.uint8)
    for width, nbytes in ((3, 1), (3, 3), (0, 0), (8, 3)):
        with pytest.raises(ValueError):
            core.unpack(np.zeros(nbytes, np.uint8), width, three, 1)
        with pytest.raises(ValueError):
            core.pack(three, width, np.zeros(nbytes, np.uint8), 1)


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
