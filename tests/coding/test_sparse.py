"""Weights apart: which they are, there and back, and bytes that lie."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding import sparse
from waterfill.coding.entropy import encode_ints
from waterfill.coding.sections import join
from waterfill.types import FormatError, TensorInfo

INFO = TensorInfo("w", (20, 30), "F32", "linear")


def test_the_largest_are_as_many_as_asked_for() -> None:
    costs = np.array([[1, 5, 3], [5, 5, 0]], np.float32)
    assert sparse.largest(costs, 0.34).tolist() == [[False, True, False], [True, False, False]]
    assert not sparse.largest(costs, 0.1).any() and sparse.largest(costs, 1.0).all()
    assert not sparse.largest(np.zeros((0, 4), np.float32), 0.5).size


@pytest.mark.parametrize("count", [0, 1, 60, 600])
def test_there_and_back(count: int) -> None:
    random = np.random.default_rng(count)
    chosen = np.zeros(600, np.bool_)
    chosen[random.permutation(600)[:count]] = True
    values = random.normal(size=(20, 30)).astype(np.float16).astype(np.float32)
    places, kept = sparse.read(sparse.write(chosen.reshape(20, 30), values), INFO)
    assert np.array_equal(places, np.flatnonzero(chosen))
    assert np.array_equal(kept, values.reshape(-1)[chosen])


@pytest.mark.parametrize(
    ("gaps", "halves"),
    [
        ([600], b"\0\0"),  # beyond the last weight
        ([3, -1], b"\0\0\0\0"),  # twice in one place
        ([-2], b"\0\0"),
        ([1], b"\0\0\0"),
        ([1], b"\0\x7c"),  # infinity
        ([0] * 601, bytes(1202)),
        ([2**31 - 1] * 3, bytes(6)),
    ],
)
def test_bytes_that_lie(gaps: list[int], halves: bytes) -> None:
    data = join([encode_ints(np.array(gaps)[:, None], classes=None), halves])
    with pytest.raises(FormatError):
        sparse.read(data, INFO)
