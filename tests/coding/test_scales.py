"""Scales on a logarithmic grid: a few bytes, the same floats everywhere, lies refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON
from waterfill.coding.scales import LIMIT, decode_grid, encode_grid, from_grid, to_grid
from waterfill.types import FormatError


@COMMON
@given(
    count=st.integers(0, 400),
    middle=st.integers(-900, 900),
    spread=st.sampled_from([0.0, 0.3, 2.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_exponents_come_back(count: int, middle: int, spread: float, seed: int) -> None:
    around = np.random.default_rng(seed).normal(size=count) * spread
    exponents = np.clip(np.rint(middle + around), -1008, 1008).astype(np.int32)
    data = encode_grid(exponents)
    got = decode_grid(data, count, 1008)
    assert got.dtype == np.int32 and np.array_equal(got, exponents)
    most = int(np.abs(exponents).max(initial=0))
    if most:
        with pytest.raises(FormatError, match="outside"):
            decode_grid(data, count, most - 1)


def test_sizes() -> None:
    assert encode_grid(np.zeros(1000, np.int32)) == b""
    assert len(encode_grid(np.full(4000, -7, np.int32))) <= 6
    normal = np.rint(np.random.default_rng(0).normal(size=4000) * 2).astype(np.int32)
    assert len(encode_grid(normal)) < 4000 * 3.1 / 8 + 20


@pytest.mark.parametrize("per_octave", [2, 4, 8])
def test_floats_are_exact_everywhere(per_octave: int) -> None:
    exponents = np.arange(-LIMIT * per_octave, LIMIT * per_octave + 1)
    values = from_grid(exponents, per_octave)
    assert values.dtype == np.float32
    exact = 2.0 ** (exponents / per_octave)
    assert np.array_equal(values, exact.astype(np.float32))
    assert np.isfinite(values).all() and (values >= np.finfo(np.float32).tiny).all()
    assert np.array_equal(to_grid(values, per_octave), exponents)


def test_wild_scales_go_to_the_ends() -> None:
    scales = np.array([0.0, 1e-300, 1e300, 1.0])
    assert to_grid(scales, 4).tolist() == [-504, -504, 504, 0]


@pytest.mark.parametrize("spread", [1.0, 9.0])
@pytest.mark.parametrize("count", [5, 200])
def test_damage_is_refused_or_within_the_grid(count: int, spread: float) -> None:
    random = np.random.default_rng(1)
    data = encode_grid(np.rint(random.normal(3, spread, count)).astype(np.int32))
    for cut in range(1, len(data)):
        with pytest.raises(FormatError):
            decode_grid(data[:cut], count, 504)
    with pytest.raises(FormatError):
        decode_grid(data + b"\0", count, 504)
    for _ in range(300):
        broken = bytearray(data)
        broken[int(random.integers(len(broken)))] ^= 1 << int(random.integers(8))
        try:
            got = decode_grid(bytes(broken), count, 504)
        except FormatError:
            continue
        assert got.shape == (count,) and np.abs(got).max() <= 504


@pytest.mark.parametrize("data", [b"\0", b"\0\x21", b"\x80", b"\0\0", b"\0\xff", b"\xff" * 9])
def test_bytes_that_no_encoder_wrote(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_grid(data, 3, 504)
