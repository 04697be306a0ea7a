"""The grid of methods and sizes as a table and a page."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from waterfill.report import comparison_rows, mixing, remarks, write_comparison
from waterfill.report.words import DASH

HOSTILE = "<script>alert(1)</script>"


def cell(method: str, asked: str, kl: float, **more: Any) -> dict[str, Any]:
    bits = float(asked)
    return {
        "method": method, "asked": asked, "budget_nbytes": 1000 * bits, "nbytes": int(999 * bits),
        "bits_per_weight": bits, "predicted_kl_nats": kl / 2, "kl_nats": kl, "kl_nats_stderr": kl / 20,
        "kl_nats_p99": 9 * kl, "perplexity": 5.0, "top1_agreement": 0.9, "chosen": {method: 1.0},
        "compress_seconds": 1.5, **more,
    }  # fmt: skip


def result(**more: Any) -> dict[str, Any]:
    cells = [
        cell("integer", "2", 0.8), cell("integer", "3", 0.2), cell("trellis", "2", 0.3), cell("trellis", "3", 0.1),
        {"method": "raw", "asked": "2", "budget_nbytes": 1, "error": "too small"},
        cell("auto", "2", 0.24, chosen={"trellis": 0.9, "integer": 0.1}), cell("auto", "3", 0.1),
    ]  # fmt: skip
    return {
        "model": "tiny", "params": 1000, "original_nbytes": 2000, "cells": cells,
        "protocol": {"window": 32}, "calibration": {"tokens": 256}, **more,
    }  # fmt: skip


def test_the_table_has_a_row_for_each_method_and_a_star_for_the_least() -> None:
    head, rows = comparison_rows(result())
    assert head == ("method", "at 2", "at 3")
    assert rows == [
        ("integer", "0.800", "0.200"),
        ("trellis", "0.300", "0.100*"),
        ("raw", DASH, DASH),
        ("auto", "0.240*", "0.100*"),
    ]


def test_what_mixing_buys_is_said_with_its_noise() -> None:
    first, second = mixing(result())
    assert "trellis 90.0%, integer 10.0%" in first and "0.800 of the KL of trellis" in first
    assert "noise 0.071" in first and second.startswith("auto at 3")
    assert mixing(result(cells=[cell("auto", "2", 0.1)]))[0].endswith("auto 100.0%")


def test_what_went_otherwise_is_said_once_with_its_cells() -> None:
    cells = [
        cell("trellis+pv", "2", 0.3, warnings=["not tuned: it has no codes"]),
        {"method": "raw", "asked": "2", "error": "too small"},
        {"method": "raw", "asked": "3", "error": "too small"},
    ]
    assert remarks(result(cells=cells)) == [
        "trellis+pv at 2: not tuned: it has no codes",
        "raw at 2, raw at 3: not made: too small",
    ]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def test_the_page_has_a_line_and_dots_for_each_method_and_no_script(tmp_path: Path) -> None:
    page = write_comparison(result(model=HOSTILE), tmp_path / "report.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.found.count("polyline") == 3 and tags.found.count("circle") == 6
    assert "script" not in tags.found and "&lt;script&gt;" in page and "NaN" not in page
    assert "not made" in page.lower() and "too small" in page
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_names_beside_lines_keep_apart_and_on_the_page(tmp_path: Path, count: int) -> None:
    cells = [cell(f"m{i}", "3", 0.1 + i / 1e5) for i in range(count)]
    page = write_comparison(result(cells=cells), tmp_path / "report.html").read_text()
    at = sorted(float(y) for y in re.findall(r'<text x="710" y="([\d.-]+)">m', page))
    assert len(at) == count and all(b - a > 10 for a, b in itertools.pairwise(at))
    assert all(0 < y < 700 for y in at)
