"""Numbers of points: one to one, in bounds, and refused beyond them; the nearest point is a point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding.pyramid import (
    counts,
    gain_exponents,
    gains_of,
    most_pulses,
    nearest,
    number,
    pack,
    point,
    unpack,
)
from waterfill.types import FormatError


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("pulses", range(7))
def test_every_point_of_a_small_pyramid_has_a_number_of_its_own(length: int, pulses: int) -> None:
    cube = itertools.product(range(-pulses, pulses + 1), repeat=length)
    points = np.array([p for p in cube if sum(map(abs, p)) == pulses], np.int32)
    assert counts(length)[length, pulses] == len(points)
    numbers = number(points.reshape(-1, length))
    assert sorted(numbers.tolist()) == list(range(len(points)))
    assert np.array_equal(point(numbers, np.full(len(points), pulses), length), points)


@given(st.integers(1, 64), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_there_and_back_for_random_numbers(length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    pulses = random.integers(0, most_pulses(length) + 1, 50)
    among = counts(length)[length, pulses]
    numbers = random.integers(0, 2**64, 50, np.uint64) % among
    numbers[:5] = among[:5] - np.uint64(1)
    points = point(numbers, pulses, length)
    assert np.array_equal(np.abs(points).sum(axis=1), pulses)
    assert np.array_equal(number(points), numbers)
    assert np.array_equal(unpack(pack(points, pulses), pulses, length), points)


@pytest.mark.parametrize("length", [1, 2, 8, 16, 64])
def test_a_number_beyond_the_points_is_refused(length: int) -> None:
    pulses = np.arange(most_pulses(length) + 1)
    beyond = counts(length)[length, pulses]
    assert (point(beyond - np.uint64(1), pulses, length) != 0).any(axis=1)[1:].all()
    for k in pulses:
        with pytest.raises(FormatError, match="beyond the points"):
            point(beyond[k : k + 1], pulses[k : k + 1], length)


def test_counts_are_as_large_as_64_bits_allow() -> None:
    for length in range(2, 65):
        row = counts(length)[length]
        more = 2 * int(row[-1])  # at least what one pulse more would make
        assert len(row) == 1024 or more > 2**62


def test_bytes_that_are_not_what_the_pulses_take_are_refused() -> None:
    pulses = np.array([3, 0, 3, 5])
    points = np.array([[1, -2, 0], [0, 0, 0], [0, 0, 3], [-5, 0, 0]], np.int32)
    data = pack(points, pulses)
    assert np.array_equal(unpack(data, pulses, 3), points)
    for wrong in (data + b"\0", data[:-1], b""):
        with pytest.raises(FormatError):
            unpack(wrong, pulses, 3)
    with pytest.raises(FormatError):
        unpack(data, np.array([3, 1, 3, 5]), 3)


@given(st.integers(2, 20), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_nearest_point_lies_on_the_pyramid(length: int, pulses: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.normal(size=(length, 30)).astype(np.float32)
    lower = np.tril(random.normal(size=(length, length))).astype(np.float32)
    lower[np.diag_indices(length)] = 1 + np.abs(lower.diagonal())
    each = np.full(30, pulses)
    step = np.abs(target).sum(axis=0) / pulses
    assert (np.abs(nearest(target, each, lower, step)).sum(axis=0) == pulses).all()


def test_without_a_weighting_the_nearest_point_is_the_nearest() -> None:
    random = np.random.default_rng(0)
    target = random.normal(size=(4, 200)).astype(np.float32)
    step = (np.abs(target).sum(axis=0) / 5).astype(np.float32)
    found = nearest(target, np.full(200, 5), np.eye(4, dtype=np.float32), step)
    every = point(np.arange(counts(4)[4, 5], dtype=np.uint64), np.full(counts(4)[4, 5], 5), 4)
    gaps = np.square(target.T[:, None] / step[:, None, None] - every).sum(axis=2)
    reached = np.square(target / step - found).sum(axis=0)
    assert np.allclose(reached, gaps.min(axis=1), atol=1e-4)


def test_a_weighting_is_heeded() -> None:
    random = np.random.default_rng(1)
    target = random.normal(size=(8, 500)).astype(np.float32)
    lower = np.tril(random.normal(size=(8, 8))).astype(np.float32)
    lower[np.diag_indices(8)] = 1 + np.abs(lower.diagonal())
    step = (np.abs(target).sum(axis=0) / 12).astype(np.float32)
    harms = []
    for used in (lower, np.eye(8, dtype=np.float32)):
        error = target - step * nearest(target, np.full(500, 12), used, step)
        harms.append(float(np.square(lower.T @ error).sum()))
    assert harms[0] < 0.8 * harms[1]


@pytest.mark.parametrize("per_octave", [2, 8, 32])
def test_gains_round_to_their_neighbours(per_octave: int) -> None:
    gains = np.exp(np.random.default_rng(2).uniform(-12, 12, 1000))
    exponents = gain_exponents(gains, per_octave)
    back = gains_of(exponents, per_octave)
    assert np.abs(back / gains - 1).max() < 0.51 / per_octave
    assert np.array_equal(gain_exponents(back, per_octave), exponents)
    assert gains_of(gain_exponents(np.array([0.0, 1e-20]), per_octave), per_octave).sum() == 0
    for beyond in (-24 * per_octave - 1, 126 * per_octave + 1):
        with pytest.raises(FormatError, match="outside"):
            gains_of(np.array([beyond], np.int32), per_octave)
