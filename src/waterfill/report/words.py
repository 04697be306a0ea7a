"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

__all__ = ["DASH", "TIMES", "big", "count", "error", "figure", "flat", "is_number", "nats", "size"]

DASH = "\u2013"  # stands for a figure that is not there
TIMES = "\u00d7"


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float (not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: Any) -> str:
    """``1,234,567``; a dash for what is not a number."""
    return f"{round(value):,}" if is_number(value) else DASH


def size(nbytes: Any) -> str:
    """Bytes in decimal units, three or four significant digits: ``3.196 MB``."""
    if not is_number(nbytes):
        return DASH
    value, unit = float(nbytes), 0
    units = ("B", "kB", "MB", "GB", "TB")
    while abs(value) >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.4g} {units[unit]}"


def big(value: Any) -> str:
    """A count in words' reach: ``6.95 million``."""
    if not is_number(value):
        return DASH
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= limit:
            return f"{value / limit:.3g} {word}"
    return count(value)


def figure(value: Any, digits: int = 4) -> str:
    """Significant digits without an exponent where that stays short."""
    if not is_number(value):
        return DASH
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(places, 6))}f}" if abs(value) >= 1e-3 else nats(value)


def nats(value: Any) -> str:
    """Three significant digits; small ones as ``1.23e-5``."""
    if not is_number(value):
        return DASH
    if value == 0:
        return "0"
    if abs(value) >= 1e-3:
        return f"{value:#.3g}".removesuffix(".")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def error(value: float) -> str:
    """The uncertainty of a figure, two significant digits: ``0.00051``."""
    return f"{value:.2g}" if value < 1e-5 else f"{value:.{1 - math.floor(math.log10(value))}f}"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON -> (key, text) pairs in order, for a list of facts."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in flat(v, f"{prefix} {k}".strip())]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(v, Mapping) for v in value):
            keys = [f"{prefix} {i}" if len(value) > 1 else prefix for i in range(1, len(value) + 1)]
            return [pair for k, v in zip(keys, value, strict=True) for pair in flat(v, k)]
        return [(prefix, ", ".join(str(v) for v in value) or "none")]
    if value is None:
        return [(prefix, "none")]
    if isinstance(value, bool):
        return [(prefix, "yes" if value else "no")]
    return [(prefix, f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value))]
