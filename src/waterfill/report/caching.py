"""What KV caches of several methods and sizes cost, as a table and as one HTML page with a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from waterfill.report.drawing import Dot, draw
from waterfill.report.pages import fill, write_whole
from waterfill.report.words import DASH, count, flat, is_number, nats

__all__ = ["cache_remarks", "cache_rows", "write_cache"]

HEAD = (
    "cache",
    "asked",
    "bytes/token",
    "bits",
    "KL",
    "same token",
    "perplexity",
    "tokens/s",
    "speed",
)


def cache_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: the exact cache first, then a row for each that was tried."""
    done = [c for c in result["cells"] if "nbytes" in c]
    paces = sorted(c["exact_tokens_per_second"] for c in done)
    exact = (
        "exact",
        "",
        count(result["exact_bytes_per_token"]),
        f"{8 * result['exact_bytes_per_token'] / result['numbers_per_token']:.2f}",
        "0",
        "100 %",
        _perplexity(result["exact_perplexity"]),
        f"{paces[len(paces) // 2]:.0f}" if paces else DASH,
        "1",
    )
    return HEAD, [exact, *(_row(cell) for cell in result["cells"])]


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    if "nbytes" not in cell:
        return (cell["method"], cell["asked"], *[DASH] * (len(HEAD) - 2))
    return (
        cell["method"],
        cell["asked"],
        count(cell["bytes_per_token"]),
        f"{cell['bits']:.2f}",
        nats(cell["kl_nats"]),
        f"{cell['top1_agreement']:.1%}".replace("%", " %"),
        _perplexity(cell["perplexity"]),
        f"{cell['tokens_per_second']:.0f}",
        f"{cell['tokens_per_second'] / cell['exact_tokens_per_second']:.2f}",
    )


def _perplexity(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else DASH


def cache_remarks(result: Mapping[str, Any]) -> list[str]:
    """What could not be made, and what auto chose: a line each."""
    lines = []
    for cell in result["cells"]:
        name = " at ".join(filter(None, (cell["method"], cell["asked"])))
        if "error" in cell:
            lines.append(f"{name}: not made: {cell['error']}")
        elif cell["method"] == "auto":
            chosen = ", ".join(f"{id} in {n}" for id, n in cell["chosen"].items())
            lines.append(f"{name}: {chosen} layers")
        lines += [f"{name}: {text}" for text in cell.get("warnings", ())]
    return lines


def write_cache(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    head, rows = cache_rows(result)
    page = fill(
        "caching.html",
        model=result["model"],
        exact=count(result["exact_bytes_per_token"]),
        head=head,
        rows=rows,
        remarks=cache_remarks(result),
        chart=_chart(result),
        facts=[*flat(result["protocol"]), *flat(result["statistics"] or {}, "statistics")],
    )
    return write_whole(path, page)


def _chart(result: Mapping[str, Any]) -> Any:
    """KL on a logarithmic axis over bytes per token."""
    lines: dict[str, list[Dot]] = {}
    for cell in result["cells"]:
        if is_number(cell.get("kl_nats")) and cell["kl_nats"] > 0 and math.isfinite(cell["bits"]):
            title = (
                f"{count(cell['bytes_per_token'])} bytes per token, {nats(cell['kl_nats'])} nats, "
                f"{cell['tokens_per_second'] / cell['exact_tokens_per_second']:.2f} of the exact "
                "cache's speed"
            )
            # One line for the stock cache of a backend, and for a method whatever its options.
            name = cell["method"].partition("," if cell.get("stock") else ":")[0]
            lines.setdefault(name, []).append(Dot(cell["bytes_per_token"], cell["kl_nats"], title))
    return draw(
        lines,
        "bytes per token, all layers, everything counted",
        "KL, nats per token",
        "KL over bytes per token, a line for each method",
    )
