"""The first screen of a report: what was asked, what came out, and what each figure means."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from waterfill.report.words import DASH, TIMES, big, count, error, figure, is_number, nats, size
from waterfill.types import Record

__all__ = ["Figure", "headline", "is_exact", "lead", "prediction"]

UNMEASURED = "not measured"


@dataclass(frozen=True)
class Figure:
    """One headline number, what stands beside it, and what it is in one line."""

    label: str
    value: str
    beside: str
    explain: str
    missing: bool = False


def lead(record: Record, total: Mapping[str, Any]) -> str:
    """One sentence that says what happened."""
    params, before = total["params"], total["original_nbytes"]
    start = f"{big(params)} parameters in" if params else "The weights take"
    text = f"{start} {size(record.nbytes)}: {figure(record.bits_per_weight, 3)} bits per weight"
    if before and record.nbytes:
        text += f", {figure(before / record.nbytes, 3)} times smaller than the original"
    return text + (". Every bit is kept." if is_exact(record) else ".")


def is_exact(record: Record) -> bool:
    """Whether nothing was changed: then there is no harm to show."""
    return record.about.get("lossless") is True


def headline(record: Record, total: Mapping[str, Any]) -> list[Figure]:
    """The six figures; one that was not measured says so."""
    return [
        _size(record),
        Figure(
            "Bits per weight",
            figure(record.bits_per_weight),
            f"over {count(total['params'])} parameters" if total["params"] else "",
            "Bits of the whole file divided by the number of weights.",
        ),
        _ratio(record, total["original_nbytes"]),
        _perplexity(record.metrics),
        _divergence(record),
        _agreement(record.metrics),
    ]


def prediction(record: Record, layers: Sequence[Mapping[str, Any]]) -> str:
    """Prediction against measurement, in words."""
    pairs = [(row.get("predicted_nats"), row.get("measured_nats")) for row in layers]
    ratios = [m / p for p, m in pairs if is_number(p) and is_number(m) and p > 0 and m > 0]
    predicted, measured = record.predicted.get("kl_nats"), record.metrics.get("kl_nats")
    whole = ""
    if is_number(measured) and is_number(predicted):
        whole = f"The whole model was predicted to lose {nats(predicted)} nats per token "
        again = record.predicted.get("kl_nats_calibration")
        if is_number(again):
            whole += f"(all tensors together, on calibration text: {nats(again)}) "
        whole += f"and lost {nats(measured)}. "
    if not ratios:
        return whole + (
            "No tensor was measured alone, so there is no picture here; "
            "waterfill eval --layers measures them."
        )
    near = sum(0.5 <= r <= 2 for r in ratios)
    return whole + (
        f"Tensor by tensor, the median of measured over predicted is "
        f"{figure(statistics.median(ratios), 3)}; {near} of {len(ratios)} lie within "
        f"a factor of two (shaded)."
    )


def _size(record: Record) -> Figure:
    budget = record.about.get("budget_nbytes")
    beside = f"{count(record.nbytes)} bytes"
    if is_number(budget) and budget > 0:
        beside += f" of {count(budget)} asked ({record.nbytes / budget:.2%})"
    explain = "Every byte of the weights file, its header and index included."
    return Figure("File size", size(record.nbytes), beside, explain)


def _ratio(record: Record, before: Any) -> Figure:
    explain = "Size of the original weights over the size of this file."
    if not is_number(before) or not before or not record.nbytes:
        return Figure("Ratio", DASH, "original size unknown", explain, missing=True)
    value = f"{figure(before / record.nbytes, 3)}{TIMES}"
    return Figure("Ratio", value, f"from {size(before)}", explain)


def _perplexity(metrics: Mapping[str, Any]) -> Figure:
    explain = "How many tokens the model hesitates between, before and after; lower is better."
    before, after = metrics.get("perplexity_original"), metrics.get("perplexity")
    if not is_number(after):
        return Figure("Perplexity", UNMEASURED, "", explain, missing=True)
    if not is_number(before) or not before:
        return Figure("Perplexity", figure(after), "original not measured", explain)
    value = f"{figure(before)} \u2192 {figure(after)}"
    return Figure("Perplexity", value, f"{after / before - 1:+.2%}", explain)


def _divergence(record: Record) -> Figure:
    explain = "How far its next-token distribution moved from the original's; 0 is identical."
    measured, stderr = record.metrics.get("kl_nats"), record.metrics.get("kl_nats_stderr")
    predicted = record.predicted.get("kl_nats")
    beside = (
        [f"\u00b1 {error(stderr)}"]
        if is_number(stderr) and stderr > 0 and is_number(measured)
        else []
    )
    beside += [f"predicted {nats(predicted)}"] if is_number(predicted) else []
    if is_exact(record) and not is_number(measured):
        return Figure("KL divergence", "0", "exact: every bit was compared", explain)
    value = f"{nats(measured)} nats" if is_number(measured) else UNMEASURED
    return Figure("KL divergence", value, ", ".join(beside), explain, not is_number(measured))


def _agreement(metrics: Mapping[str, Any]) -> Figure:
    explain = "How often both models put the same token first."
    same, tokens = metrics.get("top1_agreement"), metrics.get("tokens")
    if not is_number(same):
        return Figure("Top-1 agreement", UNMEASURED, "", explain, missing=True)
    beside = f"of {count(tokens)} tokens" if is_number(tokens) else ""
    return Figure("Top-1 agreement", f"{same:.2%}", beside, explain)
