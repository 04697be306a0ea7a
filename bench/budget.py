"""Is the file the size that was asked for? ``python -m bench.budget [--json FILE] [--quick]``"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np

from bench.harness import Row, main
from bench.models import WORK, source_of, statistics_of
from waterfill.pipeline import compress

PROTOCOL = (
    "20 budgets, 1.5 to 8 bits per weight evenly spaced, default settings, statistics of 32768 tokens "
    "(4096 with --quick, 5 budgets); slack = budget - size of model.safetensors, in units of what is "
    "allowed (0.1 % of the budget, or 64 bytes if that is more)"
)


def run(quick: bool) -> Iterator[Row]:
    """Worst overrun and worst slack of every model."""
    for name in ("stories260K", "english-7m", "demo"):
        statistics = statistics_of(name, 4096 if quick else 32768)
        slacks, overruns = [], 0
        for bits in np.linspace(1.5, 8, 5 if quick else 20):
            out = WORK / f"budget-{name}"
            shutil.rmtree(out, ignore_errors=True)
            record = compress(
                str(source_of(name).path), out, bits=float(bits), calibration=statistics.folder
            )
            budget = record.about["budget_nbytes"]
            overruns += record.nbytes > budget
            if not record.about["lossless"]:
                slacks.append((budget - record.nbytes) / max(budget / 1000, 64))
        yield Row(f"{name}: files over budget", overruns, "files", 0)
        yield Row(
            f"{name}: worst slack",
            max(slacks),
            "of allowed",
            1.0,
            note=f"median {np.median(slacks):.2f}",
        )


if __name__ == "__main__":
    main("budget", PROTOCOL, run)
