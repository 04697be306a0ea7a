"""The Walsh-Hadamard transform: one result everywhere, its own inverse, and the matrix it stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON, PATHS
from waterfill.coding.hadamard import MAX_BLOCK, hadamard

BLOCKS = [1 << bits for bits in range(1, 16)]


def matrix(n: int) -> np.ndarray:
    """Sylvester's matrix by the parity of common bits, orthonormal, float64."""
    i = np.arange(n)
    common = i[:, None] & i
    parity = np.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity) / math.sqrt(n)


def rows_of(rows: int, n: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, n), np.float32)
    x *= np.exp2(random.integers(-40, 40, (rows, n))).astype(np.float32)
    x[random.random((rows, n)) < 0.05] = -0.0
    return x


def signs_of(n: int, seed: int) -> np.ndarray:
    return (1 - 2 * np.random.default_rng(seed).integers(0, 2, n)).astype(np.int8)


@COMMON
@given(
    block=st.sampled_from(BLOCKS),
    times=st.integers(1, 9),
    rows=st.integers(0, 5),
    seed=st.integers(0, 1 << 16),
    signed=st.booleans(),
    inverse=st.booleans(),
    in_place=st.booleans(),
    threads=st.integers(1, 3),
)
def test_every_implementation_gives_the_same_bits(
    simd: Any, block: int, times: int, rows: int, seed: int, signed: bool, inverse: bool,
    in_place: bool, threads: int,
) -> None:  # fmt: skip
    n = block * times if block < 4096 else block
    x, signs = rows_of(rows, n, seed), signs_of(n, seed) if signed else None
    seen = set()
    for path in PATHS:
        simd(path)
        given_x = x.copy()
        out = given_x if in_place else np.full_like(x, np.nan)
        y = hadamard(given_x, block, signs, inverse, out, threads)
        assert y is out and (in_place or given_x.tobytes() == x.tobytes())
        seen.add(y.tobytes())
        assert hadamard(x, block, signs, inverse).tobytes() == y.tobytes()
    assert len(seen) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_it_is_the_matrix(simd: Any, path: str, block: int) -> None:
    simd(path)
    n = 3 * block
    x, signs = rows_of(4, n, block), signs_of(n, block)
    x /= np.abs(x).max(axis=1, keepdims=True)
    want = (x * signs).reshape(-1, block) @ matrix(block).T
    got = hadamard(x, block, signs)
    assert np.allclose(got, want.reshape(4, n), rtol=0, atol=2e-6)
    back = (x.reshape(-1, block) @ matrix(block)).reshape(4, n) * signs
    assert np.allclose(hadamard(x, block, signs, inverse=True), back, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_it_undoes_itself_and_keeps_lengths(simd: Any, path: str, block: int) -> None:
    simd(path)
    n = 2 * block
    x = np.random.default_rng(block).standard_normal((3, n), np.float32)
    signs = signs_of(n, 7)
    y = hadamard(x, block, signs)
    assert np.allclose(hadamard(y, block, signs, inverse=True), x, rtol=0, atol=4e-6)
    lengths = np.linalg.norm(x.reshape(-1, block).astype(np.float64), axis=1)
    assert np.allclose(np.linalg.norm(y.reshape(-1, block), axis=1), lengths, rtol=1e-6)
    assert np.allclose(hadamard(hadamard(x, block), block), x, rtol=0, atol=4e-6)
    # One outlier becomes a block of equals: exact, since 1 / sqrt(4^k) is a power of two.
    spike = np.zeros((1, block), np.float32)
    spike[0, block // 3] = 3
    assert set(np.abs(hadamard(spike)).ravel().tolist()) == {
        float(np.float32(3) * np.float32(1 / math.sqrt(block)))
    }


@pytest.mark.parametrize("path", PATHS)
def test_numbers_near_the_largest_do_not_overflow_on_the_way(simd: Any, path: str) -> None:
    simd(path)
    x = np.zeros((1, MAX_BLOCK), np.float32)
    x[0, :64] = 3e38
    y = hadamard(x)
    assert np.isfinite(y).all() and float(y[0, 0]) == pytest.approx(
        64 * 3e38 / math.sqrt(MAX_BLOCK)
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_number_that_is_none_stays_in_its_block(simd: Any, path: str) -> None:
    simd(path)
    x = np.ones((2, 64), np.float32)
    x[0, 3], x[1, 40] = np.nan, np.inf
    y = hadamard(x, 32)
    assert np.isnan(y[0, :32]).all() and np.isfinite(y[0, 32:]).all()
    assert np.isfinite(y[1, :32]).all() and not np.isfinite(y[1, 32:]).any()


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_is_refused(simd: Any, path: str) -> None:
    simd(path)
    x, signs = np.zeros((4, 24), np.float32), np.ones(24, np.int8)
    for block, hint in ((None, "fits is 8"), (16, "fits is 8"), (24, "power of two"), (0, "8"), (1, "8"), (-8, "8")):  # fmt: skip
        with pytest.raises(ValueError, match=hint):
            hadamard(x, block)
    with pytest.raises(ValueError, match="none fits"):
        hadamard(np.zeros((2, 7), np.float32))
    with pytest.raises(ValueError, match="largest that fits is 32768"):
        hadamard(np.zeros((1, 2 * MAX_BLOCK), np.float32))
    for wrong in (x.astype(np.float64), x[:, ::2], x.T, x[0], x[None]):
        with pytest.raises(ValueError, match="x must be a contiguous float32"):
            hadamard(wrong, 8)
        with pytest.raises(ValueError, match="out must be"):
            hadamard(x, 8, out=wrong)
    frozen = x.copy()
    frozen.flags.writeable = False
    for out in (np.zeros((4, 8), np.float32), frozen):
        with pytest.raises(ValueError, match="writeable array of shape"):
            hadamard(x, 8, out=out)
    whole = np.zeros((5, 24), np.float32)
    with pytest.raises(ValueError, match="overlap"):
        hadamard(whole[:4], 8, out=whole[1:])
    for bad in (signs[:-1], signs * 0, signs * 2, signs - 2 * signs * (np.arange(24) == 5) * 64):
        with pytest.raises(ValueError, match="24 numbers that are 1 or -1"):
            hadamard(x, 8, bad.astype(np.int8))
    with pytest.raises(ValueError, match="signs must be a contiguous int8"):
        hadamard(x, 8, signs.astype(np.float32))  # type: ignore[arg-type]


def test_threads_change_nothing(simd: Any) -> None:
    x = np.random.default_rng(0).standard_normal((333, 4096), np.float32)
    signs = signs_of(4096, 1)
    for path in PATHS[:-1]:
        simd(path)
        one = hadamard(x, 512, signs, threads=1)
        assert one.tobytes() == hadamard(x, 512, signs, threads=5).tobytes()
