"""The page in a real browser: no error, no request, pictures drawn, controls that work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, browser, missing
from tests.report.sample import record
from tests.report.test_html import HOSTILE
from waterfill.report import write
from waterfill.types import Record

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as session:
        session.resize(1280)
        yield session


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write([record(), record(octave=-0.5)], tmp_path_factory.mktemp("report") / "report.html")


def names(chrome: Browser, condition: str = "!r.hidden") -> list[str]:
    script = (
        f"return [...document.querySelector('.ledger').tBodies[0].rows].filter((r) => {condition})"
    )
    found: list[str] = chrome.run(script + ".map((r) => r.cells[0].textContent)")
    return found


@pytest.mark.parametrize(
    "script", ["console.error('oh')", "throw new Error('oh')", "setTimeout(() => nothing.at.all)"]
)
def test_a_bad_page_is_noticed(chrome: Browser, tmp_path: Path, script: str) -> None:
    (tmp_path / "bad.html").write_text(f"<!doctype html><p>hello<script>{script}</script>")
    chrome.open(tmp_path / "bad.html")
    time.sleep(0.1)
    assert chrome.errors()


def test_a_request_is_noticed(chrome: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'>")
    chrome.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/x.png" in chrome.requests()


def test_pictures_are_drawn_without_errors_or_requests(chrome: Browser, page: Path) -> None:
    chrome.open(page)
    assert chrome.run("return document.querySelectorAll('.chart').length") == 6
    drawn = chrome.run(
        "return [...document.querySelectorAll('.chart svg')]"
        ".map((s) => s.querySelectorAll('path, circle').length)"
    )
    assert len(drawn) == 6 and min(drawn) > 0
    assert (
        chrome.run("return document.querySelectorAll('.chart')[0].querySelectorAll('.dot').length")
        == 57
    )
    assert not chrome.run("return document.querySelector('.chart svg').outerHTML.includes('NaN')")
    assert chrome.errors() == []
    assert [r for r in chrome.requests() if not r.startswith(("file:", "data:"))] == []


def test_sorting_and_filtering(chrome: Browser, page: Path) -> None:
    chrome.open(page)
    rows = {r["name"]: r for r in record().ledger}
    chrome.run("document.querySelector('[data-key=nbytes]').click()")
    order = [rows[n]["nbytes"] for n in names(chrome)]
    assert order == sorted(order, reverse=True) and len(order) == len(rows)
    chrome.run("document.querySelector('[data-key=nbytes]').click()")
    order = [rows[n]["nbytes"] for n in names(chrome)]
    assert order == sorted(order)
    assert chrome.run("return document.querySelector('th[aria-sort]').ariaSort") == "ascending"
    chrome.run(
        "const i = document.querySelector('.filter input'); i.value = 'q_proj trellis';"
        "i.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert sorted(names(chrome)) == [f"model.layers.{b}.self_attn.q_proj.weight" for b in range(8)]
    assert "8 of 76 rows" in chrome.run(
        "return document.querySelector('.filter output').textContent"
    )
    assert chrome.errors() == []


def test_tooltips_toggles_and_theme(chrome: Browser, page: Path) -> None:
    chrome.open(page)
    chrome.run("localStorage.clear()")
    chrome.run(
        "const s = document.querySelector('.chart svg'); s.focus();"
        "s.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
    )
    tip = chrome.run(
        "const t = document.querySelector('#tip'); return t.hidden ? '' : t.textContent"
    )
    assert "model.embed_tokens.weight" in tip and "predicted" in tip
    before = chrome.run("return document.querySelector('[data-chart=bits] svg').innerHTML")
    count = chrome.run("return document.querySelectorAll('.toggle button').length")
    assert count == 16
    for i in range(count):
        chrome.run(f"document.querySelectorAll('.toggle button')[{i}].click()")
    assert chrome.run("return document.querySelector('[data-chart=bits] svg').innerHTML") != before
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = chrome.run(colour)
    chrome.run("document.querySelector('#theme').click()")
    assert chrome.run(colour) != light
    chrome.run("document.querySelector('#theme').click()")
    assert chrome.run(colour) == light
    assert chrome.errors() == []


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_sticks_out_at_any_width(chrome: Browser, page: Path, width: int) -> None:
    chrome.resize(width)
    try:
        chrome.open(page)
        assert chrome.run("return document.documentElement.scrollWidth") <= width
        assert chrome.errors() == []
    finally:
        chrome.resize(1280)


def test_hostile_names_run_nothing(chrome: Browser, tmp_path: Path) -> None:
    r = record()
    rows = tuple({**row, "name": HOSTILE, "kind": HOSTILE, "why": HOSTILE} for row in r.ledger)
    layers = [{**row, "name": HOSTILE} for row in r.metrics["layers"]]
    hostile = dataclasses.replace(
        r, name=HOSTILE, ledger=rows, metrics={**r.metrics, "layers": layers}
    )
    chrome.open(write([hostile, r], tmp_path / "hostile.html"))
    for _ in range(2):
        chrome.run(
            "for (const s of document.querySelectorAll('.chart svg'))"
            "{ s.focus(); s.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'})) }"
        )
    assert chrome.run("return window.hacked === undefined")
    assert chrome.errors() == []


def test_bare_records_draw_without_errors(chrome: Browser, tmp_path: Path) -> None:
    bare = Record("bare", 1000, 4.0, ledger=({"name": "only"},), curve=({"nbytes": 5},))
    chrome.open(
        write([bare, dataclasses.replace(record(), metrics={}, curve=())], tmp_path / "bare.html")
    )
    assert chrome.errors() == []


def test_ten_thousand_rows(chrome: Browser, tmp_path: Path) -> None:
    path = write([record(blocks=1110)], tmp_path / "big.html")
    start = time.perf_counter()
    chrome.open(path)
    chrome.run("document.querySelector('[data-key=name]').click()")
    # A couple of seconds on an idle core; the bar leaves room for a busy machine.
    assert time.perf_counter() - start < 20
    assert chrome.run("return document.querySelector('.ledger').tBodies[0].rows.length") == 9994
    assert len(names(chrome)) == 400
    chrome.run("document.querySelector('.more').click()")
    assert len(names(chrome)) == 9994
    assert chrome.errors() == []
