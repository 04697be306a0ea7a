"""Sizes as people write them."""

from __future__ import annotations

import pytest

from waterfill.plan.budget import budget_nbytes, parse_budget, parse_ratio, parse_size
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


def test_a_size_in_whichever_way() -> None:
    assert parse_budget("3") == {"bits": 3.0} and parse_budget(" 2.5 ") == {"bits": 2.5}
    assert parse_budget("250MB") == {"size": "250MB"} and parse_budget("20%") == {"ratio": "20%"}
    assert parse_budget("1234567") == {"size": "1234567"}
    for text in ("", "-1", "0", "half", "500%", "nan", "1e9"):
        with pytest.raises(BudgetError):
            budget_nbytes(params=1000, original_nbytes=2000, **parse_budget(text))  # type: ignore[arg-type]
