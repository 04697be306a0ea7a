"""Weights beside a grid: which, and as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill.coding.outliers import brief, decode_outliers, encode_outliers, worst
from waterfill.coding.sections import join, split
from waterfill.types import FormatError


@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    share=st.sampled_from([0.0003, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_places_and_values_come_back(rows: int, cols: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = brief(random.standard_t(2, (rows, cols)).astype(np.float32))
    kept = random.random((rows, cols)) < share
    places, values = decode_outliers(encode_outliers(matrix, kept), matrix.size)
    assert np.array_equal(places, np.flatnonzero(kept))
    assert np.array_equal(values, matrix[kept])


def test_one_in_a_hundred_takes_under_twenty_bits_each() -> None:
    random = np.random.default_rng(0)
    matrix = brief(random.normal(size=(512, 512)).astype(np.float32))
    kept = random.random(matrix.shape) < 0.01
    assert 8 * len(encode_outliers(matrix, kept)) < 19.5 * kept.sum()


def test_brief_values_are_float16_of_eight_bits_and_close() -> None:
    values = np.float32([1.001, -3.14159, 1e9, -1e9, 0, 6e-5, 65504, 1e-9])
    found = brief(values)
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert np.allclose(found[[0, 1, 5]], values[[0, 1, 5]], rtol=2**-8)
    assert found[2] == found[6] == 65280 == -found[3] and found[4] == found[7] == 0
    assert not (found[:2].view(np.uint32) & 0xFFFF).any()


def test_the_worst_are_the_largest_and_ties_go_to_the_first() -> None:
    scores = np.float32([[0, 3, 1], [3, 3, 0]])
    assert worst(scores, 2).tolist() == [[False, True, False], [True, False, False]]
    assert worst(scores, 6).sum() == 4 and not worst(scores, 0).any()


def lies() -> list[tuple[str, bytes]]:
    matrix = np.ones((40, 50), np.float32)
    kept = np.zeros(matrix.shape, np.bool_)
    kept.reshape(-1)[::40] = True
    data = encode_outliers(matrix, kept)
    head, high, low, first, second = split(data, 5)
    assert low
    return [
        ("count", join([b"\xff\x7f", high, low, first, second])),
        ("head", join([head + b"\0", high, low, first, second])),
        ("low", join([head, high, low + b"\0", first, second])),
        ("high", join([head, high[:-1], low, first, second])),
        ("far", join([head, b"\x01\x7e", low, first, second])),
        ("back", join([head, b"\x01\x01", low, first, second])),
        ("infinite", join([head, high, low, b"\x01\x7c", b"\x01\x00"])),
        ("short", data[:5]),
        ("nothing", b""),
    ]


@pytest.mark.parametrize(("name", "data"), lies())
def test_bytes_that_lie_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_outliers(data, 2000)
