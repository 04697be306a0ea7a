"""Every method on three models, one protocol. ``python -m bench.compare [MODEL ...] [--quick] [--write PAGE]``

Goes on where it was stopped. ``--write docs/gallery.md`` puts the grid, and the claims that
``python -m bench.gallery --json out/bench/gallery.json`` measured (in one run or several), into the page.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Row, main
from bench.measure import Subject
from bench.models import WINDOW, WORK, text_of
from waterfill import compare_methods
from waterfill.pipeline.methods import every_method
from waterfill.report import comparison_rows, mixing

PROTOCOL = (
    "waterfill compare: KL(original || compressed) in nats per token on held-out text, files of at most so many bits "
    "per weight, every byte counted; calibration and text as in bench.quality, 8192 tokens measured, encoded once "
    "(no propagation). Noise: a file that is a few bytes smaller rounds otherwise, and does a little more or less "
    "harm; so the best single codec is also made at four sizes within 0.2 %, and the noise of a ratio of two files is "
    "twice the standard deviation of the logarithm of such a ratio, sizes allowed for at 6.02 dB a bit"
)
MODELS = ("english-7m", "stories260K", "demo")
SIZES = ("2", "2.5", "3", "4", "5")
QUICK_SIZES = ("2.5", "3", "4", "5")
NEAR = (0.998, 0.999, 1.001, 1.002)
TOKENS = 8192
CLAIMS = "gallery*.json"
# Beside every codec as it comes: solvers, and ways to spend a budget, on the field's common ground.
VARIANTS = (
    "integer:solver=nearest",
    "integer:solver=coordinate",
    "integer:pack=coded",
    "integer@uniform",
    "integer@baq",
    "integer@program",
)
MARK = "<!-- from here on written by python -m bench.compare --write docs/gallery.md -->"


def compared(
    name: str, sizes: Sequence[str], methods: Sequence[str] | None = None
) -> dict[str, Any]:
    """The grid of one model; cells that are there are not made again while the code is the same."""
    subject = Subject(name, TOKENS)
    methods = [*every_method(), *VARIANTS] if methods is None else methods

    def said(stage: str, done: int, total: int) -> None:
        if stage == "comparing":
            sys.stderr.write(f"\r{name}: {done}/{total} cells ")

    found = compare_methods(
        str(subject.path),
        subject.folder / "compared",
        methods=methods,
        sizes=sizes,
        text=[text_of(name, held_out=True)],
        calibration=subject.statistics,
        window=WINDOW[name],
        tokens=TOKENS,
        progress=said,
    )
    return {**found, "name": name}


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """`auto` over the best single codec at each size."""
    singles = [c for c in result["cells"] if c["method"] in every_method() and "kl_nats" in c]
    for auto in (c for c in singles if c["method"] == "auto"):
        others = [c for c in singles if c["asked"] == auto["asked"] and c is not auto]
        best = min(others, key=lambda c: float(c["kl_nats"]))
        noise = noise_of(result["name"], best)
        note = (
            f"{best['method']} {best['kl_nats']:.4g}, auto {auto['kl_nats']:.4g} nats; noise {noise:.3f}; "
            f"standard error of each over the text {best['kl_nats_stderr'] / best['kl_nats']:.3f}"
        )
        name = f"{result['name']}, {auto['asked']} bits: auto over the best single codec"
        yield Row(name, auto["kl_nats"] / best["kl_nats"], "ratio", 1 + noise, note=note)


def noise_of(name: str, cell: dict[str, Any]) -> float:
    """Two standard deviations of the logarithm of a ratio of KLs, of two files like this one."""
    sizes = [f"{float(cell['asked']) * factor:.4f}" for factor in NEAR]
    near = [cell, *compared(name, sizes, [cell["method"]])["cells"]]
    logs = [math.log(c["kl_nats"]) + math.log(4) * c["bits_per_weight"] for c in near]
    return 2 * math.sqrt(2) * statistics.stdev(logs)


def page(results: Sequence[dict[str, Any]], claims: Sequence[dict[str, Any]]) -> str:
    """The part of docs/gallery.md that is measured, as Markdown."""
    lines = [MARK, "", f"Protocol: {PROTOCOL}."]
    for result in results:
        head, table = comparison_rows(result)
        lines += [
            "",
            f"## {result['name']}",
            "",
            f"{result['params']:,} parameters. KL in nats per token, * the least.",
        ]
        lines += ["", *_table((head[0], *(f"{h} bits" for h in head[1:])), table), ""]
        lines += [f"- {line}" for line in mixing(result)]
    if claims:
        lines += [
            "",
            "## What papers claim",
            "",
            "`python -m bench.gallery`: a ratio of at most 1 reproduces the claim.",
            "",
        ]
        cells = [(c["name"], f"{c['measured']:.3g}", _short(c["note"])) for c in claims]
        lines += _table(("claim", "ratio", "measured"), cells)
    return "\n".join(lines) + "\n"


def _short(note: str) -> str:
    return note if len(note) < 160 else note[:157] + "..."


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    text = ["| " + " | ".join(row) + " |" for row in cells]
    return [text[0], "|" + "---|" * len(head), *text[1:]]


def write(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Replace what was written into a page the last time."""
    files = sorted(WORK.glob(CLAIMS))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    claims = [row for row in rows if row["note"].startswith(("reproduced", "contradicted"))]
    kept = path.read_text(encoding="utf-8").partition(MARK)[0] if path.exists() else ""
    path.write_text(kept + page(results, claims), encoding="utf-8")


def run(names: Sequence[str], path: Path | None, quick: bool) -> Iterator[Row]:
    """The grids, the page, then what `auto` is held to."""
    results = [compared(name, QUICK_SIZES if quick else SIZES) for name in names]
    if path is not None:
        write(path, results)
    for result in results:
        yield from rows(result)


if __name__ == "__main__":
    words = sys.argv[1:]
    into = Path(words[words.index("--write") + 1]) if "--write" in words else None
    chosen = [word for word in words if word in MODELS] or list(MODELS)
    sys.argv[1:] = [w for w in words if w not in (*MODELS, "--write", str(into))]
    main("compare", PROTOCOL, lambda quick: run(chosen, into, quick))
