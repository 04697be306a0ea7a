"""Codes of few bits in bytes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from waterfill.runtime.cache.bits import fields, pack, unpack


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**31))
def test_round_trip(bits: int, eighths: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        0, 1 << bits, (rows, 2, 8 * eighths), generator=generator, dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape == (rows, 2, eighths * bits)
    assert torch.equal(unpack(packed, bits), codes)


def test_the_layout_is_as_the_text_says() -> None:
    codes = torch.arange(8, dtype=torch.uint8) + 8  # four bits each, 8 to 15
    # A field of 4: byte j has codes j and j + 4.
    assert pack(codes, 4).tolist() == [8 + 16 * 12, 9 + 16 * 13, 10 + 16 * 14, 11 + 16 * 15]
    # 5 bits: a field of the upper 4, then one of the lowest.
    assert fields(5) == [(4, 1), (1, 0)]
    assert pack(codes, 5)[-1].item() == 0b10101010
