"""Charts as SVG written in Python: a line for each name, its KL on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = ["Dot", "draw"]

LONGEST = 32  # letters of a name
NAME_HEIGHT = 15
WIDTH, LEFT, RIGHT, TOP = 920, 70, 700, 20
LEAST_HEIGHT, MARGIN = 520, 50
MOST_TICKS = 10


@dataclass(frozen=True)
class Dot:
    """A measurement: where it lies, y above 0, and what is said where one points at it."""

    x: float
    y: float
    title: str


def draw(lines: Mapping[str, Sequence[Dot]], x_words: str, y_words: str, about: str) -> Any:
    """A chart as safe markup.

    Parameters
    ----------
    lines : name -> its dots, in any order
    x_words, y_words : what the axes show
    about : the chart in a sentence, for those who do not see it
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("waterfill.report").joinpath("chart.html")
    words = {"x_words": x_words, "y_words": y_words, "about": about}
    made = environment.from_string(template.read_text(encoding="utf-8"))
    return Markup(made.render(picture=_picture(lines), **words))


def _picture(named: Mapping[str, Sequence[Dot]]) -> dict[str, Any]:
    """All that the template puts in its place, in pixels."""
    dots = [dot for one in named.values() for dot in one]
    if not dots:
        return {"lines": [], "x": [], "y": [], "width": WIDTH, "height": MARGIN}
    height = max(LEAST_HEIGHT, NAME_HEIGHT * (len(named) + 2))
    bottom = height - MARGIN
    across = [dot.x for dot in dots]
    logs = [math.log10(dot.y) for dot in dots]
    x = _scale(min(across), max(across), LEFT, RIGHT)
    y = _scale(min(logs), max(logs), bottom, TOP)
    lines = []
    for number, (name, own) in enumerate(named.items()):
        at = [
            {"x": x(d.x), "y": y(math.log10(d.y)), "title": f"{name}: {d.title}"}
            for d in sorted(own, key=lambda d: d.x)
        ]
        lines.append(
            {
                "method": name,
                "name": name if len(name) <= LONGEST else name[: LONGEST - 1] + "…",
                "dots": at,
                "path": " ".join(f"{d['x']:.1f},{d['y']:.1f}" for d in at),
                "hue": round(360 * number / len(named)),
                "dashed": number % 2 == 1,
                "at": at[-1]["y"],
            }
        )
    return {
        "lines": _apart(lines, height - NAME_HEIGHT),
        "x": [(x(v), f"{v:,g}") for v in _ticks(min(across), max(across))],
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
    """Round numbers, a quarter apart at least."""
    unit = 10.0 ** max(0, math.floor(math.log10(max(high - low, 1e-9))))
    steps = [unit * s for s in (0.25, 0.5, 1.0, 2.0, 4.0)]
    step = next((s for s in steps if (high - low) / s < MOST_TICKS), steps[-1])
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
