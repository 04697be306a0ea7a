"""Models: frequencies that sum, that are near the best, and that come back from their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.coding import gamma
from waterfill.coding.models import Alphabet, fit, parametric, quantise, read_models
from waterfill.types import FormatError


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=256).filter(any))
def test_quantise_keeps_what_occurs_and_nothing_else(counts: list[int]) -> None:
    freqs = quantise(np.array(counts))
    assert freqs.sum(dtype=np.int64) == 4096
    assert np.array_equal(freqs > 0, np.array(counts) > 0)


def test_quantise_is_near_the_entropy() -> None:
    k = np.arange(-20, 21)
    for width in (0.7, 1.5, 4.0):
        counts = np.round(1e7 * np.exp(-np.abs(k) / width)).astype(np.int64)
        counts = counts[counts > 1e7 / 4096]
        share = counts / counts.sum()
        entropy = -(share * np.log2(share)).sum()
        cost = (share * (12 - np.log2(quantise(counts)))).sum()
        assert cost < entropy * 1.0005


def test_quantise_rows_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, (20, 50)) ** 2 + 1
    together = quantise(counts)
    assert all(np.array_equal(together[i], quantise(counts[i])) for i in range(20))
    with pytest.raises(ValueError, match="no model"):
        quantise(np.zeros((1, 4), np.int64))


EXPECTED = [
    [85, 171, 341, 683, 1365, 683, 341, 171, 85, 171],
    [23, 126, 429, 896, 1144, 895, 429, 126, 23, 5],
    [155, 165, 177, 194, 243, 194, 177, 165, 155, 2471],
]


def test_parametric_integers_are_the_same_everywhere() -> None:
    # Written once and compared for ever: a decoder on any machine must build these.
    alphabet = Alphabet(-4, 10, True)
    table = parametric(alphabet, np.array([4, 8, 2]), np.array([64, 70, 90]))
    assert table.tolist() == EXPECTED
    assert np.abs(table[:, 3].astype(int) - table[:, 5]).max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    low=st.integers(-300, 300),
    size=st.integers(2, 256),
    escape=st.booleans(),
    shape=st.integers(1, 16),
    scale=st.integers(0, 255),
)
def test_parametric_models_always_sum(
    low: int, size: int, escape: bool, shape: int, scale: int
) -> None:
    table = parametric(Alphabet(low, size, escape), np.array([shape]), np.array([scale]))
    assert table.sum(dtype=np.int64) == 4096 and table.min() >= 1


def normal_counts(n_classes: int, alphabet: Alphabet, n: int) -> Any:
    k = np.arange(alphabet.low, alphabet.low + alphabet.size)
    width = 0.4 * 1.7 ** np.arange(n_classes)[:, None]
    weight = np.exp(-0.5 * (k / width) ** 2)
    return np.maximum(np.round(n * weight / weight.sum(axis=1, keepdims=True)), 0).astype(np.int64)


def test_fit_takes_two_bytes_where_little_is_at_stake() -> None:
    alphabet = Alphabet(-15, 32, True)
    few = fit(normal_counts(4, alphabet, 2000), alphabet)
    assert len(few.data) == 8
    # Something no bell explains: the table is worth its bytes.
    odd = np.where(np.arange(32) % 3 == 0, 100_000, 1)[None]
    assert len(fit(odd, alphabet).data) > 10


def test_models_come_back() -> None:
    rng = np.random.default_rng(1)
    for alphabet in (Alphabet(-15, 32, True), Alphabet(-100, 256, False), Alphabet(7, 3, False)):
        counts = rng.integers(0, 5, (9, alphabet.size)) ** rng.integers(1, 9, (9, 1))
        counts[:, -1] += 1
        counts[3:6] = normal_counts(3, alphabet, 100_000)[:3] + (np.arange(alphabet.size) == 0)
        counts[8] = np.arange(alphabet.size) == 1
        models = fit(counts, alphabet)
        data = np.frombuffer(b"xx" + models.data + b"y", np.uint8)
        freqs, end = read_models(data, 2, 9, alphabet.size, alphabet)
        assert end == data.size - 1
        assert np.array_equal(freqs, models.freqs)
        for cut in range(len(models.data)):
            with pytest.raises(FormatError):
                read_models(data[: 2 + cut], 2, 9, alphabet.size, alphabet)


def test_damaged_models_are_refused_or_sum() -> None:
    rng = np.random.default_rng(2)
    alphabet = Alphabet(-7, 16, True)
    models = fit(rng.integers(1, 3000, (5, 16)), alphabet)
    for _ in range(400):
        data = np.frombuffer(models.data, np.uint8).copy()
        data[rng.integers(0, data.size)] = rng.integers(0, 256)
        try:
            freqs, _ = read_models(data, 0, 5, 16, alphabet)
        except FormatError:
            continue
        assert (freqs.sum(axis=1, dtype=np.int64) == 4096).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, (1 << 33) - 1), max_size=60), st.integers(0, gamma.MAX_ORDER))
def test_gamma_codes_come_back(values: list[int], order: int) -> None:
    array = np.array(values, np.int64)
    data = np.frombuffer(b"z" + gamma.pack(array, order) + b"z", np.uint8)
    got, end = gamma.unpack(data, 1, array.size, order)
    assert end == data.size - 1
    assert np.array_equal(got, array)
    assert np.array_equal(gamma.unzigzag(gamma.zigzag(array - (1 << 31))), array - (1 << 31))


@given(st.integers(0, (1 << 40) - 1))
def test_varints_come_back(value: int) -> None:
    data = np.frombuffer(gamma.varint(value), np.uint8)
    assert gamma.read_varint(data, 0) == (value, data.size)
    with pytest.raises(FormatError):
        gamma.read_varint(data[:-1], 0)
