"""A comparison of methods as a table and as one HTML page with a picture.

The picture is written here as SVG: the page needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from waterfill.report.words import DASH, count, flat, nats, size
from waterfill.types import WaterfillError

__all__ = ["comparison_rows", "mixing", "remarks", "write_comparison"]

AUTO = "auto"
LONGEST = 32  # letters of a name, in the picture
NAME_HEIGHT = 15
WIDTH, LEFT, RIGHT, TOP = 920, 70, 700, 20
LEAST_HEIGHT, MARGIN = 520, 50


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
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise WaterfillError("reports need jinja2: pip install 'waterfill[cli]'") from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    head, rows = comparison_rows(result)
    css = resources.files("waterfill.report").joinpath("report.css").read_text(encoding="utf-8")
    template = resources.files("waterfill.report").joinpath("comparison.html")
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        model=result["model"],
        params=count(result["params"]),
        original=size(result["original_nbytes"]),
        head=head,
        rows=rows,
        mixing=mixing(result),
        picture=_picture(result),
        cells=[c for c in result["cells"] if "kl_nats" in c],
        remarks=remarks(result),
        facts=[*flat(result["protocol"]), *flat(result["calibration"], "calibration")],
        nats=nats,
        count=count,
        css=Markup(css),
    )
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


def _picture(result: Mapping[str, Any]) -> dict[str, Any]:
    """Lines of a chart, KL on a logarithmic axis over bits per weight, in pixels."""
    cells = [c for c in result["cells"] if c.get("kl_nats", 0) > 0]
    if not cells:
        return {"lines": [], "x": [], "y": [], "width": WIDTH, "height": MARGIN}
    methods = list(dict.fromkeys(c["method"] for c in cells))
    height = max(LEAST_HEIGHT, NAME_HEIGHT * (len(methods) + 2))
    bottom = height - MARGIN
    bits = [c["bits_per_weight"] for c in cells]
    logs = [math.log10(c["kl_nats"]) for c in cells]
    x = _scale(min(bits), max(bits), LEFT, RIGHT)
    y = _scale(min(logs), max(logs), bottom, TOP)
    lines = []
    for number, method in enumerate(methods):
        own = sorted((c for c in cells if c["method"] == method), key=lambda c: c["nbytes"])
        dots = [
            {
                "x": x(c["bits_per_weight"]),
                "y": y(math.log10(c["kl_nats"])),
                "title": f"{method}: {c['bits_per_weight']:.2f} bits, {nats(c['kl_nats'])} nats",
            }
            for c in own
        ]
        lines.append(
            {
                "method": method,
                "name": method if len(method) <= LONGEST else method[: LONGEST - 1] + "…",
                "dots": dots,
                "path": " ".join(f"{d['x']:.1f},{d['y']:.1f}" for d in dots),
                "hue": round(360 * number / len(methods)),
                "dashed": number % 2 == 1,
                "at": dots[-1]["y"],
            }
        )
    return {
        "lines": _apart(lines, height - NAME_HEIGHT),
        "x": [(x(v), f"{v:g}") for v in _ticks(min(bits), max(bits))],
        "y": [(y(math.log10(v)), f"{v:g}") for v in _log_ticks(min(logs), max(logs))],
        "width": WIDTH,
        "height": height,
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "bottom": bottom,
    }


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    pad = 0.04 * (high - low)
    return lambda v: start + (v - low + pad) / (high - low + 2 * pad) * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.25, 0.5, 1.0, 2.0, 4.0) if (high - low) / s <= 9 or s == 4.0)
    near = 0.02 * step  # files end a hair under the size that was asked for
    first, last = math.ceil((low - near) / step), math.floor((high + near) / step)
    return [step * i for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and numbers between where those are few."""
    steps = (1,) if high - low > 2 else (1, 2, 5)
    all_of_them = [
        float(f"{step}e{e}") for e in range(math.floor(low), math.ceil(high) + 1) for step in steps
    ]
    return [v for v in all_of_them if low - 0.02 <= math.log10(v) <= high + 0.02]


def _apart(lines: Sequence[dict[str, Any]], bottom: float) -> list[dict[str, Any]]:
    """Names beside the ends of their lines, moved apart where they would lie on one another."""
    ordered = sorted(lines, key=lambda line: float(line["at"]))
    last = 0.0
    for line in ordered:
        last = line["name_y"] = max(line["at"], last + NAME_HEIGHT)
    last = bottom
    for line in reversed(ordered):
        line["name_y"] = min(line["name_y"], last)
        last = line["name_y"] - NAME_HEIGHT
    return ordered
