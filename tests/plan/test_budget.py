"""Sizes as people write them."""

from __future__ import annotations

import pytest

from waterfill.plan.budget import budget_nbytes, parse_ratio, parse_size
from waterfill.types import BudgetError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("250MB", 250_000_000), ("1.5GiB", 1610612736), ("10 kb", 10_000), ("1234567", 1234567), ("2k", 2000), (".5MB", 500_000)],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1,5GB", "12XB", "ten", "1e9", "nan"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(BudgetError, match="250MB"):
        parse_size(text)


def test_ratios() -> None:
    assert parse_ratio("20%") == pytest.approx(0.2)
    assert parse_ratio("0.2") == pytest.approx(0.2)
    for text in ("0", "-5%", "500%", "half"):
        with pytest.raises(BudgetError):
            parse_ratio(text)


def test_exactly_one_way() -> None:
    common = {"params": 1000, "original_nbytes": 2000}
    assert budget_nbytes(**common, bits=3.2) == 400
    assert budget_nbytes(**common, ratio="20%") == 400
    assert budget_nbytes(**common, size="1KB") == budget_nbytes(**common, size=1000) == 1000
    for wrong in ({}, {"bits": 3.0, "size": "1KB"}, {"bits": 0.0}, {"size": 0}):
        with pytest.raises(BudgetError):
            budget_nbytes(**common, **wrong)
