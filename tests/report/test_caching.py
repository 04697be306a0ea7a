"""What caches cost, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from waterfill.report import cache_remarks, cache_rows, write_cache
from waterfill.report.words import DASH

HOSTILE = "<script>alert(1)</script>"


def cell(method: str, asked: str, kl: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "asked": asked, "nbytes": 5000, "bytes_per_token": 500.4, "bits": 4.0,
        "kl_nats": kl, "kl_nats_stderr": None, "top1_agreement": 0.9, "perplexity": 7.25,
        "exact_perplexity": 7.0, "tokens_per_second": 30.0, "exact_tokens_per_second": 60.0,
        "chosen": {"channel": 1, "exact": 2}, "warnings": [], **more,
    }  # fmt: skip


def result(**more: Any) -> dict[str, Any]:
    cells = [
        cell("auto", "3 bits", 0.02), cell("auto", "4 bits", 0.01, warnings=["above the limit"]),
        {"method": "channel", "asked": "1kB", "error": "too small"},
        cell("channel:bits=4", "", 0.3), cell("channel:bits=8", "", 0.0),
        cell("transformers quanto, 4 bits", "", 0.1, stock=True),
        cell("transformers quanto, 2 bits", "", 0.4, stock=True),
    ]  # fmt: skip
    return {
        "model": "tiny", "cells": cells, "exact_bytes_per_token": 2000, "numbers_per_token": 1000,
        "exact_perplexity": 7.0, "statistics": None, "protocol": {"window": 32}, **more,
    }  # fmt: skip


def test_the_exact_cache_comes_first_and_the_rest_beside_it() -> None:
    head, (exact, first, *_, stock) = cache_rows(result())
    row = dict(zip(head, exact, strict=True))
    assert (row["cache"], row["bytes/token"], row["bits"]) == ("exact", "2,000", "16.00")
    row = dict(zip(head, first, strict=True))
    assert (row["asked"], row["bytes/token"], row["KL"]) == ("3 bits", "500", "0.0200")
    assert (row["same token"], row["tokens/s"], row["speed"]) == ("90.0 %", "30", "0.50")
    assert cache_rows(result())[1][3] == ("channel", "1kB", *[DASH] * 7)
    assert stock[0] == "transformers quanto, 2 bits"


def test_what_was_chosen_and_what_could_not_be_is_said() -> None:
    assert cache_remarks(result()) == [
        "auto at 3 bits: channel in 1, exact in 2 layers",
        "auto at 4 bits: channel in 1, exact in 2 layers",
        "auto at 4 bits: above the limit",
        "channel at 1kB: not made: too small",
    ]


def test_the_page_has_a_line_for_each_method_and_no_script(tmp_path: Path) -> None:
    page = write_cache(result(model=HOSTILE), tmp_path / "cache.html").read_text()
    # No harm has no place on a logarithmic axis; the stock cache is one line whatever its bits.
    assert page.count("<polyline") == 3 and page.count("<circle") == 5
    assert "<script" not in page and "&lt;script&gt;" in page and "NaN" not in page
    assert "too small" in page and not list(tmp_path.glob("*.partial"))
    empty = result(cells=[], exact_perplexity=None)
    assert "<circle" not in write_cache(empty, tmp_path / "empty.html").read_text()
