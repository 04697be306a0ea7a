"""Methods side by side: one model, many ways to code it, many sizes, one protocol.

Each cell of the grid is a real artifact: made, measured against the original, and removed. Its
figures are kept in a file of their own, so a comparison that was interrupted goes on from there, and
one that gains a method or a size only makes what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill import __version__
from waterfill.calibrate import Statistics
from waterfill.pipeline.compare import Yardstick, check_protocol
from waterfill.pipeline.compress import compress
from waterfill.pipeline.evolving import MINUTES
from waterfill.pipeline.planning import Progress, quiet
from waterfill.pipeline.preparing import check_early, statistics_for, warnings_of
from waterfill.pipeline.tuning import METHODS
from waterfill.plan.allocation import find_allocator
from waterfill.plan.budget import budget_nbytes, parse_budget
from waterfill.plan.price import AUTO, Rules
from waterfill.registry import codec_ids, find_codec, parse_spec
from waterfill.sources import Source, open_source
from waterfill.types import BudgetError, Record, SpecError, WaterfillError

FILE = "comparison.json"
METRICS = ("kl_nats", "kl_nats_stderr", "kl_nats_p99", "perplexity", "top1_agreement")


@dataclass(frozen=True)
class Method:
    """A way to code a model, written ``CODEC[@ALLOCATOR][+TUNING]``.

    Attributes
    ----------
    text : as it was written
    codec : a codec's id with options or without, or ``auto``
    options : of `waterfill.compress`, as far as others were named
    """

    text: str
    codec: str
    options: Mapping[str, str]


def parse_method(text: str) -> Method:
    """``integer:bits=3@uniform+pv`` -> Method; SpecError if it names what is not there."""
    match = re.fullmatch(r"(.+?)(?:@(\w+))?(?:\+(\w+))?", text.strip())
    if match is None:
        raise SpecError("a method is empty; write for example trellis or integer@uniform")
    if match[1] != AUTO:
        parse_spec(match[1])
    if match[2]:
        find_allocator(match[2])
    if match[3] and match[3] not in METHODS:
        raise SpecError(f"{text}: tuning is {', '.join(METHODS)}, not {match[3]}")
    options = {"allocate": match[2], "tune": match[3]}
    return Method(text.strip(), match[1], {k: v for k, v in options.items() if v})


def every_method() -> list[str]:
    """The ids of all codecs that change weights, and `auto`, which mixes them."""
    return [*(name for name in codec_ids() if find_codec(name).lossy), AUTO]


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes
    ----------
    source : opened model
    statistics : of its calibration
    yardstick : what artifacts are measured by
    propagate, minutes : as of `waterfill.compress`
    """

    source: Source
    statistics: Statistics
    yardstick: Yardstick
    propagate: bool
    minutes: float

    @property
    def totals(self) -> dict[str, int]:
        """Parameters and original bytes, as budgets want them."""
        infos = self.statistics.infos.values()
        return {
            "params": sum(i.size for i in infos if not i.group),
            "original_nbytes": sum(i.nbytes for i in infos),
        }


def compare_methods(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = (),
    sizes: Sequence[str | float] = (2, 2.5, 3, 4),
    text: Sequence[str | Path] | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_tokens: int = 32768,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = 16384,
    activations: str | None = None,
    propagate: bool = False,
    minutes: float = MINUTES,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Compress a model by every method to every size, and measure each against the original.

    Parameters
    ----------
    model : folder in Hugging Face layout, hub id, or ``"demo"``
    out : folder that keeps the cells; an earlier comparison of the same model in it is gone on with
    methods : ``CODEC[@ALLOCATOR][+TUNING]`` each; all lossy codecs and `auto` by default
    sizes : bits per weight (``3``), bytes (``"250MB"``) or shares (``"20%"``), all of the whole file
    text, window, stride, tokens, activations : what is measured on, and how; see `waterfill.compare`
    calibration, calibration_tokens : see `waterfill.compress`
    propagate : encode a second time, as `waterfill.compress` does; most papers encode once
    minutes : for each cell of an allocator that searches

    Returns
    -------
    dict
        ``cells`` (one for each method and size; one that could not be made has ``error``), ``best``
        (the method of least KL at each size), ``protocol``, ``calibration``, ``model``. Also
        written to ``out/comparison.json``.

    Raises
    ------
    WaterfillError
        If the model, a method, a size or the text is not what it must be.
    """
    out = Path(out)
    chosen = [parse_method(text) for text in dict.fromkeys(methods or every_method())]
    source = open_source(model, trust_remote_code=trust_remote_code)
    for method in chosen:
        for size in sizes:
            check_early(source, Rules((), (("*", method.codec),)), **parse_budget(str(size)))
    check_protocol(text, activations)
    _refuse_others(out, source.fingerprint())
    out.mkdir(parents=True, exist_ok=True)
    statistics = statistics_for(source, out, calibration, calibration_tokens, progress)
    yardstick = Yardstick.open(
        source,
        text,
        window=window,
        stride=stride,
        tokens=tokens,
        activations=activations,
        trust_remote_code=trust_remote_code,
    )
    bench = Bench(source, statistics, yardstick, propagate, minutes)
    cells = []
    for cell in _grid(bench, out, chosen, sizes):
        cells.append(cell)
        progress("comparing", len(cells), len(chosen) * len(sizes))
    result = {
        "model": source.name,
        "fingerprint": source.fingerprint(),
        **bench.totals,
        "waterfill": __version__,
        "calibration": dict(statistics.protocol),
        "protocol": dict(yardstick.protocol),
        "propagate": propagate,
        "cells": cells,
        "best": _best(cells),
    }
    _write(out / FILE, result)
    return result


def _best(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The method of least KL at each size, as options of `waterfill compress`."""
    found: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        if "kl_nats" in cell:
            old = found.setdefault(cell["asked"], cell)
            found[cell["asked"]] = min(old, cell, key=lambda c: float(c["kl_nats"]))
    best = []
    for asked, cell in found.items():
        method = parse_method(cell["method"])
        ((kind, value),) = parse_budget(asked).items()
        named = {kind: f"{value:g}" if isinstance(value, float) else value, **method.options}
        options = [word for key, text in named.items() for word in (f"--{key}", text)]
        row = {"asked": asked, "method": method.text, "codec": method.codec, "options": options}
        best.append({**row, "kl_nats": cell["kl_nats"]})
    return best


def _refuse_others(out: Path, fingerprint: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise WaterfillError(f"{out} is a file; choose another name")
    known = out / FILE
    if known.exists():
        if json.loads(known.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
            raise WaterfillError(f"{out} compares another model; choose another name")
    elif any(path.name not in ("statistics", "cells") for path in out.iterdir()):
        raise WaterfillError(f"{out} holds other things than a comparison; choose another name")


def _grid(
    bench: Bench, out: Path, methods: Sequence[Method], sizes: Sequence[str | float]
) -> Iterator[dict[str, Any]]:
    """Cells, those of one method after another: its prices serve all sizes."""
    for method in methods:
        for size in sizes:
            budget = budget_nbytes(**bench.totals, **parse_budget(str(size)))  # type: ignore[arg-type]
            options = [bench.propagate, bench.minutes] if method.options else [bench.propagate]
            key = [
                bench.source.fingerprint(), bench.statistics.digest, method.text, budget,
                bench.yardstick.protocol, options, __version__,
            ]  # fmt: skip
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            kept = out / "cells" / f"{digest}.json"
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                _write(kept, _cell(bench, out / "cells" / f"{digest}.artifact", method, budget))
            cell: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            yield {"method": method.text, "asked": str(size), "budget_nbytes": budget, **cell}


def _cell(bench: Bench, folder: Path, method: Method, budget: int) -> dict[str, Any]:
    """Make an artifact, measure it, remove it."""
    began = time.perf_counter()
    try:
        record = compress(
            bench.source.path,
            folder,
            size=budget,
            codec={"*": method.codec},
            calibration=bench.statistics.folder,
            propagate=bench.propagate,
            minutes=bench.minutes,
            force=True,
            **method.options,  # type: ignore[arg-type]
        )
        seconds = time.perf_counter() - began
        found = bench.yardstick.measure(folder)
    except BudgetError as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    of_model = warnings_of(bench.statistics)  # and so of no one method
    return {
        "nbytes": record.nbytes,
        "bits_per_weight": record.bits_per_weight,
        "predicted_kl_nats": record.predicted["kl_nats"],
        **{name: found[name] for name in METRICS if name in found},
        "chosen": shares(record),
        "warnings": [w for w in record.about["warnings"] if w not in of_model],
        "compress_seconds": round(seconds, 2),
    }


def shares(record: Record) -> dict[str, float]:
    """Codec id -> share of the weights that it codes; those that are stored once counted once."""
    weights: dict[str, int] = {}
    for row in record.ledger:
        codec = str(row["codec"])
        if codec and not codec.startswith("same as"):
            name = codec.partition(":")[0]
            weights[name] = weights.get(name, 0) + int(row["params"])
    total = sum(weights.values()) or 1
    return {k: round(v / total, 4) for k, v in sorted(weights.items(), key=lambda x: -x[1])}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
