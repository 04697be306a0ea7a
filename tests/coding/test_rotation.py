"""Rotations of any width: orthogonal, undone exactly enough, and the same bits everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.coding.test_rans import PATHS
from waterfill.coding.hadamard import MAX_BLOCK
from waterfill.coding.rotation import Rotation, random_signs
from waterfill.types import Weighting

WIDTHS = [0, 1, 2, 3, 7, 64, 100, 130, 172, 1376]


def turned(rotation: Rotation, x: np.ndarray, inverse: bool = False) -> np.ndarray:
    y = x.astype(np.float32)
    rotation.rotate(y, inverse)
    return y


def signs_one_by_one(count: int, seed: int, first: int) -> list[int]:
    """SplitMix64 in Python's integers."""
    found = []
    for i in range(first, first + count):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(1 - 2 * ((z ^ z >> 31) >> 63))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_signs_are_those_of_splitmix64(seed: int) -> None:
    assert random_signs(50, seed, 9).tolist() == signs_one_by_one(50, seed, 9)
    assert abs(int(random_signs(10000, seed).sum())) < 400


def test_the_first_outputs_are_those_that_are_published() -> None:
    """SplitMix64 of state 0 gives e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec."""
    assert random_signs(4, 0).tolist() == [-1, 1, 1, -1]


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("block", [2, 16, 32768])
def test_it_is_orthogonal_and_its_inverse_the_transpose(n: int, block: int) -> None:
    rotation = Rotation(n, block, seed=3)
    matrix = turned(rotation, np.eye(n))
    assert np.allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
    assert np.allclose(turned(rotation, np.eye(n), inverse=True), matrix.T, atol=1e-6)


def test_every_column_goes_to_half_of_all_columns_at_least() -> None:
    for n in (172, 1376, 11008):
        rows = np.eye(n, dtype=np.float32)[[0, n // 2, n - 1]]
        spread = np.abs(turned(Rotation(n, MAX_BLOCK), rows)) > 0
        assert (spread.sum(axis=1) >= n // 2).all()


def test_the_rows_may_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((37, 100)).astype(np.float32)
    whole = turned(Rotation(100, MAX_BLOCK), x)
    monkeypatch.setattr("waterfill.coding.rotation.TOGETHER", 700)
    assert turned(Rotation(100, MAX_BLOCK), x).tobytes() == whole.tobytes()


@pytest.mark.parametrize("n", [64, 172])
def test_every_implementation_gives_the_same_bits(simd: Any, n: int) -> None:
    x = np.random.default_rng(1).standard_normal((9, n)).astype(np.float32)
    seen = set()
    for path in PATHS:
        simd(path)
        seen.add(
            (
                turned(Rotation(n, MAX_BLOCK), x).tobytes(),
                turned(Rotation(n, MAX_BLOCK), x, True).tobytes(),
            )
        )
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["matrix", "diagonal", "none"])
@pytest.mark.parametrize("n", [32, 172])
def test_an_error_costs_the_same_before_and_after(form: str, n: int) -> None:
    random = np.random.default_rng(2)
    inputs = random.standard_normal((3 * n, n)) * np.exp(random.uniform(-1, 1, n))
    moment = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    moments = {"matrix": moment, "diagonal": moment.diagonal().copy(), "none": None}
    weighting = Weighting(moments[form], random.lognormal(0, 1, 6).astype(np.float32))
    before = None if weighting.second_moment is None else weighting.second_moment.copy()
    rotation = Rotation(n, MAX_BLOCK, seed=5)
    after = rotation.weighting(weighting)
    error = random.standard_normal((6, n)).astype(np.float32)
    zero = np.zeros_like(error)
    want = weighting.distortion(error, zero)
    assert np.isclose(after.distortion(turned(rotation, error), zero), want, rtol=1e-4)
    assert before is None or np.array_equal(before, weighting.second_moment)
