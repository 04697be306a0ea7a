"""Bases as coders hold them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.runtime.cache.test_methods import code, decode, errors, facts, states, statistics
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import parse_method
from waterfill.runtime.cache.tables import Rows, inverse


def test_components_found_by_the_inverse_are_what_was_coded() -> None:
    rng = np.random.default_rng(0)
    rows = Rows.of(rng.normal(size=(2, 24, 24)) * np.exp(rng.normal(size=(2, 24, 1)))).floats()
    z = torch.from_numpy(rng.normal(size=(2, 50, 24)).astype(np.float32))
    torch.testing.assert_close(z @ rows @ inverse(rows), z, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e15])
def test_rows_of_any_size_keep_their_direction(size: float) -> None:
    rows = np.random.default_rng(1).normal(size=(3, 5, 8))
    found = Rows.of(size * rows).floats().double().numpy()
    cosine = (found * rows).sum(2) / np.linalg.norm(found, axis=2) / np.linalg.norm(rows, axis=2)
    assert cosine.min() > 0.9999


@pytest.mark.parametrize("method", ["transform:level=1e-4", "entropy:step=0.01"])
def test_a_head_that_nothing_reads_costs_the_others_nothing(method: str) -> None:
    one = facts()
    alive = statistics(one)
    dead = LayerStatistics(
        *(
            dataclasses.replace(s, harm=s.harm * np.array([1, 0, 1], np.float32)[:, None, None])
            for s in (alive.keys, alive.values)
        )
    )
    pair = states(one, 1, 2)
    found = [
        decode(coder, code(coder, pair))
        for coder in (parse_method(method).open(one, known) for known in (alive, dead))
    ]
    read = slice(None, None, 2)
    kept = [
        errors((k[:, read], v[:, read]), (pair[0][:, read], pair[1][:, read])) for k, v in found
    ]
    assert all(torch.isfinite(x).all() for both in found for x in both)
    assert np.max(np.array(kept[1]) / np.array(kept[0])) < 1.1
