"""What the page says before any script runs, and what it must never contain."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.sample import OVERHEAD, record
from waterfill.report import render, words, write
from waterfill.types import Record, WaterfillError

HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&\u2028\'"'


class Cells(HTMLParser):
    """Texts of the cells of every row of every table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_headline_figures_are_in_the_text() -> None:
    r = record()
    page = render([r])
    for text in (
        words.size(r.nbytes),
        f"{r.nbytes:,} bytes of {r.about['budget_nbytes']:,} asked",
        f"{r.bits_per_weight:.3f}",
        "49.60 \u2192",
        "94.12%",
        "of 41,583 tokens",
        "english-7m",
        r.about["command"],
        r.about["plan_digest"],
        r.metrics["protocol"]["texts"][0]["sha256"],
    ):
        assert text in html.unescape(page), text


def test_the_ledger_is_whole_and_sums_to_the_file() -> None:
    r = record()
    rows = Cells(render([r])).rows
    body = {row[0]: row for row in rows[1:-1]}
    assert list(body) == [row["name"] for row in r.ledger]
    assert sum(int(row[4].replace(",", "")) for row in body.values()) == r.nbytes
    assert body["(container)"][4] == f"{OVERHEAD:,}"
    assert rows[-1][0] == "Total" and rows[-1][4] == f"{r.nbytes:,}"


def test_a_ledger_that_does_not_sum_says_so() -> None:
    r = record()
    assert "exactly the size of the file" in render([r])
    page = render([dataclasses.replace(r, nbytes=r.nbytes + 1)])
    assert "exactly the size of the file" not in page
    assert f"but the file has {r.nbytes + 1:,}" in page


@pytest.mark.parametrize("field", ["metrics", "predicted", "ledger", "curve", "about"])
def test_every_field_may_be_absent(field: str) -> None:
    empty: Any = () if field in ("ledger", "curve") else {}
    page = render([dataclasses.replace(record(), **{field: empty})])
    assert "english-7m" in page
    if field == "metrics":
        assert page.count(">not measured<") == 3
        assert "No tensor was measured alone" in page


@pytest.mark.parametrize(
    "key", ["perplexity", "perplexity_original", "kl_nats", "kl_nats_stderr", "protocol"]
)
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_every_metric_may_be_absent_or_infinite(key: str, value: Any) -> None:
    r = record()
    page = render([dataclasses.replace(r, metrics={**r.metrics, key: value})])
    assert len(data_of(page)) == 1
    assert (
        "nan" not in re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL).lower().split()
    )


def test_layers_that_could_not_be_measured_draw_nothing() -> None:
    r = record()
    layers = [{"name": "a", "predicted_nats": 0.1, "measured_nats": None}]
    page = render([dataclasses.replace(r, metrics={**r.metrics, "layers": layers})])
    assert "No tensor was measured alone" in page and 'data-chart="scatter"' not in page


def test_long_numbers_of_a_codec_are_cut_for_the_eye_only() -> None:
    r = record()
    rows = ({**r.ledger[0], "codec": "trellis:step=0.145989095138,states=8"}, *r.ledger[1:])
    page = render([dataclasses.replace(r, ledger=rows)])
    assert "step=0.146" in page and "step=0.1459" not in page.split("<script")[0]
    assert "trellis has states=8." in html.unescape(page)  # what all rows share is said once
    assert data_of(page)[0]["rows"][0][2] == "trellis:step=0.145989095138,states=8"


def test_a_bare_record_is_a_page() -> None:
    page = render([Record("bare", 1000, 4.0, ledger=({"name": "only"},))])
    assert "1 kB" in page and "only" in page


def test_hostile_names_stay_text() -> None:
    r = record()
    rows = tuple({**row, "name": HOSTILE, "codec": HOSTILE, "why": HOSTILE} for row in r.ledger)
    about = {**r.about, "model": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE}
    page = render([dataclasses.replace(r, name=HOSTILE, ledger=rows, about=about)])
    cells = Cells(page)
    assert "img" not in cells.tags
    assert cells.tags.count("script") == 2
    assert cells.rows[1][0] == HOSTILE
    assert data_of(page)[0]["name"] == HOSTILE


def test_nothing_is_fetched_from_anywhere() -> None:
    page = render([record()]).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in page.replace("https://", "http")
    assert not re.search(r"@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|\ssrc=", page)


def test_sizes() -> None:
    assert len(render([record()]).encode()) < 150_000
    assert len(render([record(blocks=60)]).encode()) < 600_000


def test_several_records_share_a_page() -> None:
    pair = [record(), record(octave=-0.5)]
    page = render(pair)
    assert [d["name"] for d in data_of(page)] == [r.name for r in pair]
    assert 'href="#r1"' in page and 'id="r1"' in page


def test_write_leaves_no_pieces(tmp_path: Path) -> None:
    path = write([record()], tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(WaterfillError, match="at least one"):
        render([])


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (words.size(999), "999 B"),
        (words.size(3_196_004), "3.196 MB"),
        (words.size(None), words.DASH),
        (words.big(6_951_168), "6.95 million"),
        (words.figure(49.6), "49.60"),
        (words.figure(0), "0"),
        (words.figure(12345.6), "12,346"),
        (words.nats(0.018), "0.0180"),
        (words.nats(0.0000123), "1.23e-5"),
        (words.error(0.00051), "0.00051"),
        (words.count(float("nan")), words.DASH),
    ],
)
def test_numbers_as_people_read_them(made: str, text: str) -> None:
    assert made == text


def test_what_kept_every_bit_has_no_harm_to_show() -> None:
    exact = Record("exact", 1000, 10.5, about={"lossless": True, "model": "m"})
    page = render([exact])
    assert "Every bit is kept" in page and "exact: every bit was compared" in page
    assert "<h2>Predicted against" not in page and "<h2>Harm against size" not in page
