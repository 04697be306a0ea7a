"""Block-diagonal transforms: applied, undone, learned, and as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill.coding.affine import (
    PARTS,
    Harm,
    Transform,
    apply,
    congruent,
    learn,
    undo,
)
from waterfill.coding.entropy import encode_ints
from waterfill.coding.scales import encode_grid
from waterfill.coding.sections import join
from waterfill.types import Floats, FormatError


def a_transform(n: int, b: int, seed: int = 0) -> Transform:
    random = np.random.default_rng(seed)
    codes = random.integers(-PARTS, PARTS, (n, b)) // (2 * b)
    columns = np.arange(n)[:, None] // b * b + np.arange(b)
    codes[(columns >= n) | (columns == np.arange(n)[:, None])] = 0
    return Transform(random.integers(-20, 20, n).astype(np.int32), codes.astype(np.int32))


def dense(transform: Transform) -> Floats:
    """B (n, n), element by element."""
    n, b = transform.codes.shape
    matrix = np.zeros((n, n))
    for j in range(n):
        d = 2.0 ** (transform.exponents[j] / 8)
        for k in range(j // b * b, min(n, j // b * b + b)):
            matrix[j, k] = d if k == j else d * transform.codes[j, k % b] / PARTS
    return matrix


@given(n=st.integers(1, 40), b=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_a_transform_comes_back_and_is_what_it_says(n: int, b: int, seed: int) -> None:
    transform = a_transform(n, b, seed)
    again = Transform.from_bytes(transform.to_bytes(), n, b)
    assert np.array_equal(again.exponents, transform.exponents)
    assert np.array_equal(again.codes, transform.codes)
    random = np.random.default_rng(seed)
    weight = random.normal(size=(5, n)).astype(np.float32)
    blocks, matrix = transform.blocks(), dense(transform)
    assert np.allclose(apply(weight, blocks), weight @ matrix, rtol=1e-4, atol=1e-4)
    assert np.allclose(apply(undo(weight, blocks), blocks), weight, rtol=1e-3, atol=1e-4)
    root = random.normal(size=(n, n)).astype(np.float32)
    moment = root @ root.T
    for given_moment, full in ((moment, moment), (np.diag(moment).copy(), np.diag(np.diag(moment))), (None, np.eye(n))):  # fmt: skip
        found = congruent(given_moment, blocks, n)
        expected = matrix @ full @ matrix.T
        scale = np.abs(expected).max()
        assert np.allclose(np.diag(found) if found.ndim == 1 else found, expected, atol=1e-4 * scale)  # fmt: skip


def test_sums_are_in_the_order_of_the_page() -> None:
    transform = a_transform(10, 4)
    random = np.random.default_rng(1)
    values = (1e4 * random.standard_t(2, (3, 10))).astype(np.float32)
    blocks = transform.blocks()
    for i in range(3):
        for k in range(10):
            total = np.float32(0)
            for j in range(4):
                if k // 4 * 4 + j < 10:
                    total = total + values[i, k // 4 * 4 + j] * blocks[k // 4, j, k % 4]
            assert total == apply(values, blocks)[i, k]


def test_the_gradient_is_that_of_the_harm() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(50, 6, 4))
    harm = Harm(random.normal(size=(20, 6, 4)), np.einsum("tkj,tkl->kjl", inputs, inputs), group=2)
    blocks = np.eye(4) + 0.1 * random.normal(size=(6, 4, 4))
    slope = harm(blocks)[1]
    for _ in range(5):
        way = random.normal(size=blocks.shape)
        up, down = harm(blocks + 1e-6 * way)[0], harm(blocks - 1e-6 * way)[0]
        assert np.isclose((up - down) / 2e-6, (slope * way).sum(), rtol=1e-5)


@pytest.mark.parametrize("b", [1, 4, 7])
def test_what_is_learned_is_dominant_and_does_less_harm(b: int) -> None:
    random = np.random.default_rng(2)
    n = 50
    mixing = random.normal(size=(n, n)) / 7 + np.eye(n)
    inputs = random.normal(size=(300, n)) @ mixing * random.lognormal(0, 1.5, n)
    moment = (inputs.T @ inputs / 300).astype(np.float32)
    weight = (random.normal(size=(200, n)) @ np.linalg.inv(mixing)).astype(np.float32)
    transform = learn(weight, moment, b)
    assert (np.abs(transform.codes).sum(axis=1) < PARTS).all()
    assert transform.codes.any() == (b > 1)

    def harm(matrix: Floats) -> float:
        """Of rounding to seven steps in a row's range, each weight by itself."""
        turned = weight @ np.linalg.inv(matrix)
        step = np.abs(turned).max(axis=1, keepdims=True) / 3
        error = (np.rint(turned / step) * step - turned) @ matrix
        return float(np.einsum("ij,jk,ik->", error, moment, error))

    assert harm(dense(transform)) < 0.9 * harm(np.eye(n))
    again = learn(weight, moment, b)
    assert again.to_bytes() == transform.to_bytes()


def test_columns_and_inputs_that_are_not_there_do_not_hurt() -> None:
    weight = np.random.default_rng(0).normal(size=(30, 9)).astype(np.float32)
    weight[:, 3] = 0
    moment = np.eye(9, dtype=np.float32)
    moment[5] = 0
    transform = learn(weight, moment, 4)
    blocks = transform.blocks()
    assert np.isfinite(blocks).all()
    assert np.allclose(apply(undo(weight, blocks), blocks), weight, atol=1e-4)


@pytest.mark.parametrize(
    "data",
    [
        join([b"", encode_ints(np.full((6, 2), 16))]),  # not dominant
        join([encode_grid(np.full(6, 65, np.int32)), encode_ints(np.zeros((6, 2), np.int32))]),
        join([b"", encode_ints(np.ones((6, 2), np.int32)) + b"\0"]),
        join([b"\x01", b""]),
        b"\x05",
        b"",
    ],
)
def test_bytes_that_lie_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Transform.from_bytes(data, 6, 3)
