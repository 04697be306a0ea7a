"""Codes looked up in a table of sixteen: weights exact, products the same bits everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coding.test_rans import COMMON, PATHS
from waterfill.coding.codebook import CodebookMatrix, integers
from waterfill.types import DTYPES, Integers, from_float32, to_float32

TABLES = st.one_of(
    st.just(np.array([-1, -0.7, -0.53, -0.4, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])),
    st.just(np.repeat([1.0, -1.0], 8)),
    st.just(np.zeros(16)),
    st.integers(0, 999).map(lambda seed: np.random.default_rng(seed).standard_cauchy(16)),
)  # fmt: skip


def sample(m: int, n: int, group: int, table: Any, seed: int, half: bool = True) -> Integers:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (m, n), np.uint8)
    scales = random.standard_normal((m, -(-n // group)))
    return integers(
        codes, np.float32(table), scales.astype(np.float16 if half else np.float32), group
    )


def packed(levels: Integers, dtype: str = "F32", **options: Any) -> CodebookMatrix:
    matrix = CodebookMatrix.build(levels, dtype, **options)
    assert matrix is not None
    return matrix


@COMMON
@given(
    m=st.integers(16, 70),
    n=st.integers(64, 300),
    groups=st.sampled_from([0, 32, 64, 96]),
    table=TABLES,
    batch=st.integers(1, 18),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    activations=st.sampled_from(["int8", "int16"]),
    seed=st.integers(0, 1 << 16),
)
def test_every_implementation_gives_the_same_bits(
    simd: Any, m: int, n: int, groups: int, table: Any, batch: int, dtype: str, activations: str,
    seed: int,
) -> None:  # fmt: skip
    levels = sample(m, n, groups or n, table, seed, half=seed % 2 > 0)
    want = levels.values()
    x = np.random.default_rng(seed).standard_normal((batch, n), np.float32)
    few = min(batch, 16)
    bits = np.ascontiguousarray(from_float32(x[:few], dtype))
    reach = np.abs(x) @ np.abs(want).T.astype(np.float64)
    rows, seen = np.array([m - 1, 0, m // 2, m // 2]), set()
    for path in PATHS:
        simd(path)
        matrix = packed(levels).using(activations)
        y, part, some = matrix.apply(x), np.zeros((few, m), DTYPES[dtype]), np.zeros((4, n), "<u2")
        matrix.matmul(bits.ctypes.data, dtype, part.ctypes.data, few, 1 + seed % 3)
        weights = np.zeros_like(want)
        matrix.rows(0, m, weights)
        assert np.array_equal(weights, want)
        matrix.gather(rows, some)
        assert np.array_equal(to_float32(some, "BF16"), to_float32(from_float32(want[rows], "BF16"), "BF16"))  # fmt: skip
        most = 0.5 / (127 if activations == "int8" else 32000)
        bound = 2 * most * np.abs(x).max(axis=1)[:, None] * np.abs(want).sum(axis=1) + 1e-5 * reach
        assert (np.abs(y - x.astype(np.float64) @ want.T) <= bound).all()
        arrays = b"".join(matrix.arrays[name].tobytes() for name in sorted(matrix.arrays))
        seen.add((y.tobytes(), part.tobytes(), some.tobytes(), arrays))
    assert len(seen) == 1


def test_it_takes_half_a_byte_a_weight_and_knows_it_before() -> None:
    levels = sample(512, 1024, 128, np.linspace(-1, 1, 16), 0)
    matrix = packed(levels)
    outline = replace(levels, levels=None)
    assert matrix.nbytes == CodebookMatrix.expected_nbytes(outline, 0)
    assert matrix.nbytes <= 512 * 1024 * (4 + 16 / 128) / 8 + 4 * 1024 + 100
    again = CodebookMatrix.from_arrays(matrix.arrays)
    x = np.ones((1, 1024), np.float32)
    assert np.array_equal(matrix.apply(x), again.apply(x)) and again.shape == (512, 1024)


def test_the_codebook_is_off_by_half_a_step_at_most() -> None:
    codes = np.arange(16, dtype=np.uint8)[None]
    codebook = np.float32(np.random.default_rng(1).standard_normal(16))
    values = integers(codes, codebook, np.ones((1, 1), np.float32), 16).values()
    assert np.abs(values[0] - codebook).max() <= np.abs(codebook).max() / 253
    zeros = integers(codes, np.zeros(16, np.float32), np.ones((1, 1), np.float32), 16)
    assert not zeros.values().any()


@pytest.mark.parametrize("path", PATHS)
def test_the_lowest_level_of_all(simd: Any, path: str) -> None:
    simd(path)
    levels = np.full((16, 64), -128, np.int8)
    levels[:, 1::2] = 127
    ones = Integers(levels, np.ones(64, np.float32), np.ones((16, 1), np.float32), 64, 1, np.ones(64, np.float32), bits=8)  # fmt: skip
    for x in (np.full((3, 64), 1), np.full((3, 64), -1), np.tile([[1, -1]], (3, 32))):
        assert np.allclose(packed(ones).apply(np.float32(x)), x @ levels.T.astype(np.float64))


def test_other_levels_are_none_of_its_business() -> None:
    levels = sample(32, 64, 64, np.linspace(-1, 1, 16), 0)
    assert levels.levels is not None
    many = levels.levels.copy()
    many[0, :17] = np.arange(17)
    assert CodebookMatrix.build(replace(levels, levels=many), "F32") is None
    assert CodebookMatrix.build(replace(levels, levels=levels.levels.astype(np.int16)), "F32") is None  # fmt: skip
    assert CodebookMatrix.build(levels, "F64") is None
    with pytest.raises(ValueError, match="no levels"):
        CodebookMatrix.build(replace(levels, levels=None), "F32")


def test_what_cannot_be_is_refused() -> None:
    codes, book, scales = np.zeros((4, 64), np.uint8), np.zeros(16, np.float32), np.ones((4, 2), np.float32)  # fmt: skip
    for wrong in (codes + np.uint8(16), codes.astype(np.int8), codes[0], codes[:0]):
        with pytest.raises(ValueError, match="uint8 below 16"):
            integers(wrong, book, scales, 32)
    for bad in (book[:15], book + np.float32(np.nan), book[None]):
        with pytest.raises(ValueError, match="16 finite"):
            integers(codes, bad, scales, 32)
    for group in (0, -1, 64, 16):
        with pytest.raises(ValueError, match="scales of 4 rows"):
            integers(codes, book, scales, group)
    matrix = packed(integers(codes, book, scales, 32))
    for change in ({"table": np.zeros(15, np.int8)}, {"table": np.zeros(16, np.uint8)}):
        with pytest.raises(ValueError):
            CodebookMatrix.from_arrays({**matrix.arrays, **change})
