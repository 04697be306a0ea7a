"""A tunable matrix in torch is the one that numpy sees; its steps go downhill."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from waterfill.calibrate.tunables import Tuned  # noqa: E402
from waterfill.types import Term, Tunable, Weighting  # noqa: E402

M, N = 7, 10


def tunables() -> Iterator[Tunable]:
    """Numbers and vectors, along rows and down columns, one book and some, one term and two."""
    random = np.random.default_rng(0)

    def term(height: int, width: int, entries: int, book: np.ndarray) -> Term:
        blocks = -(-M // height), -(-N // width)
        table = random.normal(size=(int(book.max()) + 1, entries, height, width))
        codes = random.integers(0, entries, blocks).astype(np.int32)
        return Term(codes, table.astype(np.float32), book.astype(np.int32))

    def made(*terms: Term, rows: int = M, group: int = 4, **options: object) -> Tunable:
        scales = random.uniform(0.5, 2, (rows, -(-N // group))).astype(np.float32)
        columns = random.uniform(0.5, 2, N).astype(np.float32)
        learned = frozenset(["scales", "tables", "columns"])
        return dataclasses.replace(
            Tunable((M, N), terms, scales, group, columns, learned), **options
        )

    one = np.zeros((1, 1))
    yield made(term(1, 1, 8, one))
    fixed = np.where(random.random((M, N)) < 0.2, 3.0, np.nan).astype(np.float32)
    yield made(term(1, 1, 4, np.arange(M)[:, None]), fixed=fixed)
    yield made(term(3, 1, 16, np.arange(N)[None] % 2), rows=1)
    short = term(2, 3, 6, one)
    short.table[0, 4:] = np.nan
    short.codes[:] %= 4
    yield made(short, term(2, 3, 5, one), group=N)


@pytest.mark.parametrize("number", range(4))
def test_values(number: int) -> None:
    tunable = list(tunables())[number]
    tuned = Tuned(tunable, Weighting())
    assert tuned.values().shape == (M, N)
    np.testing.assert_allclose(tuned.values().numpy(), tunable.values(), rtol=1e-6)
    same = tuned.done()
    np.testing.assert_array_equal(same.values(), tunable.values())
    assert same.shape == tunable.shape and same.learned == tunable.learned


@pytest.mark.parametrize("number", range(4))
def test_steps_towards_a_target(number: int) -> None:
    """With the harm |values - target|^2 / 2 its gradient and curvature are known exactly."""
    tunable = list(tunables())[number]
    tuned = Tuned(tunable, Weighting())
    target = torch.from_numpy(np.random.default_rng(1).normal(size=(M, N)).astype(np.float32))

    def harm() -> float:
        return float(0.5 * (tuned.values() - target).square().sum())

    for turn in range(8):
        before = harm()
        tuned.see(tuned.values() - target)
        moves = tuned.moves(turn % len(tuned.codes), 1.0, 1.0)
        back = tuned.apply(moves)
        assert harm() < before or not len(moves.codes)
        tuned.apply(back)
        assert harm() == before
        tuned.apply(moves)
        tuned.forget()
    # One term alone is then as near as its entries come: none is nearer.
    tuned.see(tuned.values() - target)
    if len(tuned.codes) == 1:
        assert not len(tuned.moves(0, 1.0, 1.0).codes)
    before = harm()
    for _ in range(20):
        tuned.step(tuned.values() - target, 1e-2)
    assert harm() < before
    found = tuned.done()
    for one, was in zip(found.terms, tunable.terms, strict=True):
        real = ~np.isnan(was.table).all((2, 3))
        assert real[np.broadcast_to(one.book, one.codes.shape), one.codes].all()
        np.testing.assert_array_equal(np.isnan(one.table), np.isnan(was.table))
    if tunable.fixed is not None:
        kept = ~np.isnan(tunable.fixed)
        np.testing.assert_array_equal(found.values()[kept], tunable.fixed[kept])


def test_a_share_of_each_row_and_only_what_is_learned() -> None:
    tunable = dataclasses.replace(next(iter(tunables())), learned=frozenset(["scales"]))
    tuned = Tuned(tunable, Weighting())
    gradient = tuned.values() - 10
    tuned.see(gradient)
    moves = tuned.moves(0, 0.2, 1.0)
    assert np.bincount(moves.rows.numpy(), minlength=M).max() == 2
    assert not len(tuned.moves(0, 0.2, 1e6).codes)
    tuned.step(gradient, 1e-2)
    found = tuned.done()
    assert (found.scales != tunable.scales).any()
    np.testing.assert_array_equal(found.columns, tunable.columns)
    np.testing.assert_array_equal(found.terms[0].table, tunable.terms[0].table)
