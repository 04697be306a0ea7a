"""Is harm predicted as it is measured? ``python -m bench.sensitivity [--json FILE] [--quick]``"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bench.harness import Row, main, shared_data
from bench.models import WINDOW, WORK, source_of, text_of
from waterfill.calibrate import Statistics, calibrate
from waterfill.pipeline import compare, compress

PROTOCOL = (
    "compress with default settings; statistics of 32768 tokens; KL(original || compressed) on other text than "
    "the calibration text, strided windows, 16384 tokens (4096 with --quick, and fisher only). english-7m: calibrated "
    "on text it writes itself, measured on english_heldout.txt. stories260K: tinystories.txt, front 60 % and the rest. "
    "demo: the packaged texts. sum = measured over the sum of what was predicted for each tensor; whole = measured "
    "over the KL of all tensors together on a slice of the calibration text; both as factors, max(r, 1 / r)"
)
BAR = 1.25
Texts = list[Path] | Literal["self"] | None


def halves() -> tuple[Path, Path]:
    """The stories in two files: one to calibrate on, one to measure on."""
    WORK.mkdir(parents=True, exist_ok=True)
    text = text_of("stories260K").read_text(encoding="utf-8")
    cut = text.rfind("\n\n", 0, int(0.6 * len(text)))
    found = WORK / "stories-front.txt", WORK / "stories-rest.txt"
    for path, part in zip(found, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return found


def statistics_for(name: str, label: str, texts: Texts, method: str) -> Statistics:
    """Calibrated once and kept for the next run."""
    source = source_of(name)
    folder = WORK / f"sensitivity-{name}-{label}-{method}-{source.fingerprint()[:8]}"
    return calibrate(source, folder, texts, tokens=32768, window=WINDOW[name], method=method)


def measured(name: str, statistics: Statistics, bits: float, **how: Any) -> tuple[float, ...]:
    """KL measured, predicted as a sum, predicted as a whole; nats per token."""
    out = WORK / "sensitivity"
    shutil.rmtree(out, ignore_errors=True)
    path = source_of(name).path
    assert path is not None
    record = compress(str(path), out, bits=bits, calibration=statistics.folder)
    found = compare(out, path, window=WINDOW[name], **how)["kl_nats"]
    return found, record.predicted["kl_nats"], record.predicted["kl_nats_calibration"]


def rows_of(
    name: str, label: str, texts: Texts, held_out: Path | None, method: str, quick: bool, bar: bool
) -> Iterator[Row]:
    """Both factors at each rate; the bar is on those above 2 bits."""
    statistics = statistics_for(name, label, texts, method)
    how = {"text": None if held_out is None else [held_out], "tokens": 4096 if quick else 16384}
    for bits in (2.5, 3, 4) if quick else (1.5, 2, 2.5, 3, 4):
        kl, total, whole = measured(name, statistics, bits, **how)
        at = f"{name} ({label}), {method}, {bits:g} bits"
        limit = BAR if bar and bits > 2 else None
        for kind, predicted in (("sum", total), ("whole", whole)):
            ratio = kl / predicted
            note = f"measured {kl:.4g}, predicted {predicted:.4g}: {ratio:.2f}"
            yield Row(f"{at}: {kind}", max(ratio, 1 / ratio), "", limit, note=note)


def run(quick: bool) -> Iterator[Row]:
    """Fisher with the bar; finite differences, and a text of another kind, for comparison."""
    shared = shared_data() / "text"
    front, rest = halves()
    kinds: tuple[tuple[str, str, Texts, Path | None], ...] = (
        ("stories260K", "stories", [front], rest),
        ("demo", "packaged", None, None),
        ("english-7m", "self", "self", text_of("english-7m", held_out=True)),
    )
    for method in ("fisher",) if quick else ("fisher", "differences"):
        for name, label, texts, held_out in kinds:
            yield from rows_of(name, label, texts, held_out, method, quick, method == "fisher")
    other = text_of("english-7m", held_out=True)
    wiki: Texts = [shared / "wiki.txt"]
    yield from rows_of("english-7m", "wiki", wiki, other, "fisher", quick, False)


if __name__ == "__main__":
    main("sensitivity", PROTOCOL, run)
