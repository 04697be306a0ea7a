"""A comparison of methods as a table and as one HTML page with a picture.

The picture is written here as SVG: the page needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from waterfill.report.drawing import Dot, draw
from waterfill.report.pages import fill, write_whole
from waterfill.report.words import DASH, count, flat, nats, size

__all__ = ["comparison_rows", "mixing", "remarks", "write_comparison"]

AUTO = "auto"


def comparison_rows(
    result: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the grid: a method each, its KL at each size; the least has a star."""
    sizes = list(dict.fromkeys(c["asked"] for c in result["cells"]))
    least = {asked: min(_kls(result, asked), default=math.nan) for asked in sizes}
    rows = []
    for method in dict.fromkeys(c["method"] for c in result["cells"]):
        cells = {c["asked"]: c for c in result["cells"] if c["method"] == method}
        rows.append((method, *(_cell(cells.get(asked), least[asked]) for asked in sizes)))
    return ("method", *(f"at {asked}" for asked in sizes)), rows


def _kls(result: Mapping[str, Any], asked: str) -> list[float]:
    return [c["kl_nats"] for c in result["cells"] if c["asked"] == asked and "kl_nats" in c]


def _cell(cell: Mapping[str, Any] | None, least: float) -> str:
    if cell is None or "kl_nats" not in cell:
        return DASH
    return nats(cell["kl_nats"]) + ("*" if cell["kl_nats"] == least else "")


def mixing(result: Mapping[str, Any]) -> list[str]:
    """What `auto` chose at each size, and its KL over the best single method's: a line each."""
    lines = []
    for cell in result["cells"]:
        if cell["method"] != AUTO or "kl_nats" not in cell:
            continue
        others = [
            c
            for c in result["cells"]
            if c["asked"] == cell["asked"] and c["method"] != AUTO and "kl_nats" in c
        ]
        chosen = ", ".join(f"{name} {share:.1%}" for name, share in cell["chosen"].items())
        line = f"auto at {cell['asked']} chose, by weights: {chosen}"
        if others:
            best = min(others, key=lambda c: float(c["kl_nats"]))
            ratio = cell["kl_nats"] / best["kl_nats"]
            noise = math.hypot(
                cell["kl_nats_stderr"] / cell["kl_nats"], best["kl_nats_stderr"] / best["kl_nats"]
            )
            line += (
                f"; {ratio:.3f} of the KL of {best['method']}, the best alone (noise {noise:.3f})"
            )
        lines.append(line)
    return lines


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What went otherwise than asked, and in which cells: a line each."""
    found: dict[str, list[str]] = {}
    for cell in result["cells"]:
        failed = [f"not made: {cell['error']}"] if "error" in cell else []
        for text in (*failed, *cell.get("warnings", ())):
            found.setdefault(text, []).append(f"{cell['method']} at {cell['asked']}")
    return [f"{', '.join(cells)}: {text}" for text, cells in found.items()]


def write_comparison(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    head, rows = comparison_rows(result)
    page = fill(
        "comparison.html",
        model=result["model"],
        params=count(result["params"]),
        original=size(result["original_nbytes"]),
        head=head,
        rows=rows,
        mixing=mixing(result),
        chart=_chart(result),
        cells=[c for c in result["cells"] if "kl_nats" in c],
        remarks=remarks(result),
        facts=[*flat(result["protocol"]), *flat(result["calibration"], "calibration")],
        nats=nats,
        count=count,
    )
    return write_whole(path, page)


def _chart(result: Mapping[str, Any]) -> Any:
    """KL on a logarithmic axis over bits per weight."""
    lines: dict[str, list[Dot]] = {}
    for cell in result["cells"]:
        if cell.get("kl_nats", 0) > 0:
            title = f"{cell['bits_per_weight']:.2f} bits, {nats(cell['kl_nats'])} nats"
            dot = Dot(cell["bits_per_weight"], cell["kl_nats"], title)
            lines.setdefault(cell["method"], []).append(dot)
    return draw(
        lines,
        "bits per weight, of the whole file",
        "KL, nats per token",
        "KL over bits per weight, a line for each method",
    )
